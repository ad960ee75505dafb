"""Acting: a policy as a function of NumPy arrays, loading it from a run folder, and its evaluation in environments."""

import contextlib
import importlib.util
import sys
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import IO, Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from common.command_line import BadInput, Diverged, check, explain, warn
from common.data import MASK, Batch, Dataset, action_bounds, flatten_observations, observation_names

EVALUATION_SEED = 10_000  # episode i is reset with this + i in every evaluation, so that curves compare like with like
FINAL_SEED = 20_000  # and with this + i when the final score is taken: from states that nothing was chosen by


class Policy(nn.Module):
    """The deterministic policy: observations [N, observation_dim] to actions [N, action_dim], discrete ones [N], both
    as the environment has them, both NumPy arrays or tensors. A script's `actor`, or `act` in a call, gives actions in
    [-1, 1], or discrete ones' preferences. `normalization` is mean and deviation [2, observation_dim], `action_range`
    lowest and highest [2, action_dim], `origin` the file's other entries. Raises BadInput."""

    def __init__(self, actor: nn.Module, normalization: Tensor, action_range: Any, discrete: bool, origin: Any) -> None:
        super().__init__()
        self.actor, self.discrete, self.origin = actor, discrete, origin
        self.num_legal = sum(x.startswith(f"{MASK}/") for x in origin.get("observation_names") or () if discrete)
        self.normalization = nn.Buffer(normalization)
        self.action_range = nn.Buffer(torch.from_numpy(np.stack(action_range)).to(normalization.device))

    def __call__(self, observations: Any, act: Callable[[Tensor], Tensor] | None = None) -> Any:
        if isinstance(observations, Tensor):
            return super().__call__(observations)
        inputs = torch.from_numpy(np.ascontiguousarray(observations, np.float64)).to(self.normalization.device)
        return super().__call__(inputs, act or self.act).detach().cpu().numpy()

    def forward(self, observations: Tensor, act: Callable | None = None) -> Tensor:
        (mean, std), dtype = self.normalization, next((x.dtype for x in self.actor.parameters()), torch.float32)
        if observations.ndim != 2 or observations.shape[1] != len(mean):
            raise BadInput(f"observations must have shape [N, {len(mean)}], not {list(observations.shape)}")
        inputs = ((observations.to(mean) - mean) / std).to(dtype)  # rounded when it is near 0
        check(torch.compiler.is_compiling() or bool(inputs.isfinite().all()), "what is observed is not a finite number")
        if self.num_legal and not torch.compiler.is_compiling():
            ones = (masks := observations[:, : self.num_legal]) == 1
            check(bool(((masks == 0) | ones).all() and ones.any(dim=1).all()), f"{MASK} must hold 0 and 1, and some 1")
        raw, (low, high) = (act or self.actor)(inputs), self.action_range
        return low[0] + raw.argmax(1) if self.discrete else ((high + low) / 2 + (high - low) / 2 * raw).clamp(low, high)

    @torch.inference_mode()
    def act(self, observations: Tensor) -> Tensor:  # the actor's, of normalised ones; layers such as dropout are off
        outputs = self.actor.eval()(observations)
        self.actor.train(self.training)
        return outputs

    def save(self, file: IO[bytes]) -> None:
        """Writes weights, hyper-parameters and what the actor does on examples, by which `load_policy` knows it."""
        inputs = torch.randn(32, self.normalization.shape[1], generator=torch.Generator().manual_seed(0))
        actor = {name: weight.cpu() for name, weight in self.actor.state_dict().items()}
        state = self.origin | {"actor": actor, "normalization": self.normalization.cpu(), "discrete": self.discrete}
        examples = [inputs, self.act(inputs.to(self.normalization.device)).cpu().clone()]
        torch.save(state | {"action_range": self.action_range.cpu(), "examples": examples}, file)


