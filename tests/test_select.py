"""select: the ranking, its doubts, and what the choice would have cost, from numbers whose answer is known."""

import itertools
import json
import math
import shutil
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, SHORT, assert_one_line, run_script, write_policy

from benchmarks import selection
from common.command_line import BUILT_IN_ID, BadInput


def estimate(value, std=0.1, seeds=(0.0, 0.0)):
    return {"estimate": value, "low": value - 2 * std, "high": value + 2 * std, "std": std, "seeds": list(seeds)}


def result(policies, data=0.0, **more):
    """What ope.py writes, of policies by name with their estimates."""
    told = {"dataset_id": "test/data-v0", "gamma": 0.9, "episodes": 10_000, "beta": "fitted", "temperature": 1.0}
    told |= {"log_likelihood": -0.5, "of_frequencies": -0.7}
    told |= {"data": {"return": estimate(data - 0.1), "fqe": estimate(data), "beyond": 0.0}, "policies": policies}
    return told | more


def three(**of_best):
    """Policies b, a, c by fqe; the estimates of b can be replaced."""
    best = {"fqe": estimate(3.0), "model": estimate(2.5), "wis": estimate(2.0), "ess": 20.0} | of_best
    return {
        "a": {"fqe": estimate(1.0), "model": estimate(1.2), "ess": 2.0},
        "b": best,
        "c": {"fqe": estimate(-1.0), "model": estimate(-1.0), "ess": 1.0},
    }


def test_the_ranking_and_the_odds_by_hand():
    policies = three(fqe=estimate(3.0, 0.3, [2.0, 4.0]))
    table = selection.table_of(result(policies, data=1.0), "fqe")
    assert table["policy"].tolist() == ["b", "a", "c"]
    error = math.hypot(0.3, math.sqrt(2.0))  # the deviation of 2 and 4
    assert table["fqe error"].iloc[0] == pytest.approx(error)
    odds = 0.5 * (1 + math.erf((3 - 1) / math.hypot(error, 0.1) / math.sqrt(2)))
    assert table["fqe beats data"].iloc[0] == pytest.approx(odds)
    wis = 0.5 * (1 + math.erf((2 - 0.9) / math.hypot(0.1, 0.1) / math.sqrt(2)))  # the recorded return is its baseline
    assert table["wis beats data"].iloc[0] == pytest.approx(wis)
    assert table["wis"].isna().tolist() == [False, True, True]


def test_what_cannot_be_told_from_the_best():
    table = selection.table_of(result(three()), "fqe")
    assert selection.as_good(table, "fqe") == ["b"]
    table = selection.table_of(result(three(fqe=estimate(1.2))), "fqe")
    assert selection.as_good(table, "fqe") == ["b", "a"]  # 0.2 apart, of errors 0.1 and 0.1: 0.23 is too little
    assert selection.as_good(selection.table_of(result(three(fqe=estimate(1.25))), "fqe"), "fqe") == ["b"]
    assert "cannot be ranked among each other by fqe: b, a" in selection.remarks(table, "fqe", result(three()))


def test_the_lesser_of_fqe_and_model():
    policies = three() | {"d": {"fqe": estimate(9.0, 5.0), "model": estimate(0.1, 0.2), "ess": 0.0}}
    told = result(policies, episodes=100)  # S is 0.1 sqrt(100) = 1
    table = selection.table_of(told, "lesser")
    assert table["policy"].tolist() == ["b", "a", "d", "c"] and table["apart"].tolist() == [False, False, True, False]
    assert table["lesser"].tolist() == [2.5, 1.0, 0.1, -1.0] and table["lesser error"].tolist() == [0.1, 0.1, 0.2, 0.1]
    assert table["lesser beats data"].iloc[2] == table["model beats data"].iloc[2] < table["fqe beats data"].iloc[2]
    assert "fqe and model are far apart, one is wrong: d" in selection.remarks(table, "lesser", told)
    assert selection.table_of(told, "fqe")["policy"].tolist() == ["d", "b", "a", "c"]
    for name in "ab":
        policies[name]["model"] = estimate(-5.0)
    table = selection.table_of(result(policies, episodes=100), "lesser")
    assert any("for most policies: one of the two is not up" in line for line in selection.doubts(table, "lesser"))


