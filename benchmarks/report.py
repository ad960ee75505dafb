"""Compares algorithms by what benchmarks/run.py wrote: a table, pictures, and one page of HTML that opens from disk.

Scores are normalised; where a dataset has no reference scores, returns stand for them. Per dataset and algorithm:

    last        of the last policy: its final score on fresh episodes or, unless all runs on the dataset have one, the
                last evaluation
    last five   the mean of the last five evaluations (of all, where there are fewer), which swings less
    best        the highest evaluation of each seed: what one who may choose by the simulator would get, and a fair
                estimate of nothing else
    +- episodes  the standard error of one run's final score that comes of its episodes; where seeds differ by no more,
                they may be all the same

A number is the mean over seeds. Below five seeds each one's value stands behind it, [lowest first]; from five on the
95 % interval (low to high) of the mean. A run that diverged, failed or is missing is counted as failed, and scored as
--failed-score says.

--by chooses the one that the first table shows and that all runs are compared by: the last, if nothing is said. To
compare them, each algorithm must have run on each dataset; of several datasets those without reference scores are left
out. Each dataset weighs the same, however many its seeds.

    mean, IQM   of all runs, and of their middle half (interquartile mean), where there are four runs or more; what a
                single seed makes of all datasets is in brackets
    beats Y     the probability that a run beats one of Y on the same dataset, averaged over datasets (a 95 % interval,
                which from four against four on one dataset, or fewer, always holds 50 %)
    profile     the share of runs that score above x, with a 95 % band, for each x by itself

An interval says what other seeds might have given on these datasets, and nothing of other datasets. 95 % is nominal: of
five seeds, one of a mean holds the true one in 95 % of cases where scores are normal, in 83 % where three runs in ten
fail, as then all five may be lucky (benchmarks/results/coverage.txt). Methods and sources: benchmarks/intervals.py.

Run: python -m benchmarks.report runs/first --out runs/first/report
"""

import base64
import itertools
import math
import sys
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib import colormaps, rcParams
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parent))
try:
    import intervals
    import pandas as pd
    from read_runs import KEYS, MEASURES, TIMES, Measure, check_equal, measures, read
except ImportError:
    print("error: a report needs pandas and SciPy: pip install -e '.[report]'", file=sys.stderr)
    raise SystemExit(2) from None

from scratch import replace

from common.command_line import check, explain, launch

rcParams["text.parse_math"] = False  # a name may hold a $


@dataclass
class Args:
    results: tyro.conf.Positional[tuple[Path, ...]]
    """folders that run.py wrote, or evaluations.csv files"""
    out: Path | None = None
    """write report.md, report.html, curves.png and, if all was run on all datasets, summary.png here"""
    by: Measure = "last"
    """what of a run to compare by"""
    failed_score: float | None = None
    """score of a run that failed; if not given, and where returns stand for scores, it is the dataset's lowest
    evaluation, and of scores at most 0, the random policy's"""
    unequal: bool = False
    """compare runs of different lengths or evaluations, too; without a results.csv of run.py, also other seeds, which
    else are missing"""


def samples(runs: pd.DataFrame, algorithm: str) -> intervals.Samples:
    """The values of the algorithm's runs on each dataset, in the order of their seeds."""
    own = runs[runs["algorithm"] == algorithm].sort_values("seed")
    return [values.to_numpy() for _, values in own.groupby("dataset_id")["value"]]


