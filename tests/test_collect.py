"""collect.py: what it writes is what happened, with the boundaries and probabilities right; all or nothing."""

import os
import shutil
import signal
import subprocess
import sys
import time

import gymnasium as gym
import minari
import numpy as np
import pytest
import sac
import torch
from collect import Args as CollectArgs
from collect import Play as CollectPlay
from collect import (
    choose_medium,
    describe,
    random_behaviour,
    read_agent,
    roll_out,
    sampling_behaviour,
    whole_episode,
)
from conftest import ROOT, assert_one_line, checkpoint, numpy_sample, run_script

from common.command_line import BadInput
from common.data import ReplayBuffer, action_bounds, load_dataset
from common.evaluation import FINAL_SEED, Player, evaluate, load_policy, make_environment

CPU = torch.device("cpu")
PREFIX = "collected/pendulum"
FAST = ["--hidden-dims", "32", "32", "--gamma", "0.9", "--tau", "0.02", "--random-steps", "250"]
FAST += ["--actor-learning-rate", "3e-3", "--critic-learning-rate", "3e-3", "--eval-every", "250"]
MODULE = """
import gymnasium as gym
from gymnasium.envs.classic_control import PendulumEnv

class Room(PendulumEnv):
    pass

gym.register("Room-v0", entry_point=Room, max_episode_steps=10)
"""
COLLECT = ["--env-id", "Pendulum-v1", "--num-updates", "2000", "--steps", "300", "--reference-episodes", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, datasets_path):
    """The agent's run folder; all six datasets of it are there under PREFIX."""
    folder = tmp_path_factory.mktemp("collect") / "run"
    run = run_script("collect", *COLLECT, "--prefix", PREFIX, "--run-dir", str(folder), "--", *FAST)
    assert run.returncode == 0, run.stderr
    yield folder
    shutil.rmtree(datasets_path / "collected")


@pytest.fixture
def play():
    with make_environment("Pendulum-v1") as environment:
        yield CollectPlay("Pendulum-v1", environment, *action_bounds(environment.action_space))


def dataset(quality):
    return minari.load_dataset(f"{PREFIX}/{quality}-v0")


def returns(quality):
    return [episode.rewards.sum() for episode in dataset(quality).iterate_episodes()]


def test_the_datasets_are_in_order(folder):
    means = {name: np.mean(returns(name)) for name in ("random", "medium", "expert", "medium-expert")}
    assert means["random"] < means["medium"] < means["expert"]
    assert means["medium-expert"] == pytest.approx((means["medium"] + means["expert"]) / 2)
    metadata = dataset("medium").storage.metadata
    assert metadata["ref_min_score"] == pytest.approx(-1250, abs=400)
    assert metadata["ref_max_score"] > -400


def test_the_reference_scores_are_the_means_of_fresh_episodes(folder, play, datasets_path):
    """Of the expert's mean action, from the starts of final scores, which its evaluations have not seen."""
    metadata = dataset("random").storage.metadata
    act, player = random_behaviour(play, 0), Player(play.environment, None, 0, 3)
    low = np.mean([roll_out(act, player).rewards.sum() for _ in range(3)])
    environments = [make_environment("Pendulum-v1") for _ in range(3)]
    high = evaluate(load_policy(datasets_path / PREFIX / "expert-v0"), environments, 3, FINAL_SEED)[0].mean()
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == pytest.approx((low, high), rel=1e-6)


def test_the_score_that_is_told(capsys):
    episodes = [whole_episode(np.zeros((3, 1)), np.zeros((2, 1)), np.array([x, 1.0]), False) for x in (1.0, 3.0)]
    describe("a/data-v0", episodes, "made up", (-1.0, 9.0))
    assert capsys.readouterr().out == "a/data-v0: made up; 2 episodes, 4 steps, return 3.0, score 40.0\n"


def test_episodes_are_whole_and_cut_by_the_time_limit(folder):
    for quality, count in (("random", 2), ("medium", 2), ("expert", 2), ("medium-expert", 4)):
        episodes = list(dataset(quality).iterate_episodes())
        assert [len(episode.rewards) for episode in episodes] == [200] * count  # 300 steps, to the end of an episode
        assert not any(episode.terminations.any() for episode in episodes)
        assert all(episode.truncations.tolist() == [False] * 199 + [True] for episode in episodes)


