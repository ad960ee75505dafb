"""FQL's losses against NumPy on small numbers, what each may touch, and a policy that takes one of two modes."""

import copy
import math

import fql
import numpy as np
import pytest
import torch
from conftest import SHORT, assert_each_trains_its_own, assert_one_line, lower, networks_of, random_batch, run_script

from common.evaluation import Policy, load_policy
from common.optim import Adam

CPU = torch.device("cpu")


@pytest.fixture
def args():
    return fql.Args(hidden_dims=(5, 4), alpha=0.7, flow_steps=3, num_acting_actions=7, gamma=0.9)


@pytest.fixture
def learner(args):
    torch.manual_seed(0)
    learner = fql.build(3, 2, args, CPU, Adam)
    with torch.no_grad():  # so that the target differs from what it follows, and the norms from doing nothing
        for module in (learner.target_critic, learner.actor.critic.norms):
            for parameter in module.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
        for network in (learner.actor.policy, learner.flow):  # actions that differ, and some beyond the range
            network.net[-1].weight.mul_(8)
    return learner


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def numpy_gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def numpy_network(network, *inputs):
    """The layers of a flow or a policy without torch: GELU between them, none after the last."""
    x = np.concatenate(inputs, axis=1).astype(np.float64)
    for index, layer in enumerate(layer for layer in network.net if isinstance(layer, torch.nn.Linear)):
        x = numpy_gelu(x) if index else x
        x = x @ layer.weight.detach().numpy().astype(np.float64).T + layer.bias.detach().numpy()
    return x


def numpy_flow(flow, observations, z, steps):
    x = z.astype(np.float64)
    for step in range(steps):
        x = x + numpy_network(flow, observations, x, np.full((len(x), 1), step / steps)) / steps
    return np.clip(x, -1, 1)


def numpy_normed_twins(critic, observations, actions):
    """Q_1 and Q_2, [2, batch], each twin as a network of its own: linear, GELU, then layer norm."""
    values = []
    for twin in range(2):
        x = np.concatenate([observations, actions], axis=1).astype(np.float64)
        for layer, norm in zip(critic.layers[:-1], critic.norms, strict=True):
            x = numpy_gelu(x @ layer.weight[twin].detach().numpy() + layer.bias[twin].detach().numpy())
            x = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
            x = x * norm.weight[twin].detach().numpy() + norm.bias[twin].detach().numpy()
        last = critic.layers[-1]
        values.append((x @ last.weight[twin].detach().numpy() + last.bias[twin].detach().numpy())[:, 0])
    return np.stack(values)


# --- Losses ---


def test_gelu_is_the_tanh_form_of_pytorch():
    """Values and slopes, far out, too."""
    x = torch.cat([torch.linspace(-40, 40, 801), torch.tensor([-1e4, 1e4])]).double().requires_grad_()
    ours, theirs = fql.gelu(x), torch.nn.functional.gelu(x, approximate="tanh")
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)
    slopes = (torch.autograd.grad(y.sum(), x)[0] for y in (ours, theirs))
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-14)
    single = fql.gelu(x.detach().float())
    torch.testing.assert_close(single.double(), theirs, rtol=1e-5, atol=1e-6)


def test_flow_loss(learner):
    batch, noise, times = random_batch(), normal(8, 2), torch.linspace(0, 1, 8).unsqueeze(1)
    loss, _ = fql.flow_loss(learner.flow, batch, noise, times)
    actions, z, t = batch.actions.numpy(), noise.numpy(), times.numpy()
    velocity = numpy_network(learner.flow, batch.observations.numpy(), z + t * (actions - z), t)
    assert loss.item() == pytest.approx(np.mean((velocity - (actions - z)) ** 2), rel=1e-4)


def test_flow_follows_the_velocity_by_eulers_method(learner):
    observations, z = normal(8, 3), normal(8, 2)
    expected = numpy_flow(learner.flow, observations.numpy(), z.numpy(), steps=3)
    assert (np.abs(expected) == 1).any() and (np.abs(expected) < 1).any()
    np.testing.assert_allclose(learner.flow.sample(observations, z).detach().numpy(), expected, atol=1e-5)


def test_flow_along_straight_lines_arrives_in_any_number_of_steps(learner):
    """Where the velocity is the same everywhere, Euler's method makes no error: x = z + velocity."""
    with torch.no_grad():
        learner.flow.net[-1].weight.zero_()
        learner.flow.net[-1].bias.copy_(torch.tensor([0.25, -0.125]))
    z = 0.1 * normal(8, 2)
    for steps in (1, 2, 10):
        learner.flow.steps = steps
        torch.testing.assert_close(learner.flow.sample(normal(8, 3), z), z + learner.flow.net[-1].bias)


