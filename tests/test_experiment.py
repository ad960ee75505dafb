"""The contracts every script keeps: command line, run folder, resume, bad input; run as users run them."""

import csv
import dataclasses
import importlib
import json
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import tyro
from conftest import (
    ALGORITHMS,
    DISCRETE,
    ROOT,
    SCRIPTS,
    SHORT,
    SHORTER,
    assert_one_line,
    assert_same,
    checkpoint,
    random_episode,
    run_script,
    short_environments,
)

from common.command_line import BUILT_IN_ID, BadInput, Diverged
from common.evaluation import FINAL_SEED, evaluate, load_policy
from common.experiment import Run
from common.optim import Adam

every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)
every_script = pytest.mark.parametrize("algorithm", SCRIPTS)


# --- Command line ---


def typed(args_class):
    """The arguments that a command line may have: --online-steps is one of the scripts that act, and a mask of legal
    actions is the data's.
    """
    hidden = {"legal_actions"} | ({"online_steps"} - {*args_class.__annotations__})
    return [field for field in dataclasses.fields(args_class) if field.name not in hidden]


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "fqe"])
def test_help_names_every_argument_and_its_meaning(algorithm):
    run = run_script(algorithm, "--help", COLUMNS="160")
    assert run.returncode == 0
    args_class = importlib.import_module(algorithm).Args
    for field in typed(args_class):
        assert f"--{field.name.replace('_', '-')}" in run.stdout
    assert "Paper:" in run.stdout  # the module's docstring
    assert "--compile, --no-compile" in run.stdout


@every_script
def test_underscores_and_switches_are_read_as_sweeps_write_them(algorithm):
    args_class = importlib.import_module(algorithm).Args
    args = tyro.cli(args_class, args=["--batch_size=64", "--hidden_dims", "8", "8", "--compile", "--no-track"])
    assert (args.batch_size, args.hidden_dims, args.compile, args.track) == (64, (8, 8), True, False)


@pytest.mark.parametrize(
    ("arguments", "expected"), [(["--lr", "3"], "--lr"), (["--device", "tpu"], "--device"), (["--gamma"], "--gamma")]
)
def test_a_command_line_that_tyro_cannot_read_ends_with_its_own_message(arguments, expected):
    run = run_script("iql", *arguments)
    assert run.returncode == 2 and expected in run.stderr and "Traceback" not in run.stderr


# --- The run folder ---


