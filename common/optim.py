"""Adam (arXiv 1412.6980) for small networks, and --compile: a script's whole update as one graph, Adam's step in it."""

import math
import os
import shutil
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from common.command_line import ExperimentArgs, check


class Adam(nn.Module):
    """torch.optim.Adam with less around its kernel and, in a graph, written out. A group's `lr` is a tensor to fill."""

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float = 1e-3) -> None:
        super().__init__()
        self.param_groups: list[dict[str, Any]] = []
        for group in groups:
            weights, decay = list(group["params"]), float(group.get("weight_decay", 0))
            # float32 whatever the weights: torch.compile takes a lone float64 on a CPU for a constant, and drops add_
            one = torch.ones((), dtype=torch.float32, device=weights[0].device)
            rate, step = one * group.get("lr", lr), one * 0
            moments = {name: [torch.zeros_like(weight) for weight in weights] for name in ("means", "squares")}
            self.param_groups.append({"params": weights, "lr": rate, "weight_decay": decay, "step": step} | moments)
            for tensor in (rate, step, *moments["means"], *moments["squares"]):  # what changes beside the weights
                self.register_buffer(str(len(self._buffers)), tensor)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            columns = zip(group["params"], group["means"], group["squares"], strict=True)
            rows = [(weight, weight.grad, mean, square) for weight, mean, square in columns if weight.grad is not None]
            if not rows:
                continue
            weights, gradients, means, squares = map(list, zip(*rows, strict=True))
            group["step"].add_(1)
            if not torch.compiler.is_compiling():
                options: dict[str, Any] = {name: group[name] for name in ("lr", "weight_decay")}
                options |= {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "amsgrad": False, "maximize": False}
                torch._fused_adam_(weights, gradients, means, squares, [], [group["step"]] * len(rows), **options)
                continue
            # exp, since torch.compile computes it once; the powers in torch.optim's function, for every few weights
            first, second = (1 - (group["step"].double() * math.log(beta)).exp() for beta in (0.9, 0.999))
            rate, eps = (x.to(weights[0].dtype) for x in (group["lr"] * second.sqrt() / first, 1e-8 * second.sqrt()))
            slopes = torch._foreach_add(gradients, weights, alpha=group["weight_decay"])  # L2
            torch._foreach_lerp_(means, slopes, 0.1)
            torch._foreach_lerp_(squares, torch._foreach_mul(slopes, slopes), 0.001)
            roots = torch._foreach_add(torch._foreach_sqrt(squares), eps)
            torch._foreach_addcdiv_(weights, torch._foreach_mul(means, -rate), roots)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for weight in (weight for group in self.param_groups for weight in group["params"]):
            weight.grad = None


def compiled(update: Callable, learner: Any, args: ExperimentArgs) -> Callable:
    """`update`, whose first argument is the `learner`; with --compile all of it as one graph: losses, gradients, Adam
    and targets. With --precision bf16, networks round what their matrix products take in and give out, nothing else."""
    device = next(learner[0].parameters()).device
    rounding = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)  # weights change within an update
    if not args.compile:
        return rounding(update) if args.precision == "bf16" else update
    compiler = os.environ.get("CXX", "g++") if device.type == "cpu" else os.environ.get("CC", "gcc")
    check(bool(shutil.which(compiler)), f"--compile: there is no compiler {compiler!r}; install one, or go without")
    torch._dynamo.config.trace_autograd_ops = True  # else backward() ends the graph
    torch.compiler.config.dynamic_sources = "L['step']"  # one graph for all of its values, where they decide nothing
    torch.compiler.reset()  # a graph of another run in this process would fit, as far as the guards below can tell
    if none := getattr(torch._dynamo.variables.constant, "CONSTANT_VARIABLE_NONE", None):
        none.source = None  # PyTorch 2.13 looks for None where the last graph had one: a gradient that may not be here
    for tensor in (tensor for part in learner if isinstance(part, Adam) for tensor in part.buffers()):
        torch._dynamo.mark_static_address(tensor, guard=False)  # else no CUDA graph is made of what changes it
    options: dict[str, Any] = {
        "fallback_random": True,  # the same random numbers as without --compile
        "triton.cudagraphs": device.type == "cuda",
        "loop_ordering_after_fusion": False,  # of batched layers on a GPU it fails (PyTorch 2.11)
        "cpp_wrapper": device.type == "cpu",  # the calls between the kernels in C++, too
        "size_asserts": False,
        # what is checked before each update: `step` and batch; layers, weights and moments stay, and take a tenth of it
        "guard_filter_fn": lambda guards: [not any(mark in guard.name for mark in ".[") for guard in guards],
    }
    graph = torch.compile(update, fullgraph=True, options=options)

    def compiled_update(*arguments: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # until the next one, what CUDA graphs return is not overwritten
        return graph(*arguments)

    return rounding(compiled_update) if args.precision == "bf16" else compiled_update
