"""The report on a dataset: its numbers against a count by hand, and a line for each thing that can be wrong."""

import json

import h5py
import numpy as np
import pytest
from conftest import random_episode, run_script
from gymnasium import spaces
from matplotlib.figure import Figure
from matplotlib.image import imread

from benchmarks.inspect_actions import (
    count_taken,
    draw_choices,
    legal_steps,
    share_beyond,
)
from benchmarks.inspect_dataset import (
    collect,
    count_duplicates,
    draw,
    open_dataset,
    principal_components,
    returns_to_go,
)
from benchmarks.inspect_problems import outliers
from common.data import BUILT_IN_DISCRETE_ID, BUILT_IN_ID

SCRIPT = "benchmarks.inspect_dataset"


def inspect(*arguments):
    run = run_script(SCRIPT, *map(str, arguments))
    assert run.returncode == 0, run.stderr
    return run.stdout


def read(dataset_id):
    dataset = open_dataset(dataset_id)
    return collect(dataset), dataset


# --- Numbers ---


def test_sizes_ends_and_spread(make_dataset):
    first = random_episode(0, 4, rewards=np.array([1.0, 2.0, 3.0, 4.0]))
    end = np.array([False, True])
    second = random_episode(1, 2, rewards=np.array([-5.0, 5.0]), terminations=end, truncations=~end & end)
    scored = make_dataset(episodes=[first, second], env="Pendulum-v1", ref_min_score=-1000.0, ref_max_score=0.0)
    text = inspect(scored, "--gamma", 0.5)
    lines = [line.split() for line in text.splitlines()]
    assert "test/data-v0: 6 transitions in 2 episodes, observations of size 3, actions of size 1" in text
    assert "environment: Pendulum-v1\nreturns of scores 0 and 100: -1000 and 0\n" in text
    assert "terminations: 1; truncations: 1; duplicate transitions: 0" in text
    assert ["episode", "length", "3", "1", "2", "2.5", "3", "3.5", "4"] in lines
    assert ["episode", "return", "5", "5", "0", "2.5", "5", "7.5", "10"] in lines
    long, short = 1 + 0.5 * (2 + 0.5 * (3 + 0.5 * 4)), -5 + 0.5 * 5  # from the starts on
    inner = [f"{short + part * (long - short):.5g}" for part in (0, 0.25, 0.5, 0.75, 1)]
    assert ["discounted", "0.5", f"{(long + short) / 2:.5g}", f"{(long - short) / 2:.5g}", *inner] in lines
    rewards = [1, 2, 3, 4, -5, 5]
    assert ["reward", f"{np.mean(rewards):.5g}", f"{np.std(rewards):.5g}", "-5", "1.25", "2.5", "3.75", "5"] in lines


def test_ranges(make_dataset):
    actions = np.array([[-2.0], [2.5], [1.0], [1.9999]], np.float32)  # of which the second is beyond [-2, 2]
    episode = random_episode(0, 4, actions=actions)
    lines = [line.split() for line in inspect(make_dataset(episodes=[episode])).splitlines()]
    expected = [f"{f(actions):.5g}" for f in (np.min, np.max, np.mean, np.std)]
    assert ["action", "0", *expected, "25.00%", "75.00%", "-2", "to", "2"] in lines
    for index, column in enumerate(episode["observations"][:-1].T):  # the last one follows the last step
        expected = [f"{f(column.astype(float)):.5g}" for f in (np.min, np.max, np.mean, np.std)]
        assert ["observation", str(index), *expected] in lines


def test_nothing_is_wrong_with_the_built_in_dataset(pendulum):
    text = inspect(BUILT_IN_ID)
    assert "30,000 transitions in 150 episodes" in text
    assert "terminations: 0; truncations: 150;" in text
    assert f"{float(pendulum.episode_returns.mean()):.5g}" in text
    assert text.endswith("problems found: none\n")


def test_returns_to_go_are_the_sums_written_out(make_dataset):
    data, _ = read(make_dataset(episodes=[random_episode(0, 5), random_episode(1, 3)]))
    expected = []
    for rewards in (data.rewards[:5], data.rewards[5:]):
        for t in range(len(rewards)):
            expected.append(sum(0.9**k * reward for k, reward in enumerate(rewards[t:])))
    np.testing.assert_allclose(returns_to_go(data, 0.9), expected, rtol=1e-6)