@pytest.mark.parametrize("aggregation", ["mean", "min"])
def test_critic_loss(learner, args, aggregation):
    args.q_aggregation = aggregation
    batch, noise = random_batch(), normal(8, 2)
    loss, _ = fql.critic_loss(learner, batch, noise, args)
    next_observations = batch.next_observations.numpy()
    next_actions = numpy_network(learner.actor.policy, next_observations, noise.numpy())
    assert (np.abs(next_actions) > 1).any()
    next_qs = numpy_normed_twins(learner.target_critic, next_observations, np.clip(next_actions, -1, 1))
    next_q = next_qs.mean(axis=0) if aggregation == "mean" else lower(next_qs)
    target = batch.rewards.numpy() + 0.9 * np.where(batch.terminations.numpy() == 1, 0, next_q)
    q = numpy_normed_twins(learner.actor.critic, batch.observations.numpy(), batch.actions.numpy())
    assert loss.item() == pytest.approx(((q - target) ** 2).mean(axis=1).sum(), rel=1e-4)


@pytest.mark.parametrize("normalize_q", [True, False])
def test_actor_loss(learner, args, normalize_q):
    args.normalize_q = normalize_q
    batch, noise = random_batch(), normal(8, 2)
    with torch.no_grad():
        learner.actor.critic.layers[-1].bias.sub_(1)
    loss, metrics = fql.actor_loss(learner, batch, noise, args)
    observations = batch.observations.numpy()
    actions = numpy_network(learner.actor.policy, observations, noise.numpy())
    assert (np.abs(actions) > 1).any() and (np.abs(actions) < 1).any()
    q = numpy_normed_twins(learner.actor.critic, observations, np.clip(actions, -1, 1)).mean(axis=0)
    assert (q > 0).any() and (q < 0).any()  # so that the mean of |Q| is not |the mean of Q|
    lambda_ = 1 / np.mean(np.abs(q)) if normalize_q else 1
    distillation = np.mean((actions - numpy_flow(learner.flow, observations, noise.numpy(), steps=3)) ** 2)
    imitation = np.mean((actions - batch.actions.numpy()) ** 2)
    assert loss.item() == pytest.approx(0.7 * distillation - lambda_ * np.mean(q), rel=1e-4)
    assert metrics["actor/distillation"].item() == pytest.approx(distillation, rel=1e-4)
    assert metrics["actor/imitation"].item() == pytest.approx(imitation, rel=1e-4)


def test_normalisation_makes_the_actors_gradient_independent_of_the_scale_of_q(learner, args):
    """And lambda is a constant: with its gradient, Q's share would vanish wherever Q has one sign."""
    batch, noise, last = random_batch(), normal(8, 2), learner.actor.critic.layers[-1]
    with torch.no_grad():
        last.bias.add_(5)
    parameters, gradients = list(learner.actor.policy.parameters()), []
    for normalize_q in (True, False):
        args.normalize_q = normalize_q
        for _ in range(2):
            gradients.append(torch.autograd.grad(fql.actor_loss(learner, batch, noise, args)[0], parameters))
            with torch.no_grad():
                last.weight.mul_(10), last.bias.mul_(10)
    args.alpha, args.normalize_q = 0.0, True  # what is left is Q's share
    assert torch.autograd.grad(fql.actor_loss(learner, batch, noise, args)[0], parameters)[0].abs().max() > 1e-3
    torch.testing.assert_close(gradients[0], gradients[1])
    assert (gradients[2][0] - gradients[3][0]).abs().max() > 0.1


def test_termination_ends_the_target_and_truncation_does_not(learner, args):
    batch = random_batch()._replace(rewards=torch.zeros(8))
    with torch.no_grad():
        learner.target_critic.layers[-1].bias.fill_(1000.0)
    for terminated, expected in ((1.0, 0.0), (0.0, 900.0)):  # a truncated step is stored as not terminated
        step = batch._replace(terminations=torch.full((8,), terminated))
        _, metrics = fql.critic_loss(learner, step, normal(8, 2), args)
        assert metrics["critic/target"].item() == pytest.approx(expected, abs=20)


# --- Update ---


def test_each_loss_trains_its_own_network_only(learner, args):
    batch, noise = random_batch(), normal(3, 8, 2)
    losses = {
        "flow": fql.flow_loss(learner.flow, batch, noise[0], torch.full((8, 1), 0.5))[0],
        "policy": fql.actor_loss(learner, batch, noise[1], args)[0],
        "critic": fql.critic_loss(learner, batch, noise[2], args)[0],
    }
    networks = networks_of(learner, "flow") | networks_of(learner.actor, "policy", "critic")
    assert_each_trains_its_own(losses, networks)
    total = fql.total_loss(learner, batch, noise, torch.full((8, 1), 0.5), args)[0]
    assert total.item() == pytest.approx(sum(loss.item() for loss in losses.values()), rel=1e-5)


def test_update_moves_every_network_and_the_target_follows(learner, args):
    before = copy.deepcopy(learner)
    fql.update(learner, random_batch(), 1, args)
    for old, new in ((before.actor, learner.actor), (before.flow, learner.flow)):
        assert not any(map(torch.equal, old.parameters(), new.parameters()))
    critics = before.target_critic, learner.target_critic, learner.actor.critic
    for start, end, followed in zip(*(critic.parameters() for critic in critics), strict=True):
        torch.testing.assert_close(end, start + args.tau * (followed - start))


