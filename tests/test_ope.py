"""OPE's estimators on a small MDP whose values are known, its losses against NumPy, and its numbers end to end."""

import json
import math
import re
import shutil
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import ope
import pytest
import torch
from conftest import SHORT, assert_one_line, random_episode, run_script
from record import noisy_behaviour

from common.command_line import BadInput
from common.data import ReplayBuffer, load_dataset
from common.evaluation import Policy

# --- A small MDP ---

GAMMA = 0.9
NEXT = np.array([[[0.1, 0.6, 0.3], [0.5, 0.1, 0.4]], [[0.3, 0.2, 0.5], [0.1, 0.8, 0.1]], [[0.6, 0.2, 0.2]] * 2])
REWARDS = np.array([[1.0, -1.0], [0.5, 2.0], [3.0, -2.0]])  # [states, actions]
ENDS = np.array([[0.25, 0.4], [0.3, 0.35], [0.35, 0.25]])  # the chance of a termination
FIRST = np.array([0.6, 0.3, 0.1])  # the chance of each initial state
TARGET = np.array([0, 1, 0])  # the action that pi takes in each state
BEHAVIOUR = np.array([[0.9, 0.1], [0.3, 0.7], [0.75, 0.25]])
WRONG = np.array([[0.7, 0.3], [0.05, 0.95], [0.95, 0.05]])
PI = np.eye(2)[TARGET]


def exact(policy, steps=None):
    """Q and V of action probabilities; `steps` counts the rewards alone that come before a cut."""
    go_on = NEXT * (1 - ENDS)[:, :, None]
    v, q = np.zeros(3), REWARDS
    if steps is None:
        v = np.linalg.solve(np.eye(3) - GAMMA * np.einsum("sa,sax->sx", policy, go_on), (policy * REWARDS).sum(axis=1))
        return REWARDS + GAMMA * go_on @ v, v
    for _ in range(steps):
        q = REWARDS + GAMMA * go_on @ v
        v = (policy * q).sum(axis=1)
    return q, v


Q, V = exact(PI)
VALUE = FIRST @ V


def simulate(episodes, steps, seed=0):
    """States [E, T + 1], actions, terminations, and whether a step is of the episode, [E, T], under BEHAVIOUR."""
    rng = np.random.default_rng(seed)
    states, actions = np.zeros((episodes, steps + 1), int), np.zeros((episodes, steps), int)
    terminations, lived = np.zeros((episodes, steps), bool), np.zeros((episodes, steps), bool)
    states[:, 0] = rng.choice(3, episodes, p=FIRST)
    alive = np.ones(episodes, bool)
    for step in range(steps):
        s = states[:, step]
        lived[:, step] = alive
        a = actions[:, step] = rng.random(episodes) > BEHAVIOUR[s, 0]
        terminations[:, step] = alive & (rng.random(episodes) < ENDS[s, a.astype(int)])
        further = NEXT[s, a.astype(int)].cumsum(axis=1)
        states[:, step + 1] = (rng.random((episodes, 1)) > further).sum(axis=1).clip(max=2)
        alive = alive & ~terminations[:, step]
    return states, actions, terminations, lived


def tables(simulated, behaviour=BEHAVIOUR, q=Q, v=V):
    """What the estimators take."""
    states, actions, terminations, lived = simulated
    s = states[:, :-1]
    with np.errstate(divide="ignore"):
        ratios = np.where(lived, np.log(PI[s, actions]) - np.log(behaviour[s, actions]), 0)
    follows = np.concatenate([np.ones_like(lived[:, :1]), lived & ~terminations], axis=1)  # s_t has a value
    known = {"rewards": REWARDS[s, actions] * lived, "q": q[s, actions] * lived, "v": v[states] * follows}
    return {name: torch.from_numpy(each) for name, each in known.items()} | {
        "rho": ope.cumulative_ratios(torch.from_numpy(ratios)),
        "gamma": GAMMA,
    }


def estimates(known):
    """is, wis and wdr."""
    ones = torch.ones(1, len(known["rho"]), dtype=torch.float64)
    plain = {name: known[name] for name in ("rho", "rewards", "gamma")}
    found = ope.is_estimate(ones, **plain), ope.wis_estimate(ones, **plain), ope.wdr_estimate(ones, **known)
    return np.array([float(each) for each in found])


@pytest.fixture(scope="module")
def ended():
    """Episodes that all terminate."""
    simulated = simulate(20_000, 80)
    assert simulated[2].any(axis=1).all()
    return simulated


def test_is_is_unbiased(ended):
    known = tables(ended)
    each = (known["rho"] * known["rewards"]).numpy() @ GAMMA ** np.arange(80)
    found = estimates(known)[0]
    assert found == pytest.approx(each.mean())
    assert abs(found - VALUE) < 4 * each.std() / np.sqrt(len(each))
    assert abs(FIRST @ exact(BEHAVIOUR)[1] - VALUE) > 10 * each.std() / np.sqrt(len(each))  # it is not the data's


def test_wis_and_wdr_come_to_the_value(ended):
    _, wis, wdr = estimates(tables(ended))
    assert wis == pytest.approx(VALUE, abs=0.1)
    assert wdr == pytest.approx(VALUE, abs=0.05)


