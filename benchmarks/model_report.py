"""How far ahead a trained run's model of the environment can see, and whether its spread says how wrong it is.

From states s_0 of the data, the model is told the actions that the data took there, and never again a state: what it
foretells of step k is compared with what came. --num-samples trajectories start at each state. Each is of one of the
run's elite members i from its first step to its last (TS-inf of PETS, arXiv 1805.12114), with noise in every step:

    (s_k - s_{k-1}, r_k) ~ Normal(mean_i(s_{k-1}, a_{k-1}), std_i(s_{k-1}, a_{k-1}))

The forecast is the mean of the samples. A 90% interval leaves out a twentieth of them on each side, of each number on
its own; its ends are interpolated so that it would hold 90% of further samples. Over the starts, and over the numbers
of an observation, in standard deviations of the data:

    starts           how many: those whose episode lasts for the most steps asked for, or terminates before; at k those
                     that still run
    error            root of the mean squared difference between the forecast of s_k and s_k
    nothing changes  the same of the forecast s_0
    in 90%, in 50%   share of s_k in their intervals: it should be 90% and 50%
    width            mean width of the 90% interval
    order            Spearman's rank correlation, over the starts, of the interval's width with the forecast's error: 1
                     where a wider one always means a larger error, 0 where it says nothing
    reward           root of the mean squared error of r_k, the reward of step k alone, in the environment's units
    mean reward      the same of the forecast that it is the data's mean
    reward in 90%    share of r_k in its interval
    ends seen        share of the episodes terminated by step k of which most samples say so. What ends a sample is what
                     ends the run's rollouts: a rule for the environment, or the model's own probability
    false ends       share of the episodes that still run of which most samples say that they have ended

Below it stand the numbers of an observation with the largest errors, for the first and the last k: in these deviations,
and in the environment's units beside the errors of the forecast that nothing changes.

The model beats a naive forecast up to the last k before the first at which it does not. Its spread is called too narrow
where the 90% interval misses more than 20%, twice as many as it should, and too wide where it misses less than 5%.

A run with --validation-fraction has held whole episodes out: all is of these, and each of their steps is new to it.

Limits. Other runs leave out rows at random to test their model on, not episodes, so the starts are such rows: their own
step is new to the model, but most of those that follow are not. `learned` is the error of one step at as many rows that
it learned from. Where it is much less than that of the rows left out, the model knows its data by heart, and the table
flatters it for k > 1. By the same rows each member chose when to stop. Which rows they were follows from the seed; the
members' errors there, which the run has saved, must come out the same. Where they do not (another script, bf16), the
starts are of all the data. The actions are the data's: where a policy leaves them, the model may see less far. The
run's own rollouts draw the member anew at each step, and their spread is another. Intervals are of each number on its
own. Of an end whose s' repeats s, as imported logs may have it, nothing but the end is looked at, as in training.

Run: python -m benchmarks.model_report runs/mopo --out model.png
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parent))
import model_measures as measures
from model_measures import Forecast, Model, Starts
from scratch import replace
from trained_run import Trained, load_run

from common.command_line import check, explain, launch
from common.evaluation import load_file, load_script
from common.optim import Adam

NUM_WORST = 5  # observations that are named


@dataclass
class Args:
    run_dir: tyro.conf.Positional[Path]
    """folder of a finished run of mopo, combo, mobile, morel, mve, pets, or of naf with rollouts"""
    out: Path | None = None
    """write the picture here, as PNG"""
    script: Path | None = None
    """path of the script that trained the run, if it is not in algorithms/"""
    env_id: str | None = None
    """environment whose rule says what ends an episode; default: that of the run"""
    steps: tuple[int, ...] = (1, 2, 5, 10, 20)
    """numbers of steps k to look ahead"""
    num_starts: int = 1_000
    """states of the data to start from"""
    num_samples: int = 100
    """trajectories from each, shared out among the members"""


class Row(NamedTuple):
    """A line of the table."""

    step: int
    values: dict[str, float]  # by the name of the column
    errors: dict[str, list[float]]  # by the name of the observation, the largest first, each in standard deviations of
    # the data, in the environment's units, and in these if nothing changes


FORMS = {"starts": ",.0f", "order": ".2f"}
FORMS |= dict.fromkeys(("in 90%", "in 50%", "reward in 90%", "ends seen", "false ends"), ".1%")


# --- The model and its data -----------------------------------------------------------------------------------------


def load_model(run: Trained, folder: Path, script: Path | None) -> Model:
    """Raises BadInput if the run has learned none."""
    args, buffer = run.args, run.buffer
    module: Any = load_script(args.algorithm, script)
    with explain(f"cannot read the run in {folder}"):
        saved = load_file(folder / "checkpoint.pt")["learner"]
    known = "mopo, combo, mobile, morel, mve, pets or naf --imagined-ratio"
    none = f"{folder} is a run of {args.algorithm}, which learns no model: give one of {known}"
    check("dynamics" in saved and hasattr(module, "ending_of"), none)
    check(getattr(args, "horizon", 1) > 0, f"{folder}: with --horizon 0 no model was trained")
    everyone = module.build(buffer.observation_dim, buffer.action_dim, args, "cpu", Adam).dynamics
    with explain(f"{folder}: checkpoint.pt does not fit {module.__file__}"):
        everyone.load_state_dict(saved["dynamics"])
        finite = all(bool(weight.isfinite().all()) for weight in everyone.state_dict().values())
        check(finite, "its model holds what is not a finite number")
    everyone.requires_grad_(False)
    ending, (mean, std) = module.ending_of(args, buffer), buffer.normalization

    def ends(states: Tensor, logits: Tensor) -> Tensor:
        if ending in module.TERMINATION_RULES:
            return module.TERMINATION_RULES[ending](mean + std * states)
        return torch.bernoulli(logits.sigmoid()) > 0

    left_out = measures.rows_left_out(everyone, buffer.transitions, trained_with_seed(args))
    count = getattr(args, "num_elites", args.num_models)  # PETS plans in all members
    return Model(everyone, everyone.elites(count), count, ends, ending, left_out)


def trained_with_seed(args: Any) -> int:
    """The seed of the run that trained the model: where --dynamics took over another's, that one's if it is there."""
    seed, source = args.seed, getattr(args, "dynamics", None)
    for _ in range(10):  # that run may have taken it over, too
        if source is None or not (Path(source) / "args.json").is_file():
            break
        with explain(f"cannot read the run in {source}, whose model was taken over"):
            saved = json.loads((Path(source) / "args.json").read_text())
            seed, source = int(saved["seed"]), saved["dynamics"]
    return int(seed)


# --- Measures -------------------------------------------------------------------------------------------------------


def compare(run: Trained, step: int, said: Forecast, starts: Starts) -> Row:
    """Forecasts of a step beside what came."""
    data, names = run.buffer.transitions, run.buffer.dataset.observation_names
    scale = data.observations.std(dim=0) + 1e-3  # a constant entry stays near zero
    went_on = starts.left >= step
    rows = (starts.rows + step - 1)[went_on]
    known = (data.terminations[rows] == 0) | (data.next_observations[rows] != data.observations[rows]).any(dim=1)
    rows, kept = rows[known], went_on.nonzero()[:, 0][known]
    units = torch.cat([scale, torch.tensor([run.reward_scale])])
    came = torch.cat([data.next_observations[rows], data.rewards[rows, None]], dim=1) / units
    errors = said.mean[kept] / units - came
    nothing = data.observations[starts.rows[kept]] / scale - came[:, :-1]
    inside, widths = {}, {}
    for share, (low, high) in said.intervals.items():
        low, high = low[kept] / units, high[kept] / units
        inside[share], widths[share] = ((low <= came) & (came <= high)).float(), high - low
    values = {
        "starts": len(kept),
        "error": measures.root_mean_square(errors[:, :-1]),
        "nothing changes": measures.root_mean_square(nothing),
        "in 90%": float(inside[0.9][:, :-1].mean()),
        "in 50%": float(inside[0.5][:, :-1].mean()),
        "width": float(widths[0.9][:, :-1].mean()),
        "order": measures.rank_correlation(widths[0.9][:, :-1].norm(dim=1), errors[:, :-1].norm(dim=1)),
        "reward": measures.root_mean_square(errors[:, -1]),
        "mean reward": measures.root_mean_square(data.rewards.mean() / run.reward_scale - came[:, -1]),
        "reward in 90%": float(inside[0.9][:, -1].mean()),
    }
    if starts.terminated.any():
        ended = starts.terminated & (starts.left <= step)
        values["ends seen"] = float((said.ended[ended] > 0.5).float().mean())  # nan where none has ended by now
        values["false ends"] = float((said.ended[~ended] > 0.5).float().mean())
    own, naive = (some.double().square().mean(dim=0).sqrt() for some in (errors[:, :-1], nothing))
    unit = scale * run.buffer.normalization[1]
    by_name = dict(zip(names, torch.stack([own, own * unit, naive * unit], dim=1).tolist(), strict=True))
    return Row(step, values, dict(sorted(by_name.items(), key=lambda item: -item[1][0])))


def choose_starts(run: Trained, model: Model, longest: int, count: int) -> tuple[Starts, Tensor]:
    """The starts, of the episodes held out, or else left-out rows where these are known; and rows that the model has
    learned from, in random order. Raises BadInput if there is no start for so many steps.
    """
    everything = torch.randperm(len(run.buffer.transitions.rewards))
    rows = everything if model.left_out is None else model.left_out
    learned = everything if model.left_out is None else everything[~torch.isin(everything, rows)]
    tested = run.buffer.validation or run.buffer
    if run.buffer.validation:
        rows = torch.randperm(len(tested.transitions.rewards))
    data, lengths = tested.transitions, tested.episode_lengths
    starts = measures.find_starts(data, lengths, rows, longest)
    starts = Starts(*(column[:count] for column in starts))
    most = int(measures.find_starts(data, lengths, rows, 1).left.max())
    advice = f"no episode goes on for so long after one of the {len(rows):,} possible starts; ask for at most {most}"
    check(bool((starts.left >= longest).any()), f"--steps {longest}: {advice}")
    return starts, learned


def learned_by_heart(run: Trained, model: Model, learned: Tensor, num_samples: int) -> str:
    """A line on what the rows that the model did not learn from can show."""
    held_out, new = run.buffer.validation, model.left_out
    if held_out:
        new = torch.arange(len(held_out.transitions.rewards))
    if new is None:
        return "which rows the model was tested on is not known: it has learned from most, or all, of what is compared"
    errors = []
    for own, rows in ((run, learned[: len(new)]), (run._replace(buffer=held_out or run.buffer), new)):
        starts = measures.find_starts(own.buffer.transitions, own.buffer.episode_lengths, rows, 1)
        said = measures.forecast_from(model, own.buffer.transitions, starts, {1}, num_samples)
        errors.append(f"{compare(own, 1, said[1], starts).values['error']:.3g}")
    where = f"error of one step: {errors[0]} at rows that the model has learned, {errors[1]} at the {len(new):,}"
    if held_out:
        return f"{where} of {len(held_out.episode_lengths)} episodes held out, of which is all of the table"
    return f"{where} left out; the starts are of these, but most of the steps that follow were learned"


# --- Report ---------------------------------------------------------------------------------------------------------


def table(rows: list[Row]) -> Iterator[str]:
    """A line for each k, as Markdown that is aligned for the terminal, too."""
    cells = [["k", *rows[0].values]]
    for row in rows:
        numbers = [format(value, FORMS.get(name, ".3g")) for name, value in row.values.items()]
        cells.append([str(row.step), *("" if number.startswith("nan") else number for number in numbers)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * (width - 1) + ":" for width in widths])
    for line in cells:
        yield "| " + " | ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) + " |"
    for row in rows[:: max(1, len(rows) - 1)]:  # the first and the last
        worst = list(row.errors.items())[:NUM_WORST]
        yield f"largest errors at k = {row.step}: {', '.join(f'{name} ({own:.3g})' for name, (own, _, _) in worst)}"
        units = ", ".join(f"{name} {own:.3g} ({naive:.3g})" for name, (_, own, naive) in worst)
        yield f"  in the environment's units (and if nothing changes): {units}"


def beats(rows: list[Row], name: str, naive: str) -> str:
    """Up to which k the error of that name is less than the naive one."""
    better = [row.values[name] < row.values[naive] for row in rows]
    if all(better):
        return f"at all k up to {rows[-1].step}, the last one asked for"
    first = better.index(False)
    return f"up to k = {rows[first - 1].step}, and no longer at {rows[first].step}" if first else "at no k"


def verdicts(rows: list[Row]) -> Iterator[str]:
    yield f"observations: the model beats 'nothing changes' {beats(rows, 'error', 'nothing changes')}"
    yield f"rewards: the model beats their mean {beats(rows, 'reward', 'mean reward')}"
    for name, column in (("observations", "in 90%"), ("rewards", "reward in 90%")):
        narrow = [str(row.step) for row in rows if row.values[column] < 0.8]
        wide = [str(row.step) for row in rows if row.values[column] > 0.95]
        kinds = (("TOO NARROW", narrow, "less than 80%"), ("too wide", wide, "more than 95%"))
        said = [f"{kind} at k = {', '.join(some)} ({rule} in the 90% interval)" for kind, some, rule in kinds if some]
        yield f"{name}: the spread is {'; '.join(said) or 'about right at all k'}"
    orders = ", ".join(f"{row.values['order']:.2f} at {row.step}" for row in rows)
    yield f"which forecasts are worse than others, the width tells with a rank correlation of: {orders}"


def draw(title: str, rows: list[Row], path: Path) -> None:
    """Errors beside the naive ones, and the shares in the intervals, complete or not at all."""
    from matplotlib import rcParams  # slow to import, and not always needed
    from matplotlib.figure import Figure

    rcParams["text.parse_math"] = False  # a name may hold a $
    figure = Figure(figsize=(14, 5), layout="constrained")
    figure.suptitle("\n".join([title, *verdicts(rows)]), fontsize="medium")
    axes = figure.subplots(1, 3)
    for axis, label, names in (
        (axes[0], "error of the observations, standard deviations", ("error", "nothing changes")),
        (axes[1], "error of the reward", ("reward", "mean reward")),
        (axes[2], "share in the interval", ("in 90%", "reward in 90%", "in 50%")),
    ):
        for name, style in zip(names, ("o-", "s--", "^-"), strict=False):
            axis.plot([row.step for row in rows], [row.values[name] for row in rows], style, label=name)
        axis.set(xlabel="steps ahead, k", ylabel=label)
        axis.set_ylim(0, 1.05 if axis is axes[2] else None)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()
    for share in measures.SHARES:
        axes[2].axhline(share, color="black", linewidth=0.5)
    replace(path, lambda file: figure.savefig(file, dpi=120, format="png"))


def main(args: Args) -> None:
    steps = set(args.steps)
    check(bool(steps) and min(steps) >= 1, f"--steps {' '.join(map(str, args.steps))}: give numbers of at least 1")
    for name, least in (("num_starts", 50), ("num_samples", 20)):
        value = getattr(args, name)
        check(value >= least, f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if args.out is not None:
        check(args.out.suffix.lower() == ".png", f"--out {args.out}: must end with .png")
        check(args.out.parent.is_dir(), f"--out {args.out}: there is no folder {args.out.parent}")
    run = load_run(args.run_dir, args.script, args.env_id)
    model = load_model(run, args.run_dir, args.script)
    torch.manual_seed(0)
    starts, others = choose_starts(run, model, max(steps), args.num_starts)
    tested = run._replace(buffer=run.buffer.validation or run.buffer)
    said = measures.forecast_from(model, tested.buffer.transitions, starts, steps, args.num_samples)
    rows = [compare(tested, k, some, starts) for k, some in said.items()]
    title = f"{run.args.algorithm} on {run.args.dataset_id}, seed {run.args.seed}"
    print(f"{title}: {args.run_dir}\n", *table(rows), "", sep="\n")
    if starts.terminated.any():
        print(f"terminations in the model: {model.ending}")
    print(learned_by_heart(run, model, others, args.num_samples), *verdicts(rows), sep="\n")
    if args.out is not None:
        draw(title, rows, args.out)
        print(f"picture: {args.out}")


if __name__ == "__main__":
    launch(main, Args)
