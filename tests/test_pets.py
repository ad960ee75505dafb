"""PETS: what a plan earns in the model, how the search moves, and what a planner remembers, against NumPy."""

import csv
import json
import shutil

import gymnasium as gym
import numpy as np
import pets
import pytest
import torch
from conftest import (
    ROOT,
    SHORT,
    SHORTER,
    assert_one_line,
    assert_same,
    checkpoint,
    random_batch,
    random_episode,
    run_script,
    short_environments,
    write_policy,
)
from torch import nn

from common.command_line import BadInput
from common.data import ReplayBuffer, load_dataset
from common.evaluation import FINAL_SEED, evaluate, load_policy
from common.optim import Adam

CPU = torch.device("cpu")


class Linear(nn.Module):
    """Members k = 0, 1 of one number: s' = s + (k + 1) a, r = s + 10 k, without noise; an end is likelier with s."""

    def predict(self, observations, actions):
        slope = torch.tensor([1.0, 2.0]).view(2, 1, 1)
        observations, actions = (x.expand(2, -1, -1) for x in (observations, actions))
        mean = torch.cat([slope * actions, observations + 10 * (slope - 1)], dim=-1)
        return mean, self.std + torch.zeros_like(mean), observations[..., 0] - 1

    std = 0.0


def make_actor(ending="never", dim=1, **arguments):
    small = {"horizon": 3, "population": 4, "num_best": 2, "cem_iterations": 2, "num_particles": 2, "num_models": 2}
    actor = pets.Actor(dim, 1, pets.Args(**(small | {"hidden_dims": (4,)} | arguments)))
    if dim == 1:
        actor.dynamics = Linear()
    actor.rule.fill_(-1 if ending == "learned" else list(pets.TERMINATION_RULES).index(ending))
    return actor


CANDIDATES = torch.tensor([[0.5, -0.25, 1.0], [-1.0, 0.75, 0.25]])[None, :, :, None]  # one state, two plans


# --- Returns ---


def by_hand(state, actions, members, ends=lambda before, after: 0.0, penalty=0.0, gamma=1.0, value=lambda state: 0.0):
    """The return of one trajectory, the member of each step given."""
    total, reach = 0.0, 1.0
    for t, (action, k) in enumerate(zip(actions, members, strict=True)):
        # the members' means differ by the action in s' and by 10 in r, of which half is their standard deviation
        total += gamma**t * reach * (state + 10 * k - penalty * np.hypot(action / 2, 5))
        after = state + (k + 1) * action
        reach *= 1 - ends(state, after)
        state = after
    return total + gamma ** len(actions) * reach * value(state)


@pytest.mark.parametrize("penalty", [0.0, 0.7])
def test_returns_in_which_particles_keep_their_members(penalty):
    actor = make_actor(propagation="TSinf", penalty_coefficient=penalty)
    found = pets.plan_returns(actor, torch.tensor([[0.3]]), CANDIDATES)
    plans = CANDIDATES[0, :, :, 0].numpy()
    expected = [np.mean([by_hand(0.3, plan, [k] * 3, penalty=penalty) for k in (0, 1)]) for plan in plans]
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)


def test_returns_in_which_particles_change_their_members():
    actor = make_actor(propagation="TS1")
    actor.order.copy_(torch.tensor([[1, 0], [0, 1], [1, 0]]))  # of the particles, which swap, stay, swap
    found = pets.plan_returns(actor, torch.tensor([[0.3]]), CANDIDATES)
    paths = (1, 1, 0), (0, 0, 1)
    expected = [np.mean([by_hand(0.3, plan, path) for path in paths]) for plan in CANDIDATES[0, :, :, 0].numpy()]
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)


