"""The replay buffer against datasets whose every number the test knows."""

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from conftest import ALGORITHMS, DISCRETE, SHORT, SHORTER, checkpoint, random_episode, run_script

from common.command_line import BadInput
from common.data import Batch, ReplayBuffer, load_dataset
from common.evaluation import Policy

CPU = torch.device("cpu")


def load(dataset_id: str, normalize: bool = False) -> ReplayBuffer:
    return ReplayBuffer(load_dataset(dataset_id), CPU, normalize)


def test_holds_every_transition_in_order(make_dataset):
    episodes = [random_episode(seed, length) for seed, length in enumerate((5, 1, 7))]
    buffer = load(make_dataset(episodes=episodes))
    data = buffer.transitions
    observations = np.concatenate([episode["observations"][:-1] for episode in episodes])
    next_observations = np.concatenate([episode["observations"][1:] for episode in episodes])
    np.testing.assert_array_equal(data.observations, observations)
    np.testing.assert_array_equal(data.next_observations, next_observations)  # never across a boundary
    np.testing.assert_allclose(data.rewards, np.concatenate([episode["rewards"] for episode in episodes]), rtol=1e-6)
    assert data.terminations.sum() == 0  # a time limit is no termination
    assert buffer.episode_lengths.tolist() == [5, 1, 7]
    assert buffer.episode_starts.tolist() == [0, 5, 6]
    np.testing.assert_allclose(buffer.episode_returns, [episode["rewards"].sum() for episode in episodes])
    assert {tensor.dtype for tensor in data} == {torch.float32}


def test_marks_terminations(make_dataset):
    ended = np.array([False, False, True])
    episodes = [random_episode(0, 3, terminations=ended, truncations=~ended & False), random_episode(1, 2)]
    assert load(make_dataset(episodes=episodes)).transitions.terminations.tolist() == [0, 0, 1, 0, 0]


def test_maps_actions_to_the_unit_box_and_clips_beyond_it(make_dataset):
    space = gym.spaces.Box(np.array([-1, 0], np.float32), np.array([3, 10], np.float32))
    actions = np.array([[-1, 0], [1, 5], [3, 10], [5, -2]], np.float32)
    buffer = load(make_dataset(episodes=[random_episode(0, 4, actions=actions)], action_space=space))
    assert buffer.transitions.actions.tolist() == [[-1, -1], [0, 0], [1, 1], [1, -1]]


def test_a_bound_of_the_actions_becomes_one_exactly(make_dataset):
    """An estimate by weights takes actions there for clipped ones. In float32 0.8 and 4.4 become -0.9999999."""
    low, high = np.float32([0.8, 0.2, 18.3]), np.float32([4.4, 0.9, 24.6])
    episode = random_episode(0, 4, actions=np.stack([low, high, low, high]))
    buffer = load(make_dataset(episodes=[episode], action_space=gym.spaces.Box(low, high)))
    assert buffer.transitions.actions.tolist() == [[-1.0] * 3, [1.0] * 3] * 2 and buffer.num_clipped == 0


def discrete_dataset(make_dataset, actions, first=0, n=3, **fields):
    episode = random_episode(0, len(actions), actions=np.asarray(actions), **fields)
    return make_dataset(episodes=[episode], action_space=gym.spaces.Discrete(n, start=first))


@pytest.mark.parametrize("first", [0, 1, -2, 2**40])
def test_discrete_actions_are_integers_counted_from_0(make_dataset, first):
    actions = np.array([0, 2, 1, 1, 0]) + first
    buffer = ReplayBuffer(load_dataset(discrete_dataset(make_dataset, actions, first), discrete=True), CPU)
    assert buffer.num_actions == 3
    assert buffer.transitions.actions.tolist() == [0, 2, 1, 1, 0]
    assert {name: column.dtype for name, column in buffer.sample(4)._asdict().items()} == {
        name: torch.int64 if name == "actions" else torch.float32 for name in Batch._fields
    }
    assert buffer.sample(4).actions.shape == (4,)
    assert [buffer.dataset.action_low.tolist(), buffer.dataset.action_high.tolist()] == [[first], [first + 2]]