def test_the_replay_is_what_the_agent_saw(folder, play):
    agent = read_agent(folder, play, CollectArgs("Pendulum-v1"))
    buffer = ReplayBuffer(load_dataset(f"{PREFIX}/full-replay-v0"), CPU, normalize_observations=False)
    assert buffer.episode_lengths.tolist() == [200] * 12  # 400 random steps and 2,000 of the agent's
    for ours, theirs in zip(buffer.transitions, agent.transitions, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_medium_replay_ends_where_medium_was_reached(folder):
    text = dataset("medium-replay").storage.metadata["algorithm_name"]
    step = int(text.split("until update ")[1].split(";")[0])
    assert f"after update {step}, --steps 300;" in dataset("medium").storage.metadata["algorithm_name"]
    replay, full = dataset("medium-replay"), dataset("full-replay")
    assert replay.total_steps == 400 + step < full.total_steps
    last = replay[len(replay) - 1]
    assert last.truncations[-1] and not last.terminations.any()  # cut where the agent was evaluated
    np.testing.assert_array_equal(last.observations[:-1], full[len(replay) - 1].observations[: len(last.rewards)])


def test_choose_medium_by_hand():
    course = {3000: 90.0, 1000: 10.0, 2000: 35.0, 4000: 34.0}
    assert choose_medium(course, 0.0, 100.0, 1 / 3) == 2000
    assert choose_medium(course, 0.0, 100.0, 0.5) == 3000
    with pytest.raises(BadInput, match=r"no evaluation reached 0\.95 of the expert's return"):
        choose_medium(course, 0.0, 100.0, 0.95)


def test_log_probabilities_are_of_the_actions_that_were_taken(folder, play):
    random = dataset("random")[0].infos["log_prob"]
    np.testing.assert_allclose(random[:-1], np.log(1 / 4))  # uniform on [-2, 2]
    policy = read_agent(folder, play, CollectArgs("Pendulum-v1")).policy(2000)
    episode = roll_out(sampling_behaviour(policy, seed=5), Player(play.environment, None, 6))
    noise = torch.cat(
        [torch.randn(1, 1, generator=generator) for generator in [torch.Generator().manual_seed(5)] * 200]
    )
    actions, log_prob = numpy_sample(policy.actor, episode.observations[:-1], noise)
    np.testing.assert_allclose(episode.actions, 2 * actions, atol=1e-4)
    np.testing.assert_allclose(episode.infos["log_prob"][:-1], log_prob - np.log(2), atol=1e-3)
    assert np.isnan(episode.infos["log_prob"][-1])


def test_random_actions_fill_the_range(play):
    act = random_behaviour(play, 0)
    actions = np.array([act(np.zeros(3), None)[0] for _ in range(2000)])
    assert actions.dtype == np.float32 and -2 <= actions.min() < -1.98 and 1.98 < actions.max() <= 2
    assert np.std(actions) == pytest.approx(4 / np.sqrt(12), rel=0.05)


def test_the_behaviour_policy_lies_beside_its_data(folder, play, datasets_path):
    agent = read_agent(folder, play, CollectArgs("Pendulum-v1"))
    policy = load_policy(datasets_path / PREFIX / "expert-v0")
    step = max(agent.returns, key=agent.returns.get)
    observations = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    np.testing.assert_array_equal(policy(observations), agent.policy(step)(observations))
    trained = torch.load(folder / f"policy-{step}.pt", weights_only=True)["actor"]
    actor = sac.Actor(3, 1, sac.HyperParameters(hidden_dims=(32, 32)))
    actor.load_state_dict(trained)
    mean = actor(torch.as_tensor(observations)).detach().numpy()
    np.testing.assert_allclose(policy(observations), 2 * mean, rtol=1e-5)
    noise = torch.randn(5, 1)
    ours, theirs = (one.sample(torch.as_tensor(observations), noise) for one in (policy.actor, actor))
    assert all(map(torch.equal, ours, theirs))


def test_the_round_trip_from_an_environment_to_a_report(folder, tmp_path):
    """What was collected is inspected and trained on; the policy is evaluated, and held against its data."""
    dataset_id = f"{PREFIX}/medium-expert-v0"
    inspected = run_script("inspect_dataset", dataset_id)
    assert inspected.returncode == 0 and "800 transitions in 4 episodes" in inspected.stdout, inspected.stderr
    arguments = [
        "--dataset-id",
        dataset_id,
        "--num-updates",
        "20",
        "--eval-episodes",
        "1",
        "--final-eval-episodes",
        "1",
    ]
    run = run_script("iql", *arguments, "--run-dir", str(tmp_path / "run"))
    assert run.returncode == 0 and "warning" not in run.stderr and "score" in run.stdout
    report = run_script("shift_report", str(tmp_path / "run"), "--num-states", "50", "--num-updates", "5")
    assert report.returncode == 0 and "alarming" in report.stdout, report.stderr


def test_the_same_command_again_trains_nothing_anew(folder, tmp_path, datasets_path):
    before = (folder / "checkpoint.pt").stat().st_mtime_ns
    arguments = [*COLLECT, "--prefix", "collected/again", "--quality", "random", "--run-dir", str(folder)]
    assert run_script("collect", *arguments).returncode == 0
    assert (folder / "checkpoint.pt").stat().st_mtime_ns == before
    assert [path.name for path in (datasets_path / "collected" / "again").glob("*-v0")] == ["random-v0"]


def test_a_command_that_was_stopped_goes_on_after_the_datasets_it_has_made(folder, datasets_path):
    made = sorted((datasets_path / PREFIX).glob("*-v0"))
    shutil.rmtree(made.pop(2))  # expert, medium, medium-expert, medium-replay, ...
    before = [path.stat().st_mtime_ns for path in made]
    run = run_script("collect", *COLLECT, "--prefix", PREFIX, "--run-dir", str(folder))
    assert run.returncode == 0 and run.stdout.count("it is there already") == 5, run.stderr
    assert len([*(datasets_path / PREFIX).glob("*-v0")]) == 6 and before == [path.stat().st_mtime_ns for path in made]


def test_what_an_earlier_command_made_of_other_arguments_is_told(folder, datasets_path):
    arguments = [*COLLECT, "--prefix", PREFIX, "--quality", "random", "--run-dir", str(folder)]
    before = (folder / "checkpoint.pt").read_bytes()
    run = run_script("collect", *arguments, "--", *FAST)
    assert run.returncode == 0 and "it is there already" in run.stdout, run.stderr
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "collect.py", *arguments, "--", *FAST, "--gamma", "0.5"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and "gamma is 0.9 in it, not 0.5" in run.stderr and run.stdout == ""
    assert before == (folder / "checkpoint.pt").read_bytes()
    both = [*COLLECT, "--prefix", PREFIX, "--quality", "medium-expert", "--medium", "0.05", "--run-dir", str(folder)]
    assert run_script("collect", *both).returncode == 2  # its medium is another
    run = run_script("collect", *arguments, "--steps", "600")
    assert run.returncode == 2 and f"{PREFIX}/random-v0 exists: delete it, or give another --prefix" in run.stderr
    run = run_script("collect", *arguments, "--steps", "600", "--quality", "medium-replay")  # has no size of its own
    assert run.returncode == 0 and "it is there already" in run.stdout, run.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_agents_checkpoint(number, tmp_path, datasets_path):
    words = ["--env-id", "Pendulum-v1", "--num-updates", "100000", "--prefix", "collected/x"]
    words += ["--run-dir", str(tmp_path / "run"), "--", *FAST, "--log-every", "10", "--checkpoint-every", "100000"]
    command = [sys.executable, "-m", "benchmarks.collect", *words]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    rows = tmp_path / "run" / "metrics.csv"
    while not rows.exists() or "\n20," not in rows.read_text():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    os.killpg(process.pid, number)  # as a terminal does
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number and "Traceback" not in errors
    assert checkpoint(tmp_path / "run")["step"] >= 20 and "interrupted at update" in errors


def test_without_an_agent_what_is_there_is_not_its_own(folder, tmp_path):
    run = run_script("collect", *COLLECT, "--prefix", PREFIX, "--run-dir", str(tmp_path / "other"))
    assert_one_line(run, f"{PREFIX}/random-v0 .*exists: delete it")
    assert not (tmp_path / "other").exists()


def test_an_expert_below_random_actions_is_refused(folder, monkeypatch, datasets_path):
    monkeypatch.setattr("collect.expert_return", lambda *_: -1e6)
    run = run_script("collect", *COLLECT, "--prefix", "collected/low", "--run-dir", str(folder))
    assert_one_line(run, "random actions earn -.*, the agent's best policy -1000000.0: give it more --num-updates")
    assert not (datasets_path / "collected" / "low").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("args.json", "[]", "algorithm is None there"),
        ("args.json", "[1]", "cannot read the agent's run"),
        ("metrics.csv", "step,eval/return_mean\nx,1\n", "cannot read the agent's run: invalid literal"),
        ("metrics.csv", "step\n1\n", "cannot read the agent's run: 'eval/return_mean'"),
        ("metrics.csv", "step,eval/return_mean\n1,\n", "metrics.csv has no evaluation"),
        ("checkpoint.pt", {"added": None}, "cannot read the agent's run"),
        ("checkpoint.pt", {"added": torch.zeros(2, 2)}, "cannot read the agent's run"),
        ("checkpoint.pt", {"added": torch.full((2000, 9), torch.nan)}, "what the agent saw is damaged"),
    ],
)
def test_a_damaged_run_is_one_line(name, content, message, folder, tmp_path):
    run = shutil.copytree(folder, tmp_path / "run")
    if isinstance(content, str):
        (run / name).write_text(content)
    else:
        saved = checkpoint(run)
        saved["learner"]["player"] |= content
        torch.save(saved, run / name)
    assert_one_line(run_script("collect", *COLLECT, "--prefix", "collected/x", "--run-dir", str(run)), message)


