"""The datasets that the repository brings along: what benchmarks/built_in.py makes, and what their names say."""

import json
import math
import tomllib

import built_in
import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line, run_script

from common.data import BUILT_IN, BUILT_IN_DISCRETE_ID, BUILT_IN_ID, BUILT_IN_TWO_WAYS_ID, ReplayBuffer, load_dataset
from common.evaluation import FINAL_SEED, evaluate, make_environments

SHIPPED = BUILT_IN_ID, BUILT_IN_DISCRETE_ID, BUILT_IN_TWO_WAYS_ID
FINGERPRINTS = {  # of what every result in benchmarks/results was learned from
    BUILT_IN_ID: "be34a3103d439ebb6f086dceecd7ac06",
    BUILT_IN_DISCRETE_ID: "16f448a2897b93727294575a81e40e30",
    BUILT_IN_TWO_WAYS_ID: "db669451b7bee459500af28071acd284",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("built_in") / "out"
    built_in.main(built_in.Args(out))
    return out


@pytest.mark.parametrize("dataset_id", SHIPPED)
def test_the_maker_makes_the_shipped_episodes(dataset_id, made):
    shipped, again = (minari.MinariDataset(root / dataset_id / "data") for root in (BUILT_IN, made))
    assert shipped.total_episodes > 0
    for before, after in zip(shipped.iterate_episodes(), again.iterate_episodes(), strict=True):
        for name in ("observations", "actions", "rewards", "terminations", "truncations"):
            expected, found = getattr(before, name), getattr(after, name)
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected, err_msg=f"{name} of episode {before.id}")
    ids = range(shipped.total_episodes)
    assert list(again.storage.get_episode_metadata(ids)) == list(shipped.storage.get_episode_metadata(ids))


@pytest.mark.parametrize("dataset_id", SHIPPED)
def test_the_maker_makes_the_shipped_metadata(dataset_id, made):
    shipped, again = (json.loads((root / dataset_id / "data/metadata.json").read_text()) for root in (BUILT_IN, made))
    for metadata in (shipped, again):  # what a version of Gymnasium adds to the description of its environment
        spec = json.loads(metadata.pop("env_spec"))
        metadata["environment"] = {name: spec[name] for name in ("id", "entry_point", "max_episode_steps", "kwargs")}
    assert again == shipped


def test_the_maker_overwrites_nothing(made):
    before = sorted(made.rglob("*"))
    assert_one_line(run_script("built_in", "--out", str(made)), f"--out: {made / BUILT_IN_ID} exists: remove")
    assert sorted(made.rglob("*")) == before


@pytest.mark.parametrize("dataset_id", SHIPPED)
def test_the_shipped_files_are_small_and_belong_to_the_package(dataset_id):
    files = {path for path in (BUILT_IN / dataset_id).rglob("*") if path.is_file()}
    assert sum(path.stat().st_size for path in files) < 1e6
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["common"]
    assert files <= {path for pattern in package for path in (ROOT / "common").glob(pattern)}


@pytest.mark.parametrize("dataset_id", SHIPPED)
def test_every_allowed_version_of_minari_reads_the_shipped_files(dataset_id):
    """It refuses those of versions newer than itself."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    oldest = next(line for line in dependencies if line.startswith("minari")).partition(">=")[2].partition(",")[0]
    metadata = json.loads((BUILT_IN / dataset_id / "data/metadata.json").read_text())
    assert metadata["minari_version"] == oldest == built_in.MINARI_VERSION


def test_pendulum_has_good_weak_and_random_episodes(pendulum):
    dataset = minari.MinariDataset(BUILT_IN / BUILT_IN_ID / "data")
    assert (dataset.total_episodes, dataset.total_steps) == (150, 30_000)
    assert dataset.env_spec.id == pendulum.dataset.env_id == "Pendulum-v1"
    assert pendulum.fingerprint == FINGERPRINTS[BUILT_IN_ID]
    assert pendulum.dataset.reference_returns == (-1194.4265790451009, -148.03347392831145)
    scores = [pendulum.dataset.score(float(value)) for value in pendulum.episode_returns]
    good, weak, random = np.mean(scores[:30]), np.mean(scores[30:90]), np.mean(scores[90:])
    assert good == pytest.approx(100, abs=10)
    assert random == pytest.approx(0, abs=10)
    assert 25 < weak < 75


def test_cartpole_has_good_weak_short_sighted_and_random_episodes(cartpole):
    dataset = minari.MinariDataset(BUILT_IN / BUILT_IN_DISCRETE_ID / "data")
    assert dataset.total_episodes == 200 and dataset.action_space == gym.spaces.Discrete(2)
    assert dataset.env_spec.id == cartpole.dataset.env_id == "CartPole-v1"
    assert cartpole.fingerprint == FINGERPRINTS[BUILT_IN_DISCRETE_ID]
    assert cartpole.dataset.reference_returns == (22.18, 500)
    assert [cartpole.dataset.score(value) for value in cartpole.dataset.reference_returns] == [0, 100]
    scores = [cartpole.dataset.score(float(value)) for value in cartpole.episode_returns]
    good, weak, short_sighted, random = (np.mean(scores[a:b]) for a, b in ((0, 20), (20, 80), (80, 140), (140, 200)))
    assert good == 100
    assert 0 < random + 3 < 6 and 3 < weak < 15 and 1 < short_sighted < 10


def test_cartpole_ends_and_actions(cartpole):
    data = cartpole.transitions
    ends = cartpole.episode_starts + cartpole.episode_lengths - 1
    np.testing.assert_array_equal(data.terminations[ends], cartpole.episode_lengths < 500)  # the time limit is no end
    assert data.terminations.sum() == 180
    assert (data.actions.dtype, data.actions.unique().tolist()) == (torch.int64, [0, 1])


def test_half_of_the_two_ways_episodes_go_above_the_wall(datasets_path):
    data = ReplayBuffer(load_dataset(BUILT_IN_TWO_WAYS_ID), torch.device("cpu"))
    assert data.fingerprint == FINGERPRINTS[BUILT_IN_TWO_WAYS_ID]
    assert data.dataset.reference_returns == (0, 100) and len(data.episode_returns) == 100
    good, slow, clumsy, random = (data.episode_returns[a:b].mean() for a, b in ((0, 40), (40, 60), (60, 80), (80, 100)))
    assert good > 95 > slow > 50 and clumsy == random == 0
    first = data.transitions.actions[data.episode_starts[:80], 1]
    assert (first > 0).sum() == (first < 0).sum() == 40


def test_the_controller_that_defines_100_scores_100_on_fresh_starts(pendulum):
    """Within two standard errors, of these fifty episodes and of the fifty that the reference is the mean of."""

    def policy(observations):
        return np.clip([[built_in.good_controller(row)] for row in observations], -2, 2).astype(np.float32)

    environments = make_environments(pendulum.dataset, 10)
    scores = pendulum.dataset.score(evaluate(policy, environments, 50, FINAL_SEED)[0])
    assert scores.mean() == pytest.approx(100, abs=2 * math.sqrt(2) * scores.std(ddof=1) / math.sqrt(50))
    assert len({round(score, 6) for score in scores}) == 50
