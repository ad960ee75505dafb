"""An environment that is played, step by step: what is recorded, and that a resumed run is where it was."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from common.command_line import BadInput, Diverged
from common.data import ReplayBuffer, load_dataset
from common.evaluation import Player, Policy, make_environment

CPU = torch.device("cpu")


def fresh_buffer():
    """With rewards of another scale, observations normalised, and room for 600 steps."""
    buffer = ReplayBuffer(load_dataset("anchorl/pendulum/mixed-v0"), CPU, room=600)
    buffer.scale_rewards(0.5, 1.0)
    return buffer


@pytest.fixture
def buffer(datasets_path):
    return fresh_buffer()


def noisy(observations):
    return torch.randn(1, 1) * 0.8  # now and then beyond the bounds


def play(player, act=noisy):
    buffer = player.buffer
    bounds = buffer.dataset.action_low, buffer.dataset.action_high
    policy = Policy(torch.nn.Identity(), buffer.normalization, bounds, False, {})
    buffer.add(player.step(policy(player.observation[None], act)[0]))


def test_what_is_played_comes_after_the_data_in_the_units_of_the_buffer(buffer):
    torch.manual_seed(0)
    rows, seen = len(buffer.storage), []
    with make_environment("Pendulum-v1") as environment:
        player = Player(environment, buffer, 7)
        for _ in range(203):
            play(player, lambda s: (seen.append(s), noisy(s))[1])
        assert player.lengths == [200] and len(player.actions) == 3 and len(buffer.storage) == rows + 203
        new = buffer.take(torch.arange(rows, rows + 203))
        mean, std = buffer.normalization.numpy()
        for first, last, number in ((0, 200, 0), (200, 203, 1)):  # played again by hand
            (seed,) = np.random.SeedSequence((7, number)).generate_state(1)
            observation, _ = environment.reset(seed=int(seed))
            for row in range(first, last):
                expected = (observation - mean) / std
                np.testing.assert_allclose(new.observations[row].numpy(), expected, rtol=1e-5, atol=1e-6)
                np.testing.assert_allclose(seen[row][0], new.observations[row], rtol=1e-5, atol=1e-6)
                observation, reward, *_ = environment.step(2 * new.actions[row].numpy())  # the torque: from -2 to 2
                expected = (observation - mean) / std
                np.testing.assert_allclose(new.next_observations[row].numpy(), expected, rtol=1e-5, atol=1e-6)
                assert new.rewards[row].item() == pytest.approx(0.5 * (reward + 1), abs=1e-6)
    assert new.actions.abs().max() == 1 and not new.terminations.any()  # Pendulum-v1 cuts its episodes, and ends none
    drawn = buffer.draw(100_000)
    assert drawn.max() == rows + 202
    assert (drawn >= rows).float().mean().item() == pytest.approx(203 / (rows + 203), abs=0.003)


class Counter(gym.Env):
    """Every third episode ends by itself at its fifth step; the others go on. It writes to one array all along."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), dtype=np.float32)
    action_space = gym.spaces.Box(-2, 2, (1,))
    episode, fails_at, reward = -1, 99, 0.0

    def reset(self, *, seed=None, options=None):
        self.episode, self.step_number, self.state = self.episode + 1, 0, np.zeros(3, np.float32)
        if self.episode == -self.fails_at:
            raise RuntimeError("no way back")
        return self.state, {}

    def step(self, action):
        self.step_number += 1
        if self.step_number == self.fails_at:
            raise RuntimeError("a joint is broken")
        self.state += 1
        over = self.episode % 3 == 2 and self.step_number == 5
        return self.state, self.reward, over, False, {}


def played(buffer, limit, steps):
    """The player after so many steps of Counter, and what they added."""
    rows = len(buffer.storage)
    with gym.wrappers.TimeLimit(Counter(), limit) as environment:
        player = Player(environment, buffer, 0)
        for _ in range(steps):
            play(player)
    return player, buffer.take(torch.arange(rows, rows + steps))


def test_a_termination_is_one_and_a_time_limit_is_none(buffer):
    player, new = played(buffer, 8, 44)
    assert player.lengths == [8, 8, 5, 8, 8, 5] and len(player.actions) == 2
    np.testing.assert_array_equal(new.terminations.numpy(), np.isin(np.arange(44), [20, 41]).astype(np.float32))
    mean, std = buffer.normalization.numpy()
    counted = new.observations.numpy() * std + mean  # the array that the environment goes on writing to was copied
    expected = np.concatenate([np.arange(length) for length in [*player.lengths, 2]])
    np.testing.assert_allclose(counted[:, 0], expected, atol=1e-4)
    np.testing.assert_allclose(new.next_observations.numpy()[:, 0] * std[0] + mean[0], expected + 1, atol=1e-4)


