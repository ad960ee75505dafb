"""Updates per second of the algorithms, beside the bound that their matrix products alone set in the same run.

`mopo:dynamics` is an update of MOPO's model, `mopo:rollout` a call of its rollouts with the default arguments.

The products of one update are recorded on their way to the kernels and replayed on operands of the same shapes and
strides, with nothing around them: on a CPU, the speed that no implementation of the same products can pass by much.
Machines are noisy, so modes and bound take turns, and a ratio is the median over rounds of neighbours.

--peers adds d3rlpy's rows, measured by benchmarks/peers/d3rlpy_speed.py, and --jax those of unifloral's train steps in
JAX, measured by benchmarks/peers/jax_speed.py. An algorithm may have arguments: "cql --num-samples 1".

Run: python -m benchmarks.measurements.throughput --compile --csv benchmarks/results/throughput.csv
"""

import importlib
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path += [str(Path(__file__).resolve().parents[2] / "algorithms"), str(Path(__file__).resolve().parents[1])]
from scratch import replace_table

from common.command_line import check, launch
from common.data import Batch, Dataset, ReplayBuffer
from common.data import Batch as Episode
from common.experiment import set_up
from common.optim import Adam, compiled

DISCRETE = (
    "fqi",
    "discrete_iql",
    "discrete_cql",
    "discrete_bcq",
)  # as many actions as there are dimensions for the others
PEERS = "bc", "td3_bc", "iql", "bcq", "cql"  # the algorithms that d3rlpy has, too
UNIFLORAL = "td3_bc", "iql", "cql", "combo"  # and those of unifloral that are measured
COLUMNS = ["algorithm", "mode", "device", "threads", "updates_per_second", "bound_updates_per_second", "ratio"]


@dataclass
class Args:
    algorithms: tuple[str, ...] = (
        "bc",
        "td3_bc",
        "sac_bc",
        "rebrac",
        "diffusion_ql",
        "fql",
        "iql",
        "sql",
        "xql",
        "idql",
        "awr",
        "awac",
        "bcq",
        "cql",
        "cal_ql",
        "edac",
        "rlpd",
        "bear",
        "mopo",
        "mopo:dynamics",
        "mopo:rollout",
        "combo",
        "mobile",
        "morel",
        "mve",
        "pets",
        "naf",
        "decision_transformer",
        *DISCRETE,
    )
    """scripts in algorithms/, without .py, or a part of one, each perhaps with arguments of its own"""
    compile: bool = False
    """measure --compile too, after checking that it trains to eager's weights"""
    bf16: bool = False
    """measure --precision bf16 too, with --compile if that is measured; its ratio is to the bound in float32"""
    csv: Path | None = None
    """write the table here"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where to train"""
    threads: int = torch.get_num_threads()
    """PyTorch's threads"""
    observation_dim: int = 17
    """HalfCheetah's"""
    action_dim: int = 6
    """HalfCheetah's"""
    rounds: int = 9
    """times that modes and bound take turns"""
    seconds: float = 1.0
    """of each measurement"""
    peers: Path | None = None
    """the Python of an environment with d3rlpy, to measure d3rlpy too (on the CPU)"""
    jax: tuple[Path, Path] | None = None
    """the Python of an environment with JAX, and a checkout of unifloral, to measure that too (on the CPU)"""


Operands = tuple[tuple[torch.Size, tuple[int, ...]], ...]  # shape and stride of each


class ProductRecorder(TorchDispatchMode):
    """Notes shapes and strides of the operands of every matrix product that passes."""

    PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[Operands] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.PRODUCTS:
            self.operands.append(tuple((tensor.shape, tensor.stride()) for tensor in args[-2:]))
        return func(*args, **(kwargs or {}))


def random_buffer(args: Args, algorithm: str, device: torch.device, num_episodes: int = 100) -> ReplayBuffer:
    discrete = script_of(algorithm) in DISCRETE

    def read_episodes() -> Iterator[Episode]:
        rng = np.random.default_rng(0)
        for _ in range(num_episodes):
            observations = rng.normal(size=(1001, args.observation_dim))
            actions = rng.uniform(-1, 1, size=(1000, args.action_dim))
            if discrete:
                actions = actions.argmax(axis=1)
            yield Episode(observations[:-1], actions, rng.normal(size=1000), observations[1:], np.zeros(1000))

    ones = np.ones(args.action_dim, np.float32)
    low, high = (np.array([0]), np.array([args.action_dim - 1])) if discrete else (-ones, ones)
    num_steps = num_episodes * 1000
    dataset = Dataset(
        "random", num_steps, list(map(str, range(args.observation_dim))), low, high, read_episodes, discrete=discrete
    )
    return ReplayBuffer(dataset, device)


