"""Episodes held out of training: which ones, that nothing is learned from them, and what is measured on them."""

import copy
import csv
import importlib
import json

import bc
import gymnasium as gym
import iql
import numpy as np
import pytest
import torch
from conftest import (
    ALGORITHMS,
    DISCRETE,
    SHORTER,
    assert_one_line,
    assert_same,
    assert_same_runs,
    checkpoint,
    random_episode,
    run_script,
)

from common.command_line import BadInput
from common.data import ReplayBuffer, hold_out, load_dataset
from common.experiment import Run
from common.optim import Adam

CPU = torch.device("cpu")
TINY = ["--hidden-dims", "8", "--batch-size", "8", "--eval-episodes", "1", "--final-eval-episodes", "1"]


def numbered(count=8, length=5, **fields):
    """Episodes whose rewards are their number."""
    return [random_episode(i, length, rewards=np.full(length, float(i)), **fields) for i in range(count)]


def held(dataset_id, fraction=0.25, **others):
    dataset = load_dataset(dataset_id)
    return hold_out(dataset, bc.Args(validation_fraction=fraction, **others))


def numbers(buffer):
    return sorted({*buffer.transitions.rewards.tolist()})


# --- Which episodes ---


def test_holds_out_whole_episodes(make_dataset):
    buffer = ReplayBuffer(held(make_dataset(episodes=numbered())), CPU)
    assert buffer.episode_lengths.tolist() == [5] * 6 and buffer.validation.episode_lengths.tolist() == [5] * 2
    assert not {*numbers(buffer)} & {*numbers(buffer.validation)}
    assert sorted(numbers(buffer) + numbers(buffer.validation)) == list(range(8))
    assert buffer.storage.shape[0] == 30 and buffer.validation.validation is None
    drawn = buffer.sample(2000).rewards.tolist()
    assert {*drawn} == {*numbers(buffer)}


def test_the_episodes_depend_on_the_validation_seed_alone(make_dataset):
    dataset_id = make_dataset(episodes=numbered())
    chosen = {seed: held(dataset_id, validation_seed=seed).held_out.kept for seed in range(6)}
    assert len({*chosen.values()}) > 1
    assert all(held(dataset_id, validation_seed=2, seed=seed).held_out.kept == chosen[2] for seed in range(4))


def test_without_a_fraction_nothing_is_held_out(make_dataset):
    dataset = held(make_dataset(episodes=numbered()), 0.0)
    assert (dataset.held_out, dataset.kept) == (None, None)
    assert ReplayBuffer(dataset, CPU).validation is None


@pytest.mark.parametrize(("fraction", "count"), [(0.01, 1), (0.125, 1), (0.126, 2), (0.5, 4), (0.87, 7)])
def test_the_fraction_is_of_the_episodes_rounded_up(make_dataset, fraction, count):
    dataset = held(make_dataset(episodes=numbered()), fraction)
    assert len(dataset.held_out.kept) == count and len(dataset.kept) == 8 - count


@pytest.mark.parametrize(
    ("fraction", "rule"),
    [
        ("1.5", r"must be in \[0, 1\]"),
        ("-0.1", r"must be in \[0, 1\]"),
        ("nan", "must be finite"),
        ("1.0", "leaves none of 150"),
    ],
)
def test_refuses_what_is_no_fraction(fraction, rule, tmp_path):
    run = run_script("bc", "--validation-fraction", fraction, "--run-dir", str(tmp_path / "run"))
    assert_one_line(run, f"--validation-fraction {fraction}: {rule}")


def test_an_episode_is_left_to_learn_from(make_dataset, tmp_path):
    dataset_id = make_dataset(episodes=numbered(2))
    assert len(held(dataset_id, 0.5).kept) == 1
    run = run_script(
        "bc", "--dataset-id", dataset_id, "--validation-fraction", "0.6", "--run-dir", str(tmp_path / "run")
    )
    assert_one_line(run, "--validation-fraction 0.6: leaves none of 2 episodes to learn from")


