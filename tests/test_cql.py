"""CQL's losses against NumPy on small numbers and closed forms, and what each of them may touch."""

import math

import cql
import numpy as np
import pytest
import torch
from conftest import (
    SHORT,
    assert_each_trains_its_own,
    checkpoint,
    level,
    lower,
    networks_of,
    numpy_mlp,
    numpy_sample,
    numpy_twins,
    random_batch,
    run_script,
    sac_networks,
)

from common.command_line import BadInput
from common.optim import Adam

CPU = torch.device("cpu")
NUM_SAMPLES = 3


@pytest.fixture
def args():
    return cql.Args(hidden_dims=(5, 4), num_samples=NUM_SAMPLES, cql_alpha=2.0, gamma=0.9)


@pytest.fixture
def learner(args):
    torch.manual_seed(0)
    learner = cql.build(3, 2, args, CPU, Adam)
    with torch.no_grad():  # so that the target differs from what it follows, and the policy's heads from zero
        for module in (learner.target_critic, learner.actor):
            for parameter in module.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
    level(learner.critic)
    level(learner.target_critic)
    return learner


def draws(num_samples=NUM_SAMPLES, batch_size=8, action_dim=2):
    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand(num_samples, batch_size, action_dim, generator=generator) * 2 - 1
    return uniform, torch.randn(2, num_samples, batch_size, action_dim, generator=generator)


def critic_loss(learner, batch, args):
    uniform, noise = draws(args.num_samples)
    policy = learner.actor.sample(batch.observations, noise[0])
    return cql.critic_loss(learner, policy, batch, uniform, noise[1], args)


def squashed(mean, std, noise):
    u = mean + std * noise
    return u.tanh(), cql.squashed_log_prob(noise, std, u)


def numpy_q(critic, observations, actions):
    """[2, n, batch], one action set at a time."""
    return np.stack([numpy_twins(critic, observations, rows) for rows in actions], axis=1)


def numpy_terms(learner, batch, args):
    """By hand: the Bellman target, q [2, ...] at data, uniform and both policies' actions, their log-densities."""
    uniform, noise = draws()
    observations, next_observations = batch.observations.numpy(), batch.next_observations.numpy()
    actions, log_prob = numpy_sample(learner.actor, observations, noise[0])
    next_actions, next_log_prob = numpy_sample(learner.actor, next_observations, noise[1])
    next_q = lower(numpy_twins(learner.target_critic, next_observations, next_actions[0]))
    target = numpy_target(batch, args, next_q)
    q_data = numpy_twins(learner.critic, observations, batch.actions.numpy())
    q = [numpy_q(learner.critic, observations, rows) for rows in (uniform.numpy(), actions, next_actions)]
    return target, q_data, q, (log_prob, next_log_prob)


def numpy_target(batch, args, next_q):
    return batch.rewards.numpy() + args.gamma * np.where(batch.terminations.numpy() == 1, 0, next_q)


def expected_loss(target, q_data, pushed_down, cql_alpha):
    bellman = ((q_data - target) ** 2).mean(axis=1)
    return (bellman + cql_alpha * (pushed_down - q_data).mean(axis=1)).sum()


def test_critic_loss_of_cql_h(learner, args):
    batch = random_batch()
    target, q_data, q, (log_prob, next_log_prob) = numpy_terms(learner, batch, args)
    log_uniform = np.full_like(log_prob, 2 * math.log(0.5))
    ratio = np.exp(np.concatenate(q, axis=1) - np.concatenate([log_uniform, log_prob, next_log_prob]))
    expected = expected_loss(target, q_data, np.log(ratio.mean(axis=1)), 2.0)
    loss, metrics = critic_loss(learner, batch, args)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert metrics["critic/q_random"].item() == pytest.approx(q[0].mean(), rel=1e-4)
    assert metrics["critic/q_policy"].item() == pytest.approx(q[1].mean(), rel=1e-4)
    assert metrics["critic/q_data"].item() == pytest.approx(q_data.mean(), rel=1e-4)


