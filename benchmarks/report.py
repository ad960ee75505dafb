"""Compares algorithms by what benchmarks/run.py wrote: a table, pictures, and one page of HTML that opens from disk.

Scores are normalised; where a dataset has no reference scores, returns stand for them. Per dataset and algorithm:

    last        the last evaluation: the mean over seeds, and a 95 % bootstrap interval of that mean
    last five   the mean of the last five evaluations (of all, where there are fewer), which swings less
    best        the highest evaluation of each seed: what one who may choose by the simulator would get, and a fair
                estimate of nothing else

--by chooses the one that the first table shows and that all runs are compared by (Agarwal et al., "Deep RL at the Edge
of the Statistical Precipice", 2021, arXiv 2108.13264): the last five, if nothing is said. To compare them, each
algorithm must have run on each dataset; of several datasets those without reference scores are left out.

    IQM         the interquartile mean: of all runs on all datasets, the middle half's
    P(X > Y)    the probability that a run of X beats one of Y on the same dataset, averaged over datasets
    profile     the share of runs that score above x

Each dataset weighs the same, however many its seeds. Intervals draw the seeds of each dataset anew: they say how much
these seeds matter, and are too narrow for few (of normal numbers, a mean's covers 75 % with three, 84 % with five).

Run: python -m benchmarks.report runs/first --out runs/first/report
"""

import base64
import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import numpy as np
import tyro
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

try:
    import pandas as pd
    from scipy import stats
except ImportError:
    print("error: a report needs pandas and SciPy: pip install -e '.[report]'", file=sys.stderr)
    raise SystemExit(2) from None

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.command_line import BadInput, check, launch, one_line

Measure = Literal["last", "last five", "best"]
MEASURES: dict[str, Any] = {"last": "last", "last five": lambda x: x.tail(5).mean(), "best": "max"}
KEYS = ["algorithm", "dataset_id", "seed"]
NEEDED = [*KEYS, "num_updates", "score", "return_mean"]
KNOWN = ["updates_per_second", "wall_seconds", "eval_episodes"]  # if there is a results.csv beside the evaluations


@dataclass
class Args:
    results: tyro.conf.Positional[tuple[Path, ...]]
    """folders that run.py wrote, or evaluations.csv files"""
    out: Path | None = None
    """write report.md, report.html, curves.png and, if all was run on all datasets, summary.png here"""
    by: Measure = "last five"
    """what of a run to compare by"""
    unequal: bool = False
    """compare runs of different lengths or evaluations, too"""


# --- Reading --------------------------------------------------------------------------------------------------------


def read(paths: tuple[Path, ...]) -> pd.DataFrame:
    """A row per evaluation; `value` and `unit` are its score or, in datasets without reference scores, its return.

    Raises BadInput for a file that is none of run.py's, and for a run that is there twice.
    """
    parts = []
    for path in paths:
        file = path / "evaluations.csv" if path.is_dir() else path
        check(file.is_file(), f"no {file}: give a folder that benchmarks/run.py wrote, or its evaluations.csv")
        try:
            part = pd.read_csv(file, dtype={"num_updates": int, "score": float, "return_mean": float})
        except (ValueError, OSError) as error:
            raise BadInput(f"cannot read {file}: {one_line(error)}") from None
        missing = [name for name in NEEDED if name not in part]
        check(not missing, f"{file}: lacks the column {', '.join(missing)}; give an evaluations.csv")
        check(len(part) > 0, f"{file}: holds no evaluation")
        if (results := file.with_name("results.csv")).is_file() and "updates_per_second" not in part:
            part = part.merge(pd.read_csv(results).reindex(columns=KEYS + KNOWN), on=KEYS, how="left")
        parts.append(part.assign(source=str(file)))
    rows = pd.concat(parts, ignore_index=True).reindex(columns=[*NEEDED, *KNOWN, "source"])
    twice = rows[rows.duplicated([*KEYS, "num_updates"]) | (rows.groupby(KEYS)["source"].transform("nunique") > 1)]
    run = " ".join(map(str, twice[KEYS].to_numpy()[:1].flat))
    check(twice.empty, f"{run} is in more than one of the files, or has two rows of an update")
    scored = rows["score"].notna().groupby(rows["dataset_id"]).transform("all")
    rows["unit"] = np.where(scored, "score", "return")
    rows["value"] = rows["score"].where(scored, rows["return_mean"])
    return rows.sort_values([*KEYS, "num_updates"], kind="stable")


def check_equal(rows: pd.DataFrame) -> None:
    """Raises BadInput unless all runs on a dataset were evaluated after the same updates, with as many episodes."""
    for dataset_id, runs in rows.groupby("dataset_id"):
        groups = runs.groupby(["algorithm", "seed"])
        steps = groups["num_updates"].apply(lambda x: f"{x.max():,} updates, evaluated at {', '.join(map(str, x))}")
        episodes = groups["eval_episodes"].first().dropna().map("{:.0f} episodes".format)  # where they are known
        for protocols in (steps, episodes):
            kinds = protocols.drop_duplicates().iloc[:2]
            what = "; ".join(f"{' '.join(map(str, run))}: {shorten(kind, 90)}" for run, kind in kinds.items())
            check(len(kinds) < 2, f"{dataset_id}: unequal protocols ({what}): --unequal compares them all the same")