def test_in_ts1_each_step_draws_members_anew_and_each_member_has_as_many_particles():
    actor = make_actor(propagation="TS1", horizon=400, num_particles=4)
    assert all(sorted(order) == [0, 1, 2, 3] for order in actor.order.tolist())
    particles, first = torch.arange(4), []
    for order in actor.order:
        particles = particles[order]
        first.append(int((particles == 0).nonzero()) // 2)  # the member of the first particle
    assert 0.4 < np.mean(first) < 0.6
    assert 0.4 < np.mean(np.diff(first) != 0) < 0.6  # whatever it was before


def test_no_reward_after_an_end(monkeypatch):
    """A rule sees the next state as the environment has it."""
    monkeypatch.setitem(pets.TERMINATION_RULES, "Above", lambda s: s[:, 0] > 10 + 2 * 0.7)
    actor = make_actor("Above")
    actor.scale.copy_(torch.tensor([[10.0], [2.0]]))
    found = pets.plan_returns(actor, torch.tensor([[0.3]]), CANDIDATES)
    plans = CANDIDATES[0, :, :, 0].numpy()
    ends = lambda _, after: float(after > 0.7)  # noqa: E731
    expected = [np.mean([by_hand(0.3, plan, [k] * 3, ends) for k in (0, 1)]) for plan in plans]
    without = [np.mean([by_hand(0.3, plan, [k] * 3) for k in (0, 1)]) for plan in plans]
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)
    assert not np.allclose(expected, without)


def test_rewards_count_by_the_learned_probability_that_they_are_reached():
    found = pets.plan_returns(make_actor("learned"), torch.tensor([[0.3]]), CANDIDATES)
    ends = lambda before, _: 1 / (1 + np.exp(1 - before))  # noqa: E731
    expected = [np.mean([by_hand(0.3, plan, [k] * 3, ends) for k in (0, 1)]) for plan in CANDIDATES[0, :, :, 0].numpy()]
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)


class Parabola(nn.Module):
    """V(s) = 3 s^2 - 2."""

    gamma = 0.8

    def forward(self, observations):
        return 3 * observations[..., 0] ** 2 - 2


@pytest.mark.parametrize(("ending", "penalty"), [("never", 0.0), ("learned", 0.0), ("learned", 0.7)])
def test_a_value_follows_the_last_step_and_all_is_discounted(ending, penalty):
    ends = {"never": lambda *_: 0.0, "learned": lambda before, _: 1 / (1 + np.exp(1 - before))}[ending]
    actor = make_actor(ending, penalty_coefficient=penalty)
    actor.value = Parabola()
    found = pets.plan_returns(actor, torch.tensor([[0.3]]), CANDIDATES)
    told = {"ends": ends, "penalty": penalty, "gamma": 0.8, "value": lambda state: 3 * state**2 - 2}
    plans = CANDIDATES[0, :, :, 0].numpy()
    expected = [np.mean([by_hand(0.3, plan, [k] * 3, **told) for k in (0, 1)]) for plan in plans]
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)


def test_a_particle_that_changes_its_member_takes_its_value_along():
    actor = make_actor("learned", propagation="TS1")
    actor.order.copy_(torch.tensor([[1, 0], [0, 1], [1, 0]]))
    actor.value = Parabola()
    told = {"ends": lambda before, _: 1 / (1 + np.exp(1 - before)), "gamma": 0.8}
    told["value"] = lambda state: 3 * state**2 - 2
    found = pets.plan_returns(actor, torch.tensor([[0.3]]), CANDIDATES)
    paths = (1, 1, 0), (0, 0, 1)
    plans = CANDIDATES[0, :, :, 0].numpy()
    expected = [np.mean([by_hand(0.3, plan, path, **told) for path in paths]) for plan in plans]
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)


def test_without_a_value_there_is_none():
    """Neither in a policy's file nor in a plan's return, and the model starts at the same weights."""
    actors = []
    for folder in (None, "run"):
        torch.manual_seed(0)
        actors.append(pets.Actor(3, 1, pets.Args(value_run_dir=folder, hidden_dims=(4,))))
    without, zero = actors
    assert without.value is None and not any("value" in name for name in without.state_dict())
    assert_same(without.dynamics.state_dict(), zero.dynamics.state_dict())
    zero.value.scale.zero_()
    states, candidates = torch.randn(4, 3), torch.rand(4, 6, 15, 1)
    with torch.no_grad():
        assert torch.equal(*(pets.plan_returns(actor, states, candidates) for actor in actors))


def test_particles_have_noise_of_the_members_size_and_candidates_share_it(monkeypatch):
    monkeypatch.setattr(Linear, "std", 0.5)
    actor = make_actor(horizon=1, num_particles=1000)
    same = CANDIDATES[:, :1, :1].expand(1, 2, 1, 1)
    found = pets.plan_returns(actor, torch.tensor([[0.3]]), same)[0]
    assert found[0] == found[1] == pytest.approx(5.3 + 0.5 * actor.noise[0, :, 0, 1].mean().item(), rel=1e-4)
    assert actor.noise.std().item() == pytest.approx(1, abs=0.05)