def test_duplicates_are_counted_as_a_set_counts_them(make_dataset):
    rng = np.random.default_rng(0)
    zeros = rng.integers(0, 2, size=(2, 200, 1)) * np.array([1.0, -0.0]).reshape(2, 1, 1)
    episodes = [
        random_episode(
            0, 200, 1, observations=rng.integers(0, 3, size=(201, 1)) * 1.0, actions=actions, rewards=rewards
        )
        for actions, rewards in ((zeros[0], rng.integers(0, 2, 200)), (zeros[1], rng.integers(0, 2, 200)))
    ]
    dataset_id = make_dataset(episodes=episodes, observation_space=spaces.Box(-9, 9, (1,)))
    data, _ = read(dataset_id)
    rows = list(zip(data.observations[:, 0], data.actions[:, 0], data.rewards, strict=True))
    assert count_duplicates(data) == 400 - len({tuple(map(float, row)) for row in rows}) > 0
    assert f"{count_duplicates(data)} of the transitions" in inspect(dataset_id)


def test_share_beyond_bounds(make_dataset):
    episode = random_episode(0, 8, actions=np.linspace(-3, 4, 8, dtype=np.float32)[:, None])  # bounds are -2 and 2
    data, dataset = read(make_dataset(episodes=[episode]))
    assert share_beyond(data.actions, dataset).tolist() == [3 / 8]
    assert share_beyond(data.actions, dataset, edge=0.1).tolist() == [5 / 8]  # those at the bounds, too


def test_rounding_is_not_beyond_the_bounds(make_dataset):
    episode = random_episode(0, 2, actions=np.array([[2.0], [np.nextafter(np.float32(2), 3, dtype=np.float32)]]))
    data, dataset = read(make_dataset(episodes=[episode]))
    assert share_beyond(data.actions, dataset).tolist() == [0]


def test_outliers_are_found_and_tails_are_not():
    rng = np.random.default_rng(0)
    columns = np.column_stack([rng.normal(size=5000), rng.standard_exponential(5000), rng.normal(size=5000)])
    columns[7, 2] = -9999
    assert outliers(columns).tolist() == [False, False, True]


@pytest.mark.parametrize("beside", [(-1200,), (-9999,), (-999, -9999, 5000)])
def test_a_code_is_found_beside_others(beside):
    rng = np.random.default_rng(0)
    column = np.where(rng.random(1000) < 0.03, -999, rng.normal(20, 2, 1000))
    for code in beside:
        column[rng.random(1000) < 0.03] = code
    column[5] = beside[0]
    assert outliers(column[:, None], codes=True).tolist() == [True]


@pytest.mark.parametrize(
    "levels", [[0, 1, 2, 3, 4, 100, 200, 300], [0, 1, 10, 100, 1000, 10_000], [2, 2.5, 3, 50, 50.1, 90, 99]]
)
def test_levels_are_no_codes(levels):
    column = np.random.default_rng(0).choice(levels, 5000)
    assert outliers(column[:, None], codes=True).tolist() == [False]


@pytest.mark.parametrize("share", [0.005, 0.02, 0.2, 0.6])
def test_a_code_is_found_however_often_it_stands_there(share):
    rng = np.random.default_rng(0)
    coded = np.where(rng.random((5000, 3)) < share, -9999, rng.normal(size=(5000, 3)))
    coded[:, 1] = np.where(rng.random(5000) < share, 9999, coded[:, 1])  # beside the other
    coded[:, 2] = coded[:, 2] < -9000  # a flag has no tails
    assert outliers(coded, codes=True).tolist() == [True, True, False]


def test_observations_may_be_bits(make_dataset):
    """As training takes them."""
    observations = np.random.default_rng(0).random((31, 3)) < 0.5
    name = make_dataset(
        episodes=[random_episode(0, observations=observations)], observation_space=spaces.MultiBinary(3)
    )
    assert "observation 0              0           1" in inspect(name)


def test_principal_components_are_the_eigenvectors_of_the_covariance():
    states = np.random.default_rng(0).normal(size=(300, 4)) @ np.random.default_rng(1).normal(size=(4, 4))
    points, shares = principal_components(states)
    values, vectors = np.linalg.eigh(np.cov(states.T))  # the largest last
    np.testing.assert_allclose(shares, values[:-3:-1] / values.sum(), rtol=1e-6)
    expected = (states - states.mean(axis=0)) @ vectors[:, :-3:-1]
    np.testing.assert_allclose(np.abs(points), np.abs(expected), atol=1e-6)  # a direction has no sign


def test_one_dimension_has_one_component():
    points, shares = principal_components(np.arange(5.0)[:, None])
    assert np.ptp(points[:, 0]) == pytest.approx(4) and (points[:, 1] == 0).all()
    np.testing.assert_allclose(shares, [1, 0])


# --- Problems ---

ENDS = np.arange(30) == 29
NOWHERE = np.zeros(30, bool)
ROOM = {"observation_space": spaces.Box(-np.inf, np.inf, (3,)), "action_space": spaces.Box(-2, 2, (1,))}


def constant(array, column):
    return np.where(np.arange(array.shape[1]) == column, np.float32(0.5), array)


