"""The report on a trained policy: each measure against a known answer, and the story that all of them tell."""

import dataclasses
import itertools
import json
import math
import re
import shutil
import sys

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from conftest import ALGORITHMS, DISCRETE, ROOT, SHORT, SHORTER, checkpoint, random_episode, run_script
from matplotlib.image import imread

from benchmarks import shift_report
from benchmarks.shift_report import (
    Row,
    best_apart,
    covered,
    distance_to_near,
    headlines,
    judge_actions,
    judge_values,
    judge_visits,
    set_scene,
    table,
    taken_near,
)

sys.path.append(str(ROOT / "benchmarks"))
import shift_measures as measures
import trained_run
from shift_actions import NUM_DRAWS, bins_of, choice_masses, draw_random, masses_of_random, vector_masses
from trained_run import load_run, visit

from common.command_line import BUILT_IN_ID, BadInput
from common.data import BUILT_IN_DISCRETE_ID
from common.evaluation import load_policy, load_script

SCRIPT = "benchmarks.shift_report"
FEW = ["--num-states", "60", "--num-updates", "5", "--eval-episodes", "2"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def normal_cdf(x):
    return 0.5 * (1 + np.vectorize(math.erf)(np.asarray(x) / math.sqrt(2)))


# --- Neighbours and coverage ---


def test_nearest_neighbours_are_those_of_brute_force():
    points, references = torch.randn(300, 4), torch.randn(500, 4)
    distances, rows = measures.nearest(points, references, 3)
    every = np.sqrt(((points.numpy()[:, None] - references.numpy()) ** 2).sum(axis=2))
    expected = np.argsort(every, axis=1)[:, :3]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(distances, np.take_along_axis(every, expected, axis=1), atol=1e-4)
    assert measures.nearest(points, references[:2], 3)[0].shape == (300, 2)
    far = 50 * torch.eye(40)[torch.arange(1000) % 40] + 7
    assert (measures.nearest(far, far, 25)[0] == 0).all()  # a matrix product would leave some apart from themselves


def test_coverage_is_the_share_within_the_quantile_of_the_scale():
    scale = torch.arange(101.0)  # its 0.95 quantile is 95
    assert measures.coverage(scale, scale) == pytest.approx(96 / 101)
    assert measures.coverage(torch.tensor([95.0, 95.1, 0.0, 200.0]), scale) == 0.5
    assert measures.coverage(torch.tensor([200.0]), scale) == 0


def test_covered_is_alarming_below_80_percent():
    scale = torch.arange(100.0)
    at_80 = torch.cat([torch.zeros(80), torch.full((20,), 1e9)])
    row = covered("x", {"data": scale, "policy": at_80, "random": at_80[1:], "visits": at_80[1:]})
    assert row.alarming == {"policy": False, "visits": True}  # the data and chance are not judged
    assert row.values["policy"] == pytest.approx(0.8)
    text = [*table([row]), *headlines([row, Row("y", {"policy": 1.0})])]
    assert text[1].endswith("80.0%       79.8%       79.8%   policy fine, visits ALARMING (limit: at least 80%)")
    assert text[2:] == ["alarming at the data's states: 0 of 1", "alarming where the policy goes: 1 of 1 (x)"]


# --- Behaviour ---


def gaussian_bins(mean, std, squashed=False):
    """The mass of Normal(mean, std) [n, action_dim], or of its tanh, in each bin: [n, action_dim, bins]."""
    edges = np.linspace(-1, 1, measures.NUM_BINS + 1)[1:-1]
    places = np.arctanh(edges) if squashed else edges
    below = normal_cdf((places - np.asarray(mean)[..., None]) / np.asarray(std)[..., None])
    ends = np.zeros((*below.shape[:-1], 1))
    return torch.as_tensor(np.diff(np.concatenate([ends, below, ends + 1], axis=-1)))


@pytest.mark.parametrize("script", ["iql", "cql"])
def test_bins_hold_the_mass_of_a_normal_distribution_or_of_its_tanh(script):
    """What IQL draws beyond [-1, 1] is in the outermost bins, where an environment would clip it."""
    module = load_script(script)
    actor = module.Actor(3, 2, module.HyperParameters(hidden_dims=(8,))).requires_grad_(False)
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.copy_(0.7 * torch.randn_like(parameter))
    observations = torch.randn(50, 3)
    actions = actor(observations)
    if script == "iql":
        exact = gaussian_bins(actions, actor.log_std.exp().expand_as(actions))
    else:
        exact = gaussian_bins(*actor.distribution(observations), squashed=True)
    masses = vector_masses(actor, observations, actions)
    np.testing.assert_allclose(masses.sum(dim=2), 1, rtol=1e-5)
    np.testing.assert_allclose(masses, exact, atol=1 / NUM_DRAWS + 1e-5)
    everywhere = torch.full_like(exact, 1 / measures.NUM_BINS)
    kl, exact_kl = (measures.kl_divergence(some, everywhere).mean().item() for some in (masses, exact))
    assert kl == pytest.approx(exact_kl, rel=0.01)


def test_bins_of_entries_that_depend_on_each_other():
    class Together:
        """Both entries are means of two noises: Normal(0.2, 0.5 / sqrt(2))."""

        def sample(self, observations, noise):
            return (0.2 + 0.5 * noise.mean(dim=1, keepdim=True)).expand_as(noise), noise[:, 0]

    masses = vector_masses(Together(), torch.zeros(5, 3), torch.zeros(5, 2))
    exact = gaussian_bins(torch.full((5, 2), 0.2), torch.full((5, 2), 0.5 / math.sqrt(2)))
    np.testing.assert_allclose(masses, exact, atol=0.06)  # as random draws have it


def test_the_bins_of_an_actor_without_a_distribution_are_those_of_its_actions():
    actions = torch.rand(5, 2) * 2 - 1
    masses = vector_masses(torch.nn.Identity(), torch.zeros(5, 3), actions)
    assert torch.equal(masses.argmax(dim=2), measures.bin_of(actions))
    assert masses.amax(dim=2).eq(1).all() and masses.sum(dim=2).eq(1).all()


def test_every_action_has_its_bin():
    edges = np.linspace(-1, 1, measures.NUM_BINS + 1)
    middles = torch.tensor((edges[1:] + edges[:-1]) / 2, dtype=torch.float32)
    assert measures.bin_of(middles).tolist() == list(range(measures.NUM_BINS))
    assert measures.bin_of(torch.tensor([-1.0, 1.0])).tolist() == [0, measures.NUM_BINS - 1]


def test_kl_and_total_variation_of_known_gaussians(monkeypatch):
    monkeypatch.setattr(measures, "NUM_BINS", 4000)  # so fine that bins are densities
    p, q = gaussian_bins([[0.1, 0.0]], [[0.1, 0.12]]), gaussian_bins([[-0.05, 0.0]], [[0.1, 0.15]])
    first = (0.15 / 0.1) ** 2 / 2  # of equal widths
    second = math.log(0.15 / 0.12) + 0.12**2 / (2 * 0.15**2) - 0.5
    assert measures.kl_divergence(p, q).item() == pytest.approx(first + second, rel=1e-3)
    equal_widths = measures.total_variation(p[:, :1], q[:, :1]).item()
    assert equal_widths == pytest.approx(2 * normal_cdf(0.15 / 0.2) - 1, rel=1e-3)
    assert measures.kl_divergence(p, p).item() == measures.total_variation(p, p).item() == 0


def test_kl_of_an_action_without_noise_is_its_surprise():
    behaviour = torch.rand(5, 2, measures.NUM_BINS).softmax(dim=2)
    actions = torch.rand(5, 2) * 2 - 1
    chosen = torch.nn.functional.one_hot(measures.bin_of(actions), measures.NUM_BINS).float()
    bins = measures.bin_of(actions)
    expected = [-sum(math.log(behaviour[n, j, bins[n, j]]) for j in range(2)) for n in range(5)]
    np.testing.assert_allclose(measures.surprise(behaviour, bins), expected, rtol=1e-5)
    np.testing.assert_allclose(measures.kl_divergence(chosen, behaviour), expected, rtol=1e-5)
    tv = [
        np.mean([1 - math.exp(-measures.surprise(b[None, j : j + 1], own[None, j : j + 1])) for j in range(2)])
        for b, own in zip(behaviour, bins, strict=True)
    ]
    np.testing.assert_allclose(measures.total_variation(chosen, behaviour), tv, rtol=1e-5)


def test_behaviour_is_fitted():
    """Two kinds of state: 0.6 always, or 0.6 and -0.6 by turns."""
    states = (torch.arange(4000) % 2).float()[:, None]
    actions = torch.where((states == 1) | (torch.rand(4000, 1) < 0.5), 0.6, -0.6)
    masses = measures.fit_behaviour(states, measures.bin_of(actions), measures.NUM_BINS, 300)(
        torch.tensor([[0.0], [1.0]])
    )
    up, down = measures.bin_of(torch.tensor([0.6, -0.6])).tolist()
    np.testing.assert_allclose(masses.sum(dim=2), 1, rtol=1e-5)
    np.testing.assert_allclose(masses[:, 0, [up, down]], [[0.5, 0.5], [1, 0]], atol=0.05)


# --- Density ratio ---


def test_density_ratio_of_known_distributions():
    zeros, ones = torch.randn(20_000, 1), torch.randn(20_000, 1) + 1
    net = measures.fit_classifier(zeros[:10_000], ones[:10_000], 500)
    x = torch.linspace(-1, 2, 7)[:, None]
    np.testing.assert_allclose(net(x), x[:, 0] - 0.5, atol=0.25)  # log of the densities' ratio
    accuracy = measures.accuracy(net(zeros[10_000:]), net(ones[10_000:]))
    assert accuracy == pytest.approx(float(normal_cdf(0.5)), abs=0.02)
    # the weights' second moment is e: the share of the data that speaks for N(1, 1) is 1 / e
    assert measures.effective_share(net(zeros[10_000:])) == pytest.approx(1 / math.e, abs=0.08)


def test_accuracy_counts_both_kinds_the_same():
    zeros, ones = torch.tensor([-1.0, -1, -1, 1]), torch.tensor([2.0])
    assert measures.accuracy(zeros, ones) == (0.75 + 1) / 2


def test_effective_share_by_hand():
    w = torch.tensor([1.0, 3.0, 0.5, 1.5])
    expected = 6**2 / (4 * (1 + 9 + 0.25 + 2.25))
    assert measures.effective_share(w.log()) == pytest.approx(expected)  # the mean is 1.5, above 1
    assert measures.effective_share((w / 6).log()) == pytest.approx(expected / 4)  # the mean is 1 / 4
    assert measures.effective_share(torch.zeros(5)) == 1


# --- Returns ---


def test_discounted_returns_by_hand():
    returns = measures.discounted_returns(torch.tensor([1.0, 2.0, 4.0]), 0.5)
    assert returns.tolist() == [1 + 0.5 * (2 + 0.5 * 4), 2 + 0.5 * 4, 4]


# --- Runs ---


@pytest.fixture(scope="module")
def runs(tmp_path_factory, pendulum):
    """Folders of short runs of every script, made when they are first asked for."""
    parent, made = tmp_path_factory.mktemp("runs"), {}

    def run(algorithm, *arguments):
        if (algorithm, arguments) not in made:
            folder = made[algorithm, arguments] = parent / str(len(made))
            words = [*SHORT, *SHORTER.get(algorithm, []), "--num-updates", "4", "--log-every", "1", *arguments]
            outcome = run_script(algorithm, *words, "--run-dir", str(folder))
            assert outcome.returncode == 0, outcome.stderr
        return made[algorithm, arguments]

    return run


def report(folder, *arguments):
    run = run_script(SCRIPT, str(folder), *(arguments or FEW))
    assert run.returncode == 0, run.stderr
    return run.stdout


POLICIES = [name for name in ALGORITHMS if name not in (*DISCRETE, "decision_transformer")]  # which is refused


@pytest.mark.parametrize("algorithm", POLICIES)
def test_every_script(runs, algorithm):
    text = report(runs(algorithm))
    rows = {line.split("  ")[0] for line in text.splitlines()}
    assert text.startswith(f"{algorithm} on {BUILT_IN_ID}, seed 0: ")
    assert {"distance (median)", "covered", "typical", "KL", "TV", "visits covered", "accuracy", "speaking"} <= rows
    without_q = algorithm in ("bc", "awr", "pets")
    assert ({"Q", "G"} <= rows) != without_q
    assert ("critics" in rows) != (without_q or algorithm == "naf")  # whose critic is one
    assert (f"skipped, for {algorithm} has no critic" in text) == without_q
    counts = re.findall(r"^alarming .*: \d of (\d)", text, flags=re.MULTILINE)
    assert counts == (["2", "2"] if without_q else ["3", "4"] if algorithm == "naf" else ["4", "5"])


@pytest.mark.parametrize("algorithm", [name for name in POLICIES if name not in ("bc", "awr", "pets")])
def test_q_and_policy_are_those_of_the_checkpoint(runs, algorithm):
    folder = runs(algorithm)
    run = load_run(folder)
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)["learner"]
    critic = {
        name.removeprefix("critic."): values for name, values in saved["actor"].items() if name.startswith("critic.")
    }
    for name, values in (critic or saved["critic"]).items():
        assert torch.equal(dict(run.critic.named_parameters())[name], values)
    observations = run.buffer.transitions.observations[:50]
    raw = (observations * run.buffer.normalization[1] + run.buffer.normalization[0]).numpy()
    actions = run.policy.act(observations)
    np.testing.assert_allclose(2 * actions, load_policy(folder)(raw), atol=1e-4)
    for name, values in saved["actor"].items():
        assert torch.equal(run.policy.actor.state_dict()[name], values)
    assert run.critic(observations, actions).shape == ({"edac": 3, "rlpd": 3, "naf": 1}.get(algorithm, 2), 50)