def test_states_have_noise_too_and_each_step_has_its_own(monkeypatch):
    monkeypatch.setattr(Linear, "std", 0.5)
    actor = make_actor(horizon=2, num_particles=10)
    found = pets.plan_returns(actor, torch.tensor([[0.3]]), CANDIDATES[:, :1, :2])
    n, k = 0.5 * actor.noise[:, :, 0].numpy(), np.repeat([0, 1], 5)  # [step, particle, (s, r)]; each particle's member
    first, second = 0.3 + 10 * k + n[0, :, 1], 0.3 + (k + 1) * 0.5 + n[0, :, 0] + 10 * k + n[1, :, 1]
    assert found.item() == pytest.approx((first + second).mean(), rel=1e-5)


def test_each_state_has_its_own_plans():
    states, candidates = torch.tensor([[0.3], [-0.6]]), torch.cat([CANDIDATES, -CANDIDATES])
    actor = make_actor()
    both = pets.plan_returns(actor, states, candidates)
    for row in range(2):
        torch.testing.assert_close(
            both[row : row + 1], pets.plan_returns(actor, states[row : row + 1], candidates[row : row + 1])
        )


def test_disagreement():
    torch.manual_seed(0)
    actor, batch = make_actor(dim=3, num_models=3, num_particles=3), random_batch(action_dim=1)
    means = actor.dynamics.predict(batch.observations, batch.actions)[0].detach().numpy()
    expected = np.sqrt(((means - means.mean(axis=0)) ** 2).mean(axis=0).sum(axis=1))
    with torch.no_grad():
        np.testing.assert_allclose(
            pets.disagreement(actor.dynamics, batch.observations, batch.actions), expected, rtol=1e-5
        )


# --- Search ---


def test_refit_follows_the_best():
    rng = np.random.default_rng(0)
    mean, variance, candidates = rng.normal(size=(2, 3, 1)), rng.uniform(size=(2, 3, 1)), rng.normal(size=(2, 5, 3, 1))
    returns = rng.normal(size=(2, 5))
    args = pets.Args(num_best=2, cem_alpha=0.3)
    found = pets.refit(*(torch.from_numpy(x) for x in (mean, variance, candidates, returns)), args)
    for row in range(2):
        best = candidates[row, np.argsort(returns[row])[-2:]]
        np.testing.assert_allclose(found[0][row], 0.3 * mean[row] + 0.7 * best.mean(axis=0))
        np.testing.assert_allclose(found[1][row], 0.3 * variance[row] + 0.7 * best.var(axis=0))


def test_candidates_are_within_bounds_and_spread_as_far_as_they_may(monkeypatch):
    seen = []

    def spy(actor, observations, candidates):
        seen.append(candidates)
        return candidates.sum(dim=(2, 3))

    monkeypatch.setattr(pets, "plan_returns", spy)
    actor = make_actor(population=5000, num_best=50, horizon=2)
    plan = pets.plan(actor, torch.zeros(1, 1), torch.tensor([[[0.0], [0.9]]]))
    assert actor.cem_noise.abs().max() <= 2 and actor.cem_noise.std().item() == pytest.approx(0.88, abs=0.01)
    first = seen[0][0, :, :, 0]
    assert all(candidates.abs().max() <= 1 for candidates in seen)
    np.testing.assert_allclose(first.mean(dim=0), [0, 0.9], atol=0.02)
    np.testing.assert_allclose(first.std(dim=0), [0.88 * 0.5, 0.88 * 0.05], rtol=0.03)  # sqrt(1 / 4); half way to 1
    assert (plan > torch.tensor([[0.5], [0.9]])).all()  # the sum is best at 1


def test_the_first_variance_is_a_quarter_of_which_the_second_has_its_share(monkeypatch):
    """The best of the first candidates are all near 0, and have none of their own."""
    seen = []

    def spy(actor, observations, candidates):
        seen.append(candidates)
        return -candidates.square().sum(dim=(2, 3))

    monkeypatch.setattr(pets, "plan_returns", spy)
    actor = make_actor(population=5000, num_best=5, horizon=1, cem_alpha=0.16)
    pets.plan(actor, torch.zeros(1, 1), torch.zeros(1, 1, 1))
    assert seen[1].std().item() == pytest.approx(0.88 * (0.16 * 0.25) ** 0.5, rel=0.03)


