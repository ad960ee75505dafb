"""The dynamics ensemble of MOPO and its kin, MBPO and PETS, which each script has, and is held to the same."""

import csv
import importlib
import inspect
import itertools
import json
import math
import re
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    SOON_BEST,
    Started,
    assert_one_line,
    assert_same,
    assert_same_runs,
    checkpoint,
    random_batch,
    random_episode,
    run_script,
)

from common.optim import Adam

CPU = torch.device("cpu")


ROLLING = "mopo", "combo", "mobile", "morel"  # which train SAC on rollouts
SCRIPTS = *ROLLING, "mve", "naf"  # which train until held-out data say that it is enough
EVERY = *SCRIPTS, "pets"


@pytest.fixture(params=SCRIPTS)
def algorithm(request):
    return request.param


@pytest.fixture
def script(algorithm):
    return importlib.import_module(algorithm)


# mopo's model, its loss, its update and `build` are the other ROLLING scripts' to the letter, as a test says
of_each_text = pytest.mark.parametrize("algorithm", ["mopo", "mve", "naf"], indirect=True)

ONLINE = "mbpo"  # whose text alone is looked at here
EVERYWHERE = "Dynamics dynamics_loss"
OF_A_DATASET = "load_dynamics ending_of"
SHARED = "dynamics_update keep_better forecast_errors fit_dynamics"
ON_ROLLOUTS = "Actor EnsembleLinear Critic ModelBuffer Learner build actor_loss temperature_loss total_loss update"


@pytest.mark.parametrize(
    ("name", "scripts"),
    [(name, (*EVERY, ONLINE)) for name in EVERYWHERE.split()]
    + [(name, EVERY) for name in OF_A_DATASET.split()]
    + [(name, (*SCRIPTS, ONLINE)) for name in SHARED.split()]
    + [(name, (*ROLLING, ONLINE)) for name in ON_ROLLOUTS.split()]
    + [(name, ("mopo", "naf")) for name in ("EnsembleLinear", "ModelBuffer")]
    + [
        ("model_step", ("combo", "mobile", ONLINE, "naf")),
        ("rollout", ("combo", "mobile")),
        ("begin_again", (ONLINE, "naf")),
    ],
)
def test_what_all_scripts_have_is_the_same_text(name, scripts):
    assert len({inspect.getsource(getattr(importlib.import_module(script), name)) for script in scripts}) == 1


def test_all_scripts_have_the_same_rules():
    texts = [
        (ROOT / "algorithms" / f"{name}.py").read_text().split("TERMINATION_RULES: ")[1] for name in (*EVERY, ONLINE)
    ]
    assert len({text[: text.index("\n}\n")] for text in texts}) == 1


def test_morel_has_mopos_critic_loss():
    ours, theirs = (inspect.getsource(importlib.import_module(script).critic_loss) for script in ("morel", "mopo"))
    assert ours == theirs


def make_learner(script, observation_dim=3, action_dim=2, **arguments):
    small = {"num_models": 3, "num_elites": 2, "dynamics_hidden_dims": (5, 4)}
    small |= {"rollout_batch_size": 100} if script.__name__ in ROLLING else {}
    small |= {"imagined_ratio": 0.5} if script.__name__ == "naf" else {}
    args = script.Args(**(small | arguments))
    torch.manual_seed(0)
    return script.build(observation_dim, action_dim, args, CPU, Adam), args


def data(num_rows, members=3):
    """x [members, rows, 5], z [members, rows, 4], terminations [members, rows]."""
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(members, num_rows, 5)), rng.normal(size=(members, num_rows, 4))
    terminations = rng.integers(0, 2, size=(members, num_rows))
    return [torch.tensor(column, dtype=torch.float32) for column in (*columns, terminations)]


def numpy_prediction(dynamics, member, x):
    """Mean, log-variance and logit of one member without torch."""
    numbers = {name: value.detach().numpy().astype(np.float64) for name, value in dynamics.state_dict().items()}
    h = (x - numbers["x_scale"][0]) / numbers["x_scale"][1]
    num_layers = len(dynamics.layers)
    for index in range(num_layers):
        h = h @ numbers[f"layers.{index}.weight"][member] + numbers[f"layers.{index}.bias"][member]
        if index < num_layers - 1:
            h = h / (1 + np.exp(-h))  # SiLU
    size = (h.shape[1] - 1) // 2
    upper, lower = numbers["max_log_variance"][member], numbers["min_log_variance"][member]
    log_variance = upper - np.log1p(np.exp(upper - h[:, size:-1]))
    log_variance = lower + np.log1p(np.exp(log_variance - lower))
    return h[:, :size], log_variance, h[:, -1]


def randomise(dynamics):
    """Scales and bounds unlike the ones at the start."""
    with torch.no_grad():
        for scale in (dynamics.x_scale, dynamics.z_scale):
            scale.copy_(torch.rand_like(scale) + 0.5)
        dynamics.max_log_variance.copy_(torch.rand_like(dynamics.max_log_variance))
        dynamics.min_log_variance.copy_(-torch.rand_like(dynamics.min_log_variance) - 1)


# --- Loss and training ---


@of_each_text
def test_a_model_of_120_numbers_learns_their_noise(script):
    """A price of the bounds for each member draws them past each other, as there are more of them than members."""
    learner, _ = make_learner(script, 119, 4, num_models=7, dynamics_hidden_dims=(16,), dynamics_learning_rate=0.03)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(123, 120, generator=generator) / 11
    for _ in range(600):
        x = torch.randn(7, 32, 123, generator=generator)
        z = 0.1 * x @ weights + torch.randn(7, 32, 120, generator=generator)
        metrics = script.dynamics_update(learner, x, z, torch.zeros(7, 32))
    assert 0.9 < metrics["dynamics/nll"] < 1.3  # 1 + log 1 at its best; a price for each member leads to 3.2


