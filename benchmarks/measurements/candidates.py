"""How many candidates should Q choose among? A finished run's policy, played with the first few of its candidates.

For the scripts whose policy is the best by Q of --num-acting-actions proposals: bcq, bear, diffusion_ql, fql and idql.
With one candidate Q has no say. Where the score falls as candidates are added, Q tells them apart by its errors. A line
of the CSV file is one run and one number of candidates, over fresh episodes.

Run: python -m benchmarks.measurements.candidates runs/idql --counts 1 4 16 64
"""

import csv
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[1]))
from scratch import replace
from trained_run import load_run

from common.command_line import check, launch
from common.evaluation import FINAL_SEED, evaluate, make_environments

NOISE = {  # the actor's buffer that the candidates are made of, and along which dimension
    "bcq": ("latents", 0),
    "bear": ("noise", 0),
    "diffusion_ql": ("noise", 1),
    "fql": ("noise", 0),
    "idql": ("noise", 0),
}
COLUMNS = ("algorithm", "dataset_id", "seed", "num_updates", "candidates", "return_mean", "score", "standard_error")


@dataclass
class Args:
    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of finished runs"""
    counts: tuple[int, ...] = (1, 4, 16, 64)
    """numbers of candidates; those above a run's --num-acting-actions are left out"""
    episodes: int = 50
    """fresh ones, the same for each number: of the 50 by default, those that the final score is taken in"""
    csv: Path | None = None
    """the lines go here, too"""


def play(folder: Path, args: Args) -> list[tuple]:
    """A row of COLUMNS for each number of candidates. Raises BadInput for a run without any, or without environment."""
    run = load_run(folder)
    name, dataset = run.args.algorithm, run.buffer.dataset
    check(name in NOISE, f"{folder}: {name} does not choose among candidates, as {', '.join(NOISE)} do")
    environments = make_environments(dataset, min(args.episodes, 10))
    buffer, dim = NOISE[name]
    noise, rows = getattr(run.policy.actor, buffer), []
    for count in args.counts:
        if count > noise.shape[dim]:
            continue
        setattr(run.policy.actor, buffer, noise.narrow(dim, 0, count))
        returns, _ = evaluate(run.policy, environments, args.episodes, FINAL_SEED)
        scores = dataset.score(returns) if dataset.reference_returns else returns
        error = float(scores.std()) / max(len(scores) - 1, 1) ** 0.5
        own = run.args.dataset_id, run.args.seed, run.args.num_updates, count, float(returns.mean())
        rows.append((name, *own, float(scores.mean()) if dataset.reference_returns else None, error))
        print(f"{folder}: of {count:,} candidates: {scores.mean():.1f} +- {error:.1f}", flush=True)
    return rows


def main(args: Args) -> None:
    check(bool(args.run_dirs), "give the folder of a run, or of several")
    there = args.csv is None or args.csv.parent.is_dir()
    check(there, f"--csv {args.csv}: there is no folder {args.csv and args.csv.parent}")
    check(all(count >= 1 for count in args.counts), f"--counts {args.counts}: must be at least 1")
    check(args.episodes >= 1, f"--episodes {args.episodes}: must be at least 1")
    rows = [row for folder in args.run_dirs for row in play(folder, args)]
    if args.csv:
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([COLUMNS, *rows])
        replace(args.csv, table.getvalue().encode())


if __name__ == "__main__":
    launch(main, Args)
