"""The report on a learned model: linear systems, whose errors and spread NumPy can say, and runs of both scripts."""

import csv
import importlib
import math
import re
import shutil
from types import SimpleNamespace

import gymnasium as gym
import model_measures as measures
import numpy as np
import pytest
import torch
from conftest import MODEL, ROOT, SHORT, SHORTER, assert_one_line, checkpoint, random_episode, run_script
from matplotlib.image import imread
from model_measures import Forecast, Model, Starts

from benchmarks.model_report import Row, choose_starts, compare, load_model, table, verdicts
from common.command_line import BUILT_IN_ID
from common.data import Batch

A, B = np.array([[1.0, 0.2], [-0.2, 0.9]]), np.array([[0.1], [0.5]])  # s' = A s + B a, r = the sum of s
STEPS = {1, 2, 5, 10}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Linear:
    """The model of each member: that system with a drift [members, 2] in every step, and a deviation of z."""

    def __init__(self, drift, std=0.0, logit=-100.0):
        self.drift, self.std, self.logit = torch.tensor(drift, dtype=torch.float32), std, logit

    def predict(self, states, actions):
        a, b = torch.tensor(A, dtype=torch.float32), torch.tensor(B, dtype=torch.float32)
        change = states @ a.T + actions @ b.T - states + self.drift[:, None]
        mean = torch.cat([change, states.sum(dim=-1, keepdim=True)], dim=-1)
        return mean, torch.full_like(mean, self.std), torch.full(mean.shape[:-1], self.logit)


def model_of(*arguments, ends=lambda states, logits: logits > 0):
    elites = Linear(*arguments)
    return Model(elites, elites, len(elites.drift), ends, "never", None)


def linear_data(episodes=20, length=30, noise=0.0):
    """Transitions of the system itself, and the lengths of its episodes."""
    rng = np.random.default_rng(1)
    rows = []
    for _ in range(episodes):
        s = rng.normal(size=2)
        for _ in range(length):
            a = rng.uniform(-1, 1, size=1)
            r, following = s.sum() + noise * rng.normal(), A @ s + B @ a + noise * rng.normal(size=2)
            rows.append((s, a, r, following, 0.0))
            s = following
    columns = [torch.tensor(np.array(column), dtype=torch.float32) for column in zip(*rows, strict=True)]
    return Batch(*columns), torch.full((episodes,), length)


def run_on(data, lengths):
    """What `compare` asks of a run."""
    dataset = SimpleNamespace(observation_names=["x", "y"])
    normalization = torch.tensor([[5.0, 5.0], [10.0, 100.0]], dtype=torch.float64)
    buffer = SimpleNamespace(transitions=data, episode_lengths=lengths, dataset=dataset, normalization=normalization)
    return SimpleNamespace(buffer=buffer, reward_scale=1.0)


def report_on(model, data, lengths, num_samples=100, steps=STEPS):
    starts = measures.find_starts(data, lengths, torch.arange(len(data.rewards)), max(steps))
    said = measures.forecast_from(model, data, starts, steps, num_samples)
    return {k: compare(run_on(data, lengths), k, some, starts) for k, some in said.items()}


# --- A known system ---


def test_an_exact_model_has_no_error():
    for row in report_on(model_of([[0.0, 0.0]] * 3), *linear_data()).values():
        assert row.values["error"] < 1e-5 and row.values["reward"] < 1e-5
        assert row.values["width"] < 1e-6 and row.values["starts"] == 20 * (30 - 9)