def test_bounds_of_the_variance_that_have_crossed_are_the_lower_one(script):
    learner, _ = make_learner(script)
    dynamics = learner.training_dynamics
    with torch.no_grad():
        dynamics.max_log_variance.fill_(-5.0)
        dynamics.min_log_variance.fill_(-1.0)
        log_variance = dynamics(data(50)[0])[1]
    assert ((log_variance > -1) & (log_variance < -1 + math.log(2))).all()
    loss, metrics = script.dynamics_loss(dynamics, *data(50))  # and have no price: the means over three members
    assert loss.item() == pytest.approx(3 * (metrics["dynamics/nll"] + metrics["dynamics/ends"]).item(), rel=1e-5)


def test_an_epochs_metrics_outlive_the_update_that_gave_them(script):
    """On a GPU a compiled update returns the same tensors each time, filled anew."""
    learner, args = make_learner(script, dynamics_batch_size=4, max_dynamics_epochs=1)
    nll, numbers = torch.zeros(()), itertools.count(1)
    batch = script.Batch(*(torch.randn(12, *shape) for shape in ((3,), (2,), (), (3,), ())))
    epochs = list(script.fit_dynamics(learner, batch, args, lambda *_: {"dynamics/nll": nll.fill_(next(numbers))}))
    assert [float(metrics["dynamics/nll"]) for metrics in epochs] == [2.0]  # of 1, 2 and 3: 9 rows in batches of 4


def test_dynamics_loss(script):
    learner, _ = make_learner(script)
    dynamics = learner.training_dynamics
    randomise(dynamics)
    x, z, terminations = data(8)
    loss, metrics = script.dynamics_loss(dynamics, x, z, terminations)
    scale = dynamics.z_scale.numpy()
    nll, ends = [], []
    for member in range(3):
        mean, log_variance, logit = numpy_prediction(dynamics, member, x[member].numpy())
        error = (z[member].numpy() - scale[0]) / scale[1] - mean
        nll.append(np.mean(error**2 / np.exp(log_variance) + log_variance))
        p = 1 / (1 + np.exp(-logit))
        ends.append(-np.mean(np.where(terminations[member].numpy() == 1, np.log(p), np.log(1 - p))))
    bounds = 0.01 * (dynamics.max_log_variance - dynamics.min_log_variance).sum().item() / 3  # members
    assert metrics["dynamics/nll"].item() == pytest.approx(np.mean(nll), rel=1e-5)
    assert loss.item() == pytest.approx(sum(nll) + sum(ends) + bounds, rel=1e-5)


def test_where_a_file_does_not_say_what_followed_reward_and_end_are_learned(script):
    """D4RL files without next observations repeat the last one where an episode was terminated: z is NaN there."""
    learner, _ = make_learner(script)
    dynamics = learner.training_dynamics
    randomise(dynamics)
    x, z, terminations = data(8)
    z[:, 0, :-1], z[:, 1, :-1] = math.nan, 0
    terminations[:, 0], terminations[:, 1] = 1, 0  # the second stood still, which can be
    scale, nll = dynamics.z_scale.numpy(), []
    for member in range(3):
        mean, log_variance, _ = numpy_prediction(dynamics, member, x[member].numpy())
        error = (z[member].numpy() - scale[0]) / scale[1] - mean
        each = error**2 / np.exp(log_variance) + log_variance
        each[0, :-1] = 0  # s' of the first
        nll.append(np.mean(each))
    loss, found = script.dynamics_loss(dynamics, x, z, terminations)
    assert found["dynamics/nll"].item() == pytest.approx(np.mean(nll), rel=1e-5)
    assert all(slope.isfinite().all() for slope in torch.autograd.grad(loss, [*dynamics.parameters()]))
    z[:, 0, -1] += 1
    assert script.dynamics_loss(dynamics, x, z, terminations)[1]["dynamics/nll"] != found["dynamics/nll"]
    terminations[:, 0] = 0
    assert script.dynamics_loss(dynamics, x, z, terminations)[1]["dynamics/ends"] != found["dynamics/ends"]


def test_where_a_file_does_not_say_what_followed_no_model_is_chosen_by_it(script):
    """Errors on held-out data, which choose the elites, are of what is known: the same whatever s' such ends repeat."""
    learner, args = make_learner(script, dynamics_batch_size=8, max_dynamics_epochs=1)
    batch = random_batch(40)
    ends = torch.arange(40) % 4 == 0
    batch = batch._replace(terminations=ends.float())
    batch.next_observations[ends] = batch.observations[ends]
    seen = []

    def spy(learner, x, z, terminations):
        seen.append((z, terminations))
        return {"dynamics/nll": torch.zeros(())}

    (metrics,) = script.fit_dynamics(learner, batch, args, spy)
    for z, terminations in seen:
        assert torch.equal(z.isnan().any(dim=-1), terminations == 1) and not z[..., -1].isnan().any()
        assert torch.equal(z.isnan().sum(dim=-1), 3 * (terminations == 1))
    held_out = torch.randperm(40, generator=torch.Generator().manual_seed(torch.initial_seed()))[:8]
    assert ends[held_out].any() and not ends[held_out].all()
    scale, training = learner.dynamics.z_scale.numpy(), learner.training_dynamics
    x = torch.cat([batch.observations, batch.actions], dim=1)[held_out].numpy()
    z = torch.cat([batch.next_observations - batch.observations, batch.rewards.unsqueeze(1)], dim=1)[held_out].numpy()
    known = np.ones((8, 4), dtype=bool)
    known[ends[held_out].numpy(), :-1] = False
    for member in range(3):
        error = (z - scale[0]) / scale[1] - numpy_prediction(training, member, x)[0]
        assert metrics[f"dynamics/holdout_mse_{member}"].item() == pytest.approx(np.mean(error[known] ** 2), rel=1e-4)


