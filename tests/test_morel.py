"""MOReL's detector and its pessimistic MDP against NumPy on small numbers, and what a run makes of them."""

import math
from types import SimpleNamespace

import morel
import numpy as np
import pytest
import torch
from conftest import checkpoint, random_batch, run_script, sac_learner

from common.command_line import BadInput


@pytest.fixture
def args():
    small = {"num_models": 3, "num_elites": 2, "rollout_batch_size": 10}
    return morel.Args(hidden_dims=(5, 4), dynamics_hidden_dims=(5,), gamma=0.9, **small)


@pytest.fixture
def learner(args):
    return sac_learner(morel, args)


def numpy_discrepancy(mean):
    """The largest distance between two members' next states, a pair and a row at a time."""
    members, rows = mean.shape[:2]
    distances = np.zeros((members, members, rows))
    for i in range(members):
        for j in range(members):
            for row in range(rows):
                difference = mean[i, row, :-1] - mean[j, row, :-1]
                distances[i, j, row] = math.sqrt(sum(number**2 for number in difference))
    return distances.max(axis=(0, 1))


# --- The detector ---


def test_discrepancy_by_hand():
    """Of the states (0, 0), (3, 0) and (0, 4) the last two are the farthest apart; rewards do not count."""
    mean = torch.tensor([[[0.0, 0.0, 7.0]], [[3.0, 0.0, -90.0]], [[0.0, 4.0, 0.0]]])
    assert morel.discrepancy(mean).tolist() == pytest.approx([5.0])


def test_discrepancy():
    mean = np.random.default_rng(0).normal(size=(4, 6, 3))
    np.testing.assert_allclose(morel.discrepancy(torch.tensor(mean)).numpy(), numpy_discrepancy(mean))


@pytest.mark.parametrize(
    ("least", "halt_penalty", "reward_in_halt"),
    [
        (-3.0, 0.0, -3.0),
        (-3.0, 2.0, -5.0),
        (4.0, 0.0, 0.0),  # an end, after which nothing comes, is worth less than 4 a step for ever
        (4.0, 2.0, -2.0),
    ],
)
def test_limit_and_value_of_halt(learner, args, least, halt_penalty, reward_in_halt):
    """Over all of the data, of more rows than are looked at together; the largest is of the last."""
    args.threshold, args.halt_penalty = 0.7, halt_penalty
    data = random_batch(2_500)
    data.observations[-1] *= 100
    data = data._replace(rewards=least + data.rewards - data.rewards.min())
    elites = learner.dynamics.elites(args.num_elites)
    discs = numpy_discrepancy(elites.predict(data.observations, data.actions)[0].numpy())
    assert discs.argmax() == 2_499
    limit, value = morel.find_halt(elites, data, args).tolist()
    assert limit == pytest.approx(0.7 * discs.max(), rel=1e-5)
    assert value == pytest.approx(sum(0.9**step * reward_in_halt for step in range(500)), rel=1e-5)


def test_data_are_known_with_a_threshold_of_one(learner, args):
    data, elites = random_batch(50), learner.dynamics.elites(args.num_elites)
    limit, _ = morel.find_halt(elites, data, args)
    unknown = morel.discrepancy(elites.predict(data.observations, data.actions)[0]) > limit
    assert not unknown.any()
    args.threshold = 0.5
    limit, _ = morel.find_halt(elites, data, args)
    assert (morel.discrepancy(elites.predict(data.observations, data.actions)[0]) > limit).any()


# --- The pessimistic MDP ---


class Diverging:
    """Three members without noise. Each step adds 1 to the state in all, and the reward is the state before it.

    The third moves apart from the others in the second number: by 10 where the state is 3 or more, elsewhere by 0.1.
    """

    @staticmethod
    def predict(observations, actions):
        apart = torch.where(observations[:, 0] >= 2.5, 10.0, 0.1)
        one, reward = torch.ones_like(apart), observations[:, 0]
        mean = torch.stack([torch.stack([one, side * apart, reward], dim=1) for side in (0.5, 0.5, -0.5)])
        return mean, torch.zeros_like(mean), torch.full(mean.shape[:2], -100.0)