BASE = random_episode(0)
SENTINEL = np.where((np.arange(31) == 7)[:, None] & (np.arange(3) == 1), np.float32(-9999), BASE["observations"])
NAN = np.where(np.arange(30) == 4, np.nan, BASE["rewards"])
FAULTS = {  # the fields of one episode of four, and a line of the report
    "not a number": (
        {"rewards": NAN},
        "1 episodes cannot be used, the first being episode 4: rewards hold nan at step 4",
    ),
    "too large": (
        {"observations": BASE["observations"].astype(np.float64) * 1e300},
        "cannot be used, the first being episode 4: observations hold",
    ),
    "an end inside": ({"truncations": np.arange(30) % 10 == 9}, "2 steps inside episodes are marked as an end"),
    "no end": ({"truncations": NOWHERE}, "1 episodes end without being terminated or truncated"),
    "out of bounds": ({"actions": BASE["actions"] * 2}, "action 0: up to "),
    "a code": ({"observations": SENTINEL}, "observation 1: values far beyond all others"),
    "a huge reward": ({"rewards": np.where(ENDS, 1e6, 0.0)}, "rewards: values far beyond all others"),
    "twice": ({}, "30 of the transitions (20.0%) are duplicates of others"),
    "shorter": (random_episode(9, 20), "no episode is terminated, yet their lengths differ (20 to 30)"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_one_episode(make_dataset, name):
    fields, line = FAULTS[name]
    episodes = [random_episode(seed) for seed in range(4)] + [BASE | fields]
    assert line in inspect(make_dataset(episodes=episodes)).split("problems found: ")[1]


WRONG = {  # what the four episodes of noise have in common, and a line of the report
    "constant observation": (
        {"observations": constant(BASE["observations"], 2)},
        "observation 2: always the same value",
    ),
    "small observation": (
        {"observations": BASE["observations"] * np.float32([1, 1e-5, 1])},
        "observation 1: standard deviation below 0.001",
    ),
    "constant action": ({"actions": constant(BASE["actions"], 0)}, "action 0: always the same value"),
    "narrow actions": ({"actions": BASE["actions"] / 20}, "action 0: less than a tenth of the range is used"),
    "constant reward": ({"rewards": np.full(30, 0.25)}, "every reward is 0.25"),
    "a limit as a termination": (
        {"terminations": ENDS, "truncations": NOWHERE},
        "every episode is terminated after exactly 30 steps",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_faults_of_the_whole(make_dataset, name):
    fields, line = WRONG[name]
    text = inspect(make_dataset(episodes=[random_episode(seed) | fields for seed in range(4)]))
    assert line in text.split("problems found: ")[1]


def test_faults_of_one_action_are_its_own(make_dataset):
    """Of three: half of the second's values are out of bounds, and the third hardly moves."""
    episodes = [random_episode(seed, action_dim=3) for seed in range(4)]
    for episode in episodes:
        episode["actions"] *= np.float32([1, 1, 0.04])
        episode["actions"][::2, 1] = 3
    room = spaces.Box(-2, 2, (3,))
    found = inspect(make_dataset(episodes=episodes, action_space=room)).split("problems found: ")[1]
    assert "action 1: up to 50.00% of the values are out of bounds" in found
    assert "action 2: less than a tenth of the range is used" in found and "always" not in found


def problems_of(make_dataset, episodes, **spaces):
    return inspect(make_dataset(episodes=episodes, **spaces)).split("problems found: ")[1]


def with_last(episode, state):
    """The episode with another state after its last step."""
    return episode | {"observations": np.concatenate([episode["observations"][:-1], [state]]).astype(np.float32)}


CUTS = {  # what stands after the last step of each of twelve cut episodes of noise, and what is said of it
    "what came": (lambda episode, after: episode["observations"][-1], None),
    "a code": (lambda episode, after: [0.3, -999, 0.1], "the 12 cut episodes come observations unlike all others"),
    "zeros": (lambda episode, after: [0, 0, 0], "the 12 cut episodes come observations unlike all others"),
    "one number alike": (lambda episode, after: [episode["observations"][-1, 0], 0, 0], None),
    "the next episode": (
        lambda episode, after: after["observations"][0],
        "after 11 of 12 cuts comes the next episode's",
    ),
}


@pytest.mark.parametrize("name", CUTS)
def test_what_comes_after_a_cut_is_looked_at(make_dataset, name):
    last, said = CUTS[name]
    episodes = [random_episode(seed) for seed in range(12)]
    episodes = [
        with_last(each, last(each, after))
        for each, after in zip(episodes, [*episodes[1:], random_episode(99)], strict=True)
    ]
    found = problems_of(make_dataset, episodes)
    assert said in found if said else "cut" not in found


def test_terminated_episodes_are_not_asked_what_comes_after(make_dataset):
    ends = {"terminations": ENDS, "truncations": NOWHERE}
    episodes = [with_last(random_episode(seed), [0, 0, 0]) | ends for seed in range(12)]
    assert "cut" not in problems_of(make_dataset, episodes)


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ([30] * 4 + [*range(5, 29)], "4 of 28 episodes are terminated after exactly 30 steps, the most"),
        ([30] * 2 + [*range(5, 29)], None),  # two may be chance
        ([30] * 4 + [29] * 3 + [*range(5, 29)], None),  # others end just before, too
        ([30] * 4 + [*range(5, 29)] * 4, None),  # few of all
    ],
)
def test_many_terminations_at_the_greatest_length_may_be_a_limit(make_dataset, lengths, said):
    episodes = []
    for seed, length in enumerate(lengths):
        last = np.arange(length) == length - 1
        episodes.append(random_episode(seed, length) | {"terminations": last, "truncations": ~last & False})
    found = problems_of(make_dataset, episodes)
    assert said in found if said else "terminated after exactly" not in found


def test_where_some_are_cut_at_the_greatest_length_terminations_there_are_no_limit(make_dataset):
    ended = [random_episode(seed) | {"terminations": ENDS, "truncations": NOWHERE} for seed in range(2)]
    assert "terminated after" not in problems_of(make_dataset, [*ended, random_episode(2), random_episode(3)])


@pytest.mark.parametrize("others", [NOWHERE, ENDS])
def test_limits_that_are_terminations_too(make_dataset, others):
    both = [random_episode(seed) | {"terminations": ENDS} for seed in range(3)]
    others = [random_episode(seed, 20 + seed) for seed in range(3, 6)] if others is ENDS else []
    said = "all 3 truncated episodes are terminated, too"
    assert (said in problems_of(make_dataset, both + others)) == (not others)


def test_a_code_among_actions_whose_bounds_are_the_datas_own(make_dataset):
    episodes = [random_episode(seed, actions=np.random.default_rng(seed).uniform(0, 4, (30, 1))) for seed in range(8)]
    episodes[3]["actions"][7] = -999
    space = spaces.Box(-999, 4, (1,), np.float64)
    assert "action 0: values far beyond all others" in problems_of(make_dataset, episodes, action_space=space)


def test_noise_has_no_problems_but_the_size_of_its_rewards(make_dataset):
    episodes = [random_episode(seed) for seed in range(4)]
    assert "found: 1\n1. from the worst to the best return it is 11.4\n" in inspect(make_dataset(episodes=episodes))
    for episode in episodes:
        episode["rewards"] = 20 * episode["rewards"]
    assert inspect(make_dataset("test/larger-v0", episodes)).endswith("found: none\n")
    for episode in episodes:
        episode["rewards"] = 1000 * episode["rewards"]
    assert "from the worst to the best return it is 2.28e+05\n" in inspect(make_dataset("test/huge-v0", episodes))


def test_ends_that_repeat_are_seen(make_dataset):
    """As antmaze's data has them: the goal is reached, and the rows after it are ends, too."""
    single = random_episode(7, 1, terminations=np.array([True]), truncations=np.array([False]))
    text = inspect(make_dataset(episodes=[random_episode(seed) for seed in range(4)] + [single] * 3))
    assert "3 of 7 episodes are a single step that terminates" in text.split("problems found: ")[1]
    text = inspect(make_dataset("test/bandit-v0", episodes=[single] * 4))
    assert "are a single step" not in text


def test_two_values_far_from_0_are_not_one(make_dataset):
    """20,000,000 and one more are the same number in float32."""
    space = {"observation_space": spaces.Box(-np.inf, np.inf, (3,), np.float64)}
    episodes = [random_episode(seed) for seed in range(4)]
    for episode in episodes:
        episode["observations"] = episode["observations"].astype(np.float64)
        episode["observations"][:, 1] = 20_000_000 + np.arange(31) % 2
        episode["rewards"] = 20 * episode["rewards"]
    text = inspect(make_dataset(episodes=episodes, **space))
    assert text.endswith("found: none\n")
    assert float(next(line for line in text.splitlines() if line.startswith("observation 1")).split()[5]) > 0.4  # std


def test_one_episode(make_dataset):
    assert "1. there is one episode only\n   -> mark where" in inspect(make_dataset(episodes=[random_episode(0)]))


def test_an_episode_of_no_steps_cannot_be_used(make_dataset, datasets_path):
    path = datasets_path / make_dataset() / "data" / "main_data.hdf5"
    with h5py.File(path, "a") as file:
        for name, values in file["episode_1"].items():
            if isinstance(values, h5py.Dataset):
                kept = values[: 1 if name == "observations" else 0]
                del file["episode_1"][name]
                file["episode_1"][name] = kept
    text = inspect("test/data-v0")
    assert "90 transitions in 3 episodes" in text and "the first being episode 1: no steps" in text


def test_episodes_that_cannot_be_used_are_left_out_of_the_numbers(make_dataset):
    kept, broken = random_episode(1), random_episode(0, rewards=NAN)
    lines = inspect(make_dataset(episodes=[kept, broken])).splitlines()
    assert "30 transitions in 1 episodes" in lines[0]
    assert any(line.startswith("reward") and f"{kept['rewards'].mean():.5g}" in line for line in lines)


def test_actions_without_bounds_are_refused_by_training_and_explained_here(make_dataset):
    unbounded = spaces.Box(-np.inf, np.inf, (1,))
    dataset_id = make_dataset(episodes=[random_episode(0), random_episode(1)], action_space=unbounded)
    assert run_script("bc", "--dataset-id", dataset_id).returncode == 2
    text = inspect(dataset_id)
    actions = np.concatenate([random_episode(seed)["actions"] for seed in range(2)])
    assert "action 0 without finite bounds" in text
    assert f"the data fill Box([{actions.min():.4g}], [{actions.max():.4g}])" in text
    assert "0.00%       0.00%  -inf to inf" in text


def test_more_steps_than_the_metadata_says(make_dataset, datasets_path):
    path = datasets_path / make_dataset() / "data" / "metadata.json"
    path.write_text(path.read_text().replace('"total_steps": 120', '"total_steps": 100'))
    assert "120 steps, of which its metadata says 100" in inspect("test/data-v0")


# --- Discrete actions ---


def discrete(*actions, masks=None, **fields):
    """An episode of these actions, in which `masks` [steps + 1, C], if given, say which were legal."""
    episode = random_episode(len(actions), len(actions), actions=np.array(actions), **fields)
    if masks is not None:
        episode["observations"] = {"action_mask": np.array(masks, np.int8), "x": episode["observations"]}
    return episode


def mask_space(size):
    x = spaces.Box(-np.inf, np.inf, (3,))
    return {"observation_space": spaces.Dict({"action_mask": spaces.MultiBinary(size), "x": x})}


def cells(text):
    return [line.split() for line in text.splitlines()]


def found(text):
    return text.split("problems found: ")[1]


def test_discrete_actions_are_counted(make_dataset):
    """Three actions from 5 on; nobody takes 6."""
    episodes = [discrete(5, 7, 7, 7), discrete(7, 5, 7, 7)]
    dataset_id = make_dataset(episodes=episodes, action_space=spaces.Discrete(3, start=5))
    data, dataset = read(dataset_id)
    assert data.actions.tolist() == [0, 2, 2, 2, 2, 0, 2, 2]
    assert count_taken(data.actions, dataset).tolist() == [2, 0, 6]
    text = inspect(dataset_id)
    assert "8 transitions in 2 episodes, observations of size 3, 3 actions\n" in text
    for line in (["5", "2", "25.00%"], ["6", "0", "0.00%"], ["7", "6", "75.00%"], ["action", "steps", "share"]):
        assert line in cells(text)
    assert "action 6: never taken\n" in found(text)
    assert "beyond" not in text and "propensities" not in text and "legal" not in text


def test_columns_of_vectors_have_their_names(make_dataset, datasets_path):
    episodes = [random_episode(seed, actions=constant(BASE["actions"], 0)) for seed in range(4)]
    for episode in episodes:
        episode["observations"][:, 1] = 7
    dataset_id = make_dataset(episodes=episodes)
    path = datasets_path / dataset_id / "data" / "metadata.json"
    known = {"observation_names": ["obs_inside", "obs_age", "2"], "action_names": ["dose", "heat"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | known))
    text = inspect(dataset_id)
    assert "observation 1 (obs_age): always the same value" in text
    assert "action 0 (dose): always the same value" in text


def test_discrete_actions_have_their_names(make_dataset, datasets_path, tmp_path):
    names = ["wait", "a long name, of $\\what$ is done", "2"]
    dataset_id = make_dataset(episodes=[discrete(0, 0, 2, 2)], action_space=spaces.Discrete(3))
    path = datasets_path / dataset_id / "data" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"action_names": names}))
    text = inspect(dataset_id)
    assert ["0", "wait", "2", "50.00%"] in cells(text) and ["2", "2", "50.00%"] in cells(text)
    assert "action 1 a long name, of $\\what$ is done: never taken" in found(text)
    columns = [line.rindex("%") for line in text.splitlines() if line.endswith("%")]
    assert len(columns) == 3 and len(set(columns)) == 1  # right below one another
    inspect(dataset_id, "--out", tmp_path / "page.png")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"action_names": names[:2]}))  # of something else
    assert "action 1: never taken" in inspect(dataset_id)


