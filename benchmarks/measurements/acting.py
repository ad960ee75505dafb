"""How should what was learned act? A finished run's policy, played in more ways than its own.

Of bcq, bear, diffusion_ql, fql and idql, whose policy is the best by Q of --num-acting-actions candidates: with the
first few of them, and with one alone whose noise z is 0. The one of `1 candidate` was drawn, also where z = 0 is the
first of all, and is missing where no other was. With one Q has no say. Where the score falls as candidates are added, Q
tells them apart by its errors.

Of mve, rebrac and td3_bc, which have a target actor: by that, too. It is a mean of the actor's last 1 / tau steps or
so. Where it does better, the actor wavers from step to step.

A line of the CSV file is one run and one way, over fresh episodes.

Run: python -m benchmarks.measurements.acting runs/idql runs/td3_bc --counts 1 4 16 64
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[1]))
from scratch import replace_table
from trained_run import load_run

from common.command_line import BadInput, check, explain, launch
from common.evaluation import FINAL_SEED, evaluate, load_file, make_environments

NOISE = {  # the actor's buffer that the candidates are made of, and along which dimension
    "bcq": ("latents", 0),
    "bear": ("noise", 0),
    "diffusion_ql": ("noise", 1),
    "fql": ("noise", 0),
    "idql": ("noise", 0),
}
COLUMNS = ("algorithm", "dataset_id", "seed", "num_updates", "way", "return_mean", "score", "standard_error")


@dataclass
class Args:
    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of finished runs"""
    counts: tuple[int, ...] = (1, 4, 16, 64)
    """numbers of candidates; those above a run's --num-acting-actions are left out"""
    episodes: int = 50
    """fresh ones, the same for each way: of the 50 by default, those that the final score is taken in"""
    env_id: str | None = None
    """environment; module:Id imports yours; default: that of the runs"""
    csv: Path | None = None
    """the lines go here, too"""


def ways(actor: nn.Module, algorithm: str, folder: Path, counts: tuple[int, ...]) -> Iterator[str]:
    """Makes the run's actor act in each way, one after another, and names it. Raises BadInput if there is but one."""
    if algorithm in NOISE:
        buffer, dim = NOISE[algorithm]
        noise = getattr(actor, buffer)
        setattr(actor, buffer, torch.zeros_like(noise.narrow(dim, 0, 1)))
        yield "z = 0"
        drawn = int(not noise.select(dim, 0).any())  # the number of the first that was
        for count in counts:
            begin = drawn if count == 1 else 0
            if begin + count <= noise.shape[dim]:
                setattr(actor, buffer, noise.narrow(dim, begin, count))
                yield f"{count} candidate{'s' * (count > 1)}"
        return
    learned = load_file(folder / "checkpoint.pt")["learner"]
    if "target_actor" not in learned:
        raise BadInput(f"{folder}: {algorithm} has no target actor, nor the candidates of {', '.join(NOISE)}")
    yield "actor"
    with explain(f"{folder}: checkpoint.pt does not fit the policy"):
        actor.load_state_dict(learned["target_actor"])
    yield "target actor"


def play(folder: Path, args: Args) -> list[tuple]:
    """A row of COLUMNS for each way. Raises BadInput for a run that has but one, or without environment."""
    run = load_run(folder, env_id=args.env_id)
    name, dataset, rows = run.args.algorithm, run.buffer.dataset, []
    environments = make_environments(dataset, min(args.episodes, 10))
    for way in ways(run.policy.actor, name, folder, args.counts):
        returns, _ = evaluate(run.policy, environments, args.episodes, FINAL_SEED)
        scores = dataset.score(returns) if dataset.reference_returns else returns
        error = float(scores.std()) / max(len(scores) - 1, 1) ** 0.5
        own = run.args.dataset_id, run.args.seed, run.args.num_updates, way, float(returns.mean())
        rows.append((name, *own, float(scores.mean()) if dataset.reference_returns else None, error))
        print(f"{folder}, {way}: {scores.mean():.1f} +- {error:.1f}", flush=True)
    return rows


def main(args: Args) -> None:
    check(bool(args.run_dirs), "give the folder of a run, or of several")
    there = args.csv is None or args.csv.parent.is_dir()
    check(there, f"--csv {args.csv}: there is no folder {args.csv and args.csv.parent}")
    check(all(count >= 1 for count in args.counts), f"--counts {args.counts}: must be at least 1")
    check(args.episodes >= 1, f"--episodes {args.episodes}: must be at least 1")
    rows: list[tuple] = []
    for folder in args.run_dirs:
        rows += play(folder, args)
        if args.csv:  # whatever the next folder is
            replace_table(args.csv, [COLUMNS, *rows])


if __name__ == "__main__":
    launch(main, Args)
