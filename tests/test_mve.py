"""MVE's targets against NumPy, row by row and step by step; what they may train; and that H = 0 is TD3+BC."""

import inspect

import mve
import numpy as np
import pytest
import td3_bc
import torch
from conftest import (
    SHORT,
    SHORTER,
    assert_each_trains_its_own,
    assert_one_line,
    checkpoint,
    networks_of,
    numpy_mlp,
    numpy_twins,
    random_batch,
    run_script,
)
from torch import nn

from common.optim import Adam

CPU = torch.device("cpu")
NOISE = torch.linspace(-2, 2, 16).reshape(8, 2)
MEMBER = torch.tensor([0, 1, 2, 0, 1, 2, 2, 1])


@pytest.fixture
def args():
    small = {"hidden_dims": (5, 4), "dynamics_hidden_dims": (5,), "num_models": 4, "num_elites": 3}
    return mve.Args(horizon=2, gamma=0.9, policy_noise=0.4, noise_clip=0.3, **small)


@pytest.fixture
def learner(args):
    """Of the four members, the second is the worst on held-out data."""
    torch.manual_seed(0)
    learner = mve.build(3, 2, args, CPU, Adam)
    with torch.no_grad():  # so that the targets differ from what they follow, and members from each other
        for module in (learner.target_actor, learner.target_critic, learner.dynamics):
            for parameter in module.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
    learner.dynamics.holdout_error.copy_(torch.tensor([0.3, 0.9, 0.1, 0.2]))
    learner.model.take(learner.dynamics, torch.tensor([[0.0], [1.0]]).repeat(1, 3), "learned")
    return learner


def numpy_step(learner, member, state):
    """The policy's action at a state, the reward, the next state and the probability of an end, by an elite's means."""
    action = np.tanh(numpy_mlp(learner.target_actor.net, state))
    place = (2, 3, 0)[member]  # the elites, best first
    told = (torch.tensor(x, dtype=torch.float32)[None] for x in (state, action))
    mean, _, logit = (part[place, 0].detach().double().numpy() for part in learner.dynamics.predict(*told))
    return action, mean[-1], state + mean[:-1], 1 / (1 + np.exp(-logit))


def numpy_q(learner, state, row):
    """Q'_1 and Q'_2 of the smoothed action."""
    action = np.tanh(numpy_mlp(learner.target_actor.net, state)) + np.clip(0.4 * NOISE[row].numpy(), -0.3, 0.3)
    return numpy_twins(learner.target_critic, state[None], np.clip(action, -1, 1)[None])[:, 0]


def numpy_rollout(learner, batch, row, member, horizon):
    """States, actions, rewards and ends at t = -1 .. H - 1, and s_H behind the states."""
    data = [column[row].double().numpy() for column in batch]
    states, actions, rewards, ends = [data[0], data[3]], [data[1]], [float(data[2])], [float(data[4])]
    for _ in range(horizon):
        action, reward, state, end = numpy_step(learner, member, states[-1])
        for column, new in zip((states, actions, rewards, ends), (state, action, reward, end), strict=True):
            column.append(new)
    return states, actions, rewards, ends


def returns(rewards, ends, value, start=0):
    """The discounted sum from a step on, written out: each reward times the probability that it is reached."""
    total, reach = 0.0, 1.0
    for k, (reward, end) in enumerate(zip(rewards[start:], ends[start:], strict=True)):
        total += 0.9**k * reach * reward
        reach *= 1 - end
    return total + 0.9 ** (len(rewards) - start) * reach * value


# --- Targets ---


@pytest.mark.parametrize("expansion", ["td_k", "last"])
def test_critic_loss(learner, args, expansion):
    args.expansion = expansion
    batch = random_batch()
    loss, metrics = mve.critic_loss(learner, batch, NOISE, MEMBER, args)
    errors, first = [], []
    for row in range(8):
        states, actions, rewards, ends = numpy_rollout(learner, batch, row, MEMBER[row], 2)
        value = numpy_q(learner, states[-1], row).min()
        reach = 1.0
        for t in range(3 if expansion == "td_k" else 1):
            q = numpy_twins(learner.critic, states[t][None], actions[t][None])[:, 0]
            target = returns(rewards, ends, value, t)
            errors.append(reach * ((target - q) ** 2).sum())
            reach *= 1 - ends[t]
        first.append(returns(rewards, ends, value))
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-4)
    assert metrics["critic/target"].item() == pytest.approx(np.mean(first), rel=1e-4)