def test_the_error_of_a_biased_model_is_that_of_its_drift():
    """After k steps a drift b has become sum_{j<k} A^j b, and the reward of step k errs by the sum of that of k - 1."""
    data, lengths = linear_data()
    rows = report_on(model_of([[0.3, -0.1], [0.1, 0.1]]), data, lengths)
    drift, scale = np.array([0.2, 0.0]), data.observations.numpy().std(axis=0, ddof=1) + 1e-3
    for k, row in rows.items():
        before, after = (sum((np.linalg.matrix_power(A, j) @ drift for j in range(n)), np.zeros(2)) for n in (k - 1, k))
        errors = np.abs(after) / scale
        assert row.values["error"] == pytest.approx(math.sqrt(np.mean(errors**2)), rel=1e-3)
        names, units = {"x": 0, "y": 1}, np.abs(after) * [10, 100]
        following = data.next_observations.view(20, 30, 2)[:, k - 1 : 20 + k].numpy()
        change = np.sqrt(((following - data.observations.view(20, 30, 2)[:, :21].numpy()) ** 2).mean(axis=(0, 1)))
        for name, column in names.items():
            expected = [errors[column], units[column], change[column] * [10, 100][column]]
            assert row.errors[name] == pytest.approx(expected, rel=1e-3, abs=1e-3)
        assert list(row.errors) == sorted(names, key=lambda name: -errors[names[name]])
        assert row.values["reward"] == pytest.approx(abs(before.sum()), abs=1e-4)


def test_naive_forecasts_by_hand():
    data, lengths = linear_data()
    rows = report_on(model_of([[0.0, 0.0]]), data, lengths)
    s, following = data.observations.view(20, 30, 2).numpy(), data.next_observations.view(20, 30, 2).numpy()
    scale = data.observations.numpy().std(axis=0, ddof=1) + 1e-3
    rewards = data.rewards.view(20, 30).numpy()
    for k, row in rows.items():
        change = (following[:, k - 1 : 20 + k] - s[:, :21]) / scale
        assert row.values["nothing changes"] == pytest.approx(np.sqrt(np.mean(change**2)), rel=1e-4)
        expected = np.sqrt(np.mean((rewards[:, k - 1 : 20 + k] - rewards.mean()) ** 2))
        assert row.values["mean reward"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("std", "low", "high"), [(0.1, 0.87, 0.93), (0.05, 0.52, 0.66), (0.2, 0.985, 1.0)])
def test_calibration_is_right_for_the_noise_that_is_there(std, low, high):
    """Half the deviation leaves 59% of a Gaussian in its 90% interval, twice the deviation 99.9%: at every k."""
    rows = report_on(model_of([[0.0, 0.0]] * 2, std), *linear_data(60, noise=0.1))
    for row in rows.values():
        assert low < row.values["in 90%"] <= high and low < row.values["reward in 90%"] <= high
    narrow = std == 0.05
    assert [row.values["in 50%"] < 0.4 for row in rows.values()] == [narrow] * 4
    said = " ".join(verdicts(list(rows.values())))
    assert ("TOO NARROW at k = 1, 2, 5, 10" in said, "too wide at k = 1, 2, 5, 10" in said) == (narrow, std == 0.2)


def test_the_width_is_that_of_the_noise_of_all_steps():
    """The variance of s_k is sum_{j<k} A^j A^jT std^2, and a Gaussian's 90% interval is 3.29 deviations wide."""
    data, lengths = linear_data(5)
    rows = report_on(model_of([[0.0, 0.0]] * 2, 0.1), data, lengths, num_samples=2000)
    scale = data.observations.numpy().std(axis=0, ddof=1) + 1e-3
    for k, row in rows.items():
        powers = [np.linalg.matrix_power(A, j) for j in range(k)]
        deviations = np.sqrt(np.diag(sum(p @ p.T for p in powers))) * 0.1
        assert row.values["width"] == pytest.approx(np.mean(2 * 1.6449 * deviations / scale), rel=0.03)


def test_a_trajectory_keeps_its_member():
    """Two members without noise, of opposite drifts: half the samples end on either side, and none between."""
    model = model_of([[0.1, 0.0], [-0.1, 0.0]])
    states, actions = torch.zeros(1, 2), torch.zeros(1, 5, 1)
    said = measures.forecast(model, states, actions, {5}, 40)[5]
    drift = sum(np.linalg.matrix_power(A, j) for j in range(5)) @ [0.1, 0.0]
    low, high = said.intervals[0.5]
    np.testing.assert_allclose(high[0, :2], np.abs(drift), rtol=1e-5)
    np.testing.assert_allclose(low[0, :2], -np.abs(drift), rtol=1e-5)
    np.testing.assert_allclose(said.mean[0], 0, atol=1e-6)