def test_rewards_are_those_that_the_script_learned_from(runs):
    """G of the visits, the data's returns and Q are all in the units of --reward-scale and --reward-shift."""
    folder = runs("iql", "--gamma", "0.9", "--reward-scale", "0.1", "--reward-shift", "2")
    run, plain = load_run(folder), load_run(runs("iql", "--gamma", "0.9", "--reward-scale", "1"))
    torch.testing.assert_close(run.buffer.transitions.rewards, 0.1 * (plain.buffer.transitions.rewards + 2))
    shifted, same = visit(run, 2), visit(run._replace(reward_scale=1.0, reward_shift=0.0), 2)
    horizon = math.ceil(math.log(0.01) / math.log(0.9))
    steps = sum(0.9**k for k in range(200 + horizon))  # of the first visit, until the data of G ends
    assert float(shifted.returns[0]) == pytest.approx(0.1 * (float(same.returns[0]) + 2 * steps), rel=1e-5)


def test_visits_are_the_episodes_played_by_hand(runs):
    folder = runs("td3_bc", "--gamma", "0.9")
    run, policy = load_run(folder), load_policy(folder)
    visits = visit(run, 2)
    assert len(visits.returns) == 2 * 200  # what comes after the time limit counts for G alone
    horizon = math.ceil(math.log(0.01) / math.log(0.9))
    env = gym.make("Pendulum-v1", max_episode_steps=200 + horizon)
    observation, _ = env.reset(seed=10_001)
    rewards = []
    for t in range(200 + horizon):
        action = policy(observation[None])[0]
        if t in (0, 100):
            mean, std = run.buffer.normalization.numpy()
            normalised = (observation - mean) / std
            np.testing.assert_allclose(visits.observations[200 + t], normalised, atol=1e-3)
            np.testing.assert_allclose(visits.actions[200 + t], action / 2, atol=1e-3)
        observation, reward, *_ = env.step(action)
        rewards.append(reward)
    for t in (0, 100, 199):
        expected = sum(0.9**k * reward for k, reward in enumerate(rewards[t:]))
        assert visits.returns[200 + t] == pytest.approx(expected, rel=0.02)
    assert visits.episodes.tolist() == [0] * 200 + [1] * 200


