"""Choices in a table become discrete actions with their names, masks and probabilities, or one line says why not."""

import inspect

import gymnasium as gym
import minari
import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from conftest import run_script

from common.command_line import BadInput
from common.data import ReplayBuffer, load_dataset
from common.evaluation import load_policy, load_script

ID = "test/choices-v0"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A datasets folder of this test alone; tables are written beside it."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


def table(**changes):
    """Two episodes of three rows: "b" terminates; "a" is cut, and its last row is no transition."""
    columns = {
        "episode": ["b", "b", "b", "a", "a", "a"],
        "obs_age": np.arange(6) / 7,
        "dose": ["low", "none", "high", "none", "low", ""],
        "reward": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        "terminated": [0, 0, 1, 0, 0, 0],
        "chance": [0.5, 0.25, 1.0, 0.1, 0.2, None],
    }
    return pd.DataFrame({name: values for name, values in (columns | changes).items() if values is not None})


MASK = {
    "may_high": [0, 0, 1, 0, 1, 0],
    "may_low": [1, 1, 0, 0, 1, 1],
    "may_none": [1, 1, 1, 1, 1, 1],
}
LISTS = ["low;none", "low;none", "high;none", "none", "high;low;none", "low;none"]


def import_logs(values, folder, *arguments, suffix=".csv"):
    path = folder.parent / f"log{suffix}"
    values.to_csv(path, index=False) if suffix == ".csv" else values.to_parquet(path)
    return run_script("benchmarks.import_logs", str(path), "--dataset-id", ID, *arguments)


def imported(values, folder, *arguments, suffix=".csv"):
    run = import_logs(values, folder, "--discrete-action", "dose", *arguments, suffix=suffix)
    assert run.returncode == 0, run.stderr
    dataset = load_dataset(ID, discrete=True)
    return dataset, ReplayBuffer(dataset, torch.device("cpu"))


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_words_are_numbered_in_the_order_of_the_alphabet(folder, suffix):
    dataset, buffer = imported(table(), folder, suffix=suffix)
    assert dataset.action_names == ["high", "low", "none"] and buffer.num_actions == 3
    assert buffer.transitions.actions.tolist() == [1, 2, 0, 2, 1]
    assert buffer.transitions.terminations.tolist() == [0, 0, 1, 0, 0]
    assert dataset.observation_names == ["obs_age"] and buffer.num_legal == 0


@pytest.mark.parametrize(
    "cells", [[2, 10, 10, -1, 2, 0], [2.0, 10.0, 10.0, -1.0, 2.0, None], ["2", "10", "10", "-1", "2", ""]]
)
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_whole_numbers_are_numbered_by_size(folder, suffix, cells):
    dataset, buffer = imported(table(dose=cells), folder, suffix=suffix)
    assert dataset.action_names == ["-1", "2", "10"]
    assert buffer.transitions.actions.tolist() == [1, 2, 2, 0, 1]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize(
    ("cells", "names", "taken"),
    [
        (
            [10**18 + 3, 10**18 + 2, 10**18 + 3, 10**18 + 1, 10**18 + 2, None],
            [10**18 + n for n in (1, 2, 3)],
            [2, 1, 2, 0, 1],
        ),
        (["1E5", "10E4", "1E5", "7", "7", ""], ["7", "10E4", "1E5"], [2, 1, 2, 0, 0]),
        (["007", "7", "07", "0007", "00007", ""], ["00007", "0007", "007", "07", "7"], [2, 4, 3, 1, 0]),
    ],
)
def test_ids_stay_as_they_are_written(folder, suffix, cells, names, taken):
    """Also those that are the same number in double precision."""
    cells = pd.Series(cells, dtype="Int64" if None in cells else object)
    dataset, buffer = imported(table(dose=cells), folder, suffix=suffix)
    assert dataset.action_names == [str(name) for name in names]
    assert buffer.transitions.actions.tolist() == taken


