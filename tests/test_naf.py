"""NAF's parabola and loss against NumPy on small numbers, its rollouts, and how it acts online.

test_behaviour.py has its failure, test_dynamics.py the model.
"""

import csv

import naf
import numpy as np
import pytest
import torch
from conftest import (
    SHORT,
    SHORTER,
    SOON_BEST,
    assert_one_line,
    assert_same,
    assert_same_runs,
    checkpoint,
    numpy_mlp,
    random_batch,
    random_episode,
    run_script,
)

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


# --- Rollouts ---


class Stairs:
    """A model without noise: a step moves all of a state by the first number of the action; the reward is the state."""

    @staticmethod
    def predict(observations, actions):
        mean = torch.cat([actions[:, :1].expand_as(observations), observations[:, :1]], dim=-1)
        return mean.expand(2, -1, -1), torch.zeros(2, *mean.shape), torch.full((2, len(mean)), 50.0)


def roll(learner, args, ending="Pendulum", batch_size=6):
    starts = naf.Batch(*random_batch(batch_size))
    scale = torch.tensor([[0.0] * 3, [1.0] * 3])
    return starts, naf.rollout(learner.actor, Stairs, starts, scale, ending, args)


@pytest.mark.parametrize(("ending", "steps"), [("Pendulum", 4), ("learned", 1)])
def test_a_rollout_follows_the_policy_and_goes_on_where_its_last_step_led(learner, args, ending, steps):
    args.rollout_length, args.exploration_noise = 4, 0.0
    starts, rolled = roll(learner, args, ending)
    state = starts.observations.double().numpy()
    for step in range(steps):
        observations, actions, rewards, following, ends = (column.view(steps, 6, -1)[step].numpy() for column in rolled)
        mu = np.array([mean for _, mean, _ in numpy_terms(learner.actor.critic, state)])
        for found, expected in ((observations, state), (actions, mu), (rewards[:, 0], state[:, 0])):
            np.testing.assert_allclose(found, expected, atol=1e-4)
        state = state + mu[:, :1]
        np.testing.assert_allclose(following, state, atol=1e-4)
        assert (ends == (ending == "learned")).all()


def test_its_actions_have_noise_of_that_size_and_stay_within_their_bounds(learner, args):
    args.rollout_length, args.exploration_noise = 1, 0.01
    _, rolled = roll(learner, args, batch_size=5_000)
    mu = learner.actor(rolled.observations).detach()
    away = (rolled.actions - mu)[mu.abs() < 0.9]
    assert away.std().item() == pytest.approx(0.01, rel=0.05) and abs(away.mean()) < 1e-3
    args.exploration_noise = 5.0
    _, rolled = roll(learner, args)
    assert rolled.actions.min() == -1 and rolled.actions.max() == 1


# --- Runs ---


def test_without_rollouts_no_model_is_made_and_nothing_else_is_drawn(tmp_path, pendulum):
    run = run_script("naf", *SHORT, "--num-updates", "5", "--seed", "3", "--run-dir", str(tmp_path / "run"))
    assert run.returncode == 0 and "terminations" not in run.stdout, run.stderr
    torch.manual_seed(3)
    plain = naf.Args(hidden_dims=(16, 16))
    learner = naf.build(3, 1, plain, CPU, Adam)
    for step in range(1, 6):
        naf.update(learner, naf.Batch(*pendulum.sample(256)), step, plain)
    assert_same(
        checkpoint(tmp_path / "run")["learner"], {n: part.state_dict() for n, part in learner._asdict().items()}
    )
    assert learner._fields == ("actor", "target_critic", "optimizer")


MODEL = [*SHORT, *SHORTER["naf"], "--rollout-every", "10"]


@pytest.fixture
def spied(monkeypatch):
    """What a run did: rows that each model was fitted to, rollouts (starts, result), and batches of its updates.

    Rollouts are of the best members, as they were when they were best, and so are the weights that training begins at.
    """
    fitted, rolled, batches, learners = [], [], [], []
    build, fit_dynamics, rollout, critic_loss = naf.build, naf.fit_dynamics, naf.rollout, naf.critic_loss

    def make(*sizes):
        learners.append(build(*sizes))
        return learners[-1]

    def fit(learner, data, *rest):
        assert learner.dynamics.epoch == 0
        assert all(map(torch.equal, learner.dynamics.parameters(), learner.training_dynamics.parameters()))
        fitted.append(naf.Batch(*(column.clone() for column in data)))
        yield from fit_dynamics(learner, data, *rest)

    def roll(actor, elites, starts, *rest):
        best = learners[-1].dynamics
        for expected, found in zip(best.parameters(), elites.parameters(), strict=True):
            assert torch.equal(expected[best.holdout_error.argsort()[:2]], found)
        rolled.append((starts, rollout(actor, elites, starts, *rest)))
        return rolled[-1][1]

    def loss(learner, batch, args):
        batches.append(batch)
        return critic_loss(learner, batch, args)

    for name, spy in {"build": make, "fit_dynamics": fit, "rollout": roll, "critic_loss": loss}.items():
        monkeypatch.setattr(naf, name, spy)
    return fitted, rolled, batches