# --- Statistics -----------------------------------------------------------------------------------------------------

Interval = tuple[float, float, float]  # estimate, low, high; the latter are NaN where there is but one seed


def measures(rows: pd.DataFrame, by: Measure = "last five") -> pd.DataFrame:
    """A row per run: its MEASURES, and as its `value` the one to compare by."""
    table = rows.groupby(["dataset_id", "algorithm", "seed", "unit"], sort=False)["value"].agg(**MEASURES)
    return table.assign(value=table[by]).reset_index()


def bootstrap(tasks: list[np.ndarray], statistic: Callable[..., Any]) -> Interval:
    """statistic(*tasks, axis) of samples, [seeds] each, and its 95 % interval, each sample drawn anew by itself."""
    estimate = float(statistic(*tasks, axis=-1))
    if min(map(len, tasks)) < 2:
        return estimate, np.nan, np.nan
    result = stats.bootstrap(tasks, statistic, method="percentile", n_resamples=2000, vectorized=True, rng=0)
    return estimate, float(result.confidence_interval.low), float(result.confidence_interval.high)


def pool(*tasks: np.ndarray, axis: int = -1) -> np.ndarray:
    """All samples in one, each repeated until they are of one length: a dataset with more seeds weighs no more."""
    length = math.lcm(*(task.shape[axis] for task in tasks))
    return np.concatenate([np.repeat(task, length // task.shape[axis], axis) for task in tasks], axis)


def iqm(*tasks: np.ndarray, axis: int) -> np.ndarray:
    return stats.trim_mean(pool(*tasks, axis=axis), 0.25, axis=axis)


def improvement(*tasks: np.ndarray, axis: int) -> np.ndarray:
    """P(X > Y) + P(X = Y) / 2, averaged over `tasks`, X's and then Y's: Mann and Whitney's U by the number of pairs."""
    half = len(tasks) // 2
    shares = []
    for x, y in zip(tasks[:half], tasks[half:], strict=True):
        x, y = np.moveaxis(x, axis, -1)[..., :, None], np.moveaxis(y, axis, -1)[..., None, :]
        shares.append(((x > y) + 0.5 * (x == y)).mean(axis=(-2, -1)))
    return np.mean(shares, axis=0)


def samples(runs: pd.DataFrame, algorithm: str) -> list[np.ndarray]:
    """The values of the algorithm's runs on each dataset."""
    return [own.to_numpy() for _, own in runs[runs["algorithm"] == algorithm].groupby("dataset_id")["value"]]


def comparable(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs on one dataset, or the scores on several: returns of one mean nothing beside those of another."""
    return runs if runs["dataset_id"].nunique() == 1 else runs[runs["unit"] == "score"]


def gaps(runs: pd.DataFrame) -> str:
    """The comparable datasets that an algorithm was not run on."""
    counts = pd.crosstab(runs["algorithm"], runs["dataset_id"])[comparable(runs)["dataset_id"].unique()]
    return "; ".join(f"{name} on {', '.join(row.index[row == 0])}" for name, row in counts.iterrows() if not row.all())


# --- Tables ---------------------------------------------------------------------------------------------------------


def words(interval: Interval, unit: float = 1.0) -> str:
    estimate, low, high = (unit * number for number in interval)
    return f"{estimate:.1f}" if np.isnan(low) else f"{estimate:.1f} ({low:.1f} to {high:.1f})"


def overview(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per algorithm, a column per dataset: the values; empty where an algorithm was not run."""
    named = runs["dataset_id"] + np.where(runs["unit"] == "return", " (return)", "")
    cells = runs.groupby(["algorithm", named], sort=False)["value"]
    table = cells.apply(lambda own: words(bootstrap([own.to_numpy()], np.mean))).unstack(fill_value="")
    return table.reset_index().rename_axis(columns=None)


def per_dataset(rows: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """A row per dataset and algorithm: all MEASURES, and the time."""
    table = []
    for (dataset_id, unit, algorithm), own in runs.groupby(["dataset_id", "unit", "algorithm"]):
        of_runs = rows[(rows["dataset_id"] == dataset_id) & (rows["algorithm"] == algorithm)]
        line = {"dataset": dataset_id + " (return)" * (unit == "return"), "algorithm": algorithm}
        line |= {"seeds": len(own), "updates": f"{of_runs['num_updates'].max():,}"}
        line |= {name: words(bootstrap([own[name].to_numpy()], np.mean)) for name in MEASURES}
        times = of_runs.groupby("seed")[KNOWN[:2]].first().mean()
        line |= {name.replace("_", " "): f"{mean:.3g}".replace("nan", "") for name, mean in times.items()}
        table.append(line)
    return pd.DataFrame(table)


def over_datasets(runs: pd.DataFrame) -> pd.DataFrame:
    """IQM of each algorithm, and the probability that it beats each other one."""
    names = runs["algorithm"].unique()
    table = []
    for name in names:
        line = {"algorithm": name, f"IQM of {runs['unit'].iloc[0]}s": words(bootstrap(samples(runs, name), iqm))}
        for other in names:
            chances = bootstrap(samples(runs, name) + samples(runs, other), improvement)
            line[f"beats {other}"] = "" if other == name else words(chances, 100) + " %"
        table.append(line)
    return pd.DataFrame(table)


def notes(rows: pd.DataFrame, runs: pd.DataFrame) -> list[str]:
    """What to know when reading the tables, a line each."""
    fewest, most = runs.groupby(["dataset_id", "algorithm"]).size().agg(["min", "max"])
    short = ", ".join(rows.groupby(KEYS).filter(lambda run: len(run) <= 5)["dataset_id"].unique())
    returns = ", ".join(runs[runs["unit"] == "return"]["dataset_id"].unique())
    lines = {
        f"{fewest} seeds: below five an interval covers less than 95 %, of two or three it is their range": fewest < 5,
        f"{fewest} to {most} seeds: where a run failed or diverged, the mean is of the others": fewest < most,
        f"five evaluations or fewer, so the last five are the whole run: {short}": short,
        f"no reference scores, so returns, which are not compared over datasets: {returns}": returns,
        f"IQM, P(X > Y) and profiles need each algorithm on each dataset; missing: {gaps(runs)}": gaps(runs),
    }
    return [line for line, applies in lines.items() if applies]


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
    """A panel per dataset, three in a row: the mean over seeds at each evaluation they share, and its interval."""
    count, colour = rows["dataset_id"].nunique(), colours(rows)
    columns = min(3, count)
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(5 * columns + 2, 3.8 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, (dataset_id, runs) in zip(panels, rows.groupby("dataset_id"), strict=False):
        for algorithm, own in runs.groupby("algorithm", sort=False):
            table = own.pivot(index="num_updates", columns="seed", values="value")
            if table.dropna().empty:  # they share none: points, and no mean
                axes.plot(table.index, table, ".", color=colour[algorithm])
                continue
            table = table.dropna()
            intervals = np.array([bootstrap([values], np.mean) for values in table.to_numpy()])
            axes.plot(table.index, intervals[:, 0], marker=".", color=colour[algorithm])
            axes.fill_between(table.index, intervals[:, 1], intervals[:, 2], color=colour[algorithm], alpha=0.15)
        axes.set(xlabel="updates", ylabel=f"{runs['unit'].iloc[0]}: mean of seeds, 95 % interval", title=dataset_id)
        axes.locator_params(axis="x", nbins=5)  # more would touch each other
        axes.grid(alpha=0.3)
    for axes in panels[count:]:
        axes.remove()
    lines_of_legend = [Line2D([], [], color=value, marker=".") for value in colour.values()]
    figure.legend(lines_of_legend, list(colour), loc="outside right upper")
    return figure


def summary(runs: pd.DataFrame, title: str) -> Figure:
    """IQMs, performance profiles, and who beats whom."""
    colour, unit = colours(runs), runs["unit"].iloc[0]
    names = list(colour)
    figure = Figure(figsize=(16, 1.6 + 0.45 * max(5, len(names))), layout="constrained")
    figure.suptitle(title)
    left, middle, right = figure.subplots(1, 3)
    left.use_sticky_edges = False  # a margin where the lowest bar begins, too
    start = runs["value"].min() - 0.05 * np.ptp(runs["value"])  # of the profiles
    for row, name in enumerate(names):
        estimate, low, high = bootstrap(samples(runs, name), iqm)
        left.barh(row, high - low if high > low else 0, left=low, height=0.6, color=colour[name], alpha=0.4)
        left.plot([estimate, estimate], [row - 0.3, row + 0.3], color=colour[name])
        above = stats.ecdf(pool(*samples(runs, name))).sf
        middle.step([start, *above.quantiles], [1, *above.probabilities], where="post", color=colour[name])
    left.set(yticks=range(len(names)), yticklabels=names, xlabel=f"IQM of {unit}s, 95 % interval")
    left.invert_yaxis()
    middle.set(xlabel=f"{unit} x", ylabel="share of runs above x", title="Performance profiles, colours as on the left")
    chances = np.full((len(names), len(names)), np.nan)
    for row, column in itertools.permutations(range(len(names)), 2):
        chance = chances[row, column] = improvement(*samples(runs, names[row]), *samples(runs, names[column]), axis=-1)
        ink = "white" if abs(chance - 0.5) > 0.35 else "black"
        right.text(column, row, f"{100 * chance:.0f}", ha="center", va="center", color=ink)
    right.imshow(chances, vmin=0, vmax=1, cmap="RdBu")
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
    rows = read(args.results)
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
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        pictures = [args.out / f"{name}.png" for name in figures]
        for path, figure in zip(pictures, figures.values(), strict=True):
            figure.savefig(path, dpi=130)
        (args.out / "report.md").write_text(text)
        (args.out / "report.html").write_text(page(tables, lines, pictures))
    except OSError as error:
        raise BadInput(f"--out {args.out}: cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    launch(main, Args)
