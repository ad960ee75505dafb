"""Which of several trained policies to take, and whether any beats what was done so far: from the data alone.

algorithms/ope.py estimates each policy's discounted return; here they are ranked by one estimate, `lesser` unless --by
says otherwise, and doubted. Of an estimate J, s is its standard error: that of the bootstrap over episodes and the
deviation between networks of different seeds, as the root of the sum of their squares.

    lesser          the smaller one of fitted Q evaluation and the model: either may believe in what the data never
                    show, and a choice of the best finds such beliefs; both seldom believe too much of the same policy
    apart           policies whose fqe and model differ by more than half of S, the deviation of the recorded returns:
                    one of the two extrapolates
    beats data      Phi((J - J_data) / sqrt(s^2 + s_data^2)): the odds that the policy earns more than the data's own
                    actions, J_data by fitted Q evaluation, too (by the recorded returns for is and wis)
    as good         policies whose J is within 1.64 sqrt(s^2 + s_best^2) of the best: they cannot be ranked
    agree           Spearman's correlation of two estimators' ranks, of the policies that have both

The choice is refused where the best does not beat the data with odds of 0.9, where another estimator puts it below
them, where fqe and model rank the opposite way (below -0.5), and where they are apart for most policies. This knows
nothing of errors that the networks share: where a policy does what the data never show, any estimate is a guess (see
benchmarks.shift_report). `--kept` ranks the policies that a run kept (--keep-policies), too: when to have stopped.

With --truth the policies are played, if the dataset names an environment: regret@k is what the best of all earns more
than the best of the first k. OUT gets select.md, select.html, select.png, the table as select.csv, and ope.json.

Run: python -m benchmarks.select runs/iql runs/bc --out runs/select
"""

import base64
import json
import math
import sys
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parent))
from report import STYLE, markdown
from scratch import replace

from common.command_line import BadInput, check, check_argument, explain, warn
from common.data import load_dataset
from common.evaluation import evaluate, load_policy, load_script, make_environments

Estimator = Literal["lesser", "fqe", "model", "wdr", "wis", "is"]
ESTIMATORS: tuple[Estimator, ...] = ("lesser", "fqe", "model", "wdr", "wis", "is")