def test_a_plan_is_near_the_best_that_brute_force_finds():
    """Both members pay the state: climb, to the last step but one, whose action nobody sees."""
    actor = make_actor(population=200, num_best=20, cem_iterations=6)
    plan = pets.plan(actor, torch.zeros(1, 1), torch.zeros(1, 3, 1))[0, :, 0]
    grid = torch.cartesian_prod(*[torch.linspace(-1, 1, 9)] * 3)[None, :, :, None]
    best = pets.plan_returns(actor, torch.zeros(1, 1), grid).max()
    assert pets.plan_returns(actor, torch.zeros(1, 1), plan.view(1, 1, 3, 1)).item() > best.item() - 0.3
    assert (plan[:2] > 0.9).all()


# --- Memory ---


def test_a_plan_goes_on_moved_by_one_step(monkeypatch):
    begun = []

    def spy(actor, observations, mean):
        begun.append(mean)
        return mean + torch.tensor([[0.1], [0.2], [0.3]]) + observations.unsqueeze(1)

    monkeypatch.setattr(pets, "plan", spy)
    actor, states = make_actor(), torch.tensor([[0.0], [0.5]])
    actor.follow([7, 3], [None, None])
    torch.testing.assert_close(actor(states), torch.tensor([[0.1], [0.6]]))
    actor.follow([3, 8], [1.0, None])  # in another row, beside one that begins
    actor(states)
    torch.testing.assert_close(begun[1][:, :, 0], torch.tensor([[0.7, 0.8, 0.0], [0.0, 0.0, 0.0]]))
    actor(states)  # without follow, from scratch, and nothing is remembered of it
    actor.follow([7, 3], [0.0, None])
    actor(states)
    assert not begun[2].any() and not begun[3][1].any()
    torch.testing.assert_close(begun[3][0, :, 0], torch.tensor([0.2, 0.3, 0.0]))


def test_what_is_played_has_a_plan_of_its_own(monkeypatch):
    begun = []

    def spy(actor, observations, mean):
        begun.append(mean)
        return mean + torch.tensor([[0.1], [0.2], [0.3]])

    monkeypatch.setattr(pets, "plan", spy)
    actor, state = make_actor(), torch.zeros(1, 1)
    torch.testing.assert_close(actor.play(state, begins=True), torch.tensor([[0.1]]))
    actor.follow([0], [None])  # an evaluation in between
    actor(state)
    again = make_actor()
    again.load_state_dict(actor.state_dict())  # a resumed run
    torch.testing.assert_close(again.play(state, begins=False), torch.tensor([[0.3]]))
    torch.testing.assert_close(again.play(state, begins=False), torch.tensor([[0.6]]))
    torch.testing.assert_close(again.play(state, begins=True), torch.tensor([[0.1]]))
    found = [list(map(float, mean[0, :, 0])) for mean in begun]
    np.testing.assert_allclose(found, [[0, 0, 0], [0, 0, 0], [0.2, 0.3, 0], [0.5, 0.3, 0], [0, 0, 0]], atol=1e-6)


def test_observations_are_those_that_follow_was_told_of():
    actor = make_actor()
    actor.follow([0, 1], [None, None])
    with pytest.raises(ValueError, match="told of 2 episodes, and 3 observations came"):
        actor(torch.zeros(3, 1))


def test_plans_are_the_same_again_and_whatever_else_is_asked():
    actor = make_actor("learned", dim=3, population=8, horizon=4)
    states = torch.randn(3000, 3, generator=torch.Generator().manual_seed(0))  # more than a piece
    torch.manual_seed(1)
    found = actor(states)
    torch.manual_seed(2)
    assert torch.equal(actor(states), found)
    assert found.shape == (3000, 1) and (found.abs() <= 1).all()
    torch.testing.assert_close(actor(states[2990:2993]), found[2990:2993])
    assert actor(states[:0]).shape == (0, 1)


# --- Learning ---