@every_algorithm
def test_run_folder(algorithm, tmp_path, data):
    folder = tmp_path / "run"
    arguments = [
        "--num-updates",
        "40",
        "--eval-every",
        "30",
        "--log-every",
        "10",
        "--run-dir",
        str(folder),
        "--seed",
        "3",
    ]
    run = run_script(algorithm, *arguments, *SHORT, *SHORTER.get(algorithm, ()), plot=algorithm in ("iql", "fqi"))
    assert run.returncode == 0, run.stderr
    expected = {"args.json", "metrics.csv", "checkpoint.pt", "policy.pt", "result.json", "learning_curve.png"}
    assert {path.name for path in folder.iterdir()} - {".lock"} == expected

    args = json.loads((folder / "args.json").read_text())
    assert args["algorithm"] == algorithm and args["seed"] == 3 and args["dataset_fingerprint"] == data.fingerprint
    assert set(args["versions"]) >= {"torch", "numpy", "gymnasium", "minari"}
    assert {field.name for field in dataclasses.fields(importlib.import_module(algorithm).Args)} <= args.keys()

    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert next(iter(rows[0])) == "step"
    rows = [row for row in rows if int(row["step"]) > 1]  # before it, a model's own rows
    rows = [row for row in rows if row["critic/loss" if algorithm in DISCRETE else "actor/loss"]]
    assert [int(row["step"]) for row in rows] == [10, 20, 30, 40]
    assert [bool(row["eval/score"]) for row in rows] == [False, False, True, True]
    loss = "critic/loss" if algorithm in DISCRETE else "actor/loss"
    assert all(np.isfinite(float(row[loss])) for row in rows)

    result = json.loads((folder / "result.json").read_text())
    assert (result["algorithm"], result["dataset_id"], result["seed"], result["num_updates"]) == (
        algorithm,
        data.dataset.dataset_id,
        3,
        40,
    )
    final = data.dataset.score(np.array(result["final_returns"]))
    assert len(final) == len(result["final_lengths"]) == 3
    assert result["final_score"] == pytest.approx(final.mean())
    assert result["final_standard_error"] == pytest.approx(final.std(ddof=1) / np.sqrt(3))
    assert result["dataset_return_mean"] == pytest.approx(float(data.episode_returns.mean()))
    assert result["dataset_score"] == pytest.approx(13 if algorithm in DISCRETE else 34, abs=5)
    assert {
        "final_return_mean",
        "final_return_std",
        "updates_per_second",
        "wall_seconds",
        "device",
        "versions",
    } <= result.keys()

    if algorithm in ("iql", "fqi"):  # every script leaves the curve to common/experiment.py
        assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    last = run.stdout.strip().splitlines()[-1]
    assert (
        f"score {final.mean():.1f} +- " in last and "dataset average" in last and str(folder) in last and " s, " in last
    )
    assert "score" in run.stderr  # the progress bar

    environments = short_environments(data.dataset, 2)  # the policy on disk is the one that was evaluated
    returns, lengths = evaluate(load_policy(folder), environments, 3, FINAL_SEED)
    np.testing.assert_allclose(returns, result["final_returns"], rtol=1e-4)
    assert lengths.tolist() == result["final_lengths"]
    assert result["final_return_std"] == pytest.approx(returns.std(), rel=1e-4)
    returns, _ = evaluate(load_policy(folder), environments)
    score = data.dataset.score(returns.mean())
    expected = {"eval/return_mean": returns.mean(), "eval/return_std": returns.std(), "eval/score": score}
    assert {name: float(rows[-1][name]) for name in expected} == pytest.approx(expected, rel=1e-4)


def test_evaluations_are_not_the_time_of_updates(tmp_path, monkeypatch):
    def slow(policy, environments, *rest, **more):
        time.sleep(0.5)
        return evaluate(policy, environments, *rest, **more)

    monkeypatch.setattr("common.experiment.evaluate", slow)
    words = ["--num-updates", "6", "--eval-every", "2", *SHORT, "--run-dir", str(tmp_path / "run")]
    assert run_script("bc", *words).returncode == 0
    seconds, of_updates = checkpoint(tmp_path / "run")["seconds"]
    assert of_updates < 0.45 and seconds > 1


ENV_ID = "Pendulum-v1", "CartPole-v1"


class Stop(Exception):
    pass


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_arguments_reach_the_data_the_player_and_the_compiler(algorithm, data, tmp_path, monkeypatch):
    script = importlib.import_module(algorithm)
    known, seen = script.Args.__dataclass_fields__, []

    def stop(args, buffer, learner, update, make_batch=None, player=None):
        raise Stop(buffer, player)

    monkeypatch.setattr(script, "Run", stop)
    monkeypatch.setattr(script, "compiled", lambda function, learner, args: seen.append((function, args.compile)))
    words = ["--no-normalize-observations", "--seed", "3", "--env-id", ENV_ID[algorithm in DISCRETE]]
    words += ["--reward-shift", "0.25"] * ("reward_shift" in known) + [*SHORT, *SHORTER.get(algorithm, [])]
    words += ["--online-steps", "2000"] * ("online_steps" in script.Args.__annotations__)
    with pytest.raises(Stop) as stopped:
        run_script(algorithm, *words, "--run-dir", str(tmp_path / "run"))
    buffer, player = stopped.value.args
    assert buffer.normalization.tolist() == [[0] * buffer.observation_dim, [1] * buffer.observation_dim]
    assert buffer.reward_shift == (0.25 if "reward_shift" in known else 0)
    assert buffer.dataset.env_spec is None  # --env-id's arguments, not the data's
    assert (player is not None) == hasattr(script, "Player") and (player is None or player.seeds == (3,))
    assert (script.update, False) in seen


