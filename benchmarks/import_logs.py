"""Converts a table of logs, CSV or Parquet, to a local Minari dataset that every script trains on.

The table has one row per step; the rows of an episode follow each other, in order. A row holds what was observed, the
action taken on it, the reward that came of it, and whether it ended the episode: `terminated` if the task did,
`truncated` if a time limit or the logging did. Columns of vectors share a prefix: obs_0, obs_1, ..., action_0, ...

The next observation of a row is the observation of the row after it. That of an episode's last row is in columns
next_obs_0, next_obs_1, ... Without them nothing is lost of an episode that terminated, since nothing looks past its
end; the last row of any other episode only says what the row before it led to, and its action and reward are dropped.

Rows are counted from 1, without the header. Observations and actions become float32, as training has them.

Run: python -m benchmarks.import_logs logs.parquet --dataset-id my/logs-v0
"""

import csv
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import minari
import numpy as np
import tyro
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import parse_dataset_id
from minari.namespace import validate_namespace
from minari.storage.datasets_root_dir import get_dataset_path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.datasets import BadInput, action_bounds, check, one_line, scratch_root
from common.evaluation import register_environments
from common.experiment import launch


@dataclass
class Args:
    file: tyro.conf.Positional[Path]
    """the table: .csv (with commas and a header) or .parquet"""
    dataset_id: str
    """Minari id of the dataset to write, such as my/logs-v0"""
    episode: str = "episode"
    """column of the episode's id, a number or a text"""
    reward: str = "reward"
    """column of the reward"""
    terminated: str = "terminated"
    """column, true (or 1) where the task ended the episode"""
    truncated: str = "truncated"
    """column, true (or 1) where a limit cut the episode; may be absent"""
    observation_prefix: str = "obs_"
    """columns of the observation begin with this"""
    action_prefix: str = "action_"
    """columns of the action begin with this"""
    next_observation_prefix: str = "next_obs_"
    """columns of the next observation begin with this; may be absent"""
    action_low: tuple[float, ...] | None = None
    """lowest actions, one per column or one for all; default: the lowest in the table"""
    action_high: tuple[float, ...] | None = None
    """highest actions, one per column or one for all; default: the highest in the table"""
    env_id: str | None = None
    """environment to evaluate in; default: none, and training skips evaluation"""


class Columns(NamedTuple):
    """Names of the table's columns, those of a vector in its order."""

    observations: list[str]
    actions: list[str]
    next_observations: list[str]  # empty where the table has none
    truncated: str | None


class Steps(NamedTuple):
    """The rows of the table."""

    observations: np.ndarray  # [rows, observation_dim]
    actions: np.ndarray  # [rows, action_dim]
    rewards: np.ndarray  # [rows]
    terminations: np.ndarray  # [rows], as are truncations
    truncations: np.ndarray
    next_observations: np.ndarray | None  # [rows, observation_dim]
    ends: np.ndarray  # [episodes], where each episode's rows end


# --- Reading --------------------------------------------------------------------------------------------------------


def read_header(path: Path) -> list[str]:
    """The table's column names. Raises BadInput if there is no such file, or if it cannot be read."""
    check(path.suffix.lower() in (".csv", ".parquet"), f"{path}: unknown suffix {path.suffix!r}: give .csv or .parquet")
    check(path.is_file(), f"no file {path}: give the path of a .csv or .parquet file")
    try:
        import pandas  # noqa: F401, needed for what follows
        from pyarrow import parquet
    except ImportError:
        raise BadInput("reading logs needs pandas and pyarrow: pip install -e '.[logs]'") from None
    try:
        if path.suffix.lower() == ".parquet":
            return list(parquet.read_schema(path).names)
        with path.open(newline="", encoding="utf-8-sig") as file:
            return next((row for row in csv.reader(file) if row), [])
    except Exception as error:  # the readers raise many kinds
        raise BadInput(f"cannot read {path}: {one_line(error)}") from None