def test_scales_are_those_of_the_data():
    """x and z with correction 1, as torch's std is, and one number does not vary; those of states are told."""
    actor, batch, told = pets.Actor(3, 2, pets.Args()), random_batch(), torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    batch.actions[:, 1] = 0.5
    actor.take(pets.Batch(*batch), told, "Walker2d")
    s, a, r, following, _ = (column.numpy().astype(np.float64) for column in batch)
    found = torch.cat([actor.dynamics.x_scale, actor.dynamics.z_scale], dim=1)
    numbers = np.hstack([s, a, following - s, r[:, None]])
    np.testing.assert_allclose(found[0], numbers.mean(axis=0), atol=1e-6)
    std = numbers.std(axis=0, ddof=1)
    std[4] = 1
    np.testing.assert_allclose(found[1], std, rtol=1e-5)
    assert torch.equal(actor.scale.float(), told) and list(pets.TERMINATION_RULES)[int(actor.rule)] == "Walker2d"
    actor.take(pets.Batch(*batch), told, "learned")
    assert actor.rule == -1


def test_update_trains_each_member_on_rows_of_its_own(monkeypatch):
    args = pets.Args(hidden_dims=(5,), num_models=3, num_particles=3)
    learner, batch, seen = pets.build(3, 2, args, CPU, Adam), random_batch(), []
    loss = pets.dynamics_loss

    def spy(dynamics, x, z, terminations):
        seen.append((x, z, terminations))
        return loss(dynamics, x, z, terminations)

    monkeypatch.setattr(pets, "dynamics_loss", spy)
    before = [weight.clone() for weight in learner.actor.dynamics.layers.parameters()]
    pets.update(learner, batch, 1, args)
    assert all(not torch.equal(*pair) for pair in zip(before, learner.actor.dynamics.layers.parameters(), strict=True))
    x, z, terminations = seen[0]
    assert x.shape == (3, 8, 5) and not torch.equal(x[0], x[1])
    known = torch.cat([batch.observations, batch.actions], dim=1)
    for member in range(3):
        rows = [int((known == row).all(dim=1).nonzero()) for row in x[member]]
        torch.testing.assert_close(z[member, :, :-1], (batch.next_observations - batch.observations)[rows])
        torch.testing.assert_close(z[member, :, -1], batch.rewards[rows])
        assert torch.equal(terminations[member], batch.terminations[rows])


def test_value_loss():
    torch.manual_seed(0)
    value = pets.Value(3, pets.Args(hidden_dims=(5, 4)))
    value.scale.copy_(torch.tensor([-40.0, 7.0]))
    observations, targets = torch.randn(8, 3), torch.linspace(-60, -20, 8)
    x = observations.numpy().astype(np.float64)
    for index, layer in enumerate(layer for layer in value.layers if isinstance(layer, nn.Linear)):
        x = x / (1 + np.exp(-x)) if index else x  # SiLU
        x = x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
    expected = np.mean((-40 + 7 * x[:, 0] - targets.numpy()) ** 2) / 49
    assert pets.value_loss(value, observations, targets).item() == pytest.approx(expected, rel=1e-5)


def test_a_value_is_fitted_in_its_own_units():
    torch.manual_seed(0)
    args = pets.Args(hidden_dims=(32,), value_updates=500, learning_rate=1e-2)
    value, states = pets.Value(2, args), torch.randn(300, 2)
    targets = 1000 * states[:, 0].sin() - 5000
    left = pets.fit_value(value, states, targets, 0.9, args)
    error = (value(states) - targets).square().mean() / targets.var()
    assert left == pytest.approx(error.item(), rel=0.2) and left < 0.01
    assert value.gamma == 0.9 and not any(weight.requires_grad for weight in value.parameters())


def test_weights_decay_layer_by_layer():
    learner = pets.build(3, 2, pets.Args(hidden_dims=(8,) * 4, learning_rate=0.25), CPU, Adam)
    found = {id(p): group["weight_decay"] for group in learner.optimizer.param_groups for p in group["params"]}
    assert [found.pop(id(layer.weight)) for layer in learner.dynamics.layers] == [2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4]
    assert set(found.values()) == {0}
    assert {float(group["lr"]) for group in learner.optimizer.param_groups} == {0.25}


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"cem_alpha": 1.0}, r"--cem-alpha 1.0: must be in \[0, 1\)"),
        ({"penalty_coefficient": -1.0}, "--penalty-coefficient -1.0: must not be negative"),
        ({"population": 5, "num_best": 5}, "--num-best 5: must be below --population"),
        ({"num_particles": 6}, "--num-particles 6: must be a multiple of --num-models, 5"),
    ],
)
def test_bad_arguments(arguments, rule):
    with pytest.raises(BadInput, match=rule):
        pets.Args(**arguments).validate()


