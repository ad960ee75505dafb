"""What the tests share: a private datasets folder, datasets made on the spot, NumPy networks, scripts as processes."""

import contextlib
import csv
import importlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer
from warm_python import warm_python

from common.command_line import BUILT_IN_ID, interruption, launch
from common.data import BUILT_IN_DISCRETE_ID, Batch, Dataset, ReplayBuffer, load_dataset
from common.data import Batch as Episode
from common.data import _read_episodes as read_episodes
from common.evaluation import Policy, make_environments
from common.optim import Adam

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "algorithms").glob("*.py") if path.stem != "ope")  # which makes no run
DISCRETE = "fqi", "discrete_iql", "discrete_cql", "discrete_bcq"  # which learn from anchorl/cartpole/mixed-v0
REMEMBER = "pets", "decision_transformer"  # whose Actor has `follow`: it cannot be exported
OFF_DATA = "sac", "mbpo", "fqe"  # those that learn from no dataset, or not how to act
ALGORITHMS = [name for name in SCRIPTS if name not in OFF_DATA]
sys.path += [str(ROOT / "algorithms"), str(ROOT / "benchmarks")]

SHORT = ["--hidden-dims", "16", "16", "--eval-episodes", "2", "--final-eval-episodes", "3"]
DYNAMICS = ["--dynamics-hidden-dims", "8", "--num-models", "2", "--num-elites", "2", "--dynamics-batch-size", "2048"]
DYNAMICS += ["--max-dynamics-epochs", "1"]
# after DYNAMICS: the weights that are best come before the last ones, and the best two members are not all
SOON_BEST = ["--num-models", "3", "--max-dynamics-epochs", "3", "--dynamics-learning-rate", "1e-5"]
MODEL = [*DYNAMICS, "--rollout-batch-size", "100", "--rollout-every", "100"]
SHORTER = {
    "bcq": ["--vae-hidden-dims", "16", "16", "--num-target-actions", "3", "--num-acting-actions", "5"],
    "diffusion_ql": ["--diffusion-steps", "2", "--num-acting-actions", "5"],
    "fql": ["--flow-steps", "2", "--num-acting-actions", "5"],
    "idql": ["--flow-hidden-dims", "16", "16", "--flow-steps", "3", "--num-acting-actions", "5"],
    "cql": ["--num-samples", "3"],
    "cal_ql": ["--num-samples", "3"],
    "edac": ["--num-critics", "3"],
    "rlpd": ["--num-critics", "3", "--updates-per-step", "2", "--random-steps", "5"],
    "bear": ["--num-samples", "3", "--num-target-actions", "3", "--num-acting-actions", "5", "--vae-hidden-dims", "16"],
    "mopo": MODEL,
    "combo": MODEL,
    "mobile": [*MODEL, "--num-elites", "2", "--num-samples", "2", "--real-ratio", "0.5"],
    "morel": MODEL,
    "mve": DYNAMICS,
    "naf": [*MODEL, "--imagined-ratio", "0.5"],
    "decision_transformer": ["--context-length", "3"],
    "pets": ["--horizon", "2", "--population", "3", "--num-best", "2", "--cem-iterations", "1"],
    "sac": ["--random-steps", "200"],
    "mbpo": [*DYNAMICS, "--rollout-batch-size", "100", "--random-steps", "200", "--updates-per-step", "5"],
}
SHORTER["mbpo"] += [
    "--model-every",
    "4",
    "--rollout-schedule",
    "1",
    "3",
    "4",
    "12",
]  # from 40 updates on they are longer

# one thread a test keeps a busy machine's tests as fast as an idle one's, and sums in one order
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_CBWR": "AUTO", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def datasets_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Every test sees a datasets folder of its own, beside the built-in datasets."""
    path = tmp_path_factory.mktemp("datasets")
    previous = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(path)
    yield path
    os.environ.pop("MINARI_DATASETS_PATH")
    if previous is not None:
        os.environ["MINARI_DATASETS_PATH"] = previous


@pytest.fixture(scope="session")
def python() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder, warm_python(Path(folder)) as path:  # a socket's path must be short
        yield path