class Short(gym.Env):
    """Ends after 5 steps of reward 1 by termination or, in every second episode, by truncation of its own."""

    observation_space = gym.spaces.Box(-9, 9, (3,), np.float32)
    action_space = gym.spaces.Box(-1, 3, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        self.left, self.cut = 5, seed % 2 == 1
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.left -= 1
        over = self.left == 0
        return np.zeros(3, np.float32), 1.0, over and not self.cut, over and self.cut, {}


def test_returns_that_were_cut_are_not_known(make_dataset, tmp_path):
    gym.register("Short-v0", "test_shift_report:Short")
    try:
        episodes = [random_episode(seed) for seed in range(4)]
        dataset_id = make_dataset(episodes=episodes, env="Short-v0", action_space=Short.action_space)
        words = [*SHORT, "--num-updates", "1", "--gamma", "0.5", "--dataset-id", dataset_id]
        assert run_script("td3_bc", *words, "--run-dir", str(tmp_path / "run")).returncode == 0
        run = load_run(tmp_path / "run")
        visits, undiscounted = visit(run, 2), visit(run._replace(gamma=1.0), 2)
    finally:
        del gym.registry["Short-v0"]
    known = [2 - 0.5**k for k in (4, 3, 2, 1, 0)]
    assert visits.returns[:5].tolist() == known
    assert visits.returns[5:].isnan().all() and len(visits.returns) == 10
    np.testing.assert_allclose(visits.actions, run.act(visits.observations), atol=1e-5)  # 1 is the middle of -1 and 3
    assert undiscounted.returns[:5].tolist() == [5, 4, 3, 2, 1]
    assert undiscounted.returns[5:].isnan().all() and len(undiscounted.returns) == 10


def test_where_gamma_1_or_a_long_horizon_leaves_visits_unknown(runs, monkeypatch):
    """A pendulum never terminates: 200 steps to the limit, and of 0.9^t 44 until it is below 0.01."""
    run = load_run(runs("td3_bc", "--gamma", "0.9"))
    assert visit(run, 2).returns.isfinite().all()
    assert visit(run._replace(gamma=1.0), 2).returns.isnan().all()
    monkeypatch.setattr(trained_run, "MOST_FURTHER", 20)
    known = visit(run, 2).returns.isfinite().view(2, 200)
    assert known[:, : 200 + 20 - 44].all() and not known[:, 200 + 20 - 44 :].any()


def test_without_a_known_g_there_is_no_verdict_on_it(runs, monkeypatch, capsys):
    run = load_run(runs("cql"))
    visits = visit(run, 2)
    visits.returns[:] = torch.nan
    found, panels = judge_values(set_scene(run, visits, 100))
    assert [row.name.split()[0] for row in found] == ["Q", "Q", "critics"] and "returns" not in panels
    monkeypatch.setattr(shift_report, "visit", lambda *_: visits)
    shift_report.main(shift_report.Args(runs("cql"), num_states=60, num_updates=5))
    text = capsys.readouterr().out
    assert "skipped, for every episode was cut too soon to know it: G\n" in text and "nan" not in text
    assert re.search(r"^alarming where the policy goes: \d of 4", text, flags=re.MULTILINE)


def test_values_of_a_known_critic(runs):
    """With a critic and a scene made up, every number of Q can be said beforehand."""
    run = load_run(runs("cql"))
    data = run.buffer.transitions
    returns = np.concatenate(
        [
            [sum(0.99**k * r for k, r in enumerate(rewards[t:])) for t in range(200)]
            for rewards in data.rewards.view(150, 200)[:1].numpy()
        ]
    )
    np.testing.assert_allclose(measures.discounted_returns(data.rewards[:200], 0.99), returns, rtol=1e-4)
    for level, impossible in ((100.0, True), (-300.0, False)):
        fixed = run._replace(critic=lambda _, a, level=level: torch.stack([a[:, 0] + level - 1, a[:, 0] + level + 1]))
        scene = set_scene(fixed, visit(fixed, 2), 100)
        found = judge_values(scene)[0]
        assert [row.name.split()[0] for row in found] == ["Q", "Q", "G", "(Q", "critics"]
        rows = dict(zip(("Q", "too high", "G", "bias", "critics"), found, strict=True))
        assert rows["Q"].values["data"] == pytest.approx(level + scene.actions["data"].mean().item(), rel=1e-4)
        assert rows["too high"].values["policy"] == float(impossible)
        assert rows["too high"].alarming == {"policy": impossible, "visits": impossible}
        assert rows["G"].values["visits"] == pytest.approx(float(scene.visits.returns.mean()), rel=1e-4)
        assert rows["critics"].values == pytest.approx(
            dict.fromkeys(("data", "policy", "random", "visits"), 2), rel=1e-4
        )
        bias = (level + scene.visits.actions[:, 0] - scene.visits.returns).mean()
        spread = np.std(
            [float(g) for rewards in data.rewards.view(150, 200) for g in measures.discounted_returns(rewards, 0.99)]
        )
        assert rows["bias"].values["visits"] == pytest.approx(float(bias / spread), rel=1e-3)
    for shift in (-5, 10):  # the highest reward is below 0, then above
        data.rewards.add_(shift)
        _, row, *_ = judge_values(set_scene(run, None, 100))[0]
        highest = float(data.rewards.max())
        most = highest if shift < 0 else 100 * highest
        spread = torch.cat([measures.discounted_returns(r, 0.99) for r in data.rewards.view(150, 200)]).std()
        assert row.name == f"Q above {most + float(spread) / 10:.4g}"


def test_a_fifth_of_the_episodes_is_left_out_of_what_is_searched(runs):
    run = load_run(runs("td3_bc", "--gamma", "0.9"))
    scene = set_scene(run, None, 10**6)
    left_out = scene.left_out.view(150, 200)
    assert (left_out == left_out[:, :1]).all() and left_out[:, 0].sum() == 30
    assert torch.equal(scene.rows.sort().values, scene.left_out.nonzero()[:, 0])
    assert torch.equal(scene.others.sort().values, (~scene.left_out).nonzero()[:, 0])


def test_the_distance_is_that_to_the_nearest_of_the_actions():
    near = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [0.3, 0.4]]]).repeat(3, 1, 1)
    zero, far = torch.zeros(3, 2), torch.tensor([[1.0, 0.0], [0.3, 0.4], [4.0, 5.0]])
    rows, distances = distance_to_near({"data": zero, "policy": far}, near)
    np.testing.assert_allclose(distances["policy"], [0.65**0.5, 0, 5], rtol=1e-6)
    assert rows[0].values == pytest.approx({"data": 0, "policy": 0.65**0.5})