RAW = torch.tensor([[0.0, 0.0], [1.0, 1.0]])


def test_an_unknown_step_pays_its_reward_and_then_halt():
    """With gamma 0.9 and -7 a step in HALT, which is worth -70: 4 + 0.9 (-70) = -59."""
    states = torch.tensor([[1.0, 0.0], [4.0, 0.0]])
    halt = torch.tensor([5.0, -70.0])
    transitions, disc = morel.model_step(Diverging, states, torch.zeros(2, 1), RAW, "Pendulum", halt, 0.9)
    assert disc.tolist() == pytest.approx([0.1, 10.0])
    assert transitions.rewards.tolist() == pytest.approx([1.0, -59.0])
    assert transitions.terminations.tolist() == [0.0, 1.0]
    assert transitions.next_observations[:, 0].tolist() == [2.0, 5.0]


def test_a_discrepancy_at_the_limit_is_known():
    halt = torch.tensor([10.0, -70.0])
    states = torch.tensor([[4.0, 0.0]])
    transitions, _ = morel.model_step(Diverging, states, torch.zeros(1, 1), RAW, "Pendulum", halt, 0.9)
    assert transitions.rewards.tolist() == [4.0] and transitions.terminations.tolist() == [0.0]


def test_where_a_member_foretells_nothing_is_unknown(monkeypatch):
    """One whose numbers are not finite has no distance from the others."""

    def predict(observations, actions):
        mean = Diverging.predict(observations, actions)[0]
        mean[1, 1] = math.nan
        return mean, torch.zeros_like(mean), torch.full(mean.shape[:2], -100.0)

    members, states = SimpleNamespace(predict=predict), torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    monkeypatch.setattr(torch, "randint", lambda *_, device: torch.zeros(2, dtype=torch.long))  # the first is drawn
    halt = torch.tensor([5.0, -70.0])
    transitions, _ = morel.model_step(members, states, torch.zeros(2, 1), RAW, "Pendulum", halt, 0.9)
    assert transitions.rewards.tolist() == pytest.approx([0.0, 1 + 0.9 * -70])
    assert transitions.terminations.tolist() == [0.0, 1.0]


def test_an_end_that_is_known_pays_its_reward_alone(monkeypatch):
    monkeypatch.setitem(morel.TERMINATION_RULES, "Stairs", lambda s: s[:, 0] > 1.5)
    states = torch.tensor([[0.0, 0.0], [1.0, 0.0], [4.0, 0.0]])
    halt = torch.tensor([5.0, -70.0])
    transitions, _ = morel.model_step(Diverging, states, torch.zeros(3, 1), RAW, "Stairs", halt, 0.9)
    assert transitions.rewards.tolist() == pytest.approx([0.0, 1.0, -59.0])  # the last is unknown and an end
    assert transitions.terminations.tolist() == [0.0, 1.0, 1.0]


def test_no_step_follows_halt(learner, args):
    """From 0 a rollout takes the steps from 0, 1, 2 and 3, of which the last is unknown; from 3 that one alone."""
    args.rollout_length = 10
    starts = random_batch(20, 2, 2)
    starts.observations[:, 1] = 0
    starts.observations[:, 0] = torch.tensor([0.0, 3.0]).repeat(10)
    actor = morel.Actor(2, 2, args)
    halt = torch.tensor([5.0, -70.0])
    transitions, disc = morel.rollout(actor, Diverging, starts, RAW, "Pendulum", halt, args)
    taken = transitions.observations[:, 0]
    assert [(taken == state).sum().item() for state in (0, 1, 2, 3)] == [10, 10, 10, 20] and len(taken) == 50
    assert torch.equal(transitions.terminations, (taken == 3).float())
    assert torch.equal(disc > 5, taken == 3)
    expected = torch.where(taken == 3, taken + 0.9 * -70, taken)
    torch.testing.assert_close(transitions.rewards, expected)