def read_table(path: Path, names: list[str], episode: str) -> Any:
    """A pandas table of at least the columns `names`. Raises BadInput if the file is damaged or holds no rows."""
    import pandas
    from pyarrow import parquet

    try:
        if path.suffix.lower() == ".parquet":
            with parquet.ParquetFile(path) as file:
                table = file.read(columns=names).to_pandas(ignore_metadata=True, split_blocks=True, self_destruct=True)
        else:
            with warnings.catch_warnings(action="ignore"):  # newer versions round correctly, and warn of being asked to
                warnings.simplefilter("error", pandas.errors.ParserWarning)  # a first row longer than the header
                table = pandas.read_csv(
                    path,
                    index_col=False,
                    dtype={episode: str},
                    na_filter=False,  # an empty cell is to be found by the checks, an episode may be called NA
                    float_precision="round_trip",
                    low_memory=False,
                )
    except Exception as error:  # the readers raise many kinds
        raise BadInput(f"cannot read {path}: {one_line(error)}") from None
    check(len(table) > 0, f"{path}: the table is empty: it has a header and no rows")
    return table


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sorts obs_2 before obs_10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name


def find_columns(path: Path, names: list[str], args: Args) -> Columns:
    """Says which columns are which. Raises BadInput if one is missing, there twice, or without a partner."""
    found = f"it has {', '.join(names[:50]) or 'no columns'}"
    single = [args.episode, args.reward, args.terminated, args.truncated]
    check(len(set(single)) == 4, f"--episode, --reward, --terminated and --truncated name one column twice: {single}")
    missing = [name for name in single[:3] if name not in names]
    check(not missing, f"{path} lacks the columns {', '.join(missing)}: {found}")
    prefixes = [args.observation_prefix, args.action_prefix, args.next_observation_prefix]
    check(len(set(prefixes)) == 3 and all(prefixes), f"the three prefixes must differ and not be empty: {prefixes}")
    members: dict[str, list[str]] = {prefix: [] for prefix in prefixes}
    for name in names:
        fitting = [prefix for prefix in prefixes if name.startswith(prefix)]
        if fitting and name not in single:
            members[max(fitting, key=len)].append(name)
    for prefix in prefixes[:2]:
        check(len(members[prefix]) > 0, f"{path} has no column that begins with {prefix}: {found}")
    observations, actions, following = (sorted(members[prefix], key=natural_key) for prefix in prefixes)
    twice = sorted({name for name in [*single, *observations, *actions, *following] if names.count(name) > 1})
    check(not twice, f"{path} has several columns named {', '.join(twice)}: rename them")
    suffixes = [
        [name.removeprefix(prefix) for name in group]
        for prefix, group in ((prefixes[0], observations), (prefixes[2], following))
    ]
    paired = f"{path}: columns {', '.join(following)} must match {', '.join(observations)}, one by one"
    check(not following or suffixes[0] == suffixes[1], paired)
    return Columns(observations, actions, following, args.truncated if args.truncated in names else None)


# --- Checking -------------------------------------------------------------------------------------------------------


def to_numbers(path: Path, column: Any, dtype: type) -> np.ndarray:
    """A column [rows] as numbers. Raises BadInput at the first cell that is none, or not finite in float32."""
    import pandas

    numbers = column
    if column.dtype.kind not in "biuf":
        numbers = pandas.to_numeric(column.astype(str), errors="coerce")
    with np.errstate(over="ignore"):
        values = numbers.to_numpy(dtype=np.float64, na_value=np.nan)
        finite = np.isfinite(values.astype(np.float32))
        values = values.astype(dtype, copy=False)
    if not finite.all():
        row = int(np.argmin(finite))
        what = "is not a finite number: repair the row or remove its episode"
        raise BadInput(f"{path}, row {row + 1}, column {column.name}: {str(column.iloc[row])!r} {what}")
    return values


def to_flags(path: Path, column: Any) -> np.ndarray:
    """A column [rows] of true and false, or 1 and 0. Raises BadInput at the first cell that is neither."""
    import pandas

    numbers = column
    if column.dtype.kind not in "biuf":
        text = column.astype(str).str.strip().str.lower()
        numbers = pandas.to_numeric(text.replace({"true": "1", "false": "0"}), errors="coerce")
    values = numbers.to_numpy(dtype=np.float64, na_value=np.nan)
    known = np.isin(values, (0, 1))
    if not known.all():
        row = int(np.argmin(known))
        what = "is neither true (or 1) nor false (or 0)"
        raise BadInput(f"{path}, row {row + 1}, column {column.name}: {str(column.iloc[row])!r} {what}")
    return values == 1


def to_matrix(path: Path, table: Any, names: list[str]) -> np.ndarray:
    """Columns [rows, len(names)], float32. Raises BadInput as to_numbers does."""
    matrix = np.empty((len(table), len(names)), np.float32)
    for index, name in enumerate(names):
        matrix[:, index] = to_numbers(path, table[name], np.float32)
    return matrix