WEIGHTED = "wdr", "wis", "is"  # by importance sampling, of actions with probabilities


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run folders, or policies in them: runs/iql/policy-5000.pt"""
    out: Path = Path("runs/select")
    """folder for the page, the picture and the numbers"""
    by: Estimator = "lesser"
    """the estimate to rank by; lesser is the smaller one of fqe and model"""
    top: int = 3
    """how many to name"""
    kept: bool = False
    """rank the policies that the runs kept, too"""
    held_out: bool = False
    """judge by the episodes alone that the runs held out of training"""
    truth: bool = False
    """play the policies in the environment, and say what the choice would have cost"""
    env_id: str | None = None
    """environment of --truth; module:Id imports yours; default: the one the data name"""
    eval_episodes: int = 200
    """episodes of --truth"""
    script: Path | None = None
    """path of the script that trained the policies, if it is not in algorithms/"""
    gamma: float = 0.0
    """discount; 0: that of the runs"""
    num_updates: int = 10_000
    """gradient steps of each network that ope.py fits"""
    hidden_dims: tuple[int, ...] = (256, 256)
    """their hidden layers"""
    tau: float = 0.05
    """rate at which their targets follow"""
    seed: int = 0
    """of networks, batches and draws"""


def find_policies(args: Args) -> tuple[Path, ...]:
    """The folders that are named and, with --kept, the policies kept in them, in the order of their updates."""
    found: list[Path] = []
    for path in args.runs:
        kept = path.glob("policy-*.pt") if args.kept and path.is_dir() else ()
        numbers = {file: file.stem.rpartition("-")[2] for file in kept}  # of updates, but for a file of the user's own
        files = sorted(filter(lambda file: numbers[file].isdecimal(), numbers), key=lambda file: int(numbers[file]))
        last = path / "policy.pt"  # often kept once more, as the policy of its update
        found += [file for file in files if not last.is_file() or file.read_bytes() != last.read_bytes()] + [path]
    check(len(found) > 1, "there is nothing to choose from: name two runs or more, or give --kept")
    check(len({*found}) == len(found), "a policy is named twice")
    return tuple(found)


def standard_error(found: dict[str, Any]) -> float:
    """Of an estimate: that of the episodes, and the deviation between seeds."""
    seeds = found.get("seeds", [0.0, 0.0])
    return math.hypot(found["std"], float(np.std(seeds, ddof=1)))


def table_of(result: dict[str, Any], by: Estimator) -> pd.DataFrame:
    """A row per policy, the best first: estimates, their standard errors, and the odds of beating the data."""
    data, rows = result["data"], []
    for name, found in result["policies"].items():
        row: dict[str, Any] = {"policy": name, "ess": found.get("ess", math.nan)}
        for estimator in ESTIMATORS[1:]:
            own = found.get(estimator)
            row[estimator] = own["estimate"] if own else math.nan
            row[f"{estimator} error"] = standard_error(own) if own else math.nan
            baseline = data["return" if estimator in ("is", "wis") else "fqe"]
            gap = row[estimator] - baseline["estimate"]
            error = math.hypot(row[f"{estimator} error"], standard_error(baseline))
            row[f"{estimator} beats data"] = float(stats.norm.cdf(gap / max(error, 1e-12)))
        row["apart"] = abs(row["fqe"] - row["model"]) > 0.5 * data["return"]["std"] * math.sqrt(result["episodes"])
        rows.append(row)
    table = pd.DataFrame(rows)
    for column in ("", " error", " beats data"):
        table[f"lesser{column}"] = table[f"model{column}"].where(table["model"] < table["fqe"], table[f"fqe{column}"])
    lacking = ", ".join(table["policy"][table[by].isna()])
    advice = "the effective sample is too small, or actions are continuous: rank by lesser, fqe or model"
    check(not lacking, f"--by {by}: there is no such estimate of {lacking}: {advice}")
    return table.sort_values(by, ascending=False, kind="stable").reset_index(drop=True)


def as_good(table: pd.DataFrame, by: Estimator) -> list[str]:
    """The policies that cannot be told from the best by the estimator."""
    error = np.hypot(table[f"{by} error"], table[f"{by} error"].iloc[0])
    within = table[by].iloc[0] - table[by] <= 1.64 * error
    return table["policy"][within | (table.index == 0)].tolist()


def agreement(table: pd.DataFrame, one: str, other: str) -> float:
    """Spearman's rank correlation of two columns; NaN with fewer than three policies that have both."""
    both = table[[one, other]].dropna()
    if len(both) < 3 or both.nunique().min() < 2:
        return math.nan
    return float(stats.spearmanr(both[one], both[other]).statistic)


def doubts(table: pd.DataFrame, by: Estimator) -> list[str]:
    """What speaks against taking the first of the table, a line each; none, if nothing does."""
    best, found = table.iloc[0], []
    if best[f"{by} beats data"] < 0.9:
        found.append(f"the odds that the best beats the data are {best[f'{by} beats data']:.2f} by {by}")
    for other in ESTIMATORS:
        if other != by and best[f"{other} beats data"] < 0.5:  # NaN is not
            found.append(f"{other} puts the best below the data's own actions")
    correlation = agreement(table, "fqe", "model")
    if correlation < -0.5:
        found.append(f"fqe and model rank against each other (rank correlation {correlation:.2f})")
    if table["apart"].mean() > 0.5:
        found.append("fqe and model are far apart for most policies: one of the two is not up to the task")
    return found


def remarks(table: pd.DataFrame, by: Estimator, result: dict[str, Any]) -> list[str]:
    """What to know of the numbers, a line each."""
    lines, equal = [], as_good(table, by)
    if table["apart"].any():
        lines.append(f"fqe and model are far apart, one is wrong: {', '.join(table['policy'][table['apart']])}")
    if len(equal) > 1:
        lines.append(f"cannot be ranked among each other by {by}: {', '.join(equal)}")
    if result["beta"] == "none":
        lines.append("actions are continuous, and the policies act without noise: no importance sampling")
    elif (few := int(table["wis"].isna().sum())) > 0:
        lines.append(f"importance sampling has no say on {few} of {len(table)}: their effective samples are too small")
    if "log_likelihood" in result:
        gain = result["log_likelihood"] - result["of_frequencies"]
        lines.append(
            f"what chose the data's actions is {result['beta']}: by the fit an action is {math.exp(gain):.2f} times as "
            f"likely as by their frequencies alone; its temperature is {result['temperature']:.2f}"
        )
    found = {other: agreement(table, by, other) for other in ESTIMATORS[1:] if other != by}
    agree = ", ".join(f"{other} {value:.2f}" for other, value in found.items() if not math.isnan(value))
    lines += [f"rank correlation of {by} with {agree}"] if agree else []
    if (beyond := result["data"]["beyond"]) > 0.05:
        lines.append(
            f"{beyond:.0%} of the discount is beyond the cuts of the data's episodes: return, is and wis miss it"
        )
    return lines