def comparable(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs on one dataset, or the scores on several: returns of one mean nothing beside those of another."""
    return runs if runs["dataset_id"].nunique() == 1 else runs[runs["unit"] == "score"]


def gaps(runs: pd.DataFrame) -> str:
    """The comparable datasets that an algorithm was not run on."""
    counts = pd.crosstab(runs["algorithm"], runs["dataset_id"])[comparable(runs)["dataset_id"].unique()]
    return "; ".join(f"{name} on {', '.join(row.index[row == 0])}" for name, row in counts.iterrows() if not row.all())


def centres(runs: pd.DataFrame) -> dict[str, Any]:
    """The mean and, where there are runs enough for it to be something else, the interquartile mean."""
    fewest = min(sum(map(len, samples(runs, name))) for name in runs["algorithm"].unique())
    return {"mean": intervals.mean} | ({"IQM": intervals.iqm} if fewest >= 4 else {})


# --- Tables ---------------------------------------------------------------------------------------------------------


def words(of: intervals.Samples, statistic: Any = intervals.mean) -> str:
    """The estimate, and how far to trust it: an interval or, of few runs, what each seed by itself gives."""
    estimate, counts = f"{statistic(*of, axis=-1):.1f}", {len(values) for values in of}
    if min(counts) >= intervals.FEWEST:
        low, high = intervals.interval(of, statistic)
        return f"{estimate} ({low:.1f} to {high:.1f})"
    if counts == {1} or len(counts) > 1:  # one seed, or seeds that do not go together
        return estimate
    each = sorted(statistic(*seed[..., None], axis=-1) for seed in np.stack(of, axis=-1))
    return f"{estimate} [{', '.join(f'{value:.1f}' for value in each)}]"


def overview(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per algorithm, a column per dataset: the values; empty where an algorithm was not run."""
    named = runs.assign(dataset_id=runs["dataset_id"] + np.where(runs["unit"] == "return", " (return)", ""))
    cells = {}
    for key, own in named.groupby(["algorithm", "dataset_id"], sort=False):
        failed = (own["problem"] != "").sum()
        cells[key] = words([own["value"].to_numpy()]) + (f", {failed} failed" if failed else "")
    return pd.Series(cells).unstack(fill_value="").rename_axis("algorithm").reset_index()


def per_dataset(rows: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """A row per dataset and algorithm: all MEASURES, and the time."""
    table = []
    for (dataset_id, unit, algorithm), own in runs.groupby(["dataset_id", "unit", "algorithm"]):
        of_runs = rows[(rows["dataset_id"] == dataset_id) & (rows["algorithm"] == algorithm)]
        line = {"dataset": dataset_id + " (return)" * (unit == "return"), "algorithm": algorithm}
        line |= {"seeds": len(own), "failed": (own["problem"] != "").sum()}
        line |= {"updates": f"{of_runs['num_updates'].max():,}"}
        line |= {name: words([own[name].to_numpy()]) for name in MEASURES}
        line |= {"+- episodes": f"{np.sqrt((own['episode_error'] ** 2).mean()):.1f}"}
        line |= {name.replace("_", " "): f"{of_runs.groupby('seed')[name].first().mean():.3g}" for name in TIMES}
        table.append(line)
    cells = pd.DataFrame(table).replace("nan", "")
    return cells.loc[:, (cells != "").any()]


def over_datasets(runs: pd.DataFrame) -> pd.DataFrame:
    """Means of each algorithm, and the probability that it beats each other one."""
    table = []
    for name, own in runs.groupby("algorithm", sort=False):
        line = {"algorithm": name, "runs": len(own), "failed": (own["problem"] != "").sum()}
        of, unit = samples(runs, name), own["unit"].iloc[0]
        line |= {f"{centre} of {unit}s": words(of, statistic) for centre, statistic in centres(runs).items()}
        for other in runs["algorithm"].unique():
            chance, low, high = (f"{100 * share:.0f}" for share in beats(of, samples(runs, other)))
            line[f"beats {other}"] = "" if other == name else f"{chance} ({low} to {high}) %"
        table.append(line)
    return pd.DataFrame(table)


def beats(xs: intervals.Samples, ys: intervals.Samples) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return intervals.improvement(xs, ys), *intervals.improvement_interval(xs, ys)


def notes(rows: pd.DataFrame, runs: pd.DataFrame) -> list[str]:
    """What to know when reading the tables, a line each."""
    fewest, most = runs.groupby(["dataset_id", "algorithm"]).size().agg(["min", "max"])
    lines = []
    for _, run in rows[rows["problem"] != ""].drop_duplicates(KEYS).iterrows():
        counts = "nothing of the dataset to score it by" if np.isnan(run["value"]) else f"counts as {run['value']:.1f}"
        lines.append(
            f"failed, {counts}: {run['algorithm']} on {run['dataset_id']}, seed {run['seed']}: {run['problem']}"
        )
    short = ", ".join(
        rows.dropna(subset="value").groupby(KEYS).filter(lambda run: len(run) <= 5)["dataset_id"].unique()
    )
    returns = ", ".join(runs[runs["unit"] == "return"]["dataset_id"].unique())
    quiet = ", ".join(f"{count} on {dataset_id}" for dataset_id, count in rows.attrs["unevaluated"].items())
    lacking = gaps(runs)
    seeds = f"{fewest} seeds" if fewest > 1 else "one seed"
    lines_if = {
        f"{seeds}: below five, each seed's value stands [in brackets], and no interval": fewest < intervals.FEWEST,
        f"{seeds}: where three runs in ten fail, a 95 % interval of five seeds holds the true mean in 83 % of cases, "
        "of ten in 94 %": intervals.FEWEST <= fewest < 10,
        f"{fewest} to {most} seeds: the fewer, the less sure": fewest < most,
        f"five evaluations or fewer, so the last five are the whole run: {short}": short,
        f"no reference scores, so returns, which are not compared over datasets: {returns}": returns,
        "runs that ended well but were not evaluated (no environment?) and are not here; benchmarks.select compares "
        f"policies by the data alone: {quiet}": quiet,
        f"means over datasets, who beats whom and profiles need each algorithm on each; missing: {lacking}": lacking,
    }
    return lines + [line for line, applies in lines_if.items() if applies]


def markdown(table: pd.DataFrame) -> str:
    lines = [list(table.columns), ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- Pictures -------------------------------------------------------------------------------------------------------


def colours(rows: pd.DataFrame) -> dict[str, Any]:
    """One for each algorithm, the same in all pictures."""
    names = rows["algorithm"].unique()
    palette = colormaps["tab10" if len(names) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    return dict(zip(names, itertools.cycle(palette), strict=False))


def curves(rows: pd.DataFrame) -> Figure:
    """A panel per dataset, three in a row: the mean over seeds at each evaluation they share, and the interval or,
    below intervals.FEWEST, the range.
    """
    rows, colour = rows.dropna(subset="value"), colours(rows)
    count = rows["dataset_id"].nunique()
    columns = min(3, count)
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(5 * columns + 2, 3.8 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, (dataset_id, runs) in zip(panels, rows.groupby("dataset_id"), strict=False):
        bands = set()
        for algorithm, own in runs.groupby("algorithm", sort=False):
            table = own.pivot(index="num_updates", columns="seed", values="value")
            if table.dropna().empty:  # they share none: points, and no mean
                axes.plot(table.index, table, ".", color=colour[algorithm])
                continue
            table = table.dropna()
            values, enough = table.to_numpy(), table.shape[1] >= intervals.FEWEST
            low, high = intervals.interval([values], intervals.mean) if enough else (values.min(1), values.max(1))
            axes.plot(table.index, values.mean(axis=1), marker=".", color=colour[algorithm])
            axes.fill_between(table.index, low, high, color=colour[algorithm], alpha=0.15)
            bands.add("95 % interval" if enough else "range")
        axes.set(xlabel="updates", title=dataset_id)
        shown = f"mean of seeds, {' or '.join(sorted(bands))}" if bands else "each seed's"
        axes.set_ylabel(f"{runs['unit'].iloc[0]}: {shown}")
        axes.locator_params(axis="x", nbins=5)  # more would touch each other
        axes.grid(alpha=0.3)
    for axes in panels[count:]:
        axes.remove()
    lines_of_legend = [Line2D([], [], color=value, marker=".") for value in colour.values()]
    figure.legend(lines_of_legend, list(colour), loc="outside right upper")
    return figure


def summary(runs: pd.DataFrame, title: str) -> Figure:
    """Means over datasets, performance profiles, and who beats whom."""
    colour, unit = colours(runs), runs["unit"].iloc[0]
    names = list(colour)
    figure = Figure(figsize=(16, 1.6 + 0.45 * max(5, len(names))), layout="constrained")
    figure.suptitle(title)
    left, middle, right = figure.subplots(1, 3)
    left.use_sticky_edges = False  # a margin where the lowest bar begins, too
    centre, statistic = list(centres(runs).items())[-1]
    start = runs["value"].min() - 0.05 * np.ptp(runs["value"])  # of the profiles
    levels = np.array([start, *np.unique(runs["value"])])
    chances = np.full((len(names), len(names)), np.nan)
    for row, name in enumerate(names):
        of = samples(runs, name)
        if min(map(len, of)) >= intervals.FEWEST:
            low, high = intervals.interval(of, statistic)
            left.barh(row, high - low, left=low, height=0.6, color=colour[name], alpha=0.4)
        left.plot([statistic(*of)] * 2, [row - 0.3, row + 0.3], color=colour[name])
        left.plot(np.concatenate(of), np.full(sum(map(len, of)), row), ".", color=colour[name], alpha=0.4)
        middle.step(levels, intervals.profile(of, levels), where="post", color=colour[name])
        middle.fill_between(
            levels, *intervals.profile_interval(of, levels), step="post", color=colour[name], alpha=0.15, linewidth=0
        )
        for column, other in enumerate(names):
            if other != name:
                chances[row, column], low, high = (100 * share for share in beats(of, samples(runs, other)))
                ink = "white" if abs(chances[row, column] - 50) > 35 else "black"
                text = f"{chances[row, column]:.0f}\n{low:.0f} to {high:.0f}"
                right.text(column, row, text, ha="center", va="center", color=ink, fontsize=7)
    shown = "95 % interval" if left.patches else "no interval of few seeds"
    left.set(yticks=range(len(names)), yticklabels=names, xlabel=f"{centre} of {unit}s, {shown}; points are runs")
    left.invert_yaxis()
    middle.set(xlabel=f"{unit} x", ylabel="share of runs above x", title="Performance profiles, 95 % bands")
    right.imshow(chances, vmin=0, vmax=100, cmap="RdBu", aspect="auto")
    right.set(title="% of pairs in which the row beats the column", yticks=range(len(names)), yticklabels=names)
    right.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
    for axes in (left, middle):
        axes.grid(alpha=0.3)
    return figure


# --- Main -----------------------------------------------------------------------------------------------------------

STYLE = """body { font: 14px/1.5 system-ui, sans-serif; max-width: 84rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } td, th { border: 1px solid #ccc; padding: .25rem .6rem }
td { white-space: nowrap } th { text-align: left }
img { max-width: 100% } pre { white-space: pre-wrap; color: #444 }"""


def page(tables: dict[str, pd.DataFrame], lines: list[str], pictures: list[Path]) -> str:
    """One file of HTML that needs no other: pictures are in it."""
    body = [f"<h2>{escape(title)}</h2>{table.to_html(index=False, border=0)}" for title, table in tables.items()]
    body += ["<ul>", *(f"<li>{escape(line)}</li>" for line in lines), "</ul>"]
    for picture in pictures:
        data = base64.b64encode(picture.read_bytes()).decode()
        body.append(f'<img alt="{picture.stem}" src="data:image/png;base64,{data}">')
    explained = f"<pre>{escape(__doc__.split('Run:')[0].strip())}</pre>" if __doc__ else ""
    head = f'<meta charset="utf-8"><title>AnchoRL: results</title><style>{STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body><h1>Results</h1>{''.join(body)}{explained}</body></html>\n"


def main(args: Args) -> None:
    check(bool(args.results), "nothing to report on: give a folder that benchmarks/run.py wrote")
    check(args.failed_score is None or math.isfinite(args.failed_score), "--failed-score: must be finite")
    rows = read(args.results, args.failed_score, args.unequal)
    if not args.unequal:
        check_equal(rows)
    runs = measures(rows, args.by)
    compared, title = comparable(runs), f"All runs, by {args.by}"
    complete = len(compared) > 0 and not gaps(runs)
    tables = {f"Side by side, by {args.by}": overview(runs)} if runs["dataset_id"].nunique() > 1 else {}
    tables |= {"Each dataset": per_dataset(rows, runs)} | ({title: over_datasets(compared)} if complete else {})
    lines = notes(rows, runs)
    text = "\n\n".join(f"### {title}\n\n{markdown(table)}" for title, table in tables.items())
    text += "\n\n" + "".join(f"- {line}\n" for line in lines)
    print(text, end="")
    if args.out is None:
        return
    figures = {"curves": curves(rows)} | ({"summary": summary(compared, title)} if complete else {})
    with explain(f"--out {args.out}: cannot be made"):
        args.out.mkdir(parents=True, exist_ok=True)
    pictures = [args.out / f"{name}.png" for name in figures]
    for path, figure in zip(pictures, figures.values(), strict=True):
        replace(path, partial(figure.savefig, dpi=130, format="png"))
    if not complete:  # one of an earlier report would pass for this one's
        (args.out / "summary.png").unlink(missing_ok=True)
    replace(args.out / "report.md", text.encode())
    replace(args.out / "report.html", page(tables, lines, pictures).encode())


if __name__ == "__main__":
    launch(main, Args)