@pytest.mark.parametrize("softness", [0.4, 3.0])
def test_softness_of_cql_h(learner, args, softness):
    """T log E[ exp(Q / T) / density ]: Q alone is divided, not the density's logarithm."""
    args.gap_softness = softness
    batch = random_batch()
    target, q_data, q, (log_prob, next_log_prob) = numpy_terms(learner, batch, args)
    density = np.concatenate([np.full_like(log_prob, 0.25), np.exp(log_prob), np.exp(next_log_prob)])
    expected = softness * np.log((np.exp(np.concatenate(q, axis=1) / softness) / density).mean(axis=1))
    loss, _ = critic_loss(learner, batch, args)
    assert loss.item() == pytest.approx(expected_loss(target, q_data, expected, 2.0), rel=1e-4)


@pytest.mark.parametrize("rho", ["policy", "uniform"])
def test_critic_loss_of_cql_rho(learner, args, rho):
    args.variant, args.rho = "rho", rho
    batch = random_batch()
    target, q_data, q, _ = numpy_terms(learner, batch, args)
    under_rho = q[1] if rho == "policy" else q[0]
    z = np.exp(under_rho).mean(axis=1)
    expected = (under_rho * np.exp(under_rho)).mean(axis=1) / z
    loss, _ = critic_loss(learner, batch, args)
    assert loss.item() == pytest.approx(expected_loss(target, q_data, expected, 2.0), rel=1e-4)


def test_critic_loss_of_cql_var(learner, args):
    args.variant = "var"
    batch = random_batch()
    target, q_data, q, _ = numpy_terms(learner, batch, args)
    expected = q[1].mean(axis=1) + np.sqrt(q[1].var(axis=1, ddof=1) + 1e-6)
    loss, _ = critic_loss(learner, batch, args)
    assert loss.item() == pytest.approx(expected_loss(target, q_data, expected, 2.0), rel=1e-4)


def test_critic_loss_of_the_basic_form(learner, args):
    args.variant = "mean"
    batch = random_batch()
    target, q_data, q, _ = numpy_terms(learner, batch, args)
    loss, metrics = critic_loss(learner, batch, args)
    assert loss.item() == pytest.approx(expected_loss(target, q_data, q[0].mean(axis=1), 2.0), rel=1e-4)
    assert metrics["critic/gap"].item() == pytest.approx((q[0].mean(axis=1) - q_data).mean(), rel=1e-4)


def test_max_backup(learner, args):
    """Each twin takes its own best of the actions, then the lower one counts, as in the authors' code."""
    batch, (_, noise) = random_batch(), draws()
    next_observations = batch.next_observations.numpy()
    next_actions, _ = numpy_sample(learner.actor, next_observations, noise[1])
    with torch.no_grad():  # so that the twins have their bests at different actions
        for parameter in learner.target_critic.parameters():
            parameter[1] = parameter[0]
        learner.target_critic.layers[-1].weight[1].neg_()
    next_q = numpy_q(learner.target_critic, next_observations, next_actions)
    target = numpy_target(batch, args, next_q.max(axis=1).min(axis=0))
    assert not np.allclose(target, numpy_target(batch, args, next_q.min(axis=0).max(axis=0)))
    q_data = numpy_twins(learner.critic, batch.observations.numpy(), batch.actions.numpy())
    args.max_backup = True
    _, metrics = critic_loss(learner, batch, args)
    assert metrics["critic/bellman_error"].item() == pytest.approx(expected_loss(target, q_data, 0, 0), rel=1e-4)


def test_entropy_in_backup(learner, args):
    batch = random_batch()
    target, q_data, _, (_, next_log_prob) = numpy_terms(learner, batch, args)
    temperature = learner.actor.log_temperature.exp().item()
    entropy_term = np.where(batch.terminations.numpy() == 1, 0, temperature * next_log_prob[0])
    args.entropy_in_backup = True
    _, metrics = critic_loss(learner, batch, args)
    expected = expected_loss(target - args.gamma * entropy_term, q_data, 0, 0)
    assert metrics["critic/bellman_error"].item() == pytest.approx(expected, rel=1e-4)


