"""What choosing a policy by the data alone costs, where the truth is known: the regret of benchmarks.select.

For each task, policies of several algorithms and numbers of updates are trained with as many seeds as there are
repetitions. Each repetition ranks those of one seed and plays them. `by default` is the last policy of IQL, or discrete
IQL, taken without any choice. What is done is not done again: stop the command, and give it again.

Run: python -m benchmarks.measurements.choices --tasks pendulum cartpole
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[1]))
from run import as_name
from scratch import replace
from selection import doubts, judge_choice

from common.command_line import check, launch

ROOT = Path(__file__).resolve().parents[2]


class Task(NamedTuple):
    """Data, what is trained on them, and how it is judged."""

    dataset_id: str
    algorithms: tuple[str, ...]
    updates: tuple[int, ...]  # whose policies are ranked; the last is the end
    training: tuple[str, ...] = ()  # arguments of the scripts
    judging: tuple[str, ...] = ()  # arguments of benchmarks.select


SMALL = "--num-updates", "5000", "--hidden-dims", "64", "64", "--tau", "0.1"
TASKS = {
    "pendulum": Task("anchorl/pendulum/mixed-v0", ("bc", "td3_bc", "iql", "awr", "sac_bc"), (1000, 5000), (), SMALL),
    "cartpole": Task(
        "anchorl/cartpole/mixed-v0",
        ("fqi", "discrete_cql", "discrete_bcq", "discrete_iql"),
        (1000, 2000, 5000),
        (),
        SMALL,
    ),
    "hopper": Task(
        "zoo/hopper/medium-expert-v0",
        ("bc", "bc --top-fraction 0.1", "td3_bc", "iql"),
        (10_000, 50_000),
        ("--compile",),
    ),
}


@dataclass
class Args:
    tasks: tuple[str, ...] = tuple(TASKS)
    """of pendulum, cartpole and hopper, whose dataset must be there"""
    repetitions: int = 3
    """seeds, each a choice of its own"""
    updates: tuple[int, ...] = ()
    """after how many updates to rank; default: each task's own"""
    num_updates: int | None = None
    """gradient steps of the networks that judge; default: each task's own"""
    eval_episodes: int = 200
    """episodes of a policy, for its true return"""
    out: Path = Path("runs/choices")
    """runs and choices go to <out>/<task>"""
    results: Path = ROOT / "benchmarks" / "results" / "choices.csv"
    """a row per task, repetition and policy; those of other tasks stay"""
    workers: int = 2
    """runs side by side, one thread each"""


def program(name: str, *arguments: str | Path) -> None:
    """Runs one of ours. Raises SystemExit if it fails."""
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *map(str, arguments)]
    if code := subprocess.run(command, cwd=ROOT).returncode:
        raise SystemExit(code)


def policies_of(task: Task, folder: Path, seed: int, updates: tuple[int, ...]) -> list[Path]:
    runs = [folder / as_name(algorithm) / as_name(task.dataset_id) / str(seed) for algorithm in task.algorithms]
    return [run / f"policy-{step}.pt" for run in runs for step in updates[:-1]] + runs


def measure(name: str, args: Args) -> pd.DataFrame:
    """A row per repetition and policy: estimates and truth."""
    task, folder = TASKS[name], args.out.resolve() / name
    updates = args.updates or task.updates
    training = "--num-updates", str(updates[-1]), "--eval-every", str(min(updates)), "--keep-policies", *task.training
    grid = "--datasets", task.dataset_id, "--seeds", str(args.repetitions), "--workers", str(args.workers)
    program("run", "--algorithms", *task.algorithms, *grid, "--out", folder, "--", *training)
    rows = []
    for seed in range(args.repetitions):
        choice = folder / f"choice-{seed}"
        own = () if args.num_updates is None else ("--num-updates", str(args.num_updates))
        judging = ["--truth", "--eval-episodes", str(args.eval_episodes), *task.judging, *own]
        policies, told = policies_of(task, folder, seed, updates), choice / "judging.txt"
        words = " ".join([*judging, *(str(path.relative_to(folder)) for path in policies)])
        if not (choice / "select.csv").is_file():
            choice.mkdir(parents=True, exist_ok=True)
            told.write_text(words)  # before what it tells of
            program("select", *policies, "--out", choice, "--seed", str(seed), *judging)
        same = told.is_file() and told.read_text() == words
        check(same, f"--out {args.out}: {choice} was judged with other arguments; name another folder")
        ranked = pd.read_csv(choice / "select.csv")
        check("truth" in ranked, f"{choice}: the policies could not be played, and there is no truth; delete it")
        parts = [Path(path).parts for path in ranked["policy"]]  # from where OUT was then
        ranked["policy"] = ["/".join(path[-4 if path[-1].endswith(".pt") else -3 :]) for path in parts]
        rows.append(ranked.assign(task=name, repetition=seed))
    return pd.concat(rows)


def judge(ranked: pd.DataFrame) -> pd.DataFrame:
    """What each estimator's choice of a repetition costs, and what no choice; and whether select refuses to choose."""
    last = ranked["policy"].str.contains("iql") & ~ranked["policy"].str.endswith(".pt")
    lost = float(ranked["truth"].max() - ranked["truth"][last].mean())
    judged = pd.concat([judge_choice(ranked), pd.DataFrame([{"estimator": "by default", "regret@1": lost}])])
    return judged.assign(refused=(judged["estimator"] == "lesser") & bool(doubts(ranked, "lesser")))


def table(results: pd.DataFrame) -> str:
    """Markdown: of each task and estimator what each repetition gave, in brackets where select refuses to choose."""
    lines = ["| task | estimate | regret@1 | regret@3 | rank correlation |", "|---|---|---|---|---|"]
    for task, own in results.groupby("task", sort=False):
        judged = pd.concat([judge(ranked.reset_index(drop=True)) for _, ranked in own.groupby("repetition")])
        for estimator, numbers in judged.groupby("estimator", sort=False):
            cells = []
            for name in ("regret@1", "regret@3", "rank correlation"):
                told = numbers.dropna(subset=name)
                values = [f"{round(value, 2):g}" for value in told[name]]
                pairs = zip(values, told["refused"], strict=True)
                cells.append(", ".join(f"({value})" if refused else value for value, refused in pairs))
            lines.append(f"| {task} | {estimator} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(args: Args) -> None:
    unknown = sorted({*args.tasks} - {*TASKS})
    check(not unknown and len(args.tasks) > 0, f"--tasks {' '.join(unknown)}: choose of {' '.join(TASKS)}")
    for name in args.tasks:
        kept = [pd.read_csv(args.results)] if args.results.is_file() else []
        others = [rows[rows["task"] != name] for rows in kept]
        table_of_all = pd.concat([*others, measure(name, args)])
        replace(args.results, table_of_all.to_csv(index=False, float_format="%.6g").encode())
    print(table(pd.read_csv(args.results)))


if __name__ == "__main__":
    launch(main, Args)
