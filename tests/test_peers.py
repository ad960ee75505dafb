"""What the peers' script reads and how it evaluates, without d3rlpy, which is not among the test's packages."""

import ast
import importlib.util
import re
import sys
import tomllib
from unittest import mock

import numpy as np
import pytest
from conftest import ROOT, random_episode

from common.command_line import BUILT_IN_ID
from common.data import load_dataset
from common.evaluation import FINAL_SEED, evaluate, make_environments

PATH = ROOT / "benchmarks" / "peers" / "d3rlpy_scores.py"


@pytest.fixture(scope="module")
def peer():
    """The module with something in d3rlpy's place that takes every call."""
    fake = mock.MagicMock(__version__="0")
    names = ["d3rlpy", "d3rlpy.preprocessing", "structlog"]
    with mock.patch.dict(sys.modules, dict.fromkeys(names, fake)):
        spec = importlib.util.spec_from_file_location("d3rlpy_scores", PATH)
        module = importlib.util.module_from_spec(spec)
        sys.modules["d3rlpy_scores"] = module
        spec.loader.exec_module(module)
        yield module


def test_the_packages_are_in_the_first_lines():
    text = re.match(r"# /// script\n(.*?)# ///\n", PATH.read_text(), flags=re.DOTALL)[1]
    metadata = tomllib.loads(re.sub("^# ", "", text, flags=re.MULTILINE))
    needed = {re.split(r"[\[=>]", package)[0] for package in metadata["dependencies"]}
    imported = set()
    for node in ast.walk(ast.parse(PATH.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imported |= {name.split(".")[0] for name in [getattr(node, "module", None) or node.names[0].name]}
    assert imported - set(sys.stdlib_module_names) <= needed | {"numpy", "structlog"}  # which d3rlpy brings


def test_it_reads_the_transitions_that_we_read(peer, pendulum):
    """An episode's cut steps are cut there, too: d3rlpy learns nothing from the step to a cut."""
    peer.read(BUILT_IN_ID)
    observations, actions, rewards, terminations, truncations = peer.d3rlpy.dataset.MDPDataset.call_args.args
    episodes = list(load_dataset(BUILT_IN_ID).read_episodes())
    np.testing.assert_array_equal(observations, np.concatenate([episode.observations for episode in episodes]))
    np.testing.assert_array_equal(actions, np.concatenate([episode.actions for episode in episodes]))
    np.testing.assert_allclose(rewards, np.concatenate([episode.rewards for episode in episodes]))
    ends = np.cumsum([len(episode.rewards) for episode in episodes]) - 1
    assert np.flatnonzero(truncations).tolist() == ends.tolist() and not terminations.any()


def test_an_episode_that_stops_short_is_cut_and_one_that_terminates_is_not(peer, make_dataset):
    ended = np.arange(30) == 29
    episodes = [
        random_episode(0, terminations=ended, truncations=~ended & False),
        random_episode(1, truncations=np.zeros(30, bool)),
    ]
    peer.read(make_dataset(episodes=episodes, env="Pendulum-v1"))
    *_, terminations, truncations = peer.d3rlpy.dataset.MDPDataset.call_args.args
    assert np.flatnonzero(terminations).tolist() == [29] and np.flatnonzero(truncations).tolist() == [59]


def test_its_evaluation_is_ours(peer, pendulum):
    def policy(observations):
        return 2 * np.tanh(observations[:, 1:2] - observations[:, 2:] / 4).astype(np.float32)

    environments = make_environments(pendulum.dataset, 3)
    theirs = peer.evaluate(mock.Mock(predict=policy), environments)
    np.testing.assert_allclose(theirs, evaluate(policy, environments)[0])


def test_a_cell_is_trained_and_evaluated_as_asked(peer, pendulum, monkeypatch):
    learner = mock.MagicMock()
    learner.predict = lambda observations: np.zeros((len(observations), 1), np.float32)
    config = mock.MagicMock(return_value=mock.Mock(create=mock.Mock(return_value=learner)))
    monkeypatch.setitem(peer.CONFIGS, "iql", config)
    result, rows = peer.train("iql", BUILT_IN_ID, 0, peer.Args(num_updates=5, eval_every=2, eval_episodes=2))
    assert learner.update.call_count == 5 and [row["num_updates"] for row in rows] == [2, 4, 5]
    environments = make_environments(pendulum.dataset, 2)
    at_rest, final = (
        evaluate(lambda x: np.zeros((len(x), 1), np.float32), environments, *more)[0] for more in ((), (50, FINAL_SEED))
    )
    np.testing.assert_allclose([row["return_mean"] for row in rows], at_rest.mean())
    np.testing.assert_allclose(result["final_returns"], final)
    np.testing.assert_allclose(result["final_score"], pendulum.dataset.score(final.mean()))


def main(peer, monkeypatch, out, *words):
    """What was trained: a fake of `train` takes note."""
    seen = []

    def train(algorithm, dataset_id, seed, args):
        seen.append((algorithm, seed))
        cell = {"algorithm": f"d3rlpy {algorithm}", "dataset_id": dataset_id, "seed": seed}
        protocol = {name: getattr(args, name) for name in ("num_updates", "eval_every", "eval_episodes")}
        return cell | {"final_score": 1} | protocol, [cell | {"score": 1}, cell | {"score": 2}]

    monkeypatch.setattr(peer, "train", train)
    monkeypatch.setattr(sys, "argv", ["x", "--algorithms", "iql", "bcq", "--out", str(out), *words])
    peer.main()
    return seen


def test_done_cells_are_skipped(peer, tmp_path, monkeypatch):
    assert main(peer, monkeypatch, tmp_path, "--seeds", "1") == [("iql", 0), ("bcq", 0)]
    assert main(peer, monkeypatch, tmp_path, "--seeds", "2") == [("iql", 1), ("bcq", 1)]
    assert len(peer.read_rows(tmp_path / "evaluations.csv")) == 8


def test_a_cell_that_was_cut_off_between_its_two_files_is_there_once(peer, tmp_path, monkeypatch):
    main(peer, monkeypatch, tmp_path, "--seeds", "1")
    peer.write_rows(tmp_path / "results.csv", peer.read_rows(tmp_path / "results.csv")[:1])
    assert main(peer, monkeypatch, tmp_path, "--seeds", "1") == [("bcq", 0)]
    assert len(peer.read_rows(tmp_path / "evaluations.csv")) == 4


def test_cells_of_other_arguments_do_not_count_as_done(peer, tmp_path, monkeypatch):
    main(peer, monkeypatch, tmp_path, "--seeds", "1")
    with pytest.raises(SystemExit, match="d3rlpy iql anchorl/pendulum/mixed-v0 0 with num_updates 10000"):
        main(peer, monkeypatch, tmp_path, "--seeds", "1", "--num-updates", "20000")