@pytest.mark.parametrize(("algorithm", "words"), [("sac", []), ("mbpo", []), ("fqe", ["--policy-run-dir", "none"])])
def test_scripts_that_hold_nothing_out_refuse_it(algorithm, words, tmp_path):
    run = run_script(algorithm, *words, "--validation-fraction", "0.1", "--run-dir", str(tmp_path / "run"))
    assert_one_line(run, "--validation-fraction 0.1: ")


# --- The buffer of them ---


@pytest.mark.parametrize("offset", [0.0, 1e9])
def test_held_out_episodes_are_normalised_by_the_others(make_dataset, offset):
    """Far from zero, too: a column of Unix seconds."""
    space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    episodes = numbered()
    for i, episode in enumerate(episodes):
        episode["observations"] = episode["observations"].astype(np.float64) + np.array([offset, 0, 10 * i])
    buffer = ReplayBuffer(held(make_dataset(episodes=episodes, observation_space=space)), CPU)
    kept = np.concatenate([episodes[int(i)]["observations"][:-1] for i in numbers(buffer)])
    mean, std = kept.mean(axis=0), kept.std(axis=0) + 1e-3
    others = [episodes[int(i)]["observations"] for i in numbers(buffer.validation)]
    now, then = ((np.concatenate([each[part] for each in others]) - mean) / std for part in (np.s_[:-1], np.s_[1:]))
    np.testing.assert_allclose(buffer.validation.transitions.observations, now, atol=1e-4)
    np.testing.assert_allclose(buffer.validation.transitions.next_observations, then, atol=1e-4)
    np.testing.assert_allclose(buffer.normalization, [mean, std], rtol=1e-6, atol=1e-6)


def test_without_normalisation_they_stay_as_they_are(make_dataset):
    episodes = numbered()
    buffer = ReplayBuffer(held(make_dataset(episodes=episodes)), CPU, False)
    expected = np.concatenate([episodes[int(i)]["observations"][:-1] for i in numbers(buffer.validation)])
    np.testing.assert_array_equal(buffer.validation.transitions.observations, expected)


def test_rewards_are_scaled_as_those_of_the_others(make_dataset):
    buffer = ReplayBuffer(held(make_dataset(episodes=numbered())), CPU)
    before, returns = numbers(buffer.validation), [5 * number for number in numbers(buffer)]
    buffer.scale_rewards("return-range", 2.0)
    scale = 1000 / (max(returns) - min(returns))
    assert numbers(buffer.validation) == pytest.approx([scale * (number + 2) for number in before])


@pytest.mark.parametrize("algorithm", ["awr", "rebrac", "cal_ql"])
def test_held_out_batches_have_their_own_returns_and_next_actions(algorithm, make_dataset, tmp_path, monkeypatch):
    """Of episodes cut after five steps with their number as the reward, which then goes on for ever."""
    script, made = importlib.import_module(algorithm), []

    def make(args, buffer, learner, update, make_batch, *rest):
        made.extend([buffer.validation, make_batch, learner])
        return Run(args, buffer, learner, update, make_batch, *rest)

    monkeypatch.setattr(script, "Run", make)
    dataset_id = make_dataset(episodes=numbered())
    words = ["--dataset-id", dataset_id, "--validation-fraction", "0.25", "--gamma", "0.5"]
    words += [*TINY, *SHORTER.get(algorithm, []), "--num-updates", "1", "--run-dir", str(tmp_path / "run")]
    run = run_script(algorithm, *words)
    assert run.returncode == 0, run.stderr
    held_out, make_batch, learner = made
    batch = make_batch(held_out, torch.arange(10))
    rewards, actions = held_out.transitions.rewards, held_out.transitions.actions
    if algorithm == "rebrac":
        inside = torch.arange(10) % 5 < 4
        assert torch.equal(batch.next_actions[inside], actions.roll(-1, dims=0)[inside])
        assert batch.next_actions[~inside].isnan().all()
    elif algorithm == "cal_ql":
        torch.testing.assert_close(batch.returns, 2 * rewards)
    else:
        torch.testing.assert_close(rewards, 0.5 * ReplayBuffer(held(dataset_id), CPU).validation.transitions.rewards)
        with torch.no_grad():  # of the last steps
            expected = rewards[4::5] + 0.5 * learner.target_value(held_out.transitions.next_observations[4::5])
        torch.testing.assert_close(batch.returns[4::5], expected)


