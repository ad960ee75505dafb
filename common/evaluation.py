"""Acting: a policy as a function of NumPy arrays, its evaluation in environments, and loading it from a run folder."""

import contextlib
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from torch import Tensor, nn

from common.datasets import (
    BadInput,
    Dataset,
    action_bounds,
    check,
    flat_observation_dim,
    flatten_observations,
    one_line,
    warn,
)
from common.files import load, save

EVALUATION_SEED = 10_000  # episode i is reset with this + i in every evaluation, so that curves compare like with like


class Policy:
    """The deterministic policy: observations [N, observation_dim] to actions [N, action_dim], both as the environment
    has them. `actor` maps normalised observations to actions in [-1, 1]; or to a preference for each of the discrete
    actions, of which the policy takes the first of the highest: whole numbers [N].
    """

    def __init__(
        self,
        actor: nn.Module,
        observation_mean: Tensor,
        observation_std: Tensor,
        action_low: np.ndarray,
        action_high: np.ndarray,
        discrete: bool = False,
    ):
        self.actor, self.discrete = actor, discrete
        self.observation_mean, self.observation_std = observation_mean, observation_std
        self.action_low, self.action_high = action_low, action_high
        self.center, self.half_range = (action_high + action_low) / 2, (action_high - action_low) / 2

    @torch.inference_mode()
    def __call__(self, observations: np.ndarray) -> np.ndarray:
        expected = len(self.observation_mean)
        if np.ndim(observations) != 2 or np.shape(observations)[1] != expected:
            raise ValueError(f"observations must have shape [N, {expected}], not {list(np.shape(observations))}")
        inputs = torch.from_numpy(np.asarray(observations, dtype=np.float32)).to(self.observation_mean.device)
        actions = self.actor((inputs - self.observation_mean) / self.observation_std).cpu().numpy()
        if self.discrete:
            return self.action_low[0] + actions.argmax(axis=1)
        return np.clip(self.center + self.half_range * actions, self.action_low, self.action_high)


def save_policy(path: Path, policy: Policy) -> None:
    """Writes all that acting needs: the weights of `policy.actor.net` (an MLP with ReLU between layers and tanh at its
    end) or, of an actor without it, all that _BestCandidate or _Preference acts with; the observation normalisation,
    the action range. The file loads with `torch.load(weights_only=True)`.
    """
    if isinstance(policy.actor, (_BestCandidate, _Preference)):  # one that was loaded
        weights = policy.actor.weights
    else:
        weights = getattr(policy.actor, "net", policy.actor).state_dict()
    state = {
        "actor": {name: weight.cpu() for name, weight in weights.items()},
        "observation_mean": policy.observation_mean.cpu(),
        "observation_std": policy.observation_std.cpu(),
        "action_low": torch.from_numpy(policy.action_low),
        "action_high": torch.from_numpy(policy.action_high),
    } | ({"discrete": True} if policy.discrete else {})
    save(state, path)


def load_policy(run_dir: str | Path) -> Policy:
    """The trained policy of a run folder, ready to act on the CPU: `actions = load_policy("runs/...")(observations)`.

    Observations [N, observation_dim] are in the environment's own scale (Dicts flattened by `flatten_observations`),
    actions [N, action_dim] in its range, or [N] the numbers of discrete ones. Raises BadInput if the folder holds no
    readable policy.pt.
    """
    path = Path(run_dir) / "policy.pt"
    check(path.is_file(), f"no policy at {path}: give the folder of a run that has saved a checkpoint")
    try:
        state = load(path)
    except Exception as error:  # unpickling raises many kinds
        raise BadInput(f"cannot read {path}: {one_line(error)}") from None
    weights, discrete = state["actor"], state.get("discrete", False)
    form: Any = _Preference if discrete else _BestCandidate if "latents" in weights else _mlp
    return Policy(
        form(weights),
        state["observation_mean"],
        state["observation_std"],
        state["action_low"].numpy(),
        state["action_high"].numpy(),
        discrete,
    )