class Scaler(Counter):
    """Writes into the action that it is given."""

    def step(self, action):
        action *= 0.5
        return super().step(action)


def test_an_environment_that_changes_its_action_changes_no_stored_one(buffer):
    player, action = Player(Scaler(), buffer, 0), np.ones(buffer.action_dim, np.float32)
    transition = player.step(action)
    assert (action == 1).all() and (transition.actions == 1).all() and (player.actions[0] == 1).all()


def test_large_numbers_are_finite():
    class Large(Counter):
        def reset(self, *, seed=None, options=None):
            return np.full(3, 3e38, np.float32), {}

    assert (Player(Large(), None, 0).observation == np.float32(3e38)).all()


def test_a_termination_at_the_time_limit_is_one(buffer):
    player, new = played(buffer, 5, 15)
    assert player.lengths == [5, 5, 5] and new.terminations.nonzero().tolist() == [[14]]


def test_a_resumed_player_is_where_the_episode_was(buffer):
    torch.manual_seed(0)
    again = fresh_buffer()
    with make_environment("Pendulum-v1") as environment, make_environment("Pendulum-v1") as fresh:
        player = Player(environment, buffer, 7)
        for _ in range(217):
            play(player)
        state = player.state_dict()
        resumed = Player(fresh, again, 7)
        resumed.load_state_dict(state)
        for number in range(200):  # into the next episode
            assert torch.equal(again.storage, buffer.storage) and resumed.lengths == player.lengths
            np.testing.assert_array_equal(resumed.observation, player.observation)
            for one in (player, resumed):
                torch.manual_seed(number)
                play(one)
    assert len(state["added"]) == 217  # a copy, which does not grow with the buffer


def test_other_seeds_are_other_episodes():
    with make_environment("Pendulum-v1") as environment:
        begins = [Player(environment, None, *seeds).observation for seeds in ((0, 0), (0, 1), (1, 0))]
    assert len(np.unique(begins, axis=0)) == 3


def test_an_environment_that_goes_another_way_is_refused(buffer):
    with gym.wrappers.TimeLimit(Counter(), 8) as environment:
        player = Player(environment, buffer, 0)
        for _ in range(20):  # the third episode, of five steps, is about to end
            play(player)
        fresh = gym.wrappers.TimeLimit(Counter(), 3)
        with pytest.raises(BadInput, match="does not go the same way"):
            Player(fresh, fresh_buffer(), 0).load_state_dict(player.state_dict())


def test_an_environment_that_fails_is_one_line(buffer):
    with gym.wrappers.TimeLimit(Counter(), 8) as environment:
        environment.unwrapped.fails_at = 4
        player = Player(environment, buffer, 0)
        for _ in range(3):
            play(player)
        with pytest.raises(BadInput, match="the environment failed at step 4 of an episode: a joint is broken"):
            play(player)
        environment.unwrapped.fails_at = -(environment.unwrapped.episode + 1)
        with pytest.raises(BadInput, match="the environment failed at step 0 of an episode: no way back"):
            Player(environment, buffer, 0)


def test_an_action_that_is_not_finite_is_the_policy_s_fault(buffer):
    with make_environment("Pendulum-v1") as environment:
        player = Player(environment, buffer, 0)
        with pytest.raises(Diverged, match="the action at step 1 of an episode is not finite"):
            player.step(np.array([np.nan], np.float32))


@pytest.mark.parametrize("broken", ["reward", "observation"])
def test_what_is_no_number_is_one_line_that_names_the_step(buffer, broken):
    with gym.wrappers.TimeLimit(Counter(), 8) as environment:
        player = Player(environment, buffer, 0)
        for _ in range(2):
            play(player)
        if broken == "reward":
            environment.unwrapped.reward = np.nan
        else:
            environment.unwrapped.state[1] = -np.inf
        rows = len(buffer.storage)
        with pytest.raises(
            BadInput, match="the environment failed at step 3 of an episode: it gave what is not finite"
        ):
            play(player)
        assert len(buffer.storage) == rows


def test_without_room_nothing_is_added(datasets_path):
    buffer = ReplayBuffer(load_dataset("anchorl/pendulum/mixed-v0"), CPU, room=1)
    transition = next(buffer.dataset.read_episodes())
    transition = transition._make(column[0] for column in transition)
    buffer.add(transition)
    before = buffer.storage.clone()
    with pytest.raises(BadInput, match=r"observations of shape \(1, 3\) in a room of \(0, 3\)"):
        buffer.add(transition)
    assert torch.equal(buffer.storage, before)