def test_default_run_folder_and_a_taken_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--num-updates", "2", *SHORT]
    assert run_script("bc", *arguments).returncode == 0
    (folder,) = tmp_path.glob("runs/bc/anchorl-pendulum-mixed-v0/0-*")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert_one_line(run_script("bc", *arguments, "--run-dir", str(folder)), "holds a run already; add --resume")
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "checkpoint.pt").unlink()  # the largest file, which a run that ended needs no more
    assert_one_line(run_script("bc", *arguments, "--run-dir", str(folder)), "holds a run that ended; name another one")
    assert_one_line(run_script("bc", *arguments, "--run-dir", str(folder), "--resume"), "no checkpoint at")
    left = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert left == {name: content for name, content in before.items() if name != "checkpoint.pt"}


@pytest.mark.parametrize("algorithm", ["iql", "fqi"])
def test_the_policy_of_each_evaluation_can_be_kept(algorithm, tmp_path):
    arguments = ["--num-updates", "5", "--eval-every", "2", "--keep-policies", "--run-dir", str(tmp_path), *SHORT]
    assert run_script(algorithm, *arguments).returncode == 0
    kept = {name: load_policy(tmp_path / f"policy-{name}.pt") for name in ("2", "4", "5")}
    assert {path.name for path in tmp_path.glob("policy*")} == {"policy.pt", *(f"policy-{name}.pt" for name in kept)}
    assert_same(kept["5"].actor.state_dict(), load_policy(tmp_path).actor.state_dict())
    first, second = (torch.cat([weight.flatten() for weight in kept[name].actor.parameters()]) for name in ("2", "4"))
    assert not torch.equal(first, second)