def test_whole_numbers_may_have_decimal_commas(folder):
    values = table(dose=["2,0", "10", "2", "10,0", "2", ""], obs_age=np.arange(6), reward=np.arange(6))
    dataset, buffer = imported(values, folder, "--decimal", ",")
    assert dataset.action_names == ["2", "10"] and buffer.transitions.actions.tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("cells", "names"),
    [
        (["low;high (iv)"] * 6, ["high (iv)", "low"]),
        (["high (iv);low"] * 6, ["high (iv)", "low"]),
        (["[low, high (iv)]"] * 6, ["high (iv)", "low"]),
        (["(low, high [iv])"] * 6, ["high [iv]", "low"]),
        (["{(a) low; (b) high}"] * 6, ["(a) low", "(b) high"]),
        (["(0 1)"] * 6, ["0", "1"]),
        (["[[0, 1]]"] * 6, ["0", "1"]),
        (["(0)", "(1)", "(0, 1)", "(1,)", "(0,)", "(0 1)"], ["0", "1"]),
    ],
)
def test_brackets_may_belong_to_a_name(cells, names, folder):
    dataset, _ = imported(table(dose=names * 3, allowed=cells), folder, "--legal-list", "allowed")
    assert dataset.action_names == names


@pytest.mark.parametrize("word", ["<NA>", "nil", "inf", "-", "NaN", "NaT"])
def test_no_number_is_no_choice_among_numbers(word, folder):
    run = import_logs(table(dose=[0, word, 1, 0, 1, 0]), folder, "--discrete-action", "dose")
    assert run.returncode == 2 and "column dose: 1 of 6 cells are blank, the first in row 2: each step" in run.stderr
    assert "Warning" not in run.stderr


def test_na_is_a_choice_among_words(folder):
    dataset, _ = imported(table(dose=["low", "NA", "low", "NA", "low", ""]), folder)
    assert dataset.action_names == ["NA", "low"]


def test_logical_values_are_two_choices(folder):
    dataset, buffer = imported(table(dose=[True, False, True, False, True, False]), folder, suffix=".parquet")
    assert dataset.action_names == ["False", "True"] and buffer.transitions.actions.tolist() == [1, 0, 1, 0, 1]


@pytest.mark.parametrize("how", ["columns", "list"])
def test_legal_actions_are_a_mask_before_the_observation(folder, how):
    options = ("--legal-prefix", "may_") if how == "columns" else ("--legal-list", "allowed")
    values = table(**MASK) if how == "columns" else table(allowed=LISTS)
    dataset, buffer = imported(values, folder, *options)
    names = ["action_mask/high", "action_mask/low", "action_mask/none", "obs_age"]
    assert dataset.observation_names == names and buffer.num_legal == 3
    masks = np.array(list(MASK.values())).T
    np.testing.assert_array_equal(buffer.transitions.observations[:, :3], masks[:5])  # as they are: not normalised
    np.testing.assert_array_equal(buffer.transitions.next_observations[:, :3], masks[[1, 2, 2, 4, 5]])
    np.testing.assert_array_equal(buffer.normalization[:, :3], [[0, 0, 0], [1, 1, 1]])
    age = buffer.transitions.observations[:, 3] * buffer.normalization[1, 3] + buffer.normalization[0, 3]
    np.testing.assert_allclose(age, np.arange(5) / 7, atol=1e-6)


@pytest.mark.parametrize("lists", [LISTS, [text.split(";") for text in LISTS]], ids=["texts", "lists"])
def test_a_cell_without_legal_actions_adds_none(lists, folder):
    values = table(allowed=[*lists[:5], None], terminated=[0, 0, 1, 0, 0, 0])
    run = import_logs(values, folder, "--discrete-action", "dose", "--legal-list", "allowed", suffix=".parquet")
    assert run.returncode == 2 and "row 6: no action is legal: each row needs one" in run.stderr, run


def test_empty_brackets_are_no_choice(folder):
    values = table(dose=[0, 1, 0, 1, 0, 1], allowed=["(0, 1)"] * 5 + ["()"])
    run = import_logs(values, folder, "--discrete-action", "dose", "--legal-list", "allowed")
    assert run.returncode == 2 and "row 6: no action is legal: each row needs one" in run.stderr


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_choices_may_have_spaces_in_their_names(suffix, folder):
    lists = [["low", "wait and see"]] * 6
    allowed = [";".join(names) for names in lists] if suffix == ".csv" else lists
    values = table(dose=["low", "wait and see"] * 3, allowed=allowed)
    dataset, buffer = imported(values, folder, "--legal-list", "allowed", suffix=suffix)
    assert dataset.action_names == ["low", "wait and see"] and buffer.num_legal == 2


def test_choices_may_be_words_and_numbers(folder):
    doses = ["none", "1.0", "2.0", "1.0", "none", ""]
    dataset, _ = imported(table(dose=doses, allowed=["none;1.0;2.0"] * 6), folder, "--legal-list", "allowed")
    assert dataset.action_names == ["1.0", "2.0", "none"]


