"""What a CUDA GPU makes of every script: does it train as the CPU does, resume to the same bits, and how fast?

One command, without network. It writes gpu.csv, row by row as they come, and the page gpu.md. The parts take minutes
each; --parts takes some of them. Both files keep what was measured before: a row of the same machine is replaced.

1. difference: weights after 50 updates on the same batches. Eager on the GPU against the CPU, both in double precision
   and with the CPU's random numbers; compiled (CUDA graphs) against eager, in double precision; bf16 against float32,
   as the length of the difference over the length of what training has changed.
2. resume: a run of 20 updates against one stopped at 10 and resumed: the largest difference of the checkpoints, 0 for
   the same bits.
3. speed: updates a second, each script alone on the GPU; the bound is the script's matrix products alone, as one CUDA
   graph.
4. sharing: updates a second of several processes of one script together, and how much of the time the GPU was at work,
   in per cent, as nvidia-smi says.
5. long: seconds of a whole run, from the command line to its result.

Run: python -m benchmarks.measurements.gpu --out benchmarks/results
"""

import csv
import dataclasses
import importlib
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path += [str(Path(sys.path[0], folder)) for folder in ("algorithms", "benchmarks", "benchmarks/measurements")]
import gpu_table
import throughput

from common.command_line import check, launch
from common.data import Batch
from common.evaluation import load_file
from common.optim import Adam, compiled

SCRIPTS = Path(__file__).resolve().parents[2] / "algorithms"
Mode = Literal["eager", "compile", "compile bf16"]
Part = Literal["difference", "resume", "speed", "sharing", "long"]
FEW = {  # arguments of the short runs that are stopped and resumed
    "mopo": ["--max-dynamics-epochs", "1"],
    "combo": ["--max-dynamics-epochs", "1"],
    "mobile": ["--max-dynamics-epochs", "1"],
    "morel": ["--max-dynamics-epochs", "1"],
    "mve": ["--max-dynamics-epochs", "1"],
    "sac": ["--random-steps", "200"],
    "mbpo": ["--random-steps", "200", "--max-dynamics-epochs", "1"],
    "rlpd": ["--random-steps", "200"],
    # which is over all updates, of which a run stopped by its end has fewer
    **{name: ["--no-cosine-decay"] for name in ("iql", "idql", "sql", "xql", "discrete_iql")},
}
DATA = {name: ["--dataset-id", "anchorl/cartpole/mixed-v0"] for name in throughput.DISCRETE}
NOT_ALONE = "fqe"  # needs a policy of another run, and a batch for each member
Row = tuple[str, str, str, float]  # measurement, algorithm, mode, value


@dataclass
class Args:
    out: Path = Path("benchmarks/results")
    """folder of gpu.csv and gpu.md"""
    algorithms: tuple[str, ...] = tuple(sorted(path.stem for path in SCRIPTS.glob("*.py") if path.stem != "ope"))
    """scripts in algorithms/, without .py; ope has no updates"""
    long_algorithms: tuple[str, ...] = ("td3_bc", "iql", "cql")
    """scripts of the whole runs"""
    long_updates: int = 100_000
    """updates of a whole run"""
    shared_algorithm: str = "td3_bc"
    """the script of several processes"""
    processes: tuple[int, ...] = (1, 4, 8)
    """how many share the GPU"""
    modes: tuple[Mode, ...] = ("eager", "compile", "compile bf16")
    """what is measured"""
    parts: tuple[Part, ...] = get_args(Part)
    """of the page"""
    rounds: int = 3
    """measurements of a speed, whose median counts"""
    seconds: float = 0.5
    """of each measurement"""
    device: Literal["cpu", "cuda"] = "cuda"
    """cpu tries the command itself"""


# --- 1. The same training? -------------------------------------------------------------------------------------------


