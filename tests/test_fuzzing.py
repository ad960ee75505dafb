"""Bad input by the hundred: mutated datasets, run files and command lines work, or are one line and exit code 2.

ANCHORL_FUZZ=1000 in the environment adds 1,000 cases of each kind, of other seeds; `-k more` runs them alone.
"""

import contextlib
import dataclasses
import gzip
import importlib
import io
import json
import math
import os
import random
import re
import shutil
import sys
from types import SimpleNamespace
from unittest import mock

import h5py
import minari
import numpy as np
import pytest
import torch
from conftest import ALGORITHMS, MODEL, random_episode
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from common.command_line import ExperimentArgs, interruption, launch

FEW = ["--num-updates", "2", "--eval-episodes", "1", "--final-eval-episodes", "1", "--hidden-dims", "4"]
NUMBERS = [np.nan, np.inf, -np.inf, 1e30, 1e300, 0, -1, 2**31, -(2**63)]
DTYPES = ["f2", "f8", "i1", "i8", "u4", "?", "S3", "c8", h5py.string_dtype()]
COUNTS = [cases] if (cases := int(os.environ.get("ANCHORL_FUZZ", "0"))) else []
MORE = [pytest.param(count, id="more") for count in COUNTS]
VALUES = [None, "", "x", -1, 0, 10**18, 1.5, True, [], [[]], {}, {"a": 1}, "NaN", "../..", "null"]


def run_quietly(words, script="bc"):
    """A script's exit code and what it said; an exception that it lets through fails the test by itself."""
    module, errors = importlib.import_module(script), io.StringIO()
    code = 0
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(errors),
        mock.patch.object(sys, "argv", [f"{script}.py", *words]),
    ):
        try:
            launch(module.main, module.Args)
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            vars(interruption).clear()  # as in a fresh process
    return code, errors.getvalue()


def assert_trains_or_refuses(words, folder, script="bc"):
    code, errors = run_quietly([*words, "--run-dir", str(folder)], script)
    if code in (0, 3):  # 3: numbers that are finite, but not in the losses
        assert (folder / "result.json").exists() == (code == 0)
    else:
        ours, tyros = re.fullmatch(r"(warning: .*\n)*error: .+\n", errors), "For full helptext" in errors
        assert code == 2 and (ours or tyros), errors
        assert not folder.exists(), sorted(folder.iterdir())


def imports(file, words, env):
    """Whether `import_logs` makes a dataset of an HDF5 file; if not, it must say why."""
    code, errors = run_quietly([str(file), *words, *env], "import_logs")
    assert code == 0 or (code == 2 and re.fullmatch(r"(warning: .*\n)*error: .+\n", errors)), errors
    return code == 0


# --- Datasets ---


def mutate_bytes(path, rng):
    """Flips up to 20 bytes, cuts the file, or empties it."""
    data = bytearray(path.read_bytes())
    how = rng.random()
    if how < 0.6:
        for _ in range(rng.randint(1, 20)):
            data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    else:
        data = data[: rng.randrange(len(data)) if how < 0.95 else 0]
    path.write_bytes(data)


def mutate_arrays(path, rng):
    """Leaves one array of an HDF5 file out, or gives it another length, rank, type or value."""
    with h5py.File(path, "a") as file:
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        name = rng.choice(names)
        values, attributes = file[name][()], dict(file[name].attrs)
        del file[name]
        how = rng.randrange(8)
        if how == 1:
            values = values[rng.choice([slice(1, None), slice(None, -1), slice(0, 0), slice(0, 1)])]
        elif how == 2:
            values = np.concatenate([values, values[-1:]])
        elif how == 3:
            values = values[..., None] if rng.random() < 0.5 else values.reshape(-1)
        elif how == 4:
            dtype = rng.choice(DTYPES)
            values = values.astype(str).astype(object) if dtype == DTYPES[-1] else values.astype(dtype)
        elif how == 5:
            values = values.astype(float)
            values.reshape(-1)[rng.randrange(values.size)] = rng.choice(NUMBERS)
        elif how == 6:
            values = np.full_like(values, rng.choice(NUMBERS), dtype=float)
        elif how == 7:
            values = rng.choice([np.float32(1), np.zeros((3, 0)), np.zeros((0, 3, 2))])
        if how:
            file.create_dataset(name, data=values).attrs.update(attributes)


