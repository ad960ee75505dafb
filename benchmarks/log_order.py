"""The order of a table's rows: by episode, and within an episode as the file or a column of it has them."""

import re
import warnings
from typing import Any, NamedTuple

import numpy as np
from log_cells import NOT_KNOWN, Table, as_text, count_blanks, is_blank, to_floats

from common.command_line import BadInput, check, warn

UNIT = "(ns|us|ms|s|sec|h|utc|index|id|no|nr)"
LIKE_TIME = re.compile(
    r"(\w+[_ .-])?(t|time|timestep|time[_ ]step|timestamp|datetime|date|step|tick|frame|day|hour|minute|second)s?"
    rf"([_ .-]{UNIT}|[_ ]?\({UNIT}\)|[_ ]?\[{UNIT}\])?"
    r"|epoch|seq|sequence|period|sec|msec|datum|zeit|zeitstempel|\w*(ed|seen|sent|taken)[_ ]at"
)
ZONE = r":\d\d.*(?:[zZ]|[-+]\d\d:?\d\d)$"
CLOCK = "%H:%M:%S.%f", "%H:%M:%S", "%H:%M"
CLOCK_OF_12 = "%I:%M %p", "%I:%M:%S %p"
HALF_DAYS = *(f"{date} {clock}" for clock in CLOCK_OF_12 for date in ("%m/%d/%Y", "%d/%m/%Y")), *CLOCK_OF_12


class Order(NamedTuple):
    rows: np.ndarray  # [rows], which of the file's comes next
    ends: np.ndarray  # [episodes], where each episode's rows end


def is_like_time(name: str) -> bool:
    return LIKE_TIME.fullmatch(name.lower()) is not None


def find_order(table: Table, episode: str, order: str | None, times: list[str]) -> Order:
    """Episodes in order of appearance, and their rows by the column `order`, or as the file has them.

    Raises BadInput if a row has no episode or no place in its episode, or an episode comes again where nothing orders
    its rows. Without `order`, warns where a column like time, of the `times`, goes back within episodes.
    """
    codes = find_episodes(table, episode)
    rows = np.argsort(codes, kind="stable")
    grouped = codes[rows]
    ends = np.append(np.flatnonzero(np.diff(grouped)) + 1, len(codes))
    if order is None:
        check_together(table, episode, codes, times)
        for name in times:
            warn_of_disorder(table, name, grouped)
        return Order(rows, ends)
    if not np.array_equal(rows, np.arange(len(rows))):
        print(f"the episodes' rows lie between one another in the file: grouped by {episode}")
    values = find_places(table, order, codes)
    check_no_midnight(table, order, values[rows], ends)
    back = np.flatnonzero((np.diff(values[rows]) < 0) & (np.diff(grouped) == 0))
    if len(back):
        print(f"sorted by {order}: {len(back)} rows stood behind a later one of their episode, {first(rows, back)}")
    rows = np.lexsort((values, codes))
    warn_of_steps(table, order, values[rows], rows, np.diff(grouped) == 0)
    return Order(rows, ends)


def first(rows: np.ndarray, places: np.ndarray) -> str:
    """The number in the file of the row after the first of the `places`, for messages."""
    return f"the first in row {rows[places[0] + 1] + 1}"


def find_episodes(table: Table, episode: str) -> np.ndarray:
    """A number [rows] for each episode, in order of appearance. Raises BadInput where an id is missing."""
    import pandas

    column = table.data[episode]
    if column.dtype.kind not in "iufbmM":  # text, in which spaces at the ends say nothing
        column = column.astype(str).where(column.notna()).str.strip()
    codes, _ = pandas.factorize(column)  # -1 where an id is missing
    words = as_text(table, episode)
    unknown = words.isin(NOT_KNOWN)
    unknown &= (words != "na") | pandas.to_numeric(words[~unknown], errors="coerce").notna().all()  # an id among words
    missing = (codes == -1) | (column == "").to_numpy() | unknown.to_numpy()
    row = int(np.argmax(missing)) + 1
    what = f"{missing.sum()} of {len(codes)} rows have no episode's id"
    check(not missing.any(), f"{table.path}, column {episode}: {what}, the first in row {row}: fill it in")
    return codes


def check_together(table: Table, episode: str, codes: np.ndarray, times: list[str]) -> None:
    """Raises BadInput if an episode comes again after another one."""
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    again = starts[codes[starts] != np.arange(len(starts))]
    if len(again):
        cell = repr(str(table.data[episode].iloc[again[0]]))
        where = f"{table.path}, row {again[0] + 1}, column {episode}: {cell} comes again after another episode"
        example = times[0] if times else "COLUMN"
        advice = f"--order {example} sorts by episode and that column of times or steps"
        raise BadInput(f"{where}: {advice}; or sort the file by episode and time, or give each episode its own id")


def warn_of_disorder(table: Table, name: str, grouped: np.ndarray) -> None:
    """Says so where a column that looks like time goes back within an episode."""
    try:
        backs = [np.flatnonzero((np.diff(values) < 0) & (np.diff(grouped) == 0)) for values in readings(table, name)]
    except BadInput:
        return
    back = min(backs, key=len)
    if len(back):
        what = f"column {name} goes back at {len(back)} rows within episodes, {first(np.arange(len(grouped)), back)}"
        warn(f"{what}: the file's order is kept; if it says when a row was logged, give --order {name}")


