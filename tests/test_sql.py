"""SQL's and EQL's losses against NumPy on small numbers, the values that they imply, and what each may touch."""

import inspect

import iql
import numpy as np
import pytest
import sql
import torch
import xql
from conftest import (
    SHORT,
    assert_each_trains_its_own,
    assert_one_line,
    lower,
    networks_of,
    numpy_mlp,
    numpy_twins,
    random_batch,
    run_script,
)

CPU = torch.device("cpu")


@pytest.fixture(params=["sql", "eql"])
def args(request):
    own = {"alpha": 1.7, "weight_clip": 0.3, "gamma": 0.9}
    return sql.Args(hidden_dims=(5, 4), num_updates=100, variant=request.param, **own)


@pytest.fixture
def learner(args):
    torch.manual_seed(0)
    learner = sql.build(3, 2, args, CPU)
    with torch.no_grad():  # so that the target differs from what it follows
        for parameter in learner.target_critic.parameters():
            parameter.add_(torch.randn_like(parameter))
    return learner


LIKE_IQL = ["Actor", "EnsembleLinear", "Critic", "critic_loss", "build", "update", "cosine_decay"]


@pytest.mark.parametrize("name", [*LIKE_IQL, "effective_sample_size", "mlp", "Value"])
def test_what_is_a_siblings_is_its_to_the_letter(name):
    """So the calculations in NumPy of test_iql.py, and of test_xql.py for the layer normalisation, hold here, too."""
    theirs = inspect.getsource(getattr(xql if name in ("mlp", "Value") else iql, name))
    assert inspect.getsource(getattr(sql, name)) == theirs.replace("        (eq. 6)", "")


def test_advantage_takes_the_twins_minimum_of_the_target_critic(learner):
    batch, value = random_batch(), torch.arange(8.0)
    q = lower(numpy_twins(learner.target_critic, batch.observations.numpy(), batch.actions.numpy()))
    advantages = sql.advantage(value, learner.target_critic, batch)
    np.testing.assert_allclose(advantages.numpy(), q - np.arange(8), atol=1e-5)


def test_sparse_value_loss_by_hand():
    advantages, value = torch.tensor([2.0, -1.0, -9.0]), torch.tensor([0.5, 1.0, -3.0])
    loss, _ = sql.value_loss(advantages, value, "sql", alpha=2.0)
    assert loss.item() == pytest.approx((1.5**2 + 0.75**2 + 0 + (0.5 + 1.0 - 3.0) / 2) / 3)  # 1 - 9 / 4 is below 0


@pytest.mark.parametrize("highest", [3.0, 12.0, 100.0, -40.0])
def test_exponential_value_loss(highest):
    """Of u above 5 the exponential counts as exp(5), and only V / alpha draws V, down; of u below -1 the factor stays
    exp(1)."""
    a, value = np.array([highest, highest - 1, highest - 7]), np.array([0.5, 1.0, -3.0])
    advantages = torch.tensor(a, dtype=torch.float32, requires_grad=True)
    loss, metrics = sql.value_loss(advantages, torch.tensor(value, dtype=torch.float32), "eql", alpha=2.0)
    u = np.minimum(a / 2, 5)
    factor = np.exp(-max(u.max(), -1))
    assert loss.item() == pytest.approx(np.mean(np.exp(u) + value / 2) * factor, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, advantages)
    expected = np.where(a / 2 > 5, 0, np.exp(u) / 2 / 3 * factor)
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-4, atol=1e-12)
    v = torch.tensor(value, requires_grad=True)
    (gradient,) = torch.autograd.grad(sql.value_loss(torch.tensor(a + value) - v, v, "eql", alpha=2.0)[0], v)
    np.testing.assert_allclose(gradient.numpy(), factor / 2 / 3 - expected, rtol=1e-6)
    assert metrics["value/u_clipped"].item() == pytest.approx(np.mean(a / 2 > 5))


