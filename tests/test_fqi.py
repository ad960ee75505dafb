"""FQI's loss against NumPy on small numbers, its target network, and what it says of its overestimate."""

import csv

import fqi
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import SHORT, assert_one_line, discrete_batch, numpy_mlp, random_episode, run_script

from common.evaluation import load_policy
from common.optim import Adam

CPU = torch.device("cpu")


@pytest.fixture
def args():
    return fqi.Args(hidden_dims=(5, 4), gamma=0.9)


@pytest.fixture
def learner(args):
    torch.manual_seed(0)
    learner = fqi.build(3, 3, args, CPU, Adam)
    with torch.no_grad():
        for parameter in learner.target_critic.parameters():
            parameter.add_(torch.randn_like(parameter))  # so that it differs from the critic
    return learner


def numpy_loss(learner, batch, choice):
    """The squared error, a' being the best by `choice` [batch, actions] in the eyes of the target network."""
    next_q = numpy_mlp(learner.target_critic.net, batch.next_observations.numpy())
    q = numpy_mlp(learner.actor.critic.net, batch.observations.numpy())
    errors = []
    for row in range(8):
        future = 0 if batch.terminations[row] else next_q[row, np.argmax(choice[row])]
        errors.append(float(batch.rewards[row]) + 0.9 * future - q[row, int(batch.actions[row])])
    return np.mean(np.square(errors))


@pytest.mark.parametrize("double", [False, True])
def test_critic_loss(double, learner, args):
    batch = discrete_batch()
    args.double = double
    loss, _ = fqi.critic_loss(learner, batch, args)
    chooser = learner.actor.critic if double else learner.target_critic
    choices = {net: numpy_mlp(net.net, batch.next_observations.numpy()) for net in (learner.actor.critic, chooser)}
    assert loss.item() == pytest.approx(numpy_loss(learner, batch, choices[chooser]), rel=1e-5)
    if not double:  # on these numbers, the two are not the same
        assert loss.item() != pytest.approx(numpy_loss(learner, batch, choices[learner.actor.critic]), rel=1e-2)


def test_update_trains_the_critic_and_moves_the_target_by_tau(learner, args):
    before = [parameter.clone() for parameter in learner.target_critic.parameters()]
    critic = [parameter.clone() for parameter in learner.actor.parameters()]
    fqi.update(learner, discrete_batch(), 1, args)
    assert not any(map(torch.equal, critic, learner.actor.parameters()))
    for old, new, online in zip(
        before, learner.target_critic.parameters(), learner.actor.critic.parameters(), strict=True
    ):
        torch.testing.assert_close(new, old + args.tau * (online - old))


def test_overestimate_is_the_promise_less_what_came(learner):
    observations = discrete_batch().observations
    promise = numpy_mlp(learner.actor.critic.net, observations.numpy()).max(axis=1).mean()
    found = fqi.overestimate(learner.actor.critic, observations, np.array([1.0, 3.0]))
    expected = {"critic/q_initial": promise, "eval/discounted_return": 2.0, "critic/overestimate": promise - 2.0}
    assert found == pytest.approx(expected, rel=1e-5)
    assert fqi.overestimate(learner.actor.critic, observations, None).keys() == {"critic/q_initial"}


def test_the_discounted_return_is_of_the_rewards_that_q_learns_from(tmp_path, cartpole):
    """CartPole gives 1 a step: 2 (1 + 1) = 4 of them, or 1 - 1 = 0."""
    for name, words in (
        ("four", ["--reward-scale", "2", "--reward-shift", "1", "--gamma", "1"]),
        ("none", ["--reward-shift", "-1"]),
    ):
        run = run_script("fqi", "--num-updates", "5", *SHORT, *words, "--run-dir", str(tmp_path / name))
        assert run.returncode == 0, run.stderr
    (four,), (none,) = (list(csv.DictReader((tmp_path / name / "metrics.csv").open())) for name in ("four", "none"))
    assert float(four["eval/discounted_return"]) == pytest.approx(4 * float(four["eval/return_mean"]))
    assert float(none["eval/discounted_return"]) == pytest.approx(0, abs=1e-6) and float(none["eval/return_mean"]) > 1


def test_the_discounted_return_is_that_of_the_evaluated_episodes(tmp_path, cartpole):
    words = ["--num-updates", "3", "--gamma", "0.5", "--run-dir", str(tmp_path / "run"), *SHORT]
    assert run_script("fqi", *words).returncode == 0
    (row,) = csv.DictReader((tmp_path / "run" / "metrics.csv").open())
    assert float(row["eval/return_mean"]) > 7
    assert float(row["eval/discounted_return"]) == pytest.approx(2, abs=0.02)  # 1 + 1/2 + 1/4 + ...
    difference = float(row["critic/q_initial"]) - float(row["eval/discounted_return"])
    assert float(row["critic/overestimate"]) == pytest.approx(difference)
    starts = cartpole.transitions.observations[cartpole.episode_starts]
    q = load_policy(tmp_path / "run").actor.critic(starts).amax(dim=1).mean().item()
    assert float(row["critic/q_initial"]) == pytest.approx(q, rel=1e-5)


# --- Bad input ---


@pytest.mark.parametrize("algorithm", ["fqi", "discrete_iql", "discrete_cql", "discrete_bcq"])
def test_continuous_data_is_one_line(algorithm, tmp_path, pendulum):
    arguments = ["--dataset-id", "anchorl/pendulum/mixed-v0", "--run-dir", str(tmp_path / "run")]
    pattern = r"error: anchorl/pendulum/mixed-v0: actions must be numbered \(a Discrete\), not Box"
    assert_one_line(run_script(algorithm, *arguments), pattern)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("algorithm", ["bc", "iql", "mopo"])
def test_discrete_data_for_continuous_algorithms_is_one_line(algorithm, tmp_path, cartpole):
    dataset_id = "anchorl/cartpole/mixed-v0"
    arguments = ["--dataset-id", dataset_id, "--run-dir", str(tmp_path / "run")]
    run = run_script(algorithm, *arguments)
    assert_one_line(run, rf"error: {dataset_id}: actions must be vectors of real numbers \(a Box\), not Discrete\(2\)")
    assert not (tmp_path / "run").exists()


def test_logged_data_without_environment_trains_and_says_so(make_dataset, tmp_path):
    episodes = [random_episode(seed, actions=np.random.default_rng(seed).integers(1, 4, 30)) for seed in range(3)]
    dataset_id = make_dataset(episodes=episodes, action_space=gym.spaces.Discrete(3, start=1))
    words = ["--dataset-id", dataset_id, "--num-updates", "5", "--run-dir", str(tmp_path / "run"), *SHORT]
    run = run_script("fqi", *words, "--reward-scale", "return-range")
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("warning") == 1 and "names no environment" in run.stderr
    (row,) = csv.DictReader((tmp_path / "run" / "metrics.csv").open())
    assert float(row["critic/q_initial"]) and "critic/overestimate" not in row