def episode_ends(path: Path, column: Any) -> np.ndarray:
    """Where each episode's rows end. Raises BadInput if an id is missing, or comes again after another one."""
    import pandas

    codes, _ = pandas.factorize(column)  # numbers in order of appearance, -1 where an id is missing
    missing = (codes == -1) | (column.astype(str).to_numpy() == "" if column.dtype.kind not in "biuf" else False)
    where = f"{path}, row {int(np.argmax(missing)) + 1}, column {column.name}"
    check(not missing.any(), f"{where}: no episode id: fill it in")
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    again = codes[starts] != np.arange(len(starts))
    row = int(starts[np.argmax(again)])
    advice = "the rows of an episode must follow each other: sort them, or give each episode its own id"
    where = f"{path}, row {row + 1}, column {column.name}"
    check(not again.any(), f"{where}: episode {column.iloc[row]} comes again after another one: {advice}")
    return np.append(starts[1:], len(codes))


def check_order(path: Path, steps: Steps) -> None:
    """Raises BadInput if a row comes after its episode's end, or is not what the row before says came next."""
    last = np.zeros(len(steps.rewards), bool)
    last[steps.ends - 1] = True
    early = (steps.terminations | steps.truncations) & ~last
    row = int(np.argmax(early)) + 1
    advice = "an episode ends with its terminated or truncated row: give what follows another episode id"
    check(not early.any(), f"{path}, row {row + 1}: follows row {row}, which ended the same episode: {advice}")
    if steps.next_observations is None:
        return
    differs = ~np.isclose(steps.next_observations[:-1], steps.observations[1:], rtol=1e-4, atol=1e-6).all(axis=1)
    differs &= ~last[:-1]
    row = int(np.argmax(differs)) + 1 if len(differs) else 0
    advice = "rows are missing or out of order (or leave next observations out: --next-observation-prefix none)"
    check(not differs.any(), f"{path}, row {row}: its next observation is not that of row {row + 1}: {advice}")


def read_steps(path: Path, args: Args) -> tuple[Columns, Steps]:
    """The checked table. Raises BadInput at the first thing that is wrong with it."""
    columns = find_columns(path, read_header(path), args)
    flags = [args.terminated] + ([columns.truncated] if columns.truncated else [])
    vectors = [*columns.observations, *columns.actions, *columns.next_observations]
    table = read_table(path, [args.episode, args.reward, *flags, *vectors], args.episode)
    ends = episode_ends(path, table[args.episode])
    steps = Steps(
        observations=to_matrix(path, table, columns.observations),
        actions=to_matrix(path, table, columns.actions),
        rewards=to_numbers(path, table[args.reward], np.float64),
        terminations=to_flags(path, table[args.terminated]),
        truncations=to_flags(path, table[columns.truncated]) if columns.truncated else np.zeros(len(table), bool),
        next_observations=to_matrix(path, table, columns.next_observations) if columns.next_observations else None,
        ends=ends,
    )
    check_order(path, steps)
    return columns, steps


# --- Writing --------------------------------------------------------------------------------------------------------


def check_id(dataset_id: str) -> None:
    """Raises BadInput unless `dataset_id` is a new Minari id."""
    try:
        namespace, _, _ = parse_dataset_id(dataset_id)
        if namespace is not None:
            validate_namespace(namespace)
    except (ValueError, TypeError):  # the latter for an id without version
        raise BadInput(f"--dataset-id {dataset_id}: no Minari id: give one such as my/logs-v0") from None
    reserved = dataset_id.startswith("anchorl/")
    check(not reserved, f"--dataset-id {dataset_id}: anchorl/ is for built-in datasets: give another namespace")
    try:
        exists = get_dataset_path(dataset_id).exists()
    except OSError as error:
        raise _cannot_write(dataset_id, error) from None
    check(not exists, f"--dataset-id {dataset_id}: exists: take another id, such as the next version")


def _cannot_write(dataset_id: str, error: OSError) -> BadInput:
    advice = "point MINARI_DATASETS_PATH to a folder that can be written"
    return BadInput(f"cannot write {dataset_id} to the datasets folder ({one_line(error)}): {advice}")


