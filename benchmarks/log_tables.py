"""Tables of logs, CSV or Parquet: finding the columns, reading and checking them."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from log_cells import Table, is_unknown, to_flags, to_matrix, to_numbers
from log_choices import read_choices, read_log_probabilities
from log_csv import Dialect, find_dialect, read_csv
from log_order import find_order, is_like_time
from log_steps import Log, Steps, find_gaps

from common.command_line import BadInput, check, explain


@dataclass
class TableOptions:
    episode: str = "episode"
    """tables: column of the episode's id, a number or a text"""
    order: str | None = None
    """tables: column of numbers, dates or times that sorts the rows of an episode; default: the file's order"""
    reward: str = "reward"
    """tables: column of the reward"""
    terminated: str = "terminated"
    """tables: column, true (or 1, yes) where the task ended the episode"""
    truncated: str = "truncated"
    """tables: column, true (or 1, yes) where a limit cut the episode; may be absent under the default's name"""
    observation_prefix: str = "obs_"
    """tables: columns of the observation begin with this"""
    action_prefix: str = "action_"
    """tables: columns of the action begin with this"""
    next_observation_prefix: str = "next_obs_"
    """tables: columns of the next observation begin with this; may be absent by default; "" ignores them"""
    discrete_action: str | None = None
    """tables: column of the choice that was taken, whole numbers or words, in place of an action's columns"""
    legal_prefix: str | None = None
    """tables, of choices: columns legal_a, legal_b, ... begin with this: true (or 1) where the choice was legal"""
    legal_list: str | None = None
    """tables, of choices: or one column that lists those which were legal, such as a;b"""
    propensity: str | None = None
    """tables: column of the probability with which the action was taken; of amounts, its density"""
    delimiter: str = ""
    """CSV: what separates columns, one character or tab; default: the one of , ; | and tab that fits the header"""
    decimal: str = ""
    """tables: decimal mark, . or ,; default: a comma where numbers have commas and no points"""


class Columns(NamedTuple):
    """Names of the table's columns, those of a vector in its order."""

    observations: list[str]
    actions: list[str]
    next_observations: list[str]  # of the observations, one by one; empty where the table has none
    flags: list[str]  # terminated and, where the table has it, truncated
    legal: list[str]  # of the mask of legal choices, where it has columns
    unused: list[str]


# --- Reading --------------------------------------------------------------------------------------------------------


def read_header(path: Path, args: TableOptions) -> tuple[list[str], Dialect | None]:
    """The table's column names, as the file has them, and the dialect of a CSV file. Raises BadInput if it cannot be
    read, or not so.
    """
    try:
        import pandas  # noqa: F401, needed for what follows
        from pyarrow import parquet
    except ImportError:
        raise BadInput("reading tables needs pandas and pyarrow: pip install -e '.[logs]'") from None
    check(args.decimal in ("", ".", ","), f"--decimal {args.decimal}: give . or ,")
    delimiter = "\t" if args.delimiter in ("tab", "\\t") else args.delimiter
    fits = len(delimiter) < 2 and delimiter not in ('"', "\n", "\r", "\0")
    check(fits, f"--delimiter {args.delimiter!r}: give one character, or tab")
    if path.suffix.lower() == ".parquet":
        check(not delimiter, f"--delimiter is for CSV files, which {path} is not")
        with explain(f"cannot read {path}"):
            return list(parquet.read_schema(path).names), None
    dialect = find_dialect(path, delimiter, [args.episode, args.reward, args.terminated])
    one = f"{path} has one column, {dialect.names[0]}: its first line must be the header"
    check(len(dialect.names) > 1, f"{one}, and --delimiter names what separates columns")
    return dialect.names, dialect


def read_table(path: Path, keys: list[str], dialect: Dialect | None, args: TableOptions) -> Table:
    """The columns `keys`, without spaces around their names. Raises BadInput if the file is damaged or has no rows."""
    from pyarrow import parquet

    if dialect is None:
        decimal = args.decimal or "."
        with explain(f"cannot read {path}"), parquet.ParquetFile(path) as file:
            table = file.read(columns=keys)
    else:
        texts = [key for key in keys if key.strip() in (args.episode, args.discrete_action, args.legal_list)]
        table, decimal = read_csv(path, dialect, keys, texts, args.decimal)
    check(len(table) > 0, f"{path}: the table is empty: it has a header and no rows")
    table = table.rename_columns([name.strip() for name in table.column_names])
    exact = args.discrete_action is not None  # else, beside a blank cell, long ids would become rounded floats
    data = table.to_pandas(ignore_metadata=True, integer_object_nulls=exact)  # metadata may say a column is the index
    return Table(path, data, decimal)