def test_the_ratio_is_of_the_data_and_the_best_tenth_has_the_highest_returns(runs, monkeypatch):
    """With a classifier that is known: the first number of a state is its logit."""
    fitted = []

    def fit_classifier(zeros, ones, num_updates):
        fitted.append((zeros, ones))
        return lambda points: points[:, 0]

    monkeypatch.setattr(measures, "fit_classifier", fit_classifier)
    run = load_run(runs("td3_bc", "--gamma", "0.9"))
    scene = set_scene(run, visit(run, 6), 100)
    rows = {row.name: row.values for row in judge_visits(scene, 1)[0]}
    w = scene.points[scene.left_out, 0].double().exp()
    speaking = 30_000 * float(w.sum() ** 2 / (len(w) * w.square().sum()) * w.mean().clamp(max=1))
    assert rows["speaking"]["visits"] == pytest.approx(speaking, rel=1e-4)
    (known, visited), _ = fitted
    assert torch.equal(known, scene.points[~scene.left_out])
    assert torch.equal(visited, scene.visited.view(6, 200, -1)[[1, 2, 4, 5]].flatten(0, 1))  # a third is kept to test
    best_apart(scene, 1)
    others, best = fitted[-1]
    order = run.buffer.transitions.rewards.view(150, 200).sum(dim=1).argsort(descending=True)[:15]
    among = torch.zeros(150, dtype=torch.bool)
    among[order] = True
    points, left_out = scene.points.view(150, 200, -1), scene.left_out.view(150, 200)[:, 0]
    assert torch.equal(best, points[order[1::2].sort().values].flatten(0, 1))
    assert torch.equal(others, points[~among & ~left_out].flatten(0, 1))