def test_samples_whole_rows_of_discrete_actions(make_dataset):
    rewards = np.array([0.0, 1.0, 2.0, 3.0])
    dataset_id = discrete_dataset(make_dataset, [5, 7, 6, 5], first=5, rewards=rewards)
    buffer = ReplayBuffer(load_dataset(dataset_id, discrete=True), CPU)
    batch = buffer.sample(1000)
    for name, values in batch._asdict().items():
        torch.testing.assert_close(values, getattr(buffer.transitions, name)[batch.rewards.long()])


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([1, 2, 4, 0], "step 2: actions hold 4, which is not a whole number from 1 to 3"),
        ([1, 0, 1, 1], "step 1: actions hold 0, which is not a whole number from 1 to 3"),
        ([1.0, 2.0, 3.0, 2.5], "step 3: actions hold 2.5, which is not a whole number from 1 to 3"),
        ([1.0, 2.0, np.nan, 2.5], "step 2: actions hold nan"),
        ([[1], [2], [3], [1]], r"actions of shape \(4, 1\), not \(4,\)"),
    ],
)
def test_refuses_discrete_actions_that_the_space_lacks(make_dataset, actions, message):
    dataset = load_dataset(discrete_dataset(make_dataset, actions, first=1), discrete=True)
    with pytest.raises(BadInput, match=f"test/data-v0, episode 0.* {message}"):
        ReplayBuffer(dataset, CPU)


def test_flattens_goal_conditioned_observations(make_dataset):
    names = {"observation": 2, "achieved_goal": 1, "desired_goal": 1}
    space = gym.spaces.Dict({name: gym.spaces.Box(-np.inf, np.inf, (size,)) for name, size in names.items()})
    rng = np.random.default_rng(0)
    parts = {name: rng.normal(size=(4, size)).astype(np.float32) for name, size in names.items()}
    buffer = load(make_dataset(episodes=[random_episode(0, 3, observations=parts)], observation_space=space))
    expected = np.concatenate([parts[name] for name in sorted(parts)], axis=1)  # the achieved goal, too
    np.testing.assert_array_equal(buffer.transitions.observations, expected[:-1])
    np.testing.assert_array_equal(buffer.transitions.next_observations, expected[1:])


def test_flattens_any_dict_of_boxes(make_dataset):
    space = gym.spaces.Dict({name: gym.spaces.Box(-np.inf, np.inf, (2,)) for name in ("a", "b")})
    parts = {"a": np.zeros((4, 2), np.float32), "b": np.ones((4, 2), np.float32)}
    buffer = load(make_dataset(episodes=[random_episode(0, 3, observations=parts)], observation_space=space))
    assert buffer.transitions.observations.tolist() == [[0, 0, 1, 1]] * 3


def test_normalises_by_the_observations_of_the_data(make_dataset):
    dataset_id = make_dataset()
    raw, buffer = load(dataset_id).transitions, load(dataset_id, normalize=True)
    observations, next_observations = raw.observations.numpy(), raw.next_observations.numpy()
    mean, std = observations.mean(axis=0), observations.std(axis=0) + 1e-3
    np.testing.assert_allclose(buffer.transitions.observations, (observations - mean) / std, atol=1e-5)
    np.testing.assert_allclose(buffer.transitions.next_observations, (next_observations - mean) / std, atol=1e-5)
    assert buffer.fingerprint == load(dataset_id).fingerprint  # of the data, not of what was made of it


def test_samples_whole_rows_uniformly(make_dataset):
    episode = random_episode(0, 3)
    episode["rewards"] = np.array([0.0, 1.0, 2.0])
    buffer = load(make_dataset(episodes=[episode]))
    torch.manual_seed(0)
    batch = buffer.sample(30_000)
    rows = batch.rewards.long()
    for name, values in batch._asdict().items():
        torch.testing.assert_close(values, getattr(buffer.transitions, name)[rows])
    assert rows.bincount().tolist() == pytest.approx([10_000] * 3, rel=0.05)