class RandomNumbersOfTheCpu(TorchDispatchMode):
    """Draws on the CPU what a GPU would draw from a generator of its own."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        devices = [leaf.device for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        device = kwargs.get("device") or devices[0]
        on_cpu = tree_map_only(Tensor, Tensor.cpu, args)
        drawn = func(*on_cpu, **kwargs | ({"device": torch.device("cpu")} if "device" in kwargs else {}))
        return args[0].copy_(drawn) if func.overloadpacket.__name__.endswith("_") else drawn.to(device)


def batches(algorithm: str, module: Any, count: int) -> Iterator[Any]:
    """The same random batches in every call, on the CPU. Actions follow from observations: there is what to learn."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        x = torch.randn(256, 2 * 17 + 8, generator=generator)
        discrete = algorithm in throughput.DISCRETE
        actions = x[:, :6].argmax(dim=1) if discrete else (x[:, :6] + 0.1 * x[:, 34:40]).tanh()
        yield throughput.as_batch_of(module, Batch(x[:, :17], actions, x[:, 40], x[:, 17:34], (x[:, 41] > 1).to(x)))


def trained(
    algorithm: str, device: str, mode: str, numbers: Any = nullcontext, count: int = 50
) -> tuple[Tensor, Tensor]:
    """All weights before and after `count` updates."""
    module = importlib.import_module(algorithm)
    args = module.Args(
        compile="compile" in mode, precision="bf16" if "bf16" in mode else "float32", device=device, batch_size=256
    )
    weights: list[dict[str, Tensor]] = []
    for place in ("cpu", device):  # the networks of any device start from the CPU's weights
        torch.manual_seed(0)
        learner = module.build(17, 6, args, torch.device(place), Adam)
        networks = [part for part in learner if isinstance(part, torch.nn.Module)]
        weights = weights or [network.state_dict() for network in networks]
    for network, start in zip(networks, weights, strict=True):
        network.load_state_dict(start)
    before = flat(networks)
    update = compiled(module.update, learner, args)
    torch.manual_seed(1)
    for step, batch in enumerate(batches(algorithm, module, count), 1):
        batch = tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)
        with numbers():
            update(learner, batch, step, args)
    return before, flat(networks)


def flat(networks: list[torch.nn.Module]) -> Tensor:
    return torch.cat([weight.detach().cpu().flatten() for network in networks for weight in network.parameters()])


def differences(args: Args, algorithm: str, mode: str) -> list[Row]:
    torch.set_num_threads(1)
    if mode == "compile bf16":
        before, full = trained(algorithm, args.device, "compile")
        _, again = trained(algorithm, args.device, "compile")
        _, rounded = trained(algorithm, args.device, mode)
        change = float((rounded - full).norm() / (full - before).norm())
        repetition = float((again - full).abs().max())
        return [("difference", algorithm, mode, change), ("repetition", algorithm, "compile", repetition)]
    torch.set_default_dtype(torch.float64)
    of_cpu = mode == "eager"
    _, expected = trained(algorithm, "cpu" if of_cpu else args.device, "eager")
    _, found = trained(algorithm, args.device, mode, RandomNumbersOfTheCpu if of_cpu else nullcontext)
    return [("difference", algorithm, mode, float((found - expected).abs().max()))]


# --- 2. Resumed to the same bits? ------------------------------------------------------------------------------------


def run_script(args: Args, algorithm: str, folder: Path, *arguments: str, mode: str = "eager") -> None:
    words = [sys.executable, str(SCRIPTS / f"{algorithm}.py"), "--run-dir", str(folder), *arguments]
    words += ["--device", args.device, *DATA.get(algorithm, []), *(["--compile"] if "compile" in mode else [])]
    words += ["--precision", "bf16" if "bf16" in mode else "float32"]
    subprocess.run(words, check=True, capture_output=True, text=True)


def resumed(args: Args, algorithm: str, mode: str) -> list[Row]:
    with tempfile.TemporaryDirectory() as scratch:
        few = ["--eval-episodes", "2", *FEW.get(algorithm, [])]
        if algorithm == "fqe":
            run_script(args, "bc", Path(scratch, "policy"), "--num-updates", "5")
            few = ["--policy-run-dir", str(Path(scratch, "policy"))]
        whole, stopped = Path(scratch, "whole"), Path(scratch, "stopped")
        run = partial(run_script, args, algorithm, mode=mode)
        run(whole, "--num-updates", "20", *few)
        run(stopped, "--num-updates", "10", *few)
        run(stopped, "--resume", "--num-updates", "20", *few)
        return [("resume", algorithm, mode, largest_difference(whole, stopped))]