def script_of(algorithm: str) -> str:
    return algorithm.split()[0]


def as_batch_of(module: Any, batch: Batch) -> Any:
    """The script's own Batch; what AWR and ReBRAC add to the columns is of the same shape as one that is here."""
    columns = batch._asdict() | {"returns": batch.rewards, "next_actions": batch.actions}
    if "mask" in module.Batch._fields:  # each transition becomes a window, of Decision Transformer's default length
        zeros = torch.zeros_like(batch.rewards)
        columns |= {"returns_to_go": batch.rewards, "timesteps": zeros.long(), "mask": zeros == 0}
        columns = {name: torch.stack([column] * 20, dim=1) for name, column in columns.items()}
    return module.Batch(**{name: columns[name] for name in module.Batch._fields})


def make_trainer(
    args: Args, algorithm: str, buffer: ReplayBuffer, compile: bool, precision: str = "float32"
) -> tuple[Callable[[], None], Any]:
    """A function that does the next update, and the learner that it trains."""
    (name, _, part), words = script_of(algorithm).partition(":"), shlex.split(algorithm)[1:]
    module: Any = importlib.import_module(name)
    script_args = replace(tyro.cli(module.Args, args=words), compile=compile, precision=precision, device=args.device)
    device = set_up(script_args)
    learner = module.build(args.observation_dim, args.action_dim, script_args, device, Adam)
    if part == "rollout":
        elites = learner.dynamics.elites(script_args.num_elites)
        rules = buffer.normalization, "HalfCheetah", script_args

        def roll_out() -> None:
            module.rollout(learner.actor, elites, buffer.sample(script_args.rollout_batch_size), *rules)

        return roll_out, learner
    if part == "dynamics":
        shape = script_args.num_models, script_args.dynamics_batch_size
        x = torch.randn(*shape, args.observation_dim + args.action_dim, device=device)
        z, ends = torch.randn(*shape, args.observation_dim + 1, device=device), torch.zeros(shape, device=device)
        train_dynamics = compiled(module.dynamics_update, learner, script_args)
        return lambda: train_dynamics(learner, x, z, ends), learner
    update = compiled(module.update, learner, script_args)
    step = 0

    def train() -> None:
        nonlocal step
        step += 1
        update(learner, as_batch_of(module, buffer.sample(script_args.batch_size)), step, script_args)

    return train, learner


def make_bound(args: Args, algorithm: str, num_updates: int = 4) -> Callable[[], None]:
    """A function that does the matrix products of one update, taking turns between `num_updates` recorded ones."""
    buffer = random_buffer(args, algorithm, torch.device("cpu"), 1)
    train, _ = make_trainer(replace(args, device="cpu"), algorithm, buffer, compile=False)
    prepare = prepare_product
    if algorithm.endswith(":rollout"):  # products of equal shape share their memory, which would be gigabytes
        prepare, num_updates = cache(prepare_product), 1
    train()  # the first update allocates
    updates = []
    for _ in range(num_updates):  # more than one: some algorithms train the actor every second update
        with ProductRecorder() as recorder:
            train()
        updates.append([prepare(operands, torch.device(args.device)) for operands in recorder.operands])
    turn = 0

    def multiply() -> None:
        nonlocal turn
        for product, left, right, out in updates[turn % num_updates]:
            product(left, right, out=out)
        turn += 1

    return multiply


def prepare_product(operands: Operands, device: torch.device) -> tuple[Any, ...]:
    sizes = [1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) for shape, stride in operands]
    left, right = (
        torch.randn(size, device=device).as_strided(shape, stride)
        for size, (shape, stride) in zip(sizes, operands, strict=True)
    )
    out = torch.empty(*left.shape[:-1], right.shape[-1], device=device)
    return torch.bmm if left.dim() == 3 else torch.mm, left, right, out


def rate(step: Callable[[], None], seconds: float, device: str) -> float:
    """Calls per second."""
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        step()
        calls += 1
        if device == "cuda" and calls % 10 == 0:
            torch.cuda.synchronize()
    if device == "cuda":
        torch.cuda.synchronize()
    return calls / (time.perf_counter() - began)