def test_each_start_has_its_own_actions_whatever_the_pieces(monkeypatch):
    data, lengths = linear_data(3, 12)
    rows = torch.arange(36)
    said = []
    for piece in (100, 7):
        monkeypatch.setattr(measures, "PIECE", piece)
        starts = measures.find_starts(data, lengths, rows, 3)
        said.append(measures.forecast_from(model_of([[0.0, 0.0]]), data, starts, {3}, 20)[3])
    torch.testing.assert_close(said[0].mean, said[1].mean)
    torch.testing.assert_close(said[0].mean[:, :2], data.next_observations[starts.rows + 2])


# --- Intervals and order ---


def test_interval_by_hand():
    samples = torch.arange(1.0, 20.0)[torch.randperm(19), None]
    assert [end.item() for end in measures.interval(samples, 0.9)] == pytest.approx([1, 19])  # of 20 places, 1 and 19
    assert [end.item() for end in measures.interval(samples, 0.5)] == pytest.approx([5, 15])
    assert [end.item() for end in measures.interval(samples, 0.85)] == pytest.approx([1.5, 18.5])


def test_an_interval_of_few_samples_holds_the_share_that_it_should():
    samples, further = torch.randn(20, 40_000), torch.randn(40_000)
    for share in (0.9, 0.5):
        low, high = measures.interval(samples, share)
        assert ((low <= further) & (further <= high)).float().mean().item() == pytest.approx(share, abs=0.01)


def test_rank_correlation_by_hand():
    x, y = torch.tensor([1.0, 2.0, 30.0, 4.0]), torch.tensor([0.1, 5.0, 0.9, 0.7])  # ranks 0 1 3 2 and 0 3 2 1
    assert measures.rank_correlation(x, y) == pytest.approx(1 - 6 * (0 + 4 + 1 + 1) / (4 * 15))
    assert measures.rank_correlation(x, x.exp()) == pytest.approx(1)
    assert math.isnan(measures.rank_correlation(x, torch.ones(4)))
    x, y = torch.tensor([1.0, 1, 1, 2, 2, 3]), torch.tensor([3.0, 1, 2, 2, 2, 1])
    ranks = [2, 2, 2, 4.5, 4.5, 6], [6, 1.5, 4, 4, 4, 1.5]  # equal numbers share theirs
    assert measures.rank_correlation(x, y) == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_a_wider_interval_with_larger_errors_is_told():
    """The spread of the members differs from start to start, and so does the error: both are of the first number."""
    data = Batch(*(torch.zeros(200, *shape) for shape in ((2,), (1,), (), (2,), ())))
    size = torch.rand(200)
    starts = Starts(torch.arange(200), torch.ones(200, dtype=torch.long), torch.zeros(200, dtype=torch.bool))
    mean, half = torch.zeros(200, 3), torch.zeros(200, 3)
    mean[:, 0], half[:, 0] = size, 2 * size
    said = Forecast(mean, dict.fromkeys((0.9, 0.5), (-half, half)), torch.zeros(200))
    row = compare(run_on(data, torch.ones(200, dtype=torch.long)), 1, said, starts)
    assert row.values["order"] == pytest.approx(1)


# --- Starts and ends ---


def test_starts_last_for_the_longest_or_terminate_before():
    data = Batch(*(torch.zeros(10, *shape) for shape in ((2,), (1,), (), (2,), ())))
    data.terminations[[3, 8]] = 1  # episodes of 4 (terminated) and 6, whose fifth step terminates, too
    starts = measures.find_starts(data, torch.tensor([4, 6, 0]), torch.arange(10), 3)
    assert starts.rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert starts.left.tolist() == [4, 3, 2, 1, 5, 4, 3, 2, 1] and starts.terminated.all()
    data.terminations[:] = 0
    starts = measures.find_starts(data, torch.tensor([4, 6, 0]), torch.arange(10), 3)
    assert starts.rows.tolist() == [0, 1, 4, 5, 6, 7] and not starts.terminated.any()


