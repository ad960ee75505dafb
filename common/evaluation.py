"""Acting: a policy as a function of NumPy arrays, loading it from a run folder, and its evaluation in environments."""

import contextlib
import dataclasses
import importlib
import importlib.util
import sys
import zipfile
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from common.command_line import BadInput, check, explain, one_line, warn
from common.data import Dataset, action_bounds, flat_observation_dim, flatten_observations

EVALUATION_SEED = 10_000  # episode i is reset with this + i in every evaluation, so that curves compare like with like


class Policy:
    """The deterministic policy: observations [N, observation_dim] to actions [N, action_dim], both as the environment
    has them; discrete ones [N]. `actor`, a script's Actor, maps normalised observations to actions in [-1, 1], or to a
    preference for each of the discrete actions. `normalization` [2, observation_dim] holds mean and standard deviation,
    `action_range` [2, action_dim] the lowest and the highest action, `origin` the actor's "script" and its
    "hyper_parameters".
    """

    def __init__(self, actor: nn.Module, normalization: Tensor, action_range: Any, discrete: bool, origin: Any) -> None:
        self.actor, self.normalization, self.discrete, self.origin = actor, normalization, discrete, origin
        self.action_low, self.action_high = action_range

    def __call__(self, observations: np.ndarray) -> np.ndarray:
        mean, std = self.normalization
        if np.ndim(observations) != 2 or np.shape(observations)[1] != len(mean):
            raise ValueError(f"observations must have shape [N, {len(mean)}], not {list(np.shape(observations))}")
        inputs = torch.from_numpy(np.asarray(observations, dtype=np.float32)).to(mean.device)
        outputs = self.act((inputs - mean) / std).cpu().numpy()
        low, high = self.action_low, self.action_high
        if self.discrete:
            return low[0] + outputs.argmax(axis=1)
        return np.clip((high + low) / 2 + (high - low) / 2 * outputs, low, high)

    @torch.inference_mode()
    def act(self, observations: Tensor) -> Tensor:
        """What the actor gives for normalised observations when it acts: layers such as dropout are off."""
        training = self.actor.training
        outputs = self.actor.eval()(observations)
        self.actor.train(training)
        return outputs

    def save(self, file: IO[bytes]) -> None:
        """Writes the weights, what the script builds its Actor from, and what that does on some examples: by these
        `load_policy` knows whether the script still has the network that was trained. The file holds no code.
        """
        inputs = torch.randn(32, self.normalization.shape[1], generator=torch.Generator().manual_seed(0))
        state = self.origin | {
            "actor": {name: weight.cpu() for name, weight in self.actor.state_dict().items()},
            "normalization": self.normalization.cpu(),
            "action_range": torch.from_numpy(np.stack([self.action_low, self.action_high])),
            "discrete": self.discrete,
            "examples": [inputs, self.act(inputs.to(self.normalization.device)).cpu().clone()],
        }
        torch.save(state, file)


def load_policy(run_dir: str | Path, script: str | Path | None = None, file: str = "policy.pt") -> Policy:
    """The trained policy of a run folder, ready to act on the CPU: `actions = load_policy("runs/...")(observations)`,
    of observations as the environment gives them (Dicts flattened by `flatten_observations`).

    `script` is the path of the script that trained it, if that is not in algorithms/. Raises BadInput if the folder
    holds no readable policy, or if the script's Actor is not the one that was trained.
    """
    path = Path(run_dir) / file
    check(path.is_file(), f"no policy at {path}: give the folder of a run that has saved a checkpoint")
    with explain(f"cannot read {path}"):
        state = load_file(path)
        origin = {key: state[key] for key in ("script", "hyper_parameters")}
        weights, normalization, discrete = state["actor"], state["normalization"], state["discrete"]
        (low, high), (inputs, outputs) = state["action_range"].numpy(), state["examples"]
    module = load_script(str(origin["script"]), script)
    known = {field.name for field in dataclasses.fields(module.HyperParameters)} & origin["hyper_parameters"].keys()
    args = module.HyperParameters(**{name: origin["hyper_parameters"][name] for name in known})
    actor = module.Actor(normalization.shape[1], int(high[0] - low[0]) + 1 if discrete else len(low), args)
    policy = Policy(actor, normalization, (low, high), discrete, origin)
    with explain(f"{path} does not fit {module.__file__}: name the script that trained it (script=)"):
        actor.load_state_dict(weights)  # says which weights are missing or of another shape
        same = torch.isclose(policy.act(inputs), outputs, rtol=1e-3, atol=1e-3).flatten(1).all(dim=1)
        check(float(same.float().mean()) > 0.5, "its Actor makes something else of the same weights")
    return policy