def test_fqe_and_model_are_apart_from_half_a_deviation_of_the_returns_on():
    """Which is the standard error of their mean times the root of the number of episodes: 0.1 sqrt(100)."""
    differ = {name: {"fqe": estimate(1.0), "model": estimate(1.0 - gap)} for name, gap in (("a", 0.4), ("b", -0.6))}
    table = selection.table_of(result(differ, episodes=100), "fqe").set_index("policy")
    assert table["apart"].to_dict() == {"a": False, "b": True}


def test_the_picture_is_not_as_wide_as_an_estimate_that_is_wrong():
    policies = three() | {"d": {"fqe": estimate(1e6, 1e5), "model": estimate(-50.0, 20.0)}}
    told = result(policies, episodes=100)
    low, high = selection.picture(selection.table_of(told, "lesser"), told).axes[0].get_xlim()
    assert -2 < low < -1.2 and 3.2 < high < 4  # c's least estimate is -1, b's largest 3, two errors are 0.2


def test_nothing_speaks_against_a_clear_choice():
    assert selection.doubts(selection.table_of(result(three()), "fqe"), "fqe") == []


@pytest.mark.parametrize(
    ("policies", "data", "line"),
    [
        (three(), 2.95, "the odds that the best beats the data are 0.64 by fqe"),
        (three(), 2.853, "the odds that the best beats the data are 0.85 by fqe"),
        (three(wis=estimate(-1.0)), 0.0, "wis puts the best below the data's own actions"),
        (three(model=estimate(-1.5)), 0.0, "model puts the best below the data's own actions"),
        (
            three(model=estimate(-1.5)) | {"c": {"fqe": estimate(-1.0), "model": estimate(2.0)}},
            0.0,
            "fqe and model rank against each other (rank correlation -1.00)",
        ),
    ],
)
def test_what_speaks_against_the_best(policies, data, line):
    assert line in selection.doubts(selection.table_of(result(policies, data), "fqe"), "fqe")


def test_ranks_that_hardly_agree_are_not_against_each_other():
    """4, 1, 3 and 2 of the model beside fqe's 1, 2, 3 and 4: a correlation of -0.4."""
    ranks = zip("abcd", (1, 2, 3, 4), (4, 1, 3, 2), strict=True)
    policies = {name: {"fqe": estimate(float(one)), "model": estimate(float(other))} for name, one, other in ranks}
    table = selection.table_of(result(policies), "fqe")
    assert selection.agreement(table, "fqe", "model") == pytest.approx(-0.4)
    assert not [line for line in selection.doubts(table, "fqe") if "against each other" in line]


def test_remarks():
    told = result(three())
    table = selection.table_of(told, "fqe")
    lines = selection.remarks(table, "fqe", told)
    assert "importance sampling has no say on 2 of 3: their effective samples are too small" in lines
    assert "rank correlation of fqe with model 1.00" in lines
    assert any("1.22 times as likely" in line for line in lines)  # exp(0.2)
    told["data"]["beyond"] = 0.25
    assert any(line.startswith("25% of the discount is beyond") for line in selection.remarks(table, "fqe", told))
    continuous = result(
        {name: {"fqe": each["fqe"], "model": each["model"]} for name, each in three().items()}, beta="none"
    )
    lines = selection.remarks(selection.table_of(continuous, "fqe"), "fqe", continuous)
    assert any("no importance sampling" in line for line in lines)