def test_critic_loss_of_steve(learner, args):
    args.expansion = "steve"
    batch = random_batch()
    loss, metrics = mve.critic_loss(learner, batch, NOISE, None, args)
    errors, shares = [], []
    for row in range(8):
        means, weights = [], []
        for horizon in range(3):
            candidates = []
            for member in range(3):
                states, _, rewards, ends = numpy_rollout(learner, batch, row, member, horizon)
                candidates.append([returns(rewards, ends, q) for q in numpy_q(learner, states[-1], row)])
            means.append(np.mean([min(pair) for pair in candidates]))
            weights.append(1 / (np.var(candidates) + 1e-8))
        weights = np.array(weights) / sum(weights)
        q = numpy_twins(learner.critic, batch.observations[row : row + 1].numpy(), batch.actions[row : row + 1].numpy())
        errors.append(((weights @ means - q[:, 0]) ** 2).sum())
        shares.append(weights)
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-4)
    found = [metrics[f"expansion/weight_{h}"].item() for h in range(3)]
    assert found == pytest.approx(np.mean(shares, axis=0), rel=1e-3) and min(found) > 0.02


def test_weights_by_hand():
    """h = 0: 4 and 6, of variance 1. h = 1: two elites' 1, 3 and 3, 5, of variance 2; of the lesser the mean is 2."""
    first, second = torch.tensor([[4.0], [6.0]]), torch.tensor([[[1.0], [3.0]], [[3.0], [5.0]]])
    target, weights = mve.weigh([first, second])
    assert weights[:, 0].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert target.tolist() == pytest.approx([(2 * 4 + 2) / 3])


class Slide(nn.Module):
    """A model that is right: a step goes on by 1, pays the state that it comes to, and never ends."""

    @staticmethod
    def predict(observations, actions):
        mean = torch.cat([torch.ones_like(observations), observations + 1], dim=-1)
        mean = mean if mean.dim() == 3 else mean.expand(2, -1, -1)
        return mean, torch.zeros_like(mean), torch.full(mean.shape[:-1], -50.0)


@pytest.fixture
def slide():
    """Starting at 0, of a critic that says 100 everywhere; states are stored as half of what is above 7."""
    args = mve.Args(num_models=2, num_elites=2, hidden_dims=(4,), dynamics_hidden_dims=(4,), gamma=0.5)
    learner = mve.build(1, 1, args, CPU, Adam)
    with torch.no_grad():
        learner.target_critic.layers[-1].weight.zero_()
        learner.target_critic.layers[-1].bias.fill_(100.0)
    learner.model.elites = Slide()
    learner.model.scale.copy_(torch.tensor([[7.0], [2.0]]))
    zero, one = torch.zeros(2, 1), torch.ones(2)
    batch = mve.Batch(zero, zero, 0 * one, zero, torch.tensor([0.0, 1.0]))  # the second ends at once
    return learner, batch, args


@pytest.mark.parametrize("horizon", [0, 1, 3])
@pytest.mark.parametrize("expansion", ["td_k", "last"])
def test_with_a_model_that_is_right_the_critics_error_shrinks_by_gamma_a_step(slide, horizon, expansion):
    """The value of a state s is sum_k 0.5^k (s + 1 + k) = 2 s + 4, and of the data's step, which pays 0, half of 4."""
    learner, batch, args = slide
    args.horizon, args.expansion = horizon, expansion
    steps, targets, _ = mve.expand(learner, batch, torch.zeros(2, 1), torch.tensor([0, 1]), args)
    assert len(steps) == len(targets) == (horizon + 1 if expansion == "td_k" else 1)
    for t, target in enumerate(targets, start=-1):
        truth, error = 2 * t + 4, 100 - (2 * horizon + 4)
        assert target[0].item() == pytest.approx(truth + 0.5 ** (horizon - t) * error, rel=1e-6)
    assert targets[0][1] == 0