def load_file(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What torch.save wrote, with tensors on `device`. Nothing in it is run. Raises an exception of one of many kinds
    for a file that is cut, has a wrong bit, or holds more than data.
    """
    with zipfile.ZipFile(path) as file:
        # torch.load looks at no checksum, and leaves the memory of a part that is marked as a folder as it is
        damaged = [file.testzip()]
        damaged += [part.filename for part in file.infolist() if part.external_attr & 0x10]
    check(damaged == [None], f"a part of it is damaged: {damaged[-1]}")
    return torch.load(path, map_location=device, weights_only=True)


@cache
def load_script(name: str, path: str | Path | None = None) -> ModuleType:
    """The script of that name as a module, or the one at `path`, which no file may name, as it is run."""
    root = Path(__file__).resolve().parents[1]
    places = [root / "algorithms" / f"{name}.py", root / f"{name}.py"] if name.isidentifier() else []
    found = next((place for place in ([Path(path)] if path else places) if place.is_file()), None)
    check(found is not None, f"there is no script {path or name} in {root / 'algorithms'}: give its path (script=)")
    spec: Any = importlib.util.spec_from_file_location(f"script_{name}", found or "")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class NoEnvironment(BadInput):
    """There is none to evaluate in."""


def make_environment(env_id: str, max_episode_steps: int | None = None, users: bool = False, **kwargs: Any) -> gym.Env:
    """One copy of an installed environment; its episodes end after 1,000 steps if nothing else says when. Only if the
    id is a `users` own is the module of "module:Id" imported: it is code. Raises NoEnvironment.
    """
    with contextlib.suppress(ImportError):  # D4RL's hands, mazes and kitchen: Gymnasium registers its own alone
        gym.register_envs(importlib.import_module("gymnasium_robotics"))
    try:
        if users and ":" in env_id:
            module, env_id = env_id.split(":")
            importlib.import_module(module)
        own = gym.registry[env_id]  # raises for another "module:Id", which gym.make would import
        limit = max_episode_steps or own.max_episode_steps or 1000
        return gym.make(env_id, max_episode_steps=limit, disable_env_checker=True, **kwargs)
    except KeyError:
        raise NoEnvironment(f"environment {env_id!r} is not installed") from None
    except Exception as error:  # a missing simulator raises whatever its binding raises
        raise NoEnvironment(f"environment {env_id!r} cannot be made ({one_line(error)})") from None


def make_environments(dataset: Dataset, num_episodes: int, **more: Any) -> list[gym.Env]:
    """`num_episodes` copies of the dataset's evaluation environment, with the dataset's arguments, if the code behind
    its id is what the dataset names, and `more`. Raises NoEnvironment where it cannot be made, and BadInput if its
    spaces are not of the dataset's size.
    """
    env_id, spec = dataset.env_id, dataset.env_spec or {}
    if env_id is None:
        raise NoEnvironment(f"{dataset.dataset_id} names no environment (--env-id does)")
    kwargs = {key: value for key, value in spec.get("kwargs", {}).items() if key != "render_mode"}
    installed: Any = gym.registry.get(env_id)
    if kwargs and installed and spec.get("entry_point") != installed.entry_point:
        warn(f"environment {env_id!r} is made without {kwargs}: these are for {spec.get('entry_point')!r}, other code")
        kwargs = {}
    limit, users = spec.get("max_episode_steps"), dataset.env_spec is None
    environments = [make_environment(env_id, limit, users, **kwargs, **more) for _ in range(num_episodes)]
    dim, space = flat_observation_dim(environments[0].observation_space), environments[0].action_space
    discrete = isinstance(space, gym.spaces.Discrete)
    found = _sizes(dim, *action_bounds(space, discrete), discrete)
    expected = _sizes(dataset.observation_dim, dataset.action_low, dataset.action_high, dataset.discrete)
    check(found == expected, f"{env_id} has {found}, {dataset.dataset_id} has {expected}")
    return environments


def _sizes(observation_dim: int, low: np.ndarray, high: np.ndarray, discrete: bool) -> str:
    actions = f"numbered {low[0]} to {high[0]}" if discrete else f"of shape {low.shape}"
    return f"observations of size {observation_dim} and actions {actions}"


def evaluate(policy: Any, environments: list[gym.Env], gamma: float = 1.0) -> np.ndarray:
    """Returns [num_envs], discounted by `gamma`: an episode of each environment, reset with a fixed seed of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a row per episode is too little to share: to wake a second thread takes longer
    observations = [env.reset(seed=EVALUATION_SEED + index)[0] for index, env in enumerate(environments)]
    returns, running, discount = np.zeros(len(environments)), list(range(len(environments))), 1.0
    while running:  # one call of the policy for all the episodes that have not ended
        rows = [flatten_observations(observations[index], environments[index].observation_space) for index in running]
        for index, action in zip(list(running), policy(np.stack(rows)), strict=True):
            observations[index], reward, terminated, truncated, _ = environments[index].step(action)
            returns[index] += discount * float(reward)
            if terminated or truncated:
                running.remove(index)
        discount *= gamma
    torch.set_num_threads(threads)
    return returns


def normalized_score(returns: float, dataset: Dataset) -> float | None:
    """100 * (return - reference minimum) / (maximum - minimum), as D4RL defines it; None without reference scores."""
    if dataset.reference_returns is None:
        return None
    minimum, maximum = dataset.reference_returns
    return 100 * (returns - minimum) / (maximum - minimum)