def test_regret_and_rank_correlation_by_hand():
    table = selection.table_of(result(three()), "fqe").assign(truth=[1.0, 2.0, 0.5])  # of b, a, c
    assert selection.regret(table, "fqe", 1) == 1.0 and selection.regret(table, "fqe", 2) == 0.0
    judged = selection.judge_choice(table).set_index("estimator")
    assert judged.index.tolist() == ["lesser", "fqe", "model", "by chance"]  # wis is not there of all
    assert judged.loc["lesser", "regret@1"] == 1.0
    assert judged.loc["fqe", "rank correlation"] == pytest.approx(0.5)
    assert judged.loc["by chance", "regret@1"] == pytest.approx(2 - 3.5 / 3)
    assert judged.loc["by chance", "regret@3"] == pytest.approx(0.0)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_the_regret_of_three_by_chance_is_that_of_all_draws(count):
    truth = np.random.default_rng(0).normal(size=count)
    draws = [max(draw) for draw in itertools.combinations(truth, min(3, count))]
    assert selection.chance_of_three(truth) == pytest.approx(truth.max() - np.mean(draws))


def test_an_estimator_that_some_lack_cannot_rank():
    with pytest.raises(
        BadInput, match=r"--by wis: there is no such estimate of a, c: the effective sample is too small"
    ):
        selection.table_of(result(three()), "wis")


def fake_ope(monkeypatch, told):
    asked = []

    class Ope:
        class Args:
            def __init__(self, **given):
                self.__dict__.update(given)

        def main(args):
            asked.append(vars(args))
            names = dict(zip(map(str, args.policies), told["policies"].values(), strict=True))
            args.out.write_text(json.dumps(told | {"policies": names}))

    monkeypatch.setattr(selection, "load_script", lambda name: Ope)
    return asked


def test_the_page_the_table_and_the_picture(tmp_path, monkeypatch, capsys):
    fake_ope(monkeypatch, result(three()))
    selection.main(selection.Args(tuple(tmp_path / name for name in "abc"), tmp_path / "out"))
    said = capsys.readouterr().out
    assert f"choose {tmp_path / 'b'}" in said and (tmp_path / "out" / "select.md").read_text() in said
    html = (tmp_path / "out" / "select.html").read_text()
    assert "data:image/png;base64" in html and "Which policy" in html and str(tmp_path / "b") in html
    assert (tmp_path / "out" / "select.png").stat().st_size > 10_000


def test_what_is_asked_of_the_choice_is_asked_of_the_estimates(tmp_path, monkeypatch):
    asked = fake_ope(monkeypatch, result(three()))
    more = {"gamma": 0.8, "num_updates": 7, "hidden_dims": (8,), "tau": 0.1, "seed": 3, "held_out": True}
    policies = tuple(tmp_path / name for name in "abc")
    selection.main(selection.Args(policies, tmp_path / "out", **more))
    assert asked == [more | {"policies": policies, "out": tmp_path / "out" / "ope.json", "script": None}]


def test_the_truth_is_the_discounted_return_beyond_the_time_limit(tmp_path, pendulum):
    """Of 0.97^t the thousandth is at step 227; a pendulum's episode ends at 200."""
    path = tmp_path / "policy"
    write_policy(path, action=0.5)
    args = selection.Args((path,), eval_episodes=3)
    found = selection.true_returns(args, (path,), {"gamma": 0.97, "dataset_id": BUILT_IN_ID})
    returns = []
    for episode in range(3):
        environment = gym.make("Pendulum-v1", max_episode_steps=227)
        environment.reset(seed=50_000 + episode)
        rewards = [environment.step(np.float32([1.0]))[1] for _ in range(227)]
        returns.append(sum(0.97**t * reward for t, reward in enumerate(rewards)))
    assert found == {str(path): pytest.approx(np.mean(returns), rel=1e-6)}


def test_the_choice_is_refused_in_words(tmp_path, monkeypatch, capsys):
    fake_ope(monkeypatch, result(three(), data=5.0))
    selection.main(selection.Args(tuple(tmp_path / name for name in "abc"), tmp_path / "out"))
    said = capsys.readouterr().out
    assert (
        "- cannot choose: the odds that the best beats the data are 0.00 by lesser" in said and "- choose" not in said
    )