def largest_difference(*folders: Path) -> float:
    tensors = [tree_leaves(load_file(folder / "checkpoint.pt")["learner"]) for folder in folders]
    pairs = [pair for pair in zip(*tensors, strict=True) if isinstance(pair[0], Tensor)]
    return max(float((left.double() - right.double()).abs().max()) for left, right in pairs if left.numel())


# --- 3. and 4. How fast, alone and together? --------------------------------------------------------------------------


def prepared(args: Args, algorithm: str, mode: str) -> Callable[[], None]:
    """A function that does the next update, warmed up."""
    options = throughput.Args(device=args.device, threads=1)
    if mode == "bound":
        return bound(options, algorithm)
    buffer = throughput.random_buffer(options, algorithm, torch.device(args.device))
    precision = "bf16" if "bf16" in mode else "float32"
    train, _ = throughput.make_trainer(options, algorithm, buffer, "compile" in mode, precision)
    for _ in range(20):
        train()
    return train


def bound(options: throughput.Args, algorithm: str) -> Callable[[], None]:
    """The matrix products of one update, on a GPU one launch: the average over four updates."""
    multiply = throughput.make_bound(options, algorithm)
    for _ in range(4):
        multiply()
    if options.device == "cpu":
        return multiply
    torch.cuda.synchronize()
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        for _ in range(4):
            multiply()
    turn = 0

    def replay(operands: Any = multiply) -> None:  # which the graph reads, so that they are kept
        nonlocal turn
        if turn % 4 == 0:
            graph.replay()
        turn += 1

    return replay


def measure(args: Args, algorithm: str, modes: list[str], ready: Any, turn: Any, rows: Any) -> None:
    """What a process does: prepares, waits until all are prepared, and measures; alone, where `turn` is a lock."""
    torch.set_num_threads(1)
    steps: dict[str, Callable[[], None]] = {}
    for mode in modes:
        try:
            steps[mode] = prepared(args, algorithm, mode)
            if args.device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            print(f"{algorithm} {mode}: {error!r:.500}", file=sys.stderr, flush=True)
    ready.wait()
    with turn or nullcontext():
        for mode, step in steps.items():
            try:
                rates = [throughput.rate(step, args.seconds, args.device) for _ in range(args.rounds)]
                rows.put((algorithm, mode, statistics.median(rates)))
            except Exception as error:
                print(f"{algorithm} {mode}: {error!r:.500}", file=sys.stderr, flush=True)
    rows.put(None)
    ready.wait()  # for all others to have measured


def together(args: Args, algorithms: list[str], modes: list[str], alone: bool) -> Iterator[tuple[str, str, float]]:
    """Algorithm, mode and updates a second, of a process for each of the algorithms."""
    context = multiprocessing.get_context("spawn")
    ready, rows = context.Barrier(len(algorithms) + 1, timeout=10**4), context.Queue()
    shared = modes, ready, context.Lock() if alone else None, rows
    workers = [context.Process(target=measure, args=(args, name, *shared), daemon=True) for name in algorithms]
    for worker in workers:
        worker.start()
    wait_until(lambda: ready.n_waiting == len(workers), workers)
    ready.wait()
    ask = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "100"]
    watched = not alone and shutil.which(ask[0])
    watch = subprocess.Popen(ask, stdout=subprocess.PIPE, text=True) if watched else None
    for _ in workers:
        while (row := next_row(rows, workers)) is not None:
            yield row
    if watch and watch.stdout:
        watch.terminate()
        if shares := [float(word) for word in watch.stdout.read().split() if word.isdigit()]:  # not of a part of a GPU
            yield "", "utilisation", statistics.mean(shares)
    wait_until(lambda: ready.n_waiting == len(workers), workers)
    ready.wait()
    for worker in workers:
        worker.join()


def next_row(rows: Any, workers: list[Any]) -> tuple[str, str, float] | None:
    wait_until(lambda: not rows.empty(), workers)
    return rows.get()


def wait_until(done: Callable[[], bool], workers: list[Any]) -> None:
    """Waits, unless a process was killed: then the others would wait for it, and for ever. Raises BadInput."""
    while not done():
        killed = [worker.exitcode for worker in workers if worker.exitcode]
        check(not killed, f"a process ended with {killed}; -9 is too little memory: take fewer --algorithms at a time")
        time.sleep(0.02)