# --- Discrete actions ---


def test_taken_is_whether_a_near_state_took_the_action():
    """Three states with four near ones each, of three choices."""
    near = np.array([[0, 0, 1, 1], [2, 2, 2, 2], [0, 1, 2, 0]])
    actions = {"data": np.array([0, 2, 0]), "policy": np.array([2, 2, 1]), "random": np.array([1, 0, 2])}
    one_hot = np.eye(3, dtype=np.float32)
    vectors = {name: torch.as_tensor(one_hot[some]) for name, some in actions.items()}
    (row,), shares = taken_near(vectors, torch.as_tensor(one_hot[near]))
    for name, some in actions.items():
        np.testing.assert_allclose(shares[name], (near == some[:, None]).mean(axis=1))
        assert row.values[name] == pytest.approx((near == some[:, None]).any(axis=1).mean())
    assert row.values == pytest.approx({"data": 1, "policy": 2 / 3, "random": 2 / 3})
    assert row.alarming == {"policy": True}


def test_taken_is_alarming_below_84_percent_of_the_datas_own():
    def row_of(data, policy):
        """Of 100 states: at so many of them, the near one took the action."""
        counts = {"data": data, "policy": policy}
        actions = {name: torch.eye(2)[(torch.arange(100) >= count).long()] for name, count in counts.items()}
        return taken_near(actions, torch.eye(2)[torch.zeros(100, 1, dtype=torch.long)])[0][0]

    assert [row_of(100, policy).alarming["policy"] for policy in (85, 83)] == [False, True]
    assert [row_of(50, policy).alarming["policy"] for policy in (43, 41)] == [False, True]


def test_the_masses_of_a_policy_of_choices():
    """Of an actor with a distribution, softmax of its logits; of a greedy one, 1 where its action is."""
    observations, greedy = torch.randn(20, 3), torch.eye(4)[torch.arange(20) % 4]
    module = load_script("discrete_iql")
    actor = module.Actor(3, 4, module.HyperParameters(hidden_dims=(8,))).requires_grad_(False)
    logits = actor(observations).numpy()
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    masses = choice_masses(actor, observations, greedy)
    assert masses.shape == (20, 1, 4)
    np.testing.assert_allclose(masses[:, 0], expected, rtol=1e-5)
    module = load_script("fqi")
    actor = module.Actor(3, 4, module.HyperParameters(hidden_dims=(8,)))
    assert torch.equal(choice_masses(actor, observations, greedy)[:, 0], greedy)


@pytest.mark.parametrize("algorithm", DISCRETE)
def test_every_script_for_discrete_actions(runs, algorithm, cartpole):
    text = report(runs(algorithm))
    rows = {line.split("  ")[0] for line in text.splitlines()}
    assert text.startswith(f"{algorithm} on {BUILT_IN_DISCRETE_ID}, seed 0: ")
    assert {"Q", "G", "taken", "surprise", "typical", "KL", "TV", "visits covered", "accuracy", "speaking"} <= rows
    assert not {"distance (median)", "covered"} & rows
    twins = algorithm == "discrete_iql"
    assert ("critics" in rows) == twins
    assert (f"skipped, for {algorithm} has one critic: critics" in text) != twins
    counts = re.findall(r"^alarming .*: \d of (\d)", text, flags=re.MULTILINE)
    assert counts == (["4", "5"] if twins else ["3", "4"])


@pytest.mark.parametrize("algorithm", DISCRETE)
def test_q_of_a_choice_is_its_entry(runs, algorithm, cartpole):
    run = load_run(runs(algorithm))
    data = run.buffer.transitions
    observations, actions = data.observations[:50], data.actions[:50]
    of_all = run.critic(observations).numpy()
    of_all = of_all if algorithm == "discrete_iql" else of_all[None]
    np.testing.assert_array_equal(run.vectors(actions), np.eye(2)[actions])
    np.testing.assert_array_equal(run.q(observations, run.vectors(actions)), of_all[:, np.arange(50), actions])
    greedy = run.policy.actor(observations).argmax(dim=1)
    np.testing.assert_array_equal(run.act(observations), np.eye(2)[greedy])