# --- What a run measures ---


def iql_run(dataset_id, folder):
    args = iql.Args(validation_fraction=0.25, run_dir=folder, hidden_dims=(8,), batch_size=4, num_updates=9)
    args.seed, args.validation_seed = 1, 2
    torch.manual_seed(0)
    buffer = ReplayBuffer(hold_out(load_dataset(dataset_id), args), CPU)
    learner = iql.build(buffer.observation_dim, buffer.action_dim, args, CPU, Adam)
    return Run(args, buffer, learner, iql.update)


def test_metrics_are_the_losses_on_held_out_transitions_and_change_nothing(make_dataset, tmp_path):
    run = iql_run(make_dataset(episodes=numbered()), tmp_path / "run")
    for step in (1, 2, 3):
        iql.update(run.learner, iql.Batch(*run.buffer.sample(4)), step, run.args)
    before = copy.deepcopy({name: part.state_dict() for name, part in run.parts.items()})
    state = torch.get_rng_state()
    found, again = run._validate(), run._validate()
    assert torch.equal(torch.get_rng_state(), state)
    assert_same({name: part.state_dict() for name, part in run.parts.items()}, before)  # targets and optimiser, too
    assert all(weight.grad is None for weight in run.learner.critic.parameters())
    torch.manual_seed(run.args.validation_seed)
    batch = run.buffer.validation.sample(8 * 4)
    _, expected = iql.total_loss(run.learner, iql.Batch(*batch), run.args)
    assert found.keys() == again.keys() == {f"validation/{name}" for name in expected}
    for name, value in expected.items():
        torch.testing.assert_close(found[f"validation/{name}"], value)
        assert found[f"validation/{name}"] == again[f"validation/{name}"]  # the same transitions every time
    run.lock.release()


def test_validation_teaches_nothing(make_dataset, tmp_path):
    """The weights are those of a run that has the kept episodes alone, however often the others are looked at."""
    episodes = numbered()
    dataset_id = make_dataset(episodes=episodes)
    kept = held(dataset_id).kept
    alone = make_dataset("test/alone-v0", [episodes[i] for i in sorted(kept)])
    words = ["--num-updates", "6", *TINY, "--run-dir"]
    for algorithm in ("bc", "iql"):
        folders = [tmp_path / f"{algorithm}-{name}" for name in ("with", "alone")]
        validation = ["--dataset-id", dataset_id, "--validation-fraction", "0.25", "--eval-every", "1"]
        assert run_script(algorithm, *validation, *words, str(folders[0])).returncode == 0
        assert run_script(algorithm, "--dataset-id", alone, *words, str(folders[1])).returncode == 0
        for key in ("learner", "random_state"):
            assert_same(checkpoint(folders[0])[key], checkpoint(folders[1])[key])