# --- Truth ----------------------------------------------------------------------------------------------------------


def true_returns(args: Args, policies: tuple[Path, ...], result: dict[str, Any]) -> dict[str, float]:
    """Discounted returns, the mean of the episodes, played until gamma^t < 0.001: estimates know of no time limit."""
    gamma, found = result["gamma"], {}
    dataset = load_dataset(result["dataset_id"], args.env_id, discrete=None)
    try:
        environments = make_environments(dataset, min(20, args.eval_episodes))
    except BadInput as reason:
        check(args.env_id is None, f"--env-id: {reason}")
        warn(f"there is no truth to compare with: {reason}")
        return {}
    for environment in environments:
        environment.set_wrapper_attr("_max_episode_steps", math.ceil(math.log(0.001) / math.log(gamma)))
    for path in policies:
        policy = load_policy(path, args.script)
        found[str(path)] = float(evaluate(policy, environments, args.eval_episodes, 50_000, gamma)[0].mean())
    return found


def regret(table: pd.DataFrame, by: Estimator, count: int) -> float:
    """What the best of all policies truly earns more than the best of the first `count` by the estimator."""
    first = table.dropna(subset=by).sort_values(by, ascending=False, kind="stable").head(count)
    return float(table["truth"].max() - first["truth"].max())


def judge_choice(table: pd.DataFrame) -> pd.DataFrame:
    """Regret and rank correlation of each estimator that all policies have, and of a choice by chance."""
    rows: list[dict[str, Any]] = []
    for by in ESTIMATORS:
        if table[by].notna().all():
            own = {"estimator": by, "regret@1": regret(table, by, 1), "regret@3": regret(table, by, 3)}
            rows.append(own | {"rank correlation": agreement(table, by, "truth")})
    chance = {"estimator": "by chance", "regret@1": float(table["truth"].max() - table["truth"].mean())}
    return pd.DataFrame(
        [*rows, chance | {"regret@3": chance_of_three(table["truth"].to_numpy()), "rank correlation": 0.0}]
    )


def chance_of_three(truth: np.ndarray) -> float:
    """The expected regret of the best of three policies drawn without replacement: all draws of three."""
    ordered, count = np.sort(truth), len(truth)
    size = min(3, count)
    weights = [math.comb(index, size - 1) / math.comb(count, size) for index in range(count)]  # that it is the highest
    return float(ordered[-1] - np.dot(weights, ordered))


# --- Page -----------------------------------------------------------------------------------------------------------


def shown(table: pd.DataFrame, by: Estimator) -> pd.DataFrame:
    """The table in words."""
    columns: dict[str, Any] = {"": table.index + 1, "policy": table["policy"]}
    for name in ESTIMATORS[1:]:
        if table[name].notna().any():
            cells = zip(table[name], table[f"{name} error"], strict=True)
            columns[name] = ["" if math.isnan(value) else f"{value:.3g} +- {error:.2g}" for value, error in cells]
    columns["beats data"] = [f"{odds:.2f}" for odds in table[f"{by} beats data"]]
    if table["ess"].notna().any():
        columns["ESS"] = [f"{value:.1f}" for value in table["ess"]]
    if "truth" in table:
        columns["truth"] = [f"{value:.3g}" for value in table["truth"]]
    return pd.DataFrame(columns)