def test_nothing_is_wrong_with_the_built_in_dataset_of_discrete_actions(cartpole):
    text = inspect(BUILT_IN_DISCRETE_ID)
    counts = cartpole.transitions.actions.bincount()
    total = int(counts.sum())
    for action in range(2):
        assert [str(action), f"{counts[action]:,}", f"{counts[action] / total:.2%}"] in cells(text)
    assert found(text).startswith("1\n1. every reward is 1\n")


def test_an_action_that_is_rarely_taken(make_dataset):
    """Of 300 steps 2 are fewer than 1 %, 3 are not."""
    for count in (2, 3):
        actions = np.where(np.arange(300) < count, 1, 0)
        dataset_id = make_dataset(f"test/rare{count}-v0", [discrete(*actions)], action_space=spaces.Discrete(2))
        line = "action 1: taken in fewer than 1% of the steps\n"
        assert (line in inspect(dataset_id)) == (count == 2)


def test_always_the_same_discrete_action(make_dataset):
    text = inspect(make_dataset(episodes=[discrete(2, 2, 2)] * 2, action_space=spaces.Discrete(3)))
    assert "action 2: always taken\n" in found(text) and "never taken" not in text


MASKS = [  # of the actions 0 to 3 below; 3 is never legal
    [1, 1, 0, 0],
    [1, 1, 1, 0],
    [1, 0, 0, 0],
    [1, 1, 0, 0],
    [1, 0, 1, 0],
]