@pytest.fixture
def warm(python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test makes of `sys.executable` starts at once."""
    monkeypatch.setattr(sys, "executable", python)


@pytest.fixture(scope="session")
def pendulum(datasets_path: Path) -> ReplayBuffer:
    return ReplayBuffer(load_dataset(BUILT_IN_ID), torch.device("cpu"))


@pytest.fixture(scope="session")
def cartpole(datasets_path: Path) -> ReplayBuffer:
    return ReplayBuffer(load_dataset(BUILT_IN_DISCRETE_ID, discrete=True), torch.device("cpu"))


@pytest.fixture
def data(algorithm: str, request: pytest.FixtureRequest) -> ReplayBuffer:
    """The built-in dataset that the algorithm of a test learns from."""
    return request.getfixturevalue("cartpole" if algorithm in DISCRETE else "pendulum")


@pytest.fixture
def make_dataset(datasets_path: Path) -> Iterator[Callable[..., str]]:
    """A function that writes a local Minari dataset of the given episodes; they are deleted after the test."""
    made = []

    def make(dataset_id: str = "test/data-v0", episodes: list[dict[str, Any]] | None = None, **kwargs: Any) -> str:
        spaces = {
            "observation_space": gym.spaces.Box(-np.inf, np.inf, (3,)),
            "action_space": gym.spaces.Box(-2, 2, (1,)),
        }
        fields = [random_episode(seed) for seed in range(4)] if episodes is None else episodes
        made.append(dataset_id)
        with warnings.catch_warnings(action="ignore"):  # Minari wants authors and permalinks
            buffers = [EpisodeBuffer(**episode) for episode in fields]
            minari.create_dataset_from_buffers(dataset_id, buffers, **(spaces | kwargs))
        return dataset_id

    yield make
    for dataset_id in made:
        shutil.rmtree(datasets_path / dataset_id)


def random_episode(
    seed: int, length: int = 30, observation_dim: int = 3, action_dim: int = 1, **fields: Any
) -> dict[str, Any]:
    """The fields of an episode of noise that is cut by a time limit."""
    rng = np.random.default_rng(seed)
    truncations = np.zeros(length, dtype=bool)
    truncations[-1:] = True
    episode = {
        "observations": rng.normal(size=(length + 1, observation_dim)).astype(np.float32),
        "actions": rng.uniform(-2, 2, size=(length, action_dim)).astype(np.float32),
        "rewards": rng.normal(size=length),
        "terminations": np.zeros(length, dtype=bool),
        "truncations": truncations,
    }
    return episode | fields


def random_batch(batch_size: int = 8, observation_dim: int = 3, action_dim: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    terminations = (torch.arange(batch_size) % 3 == 0).float()
    observations, actions = normal(batch_size, observation_dim), normal(batch_size, action_dim).tanh()
    return Batch(observations, actions, normal(batch_size), normal(batch_size, observation_dim), terminations)


def discrete_batch(num_actions: int = 3) -> Batch:
    return random_batch()._replace(actions=torch.arange(8) % num_actions)


def numpy_mlp(net: torch.nn.Sequential, inputs: np.ndarray) -> np.ndarray:
    """The layers of `net` without torch: ReLU between them, none (or the caller's tanh) after the last."""
    layers = [layer for layer in net if isinstance(layer, torch.nn.Linear)]
    x = np.asarray(inputs, dtype=np.float64)
    for index, layer in enumerate(layers):
        x = x @ layer.weight.detach().numpy().T.astype(np.float64) + layer.bias.detach().numpy()
        if index < len(layers) - 1:
            x = np.maximum(x, 0)
    return x


def numpy_twins(critic: torch.nn.Module, observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Q_1 and Q_2, [2, batch], each twin as a network of its own."""
    values = []
    for twin in range(2):
        x = np.concatenate([observations, actions], axis=1).astype(np.float64)
        for index, layer in enumerate(critic.layers):
            x = x @ layer.weight[twin].detach().numpy().astype(np.float64) + layer.bias[twin].detach().numpy()
            if index < len(critic.layers) - 1:
                x = np.maximum(x, 0)
        values.append(x[:, 0])
    return np.stack(values)


def lower(twins: np.ndarray) -> np.ndarray:
    """The lowest member's Q [batch], of [members, batch]; fails where one of two alone would do, too."""
    assert len(set(twins.argmin(axis=0))) > 1, "one member is the lowest everywhere: level(critic)"
    return twins.min(axis=0)


def level(critic: torch.nn.Module, observations: torch.Tensor | None = None) -> None:
    """Shifts a critic's members to a mean of 0.5 each, on `random_batch`, so that none is the lowest everywhere."""
    batch = random_batch()
    with torch.no_grad():
        q = critic(batch.observations if observations is None else observations, batch.actions)
        critic.layers[-1].bias.add_(0.5 - q.mean(dim=1)[:, None, None])


def numpy_sample(
    actor: torch.nn.Module, observations: np.ndarray, noise: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Actions of the squashed Gaussian and their log-densities, by the change of variables as textbooks have it."""
    hidden = np.maximum(numpy_mlp(actor.trunk, observations), 0)  # numpy_mlp has none after its last layer
    mean, log_std = (
        hidden @ head.weight.detach().numpy().T + head.bias.detach().numpy() for head in (actor.mean, actor.log_std)
    )
    std = np.exp(np.clip(log_std, -5, 2))
    u = mean + std * noise.numpy()
    density = np.exp(-0.5 * noise.numpy() ** 2) / (std * np.sqrt(2 * np.pi))
    return np.tanh(u), np.log(density / (1 - np.tanh(u) ** 2)).sum(axis=-1)


class Outcome(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def read_once(dataset: minari.MinariDataset, known: dict[str, list[Episode]] = {}) -> Iterator[Episode]:  # noqa: B006
    """In the place of _read_episodes: the built-in datasets are read from their files by the first run alone."""
    name = dataset.spec.dataset_id
    if not name.startswith("anchorl/"):
        return read_episodes(dataset)
    if name not in known:
        known[name] = list(read_episodes(dataset))
    return iter(known[name])


def short_environments(dataset: Dataset, count: int) -> list[gym.Env]:
    """Those that a run of `run_script` is evaluated in: their episodes end after 20 steps."""
    return [gym.wrappers.TimeLimit(environment, 20) for environment in make_environments(dataset, count)]


def run_script(algorithm: str, *arguments: str, whole: bool = False, plot: bool = False, **environment: str) -> Outcome:
    """A script's command line in this process, which spares the seconds that a fresh one takes to import torch.

    Three more half seconds: the built-in datasets are read once, evaluations end their episodes after 20 steps, if not
    `whole`, and there is no learning curve without `plot`.
    """
    module = importlib.import_module(algorithm)
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", [f"{algorithm}.py", *arguments]),
        mock.patch.dict(os.environ, environment),
        mock.patch("common.data._read_episodes", read_once),
        contextlib.nullcontext() if whole else mock.patch("common.experiment.make_environments", short_environments),
        contextlib.nullcontext() if plot else mock.patch("common.experiment.Run._plot", lambda *_: None),
    ):
        try:
            launch(module.main, module.Args)
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            vars(interruption).clear()  # as in a fresh process
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return Outcome(code, out.getvalue(), err.getvalue())


def write_policy(
    folder: Path, observation_dim: int = 3, action: float = 0.5, low: float = -2.0, high: float = 2.0
) -> str:
    """A run folder that holds a policy alone, one of bc.py, whose action is always `action` of its range."""
    bc: Any = importlib.import_module("bc")
    actor = bc.Actor(observation_dim, 1, bc.HyperParameters(hidden_dims=()))
    with torch.no_grad():
        actor.net[0].weight.zero_()
        actor.net[0].bias.fill_(float(np.arctanh(action)))
    origin = {"script": "bc", "hyper_parameters": {"hidden_dims": ()}}
    bounds = np.array([[low], [high]], dtype=np.float32)
    folder.mkdir()
    with (folder / "policy.pt").open("wb") as file:
        Policy(actor, torch.ones(2, observation_dim), bounds, False, origin).save(file)
    return str(folder)


def batch_of(script: Any, data: Batch) -> Any:
    """The script's own Batch of transitions: of AWR with the rewards as returns, of ReBRAC with some actions at s'; of
    Decision Transformer windows of two of them, in which every third is padding.
    """
    columns = data._asdict() | {"returns": data.rewards, "next_actions": data.actions.roll(1, dims=0)}
    if "mask" in script.Batch._fields:
        numbers = torch.arange(len(data.rewards), device=data.rewards.device)
        columns |= {"returns_to_go": data.rewards, "timesteps": numbers % 7, "mask": numbers % 3 > 0}
        columns = {name: torch.stack([column.roll(1, dims=0), column], dim=1) for name, column in columns.items()}
    return script.Batch(**{name: columns[name] for name in script.Batch._fields})


def what_it_needs(algorithm: str, folder: Path) -> list[str]:
    """Arguments beside SHORT: those of SHORTER or, for FQE, a policy, which is written into `folder`."""
    if algorithm == "fqe":
        return ["--policy-run-dir", write_policy(folder / "policy")]
    return SHORTER.get(algorithm, [])


FORKS = multiprocessing.get_context("forkserver")  # a process that imports torch once, and is then copied
FORKS.set_forkserver_preload(SCRIPTS)


class Started:
    """A script in a process of its own, to be killed or interrupted; of subprocess.Popen, what the tests need. It is
    evaluated as by `run_script`.
    """

    def __init__(self, algorithm: str, *arguments: str) -> None:
        self.errors = Path(tempfile.mkstemp()[1])
        words = [f"{algorithm}.py", *arguments]
        self.process = FORKS.Process(
            target=_run, args=(algorithm, words, dict(os.environ), str(self.errors)), daemon=True
        )
        self.process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, timeout: float | None = None) -> tuple[int | None, str]:
        """Its return code and what it wrote to stderr."""
        self.process.join(timeout)
        try:
            return self.process.exitcode, self.errors.read_text()
        finally:
            self.errors.unlink()


def _run(algorithm: str, words: list[str], environment: dict[str, str], errors: str) -> None:
    for path, descriptor in ((os.devnull, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    os.environ.update(environment)
    sys.argv = words
    module = importlib.import_module(algorithm)
    with mock.patch("common.experiment.make_environments", short_environments):
        launch(module.main, module.Args)


def networks_of(holder: Any, *names: str) -> dict[str, list[torch.nn.Parameter]]:
    """The parameters of these networks, by name."""
    return {name: list(getattr(holder, name).parameters()) for name in names}


def sac_learner(script: Any, args: Any) -> Any:
    """For observations of 3 and actions of 2 numbers; the target differs from what it follows; temperature 0.3."""
    torch.manual_seed(0)
    learner = script.build(3, 2, args, torch.device("cpu"), Adam)
    with torch.no_grad():
        for parameter in (*learner.target_critic.parameters(), *learner.actor.parameters()):
            parameter.add_(0.5 * torch.randn_like(parameter))
        learner.actor.log_temperature.fill_(math.log(0.3))
    level(learner.critic)
    level(learner.target_critic)
    return learner


def draws() -> torch.Tensor:
    """Noise for two samples of the actions of `random_batch`."""
    return torch.randn(2, 8, 2, generator=torch.Generator().manual_seed(1))


def sac_networks(learner: Any) -> dict[str, list[torch.nn.Parameter]]:
    """The parameters of a critic, and of an actor that holds SAC's temperature beside its own."""
    return {
        "critic": list(learner.critic.parameters()),
        "actor": [parameter for name, parameter in learner.actor.named_parameters() if name != "log_temperature"],
        "temperature": [learner.actor.log_temperature],
    }


def assert_each_trains_its_own(losses: dict[str, torch.Tensor], networks: dict[str, list[torch.nn.Parameter]]) -> None:
    """That the gradient of each loss reaches the networks that its key names, and no others."""
    for name, loss in losses.items():
        for other, parameters in networks.items():
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            touched = any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
            assert touched == (other in name.split()), f"{name} loss and {other}"


def assert_model_beats_naive_forecasts(folder: Path) -> None:
    """That each model which a run has fitted is better than none on what was held out."""
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["dynamics/error"]]
    if rows[-1]["step"] == "0":  # a row for each epoch of one model
        rows = rows[-1:]
    for row in rows:
        assert 0 < float(row["dynamics/error"]) < float(row["dynamics/error_nothing_changes"]) < math.inf
        assert 0 < float(row["dynamics/reward_error"]) < float(row["dynamics/reward_error_mean"]) < math.inf


def assert_one_line(run: Outcome, pattern: str) -> None:
    """That bad input ended the run with one line."""
    assert run.returncode == 2, run.stderr
    assert run.stderr.count("\n") == 1, run.stderr
    assert re.search(pattern, run.stderr), run.stderr


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same(left: Any, right: Any) -> None:
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for pair in zip(left, right, strict=True):
            assert_same(*pair)
    else:
        assert left == right


def assert_same_runs(left: Path, right: Path) -> None:
    """All but what depends on the time it took."""
    for key in ("learner", "random_state", "step"):
        assert_same(checkpoint(left)[key], checkpoint(right)[key])
    assert_same(*(torch.load(folder / "policy.pt", weights_only=True) for folder in (left, right)))
    timings = dict.fromkeys(["seconds", "wall_seconds", "updates_per_second"])
    rows, results = [], []
    for folder in (left, right):
        rows.append([row | {"seconds": None} for row in csv.DictReader((folder / "metrics.csv").open())])
        results.append(json.loads((folder / "result.json").read_text()) | timings)
    assert rows[0] == rows[1]
    assert results[0] == results[1]