def test_logged_data_without_environment_trains_and_says_so(make_dataset, tmp_path):
    run = run_script(
        "iql", "--dataset-id", make_dataset(), "--num-updates", "20", "--run-dir", str(tmp_path / "run"), *SHORT
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("warning") == 1 and "names no environment" in run.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["final_score"] is None and result["dataset_score"] is None
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert float(rows[-1]["critic/q"])  # the diagnostics are there
    assert "not evaluated" in run.stdout


def test_an_environment_that_is_not_installed_is_one_warning(make_dataset, datasets_path, tmp_path):
    """Where the dataset names it. What the user names and is not there is a typing error (test_bad_input_...)."""
    dataset_id = make_dataset(env="Pendulum-v1")
    metadata = datasets_path / dataset_id / "data" / "metadata.json"
    metadata.write_text(metadata.read_text().replace("Pendulum-v1", "NotInstalled-v0"))
    arguments = ["--dataset-id", dataset_id, "--num-updates", "5"]
    run = run_script("bc", *arguments, "--run-dir", str(tmp_path / "run"), *SHORT)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("warning") == 1 and "'NotInstalled-v0' is not installed" in run.stderr


def test_a_script_and_common_are_a_working_program(tmp_path):
    """What a user copies out of the repository runs alone."""
    shutil.copytree(ROOT / "common", tmp_path / "common")
    (tmp_path / "algorithms").mkdir()
    shutil.copy(ROOT / "algorithms" / "iql.py", tmp_path / "algorithms" / "iql.py")
    command = [sys.executable, "algorithms/iql.py", "--num-updates", "3", "--run-dir", "run", *SHORT]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_metrics_of_only_some_updates_are_logged_too(tmp_path):
    """TD3+BC trains its actor every second update: the first row, of update 3, knows nothing of it yet."""
    arguments = ["--num-updates", "12", "--log-every", "3", "--run-dir", str(tmp_path / "run")]
    assert run_script("td3_bc", *arguments, *SHORT).returncode == 0
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert [(row["step"], bool(row["actor/loss"]), bool(row["critic/loss"])) for row in rows] == [
        ("3", False, True),
        ("6", True, True),
        ("9", False, True),
        ("12", True, True),
    ]


# --- Determinism ---


@every_algorithm
def test_the_same_seed_gives_the_same_bits_however_often_a_run_is_looked_at(algorithm, tmp_path, pendulum):
    """Neither evaluations nor rows nor checkpoints may touch a random number of the training; another seed must."""

    def train(name, *arguments):
        np.random.seed(len(name))  # what was drawn before a run does not matter, either
        words = ["--num-updates", "24", "--batch-size", "32", *SHORT, *SHORTER.get(algorithm, ())]
        words += arguments
        run = run_script(algorithm, *words, "--run-dir", str(tmp_path / name))
        assert run.returncode == 0, run.stderr
        rows = csv.DictReader((tmp_path / name / "metrics.csv").open())
        rows = {row["step"]: {key: row[key] for key in row if key.split("/")[0] in ("actor", "critic")} for row in rows}
        return checkpoint(tmp_path / name), rows

    often, rows_often = train("often", "--eval-every", "8", "--log-every", "1", "--checkpoint-every", "2")
    seldom, rows_seldom = train("seldom", "--eval-every", "24", "--log-every", "12", "--eval-episodes", "3")
    for key in ("learner", "random_state"):
        assert_same(often[key], seldom[key])
    for step in ("12", "24"):
        assert rows_often[step] == rows_seldom[step]
    other, _ = train("other", "--eval-every", "24", "--seed", "1")
    for weight, same in other["learner"]["actor"].items():
        if same.dim() == 2 and not weight.endswith("scale"):  # which is the data's
            assert not torch.equal(same, seldom["learner"]["actor"][weight])


# --- Resume ---


def test_resuming_a_finished_run_with_more_updates_goes_on(tmp_path):
    folder = str(tmp_path / "run")
    assert run_script("bc", "--num-updates", "20", "--run-dir", folder, *SHORT).returncode == 0
    run = run_script("bc", "--num-updates", "30", *SHORT, "--resume", "--run-dir", folder)
    assert run.returncode == 0, run.stderr
    assert checkpoint(tmp_path / "run")["step"] == 30


def test_too_little_memory_is_one_line(tmp_path):
    run = run_script("edac", "--num-critics", "1000000000000000", "--run-dir", str(tmp_path / "run"), *SHORT)
    assert_one_line(run, "error: the memory is too small, ask for less: ")


def test_a_run_whose_rate_falls_to_its_end_has_no_other_end(tmp_path):
    """It would jump back, and come to other weights than a run of all updates."""
    words = ["--run-dir", str(tmp_path / "run"), *SHORT]
    assert run_script("iql", "--num-updates", "4", *words).returncode == 0
    run = run_script("iql", "--num-updates", "8", "--resume", *words)
    assert_one_line(run, "start a new run: updates in all is 4 in it, not 8")
    assert run_script("iql", "--num-updates", "4", "--online-steps", "2", "--resume", *words).returncode == 0
    folder = str(tmp_path / "without")
    words = ["--no-cosine-decay", *SHORT, "--run-dir", folder]
    assert run_script("iql", "--num-updates", "4", *words).returncode == 0
    assert run_script("iql", "--num-updates", "8", "--resume", *words).returncode == 0


def with_nan(saved):
    actor = saved["learner"]["actor"]
    name = next(iter(actor))
    broken = actor | {name: torch.full_like(actor[name], torch.nan)}
    return saved | {"learner": saved["learner"] | {"actor": broken}}


def with_small_moments(saved):
    moments = {name: torch.zeros(1) if value.dim() else value for name, value in saved["learner"]["optimizer"].items()}
    return saved | {"learner": saved["learner"] | {"optimizer": moments}}


WRONG_ENTRIES = [  # what is done to a checkpoint, and a word of the reason that is given
    (lambda saved: saved | {"learner": {"actor": {}}}, "Missing key"),
    (lambda saved: {"weights": torch.zeros(1)}, "'step'"),
    (lambda saved: [saved], "list indices"),
    (lambda saved: {name: value for name, value in saved.items() if name != "random_state"}, "'random_state'"),
    (lambda saved: saved | {"step": "x"}, "invalid literal"),
    (lambda saved: saved | {"metrics": None}, "splitlines"),
    (with_small_moments, "size mismatch"),
    (with_nan, "actor is not finite"),
]


def test_resume_refuses_what_it_cannot_continue(tmp_path, make_dataset):
    folder = str(tmp_path / "run")
    assert_one_line(run_script("iql", "--resume"), "--resume: no checkpoint at .*; name a run's --run-dir")
    assert_one_line(run_script("iql", "--resume", "--run-dir", folder), "no checkpoint at")
    assert not (tmp_path / "run").exists()
    assert run_script("iql", "--num-updates", "3", "--run-dir", folder, *SHORT).returncode == 0
    before = (tmp_path / "run" / "metrics.csv").read_text()
    resume = ["--num-updates", "3", *SHORT, "--resume", "--run-dir", folder]
    assert_one_line(run_script("td3_bc", *resume), "does not fit, start a new run: algorithm is iql in it, not td3_bc")
    assert_one_line(run_script("iql", *resume, "--num-updates", "2"), "it has made 3 updates already")
    other = "eval_episodes is 2 in it, not 5"  # of one curve
    assert_one_line(run_script("iql", *resume, "--eval-episodes", "5"), other)
    assert_one_line(run_script("iql", *resume, "--gamma", "0.9"), "start a new run: gamma is 0.99 in it, not 0.9")
    other = ["--dataset-id", make_dataset(env="Pendulum-v1")]
    assert_one_line(run_script("iql", *resume, *other), f"dataset_id is {BUILT_IN_ID} in it")
    assert_one_line(run_script("iql", *resume, "--hidden-dims", "8"), r"hidden_dims is \(16, 16\) in it, not \(8,\)")
    saved = checkpoint(tmp_path / "run")
    torch.save(saved | {"dataset_fingerprint": ""}, tmp_path / "run" / "checkpoint.pt")
    assert_one_line(run_script("iql", *resume), "trained on other data")
    for damage, reason in WRONG_ENTRIES:
        torch.save(damage(saved), tmp_path / "run" / "checkpoint.pt")
        assert_one_line(run_script("iql", *resume), rf"the checkpoint in .* does not fit, start a new run: .*{reason}")
    assert (tmp_path / "run" / "metrics.csv").read_text() == before


def test_a_run_without_an_environment_is_given_one_later(tmp_path, make_dataset):
    """There is no curve yet that it would mix."""
    words = ["--dataset-id", make_dataset(), *SHORT, "--run-dir", str(tmp_path / "run")]
    assert "not evaluated" in run_script("bc", "--num-updates", "3", *words).stdout
    run = run_script("bc", "--num-updates", "5", *words, "--resume", "--env-id", "Pendulum-v1")
    assert run.returncode == 0 and "in 3 episodes" in run.stdout, run


def test_resume_goes_on_with_a_run_of_a_version_that_lacked_an_argument(tmp_path):
    words = ["--num-updates", "3", *SHORT, "--run-dir", str(tmp_path)]
    assert run_script("iql", *words).returncode == 0
    saved = checkpoint(tmp_path)
    del saved["arguments"]["reward_scale"]
    torch.save(saved, tmp_path / "checkpoint.pt")
    run = run_script("iql", *words, "--resume")
    assert run.returncode == 0 and "warning" not in run.stderr


def test_a_disk_that_cannot_be_written_is_no_damaged_checkpoint(tmp_path):
    words = ["--num-updates", "3", *SHORT, "--run-dir", str(tmp_path)]
    assert run_script("bc", *words).returncode == 0
    (tmp_path / ".metrics.csv").mkdir()  # where the file is made
    run = run_script("bc", *words, "--resume")
    assert run.returncode == 1 and re.match(r"error: cannot write \S+metrics.csv", run.stderr), run.stderr


def test_a_finished_run_whose_updates_took_no_time_is_resumed(tmp_path):
    words = ["--num-updates", "3", *SHORT, "--run-dir", str(tmp_path)]
    assert run_script("bc", *words).returncode == 0
    torch.save(checkpoint(tmp_path) | {"seconds": [0.0, 0.0]}, tmp_path / "checkpoint.pt")
    assert run_script("bc", *words, "--resume").returncode == 0


# --- Divergence ---


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(make_dataset, tmp_path):
    huge = [random_episode(seed) | {"rewards": np.full(30, 1e30)} for seed in range(4)]
    dataset_id = make_dataset(episodes=huge)
    arguments = ["--num-updates", "400", "--checkpoint-every", "1", "--run-dir", str(tmp_path / "run"), *SHORT]
    run = run_script("iql", "--dataset-id", dataset_id, "--reward-scale", "1", *arguments)
    assert run.returncode == 3
    assert re.search(r"error: .* is (nan|inf|not finite) at update \d+; the last check", run.stderr.splitlines()[-1])
    assert "Traceback" not in run.stderr
    for name, part in checkpoint(tmp_path / "run")["learner"].items():
        values = torch.utils._pytree.tree_leaves(part)
        assert all(value.isfinite().all() for value in values if isinstance(value, torch.Tensor)), name


def test_a_checkpoint_never_holds_weights_that_are_not_finite(tmp_path, pendulum):
    iql = importlib.import_module("iql")
    args = iql.Args(run_dir=tmp_path / "run", hidden_dims=(4,), num_updates=9, checkpoint_every=1, eval_every=3)
    learner = iql.build(3, 1, args, torch.device("cpu"), Adam)
    run = Run(args, pendulum, learner, iql.update)
    run.record(1, {})
    with torch.no_grad():
        learner.critic.layers[0].weight[0, 0] = torch.nan
    for step in (2, 3):  # a checkpoint, and an evaluation
        with pytest.raises(
            Diverged, match=rf"critic is not finite at update {step}; the last checkpoint in .*run is kept"
        ):
            run.record(step, {"critic/loss": 1.0})
    assert checkpoint(tmp_path / "run")["step"] == 1


@every_algorithm
def test_a_loss_that_is_not_finite_is_named_within_one_log_interval(algorithm, tmp_path, monkeypatch, pendulum):
    """From update 13 on an update gives NaN losses: the row of update 20 is the first to show it."""
    module = importlib.import_module(algorithm)

    def update(learner, batch, step, args, *rest):
        metrics = train(learner, batch, step, args, *rest)
        return {name: value * (torch.nan if step >= 13 else 1) for name, value in metrics.items()}

    train = module.update
    monkeypatch.setattr(module, "update", update)
    arguments = ["--num-updates", "40", "--log-every", "10", "--checkpoint-every", "5", "--run-dir", str(tmp_path)]
    run = run_script(algorithm, *arguments, *SHORT, *SHORTER.get(algorithm, ()))
    assert run.returncode == 3 and "Traceback" not in run.stderr
    assert re.search(r"^error: \w+/loss is nan at update 20; the last checkpoint", run.stderr.splitlines()[-1])
    assert checkpoint(tmp_path)["step"] == 15
    assert [row["step"] for row in csv.DictReader((tmp_path / "metrics.csv").open())][-1] == "10"


# --- Bad input ---

NONSENSE = {
    "batch_size": "0",
    "num_updates": "-5",
    "online_steps": "-1",
    "eval_every": "0",
    "eval_episodes": "0",
    "final_eval_episodes": "0",
    "log_every": "0",
    "checkpoint_every": "0",
    "seed": "-1",
    "learning_rate": "0",
    "actor_learning_rate": "-0.1",
    "critic_learning_rate": "nan",
    "value_learning_rate": "0",
    "gamma": "1.5",
    "tau": "0",
    "random_steps": "0",
    "expectile": "1.5",
    "beta": "-1",
    "alpha": "-1",
    "weight_clip": "0",
    "reward_scale": "0",
    "reward_shift": "inf",
    "log_alpha_max": "nan",
    "policy_noise": "-1",
    "exploration_noise": "-1",
    "noise_clip": "-1",
    "policy_every": "0",
    "top_fraction": "0",
    "context_length": "0",
    "num_heads": "0",
    "dropout": "1",
    "max_timestep": "0",
    "warmup_updates": "0",
    "weight_decay": "-1",
    "gradient_clip": "0",
    "target_return": "nan",
    "return_scale": "0",
    "td_lambda": "1.5",
    "returns_every": "0",
    "phi": "-1",
    "q_mix": "1.5",
    "num_target_actions": "0",
    "num_acting_actions": "0",
    "latent_clip": "0",
    "kl_weight": "-1",
    "vae_learning_rate": "0",
    "flow_learning_rate": "0",
    "flow_steps": "0",
    "diffusion_steps": "0",
    "actor_tau": "0",
    "vae_hidden_dims": "0",
    "flow_hidden_dims": "0",
    "cql_alpha": "-1",
    "num_samples": "0",
    "num_value_samples": "0",
    "actor_beta": "-1",
    "critic_beta": "-1",
    "target_gap": "inf",
    "gap_softness": "0",
    "warm_start": "-1",
    "target_entropy": "nan",
    "min_target": "inf",
    "hidden_dims": "0",
    "penalty_coefficient": "-1",
    "halt_penalty": "-1",
    "horizon": "-1",
    "population": "0",
    "num_best": "0",
    "cem_iterations": "0",
    "value_updates": "0",
    "cem_alpha": "1",
    "num_particles": "0",
    "real_ratio": "1.5",
    "imagined_ratio": "1.5",
    "imagined_until": "0",
    "rollout_length": "0",
    "rollout_batch_size": "0",
    "rollout_every": "0",
    "updates_per_step": "0",
    "model_every": "0",
    "rollouts_kept": "0",
    "num_models": "0",
    "num_elites": "0",
    "dynamics_hidden_dims": "0",
    "dynamics_learning_rate": "0",
    "dynamics_batch_size": "0",
    "dynamics_patience": "0",
    "max_dynamics_epochs": "0",
    "num_members": "1",
    "num_critics": "1",
    "num_target_critics": "0",
    "data_ratio": "1.5",
    "eta": "-1",
    "threshold": "-1",
    "temperature": "0",
    "z_clip": "0",
    "huber_delta": "0",
    "bandwidth": "0",
    "behaviour_learning_rate": "0",
    "alpha_learning_rate": "0",
    "logit_penalty": "-1",
    "bc_weight": "-1",
    "validation_fraction": "1.5",
    "validation_seed": "-1",
}


CANNOT_BE_NONSENSE = {"env_id", "run_dir", "wandb_group", "wandb_entity", "dynamics", "policy_script"}
CANNOT_BE_NONSENSE |= {"policy_run_dir", "value_run_dir"}
CANNOT_BE_NONSENSE |= {"rollout_schedule"}  # four numbers, which test_mbpo.py has


@every_script
def test_nonsense_numbers_are_refused(algorithm):
    args_class = importlib.import_module(algorithm).Args
    for field in typed(args_class):
        if not isinstance(field.default, (bool, str)) and field.name not in CANNOT_BE_NONSENSE:
            flag = f"--{field.name.replace('_', '-')}"
            with pytest.raises(BadInput, match=flag):
                tyro.cli(args_class, args=[flag, NONSENSE[field.name]]).validate()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda():
    assert_one_line(run_script("iql", "--device", "cuda"), "--device cuda: .*no CUDA")


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--batch-size", "0"], "error: --batch-size 0: must be at least 1"),
        (["--expectile", "1.5"], r"error: --expectile 1.5: must be in \(0, 1\)"),
        (
            ["--hidden-dims", "64", "9223372036854775807"],
            r"error: --hidden-dims \(64, 9223372036854775807\): 1 to 100,000",
        ),
        (["--batch-size", "1000000000000"], "error: --batch-size 1000000000000: must be at most 10,000,000"),
        (["--final-eval-episodes", "100000000"], "error: --final-eval-episodes 100000000: must be at most 10,000,000"),
        (
            ["--env-id", "Penduluum-v1"],
            "error: --env-id: environment 'Penduluum-v1' cannot be made: .*Did you mean: `Pendulum`",
        ),
        (["--env-id", "no_such_module:Env-v0"], "error: --env-id: .*no_such_module"),
        (["--dataset-id", "anchorl/none-v0"], "no dataset anchorl/none-v0: give anchorl/"),
        (["--dataset-id", "Pendulum-v1"], "no dataset Pendulum-v1: give anchorl/"),  # an environment's id
        (["--dataset-id", "none"], "no dataset 'none'"),
        (["--env-id", "MountainCarContinuous-v0"], "MountainCarContinuous-v0 has"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, pattern, tmp_path):
    assert_one_line(run_script("iql", *arguments, "--run-dir", str(tmp_path / "run")), pattern)
    assert not (tmp_path / "run").exists()


def test_an_empty_name_is_no_run_dir():
    """Of an unset variable; the run would fill the folder one is in."""
    assert_one_line(run_script("iql", "--run-dir", ""), r"error: --run-dir \.: must name a folder")


@pytest.mark.parametrize(
    ("algorithm", "arguments", "pattern"),
    [
        ("cql", ["--target-gap", "1"], "--target-gap 1.0: has a say with --lagrange alone"),
        ("cql", ["--rho", "uniform"], "--rho uniform: has a say with --variant rho alone"),
        ("cql", ["--gap-softness", "2", "--variant", "var"], "--gap-softness 2.0: has a say with --variant h alone"),
        ("bc", ["--validation-seed", "3"], "--validation-seed 3: needs --validation-fraction"),
        ("cal_ql", ["--target-gap", "1"], "--target-gap 1.0: has a say with --lagrange alone"),
    ],
)
def test_an_argument_without_the_one_it_needs_is_refused(algorithm, arguments, pattern, tmp_path):
    assert_one_line(run_script(algorithm, *arguments, "--run-dir", str(tmp_path / "run")), pattern)
    assert not (tmp_path / "run").exists()


def test_bad_data_is_one_line_and_exit_2(make_dataset, tmp_path):
    broken = random_episode(0)
    broken["rewards"][4] = np.nan
    dataset_id = make_dataset(episodes=[broken], env="Pendulum-v1")
    run = run_script("bc", "--dataset-id", dataset_id, "--run-dir", str(tmp_path / "run"))
    assert_one_line(run, "test/data-v0, episode 0 .repair or remove it.: step 4: rewards hold nan")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_download_without_network_is_one_line(tmp_path):
    """Minari's own retries take half a minute before it gives up."""
    proxy = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    run = run_script("bc", "--dataset-id", "mujoco/hopper/medium-v0", "--run-dir", str(tmp_path / "run"), **proxy)
    assert_one_line(run, "mujoco/hopper/medium-v0 is not local, and its download failed")


@pytest.mark.parametrize("algorithm", ["cal_ql", "rlpd"])
def test_a_share_of_the_data_that_is_no_row_of_a_batch_is_refused(algorithm):
    """Rounded, half of one row is none: the data would never be drawn."""
    run = run_script(algorithm, "--batch-size", "1")
    assert_one_line(run, "error: --data-ratio 0.5: a batch of 1 has no room for both")