def in_order(names: list[str], prefix: str) -> list[str]:
    """Numbered columns by number, so that obs_2 is before obs_10; others as they stand."""
    suffixes = [name.removeprefix(prefix) for name in names]
    if not all(suffix.isdecimal() for suffix in suffixes):
        return names
    return sorted(names, key=lambda name: int(name.removeprefix(prefix)))


def find_columns(path: Path, names: list[str], args: TableOptions) -> Columns:
    """Says which columns are which. Raises BadInput if one is missing, there twice, or without a partner."""
    single, flags = find_single(path, names, args)
    members = find_members(path, names, single, args)
    used = {*single, *(name for group in members.values() for name in group)}
    used |= {args.order} if args.order else set()
    twice = sorted(name for name in used if names.count(name) > 1)
    check(not twice, f"{path} has several columns named {', '.join(twice)}: rename them")

    prefixes = (args.observation_prefix, args.action_prefix)
    observations, actions = (in_order(members.get(prefix, []), prefix) for prefix in prefixes)
    next_observations = members.get(args.next_observation_prefix, [])
    if next_observations:
        partners = [args.next_observation_prefix + name.removeprefix(args.observation_prefix) for name in observations]
        paired = f"{path}: columns {', '.join(next_observations)} must match {', '.join(observations)}, one by one"
        check(sorted(partners) == sorted(next_observations), paired)
        next_observations = partners
    unused = [name for name in names if name and name not in used]
    return Columns(observations, actions, next_observations, flags, members.get(args.legal_prefix or "", []), unused)


def list_names(names: list[str]) -> str:
    return f"it has {', '.join(names[:50]) or 'no columns'}"


def find_single(path: Path, names: list[str], args: TableOptions) -> tuple[list[str], list[str]]:
    """The columns that are none of a vector, and of these the flags. Raises BadInput if one is missing."""
    single = [args.episode, args.reward, args.terminated, args.truncated]
    more = [name for name in (args.discrete_action, args.legal_list, args.propensity) if name is not None]
    options = "--episode, --reward, --terminated, --truncated, --discrete-action, --legal-list and --propensity"
    check(len({*single, *more}) == 4 + len(more), f"{options} name one column twice: {single + more}")
    check(args.order not in single, f"--order {args.order}: is another column of the table already: {single}")
    flags = [args.terminated, args.truncated]
    if args.truncated == TableOptions.truncated and args.truncated not in names:
        flags, single = flags[:1], single[:3]
    single += more
    missing = [name for name in [*single, args.order] if name is not None and name not in names]
    hint = ""
    if any(re.fullmatch(r"[-+]?[\d.,]*\d", name) for name in names):
        hint = ": its first line holds numbers: add a header with the names of its columns"
    check(not missing, f"{path} lacks the columns {', '.join(missing)}: {list_names(names)}{hint}")
    return single, flags


def find_members(path: Path, names: list[str], single: list[str], args: TableOptions) -> dict[str, list[str]]:
    """The columns of each prefix, in the table's order. Raises BadInput where there are none."""
    prefixes = [args.observation_prefix, args.action_prefix, args.next_observation_prefix]
    if args.discrete_action is not None:
        prefixes[1:2] = [] if args.legal_prefix is None else [args.legal_prefix]
    differ = len(set(prefixes)) == len(prefixes) and "" not in prefixes[:-1]
    check(differ, f"prefixes must differ, and only that of next observations may be empty: {prefixes}")
    members: dict[str, list[str]] = {prefix: [] for prefix in prefixes if prefix}
    for name in names:
        fitting = [prefix for prefix in members if name.startswith(prefix)]
        if fitting and name not in single:
            members[max(fitting, key=len)].append(name)
    default = TableOptions.next_observation_prefix
    for prefix, group in members.items():
        may_lack = prefix == default == args.next_observation_prefix
        check(bool(group) or may_lack, f"{path} has no column that begins with {prefix}: {list_names(names)}")
    return members


# --- Checking -------------------------------------------------------------------------------------------------------