def test_ends_by_hand():
    """s grows by 1 a step. Episodes end at 4; the model's end is at 3, and it sees those too soon."""
    s = torch.arange(4.0).repeat(5)
    states, following = torch.stack([s, s], dim=1), torch.stack([s + 1, s + 1], dim=1)
    data = Batch(states, torch.zeros(20, 1), torch.zeros(20), following, (s == 3).float())

    class Growing(Linear):
        def predict(self, states, actions):
            mean = torch.ones(*states.shape[:2], 3)
            return mean, torch.zeros_like(mean), mean[..., 0]

    elites = Growing([[0.0, 0.0]])
    model = Model(elites, elites, 1, lambda states, _: states[:, 0] > 2.5, "rule", None)
    rows = report_on(model, data, torch.full((5,), 4), steps={1, 2})
    # one step on, of s = 0, 1, 2, 3 the last has ended; the model says so of 2 and 3
    assert (rows[1].values["ends seen"], rows[1].values["false ends"]) == (1.0, pytest.approx(1 / 3))
    assert (rows[2].values["ends seen"], rows[2].values["false ends"]) == (1.0, pytest.approx(1 / 2))
    assert [row.values["starts"] for row in rows.values()] == [20, 15] and rows[2].values["error"] < 1e-6
    blind = model._replace(ends=lambda states, _: states[:, 0] > 99)
    rows = report_on(blind, data, torch.full((5,), 4), steps={1, 2})
    assert (rows[2].values["ends seen"], rows[2].values["false ends"]) == (0.0, 0.0)
    passing = model._replace(ends=lambda states, _: (states[:, 0] > 2.5) & (states[:, 0] < 3.5))
    rows = report_on(passing, data, torch.full((5,), 4), steps={1, 2})
    assert rows[2].values["ends seen"] == 0.5  # of s = 2 and 3: a sample that has ended stays so


def test_where_a_file_does_not_say_what_followed_nothing_but_the_end_counts():
    data, lengths = linear_data(20, 10)
    data.terminations[lengths.cumsum(0) - 1] = 1
    data.next_observations[lengths.cumsum(0) - 1] = data.observations[lengths.cumsum(0) - 1]
    rows = report_on(model_of([[0.0, 0.0]]), data, lengths, steps={1, 2})
    assert [row.values["starts"] for row in rows.values()] == [180, 160]
    assert rows[2].values["error"] < 1e-5 and rows[2].values["ends seen"] == 0


# --- Table and verdicts ---


def row_of(step, error, reward=0.0, share=0.9):
    values = {"error": error, "nothing changes": 1.0, "reward": reward, "mean reward": 1.0, "in 90%": share}
    return Row(step, values | {"reward in 90%": 0.9, "order": 0.5}, {"x": [error, 20.0, 30.0], "y": [0.1, 0.5, 0.25]})


def test_verdicts_by_hand():
    said = [*verdicts([row_of(1, 0.5, 2.0), row_of(5, 1.5, share=0.79), row_of(9, 0.7, share=0.96)])]
    assert said[0] == "observations: the model beats 'nothing changes' up to k = 1, and no longer at 5"
    assert said[1] == "rewards: the model beats their mean at no k"
    spread = "TOO NARROW at k = 5 (less than 80% in the 90% interval); too wide at k = 9 (more than 95%"
    assert said[2].startswith(f"observations: the spread is {spread}")
    assert said[3] == "rewards: the spread is about right at all k"
    assert said[4].endswith("0.50 at 1, 0.50 at 5, 0.50 at 9")
    assert next(verdicts([row_of(1, 0.5)])).endswith("at all k up to 1, the last one asked for")


def test_table_is_markdown():
    lines = [*table([row_of(1, 0.5), row_of(20, math.nan)])]
    assert len({len(line) for line in lines[:4]}) == 1 and re.fullmatch(r"(\| -+: )+\|", lines[1])
    assert lines[0].split()[:4] == ["|", "k", "|", "error"] and "90.0%" in lines[2] and "nan" not in lines[3]
    assert lines[4] == "largest errors at k = 1: x (0.5), y (0.1)" and lines[6].startswith("largest errors at k = 20:")
    assert lines[5] == "  in the environment's units (and if nothing changes): x 20 (30), y 0.5 (0.25)"


# --- Runs ---


FEW = ["--num-starts", "50", "--num-samples", "20"]