def test_the_target_of_an_unknown_step_is_what_halt_is_worth(learner, args):
    """Whatever the networks say of s': termination leaves r~ alone."""
    batch = random_batch()._replace(terminations=torch.ones(8), rewards=torch.full((8,), -59.0))
    _, metrics = morel.critic_loss(learner, batch, torch.zeros(8, 2), args)
    assert metrics["critic/target"].item() == pytest.approx(-59.0)


# --- Runs ---

FEW = ["--dynamics-hidden-dims", "8", "--max-dynamics-epochs", "1", "--dynamics-batch-size", "2048"]
FEW += ["--rollout-batch-size", "50", "--eval-episodes", "1", "--final-eval-episodes", "1"]


def test_the_policy_learns_from_rollouts_alone(monkeypatch, tmp_path, pendulum):
    batches, total_loss = [], morel.total_loss

    def spy(learner, batch, noise, args):
        batches.append(batch)
        return total_loss(learner, batch, noise, args)

    monkeypatch.setattr(morel, "total_loss", spy)
    arguments = ["--batch-size", "16", "--num-updates", "4", *FEW]
    run = run_script("morel", *arguments, "--run-dir", str(tmp_path / "run"))
    assert run.returncode == 0, run.stderr
    assert len(batches) == 4
    for batch in batches:
        assert batch.rewards.shape == (16,)
        assert not torch.isin(batch.rewards, pendulum.transitions.rewards).any()


@pytest.mark.parametrize(("threshold", "shares"), [("1000", {0.0}), ("1e-6", {1.0})])
def test_the_share_of_steps_that_the_detector_stops_is_logged(threshold, shares, tmp_path, pendulum):
    """Rewards are scaled, and V(HALT) is of scaled ones; the buffer has room for three calls of 50 rollouts."""
    arguments = ["--num-updates", "4", "--rollout-every", "3", "--threshold", threshold, *FEW]
    arguments += ["--reward-scale", "0.5", "--rollout-length", "4", "--rollouts-kept", "3"]
    run = run_script("morel", *arguments, "--run-dir", str(tmp_path / "run"))
    assert run.returncode == 0, run.stderr
    assert len(checkpoint(tmp_path / "run")["learner"]["model_buffer"]["rewards"]) == 3 * 50 * 4
    header, *rows = [line.split(",") for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()]
    found = [dict(zip(header, row, strict=True)) for row in rows]
    logged = [row for row in found if row["halt/share"]]
    assert [row["step"] for row in logged] == ["1", "4"]
    assert {float(row["halt/share"]) for row in logged} == shares
    assert {float(row["model/terminations"]) for row in logged} == shares  # as nothing else ends a pendulum
    assert all((float(row["halt/disc"]) > 1) == (shares == {1.0}) for row in logged)
    rewards = 0.5 * pendulum.transitions.rewards
    halt = 0.99 * rewards.min().item() / (1 - 0.99)  # gamma V(HALT)
    for row in logged:
        paid = float(row["model/rewards"]) - float(row["model/raw_rewards"])
        assert paid == pytest.approx(halt * max(shares), rel=1e-4, abs=1e-6)
        assert -10 < float(row["model/raw_rewards"]) < 1  # a pendulum's are from -16.3 to 0, here halved
        assert float(row["data/rewards"]) == pytest.approx(rewards.mean().item(), rel=1e-4)
        assert float(row["data/terminations"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": 1.0}, "--gamma 1.0: must be less than 1: HALT pays for ever"),
        ({"threshold": 0.0}, "--threshold 0.0: must be positive"),
        ({"threshold": math.inf}, "--threshold inf: must be finite"),
        ({"halt_penalty": -1.0}, "--halt-penalty -1.0: must not be negative"),
        ({"num_elites": 1}, r"--num-elites 1: must be in \[2, --num-models\]"),
        ({"num_elites": 8}, r"--num-elites 8: must be in \[2, --num-models\]"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message):
    with pytest.raises(BadInput, match=message):
        morel.Args(**arguments).validate()