def test_wdr_needs_either_q_or_the_propensities(ended):
    found = estimates(tables(ended, WRONG))
    assert found[2] == pytest.approx(VALUE, abs=0.05)
    assert (abs(found[:2] - VALUE) > 0.3).all()  # is and wis have nothing else
    q = Q + 2 * REWARDS - 3
    wrong = {"q": q, "v": (PI * q).sum(axis=1)}
    assert estimates(tables(ended, **wrong))[2] == pytest.approx(VALUE, abs=0.15)
    assert abs(estimates(tables(ended, WRONG, **wrong))[2] - VALUE) > 0.3  # neither


def test_errors_shrink_with_more_episodes():
    errors = []
    for episodes in (50, 800):
        found = [estimates(tables(simulate(episodes, 60, seed))) for seed in range(40)]
        errors.append(abs(np.array(found) - VALUE).mean(axis=0))
    assert (errors[1] < errors[0] / 2).all()  # by the square root of 16 in the limit


def test_beyond_a_cut_wdr_knows_what_is_does_not():
    steps = 3
    simulated = simulate(20_000, steps)
    known = tables(simulated)
    each = (known["rho"] * known["rewards"]).numpy() @ GAMMA ** np.arange(steps)
    before = FIRST @ exact(PI, steps)[1]
    assert VALUE - before > 0.5
    found = estimates(known)
    assert abs(found[0] - before) < 4 * each.std() / np.sqrt(len(each))
    assert found[1] == pytest.approx(before, abs=0.1)
    assert found[2] == pytest.approx(VALUE, abs=0.05)


# --- By hand ---


def double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_ended_episodes_keep_their_last_weight():
    log_ratios = double([math.log(2), 0, 0], [math.log(2), math.log(3), -math.inf], [-math.inf, 0, 0])
    torch.testing.assert_close(ope.cumulative_ratios(log_ratios), double([2, 2, 2], [2, 6, 0], [0, 0, 0]))


def test_weights_are_of_each_step_and_of_all_episodes():
    """The first episode ends after a step. Its weight still divides the second step's."""
    known = {"rho": double([1, 1], [3, 1]), "rewards": double([4, 0], [0, 2]), "gamma": 0.5}
    assert ope.wis_estimate(double([1, 1]), **known).tolist() == [4 / 4 + 0.5 * 2 / 2]  # survivors alone: 0.5 * 2
    assert ope.wis_estimate(double([1, 1]), **known).item() != pytest.approx((4 * 1 + 1 * 0.5 * 2) / 2)  # last weights
    assert ope.is_estimate(double([1, 1]), **known).tolist() == [(4 + 0.5 * 2) / 2]
    corrections = {"q": double([1, 0], [2, 3]), "v": double([5, 0, 0], [6, 7, 8])}
    by_hand = (5 + 6) / 2 + (1 * 3 + 3 * -2) / 4 + 0.5 * (3 * 7 / 4 + 1 * -1 / 2) + 0.25 * 1 * 8 / 2
    assert ope.wdr_estimate(double([1, 1]), **known, **corrections).item() == pytest.approx(by_hand)


def test_counts_are_copies():
    known = tables(simulate(3, 4, seed=1), behaviour=WRONG)
    known["rho"] = torch.rand(3, 4, dtype=torch.float64) + 0.1
    copied = {name: each if name == "gamma" else each[[0, 0, 2]] for name, each in known.items()}
    counts = double([2, 0, 1])
    plain = {name: known[name] for name in ("rho", "rewards", "gamma")}
    found = ope.is_estimate(counts, **plain), ope.wis_estimate(counts, **plain), ope.wdr_estimate(counts, **known)
    assert [float(each) for each in found] == pytest.approx(estimates(copied))


def test_no_weight_at_all_gives_nothing():
    assert ope.weigh(double([1, 1]), double([0, 1], [0, 3]), double([5, 2], [6, 4])).tolist() == [[0, 3.5]]


def test_effective_sample_size():
    assert ope.effective_sample_size(double(2, 2, 0, 2)) == pytest.approx(3)
    assert ope.effective_sample_size(double(1, 3)) == pytest.approx(16 / 10)
    assert ope.effective_sample_size(double(1e200, 3e200)) == pytest.approx(1.6)  # whose squares overflow
    assert ope.effective_sample_size(double(0, 0)) == 0


def test_bootstrap_draws_as_many_episodes():
    torch.manual_seed(0)
    counts = ope.bootstrap(7, 2000)
    assert (counts.sum(dim=1) == 7).all() and counts.dtype == torch.uint8
    counts = counts.double()
    assert counts.mean(dim=0).numpy() == pytest.approx(np.ones(7), abs=0.1)
    assert counts.var().item() == pytest.approx(6 / 7, abs=0.05)  # of a binomial


def test_summary():
    found = ope.summary(double(1, 3), torch.arange(101, dtype=torch.float64))
    expected = {"estimate": 2, "low": 2.5, "high": 97.5, "std": np.arange(101).std(ddof=1), "seeds": [1, 3]}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value)
    assert "seeds" not in ope.summary(double(1), torch.arange(3, dtype=torch.float64))


# --- Losses ---


def numpy_ensemble(network, *inputs):
    """[members, batch, output_dim] of inputs [members or 1, batch, dim]"""
    outputs = []
    for member in range(network.members):
        x = np.concatenate([each[member % len(each)] for each in inputs], axis=1).astype(np.float64)
        for index, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
            x = x @ weight[member].detach().numpy() + bias[member].detach().numpy()
            if index < len(network.weights) - 1:
                mean, variance = x.mean(axis=1, keepdims=True), x.var(axis=1, keepdims=True)
                x = np.maximum((x - mean) / np.sqrt(variance + 1e-5), 0)
        outputs.append(x)
    return np.stack(outputs)


