"""What holds for the repository as a whole: the design's limits, and that its pages tell the truth."""

import ast
import glob
import re
import runpy
import shlex
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS

FOLDERS = (".github", "algorithms", "common", "benchmarks")
SECTIONS = ["class HyperParameters", "class Batch", "# --- Networks", "class Learner", "def build(", "# --- Losses"]
SECTIONS += ["# --- Update", "def update(", "# === The copy line", "class Args(HyperParameters, ExperimentArgs)"]
SECTIONS += ["def main(args: Args)", "    launch(main, Args)"]
PAGES = [ROOT / folder / "README.md" for folder in ("", "common", "benchmarks")]  # the later go on from the earlier
TEXT = "".join(page.read_text() for page in PAGES)
MARKDOWN = [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("**/*.md"))]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = [line for language, block in BLOCKS if language == "bash" for line in block.splitlines() if line.strip()]
SCRIPT_COMMANDS = [line for line in COMMANDS if line.startswith(("python ", "WANDB_MODE="))]
STEPS = [  # in the pages' order: some use what others wrote
    step
    for language, block in BLOCKS
    for step in ([block] if language == "python" else block.splitlines())
    if language == "python" or step in SCRIPT_COMMANDS
]
FEW = ["--num-updates", "3", "--eval-episodes", "1", "--final-eval-episodes", "1"]
FEW_COLLECTED = ["--num-updates", "2000", "--steps", "300", "--reference-episodes", "2"]
FEW_SHIFTED = ["--num-states", "50", "--num-updates", "5"]
FEW_FORESEEN = ["--num-starts", "50", "--num-samples", "20"]
FAST_AGENT = ["--hidden-dims", "32", "32", "--gamma", "0.9", "--tau", "0.02", "--random-steps", "250"]
FAST_AGENT += ["--actor-learning-rate", "3e-3", "--critic-learning-rate", "3e-3", "--eval-every", "250"]
SMALL_TABLE = ["--seeds", "0", "--num-updates", "3", "--results", "estimates.csv"]
WITH_MODEL = tuple(f"algorithms/{name}.py" for name in ("mopo", "combo", "mobile", "morel"))
SMALL_DYNAMICS = ["--max-dynamics-epochs", "1", "--dynamics-batch-size", "2048"]
SMALL_MODEL = [*SMALL_DYNAMICS, "--rollout-batch-size", "100"]
FEW_EXPANDED = ["--seeds", "0", "--ages", "1", "2", "--num-states", "3", "--num-steps", "2"]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("algorithm", SCRIPTS)
def test_scripts_are_short_and_keep_their_sections(algorithm):
    path = ROOT / "algorithms" / f"{algorithm}.py"
    text = path.read_text()
    assert len(text.splitlines()) < 500
    places = [text.index(section) for section in SECTIONS]
    assert all(before < after for before, after in pairwise(places))
    assert ("class Actor" in text) == (algorithm != "fqe")  # which learns no policy


@pytest.mark.parametrize("algorithm", SCRIPTS)
def test_scripts_import_common_alone(algorithm):
    ours = {
        name for name in imports(ROOT / "algorithms" / f"{algorithm}.py") if name.split(".")[0] in ("common", *SCRIPTS)
    }
    assert ours and all(name.startswith("common.") for name in ours)


def test_common_is_thin():
    files = list((ROOT / "common").glob("**/*.py"))
    assert len(files) <= 7 and sum(len(path.read_text().splitlines()) for path in files) <= 1000


def test_the_tools_are_short():
    assert all(len(path.read_text().splitlines()) <= 400 for path in (ROOT / "benchmarks").glob("**/*.py"))


def test_common_imports_no_algorithm():
    for path in (ROOT / "common").glob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {"algorithms", "benchmarks", *SCRIPTS}


def test_the_two_commands_of_the_quick_start_are_those_that_ci_runs():
    train, test = (line for line in COMMANDS if line.startswith("python3 -m venv"))
    assert train.endswith("python algorithms/iql.py")
    assert test.endswith("python -m pytest")
    script = (ROOT / ".ci" / "run").read_text()
    for step in test.split(" && "):
        assert step in script


def test_the_readme_has_commands():
    assert len(SCRIPT_COMMANDS) >= 5
    assert {f"algorithms/{name}.py" for name in SCRIPTS} <= set(re.findall(r"algorithms/\w+\.py", PAGES[0].read_text()))