# --- Runs ---

FEW = [*SHORT, *SHORTER["pets"]]


def test_the_policys_file_is_enough_to_plan_as_the_run_did(tmp_path, pendulum):
    words = [*FEW, "--num-updates", "30", "--termination", "rule", "--run-dir", str(tmp_path)]
    assert run_script("pets", *words).returncode == 0
    policy = load_policy(tmp_path)
    assert list(pets.TERMINATION_RULES)[int(policy.actor.rule)] == "Pendulum"
    torch.testing.assert_close(policy.actor.scale, pendulum.normalization)
    returns, _ = evaluate(policy, short_environments(pendulum.dataset, 2), 3, FINAL_SEED)
    assert returns.tolist() == json.loads((tmp_path / "result.json").read_text())["final_returns"]

    (environment,) = short_environments(pendulum.dataset, 1)  # a user's loop, which evaluation is the same as
    observation, total, reward, over = environment.reset(seed=FINAL_SEED)[0], 0.0, None, False
    while not over:
        policy.actor.follow([0], [reward])
        observation, reward, terminated, truncated, _ = environment.step(policy(observation[None])[0])
        total, over = total + reward, terminated or truncated
    assert total == pytest.approx(returns[0], rel=1e-3)


def test_a_model_of_mopo_is_planned_in_and_learns_nothing_more(tmp_path, pendulum):
    model, plans = tmp_path / "mopo", tmp_path / "pets"
    dynamics = ["--dynamics-hidden-dims", "16", "16", "--num-models", "3"]
    words = [*SHORT, *SHORTER["mopo"], *dynamics, "--num-updates", "2", "--run-dir", str(model)]
    assert run_script("mopo", *words).returncode == 0
    words = [*FEW, "--num-models", "3", "--num-particles", "3", "--num-updates", "20", "--dynamics", str(model)]
    run = run_script("pets", *words, "--run-dir", str(plans))
    assert run.returncode == 0, run.stderr
    learner = checkpoint(plans)["learner"]
    assert_same(learner["dynamics"], checkpoint(model)["learner"]["dynamics"])
    assert_same(load_policy(plans).actor.dynamics.state_dict(), learner["dynamics"])
    rows = list(csv.DictReader((plans / "metrics.csv").open()))
    assert [row["step"] for row in rows] == ["20"] and rows[0]["eval/return_mean"]

    again = run_script("pets", *words, "--resume", "--run-dir", str(plans))
    assert again.returncode == 0, again.stderr
    wrong = run_script("pets", *FEW, "--dynamics", str(model), "--run-dir", str(tmp_path / "wrong"))
    assert_one_line(wrong, "--dynamics .*size mismatch for")


def test_an_unfinished_model_is_refused(tmp_path, pendulum, monkeypatch):
    """Of a run of pets.py itself, too, whose updates are the model's training."""
    words = [*FEW, "--num-models", "3", "--num-particles", "3", "--num-updates", "4"]
    first, epochs, update = tmp_path / "first", [], pets.update

    def spy(learner, *rest):
        epochs.append(int(learner.dynamics.epoch))
        return update(learner, *rest)

    monkeypatch.setattr(pets, "update", spy)
    assert run_script("pets", *words, "--run-dir", str(first)).returncode == 0
    assert epochs == [0] * 4  # before each update
    other = [*words, "--seed", "1", "--dynamics", str(first), "--run-dir", str(tmp_path / "other")]
    assert run_script("pets", *other, "--online-steps", "2").returncode == 0
    saved = checkpoint(first)
    assert saved["learner"]["dynamics"]["epoch"] == 1
    saved["learner"]["dynamics"]["epoch"].zero_()  # as before its last update
    torch.save(saved, first / "checkpoint.pt")
    run = run_script("pets", *words, "--dynamics", str(first), "--run-dir", str(tmp_path / "wrong"))
    assert_one_line(run, f"--dynamics {first}: has no finished model; finish it$")