def random_batch():
    """Eight transitions for each of two members: observations of 3 numbers, actions of 2."""
    torch.manual_seed(0)
    terminations = (torch.arange(16) % 3 == 0).float().view(2, 8)
    return ope.Batch(torch.randn(2, 8, 3), torch.randn(2, 8, 2), torch.randn(2, 8), torch.randn(2, 8, 3), terminations)


@pytest.mark.parametrize("conservative", [0.0, 0.7])
def test_critic_loss(conservative):
    batch = random_batch()
    critic, target_critic = (ope.Ensemble(2, 5, (5, 4), 1) for _ in range(2))
    pi = torch.randn(2, 8, 2), torch.randn(2, 8, 2)
    args = ope.HyperParameters(conservative=conservative, gamma=0.9)
    loss = ope.critic_loss(critic, target_critic, batch, pi, args)
    observations, actions, rewards, next_observations, terminations = (each.numpy() for each in batch)
    next_q = numpy_ensemble(target_critic, next_observations, pi[1].numpy())[..., 0]
    target = 0.1 * rewards + 0.9 * np.where(terminations == 1, 0, next_q)
    q = numpy_ensemble(critic, observations, actions)[..., 0]
    penalty = numpy_ensemble(critic, observations, pi[0].numpy())[..., 0] - q
    expected = ((target - q) ** 2).mean(axis=1).sum() + conservative * penalty.mean(axis=1).sum()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert all(parameter.grad is None for parameter in target_critic.parameters())


def test_log_beta():
    batch = random_batch().take(torch.tensor(0))._replace(actions=torch.eye(2)[torch.arange(8) % 2])
    behaviour = ope.Ensemble(1, 3, (5,), 2)
    logits = numpy_ensemble(behaviour, batch.observations.numpy()[None])[0]
    for temperature in (1.0, 0.4):
        powers = np.exp(logits / temperature)
        expected = np.log(powers[np.arange(8), np.arange(8) % 2] / powers.sum(axis=1))
        found = ope.log_beta(behaviour(batch.observations)[0], batch.actions, temperature)
        np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-4)


def numpy_clipped_normal(actions, mean, std):
    """The density of each number inside (-1, 1), and the mass at -1 or 1 of what was clipped there."""
    z = (actions - mean) / std
    inside = np.exp(-(z**2) / 2) / (std * math.sqrt(2 * math.pi))
    below, above = (0.5 * (1 + np.vectorize(math.erf)((end - mean) / std / math.sqrt(2))) for end in (-1, 1))
    return np.where(actions <= -1, below, np.where(actions >= 1, 1 - above, inside))


