"""How far Q has come: what the data earned, what is expected of the updates, and the share, each by hand."""

import csv
import json
from statistics import mean

import numpy as np
import pytest
from conftest import ROOT, SHORT, SHORTER, random_episode, run_script
from measurements import pace
from trained_run import load_run

from common.command_line import BadInput

GAMMA = 0.9


@pytest.fixture
def rewards():
    return np.array([1.0, 2.0, 4.0]), np.array([3.0, -1.0, 5.0, 1.0])


@pytest.fixture
def trained(make_dataset, tmp_path, rewards):
    """A function that trains a script for ten updates on two episodes: the first one ends, the second is cut."""
    ended = np.array([False, False, True])
    episodes = [
        random_episode(0, 3, rewards=rewards[0], terminations=ended, truncations=~ended & ended),
        random_episode(1, 4, rewards=rewards[1]),
    ]
    dataset_id = make_dataset(episodes=episodes)

    def train(algorithm, *words):
        folder = tmp_path / algorithm
        discount = ["--gamma", str(GAMMA)] if algorithm != "bc" else []
        common = ["--dataset-id", dataset_id, "--num-updates", "10", "--log-every", "5", "--run-dir", str(folder)]
        run = run_script(algorithm, *SHORT, *common, *discount, *words)
        assert run.returncode == 0, run.stderr
        return folder

    return train


def returns_by_hand(rewards, beyond):
    """The mean of sum_k gamma^k r_{t+k} over all steps; `beyond` is what comes after each episode's last step."""
    sums = []
    for column, after in zip(rewards, beyond, strict=True):
        for t in range(len(column)):
            rest = column[t:]
            sums.append(sum(GAMMA**k * reward for k, reward in enumerate(rest)) + GAMMA ** len(rest) * after)
    return np.mean(sums)


def expected_by_hand(tau, steps):
    """Of a state that leads to itself with reward 1 - gamma, whose value is 1, when Q equals its target throughout."""
    target_q = 0.0
    for _ in range(steps):
        q = (1 - GAMMA) + GAMMA * target_q
        target_q += tau * (q - target_q)
    return target_q