def speeds(args: Args) -> Iterator[Row]:
    for algorithm, mode, speed in together(args, list(args.algorithms), [*args.modes, "bound"], alone=True):
        yield "updates_per_second", algorithm, mode, speed


def sharing(args: Args) -> Iterator[Row]:
    mode = "compile" if "compile" in args.modes else args.modes[0]
    longer = dataclasses.replace(args, seconds=4 * args.seconds)
    for count in args.processes:
        found = list(together(longer, [args.shared_algorithm] * count, [mode], alone=False))
        for name, kind in (("updates_per_second", mode), ("utilisation", "utilisation")):
            if len(values := [value for _, of, value in found if of == kind]) == (count if kind == mode else 1):
                yield f"{name} of {count}", args.shared_algorithm, mode, sum(values)


# --- 5. A whole run ---------------------------------------------------------------------------------------------------


def long_runs(args: Args) -> Iterator[Row]:
    mode = "compile" if "compile" in args.modes else args.modes[0]
    for algorithm in args.long_algorithms:
        with tempfile.TemporaryDirectory() as scratch:
            count = ["--num-updates", str(args.long_updates)]
            rare = ["--eval-every", str(args.long_updates // 5 or 1), "--checkpoint-every", str(args.long_updates)]
            began = time.perf_counter()
            run_script(args, algorithm, Path(scratch, "run"), *count, *rare, mode=mode)
            seconds = time.perf_counter() - began
            with Path(scratch, "run", "metrics.csv").open() as file:
                rows = list(csv.DictReader(file))
        half = [row for row in rows if int(row["step"]) >= args.long_updates // 2]
        steps, times = (float(half[-1][name]) - float(half[0][name]) for name in ("step", "seconds"))
        yield f"seconds of {args.long_updates}", algorithm, mode, seconds
        yield "whole seconds of 1000000", algorithm, mode, seconds + (1_000_000 - args.long_updates) * times / steps


# --- All of it --------------------------------------------------------------------------------------------------------


def in_processes(tasks: list[partial[list[Row]]]) -> Iterator[Row]:
    workers = min(len(tasks), max(1, (os.cpu_count() or 2) - 1))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for future in as_completed([pool.submit(tried, task) for task in tasks]):
            yield from future.result()


def tried(task: partial[list[Row]]) -> list[Row]:
    """Its rows, or none and what went wrong on stderr."""
    try:
        return task()
    except Exception as error:
        words = (getattr(error, "stderr", None) or repr(error))[-800:]
        print(f"{task.args[1:]}: {words}", file=sys.stderr, flush=True)
        return []


def main(args: Args) -> None:
    check(args.device == "cpu" or torch.cuda.is_available(), "PyTorch finds no CUDA device: this measures one")
    check(args.long_updates >= 200, "--long-updates: must be at least 200, whose second half has two rows")
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    resumes = [partial(resumed, args, name, mode) for mode in args.modes[:2] for name in args.algorithms]
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "difference": lambda: in_processes(
            [partial(differences, alone, *task) for task in product(alone.algorithms, args.modes)]
        ),
        "resume": lambda: in_processes(resumes),
        "speed": lambda: speeds(alone),
        "sharing": lambda: sharing(args),
        "long": lambda: long_runs(args),
    }
    alone = dataclasses.replace(args, algorithms=tuple(name for name in args.algorithms if name != NOT_ALONE))
    name = torch.cuda.get_device_name() if args.device == "cuda" else "no GPU: a trial of the command"
    machine, began = f"{name}, PyTorch {torch.__version__}", time.perf_counter()
    table = gpu_table.read(args.out / "gpu.csv")
    args.out.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        for measurement, algorithm, mode, value in parts[part]():
            table[machine, measurement, algorithm, mode] = value
            gpu_table.write(args.out / "gpu.csv", table)
        gpu_table.write_page(args.out / "gpu.md", table)
        print(f"{part}: {time.perf_counter() - began:.0f} s", flush=True)
    print((args.out / "gpu.md").read_text())


if __name__ == "__main__":
    launch(main, Args)
