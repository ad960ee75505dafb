"""Converts a table of logs, CSV or Parquet, to a local Minari dataset that every script trains on.

The table has one row per step; the rows of an episode follow each other, in order. A row holds what was observed, the
action taken on it, the reward that came of it, and whether it ended the episode: `terminated` if the task did,
`truncated` if a time limit did; an episode with neither is taken as cut where its rows end. The columns of a vector
share a prefix: those that are numbered (obs_0, obs_1, ...) go by number, others stay in the table's order.

What a step led to is the observation of the row after it. An episode's last row has none after it:

- If it is terminated, nothing is missing: no value is asked of what follows an end. The dataset repeats the row's own
  observation there, and models of the environment do not learn from it.
- If it is not, values would be asked of an observation that nobody knows. The row is then no transition: its
  observation says what the row before it led to, its action and reward are dropped. (An episode may so end in a row
  for its last observation, with any numbers for action and reward.)
- Columns next_obs_0, next_obs_1, ... say what each step led to; with them every row is a transition.

Observations and actions become float32, as training has them. Rows are counted from 1, without the header. Time grows
with the rows and, since Minari stores each episode by itself, by some milliseconds for every episode.

Run: python -m benchmarks.import_logs logs.parquet --dataset-id my/logs-v0
"""

import shutil
import sys
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
from common.command_line import launch
from common.datasets import BadInput, check, one_line, scratch_root


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
    """column, true (or 1) where a limit cut the episode; may be absent under the default's name"""
    observation_prefix: str = "obs_"
    """columns of the observation begin with this"""
    action_prefix: str = "action_"
    """columns of the action begin with this"""
    next_observation_prefix: str = "next_obs_"
    """columns of the next observation begin with this; may be absent under the default's name; "" ignores them"""
    action_low: tuple[float, ...] | None = None
    """lowest actions, one per column or one for all; default: the data's lowest"""
    action_high: tuple[float, ...] | None = None
    """highest actions, one per column or one for all; default: the data's highest"""


class Columns(NamedTuple):
    """Names of the table's columns, those of a vector in its order."""

    observations: list[str]
    actions: list[str]
    next_observations: list[str]  # of the observations, one by one; empty where the table has none
    flags: list[str]  # terminated and, where the table has it, truncated
    unused: list[str]


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
        from pyarrow import csv, parquet
    except ImportError:
        raise BadInput("reading logs needs pandas and pyarrow: pip install -e '.[logs]'") from None
    try:
        if path.suffix.lower() == ".parquet":
            return list(parquet.read_schema(path).names)
        with csv.open_csv(path) as reader:
            return list(reader.schema.names)
    except Exception as error:  # the readers raise many kinds
        raise BadInput(f"cannot read {path}: {one_line(error)}") from None


def read_table(path: Path, names: list[str], episode: str) -> Any:
    """A pandas table of the columns `names`. Raises BadInput if the file is damaged or holds no rows."""
    import pyarrow
    from pyarrow import csv, parquet

    try:
        if path.suffix.lower() == ".parquet":
            with parquet.ParquetFile(path) as file:
                table = file.read(columns=names)
        else:
            table = csv.read_csv(
                path,
                parse_options=csv.ParseOptions(newlines_in_values=True),
                convert_options=csv.ConvertOptions(include_columns=names, column_types={episode: pyarrow.string()}),
            )
    except Exception as error:  # the readers raise many kinds
        raise BadInput(f"cannot read {path}: {one_line(error)}") from None
    check(len(table) > 0, f"{path}: the table is empty: it has a header and no rows")
    return table.to_pandas(ignore_metadata=True)  # which may say that a column is the index


def in_order(names: list[str], prefix: str) -> list[str]:
    """Numbered columns by number, so that obs_2 is before obs_10; others as they stand."""
    suffixes = [name.removeprefix(prefix) for name in names]
    if not all(suffix.isdecimal() for suffix in suffixes):
        return names
    return sorted(names, key=lambda name: int(name.removeprefix(prefix)))