def test_the_target_starts_as_the_critic(args):
    learner = fql.build(3, 2, args, CPU)
    assert all(map(torch.equal, learner.target_critic.parameters(), learner.actor.critic.parameters()))


def test_each_network_has_its_learning_rate(args):
    args.actor_learning_rate, args.critic_learning_rate, args.flow_learning_rate = 1e-3, 2e-3, 3e-3
    learner = fql.build(3, 2, args, CPU)
    rates = {weight: group["lr"] for group in learner.optimizer.param_groups for weight in group["params"]}
    for network, rate in ((learner.actor.policy, 1e-3), (learner.actor.critic, 2e-3), (learner.flow, 3e-3)):
        assert {rates.pop(weight) for weight in network.parameters()} == {rate}
    assert not rates


# --- Acting ---


def test_acting_takes_the_candidate_of_highest_q(learner):
    observations = normal(50, 3)
    actions = learner.actor(observations).detach()
    candidates, q = [], []
    for z in learner.actor.noise.expand(7, 50, 2):
        candidates.append(np.clip(numpy_network(learner.actor.policy, observations.numpy(), z.numpy()), -1, 1))
        q.append(numpy_normed_twins(learner.actor.critic, observations.numpy(), candidates[-1]).mean(axis=0))
    best = np.argmax(q, axis=0)
    assert len(set(best)) > 1
    np.testing.assert_allclose(actions.numpy(), np.array(candidates)[best, np.arange(50)], atol=1e-5)
    learner.actor.noise = learner.actor.noise[:1]
    np.testing.assert_allclose(learner.actor(observations).detach().numpy(), candidates[0], atol=1e-5)  # mu(s, 0)


def test_acting_is_a_function_of_the_observation(learner, args):
    """The noise is drawn at the start, from the seed; training leaves it alone."""
    observations, noise = normal(20, 3), learner.actor.noise.clone()
    first = learner.actor(observations)
    torch.randn(100)
    assert torch.equal(first, learner.actor(observations))
    assert noise.shape == (7, 1, 2) and (noise[0] == 0).all() and noise.unique().numel() == 13
    fql.update(learner, random_batch(), 1, args)
    assert torch.equal(noise, learner.actor.noise)
    assert not torch.equal(first, learner.actor(observations))
    for seed, same in ((0, True), (1, False)):
        torch.manual_seed(seed)
        assert torch.equal(fql.build(3, 2, args, CPU, Adam).actor.noise, noise) == same


def test_takes_the_better_of_two_modes_and_not_their_average():
    """The data act near -0.5 or, less often, near 0.5; the more the better."""
    torch.manual_seed(0)
    rates = {f"{name}_learning_rate": 3e-3 for name in ("actor", "critic", "flow")}
    args = fql.Args(hidden_dims=(32, 32), alpha=10.0, num_acting_actions=10, **rates)
    learner = fql.build(1, 1, args, CPU, Adam)
    states, mode = torch.randn(4096, 1), torch.where(torch.rand(4096, 1) < 0.3, 0.5, -0.5)
    actions = mode + 0.2 * torch.rand(4096, 1) - 0.1
    data = fql.Batch(states, actions, 2 + actions[:, 0], states, torch.ones(4096))
    for step in range(1, 501):
        rows = torch.randint(4096, (64,))
        fql.update(learner, fql.Batch(*(column[rows] for column in data)), step, args)
    with torch.no_grad():
        flowed = learner.flow.sample(states, torch.randn(4096, 1))
        chosen = learner.actor(states)
    assert actions.mean() < -0.1
    assert ((flowed.abs() - 0.5).abs() < 0.3).float().mean() > 0.8 and 0.15 < (flowed > 0).float().mean() < 0.45
    assert ((chosen > 0.3) & (chosen < 0.9)).float().mean() > 0.95, chosen.aminmax()


def test_load_policy_equals_the_evaluated_policy(learner, args, tmp_path):
    bounds = np.array([[-2.0, -1.0], [2.0, 3.0]], np.float32)
    normalization, origin = torch.tensor([[0.5, 0.0, 1.0], [1.0, 2.0, 3.0]]), {"script": "fql"}
    policy = Policy(learner.actor, normalization, bounds, False, origin | {"hyper_parameters": vars(args)})
    with (tmp_path / "policy.pt").open("wb") as file:
        policy.save(file)
    loaded = load_policy(tmp_path)
    for count in (1, 10, 333):
        observations = np.random.default_rng(count).normal(size=(count, 3)).astype(np.float32)
        np.testing.assert_array_equal(loaded(observations), policy(observations))


def test_bad_arguments():
    assert_one_line(run_script("fql", "--alpha", "-1", *SHORT), "--alpha -1.0: must not be negative")
    assert_one_line(run_script("fql", "--flow-steps", "0", *SHORT), "--flow-steps 0: must be at least 1")