def test_resumes_to_the_same_bits(tmp_path):
    words = ["--validation-fraction", "0.1", "--eval-every", "2", "--checkpoint-every", "3", *TINY]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_script("td3_bc", *words, "--num-updates", "7", "--run-dir", str(whole)).returncode == 0
    assert run_script("td3_bc", *words, "--num-updates", "4", "--run-dir", str(cut)).returncode == 0
    run = run_script("td3_bc", *words, "--num-updates", "7", "--run-dir", str(cut), "--resume")
    assert run.returncode == 0, run.stderr
    assert_same_runs(whole, cut)
    assert json.loads((cut / "args.json").read_text())["validation_fraction"] == 0.1
    for name, value in (("fraction", "0.2"), ("seed", "1")):
        words[:4] = f"--validation-{name}", value, "--eval-every", "2"
        more = [] if name == "fraction" else ["--validation-fraction", "0.1"]
        run = run_script("td3_bc", *words, *more, "--num-updates", "7", "--run-dir", str(cut), "--resume")
        assert_one_line(run, f"validation_{name} is .* in it, not {value}")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_script_measures_its_losses(algorithm, tmp_path):
    words = ["--validation-fraction", "0.1", "--num-updates", "2", "--log-every", "1", "--eval-every", "2", *TINY]
    run = run_script(algorithm, *words, *SHORTER.get(algorithm, ()), "--run-dir", str(tmp_path))
    assert run.returncode == 0, run.stderr
    *_, first, last = csv.DictReader((tmp_path / "metrics.csv").open())  # after those of a model's epochs
    losses = [name for name in importlib.import_module(algorithm).__dict__ if name.endswith("_loss")]
    columns = [name for name in last if name.endswith("/loss") and not name.startswith(("validation/", "dynamics/"))]
    assert losses and columns
    for name in columns:
        assert first[f"validation/{name}"] == ""  # only when evaluating
        assert np.isfinite(float(last[f"validation/{name}"])), name
    assert (algorithm in DISCRETE) == (checkpoint(tmp_path)["arguments"]["dataset_id"].startswith("anchorl/cartpole"))


@pytest.mark.slow
def test_works_with_compile(tmp_path):
    words = ["--validation-fraction", "0.1", "--num-updates", "4", "--eval-every", "2", *TINY]
    rows = []
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        run = run_script("bc", *words, *more, "--run-dir", str(tmp_path / name))
        assert run.returncode == 0, run.stderr
        rows.append(
            [float(row["validation/actor/loss"]) for row in csv.DictReader((tmp_path / name / "metrics.csv").open())]
        )
    assert len(rows[0]) == 2
    np.testing.assert_allclose(*rows, rtol=1e-4)


# --- Legal actions ---

MASK = np.array([[1, 1, 0], [1, 0, 1], [1, 1, 1], [0, 1, 1]], np.int8)


def masked_dataset(make_dataset, actions, other="age", **values):
    """Four steps, whose masks are those of MASK; one of the keys sorts before action_mask, and one after it."""
    observations = {
        "action_mask": np.vstack([MASK, MASK[:1]]),
        "aa": np.full((5, 1), 7.0),
        other: np.arange(5.0)[:, None],
    }
    boxes = {name: gym.spaces.Box(-np.inf, np.inf, (1,), np.float64) for name in ("aa", other)}
    space = gym.spaces.Dict(boxes | {"action_mask": gym.spaces.MultiBinary(3)})
    episode = random_episode(0, 4, actions=np.array(actions), observations=observations)
    actions = gym.spaces.Discrete(3, start=1)
    return make_dataset(episodes=[episode], observation_space=space, action_space=actions, **values)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("other", ["age", "zeal", "Z", "0"])
def test_a_mask_comes_first_and_is_not_normalised(make_dataset, other, normalize):
    dataset = load_dataset(masked_dataset(make_dataset, [1, 3, 2, 2], other), discrete=True)
    assert dataset.observation_names[:3] == [f"action_mask/{index}" for index in range(3)]
    buffer = ReplayBuffer(dataset, CPU, normalize)
    assert buffer.num_legal == buffer.num_actions == 3
    np.testing.assert_array_equal(buffer.transitions.observations[:, :3], MASK)
    np.testing.assert_array_equal(buffer.transitions.next_observations[:, :3], np.vstack([MASK[1:], MASK[:1]]))
    assert buffer.normalization[:, :3].tolist() == [[0, 0, 0], [1, 1, 1]]
    column = dataset.observation_names.index(f"{other}/0")
    expected = np.arange(4.0)
    expected = (expected - expected.mean()) / (expected.std() + 1e-3) if normalize else expected
    np.testing.assert_allclose(buffer.transitions.observations[:, column], expected, atol=1e-6)