def mutate_attributes(path, rng):
    """Changes or drops one of the facts that Minari keeps beside the arrays."""
    with h5py.File(path, "a") as file:
        holders = [file, *(item for item in file.values() if isinstance(item, h5py.Group))]
        holder = rng.choice([item for item in holders if item.attrs.keys()] or holders)
        if not holder.attrs.keys() or rng.random() < 0.3:
            del file[rng.choice(sorted(file))]
            return
        name = rng.choice(sorted(holder.attrs))
        del holder.attrs[name]
        if rng.random() < 0.7:
            holder.attrs[name] = rng.choice([-1, 0, 1.5, "x", 10**9, np.zeros(2), b"\xff"])


def mutate_metadata(path, rng):
    """Changes a value of metadata.json, or one within the JSON that it holds as text; or makes it no JSON."""
    metadata = json.loads(path.read_text())
    name = rng.choice(sorted(metadata))
    how = rng.random()
    if how < 0.1:
        path.write_text(path.read_text()[: rng.randrange(len(path.read_text()))])
        return
    if how < 0.6 and name in ("env_spec", "observation_space", "action_space"):
        inner = json.loads(metadata[name])
        key = rng.choice(sorted(inner))
        inner[key] = rng.choice(VALUES)
        metadata[name] = json.dumps(inner)
    elif how < 0.75:
        del metadata[name]
    else:
        metadata[name] = rng.choice(VALUES)
    path.write_text(rng.choice([json.dumps(metadata)] * 9 + [json.dumps([metadata])]))


def write_d4rl(path):
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["observations"] = rng.normal(size=(40, 3)).astype(np.float32)
        file["actions"] = rng.uniform(-1, 1, size=(40, 1)).astype(np.float32)
        file["rewards"] = rng.normal(size=40).astype(np.float32)
        file["terminals"] = np.arange(40) == 9
        file["timeouts"] = np.arange(40) % 20 == 19


@pytest.mark.parametrize(
    "cases",
    [
        60,
        pytest.param(range(60, 560), marks=pytest.mark.slow),
        *(pytest.param(range(10**6, 10**6 + 6 * n), id="more") for n in COUNTS),
    ],
)
def test_mutated_datasets(cases, make_dataset, datasets_path, tmp_path):
    episodes = [random_episode(index, length=5) for index in range(3)]
    source = datasets_path / make_dataset(
        episodes=episodes, env="Pendulum-v1", ref_min_score=-1000.0, ref_max_score=-200.0
    )
    intact = shutil.copytree(source, tmp_path / "intact")
    write_d4rl(tmp_path / "intact.hdf5")
    failures = {}
    for case in cases if isinstance(cases, range) else range(cases):
        rng, kind = random.Random(case), case % 6
        shutil.rmtree(source)
        shutil.copytree(intact, source)
        file = tmp_path / f"data-{case}.hdf5"
        shutil.copy(tmp_path / "intact.hdf5", file)
        minari_file = source / "data" / "main_data.hdf5"
        if kind == 0:
            mutate_metadata(source / "data" / "metadata.json", rng)
        elif kind == 1:
            mutate_attributes(minari_file, rng)
        else:
            (mutate_bytes if kind < 4 else mutate_arrays)(minari_file if kind % 2 else file, rng)
        words, env = ["--dataset-id", "test/data-v0"], rng.choice([[], ["--env-id", "Pendulum-v1"]])
        try:
            if kind in (0, 1, 3, 5) or imports(file, words := ["--dataset-id", f"fuzzed/data-v{case}"], env):
                assert_trains_or_refuses([*words, *env, *FEW], tmp_path / f"run-{case}", rng.choice(["bc", "awr"]))
        except Exception as error:  # also what scripts let through, which users would see as a traceback
            failures[case] = f"{type(error).__name__}: {error}"[:300]
        file.unlink()
    assert not failures
    assert not list(datasets_path.glob(".making-*"))


# --- Tables ---

