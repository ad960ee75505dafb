"""Tables of logs, CSV or Parquet: finding the columns, reading and checking them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from log_steps import Log, Steps, find_gaps

from common.command_line import BadInput, check, one_line


@dataclass
class TableOptions:
    episode: str = "episode"
    """tables: column of the episode's id, a number or a text"""
    reward: str = "reward"
    """tables: column of the reward"""
    terminated: str = "terminated"
    """tables: column, true (or 1) where the task ended the episode"""
    truncated: str = "truncated"
    """tables: column, true (or 1) where a limit cut the episode; may be absent under the default's name"""
    observation_prefix: str = "obs_"
    """tables: columns of the observation begin with this"""
    action_prefix: str = "action_"
    """tables: columns of the action begin with this"""
    next_observation_prefix: str = "next_obs_"
    """tables: columns of the next observation begin with this; may be absent by default; "" ignores them"""


class Columns(NamedTuple):
    """Names of the table's columns, those of a vector in its order."""

    observations: list[str]
    actions: list[str]
    next_observations: list[str]  # of the observations, one by one; empty where the table has none
    flags: list[str]  # terminated and, where the table has it, truncated
    unused: list[str]


# --- Reading --------------------------------------------------------------------------------------------------------


def read_header(path: Path) -> list[str]:
    """The table's column names. Raises BadInput if it cannot be read."""
    try:
        import pandas  # noqa: F401, needed for what follows
        from pyarrow import csv, parquet
    except ImportError:
        raise BadInput("reading tables needs pandas and pyarrow: pip install -e '.[logs]'") from None
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


def find_columns(path: Path, names: list[str], args: TableOptions) -> Columns:
    """Says which columns are which. Raises BadInput if one is missing, there twice, or without a partner."""
    found = f"it has {', '.join(names[:50]) or 'no columns'}"
    single = [args.episode, args.reward, args.terminated, args.truncated]
    check(len(set(single)) == 4, f"--episode, --reward, --terminated and --truncated name one column twice: {single}")
    flags = [args.terminated, args.truncated]
    if args.truncated == TableOptions.truncated and args.truncated not in names:
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
    may_lack = (
        TableOptions.next_observation_prefix
        if args.next_observation_prefix == TableOptions.next_observation_prefix
        else ""
    )
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
    gaps = find_gaps(steps)
    row = int(gaps[0]) + 1 if len(gaps) else 0
    advice = "rows are missing or out of order (--next-observation-prefix '' ignores those columns)"
    check(len(gaps) == 0, f"{path}, row {row}: its next observation is not that of row {row + 1}: {advice}")


def read_table_log(path: Path, args: TableOptions) -> Log:
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
    return Log(steps, ", ".join(columns.observations), columns.actions, columns.unused)
