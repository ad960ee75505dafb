"""Episodes of a trained policy as a Minari dataset: fresh data from one's own policy.

The policy plays in its run's environment, as it is evaluated: without noise. With --sample it acts by sampling instead,
where its script's actor has a `sample`; with --noise there is normal noise on its actions, as of td3_bc.py and naf.py
online. infos["log_prob"] then holds the log-density of each action in the environment's units, as in the datasets of
benchmarks.collect; of an action that was drawn beyond the bounds, and is cut to them, that of the draw (ope.py fits
there). Beside the data lies the policy, policy.pt, which common.evaluation.load_policy loads. Scores are those of the
run's own dataset, if it has any.

Run: python -m benchmarks.record --policy-run-dir runs/first --dataset-id my/first-v0
"""

import json
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from minari.storage.datasets_root_dir import get_dataset_path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parent))
from collect import Act, Play, describe, roll_outs, sampling_behaviour, write_dataset
from import_logs import check_id
from scratch import scratch_root
from trained_run import given_or_own

from common.command_line import BadInput, check, check_argument, explain, launch
from common.data import action_bounds, load_dataset, observation_names
from common.evaluation import Player, Policy, load_policy, make_environment, make_environments


@dataclass
class Args:
    policy_run_dir: Path
    """folder of the run whose policy acts, or one of the policies that --keep-policies keeps in it, a .pt file"""
    dataset_id: str
    """the dataset to make: my/policy-v0"""
    steps: int = 10_000
    """of the dataset, or a few more, to the end of an episode"""
    sample: bool = False
    """act by sampling, and store log-densities"""
    noise: float = 0.0
    """standard deviation of noise on the actions, in half ranges of them; log-densities are stored, too"""
    env_id: str | None = None
    """environment to play in; default: that of the run"""
    policy_script: Path | None = None
    """path of the script that trained the policy, if it is not in algorithms/"""
    seed: int = 0
    """of the episodes and of what is sampled"""

    def validate(self) -> None:
        check_argument(self, "steps", self.steps >= 1, "must be at least 1")
        check_argument(self, "noise", 0 <= self.noise <= 10, "must be in [0, 10]")
        check_argument(self, "noise", not (self.noise and self.sample), "--sample has noise of its own: take one")
        check_argument(self, "seed", 0 <= self.seed < 2**31, "must be in [0, 2^31)")
        check_id(self.dataset_id)


def main(args: Args) -> None:
    args.validate()
    where = f"--policy-run-dir {args.policy_run_dir}"
    path = args.policy_run_dir / "policy.pt" if args.policy_run_dir.suffix != ".pt" else args.policy_run_dir
    try:
        policy = load_policy(path, args.policy_script)
    except BadInput as error:
        raise BadInput(f"{where}: {error}".replace("(--script)", "(--policy-script)")) from None
    check(not policy.discrete, f"{where}: the policy's actions are numbers, and must be vectors")
    samples = hasattr(policy.actor, "sample")
    check(
        samples or not args.sample, f"--sample: the actor of {policy.origin['script']}.py has no sample: take --noise"
    )
    play, references = find_play(args, path.parent)
    check_fit(policy, play, where)

    act = sampling_behaviour(policy, args.seed) if args.sample else noisy_behaviour(policy, args.noise, args.seed)
    with play.environment as environment:
        episodes = roll_outs(args.dataset_id, act, Player(environment, None, args.seed), args.steps)
    how = "sampling" if args.sample else f"noise {args.noise:g}" if args.noise else "without noise"
    source = f"{path.stem} of AnchoRL's {policy.origin['script']}.py, {how}"
    scores = "Scores are those of the data that it learned from." if references else ""
    with scratch_root(args.dataset_id, episodes):
        write_dataset(args.dataset_id, episodes, play, source, references, scores)
        shutil.copy(path, get_dataset_path(args.dataset_id) / "policy.pt")
    describe(args.dataset_id, episodes, source, references)


def find_play(args: Args, folder: Path) -> tuple[Play, tuple[float, float] | None]:
    """The run's environment, and the returns of score 0 and of score 100. Raises BadInput."""
    with explain(f"cannot read {folder / 'args.json'}"):
        saved = json.loads((folder / "args.json").read_text())
        dataset_id, own = str(saved["dataset_id"]), saved.get("env_id")
    env_id = given_or_own(args.env_id, own)
    environment: gym.Env
    if dataset_id == own:  # of sac.py, which has no data
        environment, references = make_environment(str(env_id), users=True), None
    else:
        dataset = load_dataset(dataset_id, env_id)
        (environment,), references = make_environments(dataset, 1), dataset.reference_returns
        env_id = dataset.env_id
    return Play(str(env_id), environment, *action_bounds(environment.action_space)), references


def check_fit(policy: Policy, play: Play, where: str) -> None:
    """Raises BadInput for an environment of another task than the policy's."""
    size, dim = policy.normalization.shape[1], len(observation_names(play.environment.observation_space))
    check(size == dim, f"{where}: the policy has {size} observed numbers, {play.env_id} has {dim}")
    bounds = policy.action_range.numpy()
    same = bounds.shape[1] == len(play.low) and np.allclose(bounds, [play.low, play.high])
    check(same, f"{where}: the policy's range of actions is not that of {play.env_id}")


def noisy_behaviour(policy: Policy, std: float, seed: int) -> Act:
    """a = center + half_range (pi(s) + std noise), noise ~ Normal(0, 1); with std 0 nothing is drawn, and there is no
    density. An actor with a memory, such as pets.py's, is told when an episode begins.
    """
    follow = getattr(policy.actor, "follow", lambda episodes, rewards: None)
    generator, (low, high) = torch.Generator().manual_seed(seed), policy.action_range

    def act(observation: np.ndarray, reward: float | None) -> tuple[np.ndarray, float | None]:
        follow([0], [reward])
        if std == 0:
            return policy(observation[None])[0], None
        noise = torch.randn(1, len(low), generator=generator)
        log_prob = -0.5 * noise.square() - (std * (high - low) / 2).log() - 0.5 * math.log(2 * math.pi)
        return policy(observation[None], lambda states: policy.act(states) + std * noise)[0], float(log_prob.sum())

    return act


if __name__ == "__main__":
    launch(main, Args)
