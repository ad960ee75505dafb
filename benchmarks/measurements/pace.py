"""How far has Q come? Of finished runs, the mean Q of the data's actions beside what the data earned.

Q begins near 0. A target is a reward and gamma times Q' of the next state, and Q' moves the share tau of its way to Q
at each update, or at each --policy-every of them. Even if Q were equal to its targets at all times, what Q' lacks would
shrink by a factor of 1 - tau (1 - gamma) alone. After n such steps Q then has, of the policy's returns, the share

    1 - (1 - tau (1 - gamma))^n

That is `expected`. `share` is the mean of Q over a batch, divided by what the data earned: the mean over all steps of
the discounted sum of rewards, as learned from, to the end of the episode; one that was cut is taken to go on at its
mean reward. It lies above `expected` where the policy is better than the data or Q too high, below where Q lags. With a
model and a --horizon, as in mve, targets hold several rewards, and Q is faster than `expected`. Runs are refused whose
batches hold more than the data, and of those that went on online the offline updates count.

A line of the CSV file is one run and one update; each must be one that metrics.csv has a row of.

Run: python -m benchmarks.measurements.pace runs/td3_bc runs/iql --at 10000 50000
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[1]))
from scratch import replace_table
from shift_measures import discounted_returns
from trained_run import Trained, load_run

from common.command_line import check, launch

COLUMNS = ("algorithm", "dataset_id", "seed", "gamma", "tau", "update", "expected", "share")


@dataclass
class Args:
    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of finished runs"""
    at: tuple[int, ...] = (10_000, 20_000, 30_000, 40_000, 50_000)
    """updates; those after a run's last offline one are left out"""
    csv: Path | None = None
    """the lines go here, too"""


def mean_return(run: Trained) -> float:
    """Of all steps of the data, G_t = r_t + gamma G_{t+1}; after a cut G goes on as mean reward / (1 - gamma)."""
    lengths, returns = run.buffer.episode_lengths.tolist(), []
    columns = run.buffer.transitions.rewards, run.buffer.transitions.terminations
    for rewards, ends in zip(*(column.double().split(lengths) for column in columns), strict=True):
        after = (1 - ends[-1:]) * rewards.mean() / (1 - run.gamma)
        returns.append(discounted_returns(torch.cat([rewards, after]), run.gamma)[:-1])
    return float(torch.cat(returns).mean())


def follow(folder: Path, at: tuple[int, ...]) -> list[tuple]:
    """A row of COLUMNS for each update of `at`. Raises BadInput for a run without Q, or without a row of an update."""
    run = load_run(folder, env_id="")  # no environment is made, and so no module of the run's own imported
    args, logged = run.args, [row for row in run.metrics if "critic/q" in row and row["step"] <= run.args.num_updates]
    q = {int(row["step"]): row["critic/q"] for row in logged}
    check(bool(q) and hasattr(args, "tau"), f"{folder}: {args.algorithm} has no Q that follows a target")
    mixed = hasattr(args, "data_ratio") or getattr(args, "imagined_ratio", hasattr(args, "rollout_batch_size"))
    check(not mixed, f"{folder}: the Q that {args.algorithm} logs is not of the data's actions alone")
    check(run.gamma < 1, f"{folder}: --gamma 1 has no pace")
    what, rows = (args.algorithm, args.dataset_id, args.seed, run.gamma, args.tau), []
    earned, every = mean_return(run), getattr(args, "policy_every", 1)
    check(earned != 0, f"{folder}: the mean return-to-go of its data is 0, of which nothing is a share")
    check(min(at, default=0) <= max(q), f"--at: {folder} ended before, at update {max(q)}")
    for update in (update for update in at if update <= max(q)):
        check(update in q, f"--at {update}: {folder / 'metrics.csv'} has no Q there; it has one every {args.log_every}")
        expected, share = 1 - (1 - args.tau * (1 - run.gamma)) ** (update // every), q[update] / earned
        rows.append((*what, update, expected, share))
        print(f"{folder}, {update:,}: {share:.2f} of {earned:.4g}, expected {expected:.2f}", flush=True)
    return rows


def main(args: Args) -> None:
    check(bool(args.run_dirs), "give the folder of a run, or of several")
    there = args.csv is None or args.csv.parent.is_dir()
    check(there, f"--csv {args.csv}: there is no folder {args.csv and args.csv.parent}")
    rows = [row for folder in args.run_dirs for row in follow(folder, args.at)]
    if args.csv:
        replace_table(args.csv, [COLUMNS, *rows])


if __name__ == "__main__":
    launch(main, Args)