def train(algorithm, folder, *arguments):
    words = [*SHORT, *SHORTER.get(algorithm, []), "--num-updates", "2", *arguments, "--run-dir", str(folder)]
    outcome = run_script(algorithm, *words)
    assert outcome.returncode == 0, outcome.stderr
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, pendulum):
    """Folders of short runs, made when they are first asked for."""
    parent, made = tmp_path_factory.mktemp("runs"), {}

    def run(algorithm, *arguments):
        if (algorithm, arguments) not in made:
            made[algorithm, arguments] = train(algorithm, parent / str(len(made)), *arguments)
        return made[algorithm, arguments]

    return run


def report(folder, *arguments):
    run = run_script("benchmarks.model_report", str(folder), *FEW, *arguments)
    assert run.returncode == 0, run.stderr
    return run.stdout


def refuse(*arguments):
    """The one line of a refusal."""
    run = run_script("benchmarks.model_report", *map(str, arguments))
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1), run.stderr
    return run.stderr


@pytest.mark.parametrize("algorithm", ["mopo", "combo", "mobile", "morel", "mve", "naf"])
def test_all_scripts(algorithm, runs, tmp_path):
    text = report(runs(algorithm, "--seed", "3"), "--out", str(tmp_path / "page.png"))
    assert text.startswith(f"{algorithm} on {BUILT_IN_ID}, seed 3: ")
    assert re.findall(r"^\| +(\d+) \| +50 \|", text, flags=re.MULTILINE) == ["1", "2", "5", "10", "20"]
    assert "at the 1,000 left out" in text and "ends seen" not in text
    assert text.endswith(f"picture: {tmp_path / 'page.png'}\n")
    pixels = imread(tmp_path / "page.png")
    assert min(pixels.shape[:2]) > 500 and pixels[..., :3].std() > 0.05
    assert text == report(runs(algorithm, "--seed", "3"), "--out", str(tmp_path / "page.png"))