def find_columns(path: Path, names: list[str], args: Args) -> Columns:
    """Says which columns are which. Raises BadInput if one is missing, there twice, or without a partner."""
    found = f"it has {', '.join(names[:50]) or 'no columns'}"
    single = [args.episode, args.reward, args.terminated, args.truncated]
    check(len(set(single)) == 4, f"--episode, --reward, --terminated and --truncated name one column twice: {single}")
    flags = [args.terminated, args.truncated]
    if args.truncated == Args.truncated and args.truncated not in names:
        flags, single = flags[:1], single[:3]
    missing = [name for name in single if name not in names]
    check(not missing, f"{path} lacks the columns {', '.join(missing)}: {found}")

    prefixes = [args.observation_prefix, args.action_prefix, args.next_observation_prefix]
    differ = len(set(prefixes)) == 3 and "" not in prefixes[:2]
    check(differ, f"the three prefixes must differ, and only that of next observations may be empty: {prefixes}")
    members: dict[str, list[str]] = {prefix: [] for prefix in prefixes if prefix}
    for name in names:
        fitting = [prefix for prefix in members if name.startswith(prefix)]
        if fitting and name not in single:
            members[max(fitting, key=len)].append(name)
    may_lack = Args.next_observation_prefix if args.next_observation_prefix == Args.next_observation_prefix else ""
    for prefix, group in members.items():
        check(bool(group) or prefix == may_lack, f"{path} has no column that begins with {prefix}: {found}")
    used = {*single, *(name for group in members.values() for name in group)}
    twice = sorted(name for name in used if names.count(name) > 1)
    check(not twice, f"{path} has several columns named {', '.join(twice)}: rename them")

    observations, actions = (in_order(members[prefix], prefix) for prefix in prefixes[:2])
    next_observations = members.get(args.next_observation_prefix, [])
    if next_observations:
        partners = [args.next_observation_prefix + name.removeprefix(args.observation_prefix) for name in observations]
        paired = f"{path}: columns {', '.join(next_observations)} must match {', '.join(observations)}, one by one"
        check(sorted(partners) == sorted(next_observations), paired)
        next_observations = partners
    return Columns(observations, actions, next_observations, flags, [name for name in names if name not in used])


# --- Checking -------------------------------------------------------------------------------------------------------


def to_floats(column: Any) -> np.ndarray:
    """A column [rows] in double precision, true as 1, false as 0, and what is no number as NaN."""
    import pandas

    if column.dtype.kind not in "biuf":
        text = column.astype(str).str.strip().str.lower().replace({"true": "1", "false": "0"})
        column = pandas.to_numeric(text, errors="coerce")
    return column.to_numpy(dtype=np.float64, na_value=np.nan)


def check_cells(path: Path, column: Any, good: np.ndarray, problem: str) -> None:
    """Raises BadInput with the first cell of the column that is not good [rows]."""
    if not good.all():
        row = int(np.argmin(good))
        raise BadInput(f"{path}, row {row + 1}, column {column.name}: {str(column.iloc[row])!r} {problem}")


def to_numbers(path: Path, column: Any) -> np.ndarray:
    """A column [rows] in double precision. Raises BadInput at the first cell that is not finite in float32."""
    values = to_floats(column)
    with np.errstate(over="ignore"):
        finite = np.isfinite(values.astype(np.float32))
    check_cells(path, column, finite, "is not a finite number: repair the row or remove its episode")
    return values


def to_flags(path: Path, column: Any) -> np.ndarray:
    """A column [rows] of true and false. Raises BadInput at the first cell that is neither."""
    values = to_floats(column)
    check_cells(path, column, np.isin(values, (0, 1)), "is neither true (or 1) nor false (or 0)")
    return values == 1


def to_matrix(path: Path, table: Any, names: list[str]) -> np.ndarray:
    """Columns [rows, len(names)], float32. Raises BadInput as to_numbers does."""
    matrix = np.empty((len(table), len(names)), np.float32)
    for index, name in enumerate(names):
        matrix[:, index] = to_numbers(path, table[name])
    return matrix


def episode_ends(path: Path, column: Any) -> np.ndarray:
    """Where each episode's rows end. Raises BadInput if an id is missing, or comes again after another one."""
    import pandas

    codes, _ = pandas.factorize(column)  # numbers in order of appearance, -1 where an id is missing
    present = (codes != -1) & (column != "").to_numpy()
    check_cells(path, column, present, "is no episode's id: fill it in")
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    first_time = np.ones(len(codes), bool)
    first_time[starts] = codes[starts] == np.arange(len(starts))
    advice = "the rows of an episode must follow each other: sort them, or give each episode its own id"
    check_cells(path, column, first_time, f"comes again after another episode: {advice}")
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
    follows = np.isclose(steps.next_observations[:-1], steps.observations[1:], rtol=1e-4, atol=1e-6).all(axis=1)
    gaps = np.flatnonzero(~follows & ~last[:-1])
    row = int(gaps[0]) + 1 if len(gaps) else 0
    advice = "rows are missing or out of order (--next-observation-prefix '' ignores those columns)"
    check(len(gaps) == 0, f"{path}, row {row}: its next observation is not that of row {row + 1}: {advice}")