@pytest.mark.parametrize("lambda_", [0.55, 0.7, 0.9])
def test_the_dual_form_has_the_same_values(lambda_):
    """The lowest of f-DVL's (1 - lambda) V + lambda f*(Q - V): of the chi-square divergence, where f*(y) is
    (1 + y / 2)^2 - 1, at least -1, and of total variation as its authors have it, where f*(y) is max(y, 0)."""
    q = np.random.default_rng(0).normal(scale=3, size=501)
    v, c = np.linspace(-15, 15, 3_001), (1 - lambda_) / lambda_
    away = q[:, None] - v
    chi_square = (1 - lambda_) * v + lambda_ * (np.maximum(1 + away / 2, 0) ** 2 - 1).mean(axis=0)
    ours = torch.tensor(v[chi_square.argmin()] - 2 * (1 - c), requires_grad=True)
    loss, _ = sql.value_loss(torch.tensor(q) - ours, ours.expand(len(q)), "sql", alpha=c)
    assert torch.autograd.grad(loss, ours)[0].item() == pytest.approx(0, abs=0.01 / c)
    total_variation = (1 - lambda_) * v + lambda_ * np.maximum(away, 0).mean(axis=0)
    assert v[total_variation.argmin()] == pytest.approx(np.quantile(q, 1 - c), abs=0.05)


@pytest.mark.parametrize("alpha", [0.5, 2.0, 20.0])
def test_what_the_value_comes_to(alpha):
    """For Q of 0, 1 and 4. EQL: alpha log E[exp(Q / alpha)]. SQL: where pi / mu = max(0, 1 + (Q - v) / (2 alpha)) has
    the mean 1. The best of many policies is better than that by alpha (E_pi[pi / mu] - 1)."""
    q = torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64)
    found = {}
    for variant in ("sql", "eql"):
        v = torch.full((1,), 2.0, dtype=torch.float64, requires_grad=True)
        for _ in range(4000):
            loss, _ = sql.value_loss(q - v, v.expand(3), variant, alpha)
            (gradient,) = torch.autograd.grad(loss, v)
            v = (v - 0.2 * alpha * gradient).detach().requires_grad_()
        found[variant] = v.item()
    assert found["eql"] == pytest.approx(alpha * np.log(np.exp(q.numpy() / alpha).mean()), abs=1e-3)
    ratio = np.maximum(0, 1 + (q.numpy() - found["sql"]) / (2 * alpha))
    assert ratio.mean() == pytest.approx(1, abs=1e-3)
    policies = np.random.default_rng(0).dirichlet([0.5] * 3, 100_000)  # where mu is 1 / 3
    best = np.sum(policies * (q.numpy() - alpha * (3 * policies - 1)), axis=1).max()
    assert best - found["sql"] == pytest.approx(alpha * (np.mean(ratio**2) - 1), abs=5e-3)


def test_actor_loss(learner, args):
    batch, a = random_batch(), torch.tensor([-2.0, -1, -0.5, 0, 0.1, 1, 2, 900])
    loss, metrics = sql.actor_loss(learner.actor, a, batch, args.variant, 2.0, 100.0)
    mean = np.tanh(numpy_mlp(learner.actor.net, batch.observations.numpy()))
    log_prob = -(0.5 * (batch.actions.numpy() - mean) ** 2 + 0.5 * np.log(2 * np.pi)).sum(axis=1)
    weight = np.maximum(a.numpy(), 0) if args.variant == "sql" else np.exp(np.minimum(10 * a.numpy() / 2, 50))
    weight = np.minimum(weight, 100)
    assert loss.item() == pytest.approx(-np.mean(weight * log_prob), rel=1e-5)
    assert metrics["actor/weight_zero"].item() == (4 / 8 if args.variant == "sql" else 0)
    assert metrics["actor/weight_clipped"].item() == (1 / 8 if args.variant == "sql" else 3 / 8)


def test_each_loss_trains_its_own_network_only(learner, args):
    batch = random_batch()
    value = learner.value(batch.observations)
    advantages = sql.advantage(value, learner.target_critic, batch)
    losses = {
        "value": sql.value_loss(advantages, value, args.variant, args.alpha)[0],
        "critic": sql.critic_loss(learner.critic, learner.value, batch, args.gamma)[0],
        "actor": sql.actor_loss(learner.actor, advantages, batch, args.variant, args.alpha, args.weight_clip)[0],
    }
    assert_each_trains_its_own(losses, networks_of(learner, "actor", "critic", "value"))
    total, _ = sql.total_loss(learner, batch, args)
    assert total.item() == pytest.approx(sum(losses.values()).item(), rel=1e-5)


def test_arguments_that_cannot_be():
    assert_one_line(run_script("sql", "--alpha", "0", *SHORT), "--alpha 0.0: must be positive")