def test_a_run_has_logged_the_same_errors_of_one_step(runs):
    """But for the noise of the samples here; a run's rewards are those that it learns from."""
    folder = runs("mopo", "--seed", "3", "--reward-scale", "0.1")
    text = run_script("benchmarks.model_report", str(folder), "--steps", "1").stdout
    header, _, row = (line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|"))
    table = dict(zip(map(str.strip, header), row, strict=True))
    assert int(table["starts"].replace(",", "")) == 1_000  # all that was left out
    with (folder / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["dynamics/error"]][-1]
    for name, column, scale, close in (
        ("error", "error", 1, 0.05),
        ("error_nothing_changes", "nothing changes", 1, 0.005),
        ("reward_error", "reward", 0.1, 0.05),
        ("reward_error_mean", "mean reward", 0.1, 0.005),
    ):
        assert float(logged[f"dynamics/{name}"]) == pytest.approx(scale * float(table[column]), rel=close)


@pytest.mark.parametrize("algorithm", ["mopo", "combo", "mobile", "morel", "mve", "naf"])
def test_rows_left_out_are_those_of_the_training(algorithm, monkeypatch, tmp_path, pendulum):
    module, asked = importlib.import_module(algorithm), []
    keep_better = module.keep_better

    def spy(best, training, x, z, patience):
        asked.append(x)
        return keep_better(best, training, x, z, patience)

    monkeypatch.setattr(module, "keep_better", spy)
    from trained_run import load_run  # the module's name is that of the other tests

    run = load_run(train(algorithm, tmp_path / "run", "--seed", "5"))
    data, left_out = run.buffer.transitions, load_model(run, tmp_path / "run", None).left_out
    torch.testing.assert_close(torch.cat([data.observations, data.actions], dim=1)[left_out], asked[0])
    everyone = load_model(run, tmp_path / "run", None).everyone
    assert measures.rows_left_out(everyone, data, 6) is None  # of another seed, the errors are others


def test_rows_left_out_are_found_where_a_log_lacks_what_followed(monkeypatch, tmp_path, make_dataset):
    """The errors that the training saves there are of what is known."""
    episodes = []
    for seed in range(20):
        episode = random_episode(seed, 6) | {"terminations": np.arange(6) == 5, "truncations": np.zeros(6, dtype=bool)}
        episode["observations"][-1] = episode["observations"][-2]
        episodes.append(episode)
    folder = train("mopo", tmp_path / "run", "--dataset-id", make_dataset(episodes=episodes))
    from trained_run import load_run  # the module's name is that of the other tests

    run = load_run(folder)
    left_out = load_model(run, folder, None).left_out
    assert left_out is not None and run.buffer.transitions.terminations[left_out].any()
    _, learned = choose_starts(run, load_model(run, folder, None), 1, 10)
    assert sorted(torch.cat([learned, left_out]).tolist()) == list(range(20 * 6))  # a row is either


def test_with_episodes_held_out_all_is_of_these(runs):
    folder = runs("mopo", "--validation-fraction", "0.2")
    from trained_run import load_run  # the module's name is that of the other tests

    run = load_run(folder)
    held_out, text = run.buffer.validation, report(folder)
    data, lengths = held_out.transitions, held_out.episode_lengths
    assert f"at the {len(data.rewards):,} of {len(lengths)} episodes held out, of which is all of the table" in text
    starts, learned = choose_starts(run, load_model(run, folder, None), 20, 10**6)
    assert len(starts.rows) == (lengths - 19).sum() and starts.rows.max() < len(data.rewards)
    assert len(data.rewards) < learned.max() < len(run.buffer.transitions.rewards)
    change = (data.next_observations - data.observations)[starts.rows] / (data.observations.std(dim=0) + 1e-3)
    naive = f"| {change.square().mean().sqrt():.3g} |".replace("| ", "")
    assert naive in report(folder, "--num-starts", "100000").splitlines()[4]


def test_a_model_that_was_taken_over_was_tested_by_the_seed_of_its_own_run(runs, tmp_path):
    first = shutil.copytree(runs("mopo", "--seed", "3"), tmp_path / "first")
    second = train("combo", tmp_path / "second", "--seed", "4", "--dynamics", str(first))
    third = train("morel", tmp_path / "third", "--seed", "5", "--dynamics", str(second))
    assert "at the 1,000 left out" in report(third)
    shutil.rmtree(first)
    assert "which rows the model was tested on is not known" in report(third)


def test_a_model_of_what_was_played_was_tested_on_other_rows(runs):
    folder = runs("naf", "--online-steps", "3", "--rollout-every", "1")
    assert "which rows the model was tested on is not known" in report(folder)


def test_rewards_are_in_the_environments_units(runs):
    """The model is of normalised rewards, and so the same whatever their scale and shift."""
    scaled = "--reward-scale", "0.1", "--reward-shift", "2"
    plain, same = (report(runs("mopo", *words)).splitlines()[4].split("|") for words in ((), scaled))
    assert float(plain[10]) > 1 and float(same[10]) == pytest.approx(float(plain[10]), rel=1e-2)  # of their mean
    assert float(same[9]) == pytest.approx(float(plain[9]), rel=0.05)


def test_ends_that_the_model_learned(make_dataset, tmp_path):
    episodes = [random_episode(seed, 12) for seed in range(20)]
    for episode in episodes:
        episode["terminations"][-1], episode["truncations"][-1] = True, False
    folder = train("mopo", tmp_path / "run", "--dataset-id", make_dataset(episodes=episodes))
    text = report(folder, "--steps", "4", "2")
    assert "ends seen" in text and "terminations in the model: learned" in text
    assert re.findall(r"^\| +(\d+) \|", text, flags=re.MULTILINE) == ["2", "4"]
    from trained_run import load_run  # the module's name is that of the other tests

    ends = load_model(load_run(folder), folder, None).ends(torch.zeros(10_000, 3), torch.full((10_000,), -1.0))
    assert ends.float().mean().item() == pytest.approx(1 / (1 + math.e), abs=0.02)  # drawn, as in rollouts


def test_a_rule_for_ends_is_asked_in_the_environments_units(runs, monkeypatch):
    folder = runs("mopo", "--seed", "3")
    from trained_run import load_run  # the module's name is that of the other tests

    run = load_run(folder)
    module = importlib.import_module("mopo")
    monkeypatch.setattr("benchmarks.model_report.load_script", lambda *_: module)
    monkeypatch.setitem(module.TERMINATION_RULES, "Pendulum", lambda s: s[:, 2] > 4)
    run.args.termination = "rule"  # though the data contradict it
    model, states = load_model(run, folder, None), torch.randn(1000, 3)
    mean, std = run.buffer.normalization
    assert model.ending == "Pendulum"
    assert torch.equal(model.ends(states, torch.zeros(1000)), mean[2] + std[2] * states[:, 2] > 4)


def test_a_users_own_script(tmp_path, pendulum, monkeypatch):
    path = tmp_path / "my_mopo.py"
    text = (ROOT / "algorithms" / "mopo.py").read_text()
    path.write_text(text.replace("x = silu(layer(x))", "x = layer(x).tanh()").replace("parents[1]", "parents[0]"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    folder = tmp_path / "run"
    outcome = run_script("my_mopo", *SHORT, *MODEL, "--num-updates", "2", "--run-dir", str(folder))
    assert outcome.returncode == 0, outcome.stderr
    assert_one_line(run_script("benchmarks.model_report", str(folder)), "no script .*my_mopo")
    assert "at the 1,000 left out" in report(folder, "--script", str(path))


# --- Bad input ---


def test_folders_that_hold_no_finished_run_with_a_model(runs, tmp_path):
    assert "no folder absent" in refuse("absent")
    known = "mopo, combo, mobile, morel, mve, pets or naf --imagined-ratio"
    for other in (runs("td3_bc"), runs("naf", "--imagined-ratio", "0")):
        assert f"which learns no model: give one of {known}" in refuse(other)
    folder = shutil.copytree(runs("mopo"), tmp_path / "run")
    (folder / "result.json").unlink()
    assert "has not finished: it lacks result.json" in refuse(folder)


def test_wrong_entries_of_a_checkpoint(runs, tmp_path):
    folder = shutil.copytree(runs("mopo"), tmp_path / "run")
    saved = checkpoint(folder)
    for change, message in (([], "checkpoint.pt does not fit"), (None, "its model holds what is not a finite number")):
        dynamics = saved["learner"]["dynamics"]
        broken = {name: torch.full_like(weight, math.nan) for name, weight in dynamics.items() if "layers" in name}
        learner = saved["learner"] | {"dynamics": change if change is not None else dynamics | broken}
        torch.save(saved | {"learner": learner}, folder / "checkpoint.pt")
        assert message in refuse(folder)


def test_episodes_that_are_too_short_and_data_that_has_changed(make_dataset, tmp_path, datasets_path):
    dataset_id = make_dataset(episodes=[random_episode(seed, 15) for seed in range(20)])
    folder = train("mopo", tmp_path / "run", "--dataset-id", dataset_id, "--reward-scale", "100")
    assert re.search(r"--steps 20: no episode goes on for so long .* ask for at most 15", refuse(folder))
    assert "--steps 1000000000000: " in refuse(folder, "--steps", 10**12)
    other = make_dataset("test/other-v0", [random_episode(seed, 15) for seed in range(1, 21)])
    shutil.rmtree(datasets_path / dataset_id)
    shutil.copytree(datasets_path / other, datasets_path / dataset_id)
    assert f"was trained on other data than {dataset_id} holds" in refuse(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "page.pdf"], "--out page.pdf: must end with .png"),
        (["--out", "absent/page.png"], "there is no folder absent"),
        (["--steps", "0", "2"], "--steps 0 2: give numbers of at least 1"),
        (["--num-starts", "0"], "--num-starts 0: must be at least 50"),
        (["--num-samples", "19"], "--num-samples 19: must be at least 20"),
    ],
)
def test_bad_arguments(arguments, message):
    assert message in refuse("absent", *arguments)


def test_a_box_of_observations_has_names(make_dataset, tmp_path):
    space = gym.spaces.Dict({"arm": gym.spaces.Box(-9, 9, (2,)), "goal": gym.spaces.Box(-9, 9, (1,))})
    episodes = [random_episode(seed) for seed in range(4)]
    for episode in episodes:
        states = episode["observations"]
        episode["observations"] = {"arm": states[:, :2], "goal": states[:, 2:]}
    dataset_id = make_dataset(episodes=episodes, observation_space=space)
    text = report(train("combo", tmp_path / "run", "--dataset-id", dataset_id))
    assert {"arm/0", "arm/1", "goal/0"} == set(re.findall(r"(\S+) \(", text.split("largest errors at k = 1: ")[1])[:3])