def test_steve_weighs_alike_what_is_equally_sure(slide):
    learner, batch, args = slide
    args.horizon, args.expansion = 2, "steve"
    _, (target,), metrics = mve.expand(learner, batch, torch.zeros(2, 1), None, args)
    assert target.tolist() == pytest.approx([(50 + (0.5 + 25) + (0.5 + 0.5 + 12.5)) / 3, 0.0])
    assert [value.item() for value in metrics.values()] == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("expansion", ["td_k", "last", "steve"])
def test_a_rule_ends_rollouts_where_the_environment_would(slide, expansion, monkeypatch):
    """It sees states as the environment has them: 7 + 2 s > 10 from s = 2 on, the second step of the model."""
    learner, batch, args = slide
    monkeypatch.setitem(mve.TERMINATION_RULES, "Slide", lambda s: s[:, 0] > 10)
    learner.model.ending = "Slide"
    args.expansion, args.horizon = expansion, 4
    member = None if expansion == "steve" else torch.tensor([0, 1])
    steps = mve.unroll(learner, batch, member, args)
    assert [step.terminations.flatten()[0].item() for step in steps] == [0, 0, 1, 1, 1]
    _, targets, _ = mve.expand(learner, batch, torch.zeros(2, 1), member, args)
    ended = 0.5 * 1 + 0.25 * 2  # nothing comes after s_2
    if expansion == "steve":  # h = 0 and 1 ask the critic before; the others do not
        assert targets[0].tolist() == pytest.approx([(50 + (0.5 + 25) + 3 * ended) / 5, 0.0])
    else:
        assert targets[0].tolist() == pytest.approx([ended, 0.0])


@pytest.mark.parametrize(("ending", "reached"), [("Slide", 3), ("never", 5)])
def test_q_learns_nothing_after_the_end(slide, ending, reached, monkeypatch):
    """Of the second row the data's step alone is reached, of the first those up to the one that comes to s_2."""
    learner, batch, args = slide
    monkeypatch.setitem(mve.TERMINATION_RULES, "Slide", lambda s: s[:, 0] > 10)
    learner.model.ending, args.horizon = ending, 4
    words = learner, batch, torch.zeros(2, 1), torch.tensor([0, 1]), args
    steps, targets, _ = mve.expand(*words)
    errors = [(y - learner.critic(s.observations, s.actions)).square() for s, y in zip(steps, targets, strict=True)]
    learned = sum(error[:, 0].sum() for error in errors[:reached]) + errors[0][:, 1].sum()
    assert mve.critic_loss(*words)[0].item() == pytest.approx(learned.item() / (2 * 5), rel=1e-5)


def test_each_row_follows_its_own_member_and_no_noise(learner, args):
    batch = random_batch()
    together = mve.model_step(learner.model, batch.observations, batch.actions, MEMBER)
    every = mve.model_step(learner.model, batch.observations, batch.actions, None)
    for row, member in enumerate(MEMBER):
        for one, all_ in zip(together[2:], every[2:], strict=True):
            assert torch.equal(one[row], all_[member, row])
    again = mve.model_step(learner.model, every.next_observations, batch.actions.expand(3, -1, -1), None)
    alone = mve.model_step(learner.model, every.next_observations[1], batch.actions, torch.ones(8, dtype=torch.long))
    torch.testing.assert_close(again.next_observations[1], alone.next_observations)


# --- H = 0 ---


@pytest.mark.parametrize("expansion", ["td_k", "last", "steve"])
def test_horizon_0_is_td3_bc_to_the_bit(expansion):
    learners = []
    for script, own in ((td3_bc, {}), (mve, {"horizon": 0, "expansion": expansion, "num_models": 5})):
        args = script.Args(hidden_dims=(16, 16), **own)
        torch.manual_seed(0)
        learner = script.build(3, 2, args, CPU, Adam)
        torch.manual_seed(1)
        for step in range(1, 8):
            columns = [torch.randn(32, 3), torch.randn(32, 2).tanh(), torch.randn(32), torch.randn(32, 3)]
            script.update(learner, script.Batch(*columns, (torch.rand(32) < 0.2).float()), step, args)
        learners.append(networks_of(learner, "actor", "critic", "target_actor", "target_critic"))
    for name, parameters in learners[0].items():
        assert all(map(torch.equal, parameters, learners[1][name])), name