def _mlp(weights: dict[str, Tensor], prefix: str = "", output: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """The network whose weights' names begin with `prefix`."""
    weights = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    layers: list[nn.Module] = []
    for name in (name for name in weights if name.endswith("weight")):
        layers += [nn.Linear(*weights[name].shape[::-1]), nn.ReLU()]
    actor = nn.Sequential(*layers[:-1], output())
    actor.load_state_dict(weights)
    return actor


class _BestCandidate(nn.Module):
    """BCQ's policy: of the candidates clip(u_i + phi tanh(perturbation(s, u_i)), -1, 1), u_i = tanh(decoder(s, z_i)),
    one for each of the fixed latents z_i, the action with the highest Q_1.
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.weights = weights
        self.latents, self.phi = weights["latents"], weights["perturbation.phi"]
        self.decoder, self.perturbation = (_mlp(weights, net) for net in ("decoder.net.", "perturbation.net."))
        critic = [weights[name][:1] for name in weights if name.startswith("critic")]  # of the twins, the first
        self.critic = list(zip(critic[::2], critic[1::2], strict=True))

    def forward(self, observations: Tensor) -> Tensor:
        observations = observations.expand(len(self.latents), -1, -1)  # [candidates, N, observation_dim]
        latents = self.latents.unsqueeze(1).expand(-1, observations.shape[1], -1)
        sampled = self.decoder(torch.cat([observations, latents], dim=-1))
        shift = self.phi * self.perturbation(torch.cat([observations, sampled], dim=-1))
        candidates = (sampled + shift).clamp(-1, 1)  # [candidates, N, action_dim]
        x = torch.cat([observations, candidates], dim=-1).flatten(end_dim=1).unsqueeze(0)
        for index, (weight, bias) in enumerate(self.critic):
            x = torch.baddbmm(bias, torch.relu(x) if index else x, weight)
        best = x.view(candidates.shape[:2]).argmax(dim=0)
        return candidates.take_along_dim(best[None, :, None], dim=0)[0]


class _Preference(nn.Module):
    """Discrete actions: Q(s, .) and, with a model beta(. | s) of the data's actions, bc_weight log beta added, and -inf
    where beta is not above `threshold` times its highest.
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.weights = weights
        self.critic = _mlp(weights, "critic.net.", nn.Identity)
        modelled = any(name.startswith("behaviour.") for name in weights)
        self.behaviour = _mlp(weights, "behaviour.net.", nn.Identity) if modelled else None
        self.threshold, self.bc_weight = (weights.get(name, torch.zeros(())) for name in ("threshold", "bc_weight"))

    def forward(self, observations: Tensor) -> Tensor:
        q = self.critic(observations)
        if self.behaviour is None:
            return q
        log_beta = self.behaviour(observations).log_softmax(dim=-1)
        unlikely = log_beta - log_beta.amax(dim=-1, keepdim=True) <= self.threshold.log()  # the logarithm of 0 is -inf
        return (q + self.bc_weight * log_beta).masked_fill(unlikely, -torch.inf)


class NoEnvironment(BadInput):
    """There is none to evaluate in."""


def registered(env_id: str) -> EnvSpec | None:
    """What is installed under an id; never a "module:Name", which would be imported: that is code execution by data."""
    with contextlib.suppress(ImportError):  # D4RL's hands, mazes and kitchen: Gymnasium registers its own alone
        import gymnasium_robotics

        gym.register_envs(gymnasium_robotics)
    return gym.registry.get(env_id)


def make_environment(
    env_id: str, max_episode_steps: int | None = None, entry_point: Any = None, **kwargs: Any
) -> gym.Env:
    """One copy of an installed environment; its episodes end after 1,000 steps if nothing else says when.

    An `entry_point` is imported and run instead of what is installed. Raises NoEnvironment where there is no such
    environment, or it cannot be made.
    """
    spec = registered(env_id)
    if spec is None and entry_point is None:
        raise NoEnvironment(f"environment {env_id!r} is not installed")
    limit = max_episode_steps or (spec and spec.max_episode_steps) or 1000
    try:
        made = env_id if entry_point is None else EnvSpec(env_id, entry_point)
        return gym.make(made, max_episode_steps=limit, disable_env_checker=True, **kwargs)
    except Exception as error:  # a missing simulator raises whatever its binding raises
        raise NoEnvironment(f"environment {env_id!r} cannot be made ({one_line(error)})") from None


def make_environments(dataset: Dataset, num_episodes: int, trust: bool = False) -> list[gym.Env] | None:
    """`num_episodes` copies of the dataset's evaluation environment, or None with one warning where it cannot be made.
    Raises BadInput as `find_environments` does.
    """
    try:
        return find_environments(dataset, num_episodes, trust)
    except NoEnvironment as reason:
        warn(f"{reason}: training goes on without evaluation")
        return None


def find_environments(dataset: Dataset, num_episodes: int, trust: bool = False, **more: Any) -> list[gym.Env]:
    """`num_episodes` copies of the dataset's evaluation environment, with `more` arguments.

    What is installed under its id gets the dataset's arguments if the code behind it is what the dataset names, too.
    Only with `trust` is other code that a dataset names imported and run. Raises NoEnvironment where it cannot be made,
    and BadInput if its observations or actions are not of the dataset's size.
    """
    env_id, entry_point = dataset.env_id, dataset.env_entry_point
    if env_id is None:
        raise NoEnvironment(f"{dataset.dataset_id} names no environment (--env-id does)")
    kwargs = {key: value for key, value in dataset.env_kwargs.items() if key != "render_mode"}
    spec = registered(env_id)
    if entry_point is None or (spec is not None and spec.entry_point == entry_point):
        entry_point = None  # what is installed
    elif not trust:
        if spec is None:
            switch = f"--trust-dataset-env runs {entry_point!r} for it"
            raise NoEnvironment(f"environment {env_id!r} is not installed ({switch})")
        if kwargs:
            warn(f"environment {env_id!r} is made without {kwargs}: these are for {entry_point!r}, other code")
        entry_point, kwargs = None, {}
    kwargs, limit = kwargs | more, dataset.max_episode_steps
    environments = [make_environment(env_id, limit, entry_point, **kwargs) for _ in range(num_episodes)]
    space = environments[0].action_space
    numbers = action_bounds(space, discrete=True) if isinstance(space, gym.spaces.Discrete) else None
    found = _sizes(flat_observation_dim(environments[0].observation_space), space.shape, numbers)
    numbers = (dataset.action_low, dataset.action_high) if dataset.discrete else None
    expected = _sizes(dataset.observation_dim, dataset.action_low.shape, numbers)
    check(found == expected, f"{env_id} has {found}, {dataset.dataset_id} has {expected}")
    return environments


def _sizes(observation_dim: int, shape: Any, numbers: tuple[np.ndarray, np.ndarray] | None) -> str:
    actions = f"of shape {shape}" if numbers is None else f"numbered {numbers[0][0]} to {numbers[1][0]}"
    return f"observations of size {observation_dim} and actions {actions}"


def evaluate(policy: Policy, environments: list[gym.Env], gamma: float = 1.0) -> np.ndarray:
    """Returns [num_envs], discounted by `gamma`: one episode of each environment copy, reset with a fixed seed of its
    own.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a row per episode is too little to share: to wake a second thread takes longer
    try:
        return _play(policy, environments, gamma)
    finally:
        torch.set_num_threads(threads)


def _play(policy: Policy, environments: list[gym.Env], gamma: float) -> np.ndarray:
    resets = (environment.reset(seed=EVALUATION_SEED + index) for index, environment in enumerate(environments))
    observations = [_flat(environment, reset[0]) for environment, reset in zip(environments, resets, strict=True)]
    returns, running, discount = np.zeros(len(environments)), list(range(len(environments))), 1.0
    while running:  # one call of the policy for all the episodes that have not ended
        actions = policy(np.stack([observations[index] for index in running]))
        ended = set()
        for index, action in zip(running, actions, strict=True):
            observation, reward, terminated, truncated, _ = environments[index].step(action)
            observations[index] = _flat(environments[index], observation)
            returns[index] += discount * float(reward)
            if terminated or truncated:
                ended.add(index)
        running = [index for index in running if index not in ended]
        discount *= gamma
    return returns


def _flat(environment: gym.Env, observation: Any) -> np.ndarray:
    return flatten_observations(observation, environment.observation_space)


def normalized_score(returns: float, dataset: Dataset) -> float | None:
    """100 * (return - reference minimum) / (maximum - minimum), as D4RL defines it; None without reference scores."""
    if dataset.reference_returns is None:
        return None
    minimum, maximum = dataset.reference_returns
    return 100 * (returns - minimum) / (maximum - minimum)