def test_visits_of_a_run_of_choices_are_the_episodes_played_by_hand(runs, cartpole):
    folder = runs("discrete_bcq", "--gamma", "0.9")
    run, policy = load_run(folder), load_policy(folder)
    visits, mean_and_std = visit(run, 2), run.buffer.normalization.numpy()
    actions, observations, returns = [], [], []
    for episode in range(2):
        env = gym.make("CartPole-v1")
        observation, _ = env.reset(seed=10_000 + episode)
        terminated, steps = False, 0
        while not terminated:
            actions.append(policy(observation[None])[0])
            observations.append((observation - mean_and_std[0]) / mean_and_std[1])
            observation, _, terminated, _, _ = env.step(actions[-1])
            steps += 1
        assert steps < 500
        returns += [sum(0.9**k for k in range(left)) for left in range(steps, 0, -1)]
    np.testing.assert_array_equal(visits.actions, np.eye(2)[actions])
    np.testing.assert_allclose(visits.observations, np.array(observations), atol=1e-3)
    np.testing.assert_allclose(visits.returns, returns, rtol=1e-5)


def masked(seed, length=60):
    """An episode whose action, one of those that are legal, is 1 above 0 and else 2; legal is all but one, or two."""
    rng = np.random.default_rng(seed)
    episode = random_episode(seed, length, 1)
    mask = np.ones((length + 1, 4), np.int8)
    mask[np.arange(length + 1), rng.choice([0, 3], length + 1)] = 0
    observations = {"action_mask": mask, "x": episode["observations"]}
    return episode | {"observations": observations, "actions": np.where(episode["observations"][:-1, 0] > 0, 11, 12)}


MASKED = {
    "observation_space": gym.spaces.Dict(
        {"action_mask": gym.spaces.MultiBinary(4), "x": gym.spaces.Box(-np.inf, np.inf, (1,))}
    ),
    "action_space": gym.spaces.Discrete(4, start=10),
}


@pytest.fixture
def masked_run(make_dataset, tmp_path):
    """Of FQI, on masked choices that are counted from 10, of which the data take 11 and 12."""
    words = ["--dataset-id", make_dataset(episodes=[masked(seed) for seed in range(12)], **MASKED)]
    words += ["--num-updates", "4", *SHORT, "--validation-fraction", "0.25", "--run-dir", str(tmp_path / "run")]
    run = run_script("fqi", *words)
    assert run.returncode == 0, run.stderr
    return load_run(tmp_path / "run")


def test_random_choices_are_legal(masked_run):
    data, buffer = masked_run.buffer.transitions, masked_run.buffer
    assert buffer.num_legal == 4 and len(data.rewards) == 9 * 60  # a quarter of the episodes is held out
    mask = data.observations[:, :4].numpy()
    drawn = draw_random(masked_run, data.observations.repeat(20, 1))
    assert (drawn.sum(dim=1) == 1).all() and (drawn.numpy() <= np.tile(mask, (20, 1))).all()
    np.testing.assert_allclose(drawn.mean(dim=0), (mask / 3).mean(axis=0), atol=0.02)
    np.testing.assert_allclose(masses_of_random(masked_run, data.observations)[:, 0], mask / 3)
    assert (masked_run.act(data.observations).numpy() <= mask).all()
    assert bins_of(masked_run, masked_run.vectors(data.actions))[:, 0].tolist() == data.actions.tolist()


def test_the_odds_of_choices(masked_run):
    """beta learns that 11 is taken above 0, and else 12; the policy always takes the other of the two."""
    scene = set_scene(masked_run, None, 100)
    swapped = scene.actions["data"][:, [0, 2, 1, 3]]
    scene = scene._replace(actions=scene.actions | {"policy": swapped})
    rows, panels = judge_actions(scene, 300)
    values = {row.name: row.values for row in rows}
    assert values["typical"]["data"] > 0.94 and values["typical"]["policy"] < 0.1
    assert values["surprise"]["data"] < 0.2 < 2 < values["surprise"]["policy"]
    assert values["surprise"]["random"] == pytest.approx(float(panels["surprise"]["random"].mean()))
    assert values["taken"]["data"] > 0.95 > 0.5 > values["taken"]["policy"]
    illegal_or_never = scene.actions["random"][:, [0, 3]].sum(dim=1).mean().item()
    assert values["taken"]["random"] <= 1 - illegal_or_never
    assert values["TV"]["random"] == pytest.approx(2 / 3, abs=0.1)  # of three choices, the data take one


class Masked(gym.Env):
    """Six steps, in which all actions but one are legal; another one than a legal one is an error."""

    observation_space, action_space = MASKED["observation_space"], MASKED["action_space"]

    def reset(self, *, seed=None, options=None):
        self.rng, self.steps = np.random.default_rng(seed), 0
        return self.observe(), {}

    def observe(self):
        self.mask = np.ones(4, np.int8)
        self.mask[self.rng.choice([0, 3])] = 0
        return {"x": self.rng.normal(size=1).astype(np.float32), "action_mask": self.mask}

    def step(self, action):
        assert self.mask[action - 10] == 1
        self.steps += 1
        return self.observe(), 1.0, self.steps == 6, False, {}