def test_scales_are_those_of_the_data(script):
    """Divided by a deviation near 0, what the policy does with an action that never varied would give any reward."""
    learner, args = make_learner(script, max_dynamics_epochs=1)
    batch = script.Batch(*(torch.randn(12, *shape) for shape in ((3,), (2,), (), (3,), ())))
    batch.actions[:, 1] = 0.25
    list(script.fit_dynamics(learner, batch, args))
    x = torch.cat([batch.observations, batch.actions], dim=1)
    z = torch.cat([batch.next_observations - batch.observations, batch.rewards.unsqueeze(1)], dim=1)
    for dynamics in (learner.dynamics, learner.training_dynamics):
        std = torch.cat([x[:, :-1].std(dim=0), torch.ones(1)])
        torch.testing.assert_close(dynamics.x_scale, torch.stack([x.mean(dim=0), std]))
        torch.testing.assert_close(dynamics.z_scale, torch.stack([z.mean(dim=0), z.std(dim=0) + 1e-6]))


@pytest.mark.parametrize(
    ("hidden_dims", "decays"),
    [
        ((8,) * 4, [2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4]),
        ((8,), [2.5e-5, 1e-4]),
        ((8,) * 5, [2.5e-5, 5e-5, *[7.5e-5] * 3, 1e-4]),
    ],
)
def test_weights_decay_layer_by_layer_and_nothing_else_does(script, hidden_dims, decays):
    learner, _ = make_learner(script, dynamics_hidden_dims=hidden_dims)
    found = {id(p): group["weight_decay"] for group in learner.dynamics_optimizer.param_groups for p in group["params"]}
    assert [found.pop(id(layer.weight)) for layer in learner.training_dynamics.layers] == decays
    assert set(found.values()) == {0} and len(found) == len(decays) + 2  # biases and bounds


def test_prediction_is_in_the_units_of_the_buffer(script):
    learner, _ = make_learner(script)
    randomise(learner.dynamics)
    batch = random_batch()
    mean, std, _ = learner.dynamics.predict(batch.observations, batch.actions)
    x, scale = torch.cat([batch.observations, batch.actions], dim=1).numpy(), learner.dynamics.z_scale.numpy()
    for member in range(3):
        expected_mean, log_variance, _ = numpy_prediction(learner.dynamics, member, x)
        np.testing.assert_allclose(mean[member].detach(), scale[0] + scale[1] * expected_mean, atol=1e-5)
        np.testing.assert_allclose(std[member].detach(), scale[1] * np.exp(log_variance / 2), atol=1e-5)


def test_a_prediction_stays_within_a_hundred_standard_deviations_of_the_datas_mean(script):
    learner, _ = make_learner(script)
    randomise(learner.dynamics)
    batch, scale = random_batch(), learner.dynamics.z_scale
    before = learner.dynamics.predict(batch.observations, batch.actions)
    with torch.no_grad():
        learner.dynamics.layers[-1].bias[..., 0] = 1e6
        learner.dynamics.layers[-1].bias[..., 3] = -1e6  # the reward
    mean, *others = learner.dynamics.predict(batch.observations, batch.actions)
    assert (mean[..., 0] == scale[0, 0] + 100 * scale[1, 0]).all()
    assert (mean[..., 3] == scale[0, 3] - 100 * scale[1, 3]).all()
    for found, expected in zip((mean[..., 1:3], *others), (before[0][..., 1:3], *before[1:]), strict=True):
        torch.testing.assert_close(found, expected)


@of_each_text
def test_ensemble_fits_a_noisy_linear_system_and_disagrees_off_the_data(script):
    """s' - s = 0.5 s - a + noise of a known size: the mean and the size of the noise are found, within the data."""
    learner, args = make_learner(script, 1, 1, dynamics_hidden_dims=(32, 32), dynamics_learning_rate=3e-3)
    noise = torch.tensor([0.1, 0.3])
    torch.manual_seed(0)

    def truth(x):
        return torch.stack([0.5 * x[..., 0] - x[..., 1], x[..., 0] + x[..., 1]], dim=-1)

    for _ in range(1000):
        x = torch.rand(args.num_models, 128, 2) * 2 - 1
        z = truth(x) + noise * torch.randn(args.num_models, 128, 2)
        script.dynamics_update(learner, x, z, torch.zeros(args.num_models, 128))
    inside = torch.rand(500, 2) * 1.8 - 0.9
    with torch.no_grad():
        mean, std, logit = learner.training_dynamics.predict(inside[:, :1], inside[:, 1:])
        far, _, _ = learner.training_dynamics.predict(10 * inside[:, :1], 10 * inside[:, 1:])
    assert ((mean - truth(inside)).abs().mean(dim=(0, 1)) < 0.4 * noise).all()
    np.testing.assert_allclose(std.mean(dim=(0, 1)), noise, rtol=0.2)
    assert far.std(dim=0).mean() > 5 * mean.std(dim=0).mean()
    assert (logit < -3).all()  # nothing ended


@of_each_text
def test_termination_head_learns_when_episodes_end(script):
    learner, args = make_learner(script, 1, 1, dynamics_hidden_dims=(16,), dynamics_learning_rate=1e-2)
    torch.manual_seed(0)
    for _ in range(300):
        x = torch.rand(args.num_models, 128, 2) * 2 - 1
        script.dynamics_update(learner, x, torch.zeros(args.num_models, 128, 2), (x[..., 0] > 0.3).float())
    states = torch.tensor([[-0.8], [-0.2], [0.7], [0.9]])
    with torch.no_grad():
        _, _, logit = learner.training_dynamics.predict(states, torch.zeros(4, 1))
    assert (torch.sigmoid(logit[:, :2]) < 0.1).all() and (torch.sigmoid(logit[:, 2:]) > 0.9).all()