def test_legal_actions(make_dataset):
    """2 is legal once and never taken; the last mask is of a state in which nobody acts."""
    episode = discrete(0, 1, 0, 0, masks=MASKS)
    dataset_id = make_dataset(episodes=[episode], action_space=spaces.Discrete(4), **mask_space(4))
    data, dataset = read(dataset_id)
    expected = np.array(MASKS)[:-1].sum(axis=0)
    assert legal_steps(data.observations, dataset).tolist() == expected.tolist() == [4, 3, 1, 0]
    text = inspect(dataset_id)
    assert ["action", "steps", "share", "legal", "taken", "then"] in cells(text)
    assert ["1", "1", "25.00%", "75.00%", "33.33%"] in cells(text)
    assert ["3", "0", "0.00%", "0.00%", "0.00%"] in cells(text)
    assert "legal actions: 2.00 of 4 in a state on average" in text  # (2 + 3 + 1 + 2) / 4
    assert "action 2: legal, and never taken\n" in found(text)
    assert "action 3: never legal\n" in found(text)


def test_a_masks_columns_are_no_observations(make_dataset):
    """Its first entry is always 1, its last one is once: neither a constant nor an outlier, nor a line of the table."""
    masks = np.ones((401, 3), np.int8)
    masks[:, 2] = np.arange(401) == 7
    actions = np.where(np.arange(400) == 7, 2, np.arange(400) % 2)
    episodes = [discrete(*actions, masks=masks)]
    text = inspect(make_dataset(episodes=episodes, action_space=spaces.Discrete(3), **mask_space(3)))
    assert "observation" not in found(text)
    assert [line[:2] for line in cells(text) if line[:1] == ["observation"]] == [
        ["observation", f"{i}"] for i in (3, 4, 5)
    ]
    assert "fewer than" not in text  # whenever action 2 was legal, it was taken