def test_a_report_about_the_model(tmp_path, pendulum):
    words = [*FEW, "--num-updates", "2", "--validation-fraction", "0.2", "--run-dir", str(tmp_path)]
    assert run_script("pets", *words).returncode == 0
    run = run_script("benchmarks.model_report", str(tmp_path), "--num-starts", "50", "--num-samples", "50")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("pets on ")


def test_no_file_of_onnx_plans(tmp_path, pendulum):
    assert run_script("pets", *FEW, "--num-updates", "2", "--run-dir", str(tmp_path)).returncode == 0
    run = run_script("export", str(tmp_path), "--out", str(tmp_path / "policy.onnx"))
    assert_one_line(run, "its Actor remembers what it did .*: act by load_policy")


# --- Online ---


def test_a_model_that_was_taken_over_learns_of_what_is_played_alone(tmp_path, pendulum):
    words = [*FEW, "--num-updates", "2"]
    assert run_script("pets", *words, "--run-dir", str(tmp_path / "model")).returncode == 0
    words += ["--dynamics", str(tmp_path / "model"), "--run-dir", str(tmp_path / "plans")]
    assert run_script("pets", *words, "--checkpoint-every", "2").returncode == 0
    models = [checkpoint(tmp_path / name)["learner"] for name in ("model", "plans")]
    assert_same(*(model["dynamics"] for model in models))
    run = run_script("pets", *words, "--online-steps", "3", "--log-every", "1", "--resume")
    assert run.returncode == 0, run.stderr
    after = checkpoint(tmp_path / "plans")
    assert after["step"] == 5 and len(after["learner"]["player"]["added"]) == 3
    assert not torch.equal(after["learner"]["dynamics"]["layers.0.weight"], models[0]["dynamics"]["layers.0.weight"])
    for name in ("x_scale", "z_scale"):  # stay those of the data
        assert torch.equal(after["learner"]["dynamics"][name], models[0]["dynamics"][name])


# --- Value ---


def numpy_q(state, num_members, x):
    """mean_i Q'_i of FQE: layers, of which all but the last are normalised and then rectified."""
    values = []
    for member in range(num_members):
        weights, biases = (
            [state[f"layers.{i}.{name}"][member].numpy() for i in range(3)] for name in ("weight", "bias")
        )
        h = x
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            h = h @ weight + bias
            h = (h - h.mean(axis=1, keepdims=True)) / np.sqrt(h.var(axis=1, keepdims=True) + 1e-5)
            h = np.maximum(h, 0)
        values.append((h @ weights[-1] + biases[-1])[:, 0])
    return np.mean(values, axis=0)


@pytest.mark.parametrize("normalized", [True, False])
def test_the_value_is_that_of_fqe_in_the_units_of_the_rewards(normalized, make_dataset, tmp_path):
    """All episodes begin at the same state, so that its value is FQE's estimate, whichever of them a member draws."""
    episodes = [random_episode(seed) for seed in range(3)]
    for episode in episodes:
        episode["observations"] = 3 * episode["observations"] + 5
        episode["observations"][0] = [4.0, 5.0, 6.0]
    data, folder = make_dataset(episodes=episodes), tmp_path / "fqe"
    policy = write_policy(tmp_path / "policy", action=-0.3)
    words = ["--dataset-id", data, "--hidden-dims", "6", "5", "--num-members", "2", "--gamma", "0.9"]
    words += ["--policy-run-dir", policy, "--num-updates", "30", "--run-dir", str(folder)]
    run = run_script("fqe", *words, "--normalize-observations" if normalized else "--no-normalize-observations")
    assert run.returncode == 0, run.stderr

    buffer = ReplayBuffer(load_dataset(data), CPU)
    buffer.scale_rewards(7.0, 0.0)
    values, gamma = pets.load_value(pets.Args(dataset_id=data, value_run_dir=str(folder)), buffer)
    states = np.concatenate([episode["observations"][:-1] for episode in episodes]).astype(np.float64)
    x = (states - states.mean(axis=0)) / (states.std(axis=0) + 1e-3) if normalized else states
    q = numpy_q(checkpoint(folder)["learner"]["target_critic"], 2, np.hstack([x, np.full((90, 1), -0.3)]))
    rewards = np.concatenate([episode["rewards"] for episode in episodes])
    expected = 7 * q * np.sqrt(np.mean(rewards**2)) / (1 - 0.9)
    np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-3)
    estimate = json.loads((folder / "result.json").read_text())["estimate"]
    np.testing.assert_allclose(values[[0, 30, 60]], 7 * estimate, rtol=1e-3)
    assert gamma == 0.9


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, pendulum):
    """A finished run of FQE on the built-in data."""
    folder = tmp_path_factory.mktemp("evaluated")
    words = ["--hidden-dims", "8", "--num-members", "2", "--num-updates", "5", "--eval-episodes", "1"]
    policy = write_policy(folder / "policy")
    assert run_script("fqe", *words, "--policy-run-dir", policy, "--run-dir", str(folder / "fqe")).returncode == 0
    return folder / "fqe"