def action_space(args: Args, names: list[str], actions: np.ndarray) -> gym.spaces.Box:
    """Bounds as asked for, else the data's own [action_dim]. Raises BadInput unless each low is below its high."""
    low, high = actions.min(axis=0), actions.max(axis=0)
    constant = low == high
    if args.action_low is None and args.action_high is None and constant.any():
        # an actuator that never moved still needs an interval around its value; a narrow one keeps policies near it
        margin = np.where(constant, np.maximum(np.abs(low), 1) * np.float32(1e-3), 0).astype(np.float32)
        low, high = low - margin, high + margin
        print(f"constant, with bounds just around it: {', '.join(np.array(names)[constant])}")
    low = low if args.action_low is None else _given_bounds("--action-low", args.action_low, names)
    high = high if args.action_high is None else _given_bounds("--action-high", args.action_high, names)
    for name, lowest, highest in zip(names, low, high, strict=True):
        advice = "give both --action-low and --action-high"
        check(
            bool(lowest < highest), f"{name}: its lower bound {lowest} is not below its upper one {highest}: {advice}"
        )
    beyond = int(((actions < low) | (actions > high)).any(axis=1).sum())
    if beyond:
        print(f"{beyond} rows have actions beyond the bounds, where training clips them")
    space = gym.spaces.Box(low, high, dtype=np.float32)
    action_bounds(space)
    return space


def _given_bounds(option: str, values: tuple[float, ...], names: list[str]) -> np.ndarray:
    fits = f"{option} has {len(values)} numbers: give one for all, or one for each of {', '.join(names)}"
    check(len(values) in (1, len(names)), fits)
    with np.errstate(over="ignore"):
        bounds = np.array(values, np.float32)
    check(bool(np.isfinite(bounds).all()), f"{option} {' '.join(map(str, values))}: must be finite numbers")
    return np.broadcast_to(bounds, len(names))


def split_episodes(steps: Steps) -> list[EpisodeBuffer]:
    """The episodes as Minari has them, with one observation more than steps; those of no transition are left out."""
    buffers, start = [], 0
    for end in steps.ends.tolist():
        observations, last = steps.observations[start:end], end - 1
        if steps.next_observations is not None:
            observations = np.concatenate([observations, steps.next_observations[last:end]])
        elif steps.terminations[last]:
            observations = np.concatenate([observations, observations[-1:]])  # nothing looks at it
        else:
            end = last  # the last row's observation is all that is known of what the row before led to
        rows = slice(start, end)
        if end > start:
            truncations = steps.truncations[rows].copy()
            truncations[-1] |= not steps.terminations[end - 1]
            fields = steps.actions[rows], steps.rewards[rows], steps.terminations[rows], truncations
            names = "actions", "rewards", "terminations", "truncations"
            buffers.append(EpisodeBuffer(observations=observations, **dict(zip(names, fields, strict=True))))
        start = last + 1
    return buffers


def write_dataset(args: Args, buffers: list[EpisodeBuffer], observation_dim: int, actions: gym.spaces.Box) -> None:
    """Writes the dataset, all of it or nothing. Raises BadInput where it cannot be written."""
    try:
        with scratch_root(args.dataset_id, same_data=False):
            minari.create_dataset_from_buffers(
                args.dataset_id,
                buffers,
                eval_env=args.env_id,
                observation_space=gym.spaces.Box(-np.inf, np.inf, (observation_dim,), np.float32),
                action_space=actions,
                description=f"imported from {args.file.name}",
            )
    except OSError as error:
        raise _cannot_write(args.dataset_id, error) from None


def main(args: Args) -> None:
    check_id(args.dataset_id)
    if args.env_id is not None:
        register_environments()
        known = args.env_id in gym.registry  # "module:Name" is not: Gymnasium would import the module
        check(known, f"--env-id {args.env_id}: no such environment is installed: check its name and version")
    columns, steps = read_steps(args.file, args)
    print(f"observations: {', '.join(columns.observations)}")
    print(f"actions: {', '.join(columns.actions)}")
    bounds = action_space(args, columns.actions, steps.actions)
    buffers = split_episodes(steps)
    num_steps = sum(map(len, buffers))
    dropped = len(steps.rewards) - num_steps
    if dropped:
        print(f"dropped {dropped} rows: the last ones of episodes that were cut, with no next observation")
    check(num_steps > 0, f"{args.file}: no transition is left: every episode is one row, with no next observation")
    write_dataset(args, buffers, len(columns.observations), bounds)
    print(f"{args.dataset_id}: {num_steps} transitions in {len(buffers)} episodes")


if __name__ == "__main__":
    launch(main, Args)