def test_members_train_apart(script):
    """The gradient of one member's part of the loss is its own, whatever the others see."""
    learner, _ = make_learner(script)
    x, z, terminations = data(8)
    gradients = []
    for changed in (z, torch.cat([z[:1], z[1:] + 1])):
        loss, _ = script.dynamics_loss(learner.training_dynamics, x, changed, terminations)
        gradients.append(torch.autograd.grad(loss, list(learner.training_dynamics.parameters())))
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first[0], second[0])
    assert not torch.allclose(gradients[0][0][1], gradients[1][0][1])


def test_the_better_members_are_kept(script):
    learner, _ = make_learner(script)
    best, training = learner.dynamics, learner.training_dynamics
    x, z, _ = data(20, members=1)
    x, z = x[0], z[0]
    with torch.no_grad():
        for parameter in training.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    expected = [np.mean((numpy_prediction(training, k, x.numpy())[0] - z.numpy()) ** 2) for k in range(3)]
    best.holdout_error.copy_(torch.tensor([1e30, expected[1] * 1.005, expected[2] * 1.02]))  # new; 0.5 %, 2 % better
    before = [parameter.clone() for parameter in best.parameters()]
    best.epoch.fill_(3)
    best.best_epoch.copy_(torch.tensor([0, 3, 3]))
    error = script.keep_better(best, training, x, z, patience=4)
    assert list(error) == [f"dynamics/holdout_mse_{member}" for member in range(3)]
    np.testing.assert_allclose(list(error.values()), expected, rtol=1e-4)
    for old, kept, new in zip(before, best.parameters(), training.parameters(), strict=True):
        assert torch.equal(kept[0], new[0]) and torch.equal(kept[1], old[1]) and torch.equal(kept[2], new[2])
    np.testing.assert_allclose(best.holdout_error, [expected[0], expected[1] * 1.005, expected[2]], rtol=1e-4)
    assert best.epoch == 4 and best.best_epoch.tolist() == [4, 3, 4]
    script.keep_better(best, training, x, z, patience=4)
    assert best.epoch == 5 and best.best_epoch.tolist() == [4, 3, 4]


def test_a_member_that_found_nothing_better_for_long_is_done(script):
    learner, _ = make_learner(script)
    best, training = learner.dynamics, learner.training_dynamics
    best.epoch.fill_(9)
    best.best_epoch.copy_(torch.tensor([4, 5, 9]))
    best.holdout_error.fill_(1e30)
    script.keep_better(best, training, torch.zeros(2, 5), torch.zeros(2, 4), patience=5)
    assert best.best_epoch.tolist() == [4, 10, 10]  # the first had five epochs, 5 to 9


def test_elites_are_the_best_on_held_out_data(script):
    learner, args = make_learner(script)
    learner.dynamics.holdout_error.copy_(torch.tensor([0.5, 0.9, 0.1]))
    elites = learner.dynamics.elites(args.num_elites)
    batch = random_batch()
    for ours, everyone in zip(
        elites.predict(batch.observations, batch.actions),
        learner.dynamics.predict(batch.observations, batch.actions),
        strict=True,
    ):
        torch.testing.assert_close(ours, everyone[[2, 0]].detach())


def test_errors_of_a_forecast_beside_naive_ones(script):
    """Of the elites' mean, on rows that say what came: in standard deviations of all the data, rewards as they are."""
    learner, _ = make_learner(script)
    randomise(learner.dynamics)
    learner.dynamics.holdout_error.copy_(torch.tensor([0.5, 0.9, 0.1]))
    batch = random_batch(40)
    s, a, r, next_s, ended = (column.numpy() for column in batch)
    next_s[3], ended[3] = s[3], 1.0  # an end of which nothing is known
    next_s[4], ended[4] = s[4], 0.0  # one that stood still
    known = [0, 4, 20, 39]
    change, reward = np.zeros((40, 3)), np.zeros(40)
    scale = learner.dynamics.z_scale.numpy()
    for member in (0, 2):
        z = scale[0] + scale[1] * numpy_prediction(learner.dynamics, member, np.concatenate([s, a], axis=1))[0]
        change, reward = change + z[:, :-1] / 2, reward + z[:, -1] / 2
    size = s.std(axis=0, ddof=1) + 1e-3
    expected = {
        "dynamics/error": ((s + change - next_s) / size)[known],
        "dynamics/error_nothing_changes": ((s - next_s) / size)[known],
        "dynamics/reward_error": (reward - r)[known],
        "dynamics/reward_error_mean": (r.mean() - r)[known],
    }
    errors = script.forecast_errors(learner.dynamics.elites(2), batch, torch.tensor([0, 3, 4, 20, 39]))
    assert list(errors) == list(expected)
    for name, wrong in expected.items():
        assert errors[name].item() == pytest.approx(np.sqrt(np.mean(wrong**2)), rel=1e-4)


def test_rows_of_which_nothing_is_known_have_no_error(script):
    """As where all that was held out are ends without a next state: a number, for a log that takes no other."""
    learner, _ = make_learner(script)
    batch = random_batch()
    batch = batch._replace(next_observations=batch.observations, terminations=torch.ones(8))
    errors = script.forecast_errors(learner.dynamics.elites(2), batch, torch.arange(8))
    assert [float(error) for error in errors.values()] == [0.0] * 4