def load_policy(run: str | Path, script: str | Path | None = None) -> Policy:
    """The policy of a run's folder, or of a .pt file in one, on the CPU: `actions = load_policy(run)(observations)`.
    `script` is the script that trained it, if not in algorithms/. Raises BadInput if it is unreadable, or unlike it."""
    path = Path(run) if Path(run).suffix == ".pt" else Path(run) / "policy.pt"
    check(path.is_file(), f"no policy at {path}: give the folder of a run that has saved a checkpoint")
    state, kept = load_file(path), ("script", "hyper_parameters", "observation_names", "action_names")
    with explain(f"cannot read {path} (policies are a run's policy.pt and policy-1000.pt)"):
        origin: dict[str, Any] = {key: state.get(key) for key in kept}  # older versions saved no names
        weights, normalization, discrete = state["actor"], state["normalization"], state["discrete"]
        (low, high), (mean, std), (inputs, outputs) = state["action_range"].numpy(), normalization, state["examples"]
    module = load_script(str(origin["script"]), script)
    with explain(f"{path} does not fit {module.__file__}: name the script that trained it (--script)"):
        known = module.HyperParameters.__dataclass_fields__.keys() & origin["hyper_parameters"].keys()
        args = module.HyperParameters(**{name: origin["hyper_parameters"][name] for name in known})
        actor = module.Actor(normalization.shape[1], int(high[0] - low[0]) + 1 if discrete else len(low), args)
        policy = Policy(actor, normalization, (low, high), discrete, origin)
        actor.load_state_dict(weights)  # says which weights are missing or of another shape
        same = torch.isclose(policy.act(inputs), outputs, rtol=1e-3, atol=1e-3).flatten(1).all(dim=1)
        check(float(same.float().mean()) > 0.5, "its Actor makes something else of the same weights")
        check(bool(np.isfinite([*low, *high, *mean, *std]).all()), "its units are no numbers")
    return policy.eval()