def test_visits_of_masked_choices_are_legal(masked_run):
    gym.register("Masked-v0", "test_shift_report:Masked")
    try:
        dataset = dataclasses.replace(masked_run.buffer.dataset, env_id="Masked-v0")
        masked_run.buffer.dataset = dataset
        visits = visit(masked_run, 3)
    finally:
        del gym.registry["Masked-v0"]
    assert len(visits.returns) == 18 and visits.actions.shape == (18, 4)
    np.testing.assert_array_equal(visits.actions, masked_run.act(visits.observations))
    assert (visits.actions.sum(dim=1) == 1).all() and (visits.actions <= visits.observations[:, :4]).all()


def test_too_many_choices(masked_run):
    masked_run.buffer.num_actions = 1001
    with pytest.raises(BadInput, match="test/data-v0: 1001 actions are too many for a report: at most 1000"):
        set_scene(masked_run, None, 100)


def test_a_run_of_choices_whose_dataset_has_become_one_of_vectors(make_dataset, tmp_path, datasets_path):
    choices = [random_episode(seed, actions=np.arange(30) % 3) for seed in range(4)]
    dataset_id = make_dataset(episodes=choices, action_space=gym.spaces.Discrete(3))
    words = ["--dataset-id", dataset_id, "--num-updates", "1", *SHORT, "--run-dir", str(tmp_path / "run")]
    assert run_script("fqi", *words).returncode == 0
    shutil.rmtree(datasets_path / dataset_id)
    shutil.copytree(datasets_path / make_dataset("test/vectors-v0"), datasets_path / dataset_id)
    assert "actions must be numbered (a Discrete), not Box" in refuse(tmp_path / "run")


def test_picture_of_a_run_of_choices(runs, tmp_path, cartpole):
    report(runs("discrete_iql"), *FEW, "--out", str(tmp_path / "page.png"))
    assert imread(tmp_path / "page.png")[..., :3].std() > 0.05


def test_without_an_environment_there_are_no_visits(make_dataset, tmp_path):
    dataset_id = make_dataset(episodes=[random_episode(seed) for seed in range(4)])
    folder = tmp_path / "run"
    words = ["--dataset-id", dataset_id, "--num-updates", "2", *SHORT, "--run-dir", str(folder)]
    assert run_script("iql", *words).returncode == 0
    text = report(folder, *FEW, "--out", str(tmp_path / "page.png"))
    assert "skipped, for there is no environment: visits" in text and "visits covered" not in text
    assert "alarming at the data's states: " in text and "where the policy goes" not in text
    assert imread(tmp_path / "page.png").std() > 0.05


def test_picture(runs, tmp_path):
    text = report(runs("cql"), *FEW, "--out", str(tmp_path / "page.png"))
    assert text.endswith(f"picture: {tmp_path / 'page.png'}\n")
    pixels = imread(tmp_path / "page.png")
    assert min(pixels.shape[:2]) > 500 and pixels[..., :3].std() > 0.05
    assert [path.name for path in tmp_path.iterdir()] == ["page.png"]


# --- Bad input ---


def refuse(*arguments):
    """The one line of a refusal."""
    run = run_script(SCRIPT, *map(str, arguments))
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    return run.stderr


def test_folders_that_hold_no_finished_run(runs, tmp_path):
    out = tmp_path / "page.png"
    assert "no folder absent" in refuse("absent", "--out", out)
    assert "lacks args.json" in refuse(tmp_path, "--out", out)
    folder = shutil.copytree(runs("cql"), tmp_path / "run")
    (folder / "checkpoint.pt").write_bytes(b"junk")
    assert f"cannot read the run in {folder}" in refuse(folder, "--out", out)
    (folder / "result.json").unlink()
    assert (
        f"has not finished: it lacks result.json; go on with the same command and --resume --run-dir {folder}"
        in refuse(folder)
    )
    (folder / "checkpoint.pt").unlink()
    assert "lacks checkpoint.pt" in refuse(folder)
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"algorithm": "os"}, "no script /"),
        ({"dataset_id": "nonsense"}, "no dataset 'nonsense'"),
        ({"dataset_id": "absent.hdf5"}, "no dataset 'absent.hdf5'"),
        ({"env_id": "antigravity:Pendulum-v1"}, "give --env-id antigravity:Pendulum-v1 again"),
        ({"dataset_id": "anchorl/none-v0"}, "no dataset anchorl/none-v0: give anchorl/"),
    ],
)
def test_runs_of_another_world(runs, tmp_path, change, message):
    folder = shutil.copytree(runs("cql"), tmp_path / "run")
    args = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(args | change))
    assert message in refuse(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved | {"learner": None}, "cannot read the run in"),
        (lambda saved: saved | {"learner": saved["learner"] | {"critic": []}}, "checkpoint.pt does not fit"),
        (lambda saved: with_nan(saved), "its critic holds what is not a finite number"),
    ],
)
def test_wrong_entries_of_a_checkpoint(runs, tmp_path, change, message):
    folder = shutil.copytree(runs("cql"), tmp_path / "run")
    torch.save(change(checkpoint(folder)), folder / "checkpoint.pt")
    assert message in refuse(folder)


def with_nan(saved):
    critic = {name: torch.full_like(weight, torch.nan) for name, weight in saved["learner"]["critic"].items()}
    return saved | {"learner": saved["learner"] | {"critic": critic}}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("args.json", '{"algorithm": "cql", "gamma": 5.0}', "args.json: --gamma 5.0: must be in [0, 1]"),
        ("metrics.csv", "step,critic/q\n1,x\n", "cannot read the run in"),
        ("metrics.csv", "step,critic/q\n1,2,3\n", "cannot read the run in"),
    ],
)
def test_wrong_entries_of_text_files(runs, tmp_path, name, text, message):
    folder = shutil.copytree(runs("cql"), tmp_path / "run")
    (folder / name).write_text(text)
    assert message in refuse(folder)