def test_each_epoch_tells_the_errors_of_the_kept_members_on_what_is_held_out(script):
    learner, args = make_learner(script, dynamics_batch_size=8, max_dynamics_epochs=3, dynamics_learning_rate=0.03)
    batch = random_batch(50)._replace(terminations=torch.zeros(50))
    held_out = torch.randperm(50, generator=torch.Generator().manual_seed(torch.initial_seed()))[:10]
    for metrics in script.fit_dynamics(learner, batch, args):
        expected = script.forecast_errors(learner.dynamics.elites(2), batch, held_out)
        assert {name: metrics[name] for name in expected} == expected


# --- Rollouts ---

rolling = pytest.mark.parametrize("algorithm", ROLLING)


class Stairs:
    """A model without noise: every step adds the action to the state, and the reward is the state before it."""

    @staticmethod
    def predict(observations, actions):
        mean = torch.cat([actions, observations], dim=-1).expand(2, -1, -1)
        return mean, torch.zeros_like(mean), torch.where(observations[:, 0] > 0.5, 50.0, -50.0).expand(2, -1)


@pytest.fixture
def climb(script, monkeypatch):
    """A function that gives the transitions of rollouts, from states of 0, of a policy that climbs by about 1: by
    tanh(mean + std noise), whose mean and log std may be given.
    """
    learner, args = make_learner(script, 1, 1, rollout_length=4)
    with torch.no_grad():
        for head in (learner.actor.mean, learner.actor.log_std):
            head.weight.zero_()
    starts = random_batch(25, 1, 1)._replace(observations=torch.zeros(25, 1))
    monkeypatch.setitem(script.TERMINATION_RULES, "Stairs", lambda s: s[:, 0] > 10 + 2 * 2.5)  # above the third step

    def roll_out(ending, mean=5.0, log_std=-5.0):
        with torch.no_grad():
            learner.actor.mean.bias.fill_(mean)
            learner.actor.log_std.bias.fill_(log_std)
        halt = [torch.tensor([1.0, 0.0])] if script.__name__ == "morel" else []  # whose members here always agree
        found = script.rollout(learner.actor, Stairs, starts, torch.tensor([[10.0], [2.0]]), ending, *halt, args)
        return (
            found if script.__name__ in ("combo", "mobile") else found[0]
        )  # the others' has the uncertainties beside them

    return roll_out


@rolling
def test_rollouts_draw_the_policys_actions(climb):
    """Of a policy that is standard normal before tanh; its mean action would always be 0."""
    _, actions, *_ = climb("Pendulum", mean=0.0, log_std=0.0)
    assert actions.atanh().std().item() == pytest.approx(1, rel=0.3)


@rolling
@pytest.mark.parametrize(("ending", "steps"), [("Stairs", 3), ("Pendulum", 4), ("learned", 2)])
def test_rollouts_stop_at_terminations(climb, ending, steps):
    """The rule sees states as the environment has them; the head says stop from states above 0.5."""
    observations, actions, _, next_observations, terminations = climb(ending)
    assert len(observations) == 25 * steps
    height = observations[:, 0].round()
    for step in range(steps):
        assert (height == step).sum() == 25
        assert (terminations[height == step] == (ending != "Pendulum" and step == steps - 1)).all()
    torch.testing.assert_close(next_observations, observations + actions)


@rolling
def test_the_newest_transitions_are_kept(script, climb):
    buffer, transitions = script.ModelBuffer(), climb("Pendulum")
    for call in range(7):
        buffer.add(transitions._replace(rewards=torch.full((100,), float(call))), capacity=250)
    assert sorted(buffer["rewards"].tolist()) == [4.0] * 50 + [5.0] * 100 + [6.0] * 100
    torch.manual_seed(0)
    drawn = buffer.sample(10_000)
    shares = [(drawn.rewards == call).float().mean().item() for call in range(7)]
    assert shares == pytest.approx([0, 0, 0, 0, 0.2, 0.4, 0.4], abs=0.02)
    torch.testing.assert_close(drawn.next_observations, drawn.observations + drawn.actions)
    restored = script.ModelBuffer()
    restored.load_state_dict(buffer.state_dict())
    assert_same(dict(restored), dict(buffer))


@rolling
def test_each_row_draws_its_member_its_noise_and_its_end(script):
    _, args = make_learner(script, 1, 1)

    class TwoMembers:
        @staticmethod
        def predict(observations, actions):
            mean = torch.tensor([[[-1.0, 0.0]], [[1.0, 0.0]]]).expand(2, len(observations), 2)
            return mean, torch.full_like(mean, 0.1), torch.tensor([[0.0], [50.0]]).expand(2, len(observations))

    arguments = {"mopo": [args], "morel": [torch.tensor([9.0, 0.0]), 0.9]}.get(script.__name__, [])
    states, raw = torch.zeros(2000, 1), torch.tensor([[0.0], [1.0]])
    result = script.model_step(TwoMembers, states, states, raw, "learned", *arguments)
    result = result if script.__name__ in ("combo", "mobile") else result[0]
    moved, ended = result.next_observations[:, 0], result.terminations
    assert 0.4 < (moved > 0).float().mean() < 0.6
    assert (moved.abs() - 1).std().item() == pytest.approx(0.1, rel=0.1)
    assert result.rewards.std().item() == pytest.approx(0.1, rel=0.1)
    assert ended[moved > 0].all() and 0.4 < ended[moved < 0].mean() < 0.6  # as that member's head has it, at random


