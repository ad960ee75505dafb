"""Adam for small networks, and as part of an update that torch.compile turns into one graph."""

import math
from collections.abc import Iterable
from typing import Any

import torch


class Adam:
    """Adam: PyTorch's fused kernel or, while an update is compiled, the same arithmetic in the open.

    What torch.optim.Adam does around that kernel takes longer than the kernel itself on networks of this size, so none
    of it is here. A group counts its steps as one: those at which any of its parameters has a gradient. A learning rate
    is a tensor, so that filling in another needs no other graph.

    Source: Kingma, Ba, 2015, arXiv 1412.6980, algorithm 1; weight decay is L2, added to the gradient.
    """

    BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float = 1e-3) -> None:
        """Each group holds `params` and may hold `lr` and `weight_decay`."""
        self.param_groups: list[dict[str, Any]] = []
        for group in groups:
            parameters = list(group["params"])
            self.param_groups.append(
                {
                    "params": parameters,
                    "lr": torch.tensor(float(group.get("lr", lr)), device=parameters[0].device),
                    "weight_decay": float(group.get("weight_decay", 0)),
                    "step": torch.zeros((), dtype=torch.float32, device=parameters[0].device),
                    "means": [torch.zeros_like(parameter) for parameter in parameters],  # m, of the gradient
                    "squares": [torch.zeros_like(parameter) for parameter in parameters],  # v
                }
            )

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            columns = zip(group["params"], group["means"], group["squares"], strict=True)
            rows = [(p, p.grad, mean, square) for p, mean, square in columns if p.grad is not None]
            if not rows:
                continue
            parameters, gradients, means, squares = map(list, zip(*rows, strict=True))
            group["step"].add_(1)
            if torch.compiler.is_compiling():
                self._step_in_the_open(group, parameters, gradients, means, squares)
                continue
            torch._fused_adam_(
                parameters,
                gradients,
                means,
                squares,
                [],
                [group["step"]] * len(parameters),
                lr=group["lr"],
                beta1=self.BETA1,
                beta2=self.BETA2,
                weight_decay=group["weight_decay"],
                eps=self.EPSILON,
                amsgrad=False,
                maximize=False,
            )

    def _step_in_the_open(
        self, group: dict[str, Any], parameters: list[Any], gradients: list[Any], means: list[Any], squares: list[Any]
    ) -> None:
        """m <- beta1 m + (1 - beta1) g,  v <- beta2 v + (1 - beta2) g^2,
        weight <- weight - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + epsilon)
        """
        if group["weight_decay"]:
            gradients = list(torch._foreach_add(gradients, parameters, alpha=group["weight_decay"]))
        torch._foreach_lerp_(means, gradients, 1 - self.BETA1)
        torch._foreach_mul_(squares, self.BETA2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - self.BETA2)
        # beta^t as an exponential: of a power, the compiler takes a new one for every few weights
        step, dtype = group["step"].double(), group["lr"].dtype
        correction1, correction2 = (
            (1 - torch.exp(step * math.log(beta))).to(dtype) for beta in (self.BETA1, self.BETA2)
        )
        scales = torch._foreach_sqrt(squares)
        torch._foreach_div_(scales, correction2.sqrt())
        torch._foreach_add_(scales, self.EPSILON)
        torch._foreach_mul_(scales, -correction1 / group["lr"])
        torch._foreach_addcdiv_(parameters, means, scales)

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """All but the parameters themselves and the constants, by group."""
        names = "lr", "step", "means", "squares"
        return {"groups": [{name: group[name] for name in names} for group in self.param_groups]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for group, saved in zip(self.param_groups, state["groups"], strict=True):
            for name in ("lr", "step"):
                group[name].copy_(saved[name])
            for name in ("means", "squares"):
                for tensor, value in zip(group[name], saved[name], strict=True):
                    tensor.copy_(value)
