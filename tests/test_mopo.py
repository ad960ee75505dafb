"""MOPO's uncertainties and losses against NumPy on small numbers, and what each loss may touch."""

import math

import mopo
import pytest
import torch
from conftest import checkpoint, random_batch, run_script, sac_learner


@pytest.fixture
def args():
    return mopo.Args(hidden_dims=(5, 4), dynamics_hidden_dims=(5,), num_models=3, rollout_batch_size=10, gamma=0.9)


@pytest.fixture
def learner(args):
    return sac_learner(mopo, args)


# --- Uncertainty ---

MEAN = torch.tensor([[[0.0, 0.0]], [[3.0, 0.0]], [[0.0, 6.0]]])  # three elites, one row, two outputs; on average (1, 2)
STD = torch.tensor([[[3.0, 4.0]], [[0.0, 1.0]], [[6.0, 8.0]]])


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [
        ("max_std", 10.0),  # of |(3, 4)| = 5, |(0, 1)| = 1, |(6, 8)| = 10
        # E[std^2]: (9 + 0 + 36) / 3 = 15, (16 + 1 + 64) / 3 = 27; Var[mean]: (1 + 4 + 1) / 3 = 2, (4 + 4 + 16) / 3 = 8
        ("ensemble_std", math.sqrt(15 + 2 + 27 + 8)),
    ],
)
def test_uncertainty_by_hand(penalty, expected):
    assert mopo.uncertainty(MEAN, STD, penalty).tolist() == pytest.approx([expected])


def test_rewards_of_the_model_are_penalised(args):
    class Elites:
        @staticmethod
        def predict(observations, actions):
            return MEAN[:, :, :1].repeat(1, 4, 2), torch.zeros(3, 4, 2), torch.zeros(3, 4)

    args.penalty, args.penalty_coefficient = "ensemble_std", 2.0
    states, raw = torch.zeros(4, 1), torch.tensor([[0.0], [1.0]])
    transitions, u = mopo.model_step(Elites, states, states, raw, "Pendulum", args)
    assert u.tolist() == pytest.approx([2.0] * 4)  # the means are (0, 0), (3, 3), (0, 0), of variance 2 each
    reward = transitions.next_observations[:, 0]  # this model's outputs are all the same
    torch.testing.assert_close(transitions.rewards, reward - 2 * 2.0)


# --- Losses ---


def test_log_probability_is_finite_where_tanh_is_flat(learner):
    with torch.no_grad():
        learner.actor.mean.bias.fill_(50.0)
    actions, log_prob = learner.actor.sample(torch.zeros(1, 3), torch.zeros(1, 2))
    assert (actions == 1).all() and log_prob.isfinite().all()


def test_update_leaves_the_dynamics_alone_and_the_target_follows(learner, args):
    models = [*learner.dynamics.parameters(), *learner.training_dynamics.parameters()]
    frozen = [parameter.clone() for parameter in models]
    before = [parameter.clone() for parameter in learner.target_critic.parameters()]
    mopo.update(learner, random_batch(), 1, args)
    assert all(map(torch.equal, frozen, models))
    followed = learner.critic.parameters()
    for old, new, target in zip(before, learner.target_critic.parameters(), followed, strict=True):
        torch.testing.assert_close(new, old + args.tau * (target - old))


# --- Runs ---


@pytest.mark.parametrize(("real_ratio", "num_real"), [("0", 0), ("0.25", 4), ("1", 16)])
def test_batches_mix_data_and_rollouts(real_ratio, num_real, monkeypatch, tmp_path, pendulum):
    """Rollouts are drawn from a buffer that has room for three calls of 50 rollouts of 4 steps."""
    batches, total_loss = [], mopo.total_loss

    def spy(learner, batch, noise, args):
        batches.append(batch)
        return total_loss(learner, batch, noise, args)

    monkeypatch.setattr(mopo, "total_loss", spy)
    arguments = ["--batch-size", "16", "--real-ratio", real_ratio, "--num-updates", "4", "--dynamics-hidden-dims", "8"]
    arguments += ["--rollout-batch-size", "50", "--max-dynamics-epochs", "1", "--dynamics-batch-size", "2048"]
    arguments += ["--rollout-length", "4", "--rollouts-kept", "3"]
    run = run_script(
        "mopo", *arguments, "--eval-episodes", "1", "--final-eval-episodes", "1", "--run-dir", str(tmp_path / "run")
    )
    assert run.returncode == 0, run.stderr
    assert len(batches) == 4
    assert len(checkpoint(tmp_path / "run")["learner"]["model_buffer"]["rewards"]) == 3 * 50 * 4
    data = pendulum.transitions
    for batch in batches:
        assert batch.rewards.shape == (16,)
        real = torch.isin(batch.rewards, data.rewards)
        real &= torch.isin(batch.next_observations[:, 0], data.next_observations[:, 0])
        assert real[:num_real].all() and not real[num_real:].any()


def test_rollouts_are_logged_beside_the_data(monkeypatch, tmp_path, pendulum):
    """Their uncertainty, their rewards with and without its price, and their ends."""
    rolled, rollout = [], mopo.rollout
    monkeypatch.setattr(mopo, "rollout", lambda *given: (rolled.append(rollout(*given)), rolled[-1])[1])
    arguments = ["--num-updates", "4", "--dynamics-hidden-dims", "8", "--rollout-batch-size", "50"]
    arguments += ["--max-dynamics-epochs", "1", "--dynamics-batch-size", "2048", "--rollout-every", "3"]
    arguments += ["--penalty-coefficient", "2.5"]
    run = run_script(
        "mopo", *arguments, "--eval-episodes", "1", "--final-eval-episodes", "1", "--run-dir", str(tmp_path / "run")
    )
    assert run.returncode == 0, run.stderr
    header, *rows = [line.split(",") for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()]
    for name in ("u/data_mean", "u/rollouts_mean"):
        values = [float(row[header.index(name)]) for row in rows if row[header.index(name)]]
        assert len(values) == 2 and min(values) > 0
    logged = [dict(zip(header, row, strict=True)) for row in rows if row[header.index("u/data_mean")]]
    assert [row["step"] for row in logged] == ["1", "4"]
    data = pendulum.transitions
    for row, (transitions, u) in zip(logged, rolled, strict=True):
        rewards, u = transitions.rewards.numpy().astype(float), u.numpy().astype(float)
        expected = {"model/rewards": rewards.mean(), "model/raw_rewards": (rewards + 2.5 * u).mean()}
        expected |= {"data/rewards": data.rewards.numpy().mean(), "data/terminations": 0.0, "model/terminations": 0.0}
        assert {name: float(row[name]) for name in expected} == pytest.approx(expected, rel=1e-4)