@rolling
def test_rollouts_are_of_the_best_members_at_their_best(algorithm, script, tmp_path, monkeypatch, pendulum):
    """Not of the last weights, nor of all members; with --dynamics, too, where the weights in training are others.

    They start at states all over the data, before updates 1 and 3.
    """
    learners, build, rollout, rolled = [], script.build, script.rollout, []
    initial = pendulum.transitions.observations[pendulum.episode_starts]

    def roll(actor, elites, starts, *rest):
        best, last = learners[-1].dynamics, learners[-1].training_dynamics
        order = best.holdout_error.argsort()[:2]
        for expected, found in zip(best.parameters(), elites.parameters(), strict=True):
            assert torch.equal(expected[order], found)
        rolled.append(any(map(torch.equal, best.parameters(), last.parameters())))
        assert len(starts.observations) == 50
        assert torch.isin(starts.observations[:, 0], initial[:, 0]).float().mean() < 0.5
        return rollout(actor, elites, starts, *rest)

    monkeypatch.setattr(script, "build", lambda *words: learners.append(build(*words)) or learners[-1])
    monkeypatch.setattr(script, "rollout", roll)
    words = [*SMALL[algorithm], *SOON_BEST, "--num-updates", "3", "--rollout-every", "2", "--run-dir"]
    for name, more in (("first", []), ("second", ["--seed", "1", "--dynamics", str(tmp_path / "first")])):
        run = run_script(algorithm, *words, str(tmp_path / name), *more)
        assert run.returncode == 0, run.stderr
        with (tmp_path / name / "metrics.csv").open() as file:
            assert [row["step"] for row in csv.DictReader(file) if row["model/rewards"]] == ["1", "3"]
    assert rolled == [False] * 4


@pytest.mark.parametrize(
    ("name", "alive", "dead"),
    [
        ("Hopper", [0.8, 0.1, 5.0], [[0.6, 0.1, 5.0], [0.8, 0.3, 5.0], [0.8, 0.1, 101.0]]),
        ("Walker2d", [1.2, 0.5, 5.0], [[0.7, 0.5, 5.0], [2.1, 0.5, 5.0], [1.2, -1.1, 5.0]]),
        ("Ant", [0.5, 3.0, 5.0], [[0.1, 0.0, 0.0], [1.1, 0.0, 0.0], [0.5, float("inf"), 0.0]]),
        ("HalfCheetah", [-9.0, 9.0, 99.0], []),
        ("Pendulum", [1.0, 0.0, 8.0], []),
    ],
)
def test_termination_rules(script, name, alive, dead):
    ends = script.TERMINATION_RULES[name](torch.tensor([alive, *dead]))
    assert ends.tolist() == [False] + [True] * len(dead)


def buffer_of(script, next_states, ended, states=0.0, env_id="Pendulum-v1"):
    """What `ending_of` reads of a buffer: transitions between states of one number, which are normalised."""
    mean, std = 10.0, 2.0
    next_observations = ((torch.as_tensor(next_states) - mean) / std).unsqueeze(1)
    observations = ((torch.as_tensor(states) - mean) / std).expand(len(next_observations)).unsqueeze(1)
    rest = torch.zeros(len(next_observations), 1)
    transitions = script.Batch(observations, rest, rest[:, 0], next_observations, torch.as_tensor(ended))
    normalization = torch.tensor([[mean], [std]])
    dataset = SimpleNamespace(env_id=env_id)
    return SimpleNamespace(dataset=dataset, transitions=transitions, normalization=normalization, storage=rest)


WALK = [(1.0, 0.0)] * 90 + [(3.0, 1.0)] * 10  # next states and whether they ended the episode, as the rule below has it


@pytest.mark.parametrize(
    ("added", "termination", "ending", "said"),
    [
        ([], "auto", "Pendulum", None),
        ([], "rule", "Pendulum", None),
        # a few of few are no rounding: each of three episodes may have ended by another rule
        ([(1.0, 1.0)], "auto", "learned", "misses 1 ends in 101 transitions of the data, and would end 0 that went"),
        (
            [(3.0, 0.0)] * 6,
            "auto",
            "learned",
            "misses 0 ends in 106 transitions of the data, and would end 6 that went",
        ),
        (
            [(1.0, 1.0)] * 6,
            "auto",
            "learned",
            "misses 6 ends in 106 transitions of the data, and would end 0 that went",
        ),
        (
            [(3.0, 0.0)] * 3 + [(1.0, 1.0)] * 4,
            "auto",
            "learned",
            "misses 4 ends in 107 transitions .* would end 3 that",
        ),
        ([(3.0, 0.0)] * 6, "rule", "Pendulum", "would end 6 that went on; it is used all the same$"),
        ([(0.0, 1.0)] * 30, "auto", "Pendulum", None),  # s' is s: the file does not say where they ended
        (
            [(0.0, 1.0)] * 30 + [(3.0, 0.0)] * 6,
            "auto",
            "learned",
            "misses 0 ends in 136 transitions .* would end 6 that",
        ),
        ([(3.0, 0.0)] * 6, "learned", "learned", None),
        ([(3.0, 0.0)] * 6, "never", "never", None),
    ],
)
def test_a_rule_must_hold_in_the_data(script, added, termination, ending, said, monkeypatch, capsys):
    monkeypatch.setitem(script.TERMINATION_RULES, "Pendulum", lambda s: s[:, 0] > 2)
    buffer = buffer_of(script, *zip(*(WALK + added), strict=True))
    assert script.ending_of(script.Args(termination=termination), buffer) == ending
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (said is not None)
    if said is not None:
        assert re.match(f"warning: the rule for the ends of Pendulum .*{said}", lines[0])


@pytest.mark.parametrize(("contradictions", "ending"), [(5, "Pendulum"), (6, "learned")])
def test_a_rule_must_hold_in_all_rows(script, contradictions, ending):
    """That nothing ever ends, too, and whichever of the pieces of the data says otherwise. Five may be rounding."""
    ended = torch.zeros(250_000)
    ended[torch.tensor([0, 99_999, 100_000, 150_000, 200_000, 249_999])[:contradictions]] = 1
    assert script.ending_of(script.Args(), buffer_of(script, torch.ones(250_000), ended)) == ending