def load_file(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What torch.save wrote. Nothing in it is run. Raises BadInput for damage, or more than data."""
    with explain(f"cannot read {path}"):
        with zipfile.ZipFile(path) as file:
            damaged = [file.testzip(), *(part.filename for part in file.infolist() if part.external_attr & 0x10)]
        check(damaged == [None], f"a part of it is damaged: {damaged[-1]}")  # torch.load checks no sum, skips folders
        return torch.load(path, map_location=device, weights_only=True)


@cache
def load_script(name: str, path: str | Path | None = None) -> Any:
    """The script of that name as a module, or the one at `path`, which no file may name, as it is run."""
    place = Path(path or Path(__file__).resolve().parents[1] / "algorithms" / f"{name}.py")
    check(place.is_file() and (path is not None or name == place.stem), f"no script {place}: give its path (--script)")
    with explain(f"cannot load {place}"):
        spec: Any = importlib.util.spec_from_file_location(f"script_{name}", place)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def make_environment(env_id: str, max_episode_steps: int | None = None, users: bool = False, **kwargs: Any) -> gym.Env:
    """An installed environment, of 1,000 steps unless it says. A `users` module is imported. Raises BadInput."""
    for known in ("gymnasium_robotics", "benchmarks.two_ways"):  # D4RL's hands, mazes and kitchen; ours
        with contextlib.suppress(ImportError):  # Gymnasium registers its own alone
            gym.register_envs(importlib.import_module(known))
    check(users or env_id in gym.registry, f"environment {env_id!r} is not installed")  # a dataset's module:Id is not
    with explain(f"environment {env_id!r} cannot be made"):
        made = gym.make(env_id, max_episode_steps, disable_env_checker=True, **kwargs)
        return made if made.spec and made.spec.max_episode_steps else gym.wrappers.TimeLimit(made, 1000)


def make_environments(dataset: Dataset, count: int, **more: Any) -> list[gym.Env]:
    """Copies of the dataset's environment, with its arguments and `more`. Raises BadInput if it does not fit."""
    env_id, spec = str(dataset.env_id), dataset.env_spec or {}
    check(dataset.env_id is not None, f"{dataset.dataset_id} names no environment (--env-id does)")
    for name, made in ((str(w["name"]), str(w.get("entry_point"))) for w in spec.get("additional_wrappers") or ()):
        same = made.startswith(("gymnasium.", "minari.")) and not name.endswith(("Observation", "Action", "Reward"))
        check(same, f"{env_id} without {name} is another (--env-id takes one of yours that has it)")
    kwargs = {key: value for key, value in spec.get("kwargs", {}).items() if key != "render_mode"}
    own, limit, installed = spec.get("entry_point"), spec.get("max_episode_steps"), gym.registry.get(env_id)
    ours = not kwargs or not installed or own == installed.entry_point
    check(ours, f"{env_id!r} is other code, {own!r}, than what is installed (--env-id {env_id} takes that)")
    environments = [make_environment(env_id, limit, dataset.env_spec is None, **kwargs, **more) for _ in range(count)]
    env, expected, low, high = environments[0], len(dataset.observation_names), dataset.action_low, dataset.action_high
    dim, bounds = len(observation_names(env.observation_space)), action_bounds(env.action_space, dataset.discrete)
    found = f"{env_id} has {dim} observed numbers and actions {env.action_space}, the data {expected}, {low} to {high}"
    fits = dim == expected and low.shape == bounds[0].shape
    if not fits or not np.allclose(bounds, [low, high]):
        check(fits and not dataset.discrete, found)
        warn(f"{found}: scores say something if both are in the same units")
    return environments


def evaluate(
    policy: Any, environments: list[gym.Env], num_episodes: int = 0, seed: int = EVALUATION_SEED, gamma: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Discounted returns and lengths, [num_episodes] (0: one per environment). Episode i is reset with `seed` + i. Who
    has an actor.follow is told before each call which episodes' rows come, and their last rewards: None at a start."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a row per episode is too little to share: to wake a second thread takes longer
    returns, lengths = np.zeros(count := num_episodes or len(environments)), np.zeros(count, dtype=int)
    numbers, free, playing, rewards = iter(range(count)), list(environments), list[Any](), list[Any]([None] * count)
    follow = getattr(getattr(policy, "actor", None), "follow", lambda episodes, rewards: None)
    while playing := playing + [[env, i, *answer(env, 0, seed + i)] for env, i in zip(free, numbers, strict=False)]:
        follow([i for _, i, _ in playing], [rewards[i] for _, i, _ in playing])
        free, before, playing = [], playing, []
        actions = policy(np.stack([observation for _, _, observation in before]))  # one call for all of them
        for (env, i, _), action in zip(before, actions, strict=True):
            observation, rewards[i], terminated, truncated = answer(env, lengths[i] + 1, action)
            returns[i] += gamma ** lengths[i] * rewards[i]
            lengths[i] += 1
            free += [env] if terminated or truncated else []
            playing += [] if terminated or truncated else [[env, i, observation]]
    torch.set_num_threads(threads)
    return returns, lengths


def answer(env: gym.Env, step: int, given: Any) -> list[Any]:
    """What a copy of an action, or at step 0 a seed, gives: flat observation, numbers. Raises BadInput, Diverged."""
    if not np.isfinite(given).all():
        raise Diverged(f"the action at step {step} of an episode is not finite; the last checkpoint is kept")
    with explain(f"the environment failed at step {step} of an episode"):
        observation, *numbers = env.step(np.array(given)[()])[:4] if step else env.reset(seed=given)[:1]
        found: list[Any] = [np.array(flatten_observations(observation, env.observation_space)), *map(float, numbers)]
        check(all(np.isfinite(part).all() for part in found), "it gave what is not finite")
    return found


class Player:
    """An environment that is played. An episode's seed is made of `seeds` and its number, so that a resumed run plays
    its last episode's actions again and is where it was, with all that `buffer` had been given. Raises BadInput."""

    def __init__(self, environment: Any, buffer: Any, *seeds: int) -> None:
        self.environment, self.buffer, self.seeds, self.observation = environment, buffer, seeds, np.empty(0)
        space, data = environment.action_space, buffer and buffer.dataset  # whose bounds are the policy's
        beyond = data and np.any((data.action_low < space.low - 1e-5) | (data.action_high > space.high + 1e-5))
        check(not beyond, f"the data's actions go beyond the environment's, {space}: to act in it, take data within")
        self._begin([])

    def step(self, action: Any) -> Batch:
        """A transition, in the environment's units as `action` is. After an episode's last, the next begins."""
        self.actions.append(action)
        before = self.observation
        self.observation, reward, end, cut = answer(self.environment, len(self.actions), action)
        transition = Batch(before, action, reward, self.observation, bool(end))
        if end or cut:
            self._begin([*self.lengths, len(self.actions)])
        return transition

    def _begin(self, lengths: list[int]) -> None:  # an episode, after those of these lengths
        self.lengths, self.actions = lengths, list[Any]()
        (seed,) = np.random.SeedSequence([*self.seeds, len(lengths)]).generate_state(1)
        (self.observation,) = answer(self.environment, 0, int(seed))

    def state_dict(self) -> dict[str, Tensor]:
        state = {name: torch.from_numpy(np.array(vars(self)[name])) for name in ("lengths", "actions", "observation")}
        return state | {"added": self.buffer.storage[self.buffer.num_loaded :].clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.buffer.storage = self.buffer.with_room[: self.buffer.num_loaded + len(state["added"])]
        self.buffer.storage[self.buffer.num_loaded :] = state["added"]
        self._begin([*map(int, state["lengths"])])
        for action in state["actions"].cpu().numpy():
            self.step(action)
        check(np.array_equal(self.observation, state["observation"].cpu()), "the environment does not go the same way")
