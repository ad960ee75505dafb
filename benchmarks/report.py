"""Compares algorithms by what benchmarks/run.py wrote: a table, pictures, and one page of HTML that opens from disk.

Scores are normalised; where a dataset has no reference scores, returns stand for them. Per dataset and algorithm:

    last        the last evaluation: the mean over seeds, and a 95 % bootstrap interval of that mean
    last five   the mean of the last five evaluations (of all, where there are fewer), which swings less
    best        the highest evaluation of each seed: what one who may choose by the simulator would get, and a fair
                estimate of nothing else

Of several datasets the first table shows the last five side by side. Over datasets, by the last five of every run
(Agarwal et al., "Deep RL at the Edge of the Statistical Precipice", 2021, arXiv 2108.13264), if each algorithm was run
on each dataset:

    IQM         the interquartile mean: of all runs on all datasets, the middle half's
    P(X > Y)    the probability that a run of X beats one of Y on the same dataset, averaged over datasets
    profile     the share of runs that score above x

Intervals draw the seeds of each dataset anew: they say how much these seeds matter, and are too narrow for three. One
seed has none.

Run: python -m benchmarks.report runs/first --out runs/first/report
"""

import base64
import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from common.command_line import launch
from common.datasets import BadInput, check, one_line

MEASURES = ("last", "last five", "best")
NEEDED = ["algorithm", "dataset_id", "seed", "num_updates", "score", "return_mean"]


@dataclass
class Args:
    results: tyro.conf.Positional[tuple[Path, ...]]
    """folders that run.py wrote, or evaluations.csv files"""
    out: Path | None = None
    """write report.md, report.html, curves.png and, of more than one dataset, summary.png here"""
    unequal: bool = False
    """compare runs of different lengths or evaluations, too"""


# --- Reading --------------------------------------------------------------------------------------------------------


def read(paths: tuple[Path, ...]) -> pd.DataFrame:
    """A row per evaluation, `value` being its score or, in datasets without reference scores, its return.

    Raises BadInput for a file that is none of run.py's, and for a run that is in two of them.
    """
    parts = []
    for path in paths:
        file = path / "evaluations.csv" if path.is_dir() else path
        check(file.is_file(), f"no {file}: give a folder that benchmarks/run.py wrote, or its evaluations.csv")
        try:
            part = pd.read_csv(file)
        except (ValueError, OSError) as error:
            raise BadInput(f"cannot read {file}: {one_line(error)}") from None
        missing = [name for name in NEEDED if name not in part]
        check(not missing, f"{file}: lacks the column {', '.join(missing)}; give an evaluations.csv")
        check(len(part) > 0, f"{file}: holds no evaluation")
        results = file.with_name("results.csv")
        if results.is_file() and "updates_per_second" not in part:
            part = part.merge(protocol(results), on=["algorithm", "dataset_id", "seed"], how="left")
        parts.append(part.assign(source=str(file)))
    rows = pd.concat(parts, ignore_index=True)
    keys = ["algorithm", "dataset_id", "seed"]
    twice = rows.groupby(keys)["source"].nunique().loc[lambda counts: counts > 1]
    check(twice.empty, f"{' '.join(map(str, twice.index[0]))} is in more than one of the files" if len(twice) else "")
    rows["value"] = rows["score"].where(rows["score"].notna(), rows["return_mean"])
    return rows.sort_values([*keys, "num_updates"], kind="stable")


def protocol(path: Path) -> pd.DataFrame:
    names = ["algorithm", "dataset_id", "seed", "updates_per_second", "wall_seconds", "eval_episodes", "device"]
    table = pd.read_csv(path)
    return table[[name for name in names if name in table]]


def check_equal(rows: pd.DataFrame) -> None:
    """Raises BadInput unless all runs on a dataset have the same updates and evaluations."""
    for dataset_id, runs in rows.groupby("dataset_id"):
        kinds: dict[str, str] = {}
        for (algorithm, seed), run in runs.groupby(["algorithm", "seed"]):
            steps = run["num_updates"].tolist()
            kind = f"{steps[-1]:,} updates with {len(steps)} evaluations"
            if "eval_episodes" in run and run["eval_episodes"].notna().all():
                kind += f" of {run['eval_episodes'].iloc[0]:.0f} episodes"
            kinds.setdefault(kind, f"{algorithm} {seed}: {kind}")
        what = "; ".join(list(kinds.values())[:2])
        check(len(kinds) == 1, f"{dataset_id}: unequal protocols ({what}): --unequal compares them all the same")


# --- Statistics -----------------------------------------------------------------------------------------------------

Interval = tuple[float, float, float]  # estimate, low, high; the latter are NaN where there is but one seed