@rolling
@pytest.mark.parametrize(("target_entropy", "sign"), [(100.0, 1), (-100.0, -1), (None, 1)])
def test_the_temperature_holds_the_entropy_to_its_target(script, target_entropy, sign):
    """By default to -action_dim: a policy of almost no noise has less, 2 (0.5 log(2 pi e) - 5) in two dimensions."""
    learner, args = make_learner(script, target_entropy=target_entropy, batch_size=8)
    with torch.no_grad():
        learner.actor.log_std.weight.zero_()
        learner.actor.log_std.bias.fill_(-5)
    script.update(learner, random_batch(), 1, args)
    assert np.sign(learner.actor.log_temperature.item()) == sign


# --- Runs ---

FEW = ["--dynamics-hidden-dims", "8", "8", "--num-models", "3", "--num-elites", "2", "--dynamics-batch-size", "512"]
FEW += ["--hidden-dims", "16", "--eval-episodes", "1", "--final-eval-episodes", "1"]
ROLLOUTS = ["--rollout-batch-size", "50", "--rollout-every", "10"]
SMALL = {algorithm: [*FEW, *(ROLLOUTS if algorithm != "mve" else [])] for algorithm in SCRIPTS}
SMALL["naf"] += ["--imagined-ratio", "0.5"]


def test_training_ends_when_no_member_becomes_better(script, algorithm, monkeypatch, tmp_path, pendulum):
    """With a learning rate of nothing the first epoch is the best; what is held out is never trained on."""
    seen, update = [], script.dynamics_update

    def spy(learner, x, z, terminations):
        seen.append(x)
        return update(learner, x, z, terminations)

    monkeypatch.setattr(script, "dynamics_update", spy)
    folder = tmp_path / "run"
    arguments = ["--dynamics-learning-rate", "1e-30", "--dynamics-patience", "2", "--num-updates", "5"]
    run = run_script(algorithm, *SMALL[algorithm], *arguments, "--run-dir", str(folder))
    assert run.returncode == 0, run.stderr
    assert checkpoint(folder)["learner"]["dynamics"]["epoch"] == 3
    columns = pendulum.transitions
    x = torch.cat([columns.observations, columns.actions], dim=1)
    held_out = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:1000]]
    assert len(seen) == 3 * math.ceil((len(x) - 1000) / 512)
    drawn = {tuple(row) for batch in seen[:20] for row in batch.flatten(0, 1).tolist()}
    everything = {tuple(row) for row in x.tolist()}
    assert drawn <= everything and not drawn & {tuple(row) for row in held_out.tolist()}
    assert not torch.equal(seen[0][0], seen[0][1])

    seen.clear()
    run = run_script(
        algorithm, *SMALL[algorithm], *arguments, "--resume", "--num-updates", "8", "--run-dir", str(folder)
    )
    assert run.returncode == 0 and not seen, run.stderr


def test_a_model_that_diverges_ends_the_run(script, algorithm, monkeypatch, tmp_path, pendulum):
    update = script.dynamics_update

    def broken(*arguments):
        return {name: value * torch.nan for name, value in update(*arguments).items()}

    monkeypatch.setattr(script, "dynamics_update", broken)
    run = run_script(algorithm, *SMALL[algorithm], "--run-dir", str(tmp_path / "run"))
    assert run.returncode == 3
    assert "dynamics/nll is nan at update 0; the last checkpoint" in run.stderr.splitlines()[-1]