@pytest.mark.parametrize("name", ["mlp", "Actor", "EnsembleLinear", "Critic", "actor_loss"])
def test_what_td3_bc_has_is_the_same_text(name):
    assert inspect.getsource(getattr(mve, name)) == inspect.getsource(getattr(td3_bc, name))


# --- Training ---


@pytest.mark.parametrize("expansion", ["td_k", "last", "steve"])
def test_each_loss_trains_its_own_network_only(learner, args, expansion):
    args.expansion = expansion
    batch, member = random_batch(), None if expansion == "steve" else MEMBER
    losses = {"critic": mve.critic_loss(learner, batch, NOISE, member, args)[0]}
    networks = networks_of(learner, "actor", "critic", "training_dynamics")
    assert_each_trains_its_own(losses, networks)


@pytest.mark.parametrize("expansion", ["td_k", "steve"])
def test_an_update_leaves_the_model_alone(learner, args, expansion):
    args.expansion = expansion
    kept = [*learner.model.parameters(), *learner.dynamics.parameters(), *learner.training_dynamics.parameters()]
    before = [parameter.clone() for parameter in kept]
    for step in (1, 2):
        mve.update(learner, random_batch(), step, args)
    assert all(map(torch.equal, before, kept))


def test_members_are_drawn_anew_for_each_row(learner, args, monkeypatch):
    drawn, critic_loss = [], mve.critic_loss
    monkeypatch.setattr(mve, "critic_loss", lambda *words: (drawn.append(words[3]), critic_loss(*words))[1])
    for step in range(40):
        mve.update(learner, random_batch(), step, args)
    counts = torch.cat(drawn).bincount()
    assert len(counts) == 3 and counts.min() > 60 and not torch.equal(drawn[0], drawn[1])


# --- Runs ---


@pytest.mark.parametrize("arguments", [[], ["--expansion", "steve", "--horizon", "2", "--termination", "learned"]])
def test_a_run_unrolls_the_elites_of_its_trained_model(arguments, tmp_path, pendulum):
    words = [*SHORT, *SHORTER["mve"], "--num-models", "3", *arguments, "--num-updates", "4", "--log-every", "2"]
    run = run_script("mve", *words, "--run-dir", str(tmp_path / "run"))
    assert run.returncode == 0, run.stderr
    saved = checkpoint(tmp_path / "run")["learner"]
    best = saved["dynamics"]["holdout_error"].argsort()[:2]
    for name, weight in saved["model"].items():
        if "layers" in name or "log_variance" in name:
            assert torch.equal(weight, saved["dynamics"][name.removeprefix("elites.")][best]), name
    torch.testing.assert_close(saved["model"]["scale"], pendulum.normalization)
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]
    assert [name for name in header.split(",") if name.startswith("expansion/")] == (
        [f"expansion/weight_{h}" for h in range(3)] if arguments else []
    )


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["--horizon", "-1"], "must not be negative"),
        (["--noise-clip", "-0.1"], "must not be negative"),
        (["--policy-noise", "-0.5"], "must not be negative"),
        (["--alpha", "-1.0"], "must not be negative"),
        (["--num-elites", "8"], r"must be in \[1, --num-models\]"),
        (["--batch-size", "0"], "must be at least 1"),
    ],
)
def test_bad_arguments(words, rule, tmp_path):
    assert_one_line(run_script("mve", *words, "--run-dir", str(tmp_path / "run")), f"error: {' '.join(words)}: {rule}")
    assert not (tmp_path / "run").exists()


def test_horizon_0_is_allowed(tmp_path, pendulum):
    words = [*SHORT, *SHORTER["mve"], "--horizon", "0", "--num-updates", "2", "--run-dir", str(tmp_path / "run")]
    assert run_script("mve", *words).returncode == 0
    saved = checkpoint(tmp_path / "run")
    assert saved["step"] == 2 and saved["learner"]["dynamics"]["epoch"] == 0  # no model was trained
