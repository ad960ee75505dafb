"""How wrong a target of mve.py is, by the steps it unrolls the model, and by the age of its critic.

mve.py is trained on pendulum data, with horizon 0 unless an argument after `--` says otherwise. After each number of
updates of --ages, targets of several horizons, of the same critic, are compared with the truth: the discounted return
of the target policy after the data's s and a, played in the simulator, whose state follows from the observation.
`steve` is the mixture of all horizons up to the longest. A cell is the mean absolute error over the states, averaged
over the seeds, and in brackets the mean error: by how much the targets are too high. They have no noise on the policy.

Run: python -m benchmarks.measurements.expansion
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[2] / "algorithms"))
import mve

from common.command_line import check, launch
from common.data import ReplayBuffer, load_dataset
from common.experiment import set_up
from common.optim import Adam


@dataclass
class Args:
    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds, each a training of its own"""
    ages: tuple[int, ...] = (100, 1_000, 5_000)
    """updates after which the targets are looked at"""
    horizons: tuple[int, ...] = (0, 1, 3, 5)
    """numbers of steps H of the targets"""
    num_states: int = 200
    """states and actions of the data"""
    num_steps: int = 1_000
    """steps that are played; by then gamma^t is small"""
    script: tyro.conf.Positional[tuple[str, ...]] = ()
    """after `--`: arguments of mve.py"""


def play(
    env: gym.Env, buffer: ReplayBuffer, learner: mve.Learner, batch: mve.Batch, args: Args, own: mve.Args
) -> Tensor:
    """The true return of each s and a, in the units learned from: [states]."""
    (mean, std), simulator = buffer.normalization.numpy(), env.unwrapped
    low, high = buffer.dataset.action_low, buffer.dataset.action_high
    cos, sin, speed = (mean + std * batch.observations.numpy()).T
    states, actions = np.stack([np.arctan2(sin, cos), speed], axis=1), batch.actions
    returns, discount = np.zeros(len(states)), buffer.reward_scale
    for _ in range(args.num_steps):
        torques, observations = low + (actions.numpy() + 1) / 2 * (high - low), []
        for row, torque in enumerate(torques):
            simulator.state = states[row]  # type: ignore[attr-defined]
            observation, reward, *_ = simulator.step(torque)
            states[row] = simulator.state  # type: ignore[attr-defined]
            observations.append(observation)
            returns[row] += discount * (float(reward) + own.reward_shift)
        actions = learner.target_actor(torch.as_tensor((np.array(observations) - mean) / std, dtype=torch.float32))
        discount *= own.gamma
    return torch.as_tensor(returns)


def measure(args: Args, seed: int) -> Tensor:
    """[ages, targets, 2]: mean absolute error and mean error of each horizon's targets, and of STEVE's, at each age."""
    words = ["--horizon", "0", "--seed", str(seed), "--device", "cpu", *args.script]
    own = tyro.cli(mve.Args, args=words)
    device = set_up(own)
    buffer = ReplayBuffer(load_dataset(own.dataset_id, own.env_id), device, own.normalize_observations)
    check(
        (buffer.dataset.env_id or "").startswith("Pendulum"),
        f"{own.dataset_id}: its simulator cannot be set; none but Pendulum's",
    )
    ending = mve.ending_of(own, buffer)
    buffer.scale_rewards(own.reward_scale, own.reward_shift)
    learner = mve.build(buffer.observation_dim, buffer.action_dim, own, device, Adam)
    for _ in mve.fit_dynamics(learner, mve.Batch(*buffer.transitions), own):
        pass
    learner.model.take(learner.dynamics, buffer.normalization, ending)
    env = gym.make(buffer.dataset.env_id or "")
    env.reset(seed=seed)
    batch = mve.Batch(*buffer.sample(args.num_states))
    noise, member = torch.zeros_like(batch.actions), torch.randint(own.num_elites, batch.rewards.shape)
    kinds = [replace(own, horizon=h, expansion="last") for h in args.horizons]
    kinds.append(replace(own, horizon=max(args.horizons), expansion="steve"))
    found = []
    for step in range(1, max(args.ages) + 1):
        mve.update(learner, mve.Batch(*buffer.sample(own.batch_size)), step, own)
        if step in args.ages:
            with torch.no_grad():
                truth = play(env, buffer, learner, batch, args, own)
            errors = []
            for kind in kinds:
                drawn = None if kind.expansion == "steve" else member
                errors.append(mve.expand(learner, batch, noise, drawn, kind)[1][0] - truth)
            found.append(torch.stack([torch.stack([error.abs().mean(), error.mean()]) for error in errors]))
            print(f"seed {seed}, {step} updates: true returns {truth.mean():.1f} +- {truth.std():.1f}", flush=True)
    return torch.stack(found)


def main(args: Args) -> None:
    check(bool(args.seeds and args.ages and args.horizons), "--seeds, --ages and --horizons: name one of each at least")
    distinct = len({*args.ages}) == len(args.ages) and min(args.ages) >= 1
    check(distinct, f"--ages {' '.join(map(str, args.ages))}: must be at least 1, each once")
    check(min(args.num_states, args.num_steps) >= 1, "--num-states and --num-steps: must be at least 1")
    found = torch.stack([measure(args, seed) for seed in args.seeds]).mean(dim=0)
    names = [f"H = {h}" for h in args.horizons] + ["steve"]
    print(" updates" + "".join(f"{name:>17}" for name in names))
    for age, row in zip(sorted(args.ages), found.tolist(), strict=True):
        print(f"{age:8,}" + "".join(f"{error:8.2f} ({bias:+6.2f})".rjust(17) for error, bias in row))


if __name__ == "__main__":
    launch(main, Args)
