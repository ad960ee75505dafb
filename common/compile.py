"""--compile: a script's whole update as one graph, made by torch.compile. --precision: its matrix products in bf16."""

import contextlib
import copy
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from common.command_line import ExperimentArgs
from common.datasets import warn
from common.optim import Adam


def compiled(update: Callable, args: ExperimentArgs, device: torch.device) -> Callable:
    """`update` as it is, or with --compile all of it as one graph: losses, gradients, Adam and targets.

    Its first argument is the learner. After the first calls a line says how long the graph took to make and after how
    many updates it will have paid off. Without a C++ compiler, a line says so and training goes on as it is. With
    --precision bf16, networks round what their matrix products take in and give out; weights and Adam stay float32.
    """
    rounding: Any = contextlib.nullcontext()
    call = update
    if args.precision == "bf16":
        # without autocast's cache of the rounded weights: they change within an update
        rounding = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
        call = rounding(update)
    if not args.compile:
        return call
    compilers = [os.environ.get("CXX", "g++")] if device.type == "cpu" else [os.environ.get("CC", "gcc"), "clang"]
    if not any(map(shutil.which, compilers)):
        warn(f"--compile: there is no C++ compiler {compilers[0]!r}; training goes on without")
        return call
    torch._dynamo.config.trace_autograd_ops = True  # else backward() ends the graph
    torch.compiler.config.dynamic_sources = "L['step']"  # one graph for all of its values, where they decide nothing
    torch.compiler.reset()  # a graph of another run in this process would fit, as far as the guards below can tell
    if none := getattr(torch._dynamo.variables.constant, "CONSTANT_VARIABLE_NONE", None):
        none.source = None  # PyTorch 2.13 looks for None where the last graph had one: a gradient that may not be here
    options: dict[str, Any] = {
        "fallback_random": True,  # the same random numbers as without --compile
        "triton.cudagraphs": device.type == "cuda",
        "cpp_wrapper": device.type == "cpu",  # the calls between the kernels in C++, too
        "size_asserts": False,
        "guard_filter_fn": _guard_arguments,
    }
    graph = torch.compile(update, fullgraph=True, options=options)
    seconds: list[float] = []  # of the first calls

    def compiled_update(learner: Any, *arguments: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # until the next one, what CUDA graphs return is not overwritten
        with rounding:
            if len(seconds) == 30:
                return graph(learner, *arguments)
            if not seconds:
                seconds.append(_eager_seconds(update, learner, arguments, device))
                _promise_to_stay(learner)
            began = time.perf_counter()
            result = graph(learner, *arguments)
            _wait(device)
        seconds.append(time.perf_counter() - began)
        if len(seconds) == 30:
            _say_when_it_pays_off(update.__name__, seconds)
        return result

    return compiled_update


def _promise_to_stay(learner: Any) -> None:
    """CUDA graphs are not made of an update that changes tensors which could be elsewhere the next time. Parameters are
    known to stay; Adam's state does, too, as it only ever changes in place.
    """
    for group in (group for part in learner if isinstance(part, Adam) for group in part.param_groups):
        for tensor in (group["lr"], group["step"], *group["means"], *group["squares"]):
            torch._dynamo.mark_static_address(tensor, guard=False)


def _guard_arguments(guards: Sequence[Any]) -> list[bool]:
    """Of what could change between two updates, only the arguments themselves are checked before each: `step` and the
    batch. To check every layer, weight and Adam state takes a tenth of a small update, and they stay what they are.
    """
    return [not any(mark in guard.name for mark in ".[") for guard in guards]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _eager_seconds(update: Callable, learner: Any, arguments: tuple, device: torch.device) -> float:
    """What one update takes without a graph: tried on a copy of the networks, the random state put back."""
    shared = {id(part): part for part in learner if not isinstance(part, (torch.nn.Module, Adam))}
    trial = copy.deepcopy(learner, shared)
    with torch.random.fork_rng():
        for call in range(15):
            if call == 5:  # the first ones allocate
                _wait(device)
                began = time.perf_counter()
            update(trial, *(value + call if isinstance(value, int) else value for value in arguments))  # the next step
        _wait(device)
    return (time.perf_counter() - began) / 10


def _say_when_it_pays_off(name: str, seconds: Sequence[float]) -> None:
    """Given what an eager update took and what the first calls of the graph took, the making of it included."""
    eager, making, later = seconds[0], sum(seconds[1:10]), sum(seconds[10:]) / len(seconds[10:])
    gain = f"pays off after {int(making / (eager - later)):,} of them" if later < eager else "does not pay off"
    speed = f"a call takes {1000 * later:.2f} ms, without {1000 * eager:.2f} ms"
    tqdm.write(f"--compile: {name} became a graph in {making:.0f} s; {speed}: {gain}", file=sys.stderr)
