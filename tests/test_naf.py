"""NAF's parabola and loss against NumPy on small numbers, and how it acts online; test_behaviour.py has its failure."""

import naf
import numpy as np
import pytest
import torch
from conftest import SHORT, checkpoint, numpy_mlp, random_batch, run_script

from common.optim import Adam

CPU = torch.device("cpu")


@pytest.fixture
def args():
    return naf.Args(hidden_dims=(5, 4), gamma=0.9)


@pytest.fixture
def learner(args):
    torch.manual_seed(0)
    learner = naf.build(3, 2, args, CPU, Adam)
    with torch.no_grad():
        for parameter in (*learner.actor.parameters(), *learner.target_critic.parameters()):
            parameter.add_(0.5 * torch.randn_like(parameter))  # so that the target differs from the critic
    return learner


def numpy_terms(critic, observations):
    """V, mu and P of each row, for actions of 2 numbers."""
    for v, m0, m1, l00, _, l10, l11 in numpy_mlp(critic.net, observations):
        triangle = np.array([[np.exp(l00), 0], [l10, np.exp(l11)]])
        yield v, np.tanh([m0, m1]), triangle @ triangle.T


def numpy_q(critic, observations, actions):
    rows = zip(numpy_terms(critic, observations), actions, strict=True)
    return np.array([v - 0.5 * (a - mu) @ p @ (a - mu) for (v, mu, p), a in rows])


def test_q_is_a_parabola_in_the_action(learner):
    batch, critic = random_batch(), learner.actor.critic
    expected = numpy_q(critic, batch.observations.numpy(), batch.actions.numpy())
    np.testing.assert_allclose(critic(batch.observations, batch.actions).detach(), expected[None], rtol=1e-4)


def test_the_policy_is_its_summit_and_v_its_height(learner):
    observations, critic = random_batch().observations, learner.actor.critic
    best = learner.actor(observations)
    mu = np.array([mean for _, mean, _ in numpy_terms(critic, observations.numpy())])
    np.testing.assert_allclose(best.detach(), mu, atol=1e-6)
    q = critic(observations, best)
    assert torch.equal(q[0], critic.terms(observations)[0])
    for _ in range(100):
        assert (critic(observations, best + 0.1 * torch.randn_like(best)) < q).all()


def test_critic_loss(learner, args):
    batch = random_batch()
    v = np.array([v for v, _, _ in numpy_terms(learner.target_critic, batch.next_observations.numpy())])
    target = batch.rewards.numpy() + 0.9 * np.where(batch.terminations.numpy() == 1, 0, v)
    q = numpy_q(learner.actor.critic, batch.observations.numpy(), batch.actions.numpy())
    loss, metrics = naf.critic_loss(learner, batch, args)
    assert loss.item() == pytest.approx(np.mean((target - q) ** 2), rel=1e-4)
    assert metrics["critic/q"].item() == pytest.approx(q.mean(), rel=1e-4)
    assert metrics["critic/target"].item() == pytest.approx(target.mean(), rel=1e-4)


def test_update_trains_the_critic_and_moves_the_target_by_tau(learner, args):
    before = [parameter.clone() for parameter in learner.target_critic.parameters()]
    critic = [parameter.clone() for parameter in learner.actor.parameters()]
    naf.update(learner, random_batch(), 1, args)
    assert not any(map(torch.equal, critic, learner.actor.parameters()))
    after, online = learner.target_critic.parameters(), learner.actor.critic.parameters()
    for old, new, target in zip(before, after, online, strict=True):
        torch.testing.assert_close(new, old + args.tau * (target - old))


# --- Runs ---


def test_online_it_plays_with_noise(tmp_path, pendulum):
    """Its actions are the policy's with noise of that size; a finished run goes on to the same bits."""
    words = ["--num-updates", "5", "--exploration-noise", "0.01", "--critic-learning-rate", "1e-30", *SHORT]
    folders = [tmp_path / name for name in ("whole", "later")]
    more = ["--online-steps", "60", "--run-dir"]
    assert run_script("naf", *words, *more, str(folders[0])).returncode == 0
    assert run_script("naf", *words, "--run-dir", str(folders[1])).returncode == 0
    assert len(checkpoint(folders[1])["learner"]) == 3
    run = run_script("naf", *words, "--resume", *more, str(folders[1]))
    assert run.returncode == 0, run.stderr
    learners = [checkpoint(folder)["learner"] for folder in folders]
    added = [learner["player"]["added"] for learner in learners]
    assert len(added[0]) == 60 and torch.equal(*added)
    actor = naf.Actor(3, 1, naf.Args(hidden_dims=(16, 16)))
    actor.load_state_dict(learners[0]["actor"])
    away = added[0][:, 3:4] - actor(added[0][:, :3]).detach()
    assert 0.007 < away.std() < 0.013