def measures(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per run: its MEASURES."""
    groups = rows.groupby(["dataset_id", "algorithm", "seed"], sort=False)["value"]
    table = pd.DataFrame(
        {"last": groups.last(), "last five": groups.apply(lambda x: x.tail(5).mean()), "best": groups.max()}
    )
    return table.reset_index()


def bootstrap(tasks: list[np.ndarray], statistic: Callable[..., Any]) -> Interval:
    """The statistic of some samples, [seeds] each, and its 95 % interval, each sample drawn anew by itself.

    statistic(*samples, axis) works along an axis, as SciPy's do.
    """
    estimate = float(statistic(*tasks, axis=-1))
    if min(map(len, tasks)) < 2:
        return estimate, np.nan, np.nan
    result = stats.bootstrap(tasks, statistic, method="percentile", n_resamples=2000, vectorized=True, rng=0)
    return estimate, float(result.confidence_interval.low), float(result.confidence_interval.high)


def iqm(*tasks: np.ndarray, axis: int) -> np.ndarray:
    return stats.trim_mean(np.concatenate(tasks, axis=axis), 0.25, axis=axis)


def improvement(*tasks: np.ndarray, axis: int) -> np.ndarray:
    """P(X > Y) + P(X = Y) / 2, the mean over datasets; `tasks` are X's samples, then Y's.

    It is Mann and Whitney's U by the number of pairs.
    """
    half = len(tasks) // 2
    shares = []
    for x, y in zip(tasks[:half], tasks[half:], strict=True):
        x, y = np.moveaxis(x, axis, -1)[..., :, None], np.moveaxis(y, axis, -1)[..., None, :]
        shares.append(((x > y) + 0.5 * (x == y)).mean(axis=(-2, -1)))
    return np.mean(shares, axis=0)


def samples(runs: pd.DataFrame, algorithm: str) -> list[np.ndarray]:
    """The last five of the algorithm's runs on each dataset."""
    own = runs[runs["algorithm"] == algorithm]
    return [own[own["dataset_id"] == name]["last five"].to_numpy() for name in runs["dataset_id"].unique()]


def is_complete(runs: pd.DataFrame) -> bool:
    counts = runs.groupby("dataset_id")["algorithm"].nunique()
    return len(counts) > 1 and (counts == runs["algorithm"].nunique()).all()


# --- Tables ---------------------------------------------------------------------------------------------------------


def words(interval: Interval, unit: float = 1.0) -> str:
    estimate, low, high = (unit * number for number in interval)
    return f"{estimate:.1f}" if np.isnan(low) else f"{estimate:.1f} ({low:.1f} to {high:.1f})"


def overview(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per algorithm, a column per dataset: the last five; empty where an algorithm was not run."""
    cells = runs.groupby(["algorithm", "dataset_id"], sort=False)["last five"]
    table = cells.apply(lambda own: words(bootstrap([own.to_numpy()], np.mean))).unstack(fill_value="")
    return table.reset_index().rename_axis(columns=None)


def per_dataset(rows: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """A row per dataset and algorithm: all MEASURES, and the time."""
    table = []
    for (dataset_id, algorithm), own in runs.groupby(["dataset_id", "algorithm"]):
        of_runs = rows[(rows["dataset_id"] == dataset_id) & (rows["algorithm"] == algorithm)]
        line = {"dataset": dataset_id, "algorithm": algorithm, "seeds": len(own)}
        line |= {"updates": f"{of_runs['num_updates'].max():,}"}
        line |= {name: words(bootstrap([own[name].to_numpy()], np.mean)) for name in MEASURES}
        for name, column in (("updates per second", "updates_per_second"), ("seconds", "wall_seconds")):
            known = of_runs.groupby("seed")[column].first() if column in of_runs else pd.Series(dtype=float)
            line[name] = f"{known.mean():.3g}" if known.notna().any() else ""
        table.append(line)
    return pd.DataFrame(table)


def over_datasets(runs: pd.DataFrame) -> pd.DataFrame:
    """IQM of each algorithm, and the probability that it beats each other one."""
    names = runs["algorithm"].unique()
    table = []
    for name in names:
        line = {"algorithm": name, "IQM": words(bootstrap(samples(runs, name), iqm))}
        for other in names:
            chances = bootstrap(samples(runs, name) + samples(runs, other), improvement)
            line[f"beats {other}"] = "" if other == name else words(chances, 100) + " %"
        table.append(line)
    return pd.DataFrame(table)


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
    """A panel per dataset, three in a row: the mean over seeds at each evaluation, and its interval."""
    datasets, colour = rows["dataset_id"].unique(), colours(rows)
    columns = min(3, len(datasets))
    lines = math.ceil(len(datasets) / columns)
    figure = Figure(figsize=(5 * columns + 2, 3.8 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, dataset_id in zip(panels, datasets, strict=False):
        for algorithm, own in rows[rows["dataset_id"] == dataset_id].groupby("algorithm", sort=False):
            table = own.pivot(index="num_updates", columns="seed", values="value").dropna()
            intervals = np.array([bootstrap([values], np.mean) for values in table.to_numpy()])
            axes.plot(table.index, intervals[:, 0], marker=".", color=colour[algorithm])
            axes.fill_between(table.index, intervals[:, 1], intervals[:, 2], color=colour[algorithm], alpha=0.15)
        axes.set(xlabel="updates", ylabel="score: mean of seeds, 95 % interval", title=dataset_id)
        axes.locator_params(axis="x", nbins=5)  # more would touch each other
        axes.grid(alpha=0.3)
    for axes in panels[len(datasets) :]:
        axes.remove()
    lines_of_legend = [Line2D([], [], color=value, marker=".") for value in colour.values()]
    figure.legend(lines_of_legend, list(colour), loc="outside right upper")
    return figure


def summary(runs: pd.DataFrame) -> Figure:
    """IQMs, performance profiles, and who beats whom."""
    colour = colours(runs)
    names = list(colour)
    figure = Figure(figsize=(16, 1.6 + 0.45 * max(5, len(names))), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.use_sticky_edges = False  # a margin where the lowest bar begins, too
    for row, name in enumerate(names):
        estimate, low, high = bootstrap(samples(runs, name), iqm)
        left.barh(row, high - low if high > low else 0, left=low, height=0.6, color=colour[name], alpha=0.4)
        left.plot([estimate, estimate], [row - 0.3, row + 0.3], color=colour[name])
        values = np.sort(np.concatenate(samples(runs, name)))
        middle.step([runs["last five"].min() - 5, *values], [1, *(1 - np.arange(1, len(values) + 1) / len(values))],
                    where="post", color=colour[name])  # fmt: skip
    left.set(yticks=range(len(names)), yticklabels=names, xlabel="IQM of scores, 95 % interval", title="All datasets")
    left.invert_yaxis()
    middle.set(xlabel="score x", ylabel="share of runs above x", title="Performance profiles, colours as on the left")
    pairs = list(itertools.permutations(range(len(names)), 2))
    chances = np.full((len(names), len(names)), np.nan)
    for row, column in pairs:
        chances[row, column] = improvement(*samples(runs, names[row]), *samples(runs, names[column]), axis=-1)
    right.imshow(chances, vmin=0, vmax=1, cmap="RdBu")
    for row, column in pairs:
        ink = "white" if abs(chances[row, column] - 0.5) > 0.35 else "black"
        right.text(column, row, f"{100 * chances[row, column]:.0f}", ha="center", va="center", color=ink)
    right.set(title="% of pairs in which the row beats the column", yticks=range(len(names)), yticklabels=names)
    right.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
    for axes in (left, middle):
        axes.grid(alpha=0.3)
    return figure


# --- Main -----------------------------------------------------------------------------------------------------------

STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } td, th { border: 1px solid #ccc; padding: .25rem .6rem }
img { max-width: 100% } pre { white-space: pre-wrap; color: #444 }"""


def page(tables: list[pd.DataFrame], pictures: list[Path]) -> str:
    """One file of HTML that needs no other: pictures are in it."""
    body = [table.to_html(index=False, border=0) for table in tables]
    for picture in pictures:
        data = base64.b64encode(picture.read_bytes()).decode()
        body.append(f'<img alt="{picture.stem}" src="data:image/png;base64,{data}">')
    explained = f"<pre>{__doc__.split('Run:')[0].strip()}</pre>" if __doc__ else ""
    head = f'<meta charset="utf-8"><title>AnchoRL: results</title><style>{STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body><h1>Results</h1>{''.join(body)}{explained}</body></html>\n"


def main(args: Args) -> None:
    check(bool(args.results), "nothing to report on: give a folder that benchmarks/run.py wrote")
    rows = read(args.results)
    if not args.unequal:
        check_equal(rows)
    runs = measures(rows)
    tables = [overview(runs)] if runs["dataset_id"].nunique() > 1 else []
    tables += [per_dataset(rows, runs)] + ([over_datasets(runs)] if is_complete(runs) else [])
    text = "\n\n".join(map(markdown, tables)) + "\n"
    print(text, end="")
    if args.out is None:
        return
    figures = {"curves": curves(rows)} | ({"summary": summary(runs)} if is_complete(runs) else {})
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        pictures = [args.out / f"{name}.png" for name in figures]
        for path, figure in zip(pictures, figures.values(), strict=True):
            figure.savefig(path, dpi=130)
        (args.out / "report.md").write_text(text)
        (args.out / "report.html").write_text(page(tables, pictures))
    except OSError as error:
        raise BadInput(f"--out {args.out}: cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    launch(main, Args)