def start_peer(args: Args, python: Path, script: str, *words: str | Path) -> Callable[[], float]:
    """A function that has a peer measure itself, in a process of its own environment that waits in between."""
    path = Path(__file__).resolve().parents[1] / "peers" / script
    command = [python, path, *words, args.observation_dim, args.action_dim, args.threads]
    peer = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def clock() -> float:
        assert peer.stdin is not None and peer.stdout is not None
        print(args.seconds, file=peer.stdin, flush=True)
        return float(peer.stdout.readline() or sys.exit(f"{python} cannot run {path}: see above"))

    clock()  # returns when the peer, slow to import, is ready
    return clock


def check_equal(args: Args, algorithm: str, num_updates: int = 30) -> None:
    """Exits unless compiled training gives eager's weights: a speed counts only for training that happens.

    In double precision: Adam turns the rounding of a gradient near zero into a step as long as any other.
    """
    torch.set_default_dtype(torch.float64)
    buffer = random_buffer(args, algorithm, torch.device(args.device), 1)
    finals = []
    for compile in (False, True):
        train, learner = make_trainer(args, algorithm, buffer, compile)
        torch.manual_seed(0)
        for _ in range(num_updates):
            train()
        finals.append([weight for part in learner if isinstance(part, torch.nn.Module) for weight in part.parameters()])
    difference = max(float((eager - graph).detach().abs().max()) for eager, graph in zip(*finals, strict=True))
    torch.set_default_dtype(torch.float32)
    if not difference <= 1e-8:  # nor NaN
        sys.exit(
            f"{algorithm}: after {num_updates} updates compiled weights differ from eager ones by {difference:.2g}"
        )


def measure(args: Args, algorithm: str) -> list[list[Any]]:
    """A row for each mode."""
    buffer = random_buffer(args, algorithm, torch.device(args.device))
    compile = args.compile and not algorithm.endswith(":rollout")  # which is no update
    if compile:
        check_equal(args, algorithm)
    modes = ["eager"] + ["compile"] * compile
    steps = {mode: make_trainer(args, algorithm, buffer, mode == "compile")[0] for mode in modes}
    if args.bf16 and not algorithm.endswith(":rollout"):
        modes.append("compile bf16" if compile else "bf16")
        steps[modes[-1]] = make_trainer(args, algorithm, buffer, compile, "bf16")[0]
    steps["bound"] = make_bound(args, algorithm)
    clocks: dict[str, Callable[[], float]] = {
        name: partial(rate, step, args.seconds, args.device) for name, step in steps.items()
    }
    if args.peers is not None and algorithm in PEERS:
        modes.append("d3rlpy")
        clocks["d3rlpy"] = start_peer(args, args.peers, "d3rlpy_speed.py", algorithm)
    if args.jax is not None and script_of(algorithm) in UNIFLORAL:
        modes.append("jax")
        clocks["jax"] = start_peer(args, args.jax[0], "jax_speed.py", args.jax[1], script_of(algorithm))
    rates: dict[str, list[float]] = {name: [] for name in clocks}
    for round in range(args.rounds + 1):
        for name, clock in clocks.items():
            value = clock()
            if round > 0:  # the first round warms up
                rates[name].append(value)
    rows = []
    for mode in modes:
        ratio = statistics.median(speed / bound for speed, bound in zip(rates[mode], rates["bound"], strict=True))
        speed, bound = statistics.median(rates[mode]), statistics.median(rates["bound"])
        rounded = [np.format_float_positional(x, precision=3, fractional=False, trim="-") for x in (speed, bound)]
        rows.append([algorithm, mode, args.device, args.threads, *rounded, f"{ratio:.3f}"])
    return rows


def main(args: Args) -> None:
    for algorithm in args.algorithms:
        check(
            script_of(algorithm) in Args.algorithms, f"--algorithms {algorithm}: there are {', '.join(Args.algorithms)}"
        )
    check(min(args.rounds, args.threads) >= 1, "--rounds and --threads: must be at least 1")
    torch.set_num_threads(args.threads)
    print(*(f"{name:>24}" if "second" in name else f"{name:>9}" for name in COLUMNS), sep=" ")
    table: list[list[Any]] = [COLUMNS]
    for algorithm in args.algorithms:
        for row in measure(args, algorithm):
            table.append(row)
            print(
                *(f"{value:>{max(9, 24 * ('second' in name))}}" for name, value in zip(COLUMNS, row, strict=True)),
                flush=True,
            )
        if args.csv is not None:  # each time, so that a run that is stopped keeps what it has
            args.csv.parent.mkdir(parents=True, exist_ok=True)
            replace_table(args.csv, [*map(tuple, table)])


if __name__ == "__main__":
    launch(main, Args)