def test_ctrl_c_in_the_middle_of_the_dynamics(algorithm, tmp_path, pendulum):
    arguments = [
        *SMALL[algorithm],
        "--dynamics-patience",
        "1000",
        "--num-updates",
        "3",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    process = Started(algorithm, *arguments)
    while not (tmp_path / "run" / "metrics.csv").is_file():
        assert process.poll() is None, process.wait()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    code, errors = process.wait()
    assert code == 130 and "interrupted at update 0" in errors.splitlines()[-1]
    stopped = checkpoint(tmp_path / "run")
    assert stopped["step"] == 0 and stopped["learner"]["dynamics"]["epoch"] >= 1


# the others fit their models with MOPO's very text, as a test says
@pytest.mark.parametrize(
    "algorithm",
    [pytest.param(name, marks=() if name in ("mopo", "mve", "naf") else pytest.mark.slow) for name in SCRIPTS],
    indirect=True,
)
def test_a_run_killed_in_the_middle_of_the_dynamics_goes_on_to_the_same_bits(algorithm, tmp_path, pendulum):
    arguments = [*SMALL[algorithm], "--max-dynamics-epochs", "8", "--dynamics-patience", "8", "--num-updates", "25"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_script(algorithm, *arguments, "--run-dir", str(whole)).returncode == 0
    process = Started(algorithm, *arguments, "--run-dir", str(killed))
    deadline = time.monotonic() + 120
    while not (killed / "metrics.csv").is_file() or len((killed / "metrics.csv").read_text().splitlines()) < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.wait()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped = checkpoint(killed)
    assert stopped["step"] == 0 and 1 <= stopped["learner"]["dynamics"]["epoch"] < 8
    assert run_script(algorithm, *arguments, "--resume", "--run-dir", str(killed)).returncode == 0
    assert_same_runs(whole, killed)


def test_dynamics_of_another_run_are_reused(algorithm, tmp_path, pendulum, make_dataset):
    first, second = tmp_path / "first", tmp_path / "second"
    arguments = [*SMALL[algorithm], "--num-updates", "5"]
    assert run_script(algorithm, *arguments, "--max-dynamics-epochs", "2", "--run-dir", str(first)).returncode == 0
    run = run_script(algorithm, *arguments, "--seed", "1", "--dynamics", str(first), "--run-dir", str(second))
    assert run.returncode == 0, run.stderr
    expected, found = checkpoint(first)["learner"], checkpoint(second)["learner"]
    assert_same(expected["dynamics"], found["dynamics"])
    assert "dynamics/epoch" not in (second / "metrics.csv").read_text()
    assert json.loads((second / "args.json").read_text())["dynamics"] == str(first)

    elsewhere = first.rename(tmp_path / "elsewhere")
    again = ["--seed", "1", "--dynamics", str(first), "--run-dir", str(second), "--num-updates", "8", "--resume"]
    resumed = run_script(algorithm, *SMALL[algorithm], *again)
    assert resumed.returncode == 0, resumed.stderr

    stopped = shutil.copytree(elsewhere, tmp_path / "stopped")
    torch.save(checkpoint(stopped) | {"step": 0}, stopped / "checkpoint.pt")
    played = shutil.copytree(elsewhere, tmp_path / "played")
    saved = checkpoint(played)
    torch.save(
        saved | {"learner": saved["learner"] | {"player": {"added": torch.ones(1, 9)}}}, played / "checkpoint.pt"
    )
    cloned = tmp_path / "cloned"
    assert (
        run_script(
            *("bc", "--num-updates", "1", "--eval-episodes", "1", "--final-eval-episodes", "1"),
            *("--run-dir", str(cloned)),
        ).returncode
        == 0
    )
    other = make_dataset(episodes=[random_episode(0)], env="Pendulum-v1")
    for folder, wrong, reason in (
        (elsewhere, ["--dataset-id", other], f"was trained on other data than {other}"),
        (elsewhere, ["--no-normalize-observations"], "has another normalize_observations: True"),
        (elsewhere, ["--reward-scale", "0.5"], r"has another reward_scale: 1\.0"),
        (elsewhere, ["--reward-shift", "-1"], r"has another reward_shift: 0\.0"),
        (elsewhere, ["--num-models", "4"], r"Error.* size mismatch for "),
        (cloned, [], "has no finished model; finish it$"),
        (stopped, [], "has no finished model; finish it$"),
        (played, [], "has a model of steps that it played, too"),
        (tmp_path / "none", [], "cannot read "),
    ):
        words = ["--dynamics", str(folder), *wrong, "--run-dir", str(tmp_path / "wrong")]
        assert_one_line(run_script(algorithm, *arguments, *words), f"error: --dynamics {folder}: {reason}")
        assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("algorithm", ["mopo", "combo", "mobile"])
def test_the_actors_learning_rate_decays(algorithm, tmp_path, pendulum):
    arguments = [
        *SMALL[algorithm],
        "--max-dynamics-epochs",
        "1",
        "--actor-learning-rate",
        "1",
        "--critic-learning-rate",
        "0.5",
    ]
    run = run_script(algorithm, *arguments, "--cosine-decay", "--num-updates", "4", "--run-dir", str(tmp_path / "run"))
    assert run.returncode == 0, run.stderr
    numbers = [value for value in checkpoint(tmp_path / "run")["learner"]["optimizer"].values() if not value.dim()]
    rates = [float(numbers[0]), float(numbers[-2])]  # the actor's group has the temperature's two moments, too
    assert rates == pytest.approx([0.5 * (1 + math.cos(math.pi * 3 / 4)), 0.5])


@pytest.mark.parametrize(  # all scripts have the same `ending_of`, which has a test of its own
    ("algorithm", "env_id", "termination", "said"),
    [(name, "Pendulum-v1", *pair) for name in SCRIPTS for pair in (("auto", "Pendulum"), ("never", "never"))]
    + [
        ("mopo", "Pendulum-v1", "rule", "Pendulum"),
        ("mopo", "Pendulum-v1", "learned", "learned"),
        ("mopo", None, "auto", "learned"),
    ],
    indirect=["algorithm"],
)
def test_a_run_says_what_ends_its_rollouts(algorithm, env_id, termination, said, tmp_path, make_dataset):
    dataset_id = make_dataset(**({} if env_id is None else {"env": env_id}))
    arguments = ["--dataset-id", dataset_id, "--num-updates", "2", "--max-dynamics-epochs", "1"]
    words = [*SMALL[algorithm], *arguments, "--termination", termination, "--run-dir", str(tmp_path / "run")]
    run = run_script(algorithm, *words)
    assert run.returncode == 0, run.stderr
    assert f"terminations in the model: {said}\n" in run.stdout


@pytest.mark.parametrize(("termination", "said"), [("auto", "learned"), ("rule", "Pendulum")])
def test_a_run_on_data_that_contradict_the_rule_says_so(algorithm, termination, said, tmp_path, make_dataset):
    """As where an environment was made with other arguments: these pendulums end."""
    end = {"terminations": np.arange(30) == 29, "truncations": np.zeros(30, dtype=bool)}
    dataset_id = make_dataset(episodes=[random_episode(seed, **end) for seed in range(6)], env="Pendulum-v1")
    arguments = ["--dataset-id", dataset_id, "--num-updates", "2", "--max-dynamics-epochs", "1"]
    words = [*SMALL[algorithm], *arguments, "--termination", termination, "--run-dir", str(tmp_path / "run")]
    run = run_script(algorithm, *words)
    assert run.returncode == 0, run.stderr
    assert f"terminations in the model: {said}\n" in run.stdout
    assert run.stderr.count("warning: the rule for the ends of Pendulum misses 6 ends in 180 transitions") == 1


def test_a_rule_that_is_not_known_is_refused(algorithm, tmp_path, make_dataset):
    words = ["--dataset-id", make_dataset(), "--termination", "rule", "--run-dir", str(tmp_path / "run")]
    assert_one_line(
        run_script(algorithm, *SMALL[algorithm], *words), "--termination rule: none is known; take learned or never"
    )
