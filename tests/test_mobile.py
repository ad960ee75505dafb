"""MOBILE's penalty and target against NumPy on small numbers, whom they are about, and what a run may ask for."""

from types import SimpleNamespace

import mobile
import numpy as np
import pytest
import torch
from conftest import (
    assert_each_trains_its_own,
    assert_one_line,
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

SMALL_RUN = ["--dynamics-hidden-dims", "8", "--num-models", "2", "--num-elites", "2", "--dynamics-batch-size", "2048"]
SMALL_RUN += ["--max-dynamics-epochs", "1", "--rollout-batch-size", "50", "--hidden-dims", "16"]
SMALL_RUN += ["--eval-episodes", "1", "--final-eval-episodes", "1"]


@pytest.fixture
def args():
    small = {"hidden_dims": (5, 4), "dynamics_hidden_dims": (5,), "num_models": 4, "num_elites": 3, "num_samples": 2}
    return mobile.Args(batch_size=8, real_ratio=0.375, penalty_coefficient=2.0, gamma=0.9, **small)  # 3 rows of data


@pytest.fixture
def learner(args):
    """Of the four members, the second is the worst on held-out data."""
    learner = sac_learner(mobile, args)
    learner.dynamics.holdout_error.copy_(torch.tensor([0.3, 0.9, 0.1, 0.2]))
    return learner


def numpy_inconsistency(learner, batch, seed, num_samples=2, elites=(2, 3, 0)):
    """u [batch] with the draws that follow torch.manual_seed(seed): s' of each sample and elite, then a' of each s'."""
    observations = batch.observations.numpy()
    mean, std, _ = (part.detach().numpy() for part in learner.dynamics.predict(batch.observations, batch.actions))
    torch.manual_seed(seed)
    noise = torch.randn(num_samples, len(elites), len(observations), 4).numpy()  # of (s' - s, r)
    action_noise = torch.randn(num_samples, len(elites), len(observations), 2)
    values = np.zeros((num_samples, len(elites), len(observations)))
    for sample in range(num_samples):
        for place, member in enumerate(elites):
            states = observations + mean[member, :, :3] + std[member, :, :3] * noise[sample, place, :, :3]
            actions, _ = numpy_sample(learner.actor, states, action_noise[sample, place])
            values[sample, place] = lower(numpy_twins(learner.target_critic, states, actions))
    expected = values.mean(axis=0)  # T_k
    return np.sqrt(((expected - expected.mean(axis=0)) ** 2).sum(axis=0) / (len(elites) - 1))


# --- The penalty ---


@torch.no_grad()
def test_inconsistency(learner, args):
    batch = random_batch()
    torch.manual_seed(5)
    u = mobile.inconsistency(learner, batch.observations, batch.actions, args)
    expected = numpy_inconsistency(learner, batch, seed=5)
    assert u.shape == (8,) and expected.min() > 1e-3
    np.testing.assert_allclose(u, expected, rtol=1e-4)
    others = numpy_inconsistency(learner, batch, seed=5, elites=(2, 3, 1))  # not of whichever members
    assert not np.allclose(u, others, rtol=1e-2)


class Members:
    """Three members without noise, which lead each state to ones that lie some steps further, with any reward."""

    holdout_error = torch.tensor([0.1, 0.2, 0.3])

    def __init__(self, steps=(1.0, 2.0, 6.0)):
        self.steps = torch.tensor(steps)

    def predict(self, observations, actions):
        mean = self.steps[:, None, None].expand(3, len(observations), 2).clone()
        mean[..., 1] = torch.randn(3, len(observations))  # the reward, which is not in T_k
        return mean, torch.zeros_like(mean), torch.full((3, len(observations)), 50.0)  # all say that the episode ends


def simple_learner(steps=(1.0, 2.0, 6.0)):
    """pi takes the action 0.5, and Q'(s, a) = 10 s + a and a little more."""
    actor = SimpleNamespace(sample=lambda states, noise: (torch.full_like(noise, 0.5), None))
    target = lambda s, a: torch.stack([10 * s[:, 0] + a[:, 0], 10 * s[:, 0] + a[:, 0] + 1])  # noqa: E731
    return SimpleNamespace(dynamics=Members(steps), actor=actor, target_critic=target)


def test_inconsistency_by_hand(args):
    """The values of the members' states are 10, 20 and 60 above 10 s + 0.5: 30 on average, and 20, 10 and 30 off."""
    states = torch.tensor([[0.0], [3.0]])
    u = mobile.inconsistency(simple_learner(), states, torch.zeros(2, 1), args)
    assert u.tolist() == pytest.approx([np.sqrt((20**2 + 10**2 + 30**2) / 2)] * 2)


def test_members_that_agree_cost_nothing(args):
    u = mobile.inconsistency(simple_learner((2.0, 2.0, 2.0)), torch.randn(5, 1), torch.zeros(5, 1), args)
    assert u.tolist() == [0.0] * 5


def test_disagreement_that_makes_no_difference_to_the_value_costs_nothing(args):
    """As MOPO's would: where Q' is the same wherever the members lead, they may disagree."""
    flat = simple_learner()
    flat.target_critic = lambda s, a: torch.full((2, len(s)), 7.0)
    assert mobile.inconsistency(flat, torch.randn(5, 1), torch.zeros(5, 1), args).tolist() == [0.0] * 5


@torch.no_grad()
def test_more_samples_leave_less_of_their_noise(learner, args):
    """Members that are the same differ by their draws alone, by 1 / sqrt(num_samples)."""
    for weights in learner.dynamics.parameters():
        weights.copy_(weights[:1].expand_as(weights))
    batch, found = random_batch(), []
    for args.num_samples in (4, 400):
        torch.manual_seed(0)
        us = [mobile.inconsistency(learner, batch.observations, batch.actions, args) for _ in range(30)]
        found.append(torch.stack(us).mean().item())
    assert found[0] / found[1] == pytest.approx(10, rel=0.2)


# --- The loss ---


def numpy_target(learner, batch, noise, u, bound=-np.inf):
    next_observations = batch.next_observations.numpy()
    next_actions, _ = numpy_sample(learner.actor, next_observations, noise)
    next_q = lower(numpy_twins(learner.target_critic, next_observations, next_actions))
    target = batch.rewards.numpy() + 0.9 * np.where(batch.terminations.numpy() == 1, 0, next_q)
    target[3:] -= 2.0 * u[3:]  # the rollouts
    return np.maximum(target, bound)


@pytest.mark.parametrize(("min_target", "bound"), [(None, -np.inf), (-0.5, -0.5), (0.0, 0.0)])
def test_critic_loss(min_target, bound, learner, args):
    args.min_target = min_target
    batch, noise = random_batch(), draws()[0]
    u = numpy_inconsistency(learner, batch, seed=7)
    target = numpy_target(learner, batch, noise, u, bound)
    q = numpy_twins(learner.critic, batch.observations.numpy(), batch.actions.numpy())
    torch.manual_seed(7)
    loss, metrics = mobile.critic_loss(learner, batch, noise, args)
    assert loss.item() == pytest.approx(((q - target) ** 2).mean(axis=1).sum(), rel=1e-4)
    assert metrics["critic/target"].item() == pytest.approx(target.mean(), rel=1e-4)
    assert metrics["critic/u_data"].item() == pytest.approx(u[:3].mean(), rel=1e-4)
    assert metrics["critic/u_model"].item() == pytest.approx(u[3:].mean(), rel=1e-4)
    penalised = (batch.rewards.numpy() - 2.0 * u)[3:].mean()
    assert metrics["model/penalised_rewards"].item() == pytest.approx(penalised, rel=1e-4)
    assert (numpy_target(learner, batch, noise, u) < 0).any()  # so that the bounds do something
    assert_each_trains_its_own({"critic": loss}, sac_networks(learner))


def test_data_are_not_penalised_and_rollouts_are(learner, args):
    """The gradient with respect to Q itself is 2 (Q - y) / batch: what the penalty adds to it is y's loss."""
    q, gradients = torch.randn(2, 8, requires_grad=True), []
    for args.penalty_coefficient in (0.0, 2.0):
        torch.manual_seed(7)
        loss, _ = mobile.critic_loss(learner._replace(critic=lambda s, a: q), random_batch(), draws()[0], args)
        gradients += torch.autograd.grad(loss, q)
    lost = (gradients[1] - gradients[0]) * 8 / 2
    expected = 2.0 * numpy_inconsistency(learner, random_batch(), seed=7)
    expected[:3] = 0
    np.testing.assert_allclose(lost, np.stack([expected] * 2), rtol=1e-4, atol=1e-6)


def test_update_leaves_the_dynamics_alone(learner, args):
    models = [*learner.dynamics.parameters(), *learner.training_dynamics.parameters()]
    frozen = [parameter.clone() for parameter in models]
    mobile.update(learner, random_batch(), 1, args)
    assert all(map(torch.equal, frozen, models))


def test_rewards_of_the_model_are_its_own(args):
    """The penalty is in Q's target alone."""

    class Elites:
        @staticmethod
        def predict(observations, actions):
            mean = torch.tensor([[[1.0, -3.0]], [[5.0, -3.0]]]).repeat(1, len(observations), 1)
            return mean, torch.zeros_like(mean), torch.zeros(2, len(observations))

    raw = torch.tensor([[0.0], [1.0]])
    transitions = mobile.model_step(Elites, torch.zeros(4, 1), torch.zeros(4, 1), raw, "Pendulum")
    assert transitions.rewards.tolist() == [-3.0] * 4


# --- Runs ---


@pytest.mark.parametrize("validation", [[], ["--validation-fraction", "0.1"]])
def test_data_comes_first_in_a_batch(validation, monkeypatch, tmp_path, pendulum):
    """In those that measure the losses on episodes held out, too. The rest is drawn from a buffer of three calls."""
    batches, total_loss = [], mobile.total_loss

    def spy(learner, batch, noise, args):
        batches.append(batch)
        return total_loss(learner, batch, noise, args)

    monkeypatch.setattr(mobile, "total_loss", spy)
    arguments = ["--batch-size", "16", "--real-ratio", "0.25", "--num-updates", "4", "--reward-scale", "0.5"]
    arguments += ["--rollout-length", "4", "--rollouts-kept", "3"]
    run = run_script("mobile", *SMALL_RUN, *arguments, *validation, "--run-dir", str(tmp_path / "run"))
    assert run.returncode == 0, run.stderr
    assert len(checkpoint(tmp_path / "run")["learner"]["model_buffer"]["rewards"]) == 3 * 50 * 4
    assert len(batches) == 4 + bool(validation)
    rewards = pendulum.transitions.rewards * 0.5
    for batch in batches:
        num_rows = len(batch.rewards)
        assert torch.isin(batch.rewards, rewards).tolist() == [row < num_rows // 4 for row in range(num_rows)]


@pytest.mark.parametrize("other", ["mopo", "combo"])
def test_takes_the_model_of_its_siblings(other, tmp_path, pendulum):
    """Whose buffers, too, have room for as many rows as so many calls of whole rollouts."""
    first, second = tmp_path / "first", tmp_path / "second"
    few = [*SMALL_RUN, "--num-updates", "2", "--rollout-length", "4", "--rollouts-kept", "3"]
    assert run_script(other, *few, "--run-dir", str(first)).returncode == 0
    assert len(checkpoint(first)["learner"]["model_buffer"]["rewards"]) == 3 * 50 * 4
    run = run_script("mobile", *few, "--dynamics", str(first), "--run-dir", str(second))
    assert run.returncode == 0, run.stderr
    ours, theirs = (checkpoint(folder)["learner"]["dynamics"] for folder in (second, first))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--penalty-coefficient", "-0.1"], "must not be negative"),
        (["--penalty-coefficient", "nan"], "must be finite"),
        (["--num-samples", "0"], "must be at least 1"),
        (["--num-elites", "1"], r"must be in \[2, --num-models\]"),
        (["--num-elites", "8"], r"must be in \[2, --num-models\]"),
        (["--min-target", "inf"], "must be finite"),
        *((["--real-ratio", ratio], "must leave some of both, data and rollouts") for ratio in ("0", "1", "0.001")),
    ],
)
def test_bad_arguments(words, reason, tmp_path):
    run = run_script("mobile", *words, "--run-dir", str(tmp_path / "run"))
    assert_one_line(run, f"error: {words[0]} .*{reason}")
    assert not (tmp_path / "run").exists()
