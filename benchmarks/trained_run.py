"""A finished run, read back from its folder: arguments, data and networks; and what its policy meets when it acts."""

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import gymnasium as gym
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from typeguard import TypeCheckError, check_type

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shift_measures import discounted_returns

from common.command_line import BadInput, check, explain, one_line, warn
from common.data import ReplayBuffer, flatten_observations, hold_out, load_dataset
from common.evaluation import Policy, evaluate, load_file, load_policy, load_script, make_environments
from common.optim import Adam

MOST_FURTHER = 10_000  # steps that an episode is played on after its time limit, for its G


class Trained(NamedTuple):
    """A run, read from its folder. Its actions are vectors in [-1, 1], discrete ones one-hot vectors of num_actions."""

    args: Any
    buffer: ReplayBuffer
    policy: Policy
    critic: nn.Module | None
    gamma: float
    reward_scale: float  # rewards, returns and Q are those that the script learned from: scale (reward + shift)
    reward_shift: float
    metrics: list[dict[str, float]]  # the rows of metrics.csv, of each the cells that are not empty

    def vectors(self, actions: Tensor) -> Tensor:
        """Of actions as the buffer has them, vectors or numbers from 0: [n, action_dim] or [n, num_actions]."""
        return one_hot(actions, self.buffer.num_actions).float() if self.buffer.num_actions else actions

    def act(self, observations: Tensor) -> Tensor:
        """pi(s)."""
        outputs = self.policy.act(observations)
        return self.vectors(outputs.argmax(dim=1)) if self.buffer.num_actions else outputs

    def q(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Q_i(s, a) of each critic i, [critics, n]."""
        assert self.critic is not None
        if not self.buffer.num_actions:
            return self.critic(observations, actions)
        of_all = self.critic(observations)  # [n, num_actions], of more critics than one [critics, n, num_actions]
        return of_all.reshape(-1, *of_all.shape[-2:])[:, torch.arange(len(actions)), actions.argmax(dim=1)]


class Visits(NamedTuple):
    """What a policy met in its episodes, until the time limit."""

    observations: Tensor  # [n, observation_dim], as the buffer has them
    actions: Tensor  # [n, action_dim], as Trained has them
    returns: Tensor  # [n], G of the rewards as learned from; nan where an episode was cut too soon to know it
    episodes: Tensor  # [n], their numbers


def load_run(folder: Path, script: Path | None = None, env_id: str | None = None) -> Trained:
    """`script` is the path of the script that trained the run, if it is not in algorithms/; `env_id` overrides the
    environment of the run. Raises BadInput if the folder holds no finished run of a policy, or if its data is gone or
    has changed.
    """
    check(folder.is_dir(), f"no folder {folder}: give the folder of a run")
    check((folder / "args.json").is_file(), f"{folder} is not the folder of a run: it lacks args.json")
    kept, ended = ((folder / name).is_file() for name in ("checkpoint.pt", "result.json"))
    check(kept or not ended, f"the run in {folder} lacks its checkpoint.pt: bring it back, or train in another folder")
    todo = f"go on with the same command and --resume --run-dir {folder}"
    lacks = "result.json" if kept else "checkpoint.pt"
    check(kept and ended, f"the run in {folder} has not finished: it lacks {lacks}; {todo}")
    with explain(f"cannot read the run in {folder}"):
        saved = json.loads((folder / "args.json").read_text())
        algorithm = str(saved["algorithm"])
        checkpoint = load_file(folder / "checkpoint.pt")
        learned, fingerprint = dict(checkpoint["learner"]), checkpoint["dataset_fingerprint"]
        with (folder / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        metrics = [{name: float(cell) for name, cell in row.items() if cell} for row in rows]
        check(all(row.get("step", 0.5).is_integer() for row in metrics), "a row of metrics.csv lacks its step")
    check("actor" in learned, f"{folder} is a run of {algorithm}, which learns no policy")
    of_data = saved.get("dataset_id", "") != saved.get("env_id")  # SAC has its environment for both
    check(of_data, f"{folder} is a run of {algorithm}, which learns from no dataset")
    module: Any = load_script(algorithm, script)
    args = arguments(module.Args, saved, folder, env_id)
    policy, cpu = load_policy(folder, script), torch.device("cpu")
    history = f"{folder}: its Actor needs its episode's history (`follow`), which only playing gives it"
    check(not getattr(policy.actor, "needs_history", False), history)
    dataset = hold_out(load_dataset(args.dataset_id, args.env_id, discrete=policy.discrete), args)
    buffer = ReplayBuffer(dataset, cpu, args.normalize_observations)
    other = f"{folder} was trained on other data than {args.dataset_id} holds: bring these back, or train it again"
    check(buffer.fingerprint == fingerprint, other)
    actor = policy.actor.requires_grad_(False).eval()
    critic = getattr(actor, "critic", None)  # BCQ's is a part of its actor, as is that of most for discrete actions
    if "critic" in learned:
        critic = module.build(buffer.observation_dim, buffer.num_actions or buffer.action_dim, args, cpu, Adam).critic
        with explain(f"{folder}: checkpoint.pt does not fit {module.__file__}"):
            critic.load_state_dict(learned["critic"])
            finite = all(bool(weight.isfinite().all()) for weight in critic.parameters())
            check(finite, "its critic holds what is not a finite number")
        critic.requires_grad_(False).eval()
    scale, shift = 1.0, 0.0
    if hasattr(args, "reward_scale"):
        buffer.scale_rewards(args.reward_scale, args.reward_shift)
        scale, shift = buffer.reward_scale, args.reward_shift
    return Trained(args, buffer, policy, critic, getattr(args, "gamma", 0.99), scale, shift, metrics)


def arguments(args_class: Any, saved: dict[str, Any], folder: Path, env_id: str | None) -> Any:
    """Those of the run, with the environment that the user gives. Raises BadInput for one that cannot be."""
    kinds = get_type_hints(args_class)
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    for name in values.keys() & kinds.keys() - {"run_dir"}:
        try:
            check_type(values[name], kinds[name])
        except TypeCheckError as error:
            raise BadInput(f"cannot read {folder / 'args.json'}: {name}: {one_line(error)}") from None
    args = args_class(**{name: value for name, value in values.items() if name in kinds})
    args.env_id = given_or_own(env_id, args.env_id)
    with explain(f"cannot read {folder / 'args.json'}"):
        args.validate()
    return args


def given_or_own(given: str | None, own: Any) -> str | None:
    """The environment that the user gives, else the run's own. Raises BadInput where a file alone names a module."""
    named = given is not None or ":" not in str(own)
    check(named, f"give --env-id {own} again, or another one: its module would be run")
    return given or own


class Recorder(gym.Wrapper):
    """Keeps the episode that is played."""

    def reset(self, **kwargs: Any) -> Any:
        observation, info = self.env.reset(**kwargs)
        self.observations = [self._flat(observation)]
        self.actions: list[Tensor] = []
        self.rewards: list[float] = []
        return observation, info

    def step(self, action: Any) -> Any:
        self.actions.append(torch.tensor(action))  # first: an environment may write into it
        observation, reward, self.terminated, truncated, info = self.env.step(action)
        self.observations.append(self._flat(observation))
        self.rewards.append(float(reward))
        return observation, reward, self.terminated, truncated, info

    def _flat(self, observation: Any) -> Tensor:
        flat = flatten_observations(observation, self.env.observation_space)
        return torch.tensor(flat, dtype=torch.float64)  # a copy: environments may write to their array again


def visit(run: Trained, num_episodes: int) -> Visits | None:
    """Plays the policy; None without an environment. In an episode that was cut, G is known of a visit if gamma^t is
    below 0.01 at the cut: for gamma 1 of none, and of fewer where that takes more than MOST_FURTHER steps.
    """
    buffer, dataset, gamma = run.buffer, run.buffer.dataset, run.gamma
    if not num_episodes or dataset.env_id is None:
        return None
    try:
        recorders: list[Any] = [Recorder(environment) for environment in make_environments(dataset, num_episodes)]
    except BadInput as reason:
        warn(f"there are no visits: {reason}")
        return None
    limit = recorders[0].spec.max_episode_steps
    horizon = math.ceil(math.log(0.01) / math.log(gamma)) if 0 < gamma < 1 else 1
    for recorder in recorders:
        recorder.set_wrapper_attr("_max_episode_steps", limit + min(MOST_FURTHER, horizon))  # of Gymnasium's TimeLimit
    evaluate(run.policy, recorders)
    columns: tuple[list[Tensor], ...] = ([], [], [], [])
    for number, episode in enumerate(recorders):
        rewards = run.reward_scale * (torch.tensor(episode.rewards, dtype=torch.float64) + run.reward_shift)
        returns = discounted_returns(rewards, gamma)
        if not episode.terminated:
            returns[max(0, len(returns) - horizon) if gamma < 1 else 0 :] = torch.nan
        numbers = torch.full((len(returns),), number)
        fields = torch.stack(episode.observations[:-1]), torch.stack(episode.actions), returns, numbers
        for column, values in zip(columns, fields, strict=True):
            column.append(values[:limit])
    observations, actions, returns, numbers = map(torch.cat, columns)
    low, high = torch.as_tensor(dataset.action_low), torch.as_tensor(dataset.action_high)
    if dataset.discrete:
        actions = run.vectors(actions - low)
    else:
        low, high = low.double(), high.double()  # so that a bound becomes 1 exactly, as in a buffer
        actions = ((actions - (high + low) / 2) / ((high - low) / 2)).float()
    observations = ((observations - buffer.normalization[0]) / buffer.normalization[1]).float()
    return Visits(observations, actions, returns, numbers)
