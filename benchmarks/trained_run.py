"""A finished run, read back from its folder: arguments, data and networks; and what its policy meets when it acts."""

import csv
import dataclasses
import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "algorithms"))
from shift_measures import discounted_returns

from common.command_line import parse_args
from common.datasets import BadInput, check, flatten_observations, load_dataset, one_line
from common.evaluation import Policy, evaluate, make_environments
from common.replay_buffer import ReplayBuffer

SCRIPTS = {path.stem for path in (Path(__file__).resolve().parents[1] / "algorithms").glob("*.py")}


class Trained(NamedTuple):
    """A run, read from its folder."""

    args: Any
    buffer: ReplayBuffer
    actor: nn.Module
    critic: nn.Module | None
    gamma: float
    reward_scale: float  # of Q's units, in those of the environment
    metrics: list[dict[str, str]]  # the rows of metrics.csv

    def q(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Q_i of every critic in the environment's units: [critics, n]. For runs with a critic."""
        return self.critic(observations, actions) / self.reward_scale  # type: ignore[misc]


class Visits(NamedTuple):
    """What a policy met in its episodes, until the time limit."""

    observations: Tensor  # [n, observation_dim], as the buffer has them
    actions: Tensor  # [n, action_dim] in [-1, 1]
    returns: Tensor  # [n], G; nan where an episode was cut too soon to know it
    episodes: Tensor  # [n], their numbers


def load_run(folder: Path) -> Trained:
    """Raises BadInput if the folder holds no finished run of a policy, or if its data is gone or has changed."""
    check(folder.is_dir(), f"no folder {folder}: give the folder of a run")
    check((folder / "args.json").is_file(), f"{folder} is not the folder of a run: it lacks args.json")
    for name in ("checkpoint.pt", "result.json"):
        todo = f"go on with --resume --run-dir {folder}"
        check((folder / name).is_file(), f"the run in {folder} has not finished: it lacks {name}; {todo}")
    try:
        algorithm = json.loads((folder / "args.json").read_text())["algorithm"]
        checkpoint = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
        learned, fingerprint = checkpoint["learner"], checkpoint["dataset_fingerprint"]
        with (folder / "metrics.csv").open(newline="") as file:
            metrics = list(csv.DictReader(file))
    except Exception as error:  # unpickling raises many kinds
        raise BadInput(f"cannot read the run in {folder}: {one_line(error)}") from None
    check(algorithm in SCRIPTS, f"{folder} is a run of {algorithm!r}, and there is no such script in algorithms/")
    check("actor" in learned, f"{folder} is a run of {algorithm}, which learns no policy")
    module: Any = importlib.import_module(algorithm)
    args: Any = parse_args(module.Args, ["--resume", "--run-dir", str(folder)])
    dataset, cpu = load_dataset(args.dataset_id, args.env_id), torch.device("cpu")
    buffer = ReplayBuffer(dataset, cpu, args.normalize_observations)
    check(buffer.fingerprint == fingerprint, f"{folder} was trained on other data than {args.dataset_id} holds")
    learner = module.build(buffer.observation_dim, buffer.action_dim, args, cpu)
    try:
        for name in learned.keys() & {"actor", "critic"}:
            getattr(learner, name).load_state_dict(learned[name])
    except RuntimeError as error:
        raise BadInput(f"{folder}: checkpoint.pt does not fit args.json: {one_line(error)}") from None
    critic = getattr(learner, "critic", getattr(learner.actor, "critic", None))  # BCQ's is a part of its actor
    for network in (learner.actor, critic):
        if network is not None:
            network.requires_grad_(False)
    scale = module.reward_scale(args, buffer.episode_returns) if hasattr(module, "reward_scale") else 1.0
    return Trained(args, buffer, learner.actor, critic, getattr(args, "gamma", 0.99), scale, metrics)


class Recorder(gym.Wrapper):
    """Keeps the episode that is played."""

    def reset(self, **kwargs: Any) -> Any:
        observation, info = self.env.reset(**kwargs)
        self.observations = [self._flat(observation)]
        self.actions: list[Tensor] = []
        self.rewards: list[float] = []
        return observation, info

    def step(self, action: Any) -> Any:
        observation, reward, self.terminated, truncated, info = self.env.step(action)
        self.observations.append(self._flat(observation))
        self.actions.append(torch.tensor(action, dtype=torch.float32))
        self.rewards.append(float(reward))
        return observation, reward, self.terminated, truncated, info

    def _flat(self, observation: Any) -> Tensor:
        flat = flatten_observations(observation, self.env.observation_space)
        return torch.tensor(flat, dtype=torch.float32)  # a copy: environments may write to their array again


def visit(run: Trained, num_episodes: int) -> Visits | None:
    """Plays the policy; None without an environment. For gamma 1, G is known of episodes that terminate alone."""
    buffer, dataset, gamma = run.buffer, run.buffer.dataset, run.gamma
    first: Any = make_environments(dataset, 1) if num_episodes and dataset.env_id else None
    if first is None:
        return None
    limit = first[0].spec.max_episode_steps
    horizon = min(10_000, math.ceil(math.log(0.01) / math.log(gamma))) if 0 < gamma < 1 else 1
    longer = dataclasses.replace(dataset, max_episode_steps=limit + horizon)
    recorders: list[Any] = [Recorder(environment) for environment in make_environments(longer, num_episodes) or ()]
    low, high = dataset.action_low, dataset.action_high
    evaluate(Policy(run.actor, buffer.observation_mean, buffer.observation_std, low, high), recorders)
    columns: tuple[list[Tensor], ...] = ([], [], [], [])
    for number, episode in enumerate(recorders):
        returns = discounted_returns(torch.tensor(episode.rewards), gamma)
        if not episode.terminated:
            returns[max(0, len(returns) - horizon) :] = torch.nan
        numbers = torch.full((len(returns),), number)
        fields = torch.stack(episode.observations[:-1]), torch.stack(episode.actions), returns, numbers
        for column, values in zip(columns, fields, strict=True):
            column.append(values[:limit])
    observations, actions, returns, numbers = map(torch.cat, columns)
    observations = (observations - buffer.observation_mean) / buffer.observation_std
    actions = (actions - torch.as_tensor(high + low) / 2) / (torch.as_tensor(high - low) / 2)
    return Visits(observations, actions, returns, numbers)
