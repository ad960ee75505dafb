"""Adam, as part of an update that torch.compile turns into one graph."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.adam import adam


class Adam(torch.optim.Adam):
    """torch.optim.Adam: its one fused kernel or, while an update is compiled, torch's own arithmetic in the open.

    A group's learning rate is a tensor, so that filling in another needs no other graph.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float = 1e-3) -> None:
        super().__init__(groups, lr, fused=True)
        for group in self.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), device=group["params"][0].device)
            for parameter in group["params"]:  # what torch would do at the first step, where it ends a graph
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter] = {"step": torch.zeros((), device=parameter.device), **zeros}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if not torch.compiler.is_compiling():
            return super().step(closure)
        for group in self.param_groups:
            pairs = [(parameter, parameter.grad) for parameter in group["params"] if parameter.grad is not None]
            states = [self.state[parameter] for parameter, _ in pairs]
            if pairs:
                adam(
                    [parameter for parameter, _ in pairs],
                    [gradient for _, gradient in pairs],
                    exp_avgs=[state["exp_avg"] for state in states],
                    exp_avg_sqs=[state["exp_avg_sq"] for state in states],
                    max_exp_avg_sqs=[],
                    state_steps=[state["step"] for state in states],
                    foreach=True,
                    capturable=True,
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )

    def zero_grad(self, set_to_none: bool = True) -> None:  # torch's own ends a graph
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