def anchors(page):
    """What GitHub makes of a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return {
        re.sub(r"[^\w\- ]", "", line).strip().lower().replace(" ", "-")
        for line in re.findall(r"^#+ (.*)", text, flags=re.MULTILINE)
    }


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert link.startswith("https://") or target.exists(), link
        assert target.suffix != ".md" or not anchor or anchor in anchors(target), link


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where all that the pages run is run, in their order: it looks like a clone, with a script of a user's own."""
    home = tmp_path_factory.mktemp("home")
    for name in ("algorithms", "common"):
        (home / name).symlink_to(ROOT / name)
    (home / "projects").mkdir()
    shutil.copy(ROOT / "algorithms" / "iql.py", home / "projects" / "my_iql.py")
    return home


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.splitlines()[0])
def test_the_readme_runs(step, home, make_dataset, datasets_path, warm, monkeypatch):
    """Python as it stands; commands, too, but short, and a dataset one would download is made here under its id."""
    monkeypatch.chdir(home)
    if step.startswith("# clinic.py"):
        Path("clinic.py").write_text(step)
    if step not in SCRIPT_COMMANDS:
        exec(compile(step, "README.md", "exec"), {})
        return
    words = shlex.split(step, comments=True)
    while re.match(r"[A-Z_]+=", words[0]):
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    words.pop(0)  # python
    if words[0].startswith(("algorithms/", "projects/")):
        dataset_id = words[words.index("--dataset-id") + 1] if "--dataset-id" in words else ""
        if dataset_id.count("/") == 2 and not (datasets_path / dataset_id).exists():
            make_dataset(dataset_id, env="Pendulum-v1", ref_min_score=-1200.0, ref_max_score=-150.0)
        words += FEW + (SMALL_MODEL if words[0] in WITH_MODEL else [])
        words += ["--online-steps", "5"] if "--online-steps" in words else []
    elif words == ["clinic.py"]:
        assert (home / "clinic.py").exists()  # the block before wrote it
    elif words[1] == "benchmarks.collect":
        split = words.index("--")
        words = words[:split] + FEW_COLLECTED + words[split:] + FAST_AGENT
    elif words[1] == "benchmarks.record":
        words += ["--steps", "200"]
    elif words[1] == "benchmarks.run":
        split = words.index("--")
        words = [*words[:split], "--seeds", "1", *words[split:], *FEW]
    elif words[1] == "benchmarks.shift_report":
        words += FEW_SHIFTED
    elif words[1] == "benchmarks.model_report":
        words += FEW_FORESEEN
    elif words[1] == "benchmarks.watch":
        words += ["--max-steps", "3"]
    elif words[1] == "benchmarks.select":
        monkeypatch.syspath_prepend(home)  # where clinic.py is
        words = [name for word in words for name in (sorted(glob.glob(word)) if "*" in word else [word])]
        words += ["--num-updates", "20", "--eval-episodes", "2"]
    execute(words, monkeypatch)


def execute(words, monkeypatch):
    """What `python *words` does, in this process, which spares the seconds that a fresh one takes to import torch."""
    start = runpy.run_path if words[0] != "-m" else runpy.run_module
    program = (
        words.pop(1) if words[0] == "-m" else str(ROOT / words[0] if (ROOT / words[0]).exists() else Path(words[0]))
    )
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.delitem(sys.modules, program, raising=False)  # so that a module which a test imported runs afresh
    try:
        start(program, run_name="__main__")
    except SystemExit as stop:
        assert not stop.code