def test_the_best_next_action_has_no_entropy():
    for words in ({"max_backup": True}, {"entropy_in_backup": True}):
        cql.Args(**words).validate()
    with pytest.raises(BadInput, match="--entropy-in-backup True: not with --max-backup"):
        cql.Args(max_backup=True, entropy_in_backup=True).validate()


def test_adversary_rho_has_the_gradient_of_the_log_mean_exponential():
    """Of log E_rho[exp Q], which is what max_mu E_mu[Q] - KL(mu | rho) comes to."""
    q = torch.randn(2, 5, 4, requires_grad=True)
    (ours,) = torch.autograd.grad(cql.adversary_rho(q).sum(), q)
    (exact,) = torch.autograd.grad(torch.logsumexp(q, dim=1).sum(), q)
    torch.testing.assert_close(ours, exact)


def test_adversary_rho_is_exact_where_q_is_far_from_0():
    """As CQL's may be: its weights sum to 1 in float32."""
    q = -5000 + torch.randn(2, 10, 256)
    expected = (q.double().softmax(dim=1) * q).sum(dim=1)
    np.testing.assert_allclose(cql.adversary_rho(q), expected, atol=0.01)


@pytest.mark.parametrize("softness", [1.0, 0.5, 4.0])
def test_logsumexp_estimate_meets_the_exact_integral(softness):
    """Q(a) / T = -c (a - m)^2 on [-1, 1]: log integral exp(Q / T) is a matter of erf, whatever the proposals."""
    c, m, n = 4.0, 0.3, 20_000
    exact = math.log(math.sqrt(math.pi / c) / 2 * (math.erf(math.sqrt(c) * (1 - m)) + math.erf(math.sqrt(c) * (1 + m))))
    torch.manual_seed(0)
    uniform = torch.rand(n, 1) * 2 - 1
    policy, log_prob = squashed(torch.tensor([[0.2]]), torch.tensor([[0.8]]), torch.randn(n, 1, 1))
    for actions, log_density in (
        (uniform, torch.full((n, 1), -math.log(2))),
        (policy.squeeze(-1), log_prob),
        (torch.cat([uniform, policy.squeeze(-1)]), torch.cat([torch.full((n, 1), -math.log(2)), log_prob])),
    ):
        estimate = cql.adversary_h(-softness * c * (actions - m).square().expand(2, -1, -1), log_density, softness)
        assert estimate.shape == (2, 1)
        np.testing.assert_allclose(estimate.numpy() / softness, exact, atol=0.03)  # several standard errors


def test_the_sum_goes_over_the_actions_of_one_state():
    q = torch.zeros(2, 6, 3)
    q[:, :, 1] = 5.0  # another state's values
    np.testing.assert_allclose(cql.adversary_h(q, torch.zeros(6, 3)).numpy(), [[0, 5, 0]] * 2, atol=1e-6)


@pytest.mark.parametrize("variant", ["h", "rho"])
def test_gradient_pushes_q_down_at_unseen_actions_and_up_at_the_datas(learner, args, variant):
    """With respect to the values themselves: -cql_alpha at each action of the data, +cql_alpha shared by the others."""
    batch, gradients = random_batch(), []
    args.variant = variant
    num_others = (3 if variant == "h" else 2) * NUM_SAMPLES
    q = torch.randn(2, 1 + num_others, 8, requires_grad=True)
    for args.cql_alpha in (0.0, 2.0):
        loss, _ = critic_loss(learner._replace(critic=lambda observations, actions: q), batch, args)
        gradients += torch.autograd.grad(loss, q)
    conservative = 8 * (gradients[1] - gradients[0])  # of the mean over 8 states, without the Bellman error
    torch.testing.assert_close(conservative[:, 0], torch.full((2, 8), -2.0))
    pushed_down = conservative[:, 1:] if variant == "h" else conservative[:, 1 + NUM_SAMPLES :]
    assert (pushed_down > 0).all()
    torch.testing.assert_close(pushed_down.sum(dim=1), torch.full((2, 8), 2.0))