def test_the_course_of_a_run(spied, tmp_path, make_dataset):
    """Rollouts before updates 1, 11, 21 and 31, from 27 on it acts: the last are of a new model. None after 33."""
    fitted, rolled, batches = spied
    data = make_dataset(episodes=[random_episode(seed) for seed in range(4)], env="Pendulum-v1")
    words = ["--dataset-id", data, "--num-updates", "26", "--online-steps", "20", "--imagined-until", "33"]
    words += ["--batch-size", "16", "--imagined-ratio", "0.75", "--rollouts-kept", "2", "--eval-every", "50"]
    words += SOON_BEST
    run = run_script("naf", *MODEL, *words, "--run-dir", str(tmp_path / "run"))
    assert run.returncode == 0, run.stderr
    assert "terminations in the model: Pendulum\n" in run.stdout
    learner = checkpoint(tmp_path / "run")["learner"]
    played = naf.ModelBuffer.fromkeys(naf.Batch._fields)
    played = dict(zip(played, learner["player"]["added"].split([3, 1, 1, 3, 1], dim=1), strict=True))
    assert [len(data.rewards) for data in fitted] == [120, 124]
    for first, second, more in zip(*fitted, played.values(), strict=True):
        torch.testing.assert_close(second, torch.cat([first, more[:4].view(4, *first.shape[1:])]), rtol=0, atol=0)
    assert [len(result.rewards) for _, result in rolled] == [500] * 4
    for starts, result in rolled:
        assert torch.isin(starts.observations, fitted[-1].observations).all()
        assert torch.equal(result.observations[:100], starts.observations)
    assert torch.isin(rolled[-1][0].rewards, fitted[-1].rewards[120:]).any()
    assert learner["model_buffer"]["added"] == 2000 and len(learner["model_buffer"]["rewards"]) == 1000

    assert len(batches) == 46
    seen = torch.cat([fitted[0].rewards, played["rewards"][:, 0]])
    for number, batch in enumerate(batches):
        real = torch.isin(batch.rewards, seen)
        if number >= 33:
            assert real.all()
        else:
            assert real[:4].all() and not real[4:].any()
            newest = [result.rewards for _, result in rolled[max(number // 10 - 1, 0) : number // 10 + 1]]
            assert torch.isin(batch.rewards[4:], torch.cat(newest)).all()
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["model/rewards"]]
    data = [fitted[0].rewards] * 3 + [fitted[1].rewards]
    for row, seen, (_, result) in zip(rows, data, rolled, strict=True):
        assert float(row["data/rewards"]) == pytest.approx(seen.mean().item(), rel=1e-4)
        assert float(row["model/rewards"]) == pytest.approx(result.rewards.mean().item(), rel=1e-4)
    assert [(row["step"], bool(row["dynamics/epoch"])) for row in rows] == [
        ("1", False),
        ("11", False),
        ("21", False),
        ("31", True),
    ]


def test_a_model_that_was_taken_over_is_rolled_out(spied, tmp_path, make_dataset):
    """And none is fitted."""
    data = make_dataset(episodes=[random_episode(seed) for seed in range(4)], env="Pendulum-v1")
    words = [*MODEL, "--dataset-id", data, "--num-models", "3", "--num-updates", "1", "--max-dynamics-epochs", "2"]
    words += ["--run-dir"]
    assert run_script("naf", *words, str(tmp_path / "model")).returncode == 0
    run = run_script("naf", *words, str(tmp_path / "run"), "--dynamics", str(tmp_path / "model"))
    assert run.returncode == 0, run.stderr
    assert len(spied[0]) == 1 and len(spied[1]) == 2
    model, after = (checkpoint(tmp_path / name)["learner"]["dynamics"] for name in ("model", "run"))
    assert_same(model, after)


def test_a_resumed_run_keeps_the_model_of_what_was_played(tmp_path, make_dataset):
    """Where none is due any more: of updates 1, 11 and 21 the last had a new one."""
    data = make_dataset(episodes=[random_episode(seed) for seed in range(4)], env="Pendulum-v1")
    words = [*MODEL, "--dataset-id", data, "--num-updates", "15", "--eval-every", "5", "--log-every", "5", "--run-dir"]
    whole, later = tmp_path / "whole", tmp_path / "later"
    for folder, more in ((whole, ["15"]), (later, ["10"]), (later, ["15", "--resume"])):
        run = run_script("naf", *words, str(folder), "--online-steps", *more)
        assert run.returncode == 0, run.stderr
    assert_same_runs(whole, later)


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["--imagined-ratio", "-0.1"], r"must be in \[0, 1\]"),
        (["--imagined-ratio", "1.1"], r"must be in \[0, 1\]"),
        (["--imagined-until", "0"], "must be at least 1"),
        (["--rollout-length", "0"], "must be at least 1"),
        (["--exploration-noise", "-0.1"], "must not be negative"),
        (["--num-elites", "8"], r"must be in \[1, --num-models\]"),
        (["--dynamics", "runs/mopo"], "a model is used with an --imagined-ratio above 0 alone"),
    ],
)
def test_bad_arguments(words, rule, tmp_path):
    assert_one_line(run_script("naf", *words, "--run-dir", str(tmp_path / "run")), f"error: {' '.join(words)}: {rule}")
    assert not (tmp_path / "run").exists()


def test_one_transition_is_too_few_for_a_model_alone(tmp_path, make_dataset):
    data = make_dataset(episodes=[random_episode(0, 1)])
    words = ["--dataset-id", data, "--num-updates", "1", "--run-dir", str(tmp_path / "run")]
    run = run_script("naf", *MODEL, *words)
    assert_one_line(run, f"error: {data}: one transition is too few to train a model and test it")
    assert run_script("naf", *SHORT, *words).returncode == 0


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