GPU_TRIAL = ["--device", "cpu", "--modes", "eager", "--algorithms", "bc", "--rounds", "1", "--seconds", "0.01"]
GPU_TRIAL += ["--shared-algorithm", "bc", "--processes", "2", "--long-algorithms", "bc", "--long-updates", "300"]
RUN = "runs/grid/iql/anchorl-pendulum-mixed-v0/0"
FEW_CHOICES = ["--tasks", "cartpole", "--repetitions", "1", "--updates", "2", "4", "--num-updates", "20"]
FEW_CHOICES += ["--eval-episodes", "1", "--workers", "1"]
SMALL_GROWTH = ["--transitions", "1000", "--widths", "8", "16", "--batches", "32", "--critics", "2"]
BENCHMARKS = {  # in this order: report.py, shift_report.py, watch.py, record.py and export.py read what run.py wrote
    "run.py": ["--algorithms", "bc", "iql", "--seeds", "2", "--out", "runs/grid", "--", *FEW],
    "report.py": ["runs/grid", "--out", "report"],
    "measurements/throughput.py": [
        "--algorithms",
        "iql",
        "mopo:dynamics",
        "--bf16",
        "--rounds",
        "1",
        "--seconds",
        "0.01",
        "--csv",
        "x.csv",
    ],
    "measurements/gpu.py": [*GPU_TRIAL, "--out", "."],
    "measurements/seeds.py": ["--num-seeds", "1", "2", "--rounds", "1", "--steps", "2"],
    "measurements/growth.py": [*SMALL_GROWTH, "--rounds", "1", "--seconds", "0.01"],
    "measurements/compiling.py": ["--algorithms", "bc", "--rounds", "1", "--seconds", "0.01", "--csv", "x.csv"],
    "measurements/returns.py": ["--num-episodes", "3", "--rounds", "1"],
    "measurements/loading.py": ["--num-steps", "2000"],
    "measurements/evaluation.py": ["--env-id", "Pendulum-v1", "--rounds", "1"],
    "measurements/memory.py": ["--num-steps", "2000"],
    "measurements/coverage.py": ["--seeds", "3", "--datasets", "2", "--simulations", "100", "--num-episodes", "2"],
    "measurements/choices.py": [*FEW_CHOICES, "--out", "choices", "--results", "choices.csv"],
    "measurements/threads.py": ["--algorithms", "bc", "--num-updates", "2", "--rounds", "1"],
    "measurements/expansion.py": [*FEW_EXPANDED, "--", *SMALL_DYNAMICS, "--dynamics-hidden-dims", "8"],
    "measurements/estimates.py": [*SMALL_TABLE, "--eval-episodes", "1", "--", *FEW[:2]],
    "collect.py": ["--env-id", "Pendulum-v1", "--prefix", "test/pendulum", *FEW_COLLECTED, "--", *FAST_AGENT],
    "inspect_dataset.py": ["anchorl/pendulum/mixed-v0", "--out", "data.png"],
    "shift_report.py": [RUN, *FEW_SHIFTED],
    "watch.py": [RUN, "--max-steps", "3"],
    "record.py": ["--policy-run-dir", RUN, "--dataset-id", "test/recorded-v0", "--steps", "200"],
    "export.py": [RUN],
    "built_in.py": ["--out", "built_in"],
    "import_logs.py": ["logs.csv", "--dataset-id", "test/imported-v0"],
    "measurements/soak.py": ["--num-updates", "300", "--max-growth", "20"],  # the import of torch is most of it
}
LOGS = "episode,obs_0,action_0,reward,terminated\n1,0.5,-1,1,0\n1,0.6,1,1,1\n"


SLOW = (
    "collect.py",
    *(
        f"measurements/{name}.py"
        for name in ("choices", "compiling", "estimates", "gpu", "loading", "memory", "threads")
    ),
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in BENCHMARKS]
)
def test_benchmarks_run(name, home, pendulum, warm, monkeypatch):
    (home / "logs.csv").write_text(LOGS)
    monkeypatch.chdir(home)
    execute([f"benchmarks/{name}", *BENCHMARKS[name]], monkeypatch)


def test_the_peers_speed_is_asked_for_by_lines(tmp_path, monkeypatch, capsys):
    """d3rlpy and JAX are not among the test's packages: a script answers as d3rlpy_speed.py or jax_speed.py would."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nwhile read seconds; do echo 12.5; done\n")
    python.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    words = ["--rounds", "1", "--seconds", "0.01", "--peers", str(python), "--jax", str(python), "unifloral"]
    words += ["--algorithms", "bc", "iql --hidden-dims 16 8"]
    execute(["benchmarks/measurements/throughput.py", *words], monkeypatch)
    printed = capsys.readouterr().out
    assert re.search(r"bc +d3rlpy +cpu +\d+ +12.5 ", printed) and not re.search(r"bc +jax", printed)
    assert re.search(r"iql --hidden-dims 16 8 +jax +cpu +\d+ +12.5 ", printed)


def test_every_benchmark_is_tested():
    tried_with_others = {"shift_measures.py", "trained_run.py", "grid_results.py", "scratch.py", "reference_returns.py"}
    tried_with_others |= {f"log_{name}.py" for name in ("cells", "choices", "csv", "hdf5", "order", "steps", "tables")}
    tried_with_others |= {
        "intervals.py",
        "read_runs.py",
        "shift_actions.py",
        "inspect_actions.py",
        "inspect_problems.py",
    }
    tried_with_others |= {"select.py", "selection.py"}  # as benchmarks/README.md's
    tried_with_others |= {"model_report.py", "model_measures.py"}  # of a run with a model, likewise
    tried_with_others |= {"measurements/tables.py", "measurements/paths.py", "two_ways.py", "track.py"}
    tried_with_others |= {"measurements/online.py", "measurements/acting.py", "measurements/pace.py"}
    tried_with_others.add("measurements/gpu_table.py")
    folder = ROOT / "benchmarks"
    names = {str(path.relative_to(folder)) for path in [*folder.glob("*.py"), *folder.glob("measurements/*.py")]}
    assert names == BENCHMARKS.keys() | tried_with_others