def test_a_damaged_result_is_made_anew(folder, tmp_path):
    run = shutil.copytree(folder, tmp_path / "run")
    (run / "result.json").write_text("[]")
    words = [*COLLECT, "--prefix", "collected/anew", "--quality", "random", "--run-dir", str(run), "--", *FAST]
    assert run_script("collect", *words).returncode == 0
    assert (run / "result.json").read_text().startswith("{")


def test_a_users_own_environment(folder, tmp_path, monkeypatch):
    """The class that it is made of is no entry point that a dataset can name."""
    (tmp_path / "my_rooms.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("collect.choose_medium", lambda returns, *_: max(returns))
    words = ["--env-id", "my_rooms:Room-v0", "--num-updates", "10", "--steps", "30", "--reference-episodes", "1"]
    script = ["--", "--random-steps", "20", "--eval-every", "10", "--hidden-dims", "4"]
    words += ["--prefix", "collected/mine", "--quality", "random", "--run-dir", str(tmp_path / "run")]
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path}")
    run = run_script("collect", *words, *script)
    assert run.returncode == 0, run.stderr
    data = load_dataset("collected/mine/random-v0", "my_rooms:Room-v0")
    assert data.env_id == "my_rooms:Room-v0" and "Traceback" not in run.stderr
    gym.registry.pop("Room-v0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env-id", "NoSuch-v0"], "environment 'NoSuch-v0' cannot be made"),
        (["--env-id", "CartPole-v1"], r"actions must be vectors of real numbers \(a Box\), not Discrete"),
        (["--env-id", "CarRacing-v3"], "images are not supported|cannot be made"),
        (["--medium", "1.5"], "--medium 1.5: must be between 0 and 1"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--prefix", "a b"], "a b/random-v0 is no Minari id"),
        (["--prefix", "anchorl/mine"], "--prefix anchorl/mine: anchorl/ is for built-in datasets"),
        (["--", "--seed=3", "--run-dir", "x"], "--seed=3 --run-dir after --: collect has it, too; give it before --"),
        (["--prefix", "collected/other"], "collected/other/random-v0 exists: delete it, or give another --prefix"),
        (["--seed", "1", "--prefix", "collected/x"], "seed is 0 there, not 1; name another folder"),
        (["--env-id", "MountainCarContinuous-v0"], "env_id is 'Pendulum-v1' there, not 'MountainCarContinuous-v0'"),
    ],
)
def test_bad_input_is_one_line(arguments, message, folder, make_dataset, datasets_path):
    make_dataset("collected/other/random-v0")  # of something else
    assert_one_line(run_script("collect", *COLLECT, "--run-dir", str(folder), *arguments), message)
    assert not (datasets_path / "collected" / "x").exists()
    assert not list(datasets_path.glob(".making-*"))