def test_data_that_has_changed_or_is_gone(make_dataset, tmp_path, datasets_path, monkeypatch):
    dataset_id = make_dataset(episodes=[random_episode(seed) for seed in range(4)])
    words = ["--dataset-id", dataset_id, "--num-updates", "1", *SHORT, "--run-dir", str(tmp_path / "run")]
    assert run_script("bc", *words).returncode == 0
    other = make_dataset("test/other-v0", [random_episode(seed) for seed in range(1, 5)])
    path, aside = datasets_path / dataset_id, datasets_path / "aside"
    path.rename(aside)

    def unreachable(_):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(minari, "download_dataset", unreachable)
    gone = run_script(SCRIPT, str(tmp_path / "run"))
    shutil.copytree(datasets_path / other, path)
    changed = run_script(SCRIPT, str(tmp_path / "run"))
    shutil.rmtree(path)
    aside.rename(path)
    assert (gone.returncode, changed.returncode) == (2, 2)
    assert f"{dataset_id} is not local" in gone.stderr and gone.stderr.count("\n") == 1
    assert f"was trained on other data than {dataset_id} holds" in changed.stderr and changed.stderr.count("\n") == 1


def test_too_little_data(make_dataset, tmp_path):
    dataset_id = make_dataset(episodes=[random_episode(0, 99)])
    words = ["--dataset-id", dataset_id, "--num-updates", "1", *SHORT, "--run-dir", str(tmp_path / "run")]
    assert run_script("bc", *words).returncode == 0
    assert "99 transitions are too few for a report" in refuse(tmp_path / "run")


def test_fqe_has_no_policy_to_report_on(runs):
    folder = runs("fqe", "--policy-run-dir", str(runs("bc")))
    assert f"{folder} is a run of fqe, which learns no policy" in refuse(folder)


def test_sac_has_no_data_to_compare_with(runs):
    folder = runs("sac", "--random-steps", "2")
    assert f"{folder} is a run of sac, which learns from no dataset" in refuse(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "page.pdf"], "--out page.pdf: must end with .png"),
        (["--out", "absent/page.png"], "there is no folder absent"),
        (["--num-states", "0"], "--num-states 0: must be at least 50"),
        (["--num-updates", "0"], "--num-updates 0: must be at least 1"),
        (["--eval-episodes", "1"], "--eval-episodes 1: must be at least 2"),
    ],
)
def test_bad_arguments(runs, arguments, message):
    assert message in refuse(runs("cql"), *arguments)


# --- The story ---


def verdicts(text):
    """Alarming measures and all of them, at the data's states and where the policy goes."""
    pairs = re.findall(r"^alarming .*: (\d) of (\d)", text, flags=re.MULTILINE)
    return [tuple(map(int, pair)) for pair in pairs]


def test_a_critic_that_nobody_holds_back_is_alarming(make_dataset, tmp_path):
    """The action, from the middle of its range, is the reward, and no step matters to another: 0.5 is the best seen."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(-0.5, 0.5, size=(40, 50, 1)).astype(np.float32)
    episodes = [random_episode(seed, 50, 1, actions=a, rewards=a[:, 0].astype(float)) for seed, a in enumerate(actions)]
    spaces = {"observation_space": gym.spaces.Box(-9, 9, (1,)), "action_space": gym.spaces.Box(-1, 1, (1,))}
    words = ["--dataset-id", make_dataset(episodes=episodes, **spaces), "--gamma", "0", "--num-updates", "400"]
    words += ["--hidden-dims", "32", "32", "--batch-size", "64", "--num-samples", "3", "--target-entropy", "-2"]
    words += ["--actor-learning-rate", "1e-2", "--critic-learning-rate", "3e-3"]
    counts = []
    for cql_alpha in ("0", "0.3"):
        folder = tmp_path / cql_alpha
        assert run_script("cql", *words, "--cql-alpha", cql_alpha, "--run-dir", str(folder)).returncode == 0
        counts += verdicts(report(folder, "--num-states", "200", "--num-updates", "200"))
    (sac, every), (cql, _) = counts
    assert sac >= 3 and cql <= 1 and every == 4


@pytest.mark.slow
def test_on_the_built_in_data(pendulum, make_dataset, tmp_path):
    """On all of it, whose actions cover everything, CQL gives no alarm. On its good episodes alone plain SAC does
    nearly everywhere, while CQL holds to the data at its states, if not where small errors then lead.
    """
    words = ["--hidden-dims", "64", "64", "--tau", "0.02", "--actor-learning-rate", "1e-3"]
    words += ["--critic-learning-rate", "1e-3", "--num-samples", "4", "--num-updates", "4000", "--eval-every", "4000"]
    episodes = []
    for episode in itertools.islice(pendulum.dataset.read_episodes(), 30):
        observations = np.concatenate([episode.observations, episode.next_observations[-1:]])
        truncations = np.arange(len(episode.rewards)) == len(episode.rewards) - 1
        fields = {"observations": observations, "actions": episode.actions, "rewards": episode.rewards}
        episodes.append(fields | {"terminations": episode.terminations, "truncations": truncations})
    narrow = make_dataset("test/good-v0", episodes, env="Pendulum-v1")
    counts = []
    for index, (dataset_id, cql_alpha) in enumerate([(BUILT_IN_ID, "1"), (narrow, "0"), (narrow, "1")]):
        folder = tmp_path / str(index)
        run = run_script("cql", *words, "--dataset-id", dataset_id, "--cql-alpha", cql_alpha, "--run-dir", str(folder))
        assert run.returncode == 0, run.stderr
        counts.append(verdicts(report(folder, "--num-states", "1000")))
    assert counts[0] == [(0, 4), (0, 5)]
    assert counts[1][0][0] >= 3 and counts[1][1] == (5, 5)
    assert counts[2][0] == (0, 4)
