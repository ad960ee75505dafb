"""Commands of benchmarks/measurements that train much: what they keep, what they refuse, with nothing trained."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT, assert_one_line, run_script
from measurements import choices, compiling, estimates

from common.command_line import BadInput


@pytest.fixture
def judge(monkeypatch, tmp_path):
    """A function that measures the choice on cartpole, and says how many times select was asked."""
    asked, columns, commands = [], {"truth": 1.0}, []

    def program(name, *words):
        commands.append((name, *map(str, words)))
        if name == "select":
            policies = words[: words.index("--out")]
            asked.append(policies)
            table = pd.DataFrame({"policy": list(map(str, policies))}).assign(**columns)
            table.to_csv(Path(words[words.index("--out") + 1]) / "select.csv", index=False)

    def judged(out="out", **values):
        args = choices.Args(**{"repetitions": 1, "out": tmp_path / out, **values})
        rows = choices.measure("cartpole", args)
        return rows["policy"].tolist(), len(asked)

    monkeypatch.setattr(choices, "program", program)
    judged.columns, judged.commands = columns, commands
    return judged


def test_a_choice_is_judged_once_also_where_its_folder_was_moved(judge, tmp_path):
    names, count = judge(updates=(10, 20))
    assert len(names) == 8 and names[0] == "fqi/anchorl-cartpole-mixed-v0/0/policy-10.pt" and count == 1
    assert names[-1] == "discrete_iql/anchorl-cartpole-mixed-v0/0"
    shutil.move(tmp_path / "out", tmp_path / "moved")
    assert judge(out="moved", updates=(10, 20)) == (names, 1)


def test_each_repetition_has_its_own_seed_and_all_its_policies_are_kept(judge):
    names, count = judge(updates=(10, 15, 30), repetitions=2)
    (_, *grid), *choosing = judge.commands
    assert grid[grid.index("--eval-every") + 1] == "10" and grid[grid.index("--num-updates") + 1] == "30"
    assert "--keep-policies" in grid and grid[grid.index("--seeds") + 1] == "2"
    assert [words[words.index("--seed") + 1] for _, *words in choosing] == ["0", "1"] and count == 2
    assert [name.split("/")[2] for name in names] == ["0"] * 12 + ["1"] * 12


def test_the_page_has_the_table_of_the_choices():
    results = pd.read_csv(ROOT / "benchmarks" / "results" / "choices.csv")
    assert f"\n{choices.table(results)}\n\n" in (ROOT / "benchmarks" / "README.md").read_text()


def test_other_policies_are_another_choice(judge):
    judge(updates=(10, 20))
    with pytest.raises(BadInput, match="was judged with other arguments; name another folder"):
        judge(updates=(10, 15, 20))


def test_a_choice_that_was_stopped_is_judged_anew(judge, tmp_path):
    """After select told what it was asked, and before it wrote its table."""
    judge(updates=(10, 20))
    (tmp_path / "out" / "cartpole" / "choice-0" / "select.csv").unlink()
    assert judge(updates=(10, 15, 20))[1] == 2


def test_results_stay_where_nothing_could_be_played(judge, tmp_path):
    del judge.columns["truth"]
    results = tmp_path / "choices.csv"
    results.write_text("task,policy\nhopper,iql\n")
    with pytest.raises(BadInput, match="the policies could not be played, and there is no truth"):
        choices.main(choices.Args(("cartpole",), 1, out=tmp_path / "out", results=results))
    assert results.read_text() == "task,policy\nhopper,iql\n"


@pytest.fixture
def estimated(monkeypatch, tmp_path):
    """A function that gives fqe.py's results, by the policy's name, to the command, and reads its table."""

    def run_with(results):
        def run_cell(cell, args, environment):
            cell.folder.mkdir(parents=True)
            found = {"num_updates": 1, "interval": [0, 1], "true_return_std": 0.1} | results[cell.folder.parts[-3]]
            (cell.folder / "result.json").write_text(json.dumps(found))

        monkeypatch.setattr(estimates.run, "run_cell", run_cell)
        folder = tmp_path / "runs"
        estimates.main(estimates.Args(policies=tuple(results), seeds=(0,), results=folder / "x.csv", runs_dir=folder))
        return pd.read_csv(folder / "x.csv")

    return run_with


def test_small_returns_are_not_rounded_away(estimated, capsys):
    """The ranks of 0.01, 0.02 and 0.03 are those of 0.002, 0.004 and 0.003 but for the last two: correlation 0.5."""
    pairs = {"bc": (0.01, 0.002), "iql": (0.02, 0.004), "awr": (0.03, 0.003)}
    results = {name: {"estimate": one, "true_return_mean": other} for name, (one, other) in pairs.items()}
    table = estimated(results)
    assert [*zip(table["estimate"], table["true_return"], strict=True)] == [*pairs.values()]
    assert capsys.readouterr().out == "Spearman's rank correlation of 3 policies: 0.50\n"


def test_without_an_environment_nothing_is_compared(estimated):
    with pytest.raises(BadInput, match="names no environment: there is no true return"):
        estimated({"bc": {"estimate": 1.0, "true_return_mean": None, "true_return_std": None}})


def test_what_was_compiled_before_a_script_failed_is_kept(tmp_path, monkeypatch):
    def measured(args, algorithm, cache):
        if algorithm == "nope":
            raise BadInput("nope could not be measured")
        return {"first": 9.0, "eager": 2.0, "compiled": 1.0}

    monkeypatch.setattr(compiling, "measure_apart", measured)
    table = tmp_path / "rows.csv"
    with pytest.raises(BadInput, match="nope could not be measured"):
        compiling.main(compiling.Args(algorithms=("bc", "nope"), threads=1, csv=table))
    assert table.read_text().splitlines()[1:] == ["bc,1,2.0,1.0,9.0,9.0,9000,9000"]


@pytest.mark.parametrize(
    ("name", "words", "line"),
    [
        ("estimates", ["--seeds"], "--policies and --seeds: name one of each at least"),
        ("coverage", ["--simulations", "50"], "--simulations 50: must be a multiple of 100"),
        ("coverage", ["--simulations", "250"], "--simulations 250: must be a multiple of 100"),
        ("coverage", ["--seeds", "3", "1"], "--seeds: must be at least 2"),
        ("loading", ["--num-steps", "1500"], "--num-steps 1500: must be a multiple of 1,000"),
        ("memory", ["--num-steps", "500"], "--num-steps 500: must be a multiple of 1,000"),
        ("growth", ["--transitions", "1000", "2500"], "--transitions 1000 2500: must be multiples of 1,000"),
        ("compiling", ["--threads", "0"], "--rounds and --threads: must be at least 1"),
        ("evaluation", ["--env-id", "Nope-v0"], "--env-id Nope-v0: "),
        ("evaluation", ["--env-id", "CartPole-v1"], "CartPole-v1: observations and actions must be vectors"),
        ("expansion", ["--seeds"], "--seeds, --ages and --horizons: name one of each at least"),
        ("expansion", ["--ages", "0", "100"], "--ages 0 100: must be at least 1, each once"),
        ("expansion", ["--ages", "5", "5"], "--ages 5 5: must be at least 1, each once"),
        ("returns", ["--num-episodes", "0"], "--num-episodes, --episode-length and --observation-dim: must be at"),
        ("seeds", ["--num-seeds", "1", "0"], "--num-seeds, --rounds, --steps, --threads and --batch-size: must be at"),
        ("seeds", ["--threads", "0"], "--num-seeds, --rounds, --steps, --threads and --batch-size: must be at"),
        ("threads", ["--algorithms", "nope"], "--algorithms nope: there is no such script"),
    ],
)
def test_bad_input_is_one_line(name, words, line):
    assert_one_line(run_script(f"benchmarks.measurements.{name}", *words), line)