def test_a_mask_that_training_refuses(make_dataset):
    forbidding = discrete(0, 2, 2, 0, masks=MASKS)  # the second 2 is not legal
    text = inspect(make_dataset(episodes=[forbidding], action_space=spaces.Discrete(4), **mask_space(4)))
    line = "training refuses the dataset: action_mask forbids the action that was taken in 1 steps"
    assert line in found(text)


@pytest.mark.parametrize("terminated", [True, False])
def test_a_last_state_in_which_nothing_is_legal_must_be_an_end(make_dataset, terminated):
    episodes = [
        discrete(0, 1, masks=[*MASKS[:2], [0, 0, 0, 0]], terminations=np.array([False, terminated])),
        discrete(0, 1, masks=MASKS[:3]),
    ]
    text = inspect(make_dataset(episodes=episodes, action_space=spaces.Discrete(4), **mask_space(4)))
    line = "1 episodes cannot be used, the first being episode 0: action_mask forbids all after its last step"
    assert (line in found(text)) is not terminated


@pytest.mark.parametrize("value", [3.5, 7, -1])
def test_discrete_actions_that_are_none(make_dataset, datasets_path, value):
    dataset_id = make_dataset(episodes=[discrete(0, 1, 2), discrete(1, 2, 0)], action_space=spaces.Discrete(4))
    with h5py.File(datasets_path / dataset_id / "data" / "main_data.hdf5", "a") as file:
        del file["episode_1"]["actions"]
        file["episode_1"]["actions"] = np.array([1, value, 0])
    rule = f"episode 1: actions hold {value:g} at step 1, which is not a whole number from 0 to 3"
    assert f"1 episodes cannot be used, the first being {rule}" in found(inspect(dataset_id))
    trained = run_script("fqi", "--dataset-id", dataset_id)
    assert trained.returncode == 2 and "not a whole number from 0 to 3" in trained.stderr