@pytest.mark.parametrize(("algorithm", "every"), [("td3_bc", 2), ("awac", 1)])
def test_expected_and_share(trained, rewards, tmp_path, algorithm, every):
    folder = trained(algorithm, "--tau", "0.1")
    pace.main(pace.Args((folder,), (5, 10, 15), tmp_path / "pace.csv"))
    with (tmp_path / "pace.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["update"]) for row in rows] == [5, 10]  # there is no fifteenth
    with (folder / "metrics.csv").open() as file:
        q = {int(row["step"]): float(row["critic/q"]) for row in csv.DictReader(file)}
    earned = returns_by_hand(rewards, [0, rewards[1].mean() / (1 - GAMMA)])
    for row in rows:
        update = int(row["update"])
        assert float(row["expected"]) == pytest.approx(expected_by_hand(0.1, update // every))
        assert float(row["share"]) == pytest.approx(q[update] / earned, rel=1e-5)


def test_rewards_are_those_that_are_learned_from(trained, rewards):
    folder = trained("iql", "--reward-scale", "2", "--reward-shift", "0.5")
    learned = [2 * (column + 0.5) for column in rewards]
    expected = returns_by_hand(learned, [0, learned[1].mean() / (1 - GAMMA)])
    assert pace.mean_return(load_run(folder)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("algorithm", ["mopo", "morel", "naf"])
def test_q_of_what_a_model_made_up_is_refused(trained, algorithm):
    with pytest.raises(BadInput, match=f"the Q that {algorithm} logs is not of the data's actions alone"):
        pace.follow(trained(algorithm, *SHORTER[algorithm]), (5,))


def test_q_of_steps_online_is_left_out(trained):
    folder = trained("iql", "--online-steps", "10", "--env-id", "Pendulum-v1")
    assert [row[5] for row in pace.follow(folder, (5, 10, 15, 20))] == [5, 10]


def test_a_run_in_an_environment_of_a_module_needs_none(trained):
    folder = trained("iql")
    saved = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(saved | {"env_id": "nobodys_module:Walk-v0"}))
    assert len(pace.follow(folder, (5, 10))) == 2


def test_what_cannot_be_asked(trained, tmp_path):
    with pytest.raises(BadInput, match="bc has no Q that follows a target"):
        pace.follow(trained("bc"), (5,))
    folder = trained("awac")
    with pytest.raises(BadInput, match=r"--at 7: .*metrics.csv has no Q there; it has one every 5"):
        pace.follow(folder, (5, 7))
    with pytest.raises(BadInput, match=r"--at: .*awac ended before, at update 10"):
        pace.follow(folder, (11, 20))
    with pytest.raises(BadInput, match=r"--csv .*: there is no folder .*none"):
        pace.main(pace.Args((folder,), csv=tmp_path / "none" / "rows.csv"))
    with pytest.raises(BadInput, match="give the folder of a run"):
        pace.main(pace.Args(()))


@pytest.mark.parametrize("rewards", [(np.zeros(3), np.zeros(4))])
def test_data_without_rewards_have_no_share(trained, rewards):
    with pytest.raises(BadInput, match="the mean return-to-go of its data is 0"):
        pace.follow(trained("awac"), (5,))


def test_without_a_discount_there_is_no_pace(trained):
    with pytest.raises(BadInput, match="--gamma 1 has no pace"):
        pace.follow(trained("iql", "--gamma", "1"), (5,))


GUIDE, RESULTS = (ROOT / "algorithms" / "README.md").read_text(), ROOT / "benchmarks" / "results"
DATASETS = [f"zoo/{task}/medium-expert-v0" for task in ("hopper", "walker2d", "halfcheetah")]


def test_the_results_have_the_pace_that_was_measured():
    with (RESULTS / "pace.csv").open() as file:
        rows = list(csv.DictReader(file))
    settings = {(row["algorithm"], row["gamma"], row["tau"]) for row in rows}
    assert {("td3_bc", "0.99", "0.005"), ("td3_bc", "0.99", "0.02"), ("iql", "0.99", "0.005")} <= settings
    for algorithm, gamma, tau in settings:
        own = [row for row in rows if (row["algorithm"], row["gamma"], row["tau"]) == (algorithm, gamma, tau)]
        given = "".join(
            f" --{name} {value}"
            for name, value, default in (("tau", tau, "0.005"), ("gamma", gamma, "0.99"))
            if value != default
        )
        lines = [f"| `{algorithm}{given}`, expected |" + cells(own[:5], "expected")]
        for dataset_id in DATASETS:
            of_it = [row for row in own if row["dataset_id"] == dataset_id]
            assert len(of_it) == 15  # five updates of three seeds
            shares = [{"share": mean(float(row["share"]) for row in of_it[i::5])} for i in range(5)]
            lines.append(f"| {dataset_id.split('/')[1]} |" + cells(shares, "share"))
        assert "\n".join(lines) in (RESULTS / "README.md").read_text()


def cells(rows, name):
    return "".join(f" {float(row[name]):.2f} |" for row in rows)


@pytest.mark.parametrize(
    ("algorithm", "label"),
    [
        ("td3_bc", "float32, the default"),
        ("td3_bc --precision bf16", "bf16"),
        ("td3_bc --tau 0.02 --precision bf16", "`--tau 0.02`"),
        ("td3_bc --gamma 0.997 --precision bf16", "`--gamma 0.997`"),
        ("td3_bc --tau 0.02 --gamma 0.997 --precision bf16", "both"),
        ("td3_bc --alpha 0.5 --precision bf16", "`--alpha 0.5`"),
        ("fql --alpha 0.3 --precision bf16", "0.3"),
        ("fql", "1, in float32"),
        ("fql --alpha 3 --precision bf16", "3"),
        ("fql --alpha 10 --precision bf16", "10"),
    ],
)
def test_the_guide_has_the_scores_of_the_studies(algorithm, label):
    with (RESULTS / "medium-expert-50k" / "results.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["algorithm"] == algorithm]
    line = f"| {label} |"
    for dataset_id in DATASETS:
        scores = sorted(float(row["final_score"]) for row in rows if row["dataset_id"] == dataset_id)
        assert len(scores) == 3
        line += f" {mean(scores):.1f} [{', '.join(f'{score:.1f}' for score in scores)}] |"
    assert line in GUIDE