def picture(table: pd.DataFrame, result: dict[str, Any]) -> Figure:
    """Estimates of each policy, with two standard errors, and those of the data as bands."""
    figure = Figure(figsize=(9, 1.5 + 0.5 * len(table)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(table))
    for index, name in enumerate(ESTIMATORS[1:]):
        if table[name].notna().any():
            shift = places + 0.15 * (index - 2)
            axes.errorbar(table[name], shift, xerr=2 * table[f"{name} error"], fmt="o", markersize=4, label=name)
    baseline = result["data"]["fqe"]
    low, high = (baseline["estimate"] + sign * 2 * standard_error(baseline) for sign in (-1, 1))
    axes.axvspan(low, high, color="black", alpha=0.12, label="the data's own actions, fqe")
    axes.axvline(result["data"]["return"]["estimate"], color="black", linestyle="--", linewidth=1, label="recorded")
    if "truth" in table:
        axes.plot(table["truth"], places, "k*", markersize=10, label="truth")
    axes.set(yticks=places, yticklabels=table["policy"], xlabel=f"return, discounted by {result['gamma']:g}")
    clear = table[~table["apart"]]  # the estimates of the others may be anywhere, and are cut off
    told = [clear[name] + sign * 2 * clear[f"{name} error"] for name in ESTIMATORS for sign in (-1, 1)]
    ends = [low, high, *told, table.get("truth", [])]
    least, most = (bound(np.hstack(ends)) for bound in (np.nanmin, np.nanmax))
    axes.set_xlim(least - 0.05 * (most - least), most + 0.05 * (most - least))
    axes.set_title(f"{result['dataset_id']}, {result['episodes']} episodes; two standard errors")
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def page(text: list[str], tables: list[pd.DataFrame], image: bytes) -> str:
    """One file of HTML that needs no other."""
    body = "".join(f"<p>{escape(line)}</p>" for line in text)
    body += "".join(table.to_html(index=False, border=0) for table in tables)
    body += f'<img alt="estimates" src="data:image/png;base64,{base64.b64encode(image).decode()}">'
    body += f"<pre>{escape((__doc__ or '').split('Run:')[0].strip())}</pre>"
    head = f'<meta charset="utf-8"><title>AnchoRL: which policy</title><style>{STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body><h1>Which policy</h1>{body}</body></html>\n"


def main(args: Args) -> None:
    check(args.top >= 1 and args.eval_episodes >= 1, "--top and --eval-episodes must be at least 1")
    check_argument(args, "gamma", 0 <= args.gamma < 1, "must be in (0, 1), or 0 for that of the runs")
    policies = find_policies(args)
    with explain(f"--out {args.out}: cannot be made"):
        args.out.mkdir(parents=True, exist_ok=True)
    ope: Any = load_script("ope")
    names = "held_out", "script", "gamma", "num_updates", "hidden_dims", "tau", "seed"
    of_ope = ope.Args(policies=policies, out=args.out / "ope.json", **{name: getattr(args, name) for name in names})
    if args.by in WEIGHTED:  # what is refused without a fit is refused before
        continuous = f"--by {args.by}: actions are continuous, and the policies act without noise"
        check(load_policy(policies[0], args.script).discrete, f"{continuous}: rank by lesser, fqe or model")
    if args.truth and args.env_id:
        run, _ = ope.read_runs(of_ope)
        make_environments(load_dataset(run["dataset_id"], args.env_id, discrete=None), 1)
    ope.main(of_ope)
    result = json.loads((args.out / "ope.json").read_text())
    table = table_of(result, args.by)
    if args.truth:
        truth = true_returns(args, policies, result)
        table = table.assign(truth=table["policy"].map(truth)) if truth else table
    against = doubts(table, args.by)
    first = ", ".join(table["policy"].head(args.top))
    text = [f"cannot choose: {line}" for line in against] or [f"choose {table['policy'].iloc[0]}"]
    text += [f"the first {min(args.top, len(table))} by {args.by}: {first}", *remarks(table, args.by, result)]
    tables = [shown(table, args.by)]
    if "truth" in table:
        judged = judge_choice(table)
        tables.append(judged.map(lambda cell: cell if isinstance(cell, str) else f"{cell:.3g}"))
    words = "\n\n".join([*map(markdown, tables), "\n".join(f"- {line}" for line in text)]) + "\n"
    print(f"\n{words}", end="")
    picture_path = args.out / "select.png"
    replace(picture_path, partial(picture(table, result).savefig, dpi=130, format="png"))
    replace(args.out / "select.md", words.encode())
    replace(args.out / "select.csv", table.to_csv(index=False).encode())
    replace(args.out / "select.html", page(text, tables, picture_path.read_bytes()).encode())
    print(f"page: {args.out / 'select.html'}")