def test_lists_of_numbers_with_marks_here_and_spaces_there(folder):
    allowed = ["-0;1", "0 1", "[0, 1.0]", "0|1", "0 1", "0 1"]
    dataset, buffer = imported(table(dose=[0, 1, 0, 1, 0, 0], allowed=allowed), folder, "--legal-list", "allowed")
    assert dataset.action_names == ["0", "1"] and buffer.num_legal == 2


def test_lists_without_marks(folder):
    doses = [0, 1, 2, 1, 1, 0]
    dataset, _ = imported(table(dose=doses, allowed=["0 1 2"] * 6), folder, "--legal-list", "allowed")
    assert dataset.action_names == ["0", "1", "2"]


def test_lists_of_fractions_name_whole_numbers(folder):
    values = table(dose=[0, 1, 2, 1, 1, 0], allowed=[[0.0, 1.0, 2.0]] * 6)
    dataset, _ = imported(values, folder, "--legal-list", "allowed", suffix=".parquet")
    assert dataset.action_names == ["0", "1", "2"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_minus_zero_is_zero(suffix, folder):
    dataset, buffer = imported(table(dose=[-0.0, 0.0, 1.0, -1.0, 0.0, -0.0]), folder, suffix=suffix)
    assert dataset.action_names == ["-1", "0", "1"] and buffer.transitions.actions.tolist() == [1, 1, 2, 0, 1]


def test_an_action_that_only_the_mask_knows_has_a_number(folder):
    dataset, buffer = imported(table(**MASK, may_double=[0, 0, 0, 1, 1, 1]), folder, "--legal-prefix", "may_")
    assert dataset.action_names == ["double", "high", "low", "none"] and buffer.num_actions == 4


def test_the_end_of_a_cut_episode_is_dropped_where_its_next_mask_is_not_known(folder):
    values = table(
        **MASK, next_obs_age=[1 / 7, 2 / 7, 9, 4 / 7, 5 / 7, 9], dose=["low", "none", "high", "none", "low", "low"]
    )
    _, buffer = imported(values, folder, "--legal-prefix", "may_")
    assert len(buffer.storage) == 5 and buffer.transitions.rewards.tolist() == [1, 2, 3, 4, 5]


def test_propensities_are_kept_as_logarithms(folder):
    imported(table(), folder, "--propensity", "chance")
    episodes = list(minari.MinariDataset(folder / ID / "data").iterate_episodes())
    np.testing.assert_allclose(episodes[0].infos["log_prob"], [*np.log([0.5, 0.25, 1.0]), np.nan])
    np.testing.assert_allclose(episodes[1].infos["log_prob"], [*np.log([0.1, 0.2]), np.nan])


def test_densities_of_amounts_may_be_above_1(folder):
    values = table(action_0=[0.5, 0.1, -1, 1, 0, 0], chance=[2.5, 0.1, 1, 1, 1, None], dose=None)
    run = import_logs(values, folder, "--propensity", "chance")
    assert run.returncode == 0, run.stderr
    episode = next(iter(minari.MinariDataset(folder / ID / "data").iterate_episodes()))
    np.testing.assert_allclose(episode.infos["log_prob"], [*np.log([2.5, 0.1, 1.0]), np.nan])


@pytest.mark.parametrize(
    ("changes", "options", "line"),
    [
        (
            {"dose": ["low", None, "high", "none", "low", ""]},
            [],
            "column dose: 1 of 6 cells are blank, the first in row 2: each",
        ),
        (
            {"dose": ["1", "NA", "2", "nan", "1", "NA"]},  # R writes what is missing so
            [],
            "column dose: 2 of 6 cells are blank, the first in row 2: each",
        ),
        (
            {"dose": [1, 2.5, 3, 1, 2, 3]},
            [],
            "column dose: 2.5 in row 2 is no choice: amounts are columns that begin with",
        ),
        (
            {"episode": [*"abcdef"], "terminated": [0] * 6},
            [],
            "no transition is left: each row is the last of an episode",
        ),
        ({"dose": ["low"] * 6}, [], "column dose holds one choice alone, low: there is nothing to choose"),
        ({"dose": None}, [], "lacks the columns dose: it has episode, obs_age, reward, terminated, chance"),
        (
            {"chance": [0.5, 0, 1, 1, 1, 1]},
            ["--propensity", "chance"],
            "in row 2 is not in (0, 1]: the action was taken, so",
        ),
        (
            {"chance": [0.5, 1.5, 1, 1, 1, 1]},
            ["--propensity", "chance"],
            "1.5 in row 2 is not in (0, 1]: the action was taken",
        ),
        (
            {"chance": [0.5, None, 1, 1, 1, 1]},
            ["--propensity", "chance"],
            "column chance: 1 of 6 cells are blank, the first in row 2",
        ),
        ({"chance": ["x", 1, 1, 1, 1, 1]}, ["--propensity", "chance"], "x in row 1 is not in (0, 1]"),
        (
            MASK | {"may_low": [1, 0, 0, 0, 0, 1]},
            ["--legal-prefix", "may_"],
            "row 5: action low was taken, and is not legal: repair",
        ),
        (
            MASK | {"may_low": None},
            ["--legal-prefix", "may_"],
            "no column says when low is legal: it was taken in column dose",
        ),
        (MASK | {"may_low": [1, 2, 0, 0, 0, 1]}, ["--legal-prefix", "may_"], "column may_low: '2', first in row 2"),
        ({"allowed": [*LISTS[:5], ""]}, ["--legal-list", "allowed"], "row 6: no action is legal: each row needs one"),
        (
            {"allowed": [*LISTS[:4], "high", "low"]},
            ["--legal-list", "allowed"],
            "row 5: action low was taken, and is not legal",
        ),
        ({}, ["--legal-prefix", "may_"], "has no column that begins with may_"),
        (
            {"allowed": LISTS} | MASK,
            ["--legal-prefix", "may_", "--legal-list", "allowed"],
            "--legal-list: give one of them",
        ),
        ({}, ["--env-id", "CartPole-v1"], "--env-id CartPole-v1 has observations of size 4, the file of size 1"),
        ({}, ["--propensity", "dose"], "name one column twice"),
        ({}, ["--action-low", "0"], "--action-low and --action-high: are for amounts, not for --discrete-action"),
    ],
)
def test_what_is_no_choice_is_one_line(folder, changes, options, line):
    run = import_logs(table(**changes), folder, "--discrete-action", "dose", *options)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert line in run.stderr, run.stderr
    assert not (folder / ID).exists()


def test_legal_actions_without_choices_is_one_line(folder):
    run = import_logs(table(action_0=np.arange(6.0)), folder, "--legal-list", "chance")
    assert run.returncode == 2 and "--legal-list: is for choices: give --discrete-action, too" in run.stderr


def cartpole(**changes):
    columns = {f"obs_{name}": np.linspace(-0.1, 0.1, 6) for name in range(4)}
    return table(obs_age=None, **columns, **changes)


def test_an_environments_numbers_are_its_own(folder):
    values = cartpole(dose=[1, 1, 1, 0, 1, 0])
    dataset, buffer = imported(values, folder, "--env-id", "CartPole-v1")
    assert dataset.action_names == ["0", "1"] and buffer.transitions.actions.tolist() == [1, 1, 1, 0, 1]
    assert dataset.env_id == "CartPole-v1"


def test_choices_have_the_places_that_an_environment_gives_them(folder):
    """It counts four from 10 on, of which the file knows 11 and 13; the others are never legal."""
    gym.register("Masked-v0", "test_shift_report:Masked")
    try:
        values = table(dose=[11, 13, 13, 11, 13, 11], may_11=[1, 1, 0, 1, 0, 1], may_13=[0, 1, 1, 1, 1, 0])
        dataset, buffer = imported(values, folder, "--legal-prefix", "may_", "--env-id", "Masked-v0")
    finally:
        del gym.registry["Masked-v0"]
    assert (dataset.action_low.tolist(), dataset.action_high.tolist()) == ([10], [13])
    assert dataset.action_names == ["10", "11", "12", "13"]
    assert buffer.transitions.actions.tolist() == [1, 3, 3, 1, 3]
    masks = [[0, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 1]]
    assert buffer.transitions.observations[:, :4].tolist() == masks


@pytest.mark.parametrize("dose", [[1, 2, 1, 0, 1, 0], ["left", "right", "left", "left", "left", "left"]])
def test_what_an_environment_lacks_is_one_line(folder, dose):
    run = import_logs(cartpole(dose=dose), folder, "--discrete-action", "dose", "--env-id", "CartPole-v1")
    assert run.returncode == 2 and "--env-id CartPole-v1 has actions 0 to 1, the file " in run.stderr


def masked_batch(module, num_actions=3, size=64):
    """Random transitions whose masks forbid action 0 in every state, and let the others choose."""
    torch.manual_seed(0)
    states = torch.randn(2, size, num_actions + 2)
    states[..., :num_actions] = torch.tensor([0.0, 1, 1])
    actions = torch.randint(1, num_actions, (size,))
    terminations = (torch.rand(size) < 0.2).float()
    states[1, terminations == 1, :num_actions] = 0  # after an end nothing may be legal
    return module.Batch(states[0], actions, torch.randn(size), states[1], terminations)


def test_the_scripts_forbid_with_the_same_text():
    scripts = ("discrete_cql", "discrete_bcq", "discrete_iql", "fqi")
    assert len({inspect.getsource(load_script(name).legal_only) for name in scripts}) == 1


@pytest.mark.parametrize("script", ["discrete_cql", "discrete_bcq", "fqi"])
def test_what_an_illegal_action_would_be_worth_changes_nothing(script):
    module = load_script(script)
    args = module.HyperParameters(hidden_dims=(8,), legal_actions=True)
    learner, batch = module.build(5, 3, args), masked_batch(module)
    before, _ = module.critic_loss(learner, batch, args)
    with torch.no_grad():
        for critic in (learner.actor.critic, learner.target_critic):
            critic.net[-1].bias[0] += 1000
    after, _ = module.critic_loss(learner, batch, args)
    assert after.item() == before.item() < 1e3
    assert (learner.actor(batch.observations).argmax(dim=1) > 0).all()
    unmasked = module.Actor(5, 3, module.HyperParameters(hidden_dims=(8,)))
    unmasked.load_state_dict(learner.actor.state_dict())
    assert (unmasked.critic(batch.observations).argmax(dim=1) == 0).all()


def test_no_policy_takes_what_is_not_legal(folder, tmp_path):
    """Action "c" is worth the most, and legal in half of the states."""
    random = np.random.default_rng(0)
    episode, side = np.repeat(np.arange(60), 5), random.integers(2, size=300)
    legal = np.stack([np.ones(300), side, 1 - side], axis=1)  # "a" always; "b" or "c"
    action = np.where(random.random(300) < 0.5, 0, 1 + (side == 0))
    columns = {"episode": episode, "obs_noise": random.normal(size=300), "dose": np.array(["a", "b", "c"])[action]}
    columns |= {"reward": np.array([0.0, 1, 10])[action], "terminated": np.arange(300) % 5 == 4}
    columns |= {f"legal_{name}": legal[:, index] for index, name in enumerate("abc")}
    imported(pd.DataFrame(columns), folder, "--legal-prefix", "legal_")
    for script in ("discrete_cql", "discrete_bcq", "discrete_iql", "fqi"):
        options = ["--num-updates", "200", "--hidden-dims", "16", "--validation-fraction", "0.1"]
        run = run_script(script, "--dataset-id", ID, *options, "--run-dir", str(tmp_path / script))
        assert run.returncode == 0, run.stderr
        policy = load_policy(tmp_path / script)
        assert policy.origin["action_names"] == ["a", "b", "c"] and policy.origin["hyper_parameters"]["legal_actions"]
        observations = np.concatenate([legal, random.normal(size=(300, 1)) * 3], axis=1)
        assert (legal[np.arange(300), policy(observations)] == 1).all()
        none_but_b = np.tile([0.0, 1, 0, 0], (5, 1))
        np.testing.assert_array_equal(policy(none_but_b), [1] * 5)
        wrong = np.array([[0.0, 0, 0, 0], [0.5, 0.5, 0.5, 0], [1, 2, 0, 0], [1, 1, np.nan, 0], [1, 0, 1, 1e300]])
        for row in wrong:
            told = "action_mask must hold 0 and 1, and some 1" if np.isfinite(row).all() and row[-1] == 0 else "finite"
            with pytest.raises(BadInput, match=told):
                policy(np.stack([none_but_b[0], row]))
        out = str(tmp_path / f"{script}.onnx")
        assert run_script("export", str(tmp_path / script), "--out", out).returncode == 0
        session = onnxruntime.InferenceSession(out)
        actions, preferences = session.run(None, {"observations": np.concatenate([none_but_b, wrong])})
        assert (actions[:5] == 1).all() and (actions[5:] == np.iinfo(np.int64).min).all()
        assert np.isfinite(preferences[:5, 1]).all() and np.isnan(preferences[5:]).all()