def find_places(table: Table, name: str, codes: np.ndarray) -> np.ndarray:
    """[rows], by which rows are sorted. Raises BadInput unless they are all there, and can be read in one way only."""
    places, *others = readings(table, name)
    rows = np.lexsort((places, codes))
    one = all(np.array_equal(rows, np.lexsort((other, codes))) for other in others)
    cell = str(table.data[name].iloc[0])
    advice = "write dates as 2020-12-31"
    check(one, f"{table.path}, column {name}: {cell!r} and others may begin with the day or the month: {advice}")
    return places


def readings(table: Table, name: str) -> list[np.ndarray]:
    """What the cells [rows] may mean, as numbers: one reading, or two of dates. Raises BadInput if there is none."""
    column, blank = table.data[name], is_blank(table, name)
    advice = "every row needs its place in the order"
    if blank.any():
        raise BadInput(f"{table.path}, column {name}: {count_blanks(table, blank)}: {advice}")
    if column.dtype.kind in "iu" and column.max() < 2**63:
        return [column.to_numpy(np.int64)]
    if column.dtype.kind in "mM":
        return [column.astype("int64").to_numpy()]
    numbers = to_floats(table, name)
    bad = int(np.argmax(~np.isfinite(numbers)))
    found = [numbers] if np.isfinite(numbers).all() else read_dates(as_dates(column))
    what = f"{str(column.iloc[bad])!r} in row {bad + 1} is no number, and the column not all dates or times of one form"
    check(bool(found), f"{table.path}, column {name}: {what}: an order needs numbers, or dates as 2020-12-31 23:00")
    return found


def as_dates(column: Any) -> Any:
    """Texts of one form: with a point before fractions of a second, and 0 where others have one."""
    text = column.astype(str).str.strip().str.replace(r"(:\d\d),(\d)", r"\1.\2", regex=True)  # of Python's logging
    fractions = text.str.contains(r":\d\d\.\d").any()  # which Python leaves out where they are 0
    return text.str.replace(r"(:\d\d:\d\d)(?=$|[zZ+-])", r"\1.0", regex=True) if fractions else text


def read_dates(text: Any) -> list[np.ndarray]:
    """What dates or times may mean, as numbers: one reading, two if day or month may be first, or none."""
    zoned = text.str.contains(ZONE)
    if zoned.any() and not zoned.all():
        return []
    for form in ("ISO8601", *CLOCK):
        if (dates := parse_dates(text, format=form)) is not None:
            return [dates]
    year_first = bool(text.str.match(r"\d{4}").any())
    found = [parse_dates(text, dayfirst=first) for first in ([False] if year_first else [False, True])]
    if all(dates is None for dates in found):
        found = [parse_dates(text, format=form) for form in HALF_DAYS]  # which pandas does not infer
    return [dates for dates in found if dates is not None]


def parse_dates(text: Any, **how: Any) -> np.ndarray | None:
    import pandas

    with warnings.catch_warnings(action="ignore"):
        warnings.filterwarnings("error", message="Could not infer format")  # pandas would guess cell by cell
        try:
            return pandas.to_datetime(text, utc=True, **how).astype("int64").to_numpy()
        except (ValueError, OverflowError, UserWarning):
            return None


def check_no_midnight(table: Table, name: str, values: np.ndarray, ends: np.ndarray) -> None:
    """Raises BadInput where a column begins anew, as hours do at midnight, which cannot sort the rows."""
    turned, others = 0, 0
    text = as_dates(table.data[name])
    clock = any(parse_dates(text, format=form) is not None for form in (*CLOCK, *CLOCK_OF_12))
    if not clock and values.min() > values.max() / 2:  # no hours: they are dates, or seconds since 1970
        return
    for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
        back = np.flatnonzero(np.diff(values[start:end]) < 0)
        turns = len(back) == 1 and end - start > 2 and values[end - 1] < values[start]
        turns |= clock and len(back) > 1 and end - start > 2 * (len(back) + 1)  # else the rows lie in no order
        turned, others = turned + turns, others + (len(back) > 0 and not turns)
    what = f"in {turned} episodes the column goes back to less than it began with, as hours do at midnight"
    advice = "name a column of dates and times, or of steps, or sort the file and leave --order out"
    check(turned <= others, f"{table.path}, column {name}: {what}: {advice}")


def warn_of_steps(table: Table, name: str, values: np.ndarray, rows: np.ndarray, inside: np.ndarray) -> None:
    """Counts what is odd within episodes of sorted `values` [rows]: repeats, and steps unlike the usual one."""
    steps = np.diff(values)
    repeats = np.flatnonzero(inside & (steps == 0))
    if len(repeats):
        what = f"{len(repeats)} rows have the same {name} as another of their episode, {first(rows, repeats)}"
        warn(f"{what}: these keep the file's order; two episodes under one id look so, too")
    moves = steps[inside & (steps != 0)]
    if len(moves) == 0:
        return
    usual = np.median(moves)
    odd = np.flatnonzero(inside & (steps != 0) & ((steps > 1.5 * usual) | (steps < 0.5 * usual)))
    if len(odd):
        cells = table.data[name]
        before, after = (str(cells.iloc[rows[odd[0] + next_]]) for next_ in (0, 1))
        what = f"{len(odd)} steps of {name} are unlike the usual one, {first(rows, odd)}, from {before} to {after}"
        warn(f"{what}: rows may be missing there; what follows a gap can have an episode id of its own")
