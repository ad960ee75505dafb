"""How SAC begins, and that it learns; test_sac_family.py has its losses, test_player.py its way on."""

import json

import pytest
import sac
import torch
from conftest import assert_one_line, checkpoint, run_script

from common.data import ReplayBuffer
from common.evaluation import load_policy, make_environment

CPU = torch.device("cpu")


@pytest.fixture
def args():
    return sac.Args(hidden_dims=(5, 4), gamma=0.9, random_steps=250, seed=3)


# --- Environment ---


def test_the_random_episodes_are_whole_and_the_seed_determines_them(args):
    with make_environment("Pendulum-v1") as environment:
        buffers = [ReplayBuffer(sac.random_dataset(environment, args), CPU, False) for _ in range(2)]
        args.seed = 4
        other = ReplayBuffer(sac.random_dataset(environment, args), CPU, False)
    assert buffers[0].episode_lengths.tolist() == [200, 200]  # 250 steps or more, to the end of an episode
    assert buffers[0].fingerprint == buffers[1].fingerprint != other.fingerprint
    actions = buffers[0].transitions.actions
    assert -1 <= actions.min() < -0.98 and 0.98 < actions.max() <= 1 and actions.mean().abs() < 0.15
    assert not buffers[0].transitions.terminations.any()  # Pendulum-v1 only ever cuts its episodes


# --- Runs ---

SMALL = ["--hidden-dims", "64", "64", "--tau", "0.02"]
SMALL += ["--actor-learning-rate", "1e-3", "--critic-learning-rate", "1e-3"]


def test_sac_learns_to_swing_the_pendulum_up(tmp_path):
    arguments = ["--num-updates", "3000", "--eval-every", "1500", "--gamma", "0.95", "--keep-policies"]
    run = run_script("sac", *arguments, *SMALL, "--run-dir", str(tmp_path / "run"))
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["dataset_id"] == "Pendulum-v1"
    assert result["dataset_return_mean"] < -900 and result["final_return_mean"] > -300
    last, kept, earlier = (load_policy(tmp_path / "run" / f"policy{end}.pt") for end in ("", "-3000", "-1500"))
    for name, weight in last.actor.state_dict().items():
        assert torch.equal(weight, kept.actor.state_dict()[name])
        assert not torch.equal(weight, earlier.actor.state_dict()[name])


def test_it_plays_with_the_policys_noise(tmp_path):
    words = ["--num-updates", "20", "--random-steps", "20", "--hidden-dims", "8", "--run-dir", str(tmp_path / "run")]
    assert run_script("sac", *words, "--eval-episodes", "1", "--final-eval-episodes", "1").returncode == 0
    played = checkpoint(tmp_path / "run")["learner"]["player"]["added"]
    noise = played[:, 3] - load_policy(tmp_path / "run").act(played[:, :3])[:, 0]
    assert len(noise) == 20 and 0.2 < noise.std() < 1
    with make_environment("Pendulum-v1") as environment:
        random = ReplayBuffer(sac.random_dataset(environment, sac.Args(random_steps=20)), CPU, False).transitions
    assert not torch.equal(played[0, :3], random.observations[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env-id", "NoSuch-v0"], "environment '(json:)?NoSuch-v0' cannot be made"),
        (["--env-id", "json:NoSuch-v0"], "environment '(json:)?NoSuch-v0' cannot be made"),
        (["--env-id", "CartPole-v1"], r"actions must be vectors of real numbers \(a Box\), not Discrete"),
        (["--random-steps", "0"], "--random-steps 0: must be at least 1"),
        (["--tau", "2"], r"--tau 2.0: must be in \(0, 1\]"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path):
    assert_one_line(run_script("sac", *arguments, "--run-dir", str(tmp_path / "run")), message)
    assert not (tmp_path / "run").exists()


def test_there_is_no_dataset_to_choose(tmp_path):
    run = run_script("sac", "--dataset-id", "anchorl/pendulum/mixed-v0", "--run-dir", str(tmp_path / "run"))
    assert run.returncode == 2 and "Unrecognized options: --dataset-id" in run.stderr