TIMES = {  # of the steps 0, 1, 2, ...; the last cannot tell the day from the month
    "step": lambda step: str(step),
    "date": lambda step: f"2023-12-{step + 20} 08:00",
    "german": lambda step: f"{step + 20}.12.2023",
    "clock": lambda step: f"{step + 9:02}:15:00",
    "unclear": lambda step: f"{step + 1:02}/{7 - step:02}/2023",
}
DIALECTS = st.fixed_dictionaries(
    {
        "rows": st.permutations(range(18)),
        "mark": st.sampled_from(",;\t|"),
        "decimal": st.sampled_from(".,"),
        "encoding": st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252"]),
        "zipped": st.booleans(),
        "time": st.sampled_from(sorted(TIMES)),
        "values": st.lists(
            st.one_of(st.integers(-9999, 9999), st.floats(-1e9, 1e9, allow_subnormal=False)), min_size=18, max_size=18
        ),
        "digits": st.integers(0, 6),
    }
)


def write_log(path, case):
    """Three episodes of six steps, their rows in any order, in any dialect: the values are observations and actions."""
    lines = []
    for row in [None, *case["rows"]]:
        if row is None:
            cells = ["episode", "when", "obs_0 °C", "action_0", "reward", "terminated"]
        else:
            number = f"{case['values'][row]:.{case['digits']}f}".replace(".", case["decimal"])
            cells = [f"e{row // 6}", TIMES[case["time"]](row % 6), number, number, str(row), str(int(row % 6 == 5))]
        quoted = [f'"{cell}"' if case["mark"] in cell else cell for cell in cells]
        lines.append(case["mark"].join(quoted) + "\n")
    content = "".join(lines).encode(case["encoding"])
    path.write_bytes(gzip.compress(content) if case["zipped"] else content)