def test_a_row_of_vectors_where_actions_are_discrete(make_dataset, datasets_path):
    dataset_id = make_dataset(episodes=[discrete(0, 1), discrete(1, 0)], action_space=spaces.Discrete(2))
    with h5py.File(datasets_path / dataset_id / "data" / "main_data.hdf5", "a") as file:
        del file["episode_1"]["actions"]
        file["episode_1"]["actions"] = np.zeros((2, 1))
    assert "actions of shape (2, 1) where its 2 rewards ask for (2,)" in found(inspect(dataset_id))


def test_a_thousand_actions_are_not_all_listed(make_dataset, tmp_path):
    """The hundred that were taken most, by number; the picture has these, too."""
    actions = np.repeat(np.arange(0, 1000, 5), 2)[::-1]
    dataset_id = make_dataset(episodes=[discrete(*actions, 995)], action_space=spaces.Discrete(1000))
    text = inspect(dataset_id, "--out", tmp_path / "page.png")
    assert ["995", "3", f"{3 / 401:.2%}"] in cells(text)
    assert f"and 900 others, taken in {200 / 401:.2%} of the steps" in text
    assert "action 1, 2, 3, 4, 6, 7, 8, 9, 11, 12, ...: never taken" in found(text)
    picture(tmp_path / "page.png")


@pytest.mark.parametrize("masks", [None, MASKS])
def test_bars_of_discrete_actions(make_dataset, tmp_path, masks):
    kinds = {"action_space": spaces.Discrete(4)} | (mask_space(4) if masks else {})
    dataset_id = make_dataset(episodes=[discrete(0, 1, 0, 0, masks=masks)], **kinds)
    data, dataset = read(dataset_id)
    axes = Figure().subplots()
    draw_choices(axes, data.actions, data.observations, dataset)
    widths = [bar.get_width() for bar in axes.patches]
    assert widths[-4:] == [0.75, 0.25, 0, 0]
    assert widths[:-4] == ([1, 0.75, 0.25, 0] if masks else [])
    inspect(dataset_id, "--out", tmp_path / "page.png")
    picture(tmp_path / "page.png")


# --- Logged probabilities ---


def test_logged_probabilities(make_dataset):
    """[T + 1] with nan at the last. Of vectors they are densities."""
    logs = np.log([0.5, 0.25, 0.75, np.nan])
    kinds = {"action_space": spaces.Discrete(3)}
    both = [discrete(0, 1, 2, infos={"log_prob": logs}), discrete(0, 1, 2, infos={"log_prob": logs + np.log(0.5)})]
    text = inspect(make_dataset(episodes=both, **kinds))
    assert "\npropensities: logged for each step, the smallest 0.125\n" in text
    holes = [both[0], discrete(0, 1, 2, infos={"log_prob": np.array([np.nan, -np.inf, -1, np.nan])})]
    text = inspect(make_dataset("test/holes-v0", holes, **kinds))
    assert "\npropensities: logged for 5 of the steps, the smallest 0\n" in text
    vectors = [random_episode(0, infos={"log_prob": np.append(np.linspace(-3.25, 2, 30), np.nan)})]
    text = inspect(make_dataset("test/vectors-v0", vectors))
    assert "\npropensities: logged for each step, the smallest -3.25 (log density)\n" in text


@pytest.mark.parametrize("log_prob", [np.zeros((4, 2)), np.array([b"a", b"b", b"c", b"d"])])
def test_logged_probabilities_that_are_none_refuse_nothing(make_dataset, log_prob):
    episodes = [discrete(0, 1, 2, infos={"log_prob": log_prob})]
    text = inspect(make_dataset(episodes=episodes, action_space=spaces.Discrete(3)))
    assert "3 transitions in 1 episodes" in text and "propensities" not in text


# --- The picture ---


def picture(path):
    pixels = imread(path)
    assert pixels.shape[0] > 500 and pixels.shape[1] > 500
    assert pixels[..., :3].std() > 0.05  # an empty page is white
    return pixels