def test_clipped_normals():
    actions = torch.tensor([[-1.0, 0.3], [1.0, 1.0], [0.2, -0.9]])
    mean, std = torch.tensor([[0.1, -0.4], [0.9, -0.2], [1.3, 0.0]]), torch.tensor([0.5, 0.8])
    found = ope.log_clipped_normal(actions, mean, std)
    expected = np.log(numpy_clipped_normal(actions.numpy(), mean.numpy(), std.numpy())).sum(axis=1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    line = torch.linspace(-1, 1, 20_001)[:, None]
    density = ope.log_clipped_normal(line, torch.tensor([0.7]), torch.tensor([0.4])).exp()
    assert density[[0, -1]].sum() + density[1:-1].sum() / 10_000 == pytest.approx(1, abs=1e-3)


def test_log_beta_of_continuous_actions():
    torch.manual_seed(0)
    outputs, actions = torch.randn(4, 2 * 5), torch.tensor([[0.3, -1.0], [1.0, 0.2], [-0.5, 0.5], [0.9, 1.0]])
    weights, means, log_stds = np.split(outputs.view(4, 2, 5).double().numpy(), [1, 3], axis=2)
    shares = np.exp(weights[..., 0]) / np.exp(weights[..., 0]).sum(axis=1, keepdims=True)
    for temperature in (1.0, 0.3):
        each = numpy_clipped_normal(actions.numpy()[:, None], means, np.exp(log_stds) * math.sqrt(temperature))
        expected = np.log((shares * each.prod(axis=2)).sum(axis=1))
        np.testing.assert_allclose(ope.log_beta(outputs, actions, temperature).numpy(), expected, rtol=1e-4)


def test_dynamics_loss():
    """Where an end repeats s, as logs may that have no s', nothing is learned of s'; elsewhere s' = s is known."""
    batch = random_batch()
    for row in (0, 1):  # the first terminates, the second does not
        batch.next_observations[0, row] = batch.observations[0, row]
    dynamics, scale = ope.Ensemble(2, 5, (5, 4), 5), torch.tensor([0.5, 1, 2])
    loss = ope.dynamics_loss(dynamics, batch, scale)
    observations, actions, rewards, next_observations, terminations = (each.numpy() for each in batch)
    outputs = numpy_ensemble(dynamics, observations, actions)
    errors = (((observations + outputs[..., :3] - next_observations) / scale.numpy()) ** 2).mean(axis=-1)
    errors[0, 0] = 0
    ends = 1 / (1 + np.exp(-outputs[..., 4]))
    entropy = -np.log(np.where(terminations == 1, ends, 1 - ends))
    expected = (errors + (outputs[..., 3] - rewards) ** 2 + entropy).mean(axis=1).sum()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


# --- Fitting ---


def small(**changes):
    sizes = {"hidden_dims": (32,), "learning_rate": 3e-3, "tau": 0.2, "num_updates": 600, "batch_size": 128}
    return ope.HyperParameters(**(sizes | {"num_members": 2, "gamma": GAMMA} | changes))


def log_of(simulated):
    """The transitions of `simulate`, starts and lengths."""
    states, actions, terminations, lived = simulated
    one_hots = torch.eye(3)[torch.from_numpy(states)]
    kept = torch.from_numpy(lived)
    rewards = torch.from_numpy(REWARDS[states[:, :-1], actions]).float()
    columns = one_hots[:, :-1], torch.eye(2)[torch.from_numpy(actions)], rewards, one_hots[:, 1:]
    batch = ope.Batch(*(column[kept] for column in (*columns, torch.from_numpy(terminations).float())))
    lengths = kept.sum(dim=1)
    return batch, SimpleNamespace(episode_starts=lengths.cumsum(0) - lengths, episode_lengths=lengths)


@pytest.fixture(scope="module")
def logged():
    """2,000 episodes of at most six steps, their transitions, starts and lengths."""
    simulated = simulate(2000, 6, seed=3)
    return simulated, *log_of(simulated)


def policy_actions(batch):
    """pi(s) and pi(s'), one-hot."""
    target = torch.eye(2)[torch.from_numpy(TARGET)]
    return batch.observations @ target, batch.next_observations @ target


def fitted_values(batch, args):
    """(1 - gamma) Q by the members' mean, [states, actions]."""
    torch.manual_seed(0)
    critic = ope.fit_critic(batch, policy_actions(batch), torch.arange(len(batch.rewards)), args)
    pairs = torch.eye(3).repeat_interleave(2, dim=0), torch.eye(2).repeat(3, 1)
    return ope.q_of(critic, *pairs).mean(dim=0).view(3, 2).numpy() / (1 - GAMMA)


def test_members_learn_from_rows_of_their_own(logged, monkeypatch):
    """Of the critics and of the dynamics."""
    drawn, take, batch = [], ope.Batch.take, logged[1]
    monkeypatch.setattr(ope.Batch, "take", lambda batch, rows: (drawn.append(rows), take(batch, rows))[1])
    ope.fit_critic(batch, policy_actions(batch), torch.arange(100), small(num_updates=1))
    ope.fit_dynamics(batch, small(num_updates=1))
    assert len(drawn) == 2 and not any(torch.equal(*rows) for rows in drawn)


def test_at_a_rate_of_nothing_the_dynamics_stay_as_they_began(logged):
    torch.manual_seed(0)
    dynamics = ope.fit_dynamics(logged[1], small(num_updates=1, learning_rate=1e-30))
    torch.manual_seed(0)
    assert all(map(torch.equal, dynamics.parameters(), ope.Ensemble(2, 5, (32,), 5).parameters()))


def test_fqe_comes_to_the_value_and_the_penalty_below_it(logged):
    found = fitted_values(logged[1], small())
    np.testing.assert_allclose(found, Q, atol=0.6)
    assert FIRST @ found[np.arange(3), TARGET] == pytest.approx(VALUE, abs=0.3)
    lower = fitted_values(logged[1], small(conservative=0.1))
    assert (lower[np.arange(3), TARGET] < found[np.arange(3), TARGET] - 0.1).all()


def test_the_data_have_a_value_beyond_their_cuts(logged):
    simulated, batch, buffer = logged
    counts = ope.bootstrap(2000, 200)
    evidence = ope.Evidence(buffer, batch, 1.0, tables(simulated)["rewards"], None, counts)
    torch.manual_seed(0)
    found = ope.judge_data(evidence, small())
    states, _, terminations, _ = simulated
    starts = np.bincount(states[:, 0], minlength=3) / 2000
    assert found["fqe"]["estimate"] == pytest.approx(starts @ exact(BEHAVIOUR)[1], abs=0.3)
    assert found["return"]["estimate"] == pytest.approx(
        (evidence.rewards.numpy() @ GAMMA ** np.arange(6)).mean(), rel=1e-6
    )
    assert found["return"]["low"] < FIRST @ exact(BEHAVIOUR, 6)[1] < found["return"]["high"]
    assert found["beyond"] == pytest.approx((~terminations.any(axis=1)).mean() * GAMMA**6)


def test_a_discrete_policy_is_judged_to_a_cut_and_beyond():
    """is and wis know the three steps alone; wdr and fqe know what follows a cut."""
    states, actions, _, lived = simulated = simulate(4000, 3, seed=3)
    batch, buffer = log_of(simulated)
    log_beta = torch.from_numpy(np.where(lived, np.log(BEHAVIOUR[states[:, :-1], actions]), 0))
    buffer = SimpleNamespace(**vars(buffer), normalization=torch.tensor([[0.0], [1.0]]), num_actions=2, num_legal=0)
    evidence = ope.Evidence(buffer, batch, 1.0, tables(simulated)["rewards"], log_beta, ope.bootstrap(4000, 100))
    args = ope.Args(**vars(small()))
    policy = half(act=lambda s: s @ torch.from_numpy(PI).float(), discrete=True)
    torch.manual_seed(0)
    found = ope.judge(policy, evidence, ope.fit_dynamics(batch, args), args)
    assert found["weight"] == pytest.approx(1, abs=0.1)
    until_the_cut = FIRST @ exact(PI, 3)[1]
    assert VALUE - until_the_cut > 0.8
    for name, expected in {"is": until_the_cut, "wis": until_the_cut, "wdr": VALUE, "fqe": VALUE}.items():
        assert found[name]["estimate"] == pytest.approx(expected, abs=0.25), name


def test_fit_behaviour_finds_the_probabilities(logged):
    _, batch, buffer = logged
    torch.manual_seed(0)
    held_out = (torch.arange(2000) % 5 == 0).repeat_interleave(buffer.episode_lengths)
    log_probs, told = ope.fit_behaviour(batch, held_out, 2, 0, small(num_updates=200))
    states, actions = batch.observations.argmax(dim=1), batch.actions.argmax(dim=1)
    np.testing.assert_allclose(log_probs.exp().numpy(), BEHAVIOUR[states, actions], atol=0.05)
    assert told["log_likelihood"] == pytest.approx(log_probs[held_out].mean().item(), abs=1e-5)
    frequencies = batch.actions[held_out].mean(dim=0).numpy()
    assert told["of_frequencies"] == pytest.approx((frequencies * np.log(frequencies)).sum(), abs=1e-5)
    assert told["log_likelihood"] > told["of_frequencies"]


def test_one_held_out_row_has_a_likelihood():
    """Of a single row there is no deviation that divides by n - 1."""
    batch = ope.Batch(*(torch.rand(5, 1) for _ in range(2)), torch.rand(5), torch.rand(5, 1), torch.ones(5))
    _, told = ope.fit_behaviour(batch, torch.arange(5) == 0, 5 * 3, 0, small(num_updates=20))
    assert np.isfinite(list(told.values())).all()


def test_what_is_forbidden_is_never_chosen():
    """Of three actions the mask allows two or three; where only one is left, its probability is 1."""
    torch.manual_seed(0)
    masks = torch.tensor([[1.0, 0, 0], [1, 1, 0], [1, 1, 1]]).repeat(200, 1)
    actions = torch.eye(3)[torch.multinomial(masks, 1)[:, 0]]
    batch = ope.Batch(masks, actions, torch.zeros(600), masks, torch.zeros(600))
    log_probs, _ = ope.fit_behaviour(batch, torch.arange(600) % 5 == 0, 3, 3, small(num_updates=200))
    found = log_probs.exp().view(200, 3)
    assert (found[:, 0] == 1).all()
    np.testing.assert_allclose(found[:, 1:].mean(dim=0).numpy(), [1 / 2, 1 / 3], atol=0.05)


# --- Continuous actions ---
# s_0 is uniform in (-1, 1), s_1 = -s_0 / 2, and an episode ends after two steps with r = s - (a - s)^2 each. The data's
# actions are clip(N(0, 0.6)), the policy's clip(N(s / 2, 0.4)).

STD, NOISE, END = 0.6, 0.4, 0.9


def continuous(episodes, seed=0, **shapes):
    """The evidence of such episodes, whose densities are known."""
    rng = np.random.default_rng(seed)
    states = np.stack([first := rng.uniform(-1, 1, episodes), -first / 2], axis=1)
    actions = rng.normal(0, STD, (episodes, 2)).clip(-1, 1)
    rewards = torch.from_numpy(states - (actions - states) ** 2)
    s, a, r = (torch.as_tensor(each).float().flatten() for each in (states, actions, rewards))
    following = torch.from_numpy(np.stack([-states[:, 0] / 2, -states[:, 1] / 2], axis=1)).float().flatten()
    batch = ope.Batch(s[:, None], a[:, None], r / 2.5, following[:, None], torch.arange(2 * episodes).float() % 2)
    lengths = torch.full((episodes,), 2)
    known = {"normalization": torch.tensor([[0.0], [1.0]]), "num_actions": 0, "num_legal": 0}
    buffer = SimpleNamespace(episode_starts=torch.arange(episodes) * 2, episode_lengths=lengths, **known)
    log_beta = torch.from_numpy(np.log(numpy_clipped_normal(actions, 0, STD)))
    return ope.Evidence(buffer, batch, 2.5, rewards, log_beta, ope.bootstrap(episodes, 100))


def half(**changes):
    """The policy s / 2."""
    known = {"act": lambda states: states / 2, "normalization": torch.tensor([[0.0], [1.0]]), "discrete": False}
    return SimpleNamespace(**(known | changes))


def value_of(noise):
    """By many episodes of the policy."""
    rng = np.random.default_rng(9)
    s = rng.uniform(-1, 1, 400_000)
    first, second = ((rng.normal(x / 2, noise, len(x)).clip(-1, 1) - x) ** 2 for x in (s, -s / 2))
    return (s - first + END * (-s / 2 - second)).mean()


def test_the_mean_weight_tells_that_the_data_never_act_at_a_bound():
    """Of actions that are uniform, so that their density is right and has no mass at 1, half of the policy's noise."""
    args, evidence = ope.Args(**vars(small(gamma=END, num_updates=1)), noise=0.3), continuous(20_000)
    actions = torch.rand(40_000, 1) * 2 - 1
    evidence = evidence._replace(
        batch=evidence.batch._replace(actions=actions), log_beta=torch.full((20_000, 2), 0.5).double().log()
    )
    torch.manual_seed(0)
    found = ope.judge(half(act=torch.ones_like), evidence, ope.fit_dynamics(evidence.batch, args), args)
    assert found["ess"] > 1000 and found["weight"] == pytest.approx(0.25, abs=0.02)  # a half of each of two steps


def test_policies_with_noise_have_weights():
    args, evidence = ope.Args(**vars(small(gamma=END, num_updates=400)), noise=NOISE), continuous(10_000)
    torch.manual_seed(0)
    found = ope.judge(half(), evidence, ope.fit_dynamics(evidence.batch, args), args)
    assert 2000 < found.pop("ess") < 10_000 and found.pop("weight") == pytest.approx(1, abs=0.05)
    assert found.keys() == {"fqe", "model", "is", "wis", "wdr"}
    errors = {name: abs(each["estimate"] - value_of(NOISE)) for name, each in found.items()}
    assert max(errors.values()) < 0.04, errors
    assert abs(value_of(0.1) - value_of(NOISE)) > 0.1  # the noise counts
    log_beta, told = ope.fit_behaviour(evidence.batch, torch.arange(20_000) % 5 == 0, 5 * 3, 0, args)
    assert log_beta.mean().item() == pytest.approx(evidence.log_beta.mean().item(), abs=0.02)
    assert told["log_likelihood"] == pytest.approx(told["of_frequencies"], abs=0.05)  # which do not depend on s


@pytest.mark.parametrize("chance", [0.0, 0.25])
def test_rollouts_come_to_the_exact_return(chance):
    """Of s' = 0.8 s + 0.5 a, r = s + 2 a and a = -s / 4, with an end of the same chance at each step."""
    logit = math.log(chance / (1 - chance)) if chance else -100.0

    class Dynamics:
        members = 2

        def __call__(self, s, a):
            return torch.cat([-0.2 * s + 0.5 * a, s + 2 * a, torch.full_like(s, logit)], dim=-1)

    starts = torch.tensor([[1.0], [-0.4]])
    ratio = 0.9 * (1 - chance) * (0.8 - 0.5 / 4)  # of r_t+1 to r_t, discounted; r_0 = s_0 / 2
    for bound, after in ((5.0, 1.0), (0.5, 0.5 / 0.675)):  # how much of s_1 the range of the data leaves
        batch = SimpleNamespace(observations=torch.tensor([[-bound], [bound]]))
        found = ope.rollouts(Dynamics(), starts[:1], lambda s: -s / 4, batch, 0.9)
        expected = 0.5 * (1 + ratio * after / (1 - ratio))
        np.testing.assert_allclose(found.numpy(), [[expected]] * 2, rtol=1e-3)
    wide = SimpleNamespace(observations=torch.tensor([[-5.0], [5.0]]))
    found = ope.rollouts(Dynamics(), starts, lambda s: -s / 4, wide, 0.9)
    np.testing.assert_allclose(found.numpy(), np.tile(starts[:, 0].numpy() / 2 / (1 - ratio), (2, 1)), rtol=1e-3)


# --- End to end ---

CARTPOLE = "anchorl/cartpole/mixed-v0"
TINY = ["--hidden-dims", "8", "--num-members", "2", "--num-updates", "20", "--batch-size", "32", "--draws", "50"]


def train(folder, algorithm="discrete_cql", *arguments):
    run = run_script(algorithm, "--num-updates", "2", "--run-dir", str(folder), *SHORT, *arguments)
    assert run.returncode == 0, run.stderr
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Runs: "cql", "held" (with episodes held out), "other" (another gamma), and "bc" of another dataset."""
    folder = tmp_path_factory.mktemp("runs")
    on = ["--dataset-id", CARTPOLE]
    made = {"cql": train(folder / "cql", "discrete_cql", *on, "--keep-policies", "--eval-every", "1")}
    made["held"] = train(folder / "held", "discrete_cql", *on, "--validation-fraction", "0.2")
    made["other"] = train(folder / "other", "discrete_cql", *on, "--gamma", "0.9")
    made["bc"] = train(folder / "bc", "bc")
    return made


def judged(tmp_path, *arguments):
    run = run_script("ope", *arguments, *TINY, "--out", str(tmp_path / "ope.json"))
    assert run.returncode == 0, run.stderr
    return json.loads((tmp_path / "ope.json").read_text()), run


def test_discrete_actions(folders, tmp_path):
    kept = f"{folders['cql']}/policy-1.pt"
    result, run = judged(tmp_path, folders["cql"], kept, "--least-effective", "0", "--gamma", "0.9")
    assert list(result["policies"]) == [folders["cql"], kept] and result["beta"] == "fitted"
    assert result["gamma"] == 0.9 and {"return", "fqe", "beyond"} == set(result["data"])
    for found in result["policies"].values():
        assert set(found) == {"fqe", "model", "ess", "weight", "is", "wis", "wdr"}
        for name in set(found) - {"ess", "weight"}:
            assert found[name]["low"] <= found[name]["high"] and math.isfinite(found[name]["estimate"])
            assert ("seeds" in found[name]) == (name in ("fqe", "model", "wdr"))
    assert "--num-updates 20: fqe will know the near future alone" in run.stderr
    result, _ = judged(tmp_path, folders["cql"], "--least-effective", "1e9")
    assert result["gamma"] == 0.99
    assert set(result["policies"][folders["cql"]]) == {"fqe", "model", "ess", "weight"}


def test_an_estimate_does_not_depend_on_what_else_is_asked(folders, tmp_path):
    kept = f"{folders['cql']}/policy-1.pt"
    alone, _ = judged(tmp_path, kept)
    after, _ = judged(tmp_path, folders["cql"], kept)
    assert after["policies"][kept] == alone["policies"][kept]


def test_rollouts_last_until_the_discount_leaves_a_thousandth():
    """Of a reward of 1 for ever: 0.999 of 1 / (1 - gamma), also where that takes thousands of steps."""

    class Dynamics:
        members = 2

        def __call__(self, s, a):
            return torch.cat([0 * s, 0 * s + 1, 0 * s - 100], dim=-1)

    batch = SimpleNamespace(observations=torch.tensor([[-1.0], [1.0]]))
    for gamma in (0.9, 0.99, 0.999):
        found = ope.rollouts(Dynamics(), torch.zeros(1, 1), lambda s: s, batch, gamma)
        np.testing.assert_allclose(found.numpy() * (1 - gamma), np.full((2, 1), 0.999), atol=2e-4)


def test_continuous_actions_have_fqe_and_model_alone(folders, tmp_path):
    result, _ = judged(tmp_path, folders["bc"])
    assert result["beta"] == "none" and set(result["policies"][folders["bc"]]) == {"fqe", "model"}
    result, _ = judged(tmp_path, folders["bc"], "--noise", "0.3", "--least-effective", "0", "--gamma", "0.9")
    assert result["beta"] == "fitted"
    assert set(result["policies"][folders["bc"]]) == {"fqe", "model", "ess", "weight", "is", "wis", "wdr"}


def test_held_out_episodes(folders, tmp_path):
    result, _ = judged(tmp_path, folders["held"], "--held-out", "--gamma", "0.9")
    learned, _ = judged(tmp_path, folders["held"], "--gamma", "0.9")
    assert result["episodes"] == round(0.2 * (result["episodes"] + learned["episodes"]))


def test_what_does_not_compare_is_one_line(folders, tmp_path):
    out = ["--out", str(tmp_path / "ope.json"), *TINY]
    cases = {
        "name the runs whose policies are to be evaluated": [],
        "dataset_id is .* policies compare on the same episodes": [folders["cql"], folders["bc"]],
        r"gamma is 0.99 in .* 0.9 in .*: give --gamma": [folders["cql"], folders["other"]],
        "--held-out: the runs held no episodes out": [folders["cql"], "--held-out"],
        "--gamma 1.5: must be in": [folders["cql"], "--gamma", "1.5"],
        "--draws 1: must be at least 2": [folders["cql"], "--draws", "1"],
        "--num-members 1: must be at least 2": [folders["cql"], "--num-members", "1"],
        "--noise is for continuous actions": [folders["cql"], "--noise", "0.1"],
        "--noise -1.0: must be at least 0": [folders["bc"], "--noise", "-1"],
        "--conservative -1.0: must be at least 0": [folders["cql"], "--conservative", "-1"],
        f"--out {tmp_path}: is a folder": [folders["cql"], "--out", str(tmp_path)],
    }
    for pattern, given in cases.items():
        assert_one_line(run_script("ope", *out, *given), pattern)
    assert not (tmp_path / "ope.json").exists()
    result, _ = judged(tmp_path, folders["cql"], folders["other"], "--gamma", "0.95")
    assert result["gamma"] == 0.95 and len(result["policies"]) == 2


@pytest.mark.parametrize(("name", "fit"), [("cql", "beta"), ("bc", "Q")])
def test_a_fit_that_diverges_is_one_line(name, fit, folders, tmp_path):
    out = tmp_path / "ope.json"
    run = run_script("ope", folders[name], "--out", str(out), *TINY, "--learning-rate", "1e30")
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1] == f"error: --learning-rate 1e+30: is too high: {fit} diverged"
    assert not out.exists()


@pytest.mark.parametrize("missing", [False, True])
def test_logged_probabilities(missing, make_dataset, tmp_path):
    episodes = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        log_probs = np.log(np.full(6, 0.5))
        log_probs[2 if missing and seed == 3 else 5] = np.nan  # the last is of no action
        fields = {"observations": rng.normal(size=(6, 3)).astype(np.float32), "actions": np.arange(5) % 2}
        fields |= {"rewards": rng.normal(size=5), "terminations": np.arange(5) == 4, "truncations": np.zeros(5, bool)}
        episodes.append(fields | {"infos": {"log_prob": log_probs}})
    dataset_id = make_dataset(episodes=episodes, action_space=gym.spaces.Discrete(2))
    folder = train(tmp_path / "run", "discrete_cql", "--dataset-id", dataset_id)
    if missing:
        run = run_script("ope", folder, *TINY, "--out", str(tmp_path / "ope.json"))
        assert run.returncode == 2 and "Traceback" not in run.stderr
        assert "1 of 30 logged probabilities are missing, 0 or above 1: give all of them, or none" in run.stderr
    else:
        result, run = judged(tmp_path, folder, "--least-effective", "0")
        assert result["beta"] == "logged" and "6 episodes are few" in run.stderr
        other, _ = judged(tmp_path, folder, "--seed", "1")
        for name in ("return", "fqe"):  # of other draws and of other networks
            assert other["data"][name] != result["data"][name]
        buffer = SimpleNamespace(dataset_id=dataset_id, kept=None, discrete=True)
        assert ope.logged_probabilities(buffer).tolist() == pytest.approx([np.log(0.5)] * 30)
        assert load_dataset(dataset_id, discrete=True).discrete


def test_logged_densities_become_those_of_actions_in_one(make_dataset):
    """Of actions in [-2, 2]: twice as high. A density may be above 1."""
    episode = random_episode(0, 5) | {"infos": {"log_prob": np.array([0.5, -1, -2, 0, 1, np.nan])}}
    dataset = load_dataset(make_dataset(episodes=[episode]))
    assert ope.logged_probabilities(dataset).tolist() == pytest.approx(np.array([0.5, -1, -2, 0, 1]) + math.log(2))


class Always(torch.nn.Module):
    """A policy that always takes 0.9."""

    def forward(self, observations):
        return torch.full((len(observations), 1), 0.9)


def test_logged_densities_say_nothing_at_the_bounds(make_dataset, monkeypatch):
    """The policy itself, noisy, wrote the log: all ratios are 1. Of a cut action the log has the draw's density, and
    its mass is fitted; the other densities are the log's."""
    policy = Policy(Always(), torch.tensor([[0.0] * 3, [1.0] * 3]), (np.float32([-2]), np.float32([2])), False, {})
    act, episodes = noisy_behaviour(policy, 0.1, 0), []
    for seed in range(300):
        taken = [act(np.zeros(3), None) for _ in range(4)]
        episode = random_episode(seed, 4, actions=np.array([action for action, _ in taken], dtype=np.float32))
        episodes.append(episode | {"infos": {"log_prob": np.array([log_prob for _, log_prob in taken] + [np.nan])}})
    buffer = ReplayBuffer(load_dataset(make_dataset(episodes=episodes)), torch.device("cpu"))
    actions = buffer.transitions.actions[:, 0]
    cut = actions.abs() == 1
    assert 0.1 < cut.float().mean() < 0.2  # beyond the mean are one standard deviation and the bound
    sizes = {"num_updates": 500, "hidden_dims": (32,), "learning_rate": 3e-3}
    torch.manual_seed(0)
    evidence, told = ope.gather(buffer, ope.Args(noise=0.1, **sizes))
    assert told["beta"] == "logged, fitted at bounds" and "log_likelihood" in told
    log_beta, mass = evidence.log_beta.flatten(), torch.special.log_ndtr(torch.tensor(-1.0)).item()
    inside = -0.5 * ((actions - 0.9) / 0.1) ** 2 - math.log(0.1) - 0.5 * math.log(2 * math.pi)
    np.testing.assert_allclose(log_beta[~cut], inside[~cut], atol=1e-3)
    assert log_beta[cut].exp().mean().log().item() == pytest.approx(mass, abs=0.5)  # logged are 0.9 and less
    monkeypatch.setattr(ope, "fit_behaviour", None)  # without noise nobody asks
    assert ope.gather(buffer, ope.Args(**sizes))[1] == {"beta": "none"}


@pytest.mark.parametrize("shape", [(6, 1), (5,)])
def test_logged_probabilities_of_another_shape(shape, make_dataset):
    episode = random_episode(0, 5, actions=np.arange(5) % 2)
    dataset_id = make_dataset(
        episodes=[episode | {"infos": {"log_prob": np.full(shape, -0.5)}}], action_space=gym.spaces.Discrete(2)
    )
    with pytest.raises(BadInput, match="test/data-v0: cannot read the infos' log_prob: "):
        ope.logged_probabilities(SimpleNamespace(dataset_id=dataset_id, kept=None))


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"dataset_id": None}, "args.json lacks dataset_id: give the folder of a run on a dataset"),
        ({"dataset_fingerprint": None}, "args.json lacks dataset_fingerprint: "),
        ({"gamma": "high"}, "cannot read .*args.json: could not convert string"),
    ],
)
def test_a_run_that_does_not_say_what_it_learned_from(changes, pattern, folders, tmp_path):
    folder = shutil.copytree(folders["cql"], tmp_path / "run")
    (folder / "args.json").write_text(json.dumps(json.loads((folder / "args.json").read_text()) | changes))
    assert_one_line(run_script("ope", str(folder), *TINY, "--out", str(tmp_path / "ope.json")), pattern)


@pytest.mark.parametrize(("count", "length", "pattern"), [(1, 30, "holds one episode"), (30, 1, "one step and cut")])
def test_too_little_to_judge_by(count, length, pattern, make_dataset, tmp_path):
    """Of actions that are known: what comes first is said."""
    fields = {"actions": np.zeros(length, dtype=np.int64), "infos": {"log_prob": np.full(length + 1, -0.5)}}
    episodes = [random_episode(seed, length, **fields) for seed in range(count)]
    dataset_id = make_dataset(episodes=episodes, action_space=gym.spaces.Discrete(2))
    folder = train(tmp_path / "run", "discrete_cql", "--dataset-id", dataset_id)
    run = run_script("ope", folder, *TINY, "--out", str(tmp_path / "ope.json"))
    assert run.returncode == 2 and re.search(f"error: .*{pattern}", run.stderr.splitlines()[-1]), run.stderr