def test_a_run_with_a_value_needs_fqes_folder_no_more(evaluated, tmp_path):
    """Neither to be resumed, to the same bits, nor to be loaded."""
    gone = tmp_path / "gone"
    shutil.copytree(evaluated, gone)
    words = [*FEW, "--value-run-dir", str(gone), "--value-updates", "20", "--checkpoint-every", "3", "--log-every", "3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run = run_script("pets", *words, "--num-updates", "6", "--run-dir", str(whole))
    assert run.returncode == 0 and "V: of the variance of FQE's values in the data, its fit leaves " in run.stdout
    assert run_script("pets", *words, "--num-updates", "3", "--run-dir", str(cut)).returncode == 0
    shutil.rmtree(gone)
    assert run_script("pets", *words, "--num-updates", "6", "--run-dir", str(cut), "--resume").returncode == 0
    assert_same(checkpoint(whole)["learner"], checkpoint(cut)["learner"])

    policy = load_policy(cut)
    assert_same(policy.actor.state_dict(), checkpoint(whole)["learner"]["actor"])
    assert policy.actor.value.gamma == pytest.approx(0.99) and policy.actor.value.scale[1] != 1
    environments = short_environments(load_dataset("anchorl/pendulum/mixed-v0"), 2)
    returns, _ = evaluate(policy, environments, 3, FINAL_SEED)
    assert returns.tolist() == json.loads((cut / "result.json").read_text())["final_returns"]


def test_runs_whose_value_does_not_suit(evaluated, make_dataset, tmp_path):
    def refused(folder, *words):
        run = run_script("pets", *FEW, "--value-run-dir", str(folder), *words, "--run-dir", str(tmp_path / "run"))
        assert not (tmp_path / "run").exists()
        return run

    assert_one_line(refused(tmp_path / "none"), "error: --value-run-dir .*none: cannot read .*No such file")
    space, episodes = gym.spaces.Box(-9, 9, (4,)), [random_episode(0, observation_dim=4)] * 2
    data = make_dataset(observation_space=space, episodes=episodes)
    assert_one_line(refused(evaluated, "--dataset-id", data), f"was trained on other data than {data}")
    held_out = refused(evaluated, "--validation-fraction", "0.5")
    assert_one_line(held_out, "was trained on other data than .*, or some were held out of these")
    shifted = refused(evaluated, "--reward-shift", "1")
    assert_one_line(shifted, "knows rewards without a shift alone; leave out --reward-shift")
    other = tmp_path / "bc"
    assert run_script("bc", *SHORT, "--num-updates", "1", "--run-dir", str(other)).returncode == 0
    assert_one_line(refused(other), "--value-run-dir .*: is a run of bc, not of fqe")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(evaluated, unfinished, ignore=lambda *_: ["result.json"])
    assert_one_line(refused(unfinished), "has not finished; go on with that run first")


def test_the_policy_behind_a_value_may_be_of_a_users_script(evaluated, tmp_path):
    folder = tmp_path / "fqe"
    shutil.copytree(evaluated, folder)
    state = torch.load(folder / "policy.pt", weights_only=True)
    torch.save(state | {"script": "mine"}, folder / "policy.pt")
    words = [*FEW, "--num-updates", "1", "--value-updates", "1", "--value-run-dir", str(folder)]
    words += ["--run-dir", str(tmp_path / "run")]
    assert_one_line(run_script("pets", *words), "--policy-script None: no script .*mine.py: give its path")
    run = run_script("pets", *words, "--policy-script", str(ROOT / "algorithms" / "bc.py"))
    assert run.returncode == 0, run.stderr