def check_steps(table: Table, steps: Steps) -> None:
    """Raises BadInput if a row comes after its episode's end, or is not what the row before says came next."""
    path, rows = table.path, table.data.index + 1
    early = (steps.terminations | steps.truncations) & ~last_rows(steps.ends)
    if early.any():
        row = int(np.argmax(early))
        advice = "an episode ends with its terminated or truncated row: give what follows another episode id"
        raise BadInput(f"{path}, row {rows[row + 1]}: follows row {rows[row]}, which ended the same episode: {advice}")
    gaps = find_gaps(steps)
    if len(gaps):
        row = int(gaps[0])
        advice = "rows are missing or out of order: --order COLUMN sorts them"
        others = "--next-observation-prefix '' ignores those columns"
        what = f"its next observation is not that of row {rows[row + 1]}"
        raise BadInput(f"{path}, row {rows[row]}: {what}: {advice} ({others})")


def last_rows(ends: np.ndarray) -> np.ndarray:
    """[rows], true where an episode's rows end."""
    last = np.zeros(ends[-1], bool)
    last[ends - 1] = True
    return last


def read_steps(table: Table, ends: np.ndarray, columns: Columns, args: TableOptions) -> tuple[Steps, list[str]]:
    """The steps of a table whose rows are in order, and the names of its actions. Raises BadInput at a cell that is
    used, and not what it must be.

    What an episode's end led to need not be known, and a last row that is no transition needs no action and reward.
    """
    terminations, *truncations = (to_flags(table, name) for name in columns.flags)
    last, every = last_rows(ends), np.ones(len(table.data), bool)
    known, following = np.zeros_like(last), None
    if columns.next_observations:
        masked = bool(columns.legal) or args.legal_list is not None  # what was legal after a last row is in no row
        unknown = {name: last & (masked | is_unknown(table, name)) for name in columns.next_observations}
        following = np.stack([to_numbers(table, name, used=~cells) for name, cells in unknown.items()], axis=1)
        following[last & masked] = np.nan
        known = np.isfinite(following).all(axis=1)
    transitions = ~last | terminations | known
    names, legal = columns.actions, None
    if args.discrete_action is None:
        actions = to_matrix(table, names, used=transitions, kind=np.float32)
    else:
        masks = {name.removeprefix(args.legal_prefix or ""): name for name in columns.legal}
        names, actions, legal = read_choices(table, args.discrete_action, transitions, masks, args.legal_list)
    discrete, log_probabilities = args.discrete_action is not None, None
    if args.propensity is not None:
        log_probabilities = read_log_probabilities(table, args.propensity, transitions, discrete)
    steps = Steps(
        observations=to_matrix(table, columns.observations, used=every),
        actions=actions,
        rewards=to_numbers(table, args.reward, used=transitions),
        terminations=terminations,
        truncations=truncations[0] if truncations else np.zeros_like(last),
        next_observations=following,
        ends=ends,
        legal=legal,
        log_probabilities=log_probabilities,
    )
    return steps, names


def read_table_log(path: Path, args: TableOptions) -> Log:
    """The checked table. Raises BadInput at the first thing that is wrong with it."""
    keys, dialect = read_header(path, args)
    check_choice_options(args)
    columns = find_columns(path, [key.strip() for key in keys], args)
    vectors = [*columns.observations, *columns.actions, *columns.next_observations, *columns.legal]
    vectors += [name for name in (args.discrete_action, args.legal_list, args.propensity) if name is not None]
    times = [name for name in columns.unused if is_like_time(name) and columns.unused.count(name) == 1]
    times = [args.order] if args.order else times
    names = {args.episode, args.reward, *columns.flags, *vectors, *times}
    table = read_table(path, [key for key in keys if key.strip() in names], dialect, args)
    rows, ends = find_order(table, args.episode, args.order, times)
    table = table._replace(data=table.data.iloc[rows])
    steps, actions = read_steps(table, ends, columns, args)
    check_steps(table, steps)
    return Log(steps, columns.observations, actions, columns.unused, discrete=args.discrete_action is not None)


def check_choice_options(args: TableOptions) -> None:
    """Raises BadInput for options of legal choices that do not go together."""
    legal = [name for name in ("legal_prefix", "legal_list") if getattr(args, name) is not None]
    options = " and ".join(f"--{name.replace('_', '-')}" for name in legal)
    check(len(legal) < 2, f"{options}: give one of them")
    check(not legal or args.discrete_action is not None, f"{options}: is for choices: give --discrete-action, too")
