"""PETS: what a plan earns in the model, how the search moves, and what a planner remembers, against NumPy."""

import csv
import json

import numpy as np
import pets
import pytest
import torch
from conftest import (
    SHORT,
    SHORTER,
    assert_one_line,
    assert_same,
    checkpoint,
    random_batch,
    run_script,
)
from torch import nn

from common.command_line import BadInput
from common.evaluation import FINAL_SEED, evaluate, load_policy, make_environments
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


def by_hand(state, actions, members, ends=lambda before, after: 0.0, penalty=0.0):
    """The return of one trajectory, the member of each step given."""
    total, reach = 0.0, 1.0
    for action, k in zip(actions, members, strict=True):
        # the members' means differ by the action in s' and by 10 in r, of which half is their standard deviation
        total += reach * (state + 10 * k - penalty * np.hypot(action / 2, 5))
        after = state + (k + 1) * action
        reach *= 1 - ends(state, after)
        state = after
    return total


@pytest.mark.parametrize("penalty", [0.0, 0.7])
def test_returns_in_which_particles_keep_their_members(penalty):
    actor = make_actor(propagation="TSinf", penalty_coefficient=penalty)
    found = pets.returns_of(actor, torch.tensor([[0.3]]), CANDIDATES)
    plans = CANDIDATES[0, :, :, 0].numpy()
    expected = [np.mean([by_hand(0.3, plan, [k] * 3, penalty=penalty) for k in (0, 1)]) for plan in plans]
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)


def test_returns_in_which_particles_change_their_members():
    actor = make_actor(propagation="TS1")
    actor.order.copy_(torch.tensor([[1, 0], [0, 1], [1, 0]]))  # of the particles, which swap, stay, swap
    found = pets.returns_of(actor, torch.tensor([[0.3]]), CANDIDATES)
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
    found = pets.returns_of(actor, torch.tensor([[0.3]]), CANDIDATES)
    plans = CANDIDATES[0, :, :, 0].numpy()
    ends = lambda _, after: float(after > 0.7)  # noqa: E731
    expected = [np.mean([by_hand(0.3, plan, [k] * 3, ends) for k in (0, 1)]) for plan in plans]
    without = [np.mean([by_hand(0.3, plan, [k] * 3) for k in (0, 1)]) for plan in plans]
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)
    assert not np.allclose(expected, without)


def test_rewards_count_by_the_learned_probability_that_they_are_reached():
    found = pets.returns_of(make_actor("learned"), torch.tensor([[0.3]]), CANDIDATES)
    ends = lambda before, _: 1 / (1 + np.exp(1 - before))  # noqa: E731
    expected = [np.mean([by_hand(0.3, plan, [k] * 3, ends) for k in (0, 1)]) for plan in CANDIDATES[0, :, :, 0].numpy()]
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)


def test_particles_have_noise_of_the_members_size_and_candidates_share_it(monkeypatch):
    monkeypatch.setattr(Linear, "std", 0.5)
    actor = make_actor(horizon=1, num_particles=1000)
    same = CANDIDATES[:, :1, :1].expand(1, 2, 1, 1)
    found = pets.returns_of(actor, torch.tensor([[0.3]]), same)[0]
    assert found[0] == found[1] == pytest.approx(5.3 + 0.5 * actor.noise[0, :, 0, 1].mean().item(), rel=1e-4)
    assert actor.noise.std().item() == pytest.approx(1, abs=0.05)


def test_each_state_has_its_own_plans():
    states, candidates = torch.tensor([[0.3], [-0.6]]), torch.cat([CANDIDATES, -CANDIDATES])
    actor = make_actor()
    both = pets.returns_of(actor, states, candidates)
    for row in range(2):
        torch.testing.assert_close(
            both[row : row + 1], pets.returns_of(actor, states[row : row + 1], candidates[row : row + 1])
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

    monkeypatch.setattr(pets, "returns_of", spy)
    actor = make_actor(population=5000, num_best=50, horizon=2)
    plan = pets.plan(actor, torch.zeros(1, 1), torch.tensor([[[0.0], [0.9]]]))
    assert actor.cem_noise.abs().max() <= 2 and actor.cem_noise.std().item() == pytest.approx(0.88, abs=0.01)
    first = seen[0][0, :, :, 0]
    assert all(candidates.abs().max() <= 1 for candidates in seen)
    np.testing.assert_allclose(first.mean(dim=0), [0, 0.9], atol=0.02)
    np.testing.assert_allclose(first.std(dim=0), [0.88 * 0.5, 0.88 * 0.05], rtol=0.03)  # sqrt(1 / 4); half way to 1
    assert (plan > torch.tensor([[0.5], [0.9]])).all()  # the sum is best at 1


def test_a_plan_is_near_the_best_that_brute_force_finds():
    """Both members pay the state: climb, to the last step but one, whose action nobody sees."""
    actor = make_actor(population=200, num_best=20, cem_iterations=6)
    plan = pets.plan(actor, torch.zeros(1, 1), torch.zeros(1, 3, 1))[0, :, 0]
    grid = torch.cartesian_prod(*[torch.linspace(-1, 1, 9)] * 3)[None, :, :, None]
    best = pets.returns_of(actor, torch.zeros(1, 1), grid).max()
    assert pets.returns_of(actor, torch.zeros(1, 1), plan.view(1, 1, 3, 1)).item() > best.item() - 0.3
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


def test_weights_decay_layer_by_layer():
    learner = pets.build(3, 2, pets.Args(hidden_dims=(8,) * 4), CPU, Adam)
    found = {id(p): group["weight_decay"] for group in learner.optimizer.param_groups for p in group["params"]}
    assert [found.pop(id(layer.weight)) for layer in learner.dynamics.layers] == [2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4]
    assert set(found.values()) == {0}


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"cem_alpha": 1.0}, r"--cem-alpha 1.0: must be in \[0, 1\)"),
        ({"penalty_coefficient": -1.0}, "--penalty-coefficient -1.0: must not be negative"),
        ({"population": 5, "num_best": 6}, "--num-best 6: must be at most --population"),
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
    returns, _ = evaluate(policy, make_environments(pendulum.dataset, 2), 3, FINAL_SEED)
    assert returns.tolist() == json.loads((tmp_path / "result.json").read_text())["final_returns"]

    (environment,) = make_environments(pendulum.dataset, 1)  # a user's loop, which evaluation is the same as
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