@pytest.mark.parametrize(("nested", "size"), [(False, 2), (True, 3)])
def test_a_mask_that_cannot_be_obeyed_is_refused(make_dataset, nested, size):
    """Of another size than the actions, or inside another part: it would pass for an observation, in silence."""
    space = gym.spaces.Dict({"action_mask": gym.spaces.MultiBinary(size)})
    observations = {"action_mask": np.ones((3, size), np.int8)}
    if nested:
        space, observations = gym.spaces.Dict({"a": space}), {"a": observations}
    episode = random_episode(0, 2, actions=np.array([2, 0]), observations=observations)
    dataset_id = make_dataset(episodes=[episode], observation_space=space, action_space=gym.spaces.Discrete(3))
    with pytest.raises(BadInput, match=r"action_mask must be .* a number for each action"):
        load_dataset(dataset_id, discrete=True)


def test_names_of_observations_do_not_hide_a_mask(make_dataset, datasets_path):
    dataset_id = masked_dataset(make_dataset, [1, 3, 2, 2])
    path = datasets_path / dataset_id / "data" / "metadata.json"
    told = [f"number {index}" for index in range(len(load_dataset(dataset_id, discrete=True).observation_names))]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"observation_names": told}))
    dataset = load_dataset(dataset_id, discrete=True)
    assert dataset.observation_names[2] == "action_mask/2"
    assert ReplayBuffer(dataset, CPU).num_legal == 3


def test_a_mask_that_forbids_a_logged_action_is_refused(make_dataset, tmp_path):
    dataset_id = masked_dataset(make_dataset, [3, 3, 1, 1])
    message = "test/data-v0: action_mask forbids 2 of the actions that were taken"
    with pytest.raises(BadInput, match=message):
        ReplayBuffer(load_dataset(dataset_id, discrete=True), CPU)
    assert_one_line(run_script("fqi", "--dataset-id", dataset_id, "--run-dir", str(tmp_path / "run")), message)


def test_a_mask_that_forbids_a_held_out_action_is_refused(make_dataset):
    """Its losses would be those of an action that has no probability."""
    space = gym.spaces.Dict({"action_mask": gym.spaces.MultiBinary(2)})
    episodes = [random_episode(i, 2, actions=np.array([1, 1])) for i in range(2)]
    for i, episode in enumerate(episodes):
        episode["observations"] = {"action_mask": np.array([[1, i], [1, i], [1, i]], np.int8)}
    dataset_id = make_dataset(episodes=episodes, observation_space=space, action_space=gym.spaces.Discrete(2))
    for seed in range(4):  # whichever of the two is held out
        dataset = hold_out(
            load_dataset(dataset_id, discrete=True), bc.Args(validation_fraction=0.5, validation_seed=seed)
        )
        with pytest.raises(BadInput, match="action_mask forbids 2"):
            ReplayBuffer(dataset, CPU)


@pytest.mark.parametrize("terminated", [True, False])
def test_a_state_in_which_nothing_is_legal_must_be_an_end(make_dataset, terminated):
    """Else Q would be learned from the value of an action that there is not."""
    space = gym.spaces.Dict({"action_mask": gym.spaces.MultiBinary(2)})
    masks = {"action_mask": np.array([[1, 0], [1, 1], [0, 0]], np.int8)}
    episode = random_episode(
        0, 2, actions=np.array([0, 1]), observations=masks, terminations=np.array([False, terminated])
    )
    dataset_id = make_dataset(episodes=[episode], observation_space=space, action_space=gym.spaces.Discrete(2))
    dataset = load_dataset(dataset_id, discrete=True)
    if terminated:
        assert len(ReplayBuffer(dataset, CPU).storage) == 2
    else:
        with pytest.raises(BadInput, match="action_mask forbids all after 1 that go on"):
            ReplayBuffer(dataset, CPU)
