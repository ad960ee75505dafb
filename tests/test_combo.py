"""COMBO's critic loss against NumPy on small numbers, where it pushes Q, and whose actions its rollouts take."""

import combo
import numpy as np
import pytest
import torch
from conftest import (
    assert_each_trains_its_own,
    checkpoint,
    draws,
    lower,
    numpy_sample,
    numpy_twins,
    random_batch,
    run_script,
    sac_learner,
    sac_networks,
)


@pytest.fixture
def args():
    small = {"hidden_dims": (5, 4), "dynamics_hidden_dims": (5,), "num_models": 5, "rollout_batch_size": 10}
    return combo.Args(batch_size=8, real_ratio=0.375, beta=2.0, gamma=0.9, **small)  # 3 rows of data, 5 of rollouts


@pytest.fixture
def learner(args):
    return sac_learner(combo, args)


def test_critic_loss(learner, args):
    batch = random_batch()
    next_actions, _ = learner.actor.sample(batch.next_observations, draws()[0])
    next_q = lower(numpy_twins(learner.target_critic, batch.next_observations.numpy(), next_actions.detach().numpy()))
    target = batch.rewards.numpy() + 0.9 * np.where(batch.terminations.numpy() == 1, 0, next_q)
    q = numpy_twins(learner.critic, batch.observations.numpy(), batch.actions.numpy())
    regulariser = q[:, 3:].mean(axis=1) - q[:, :3].mean(axis=1)
    expected = (((q - target) ** 2).mean(axis=1) + 2.0 * regulariser).sum()
    loss, metrics = combo.critic_loss(learner, batch, draws()[0], args)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert metrics["critic/q_data"].item() == pytest.approx(q[:, :3].mean(), rel=1e-4)
    assert metrics["critic/q_model"].item() == pytest.approx(q[:, 3:].mean(), rel=1e-4)


def test_critic_loss_with_logsumexp(learner, args):
    """Q goes down at actions drawn at the states of data and rollouts alike, in the place of the rollouts' actions."""
    args.regularizer, args.num_samples = "logsumexp", 3
    batch = random_batch()
    torch.manual_seed(5)
    loss, metrics = combo.critic_loss(learner, batch, draws()[0], args)
    torch.manual_seed(5)
    uniform = (torch.rand(3, 8, 2) * 2 - 1).numpy()
    observations, next_observations = batch.observations.numpy(), batch.next_observations.numpy()
    actions, log_prob = numpy_sample(learner.actor, observations, torch.randn(3, 8, 2))
    actions_next, log_prob_next = numpy_sample(learner.actor, next_observations, torch.randn(3, 8, 2))
    candidates = np.concatenate([uniform, actions, actions_next])
    density = np.concatenate([np.full((3, 8), 1 / 4), np.exp(log_prob), np.exp(log_prob_next)])
    q_sampled = np.stack([numpy_twins(learner.critic, observations, rows) for rows in candidates], axis=1)
    pushed_down = np.log((np.exp(q_sampled) / density).mean(axis=1))  # [2, 8], over the nine actions of a state

    next_actions, _ = learner.actor.sample(batch.next_observations, draws()[0])
    next_q = lower(numpy_twins(learner.target_critic, next_observations, next_actions.detach().numpy()))
    target = batch.rewards.numpy() + 0.9 * np.where(batch.terminations.numpy() == 1, 0, next_q)
    q = numpy_twins(learner.critic, observations, batch.actions.numpy())
    regulariser = pushed_down.mean(axis=1) - q[:, :3].mean(axis=1)
    expected = (((q - target) ** 2).mean(axis=1) + 2.0 * regulariser).sum()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert metrics["critic/q_model"].item() == pytest.approx(q[:, 3:].mean(), rel=1e-4)  # as with the rollouts
    assert_each_trains_its_own({"critic": loss}, sac_networks(learner))


def test_logsumexp_meets_the_exact_integral(learner):
    """Q(s, a) = s_1 + 2 a_1: the integral of its exponential over [-1, 1]^2 is exp(s_1) 2 sinh(2)."""
    linear = learner._replace(critic=lambda s, a: (s[:, 0] + 2 * a[:, 0]).expand(2, -1))
    batch = random_batch()
    torch.manual_seed(0)
    found = combo.log_integral(linear, batch, 20_000)
    expected = batch.observations[:, 0] + np.log(2 * np.sinh(2))
    torch.testing.assert_close(found, expected.expand(2, -1), atol=0.03, rtol=0)


def test_q_is_pushed_down_at_rollouts_and_up_at_data(learner, args):
    """The gradient with respect to the values themselves, without the Bellman error."""
    q, gradients = torch.randn(2, 8, requires_grad=True), []
    for args.beta in (0.0, 2.0):
        loss, _ = combo.critic_loss(
            learner._replace(critic=lambda observations, actions: q), random_batch(), draws()[0], args
        )
        gradients += torch.autograd.grad(loss, q)
    conservative = gradients[1] - gradients[0]
    torch.testing.assert_close(conservative[:, :3], torch.full((2, 3), -2 / 3))
    torch.testing.assert_close(conservative[:, 3:], torch.full((2, 5), 2 / 5))


def test_data_comes_first_in_a_batch(monkeypatch, tmp_path, pendulum):
    """The rest is drawn from a buffer that has room for three calls of 50 rollouts of 4 steps."""
    batches, total_loss = [], combo.total_loss

    def spy(learner, batch, noise, args):
        batches.append(batch)
        return total_loss(learner, batch, noise, args)

    monkeypatch.setattr(combo, "total_loss", spy)
    arguments = ["--batch-size", "16", "--real-ratio", "0.25", "--num-updates", "4", "--dynamics-hidden-dims", "8"]
    arguments += ["--rollout-batch-size", "50", "--max-dynamics-epochs", "1", "--dynamics-batch-size", "2048"]
    arguments += ["--rollout-length", "4", "--rollouts-kept", "3"]
    run = run_script(
        "combo", *arguments, "--eval-episodes", "1", "--final-eval-episodes", "1", "--run-dir", str(tmp_path / "run")
    )
    assert run.returncode == 0, run.stderr
    assert len(batches) == 4
    assert len(checkpoint(tmp_path / "run")["learner"]["model_buffer"]["rewards"]) == 3 * 50 * 4
    data = pendulum.transitions
    for batch in batches:
        real = torch.isin(batch.rewards, data.rewards)
        real &= torch.isin(batch.next_observations[:, 0], data.next_observations[:, 0])
        assert real.tolist() == [True] * 4 + [False] * 12


@pytest.mark.parametrize("real_ratio", ["nan", "inf", "0", "1", "0.001"])
def test_a_batch_needs_both_data_and_rollouts(real_ratio, tmp_path):
    run = run_script("combo", "--real-ratio", real_ratio, "--run-dir", str(tmp_path / "run"))
    assert run.returncode == 2 and run.stderr.startswith("error: --real-ratio ") and run.stderr.count("\n") == 1


def test_rollouts_take_the_policys_actions(learner, args):
    args.rollout_batch_size, args.rollout_length = 10, 5
    with torch.no_grad():
        learner.actor.mean.bias.fill_(5.0)
    raw = torch.tensor([[0.0], [1.0]])
    actions = combo.rollout(learner.actor, learner.dynamics, random_batch(10), raw, "Pendulum", args).actions
    assert actions.shape == (50, 2) and actions.mean() > 0.8 and actions.abs().max() <= 1