def tables_in_dialects(count):
    @seed(count)
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(DIALECTS)
    def check(tmp_path, datasets_path, outcomes, case):
        path, folder = tmp_path / "logs.csv", datasets_path / "fuzzed" / "table-v0"
        shutil.rmtree(folder, ignore_errors=True)
        write_log(path, case)
        words = [str(path), "--dataset-id", "fuzzed/table-v0", "--order", "when"]
        code, errors = run_quietly(words, "import_logs")
        outcomes.append(code)
        if code:
            assert code == 2 and re.fullmatch(r"(warning: .*\n)*error: .+\n", errors), errors
            assert not folder.exists()
            return
        appeared = list(dict.fromkeys(row // 6 for row in case["rows"]))
        rows = [row for episode in appeared for row in range(6 * episode, 6 * episode + 6)]
        episodes = list(minari.load_dataset("fuzzed/table-v0"))
        assert [reward for episode in episodes for reward in episode.rewards] == rows
        values = np.array([float(f"{case['values'][row]:.{case['digits']}f}") for row in rows])
        np.testing.assert_array_equal(np.concatenate([episode.observations[:-1, 0] for episode in episodes]), values)
        np.testing.assert_array_equal(
            np.concatenate([episode.actions[:, 0] for episode in episodes]), np.float32(values)
        )

    return check


@pytest.mark.parametrize("count", [25, pytest.param(500, marks=pytest.mark.slow), *MORE])
def test_tables_in_any_dialect_and_order(count, tmp_path, datasets_path):
    outcomes = []
    tables_in_dialects(count)(tmp_path, datasets_path, outcomes)
    assert outcomes.count(0) > len(outcomes) / 2


# --- Run files ---

RUN = [*FEW, "--num-updates", "3", "--eval-every", "1", "--checkpoint-every", "1", "--batch-size", "4"]
ON_DATA = [*RUN, "--dataset-id", "test/data-v0"]
ON_MODEL = [*ON_DATA, *MODEL, "--rollout-batch-size", "8", "--rollout-every", "2"]
COLLECT = ["--env-id", "Pendulum-v1", "--num-updates", "3", "--steps", "1", "--reference-episodes", "1"]
RUNS = {  # scripts whose runs are mutated, and how they are made
    "bc": ON_DATA,
    "iql": ON_DATA,
    "mopo": ON_MODEL,
    "fqe": [*ON_DATA, "--policy-run-dir", "{runs}/bc"],
    "sac": [*RUN, "--random-steps", "200", "--keep-policies"],
}
CHECKPOINTS, ALL = ("checkpoint.pt",), ("args.json", "checkpoint.pt", "metrics.csv", "policy.pt", "result.json")
READERS = [  # what reads a run folder, whose run, the files of it that are mutated, and with what arguments
    *((script, script, CHECKPOINTS, [*words, "--resume", "--run-dir", "{run}"]) for script, words in RUNS.items()),
    ("bc", "bc", ALL, [*ON_DATA, "--resume", "--run-dir", "{run}"]),
    ("fqe", "fqe", ("policy.pt",), [*RUNS["fqe"], "--resume", "--run-dir", "{run}"]),
    ("fqe", "bc", ("policy.pt",), [*ON_DATA, "--policy-run-dir", "{run}", "--run-dir", "{run}/fqe"]),
    ("mopo", "mopo", CHECKPOINTS, [*ON_MODEL, "--dynamics", "{run}", "--run-dir", "{run}/mopo"]),
    ("shift_report", "iql", ALL, ["{run}", "--num-states", "50", "--num-updates", "1", "--eval-episodes", "0"]),
    ("watch", "bc", ("args.json", "policy.pt"), ["{run}", "--out", "{run}/a.gif", "--max-steps", "1", "--height", "9"]),
    (
        "collect",
        "sac",
        (*ALL, *ALL, "policy-1.pt", "policy-2.pt", "policy-3.pt"),
        [*COLLECT, "--run-dir", "{run}", "--quality", "full-replay", "--medium", "1e-9", "--prefix", "fuzzed/agent"],
    ),
]


def mutate_value(value, rng):
    """Another one in its place; of a tensor also one of another shape or type, or with a number that is none."""
    if not isinstance(value, torch.Tensor) or rng.random() < 0.2:
        return rng.choice(VALUES)
    if value.numel() and value.is_floating_point() and rng.random() < 0.4:
        changed = value.clone()
        changed.view(-1)[rng.randrange(changed.numel())] = rng.choice([math.nan, math.inf, 1e30])
        return changed
    dtypes = torch.float64, torch.int64, torch.bool, torch.complex64, torch.uint8
    shapes = value[..., None], value.reshape(-1), value[:0] if value.ndim else value[None], torch.zeros(1)
    return rng.choice([*shapes, *(value.to(dtype) for dtype in dtypes)])


def mutate_tree(tree, rng):
    """Changes, drops or adds one thing somewhere in dictionaries and lists."""
    place = None
    while tree:
        place = rng.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        if not isinstance(tree[place], (dict, list)) or rng.random() < 0.3:
            break
        tree, place = tree[place], None
    how = rng.random()
    if how < 0.1 or place is None:
        tree.update(more=rng.choice(VALUES)) if isinstance(tree, dict) else tree.append(rng.choice(VALUES))
    elif how < 0.4:
        del tree[place]
    else:
        tree[place] = mutate_value(tree[place], rng)


def mutate_lines(path, rng):
    """Changes bytes, drops a line or a column of a CSV file, or puts something else in a cell."""
    rows, how = [line.split(",") for line in path.read_text().splitlines()], rng.randrange(5)
    if how == 0:
        mutate_bytes(path, rng)
        return
    row, column = rng.choice(rows), rng.randrange(len(rows[0]))
    if how == 1:
        rows.remove(row)
    elif how == 2:
        rows = [cells[:column] + cells[column + 1 :] for cells in rows]
    else:
        row[column] = rng.choice(["", "x", "nan", "1,2", "1e999", '"', "-1", "\0"])
    path.write_text("".join(",".join(cells) + "\n" for cells in rows))


def mutate_run(path, rng):
    """Changes one of the files of a run."""
    if path.suffix == ".csv":
        mutate_lines(path, rng)
    elif rng.random() < 0.1:
        mutate_bytes(path, rng)
    else:
        tree = torch.load(path, weights_only=True) if path.suffix == ".pt" else json.loads(path.read_text())
        mutate_tree(tree, rng)
        tree = rng.choice([tree] * 19 + [[tree]])
        torch.save(tree, path) if path.suffix == ".pt" else path.write_text(json.dumps(tree))


def make_runs(folder):
    """A run of each script, to be copied."""
    for script, words in RUNS.items():
        words = [word.format(runs=folder) for word in words]
        code, errors = run_quietly([*words, "--run-dir", str(folder / script)], script)
        assert code == 0, errors


def assert_reads_or_refuses(case, rng, runs, run):
    """Exit code 0, 3 (numbers that are finite, but not in the losses), or 2 with one line; gives it."""
    reader, script, files, words = READERS[case % len(READERS)]
    shutil.copytree(runs / script, run)
    mutate_run(run / rng.choice(files), rng)
    code, errors = run_quietly([word.format(run=run, runs=runs) for word in words], reader)
    assert code in (0, 3) or (code == 2 and re.fullmatch(r"(.*warning: .*\n)*.*error: .+\n", errors)), errors
    return code


@pytest.mark.parametrize("cases", [36, pytest.param(360, marks=pytest.mark.slow), *MORE])
def test_mutated_run_files(cases, make_dataset, tmp_path, datasets_path, monkeypatch):
    def go_on(command):  # collect's agent, in this process
        code, errors = run_quietly(command[2:], "sac")
        sys.stderr.write(errors)
        return SimpleNamespace(returncode=code)

    make_dataset(episodes=[random_episode(index, length=40) for index in range(3)], env="Pendulum-v1")
    monkeypatch.setattr("common.experiment.Run._plot", lambda *_: None)
    monkeypatch.setattr("fqe.plot", lambda *_: None)
    monkeypatch.setattr("collect.subprocess.run", go_on)
    make_runs(tmp_path)
    failures = {}
    for case in range(cases):
        run = tmp_path / "run"
        try:
            assert_reads_or_refuses(case, random.Random(cases * 10**6 + case), tmp_path, run)
        except Exception as error:  # also what scripts let through, which users would see as a traceback
            failures[case, READERS[case % len(READERS)][0]] = f"{type(error).__name__}: {error}"[:300]
        shutil.rmtree(run)
        shutil.rmtree(datasets_path / "fuzzed", ignore_errors=True)
    assert not failures


# --- Command lines ---


def arguments_of(script):
    """Two or fewer arguments of a script's own, each with a value that may be nonsense."""
    fields = [field.name for field in dataclasses.fields(importlib.import_module(script).Args)]
    plumbing = {field.name for field in dataclasses.fields(ExperimentArgs)}
    costly = {"num_updates", "eval_episodes", "run_dir", "compile", "track", "device", "resume", "hidden_dims"}
    costly |= {"batch_size", "num_samples", "num_target_actions", "num_acting_actions", "vae_hidden_dims"}  # of memory
    costly |= {"imagined_ratio"}  # NAF's, of a model
    names = sorted(set(fields) - costly - (plumbing - {"dataset_id", "env_id", "seed", "eval_every", "log_every"}))
    value = st.one_of(
        st.integers(-(2**70), 2**70).map(str),
        st.floats(allow_subnormal=False).map(str),
        st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=8),
        st.sampled_from(
            ["", "-", "--", "0", "1", "-1", "nan", "1e-400", "None", "True", "../..", "x.hdf5", "/", "\0.h5"]
        ),
    )
    flag = st.sampled_from([f"--{name.replace('_', '-')}" for name in names] + ["--no-such", "-x", "--seed="])
    pair = st.tuples(flag, value).map(list) | flag.map(lambda name: [name]) | value.map(lambda word: [word])
    return st.lists(pair, max_size=2).map(lambda pairs: [word for words in pairs for word in words])


def mutated_command_lines(count):
    scripts = st.sampled_from(
        [name for name in ALGORITHMS if name not in ("mopo", "combo", "mobile", "morel", "mve", "pets")]
    )  # whose model takes long
    commands = scripts.flatmap(lambda script: st.tuples(st.just(script), arguments_of(script)))

    @seed(count)
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(commands)
    def check(tmp_path, command):
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        script, words = command
        if not {"-h", "--help"} & set(words):
            assert_trains_or_refuses([*FEW, "--batch-size", "4", *words], folder, script)

    return check


@pytest.mark.parametrize("count", [25, pytest.param(200, marks=pytest.mark.slow), *MORE])
def test_mutated_command_lines(count, tmp_path, pendulum, monkeypatch):
    def download(dataset_id):
        raise ConnectionError("no network")

    monkeypatch.setattr("minari.download_dataset", download)
    mutated_command_lines(count)(tmp_path)
