"""What acting a little gives: returns against steps in the environment, from scratch, with prior data, on from offline.

A folder holds the runs of one environment: sac.py (from scratch), rlpd.py (with prior data), and scripts with
--online-steps, whose steps count from the switch. Of it NAME.csv is written, a row per evaluation, from which table and
picture can be made again without the runs; scripts that are in it already, and not in the folder, stay. A file of
another dataset or environment is refused, and so is a folder that lacks a script's earlier seeds. Over the seeds, of
each script, in the data's scores or, where there are no reference scores, in returns:

    switch   what the offline updates had made of the policy
    lowest   the lowest of the evaluations in the first --dip steps after it
    5,000 .. the mean of the evaluations in the tenth of the steps that ends there; of 5,000, from 4,501 to 5,000; where
             it has none, as of Cal-QL, which plays whole episodes, the value between the two beside 5,000

Below five seeds each one's value stands behind the mean, from five on the 95 % interval of the mean, as in report.py.

Run: python -m benchmarks.measurements.online runs/pendulum --out benchmarks/results/online --at 1000 2000 5000
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[1]))
import report
from scratch import replace

from common.command_line import check, explain, launch
from common.data import load_dataset

NEEDED = "algorithm", "dataset_id", "seed", "num_updates"  # in args.json
TASK = ["unit", "dataset_id", "env_id"]  # what a file has one of
COLUMNS = ["script", "seed", "steps", "value", *TASK]


@dataclass
class Args:
    sources: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs, one per environment, or the NAME.csv of earlier ones"""
    out: Path = Path("runs/online")
    """folder for NAME.csv, table.md and online.png"""
    at: tuple[int, ...] = (5_000, 20_000, 50_000)
    """numbers of steps in the environment"""
    dip: int = 5_000
    """steps after the switch in which the lowest evaluation is looked for"""


def steps_of(saved: dict[str, Any], row: Any) -> int:
    """Steps in the environment by then: from the switch on, where it is negative before, or from the first random one.
    sac.py's random steps are counted as --random-steps says; they go on to the end of an episode."""
    if saved.get("online_steps"):  # runs of older versions lack it, and have none
        before = row["step"] - saved["num_updates"]
        return int(row.get("player/steps", before) if before > 0 else before)  # a script that plays ahead says it
    return saved["random_steps"] + math.ceil(row["step"] / saved.get("updates_per_step", 1))


def read_runs(folder: Path) -> pd.DataFrame:
    """A row per evaluation of the finished runs in it. Raises BadInput where there is none, or one never acts."""
    runs = [path.parent for path in sorted(folder.rglob("result.json"))]
    check(bool(runs), f"{folder}: no finished run in it")
    with explain(f"cannot read the args.json of a run in {folder}"):
        saved = {run: json.loads((run / "args.json").read_text()) for run in runs}
        for run, own in saved.items():
            lacking = ", ".join(name for name in NEEDED if name not in own)
            check(not lacking, f"{run} lacks {lacking}: take it away")
    ids = {own["dataset_id"] for own in saved.values() if not own.get("random_steps") or "data_ratio" in own}
    check(len(ids) == 1, f"{folder}: runs on {' and '.join(sorted(ids)) or 'no dataset'}; it must be one dataset")
    default = load_dataset(*ids).env_id
    played = sorted({str(own.get("env_id") or default).rpartition(":")[2] for own in saved.values()})  # of module:Id
    check(len(played) == 1, f"{folder}: runs in {' and '.join(played)}; it must be one environment")
    dataset, first = load_dataset(*ids, *played), dict[tuple[str, int], Path]()
    for run, own in saved.items():
        other = first.setdefault((own["algorithm"], own["seed"]), run)
        check(other == run, f"{run} and {other} are of one script and seed: take one away")
    scored = dataset.reference_returns is not None
    parts = []
    for run, own in saved.items():
        acts = own.get("online_steps") or own.get("random_steps")
        check(bool(acts), f"{run}: a run that never acts; give it --online-steps, or take it away")
        with explain(str(run / "metrics.csv")):
            rows = pd.read_csv(run / "metrics.csv").dropna(subset="eval/return_mean")
        returns = rows["eval/return_mean"].to_numpy()
        values = dataset.score(returns) if scored else returns
        steps = [steps_of(own, row) for row in rows.to_dict("records")]
        parts.append(pd.DataFrame({"script": own["algorithm"], "seed": own["seed"], "steps": steps, "value": values}))
    found = pd.concat(parts).assign(dataset_id=dataset.dataset_id, env_id=played[0])
    found = found.assign(unit="score" if scored else "return").round({"value": 3})
    found = found[found["steps"] >= 0].sort_values(["script", "seed", "steps"])[COLUMNS]
    check(len(found) > 0, f"{folder}: no run was evaluated since it acts")
    return found


