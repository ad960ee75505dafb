"""What holds for the repository as a whole: the design's limits, and that the README tells the truth."""

import ast
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise

import pytest
from conftest import ALGORITHMS, ROOT, run_script

SECTIONS = ["# --- Networks", "# --- Losses", "# --- Update", "# --- Main"]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line for language, block in BLOCKS if language == "bash" for line in block.splitlines() if line.strip()]
SCRIPT_COMMANDS = [line for line in COMMANDS if line.startswith(("python ", "WANDB_MODE="))]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_scripts_are_short_and_keep_their_sections(algorithm):
    path = ROOT / "algorithms" / f"{algorithm}.py"
    text = path.read_text()
    assert len(text.splitlines()) < 500
    places = [text.index(section) for section in ["class Args(", *SECTIONS]]
    assert all(before < after for before, after in pairwise(places))
    for name in ("class Actor", "class Learner", "def build(", "def update(", "def main(", "    launch(main, Args)"):
        assert name in text


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_scripts_import_common_alone(algorithm):
    ours = {
        name
        for name in imports(ROOT / "algorithms" / f"{algorithm}.py")
        if name.split(".")[0] in ("common", *ALGORITHMS)
    }
    assert ours and all(name.startswith("common.") for name in ours)


def test_common_imports_no_algorithm():
    for path in (ROOT / "common").glob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {"algorithms", "benchmarks", *ALGORITHMS}


def test_the_two_commands_of_the_quick_start_are_those_that_ci_runs():
    train, test = (line for line in COMMANDS if line.startswith("python3 -m venv"))
    assert train.endswith("python algorithms/iql.py")
    assert test.endswith("python -m pytest")
    script = (ROOT / ".ci" / "run").read_text()
    for step in test.split(" && "):
        assert step in script


def test_the_readme_has_commands():
    assert len(SCRIPT_COMMANDS) >= 5
    assert {f"algorithms/{name}.py" for name in ALGORITHMS} <= set(re.findall(r"algorithms/\w+\.py", README))


@pytest.mark.parametrize("command", SCRIPT_COMMANDS)
def test_commands_of_the_readme_run(command, tmp_path, make_dataset):
    """Each as it stands, but short; a dataset it would download is made here under the same id."""
    words = shlex.split(command, comments=True)
    environment = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    script = words[1]
    if script.startswith("algorithms/"):
        if "--dataset-id" in words and (dataset_id := words[words.index("--dataset-id") + 1]).count("/") == 2:
            make_dataset(dataset_id, env="Pendulum-v1", ref_min_score=-1200.0, ref_max_score=-150.0)
        words += ["--num-updates", "3", "--eval-episodes", "1"]
        words += ["--run-dir", str(tmp_path / "run")]  # the last one counts
    elif script == "benchmarks/grid.py":
        words = words[: words.index("--")] if "--" in words else words
        words += ["--seeds", "0", "--runs-dir", str(tmp_path), "--results", str(tmp_path / "results.csv")]
        words += ["--", "--num-updates", "3", "--eval-episodes", "1"]
    elif script == "benchmarks/throughput.py":
        words += ["--rounds", "1", "--seconds", "0.01", "--csv", str(tmp_path / "table.csv")]
    elif script == "benchmarks/loading.py":
        words += ["--num-steps", "2000"]
    run = subprocess.run(
        [sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, env=os.environ | environment
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.filterwarnings("ignore::UserWarning")  # Minari wants authors and permalinks
def test_python_of_the_readme_runs(tmp_path, monkeypatch):
    """One snippet records a dataset that a script then trains on, another acts with a trained policy."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    assert run_script("bc", "--num-updates", "2", "--run-dir", "runs/my-run").returncode == 0
    recorded, acted = {}, {}
    snippets = [block for language, block in BLOCKS if language == "python"]
    for snippet, namespace in zip(snippets, (recorded, acted), strict=True):
        exec(compile(snippet, "README.md", "exec"), namespace)
    assert run_script("iql", "--dataset-id", "my/logs-v0", "--num-updates", "2").returncode == 0
    assert acted["actions"].shape == (5, 1)
