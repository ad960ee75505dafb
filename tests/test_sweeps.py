"""The sweeps of W&B: what they draw from are the scripts' real arguments, and a drawn command runs."""

import math
import random
import typing
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, SCRIPTS, SHORTER, run_script, write_policy
from typeguard import check_type

FEW = ["--num-updates", "3", "--eval-episodes", "1", "--final-eval-episodes", "1"]
SWEEPS = ROOT / "benchmarks" / "sweeps"
every_sweep = pytest.mark.parametrize("algorithm", SCRIPTS)


def sweep(algorithm):
    return yaml.safe_load((SWEEPS / f"{algorithm}.yaml").read_text())


def draw(space, rng):
    """A value of a parameter, as W&B defines the kinds that are used here; KeyError for others."""
    if "value" in space:
        return space["value"]
    if "values" in space:
        return rng.choice(space["values"])
    low, high = space["min"], space["max"]
    return {"log_uniform_values": lambda: math.exp(rng.uniform(math.log(low), math.log(high)))}[space["distribution"]]()


@every_sweep
def test_every_value_is_one_that_the_script_takes(algorithm):
    config = sweep(algorithm)
    assert config["program"] == f"algorithms/{algorithm}.py"
    args_class = __import__(algorithm).Args
    kinds = typing.get_type_hints(args_class)
    for name, space in config["parameters"].items():
        values = [space["value"]] if "value" in space else space.get("values") or [space["min"], space["max"]]
        for value in values:
            assert not isinstance(
                value, (bool, list)
            )  # W&B writes --name=True and --name=[1, 2], which no script takes
            check_type(value, kinds[name])
            args_class(**({"policy_run_dir": "runs/first"} if algorithm == "fqe" else {}) | {name: value}).validate()


@every_sweep
def test_a_drawn_command_runs(algorithm, tmp_path, pendulum, monkeypatch):
    """W&B is shown the run of bc in earnest; of the others, that it would be: it takes longer than they do."""
    shown = []
    if algorithm != "bc":
        stand_in = SimpleNamespace(wait=lambda: 0)
        monkeypatch.setattr("common.experiment.Popen", lambda command, **_: shown.append(command) or stand_in)
    config = sweep(algorithm)
    drawn = {name: draw(space, random.Random(name)) for name, space in config["parameters"].items()}
    if algorithm == "fqe":
        drawn["policy_run_dir"] = write_policy(tmp_path / "policy")
    words = [f"--{name}={value}" for name, value in drawn.items()]  # as W&B's ${args} has them
    place = config["command"].index("${program}")
    command = [*config["command"][place + 1 : -1], *words]
    run = run_script(algorithm, *command, *SHORTER.get(algorithm, ()), *FEW, "--run-dir", str(tmp_path / "run"))
    assert run.returncode == 0, run.stderr
    assert "W&B failed" not in run.stderr
    assert shown or list(tmp_path.rglob("*.wandb"))


def test_the_metric_is_one_that_a_run_has(tmp_path, pendulum):
    assert run_script("bc", *FEW, "--run-dir", str(tmp_path / "run")).returncode == 0
    columns = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0].split(",")
    for algorithm in SCRIPTS:
        metric = sweep(algorithm).get("metric")
        assert metric == {"name": "eval/return_mean", "goal": "maximize"} or (algorithm == "fqe" and metric is None)
    assert "eval/return_mean" in columns