def read_table(path: Path) -> pd.DataFrame:
    """What an earlier command wrote. Raises BadInput for a file that is none of these."""
    with explain(str(path)):
        rows = pd.read_csv(path)[COLUMNS]
    check(len(rows[TASK].drop_duplicates()) == 1, f"{path}: it must be of one dataset, environment and unit")
    return rows


def with_earlier(found: pd.DataFrame, path: Path) -> pd.DataFrame:
    """And the rows that the file has of other scripts. Raises BadInput for another task, and where seeds would be lost,
    of which the file may be all that is left.
    """
    if not path.exists():
        return found
    earlier = read_table(path)
    tasks = [" ".join(rows[TASK].iloc[0]) for rows in (earlier, found)]
    check(tasks[0] == tasks[1], f"{path} has {tasks[0]}, the runs {tasks[1]}: name another --out")
    again = earlier[earlier["script"].isin(found["script"])]
    pairs = [set(rows[["script", "seed"]].itertuples(index=False, name=None)) for rows in (again, found)]
    lost = ", ".join(f"{script} {seed}" for script, seed in sorted(pairs[0] - pairs[1]))
    check(not lost, f"{path} has seeds that the folder lacks ({lost}): add them to it, or name another --out")
    return pd.concat([earlier.drop(again.index), found])


def value_at(run: pd.DataFrame, steps: int) -> float:
    """The mean in the tenth of the steps that ends at `steps` or else the value between, NaN beyond both ends."""
    near = run[(run["steps"] > 0.9 * steps) & (run["steps"] <= steps)]["value"]
    between = np.interp(steps, run["steps"], run["value"], left=np.nan, right=np.nan)
    return float(near.mean() if len(near) else between)


def table(rows: pd.DataFrame, at: tuple[int, ...], dip: int) -> str:
    """The highest at the end first."""
    lines = [f"| script | seeds | switch | lowest | {' | '.join(f'{steps:,}' for steps in at)} |"]
    lines += ["|" + "---|" * (4 + len(at))]
    ends = {}
    for script, own in rows.groupby("script"):
        first, early = own[own["steps"] == 0], own[(own["steps"] > 0) & (own["steps"] <= dip)]
        parts = [first["value"], early.groupby("seed")["value"].min() if len(first) else early["value"][:0]]
        parts += [own.groupby("seed")[["steps", "value"]].apply(value_at, steps).dropna() for steps in at]
        cells = [report.words([part.to_numpy()]) if len(part) else "-" for part in parts]
        last = own[own["steps"] > 0.9 * own["steps"].max()]["value"].mean()
        ends[str(script)] = (last, f"| `{script}` | {own['seed'].nunique()} | {' | '.join(cells)} |")
    return "\n".join([*lines, *(line for _, line in sorted(ends.values(), reverse=True))]) + "\n"


def over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """[steps, seeds], with the values between where seeds have episodes of different lengths."""
    table = rows.pivot_table("value", "steps", "seed")  # the mean where Cal-QL, which is ahead, is evaluated twice
    return table.interpolate("index", limit_area="inside").dropna()


def draw(all_rows: dict[str, pd.DataFrame], path: Path) -> None:
    """A panel per environment, the mean over seeds of each script, with the range of the seeds."""
    figure = Figure(figsize=(5.4 * len(all_rows), 3.6), layout="constrained")
    scripts = sorted(set().union(*(rows["script"] for rows in all_rows.values())))
    for axes, (name, rows) in zip(figure.subplots(1, len(all_rows), squeeze=False)[0], all_rows.items(), strict=True):
        for number, script in enumerate(scripts):
            own = over_seeds(rows[rows["script"] == script])
            if not len(own):
                continue
            axes.plot(own.mean(axis=1), color=f"C{number}", label=script, linewidth=1.4)
            low, high = own.min(axis=1), own.max(axis=1)
            axes.fill_between(own.index, low, high, color=f"C{number}", alpha=0.12, linewidth=0)
        axes.set(title=name, xlabel="steps in the environment", ylabel=rows["unit"].iloc[0])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    replace(path, lambda file: figure.savefig(file, dpi=90, format="png"))


def main(args: Args) -> None:
    check(bool(args.sources), "give a folder of runs, or a .csv of earlier ones")
    names = [source.resolve().name if source.is_dir() else source.stem for source in args.sources]
    check(len({*names}) == len(names), "two of the sources have one name, which is that of an environment")
    args.out.mkdir(parents=True, exist_ok=True)
    all_rows, page = {}, ""
    for name, source in zip(names, args.sources, strict=True):
        if source.is_dir():
            path = args.out / f"{name}.csv"
            rows = with_earlier(read_runs(source), path)
            replace(path, rows.to_csv(index=False).encode())
        else:
            rows = read_table(source)
        all_rows[name] = rows
        page += f"{name} ({rows['unit'].iloc[0]}s):\n\n{table(rows, args.at, args.dip)}\n"
    replace(args.out / "table.md", page.encode())
    draw(all_rows, args.out / "online.png")
    print(f"{page}{args.out / 'online.png'}")


if __name__ == "__main__":
    launch(main, Args)