def test_kept_policies_come_in_the_order_of_their_updates(tmp_path):
    """The last is kept twice, and counts once."""
    for name in ("policy-900.pt", "policy-1000.pt", "policy-2000.pt", "policy-best.pt"):  # one is a user's copy
        (tmp_path / name).write_text(name)
    shutil.copy(tmp_path / "policy-2000.pt", tmp_path / "policy.pt")
    found = selection.find_policies(selection.Args((tmp_path,), kept=True))
    assert found == (tmp_path / "policy-900.pt", tmp_path / "policy-1000.pt", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["runs/a"], "there is nothing to choose from: name two runs or more, or give --kept"),
        (["runs/a", "runs/a"], "a policy is named twice"),
        (["runs/a", "runs/b"], "no policy at runs/a/policy.pt: give the folder of a run that has saved a checkpoint"),
        (["runs/a", "runs/b", "--top", "0"], "--top and --eval-episodes must be at least 1"),
        (["runs/a", "runs/b", "--gamma", "1"], "--gamma 1.0: must be in (0, 1), or 0 for that of the runs"),
        (["runs/a", "runs/b", "--gamma", "-0.9"], "--gamma -0.9: must be in (0, 1), or 0 for that of the runs"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, line):
    run = run_script("benchmarks.select", *arguments, "--out", str(tmp_path / "out"))
    assert run.returncode == 2 and run.stderr == f"error: {line}\n"


def test_two_runs_of_cartpole_are_ranked_beside_their_truth(tmp_path):
    for script, gamma in (("fqi", "0.99"), ("discrete_cql", "1")):
        words = ["--gamma", gamma, "--num-updates", "200", "--hidden-dims", "16", "--run-dir", str(tmp_path / script)]
        run = run_script(script, *SHORT, *words)
        assert run.returncode == 0, run.stderr
    small = ["--gamma", "0.9", "--num-updates", "30", "--hidden-dims", "16", "--eval-episodes", "2"]
    paths = [str(tmp_path / name) for name in ("fqi", "discrete_cql")]
    run = run_script("benchmarks.select", *paths, "--out", str(tmp_path / "out"), "--truth", *small)
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "out" / "ope.json").read_text())["gamma"] == 0.9
    assert "| by chance |" in run.stdout and "truth" in run.stdout
    written = json.loads((tmp_path / "out" / "ope.json").read_text())
    assert {*written["policies"]} == {*paths}


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (
            ["--by", "wis"],
            "--by wis: actions are continuous, and the policies act without noise: rank by lesser, fqe or",
        ),
        (["--truth", "--env-id", "Typo-v0"], "environment 'Typo-v0' cannot be made"),
        (["--truth", "--env-id", "MountainCarContinuous-v0"], "Continuous-v0 has 2 observed numbers"),
    ],
)
def test_what_needs_no_fit_is_refused_before(tmp_path, more, line, pendulum):
    paths = [str(tmp_path / name) for name in ("a", "b")]
    for path in paths:
        assert run_script("bc", "--num-updates", "1", *SHORT, "--run-dir", path).returncode == 0
    assert_one_line(run_script("benchmarks.select", *paths, *more, "--out", str(tmp_path / "out")), line)
    assert not (tmp_path / "out" / "ope.json").exists()


def test_a_script_that_is_run_by_its_path_finds_pythons_own_select():
    """benchmarks/select.py has its name, and lies first on the path then."""
    code = "import select, selectors, subprocess; print(select.select, selectors.DefaultSelector)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "benchmarks", capture_output=True, text=True)
    assert run.returncode == 0 and "built-in function select" in run.stdout, run.stderr


def test_the_table_in_words_has_what_there_is():
    table = selection.table_of(result(three()), "fqe")
    words = selection.shown(table, "fqe")
    assert words.columns.tolist() == ["", "policy", "fqe", "model", "wis", "beats data", "ESS"]
    assert words["wis"].tolist() == ["2 +- 0.1", "", ""] and isinstance(words, pd.DataFrame)