def test_picture(make_dataset, tmp_path):
    many = [random_episode(seed, action_dim=7) for seed in range(4)]
    sizes = {"action_space": spaces.Box(-2, 2, (7,))}
    few = [random_episode(seed, observation_dim=1) for seed in range(4)]
    pages = []
    for episodes, kinds in ((many, sizes), (few, {"observation_space": spaces.Box(-9, 9, (1,))})):
        out = tmp_path / f"{len(pages)}.PNG"
        text = inspect(make_dataset(f"test/shown{len(pages)}-v0", episodes, **kinds), "--out", out)
        assert text.endswith(f"picture: {out}\n")
        pages.append(picture(out))
    assert (pages[0] != pages[1]).any()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.PNG", "1.PNG"]


def test_picture_of_actions_far_from_0(make_dataset, tmp_path):
    """As of a pressure in pascal that is set to 101325, a hair more or less."""
    actions = 101_325 + np.random.default_rng(0).uniform(-0.1, 0.1, (20, 2)).astype(np.float32)
    space = spaces.Box(np.float32(101_324), np.float32(101_326), (2,))
    dataset_id = make_dataset(episodes=[random_episode(0, 20, actions=actions)], action_space=space)
    inspect(dataset_id, "--out", tmp_path / "page.png")
    picture(tmp_path / "page.png")


def test_the_pictures_states_are_normalised_and_have_their_own_returns(make_dataset, tmp_path, monkeypatch):
    episodes = [random_episode(seed) for seed in range(4)]
    for episode in episodes:
        episode["observations"] *= np.float32([1, 100, 0.01])
    data, dataset = read(make_dataset(episodes=episodes))
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    draw(data, dataset, 0.9, tmp_path / "page.png")
    (dots,) = next(axes for axes in drawn[0].axes if axes.get_title() == "120 states").collections
    std = data.observations.std(axis=0, dtype=np.float64) + 1e-3
    points, _ = principal_components(data.observations / std)
    expected = np.column_stack([np.abs(points), returns_to_go(data, 0.9)])  # a direction has no sign
    shown = np.column_stack([np.abs(dots.get_offsets()), dots.get_array()])
    by_return = (rows[np.argsort(rows[:, 2])] for rows in (shown, expected))
    np.testing.assert_allclose(*by_return, atol=1e-4)


# --- Bad input ---

BAD = {
    "unknown built-in id": (["anchorl/none-v0"], BUILT_IN_ID),
    "no id": (["nonsense"], "no dataset 'nonsense'"),
    "a file": (["absent.hdf5"], "or make one of a file: python -m benchmarks.import_logs"),
    "a suffix": ([BUILT_IN_ID, "--out", "page.jpg"], "--out page.jpg: must end with .png"),
    "no folder": ([BUILT_IN_ID, "--out", "absent/page.png"], "there is no folder absent"),
    "discount": ([BUILT_IN_ID, "--gamma", "1.5"], "--gamma 1.5: must be in [0, 1]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, pendulum, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD[name]
    run = run_script(SCRIPT, *arguments)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert run.stderr.startswith("error: ") and message in run.stderr
    assert not list(tmp_path.iterdir())


def test_no_dataset_named():
    run = run_script(SCRIPT)
    assert (run.returncode, run.stdout) == (2, "") and "--help" in run.stderr


def test_data_that_leaves_nothing_to_report(make_dataset, datasets_path, tmp_path):
    out = tmp_path / "page.png"
    images = {"observation_space": spaces.Box(0, 255, (8, 8, 3), np.uint8)}
    dataset_ids = [
        make_dataset("test/nan-v0", [random_episode(0, rewards=np.full(30, np.nan))]),
        make_dataset("test/image-v0", [random_episode(0, observations=np.zeros((31, 8, 8, 3), np.uint8))], **images),
        make_dataset("test/damaged-v0"),
    ]
    with h5py.File(datasets_path / "test/damaged-v0" / "data" / "main_data.hdf5", "a") as file:
        del file["episode_2"]["rewards"]
    dataset_ids += [make_dataset(f"test/{name}-v0") for name in ("group", "text")]
    for name, field, values in (("group", "actions", None), ("text", "rewards", np.array([b"x"] * 30))):
        with h5py.File(datasets_path / f"test/{name}-v0" / "data" / "main_data.hdf5", "a") as file:
            del file["episode_1"][field]
            file["episode_1"].create_group(field) if values is None else file["episode_1"].create_dataset(
                field, data=values
            )
    messages = "empty; episode 0: rewards hold nan", "no images", "cannot read dataset test/damaged-v0"
    messages += "cannot read dataset test/group-v0: ", "test/text-v0, episode 1: "
    for dataset_id, message in zip(dataset_ids, messages, strict=True):
        run = run_script(SCRIPT, dataset_id, "--out", str(out))
        assert (run.returncode, run.stderr.count("\n"), out.exists()) == (2, 1, False)
        assert message in run.stderr