@pytest.mark.parametrize("mean", [-9.0, -3.0, 0.0, 0.7, 6.0])
def test_log_probability_against_a_numerical_change_of_variables(mean):
    """The density of tanh(u) by a difference quotient of the distribution function, in double precision."""
    std = 0.5
    noise = torch.tensor([[-1.5], [0.0], [2.0]], dtype=torch.float64)
    _, log_prob = squashed(torch.tensor([mean], dtype=torch.float64), torch.tensor([std]).double(), noise)
    u, step = mean + std * noise[:, 0].numpy(), 1e-5
    probability = [
        0.5 * (math.erf((x + step - mean) / std / 2**0.5) - math.erf((x - step - mean) / std / 2**0.5)) for x in u
    ]
    # tanh(x + h) - tanh(x - h) = sinh(2h) / (cosh(x + h) cosh(x - h)), which does not cancel
    width = np.sinh(2 * step) / (np.cosh(u + step) * np.cosh(u - step))
    np.testing.assert_allclose(log_prob.numpy(), np.log(np.array(probability) / width), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mean", [-50.0, 50.0])
def test_log_probability_is_finite_where_tanh_is_flat(mean):
    """log(1 - tanh(u)^2) = -2 |u| + log 4 there; the naive form is log 0."""
    action, log_prob = squashed(torch.tensor([mean]), torch.tensor([1.0]), torch.zeros(1, 1))
    assert abs(action.item()) == 1.0
    assert log_prob.item() == pytest.approx(-0.5 * math.log(2 * math.pi) + 2 * 50 - math.log(4), rel=1e-6)


def test_actor_and_temperature_losses(learner):
    batch, (_, noise) = random_batch(), draws()
    actions, log_prob = numpy_sample(learner.actor, batch.observations.numpy(), noise[0, 0])
    q = lower(numpy_twins(learner.critic, batch.observations.numpy(), actions))
    ours = learner.actor.sample(batch.observations, noise[0, 0])
    loss, _ = cql.actor_loss(learner.critic, torch.tensor(0.3), batch.observations, *ours)
    assert loss.item() == pytest.approx(np.mean(0.3 * log_prob - q), rel=1e-4)
    loss, _ = cql.temperature_loss(torch.tensor(0.3), ours[1], target_entropy=-2.0)
    assert loss.item() == pytest.approx(np.mean(-0.3 * (log_prob - 2.0)), rel=1e-4)


def test_cloning_loss(learner):
    """By the change of variables as textbooks have it, for actions of which one is at its bound."""
    batch, (_, noise) = random_batch(), draws()
    batch.actions[0, 0] = 1.0
    observations = batch.observations.numpy()
    hidden = np.maximum(numpy_mlp(learner.actor.trunk, observations), 0)  # numpy_mlp has none after its last layer
    mean, log_std = (numpy_mlp([head], hidden) for head in (learner.actor.mean, learner.actor.log_std))
    std, actions = np.exp(np.clip(log_std, -5, 2)), np.clip(batch.actions.numpy(), -0.999, 0.999)
    density = np.exp(-0.5 * ((np.arctanh(actions) - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi)) / (1 - actions**2)
    data_log_prob = np.log(density).sum(axis=1)
    _, log_prob = numpy_sample(learner.actor, observations, noise[0, 0])
    _, ours = learner.actor.sample(batch.observations, noise[0, 0])
    loss, metrics = cql.cloning_loss(learner.actor, torch.tensor(0.3), batch, ours)
    assert loss.item() == pytest.approx(np.mean(0.3 * log_prob - data_log_prob), rel=1e-4)
    assert metrics["actor/log_prob"].item() == pytest.approx(data_log_prob.mean(), rel=1e-4)


def test_temperature_rises_while_the_entropy_is_too_low():
    for log_prob, rises in ((5.0, True), (-5.0, False)):
        temperature = torch.tensor(1.0, requires_grad=True)
        loss, _ = cql.temperature_loss(temperature, torch.full((4,), log_prob), target_entropy=-1.0)
        (gradient,) = torch.autograd.grad(loss, temperature)
        assert (gradient < 0) == rises


def test_each_loss_trains_its_own_network_only(learner, args):
    args.lagrange = True
    batch, (_, noise) = random_batch(), draws()
    temperature = learner.actor.log_temperature.exp()
    actions, log_prob = learner.actor.sample(batch.observations, noise[0, 0])
    losses = {
        "critic multiplier": critic_loss(learner, batch, args)[0],
        "actor": cql.actor_loss(learner.critic, temperature, batch.observations, actions, log_prob)[0],
        "temperature": cql.temperature_loss(temperature, log_prob, -2.0)[0],
    }
    losses["cloning actor"] = cql.cloning_loss(learner.actor, temperature, batch, log_prob)[0]
    assert_each_trains_its_own(losses, sac_networks(learner) | networks_of(learner, "multiplier"))


@pytest.mark.parametrize("step", [2, 3])
def test_update_adds_the_three_losses(learner, args, step):
    """The actor's is that of the warm start up to and with its last update."""
    args.warm_start = 2
    batch, (uniform, noise) = random_batch(), draws()
    temperature = learner.actor.log_temperature.exp()
    actions, log_prob = learner.actor.sample(batch.observations, noise[0, 0])
    cloning = cql.cloning_loss(learner.actor, temperature, batch, log_prob)
    own = cql.actor_loss(learner.critic, temperature, batch.observations, actions, log_prob)
    losses = [
        critic_loss(learner, batch, args)[0],
        (cloning if step == 2 else own)[0],
        cql.temperature_loss(temperature, log_prob, target_entropy=-2.0)[0],  # -action_dim
    ]
    loss, _ = cql.total_loss(learner, batch, step, uniform, noise, args)
    assert loss.item() == pytest.approx(sum(losses).item(), rel=1e-5)
    loss.backward()
    for parameters, expected in zip(sac_networks(learner).values(), losses, strict=True):
        gradients = torch.autograd.grad(expected, parameters, retain_graph=True)
        torch.testing.assert_close(tuple(parameter.grad for parameter in parameters), gradients)


def test_the_actor_runs_once_for_each_set_of_states(learner, args):
    rows = []
    learner.actor.trunk[0].register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    cql.update(learner, random_batch(), 1, args)
    assert rows == [8, 8]


def test_termination_ends_the_target_and_truncation_does_not(learner, args):
    batch = random_batch()._replace(rewards=torch.zeros(8))
    with torch.no_grad():
        learner.target_critic.layers[-1].bias.fill_(1000.0)
        learner.critic.layers[-1].weight.zero_()
        learner.critic.layers[-1].bias.zero_()
    for terminated, expected in ((1.0, 0.0), (0.0, 900.0)):  # a truncated step is stored as not terminated
        _, metrics = critic_loss(learner, batch._replace(terminations=torch.full((8,), terminated)), args)
        assert math.sqrt(metrics["critic/bellman_error"].item() / 2) == pytest.approx(expected, abs=20)  # of two twins


def test_lagrange_weighs_the_gap(learner, args):
    """By cql_alpha times its multiplier, a constant there, which the gap's distance from --target-gap moves."""
    args.lagrange, args.target_gap = True, 0.5
    with torch.no_grad():
        learner.multiplier.log.fill_(math.log(1.5))
    batch = random_batch()
    loss, metrics = critic_loss(learner, batch, args)
    gap = metrics["critic/gap"].item()
    assert loss.item() == pytest.approx(
        metrics["critic/bellman_error"].item() + 3 * 2 * gap - 3 * (gap - 0.5), rel=1e-4
    )
    (gradient,) = torch.autograd.grad(loss, learner.multiplier.log)
    assert gradient.item() == pytest.approx(-3 * (gap - 0.5), rel=1e-4)
    args.lagrange, args.cql_alpha = False, 3.0  # the critic's gradient is that of the fixed weight
    learner.multiplier.log.data.zero_()
    ours = torch.autograd.grad(critic_loss(learner, batch, args)[0], [*learner.critic.parameters()])
    args.lagrange, args.cql_alpha = True, 2.0
    learner.multiplier.log.data.fill_(math.log(1.5))
    torch.testing.assert_close(
        torch.autograd.grad(critic_loss(learner, batch, args)[0], [*learner.critic.parameters()]), ours
    )
    learner.multiplier.log.data.fill_(20.0)
    assert critic_loss(learner, batch, args)[1]["critic/cql_alpha"] == 2 * 1e6


@pytest.mark.parametrize(("target_gap", "rises"), [(-100.0, True), (100.0, False)])
def test_lagrange_moves_cql_alpha_the_right_way(learner, args, target_gap, rises):
    args.lagrange, args.target_gap = True, target_gap
    before = learner.multiplier().item()
    cql.update(learner, random_batch(), 1, args)
    after = learner.multiplier().item()
    assert (after > before) == rises and after != before


def test_without_lagrange_cql_alpha_stays(learner, args):
    for step in (1, 2):
        metrics = cql.update(learner, random_batch(), step, args)
    assert metrics["critic/cql_alpha"].item() == 2.0


def test_target_critic_follows_by_tau(learner, args):
    before = [parameter.clone() for parameter in learner.target_critic.parameters()]
    cql.update(learner, random_batch(), 1, args)
    after, online = learner.target_critic.parameters(), learner.critic.parameters()
    for old, new, target in zip(before, after, online, strict=True):
        torch.testing.assert_close(new, old + args.tau * (target - old))


@pytest.mark.parametrize("stop", [5, 12])
def test_a_run_stopped_before_or_after_the_warm_start_ends_goes_on_to_the_same_bits(
    stop, tmp_path, pendulum, monkeypatch
):
    arguments = ["--num-updates", "16", *SHORT, "--num-samples", "3", "--batch-size", "32", "--warm-start", "8"]
    arguments += ["--checkpoint-every", str(stop), "--run-dir"]
    whole, stopped, update = tmp_path / "whole", tmp_path / "stopped", cql.update

    def fail(learner, batch, step, args):
        if step > stop:
            raise OSError("the disk is full")
        return update(learner, batch, step, args)

    assert run_script("cql", *arguments, str(whole)).returncode == 0
    with monkeypatch.context() as patch:
        patch.setattr(cql, "update", fail)
        assert run_script("cql", *arguments, str(stopped)).returncode == 1
    assert checkpoint(stopped)["step"] == stop
    assert run_script("cql", "--resume", *arguments, str(stopped)).returncode == 0
    policies = [torch.load(folder / "policy.pt", weights_only=True)["actor"] for folder in (whole, stopped)]
    assert all(torch.equal(policies[0][name], policies[1][name]) for name in policies[0])


def test_one_sample_has_no_variance():
    cql.Args(num_samples=1).validate()
    with pytest.raises(BadInput, match="--num-samples 1: must be at least 2 with --variant var"):
        cql.Args(num_samples=1, variant="var").validate()


@pytest.mark.parametrize("algorithm", ["cql", "bear"])
def test_an_actor_that_is_a_clone_to_the_end_is_told_of(algorithm, tmp_path, pendulum):
    words = ["--num-updates", "4", "--num-samples", "2", *SHORT, "--run-dir"]
    for start, told in (("3", False), ("4", True)):
        run = run_script(algorithm, "--warm-start", start, *words, str(tmp_path / start))
        assert run.returncode == 0 and ("--warm-start 4: the actor clones the data to the end" in run.stderr) == told