def read_steps(path: Path, args: Args) -> tuple[Columns, Steps]:
    """The checked table. Raises BadInput at the first thing that is wrong with it."""
    columns = find_columns(path, read_header(path), args)
    vectors = [*columns.observations, *columns.actions, *columns.next_observations]
    table = read_table(path, [args.episode, args.reward, *columns.flags, *vectors], args.episode)
    terminations, *truncations = (to_flags(path, table[name]) for name in columns.flags)
    steps = Steps(
        observations=to_matrix(path, table, columns.observations),
        actions=to_matrix(path, table, columns.actions),
        rewards=to_numbers(path, table[args.reward]),
        terminations=terminations,
        truncations=truncations[0] if truncations else np.zeros(len(table), bool),
        next_observations=to_matrix(path, table, columns.next_observations) if columns.next_observations else None,
        ends=episode_ends(path, table[args.episode]),
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
        raise cannot_write(dataset_id, error) from None
    check(not exists, f"--dataset-id {dataset_id}: exists: take another id, such as the next version")


def cannot_write(dataset_id: str, error: Exception) -> BadInput:
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
    low = low if args.action_low is None else given_bounds("--action-low", args.action_low, names)
    high = high if args.action_high is None else given_bounds("--action-high", args.action_high, names)
    for name, lowest, highest in zip(names, low, high, strict=True):
        with np.errstate(over="ignore"):
            extent = highest - lowest
        problem = f"{name}: the bounds {lowest:g} and {highest:g} do not make a finite interval"
        check(bool(0 < extent < np.inf), f"{problem}: give --action-low and --action-high")
    print("actions:", ", ".join(f"{name} from {a:g} to {b:g}" for name, a, b in zip(names, low, high, strict=True)))
    beyond = int(((actions < low) | (actions > high)).any(axis=1).sum())
    if beyond:
        print(f"{beyond} rows have actions beyond the bounds: the dataset keeps them, training clips them")
    return gym.spaces.Box(low, high, dtype=np.float32)


def given_bounds(option: str, values: tuple[float, ...], names: list[str]) -> np.ndarray:
    """[len(names)]. Raises BadInput unless there is one number for all, or one for each."""
    fits = f"{option} has {len(values)} numbers: give one for all, or one for each of {', '.join(names)}"
    check(len(values) in (1, len(names)), fits)
    with np.errstate(over="ignore"):
        return np.broadcast_to(np.array(values, np.float32), len(names))


def split_episodes(steps: Steps) -> list[EpisodeBuffer]:
    """The episodes as Minari has them, with one observation more than steps; those of no transition are left out."""
    buffers, start = [], 0
    for end in steps.ends.tolist():
        observations, last = steps.observations[start:end], end - 1
        if steps.next_observations is not None:
            observations = np.concatenate([observations, steps.next_observations[last:end]])
        elif steps.terminations[last]:
            observations = np.concatenate([observations, observations[-1:]])  # no value is asked of it
        else:
            end = last  # the last row's observation is all that is known of what the row before led to
        rows = slice(start, end)
        if end > start:
            truncations = steps.truncations[rows].copy()
            truncations[-1] |= not steps.terminations[end - 1]
            buffers.append(
                EpisodeBuffer(
                    observations=observations,
                    actions=steps.actions[rows],
                    rewards=steps.rewards[rows],
                    terminations=steps.terminations[rows],
                    truncations=truncations,
                )
            )
        start = last + 1
    return buffers


def write_dataset(args: Args, columns: Columns, buffers: list[EpisodeBuffer], actions: gym.spaces.Box) -> None:
    """Writes the dataset, all of it or nothing. Raises BadInput where it cannot be written."""
    size = sum(getattr(b, name).nbytes for b in buffers for name in ("observations", "actions", "rewards"))
    need = 2 * size + 2**15 * len(buffers)  # with what HDF5 adds; where the disk fills up, it crashes
    free = shutil.disk_usage(get_dataset_path()).free
    where = f"the {need / 2**20:.0f} MiB of {args.dataset_id} in {get_dataset_path()}"
    advice = "point MINARI_DATASETS_PATH to a larger disk"
    check(free > need, f"no room for {where}, where {free / 2**20:.0f} are free: {advice}")
    names = f"observations {', '.join(columns.observations)}; actions {', '.join(columns.actions)}"
    try:
        with scratch_root(args.dataset_id, same_data=False):
            minari.create_dataset_from_buffers(
                args.dataset_id,
                buffers,
                observation_space=gym.spaces.Box(-np.inf, np.inf, (len(columns.observations),), np.float32),
                action_space=actions,
                description=f"imported from {args.file.name}: {names}",
            )
    except OSError as error:
        raise cannot_write(args.dataset_id, error) from None


def main(args: Args) -> None:
    check_id(args.dataset_id)
    columns, steps = read_steps(args.file, args)
    if columns.unused:
        print("not used:", ", ".join(columns.unused))
    print("observations:", ", ".join(columns.observations))
    ended = steps.terminations | steps.truncations
    unmarked = int((~ended[steps.ends - 1]).sum())
    if unmarked:
        print(f"{unmarked} episodes end neither terminated nor truncated: taken as truncated")
    buffers = split_episodes(steps)
    num_steps = sum(map(len, buffers))
    check(num_steps > 0, f"{args.file}: no transition is left: every episode is one row, with no next observation")
    dropped = len(steps.rewards) - num_steps
    if dropped:
        print(f"dropped {dropped} rows: the last ones of episodes that did not terminate, with no next observation")
    if len(buffers) < len(steps.ends):
        print(f"dropped {len(steps.ends) - len(buffers)} episodes with them: they had no other row")
    actions = action_space(args, columns.actions, np.concatenate([buffer.actions for buffer in buffers]))
    write_dataset(args, columns, buffers, actions)
    print(f"{args.dataset_id}: {num_steps} transitions in {len(buffers)} episodes")


if __name__ == "__main__":
    launch(main, Args)