def test_fingerprint_tells_datasets_apart(make_dataset):
    first = load(make_dataset("test/a-v0")).fingerprint
    assert first == load(make_dataset("test/b-v0")).fingerprint
    assert first != load(make_dataset("test/c-v0", episodes=[random_episode(9)])).fingerprint


@pytest.mark.parametrize("field", ["observations", "actions", "rewards"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_names_the_place_of_a_number_that_is_not_finite(make_dataset, field, value):
    broken = random_episode(1, 9)
    broken[field][6] = value
    dataset_id = make_dataset(episodes=[random_episode(0), broken])
    with pytest.raises(BadInput, match=rf"episode 1 .repair or remove it.: step 6: {field} hold {value}"):
        load(dataset_id)


@pytest.mark.parametrize("field", ["observations", "actions", "rewards", "terminations"])
def test_refuses_an_episode_whose_lengths_do_not_match(make_dataset, field):
    short = random_episode(1)
    short[field] = short[field][:-1]
    dataset_id = make_dataset(episodes=[random_episode(0), short])
    with pytest.raises(BadInput, match=r"episode 1 .repair or remove it.: \w+ of shape .*, not \("):
        load(dataset_id)


def test_refuses_arrays_of_other_sizes_than_the_spaces_say(make_dataset):
    """A single column would otherwise be spread over all of the dataset's."""
    dataset_id = make_dataset(episodes=[random_episode(0, 5, observations=np.zeros((6, 1), np.float32))])
    with pytest.raises(BadInput, match=r"observations of shape \(5, 1\), not \(5, 3\)"):
        load(dataset_id)


def test_refuses_numbers_that_float32_cannot_hold(make_dataset):
    dataset_id = make_dataset(episodes=[random_episode(0, 3, rewards=np.array([0.0, 1e300, 0.0]))])
    with pytest.raises(BadInput, match="step 1: rewards hold inf"):
        load(dataset_id)


def test_episodes_without_steps_are_left_out(make_dataset, datasets_path):
    """Minari writes none; one that was cut by hand has a first observation alone."""
    path = datasets_path / make_dataset() / "data" / "main_data.hdf5"
    with h5py.File(path, "a") as file:
        for name in ("observations", "actions", "rewards", "terminations", "truncations"):
            kept = file["episode_1"][name][: 1 if name == "observations" else 0]
            del file["episode_1"][name]
            file["episode_1"][name] = kept
    buffer = load("test/data-v0")
    assert buffer.episode_lengths.tolist() == [30, 30, 30] and len(buffer.episode_returns) == 3


def test_refuses_an_empty_dataset(make_dataset):
    dataset_id = make_dataset(episodes=[])
    with pytest.raises(BadInput, match="empty"):
        load(dataset_id)


def returning(make_dataset, *returns: float, name: str = "test/data-v0") -> ReplayBuffer:
    """Episodes of 2, 3, ... steps with these returns, a part of each in every step."""
    lengths = range(2, 2 + len(returns))
    rewards = [np.full(length, total / length) for length, total in zip(lengths, returns, strict=True)]
    return load(make_dataset(name, [random_episode(0, len(values), rewards=values) for values in rewards]))


def test_rewards_are_shifted_and_then_scaled(make_dataset, capsys):
    buffer = returning(make_dataset, 60.0, -30.0, 300.0)
    buffer.scale_rewards(2.0, -1.0)
    expected = [58.0, 58, -22, -22, -22, 148, 148, 148, 148]
    assert buffer.transitions.rewards.tolist() == pytest.approx(expected)
    assert buffer.reward_scale == 2 and buffer.episode_returns.tolist() == pytest.approx([60, -30, 300])  # as they were
    assert capsys.readouterr().err == ""


def test_the_return_range_is_that_of_the_shifted_rewards(make_dataset, capsys):
    buffer = returning(make_dataset, 60.0, -30.0, 300.0)
    buffer.scale_rewards("return-range", -1.0)
    assert buffer.reward_scale == pytest.approx(1000 / ((300 - 4) - (-30 - 3)))
    sums = [episode.sum().item() for episode in buffer.transitions.rewards.split([2, 3, 4])]
    assert max(sums) - min(sums) == pytest.approx(1000, rel=1e-5)
    assert capsys.readouterr().err == ""


def test_the_return_range_makes_units_of_rewards_alike(make_dataset):
    units = {"test/hundredth-v0": 0.01, "test/one-v0": 1.0, "test/hundred-v0": 100.0}
    scaled = [returning(make_dataset, 60 * u, -30 * u, 300 * u, name=name) for name, u in units.items()]
    for buffer in scaled:
        buffer.scale_rewards("return-range", 0.0)
    for buffer in scaled:
        torch.testing.assert_close(buffer.transitions.rewards, scaled[1].transitions.rewards)


@pytest.mark.parametrize(("unit", "span"), [(0.01, "3.3"), (100.0, "3.3e+04"), (1.0, None)])
def test_returns_of_another_size_than_usual_name_the_switch(make_dataset, capsys, unit, span):
    returning(make_dataset, 60 * unit, -30 * unit, 300 * unit).scale_rewards(1.0, 0.0)
    said = capsys.readouterr().err
    assert said == "" if span is None else f"span {span}," in said and "--reward-scale return-range" in said


def test_equal_returns_have_no_range(make_dataset):
    buffer = returning(make_dataset, 5.0, 5.0)
    with pytest.raises(BadInput, match="all returns are equal; give a number"):
        buffer.scale_rewards("return-range", 0.0)
    buffer.scale_rewards(3.0, 0.0)
    assert buffer.transitions.rewards.tolist() == pytest.approx([7.5, 7.5, 5, 5, 5])


@pytest.mark.parametrize(
    ("rewards", "shift"),
    [
        (([0.1, 0.2, 0.3, 0.7], [0.7, 0.3, 0.2, 0.1]), 0.0),
        (([0.1, 0.2, -0.3], [0.7, -0.7, 0.0]), 0.0),
        ((np.full(3, 0.1), np.full(7, 0.1)), -0.1),
    ],
)
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_returns_that_differ_by_rounding_have_no_range(make_dataset, rewards, shift, kind):
    episodes = [random_episode(0, len(each), rewards=np.array(each, dtype=kind)) for each in rewards]
    buffer = ReplayBuffer(load_dataset(make_dataset(episodes=episodes)), CPU)
    assert np.ptp((buffer.episode_returns + shift * buffer.episode_lengths).numpy()) < 1e-6
    with pytest.raises(BadInput, match="all returns are equal; give a number"):
        buffer.scale_rewards("return-range", shift)


# bc only ranks returns; rlpd needs an environment, whose rewards have one unit
@pytest.mark.parametrize("algorithm", [n for n in ALGORITHMS if n not in ("bc", "rlpd", "decision_transformer")])
def test_units_of_rewards_warn_or_make_no_difference(algorithm, make_dataset, tmp_path):
    """The same data in units of a hundredth: with --reward-scale return-range the policy is the same, else a warning
    names it; IQL has that by default. BC only ranks returns, and Decision Transformer divides them by the largest.
    """
    policies = []
    for unit in (100.0, 1.0):
        episodes = [random_episode(seed) for seed in range(4)]
        for episode in episodes:
            episode["rewards"] = unit * episode["rewards"]
            if algorithm in DISCRETE:
                episode["actions"] = (episode["actions"][:, 0] > 0).astype(int)
        space = {"action_space": gym.spaces.Discrete(2)} if algorithm in DISCRETE else {}
        dataset_id = make_dataset(f"test/unit-{unit:.0f}-v0", episodes, **space)
        words = ["--dataset-id", dataset_id, "--num-updates", "6", *SHORT, *SHORTER.get(algorithm, [])]
        for name, arguments in (("scaled", ["--reward-scale", "return-range"]), ("plain", [])):
            folder = tmp_path / f"{name}-{unit:.0f}"
            run = run_script(algorithm, *words, *arguments, "--run-dir", str(folder))
            assert run.returncode == 0, run.stderr
            scaled = name == "scaled" or algorithm in ("iql", "idql", "sql", "xql")
            assert ("--reward-scale return-range" in run.stderr) == (unit == 1 and not scaled)
        policies.append(checkpoint(tmp_path / f"scaled-{unit:.0f}")["learner"]["actor"])
    for name, weight in policies[0].items():
        torch.testing.assert_close(weight, policies[1][name], rtol=1e-3, atol=1e-4)


def large(make_dataset, columns: list[np.ndarray], name: str = "test/data-v0", **options) -> ReplayBuffer:
    """One episode of float64 observations with these columns [N + 1]."""
    observations = np.stack(columns, axis=1)
    episode = random_episode(0, len(observations) - 1, observation_dim=len(columns)) | {"observations": observations}
    space = gym.spaces.Box(-np.inf, np.inf, (len(columns),), np.float64)
    return ReplayBuffer(load_dataset(make_dataset(name, [episode], observation_space=space)), CPU, **options)


def test_values_far_from_0_are_told_apart(make_dataset):
    """Unix seconds every minute, two values one apart at 20,000,000, and noise of size 1 around 1e8."""
    rng = np.random.default_rng(0)
    columns = [1.7e9 + 60.0 * np.arange(401), 2e7 + rng.integers(0, 2, 401), 1e8 + rng.uniform(size=401)]
    buffer = large(make_dataset, columns)
    x = np.stack(columns, axis=1)
    mean, std = x[:-1].mean(axis=0), x[:-1].std(axis=0) + 1e-3
    np.testing.assert_allclose(buffer.normalization, [mean, std], rtol=1e-6)
    np.testing.assert_allclose(buffer.transitions.observations, (x[:-1] - mean) / std, atol=1e-4)
    np.testing.assert_allclose(buffer.transitions.next_observations, (x[1:] - mean) / std, atol=1e-4)


def test_a_policy_sees_what_the_buffer_holds(make_dataset):
    """Normalised in double precision, too: an actor of tanh alone gives that of the buffer's rows."""
    columns = [1.7e9 + 60.0 * np.arange(401), 2e7 + np.arange(401) % 2]
    buffer = large(make_dataset, columns)
    bounds = -np.ones(2, np.float32), np.ones(2, np.float32)
    policy = Policy(torch.nn.Tanh(), buffer.normalization, bounds, False, {})
    seen = policy(np.stack(columns, axis=1)[:-1])
    np.testing.assert_allclose(seen, buffer.transitions.observations.tanh(), atol=1e-5)


def test_values_that_float32_merges_are_named(make_dataset, capsys):
    columns = [np.zeros(401), 1e12 * (np.arange(401) == 0) + np.arange(401), np.arange(401.0)]
    large(make_dataset, columns)
    assert "merges different values of observation 1" in capsys.readouterr().err
    columns = [np.arange(401.0), 2e7 + np.arange(401) % 2]
    large(make_dataset, columns, "test/raw-v0", normalize_observations=False)
    assert "merges different values of observation 1" in capsys.readouterr().err


def test_what_is_not_normalised_is_stored_as_it_is(make_dataset):
    columns = [5.0 + np.arange(9), -3.0 * np.arange(9)]
    buffer = large(make_dataset, columns, normalize_observations=False)
    np.testing.assert_array_equal(buffer.transitions.observations, np.stack(columns, axis=1)[:-1])
    assert buffer.normalization.tolist() == [[0, 0], [1, 1]]
