"""The cells of a table as numbers and as flags. What is none is a message about its column, or its cell."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.command_line import BadInput, check

YES, NO = ("true", "yes", "t", "y", "1"), ("false", "no", "f", "n", "0")
NOT_KNOWN = "na", "nan", "n/a", "#n/a", "null"  # how programs write a blank cell among numbers
NO_NUMBER = "", *NOT_KNOWN, "none", "<na>", "nat", "nil", "-", "inf", "-inf"
FLAGS = "say which of the values is an end"
KINDS = {  # of cells that are no numbers: a pattern, and what to do with such a column
    "lists": (r"[\[({].*[\])}]", "give each of their numbers a column of its own, such as obs_0, obs_1"),
    "percentages": (r".*\d\s*%", "write 12% as 0.12, or as 12"),
    "dates or times": (
        r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}.*|\d{1,2}:\d{2}.*",
        "give numbers, such as the hours since the first; or another name, so that it is not used",
    ),
    "numbers in another notation": (
        r"[-+]?[\d.,' ]*[.,' ]\d[\d.,' ]*",
        "write 0.5 for a half and 1000 for a thousand; where decimals have commas throughout, give --decimal ,",
    ),
    "numbers with units": (r"\D?[-+]?[\d.,]*\d\s*[^\s\d.,].*|[^\w\s][\d.,]+", "write the numbers alone, in one unit"),
}
TEXT = "give each word a number, or a column of 0 and 1; or another name, so that it is not used"


class Table(NamedTuple):
    """The columns that matter, and how the file writes numbers in text."""

    path: Path
    data: Any  # of pandas; its index is the number of the row in the file, from 0
    decimal: str = "."


def as_text(table: Table, name: str) -> Any:
    """A column [rows] of lower-case words without spaces around, "" where a cell is blank."""
    column = table.data[name]
    return column.astype(str).where(column.notna(), "").str.strip().str.lower()


def to_floats(table: Table, name: str) -> np.ndarray:
    """A column [rows] in double precision, true as 1, false as 0, and what is no number as NaN."""
    import pandas

    column = table.data[name]
    if column.dtype.kind not in "biuf":
        text = as_text(table, name).replace({"true": "1", "false": "0"})
        if table.decimal == ",":
            text = text.str.translate(str.maketrans(",.", ".,"))
        column = pandas.to_numeric(text, errors="coerce")
    return column.to_numpy(dtype=np.float64, na_value=np.nan)


def to_numbers(table: Table, name: str, used: np.ndarray) -> np.ndarray:
    """A column [rows] in double precision. Raises BadInput unless the cells `used` [rows] are finite in float32."""
    values = to_floats(table, name)
    with np.errstate(over="ignore"):
        bad = used & ~np.isfinite(values.astype(np.float32))
    if bad.any():
        raise BadInput(explain_cells(table, name, values, bad))
    return values


def to_matrix(table: Table, names: list[str], used: np.ndarray, kind: type = np.float64) -> np.ndarray:
    """Columns [rows, len(names)]. Raises BadInput as to_numbers does."""
    matrix: np.ndarray = np.empty((len(table.data), len(names)), kind)
    for index, name in enumerate(names):
        with np.errstate(over="ignore"):  # of a cell that is not used
            matrix[:, index] = to_numbers(table, name, used)
    return matrix


def to_flags(table: Table, name: str) -> np.ndarray:
    """A column [rows] of true and false. Raises BadInput, with the values found, if a cell is neither."""
    values, text = to_floats(table, name), as_text(table, name)
    yes = (values == 1) | text.isin(YES).to_numpy()
    bad = ~yes & ~((values == 0) | text.isin(NO).to_numpy())
    if bad.any():
        where, blank = f"{table.path}, column {name}", is_blank(table, name)
        check(not blank.any(), f"{where}: {count_blanks(table, blank)}: write true (or 1) or false (or 0) in each row")
        found, row = table.data[name][bad].astype(str).unique(), table.data.index[np.argmax(bad)] + 1
        cells = f"{', '.join(map(repr, found[:5]))}{', ...' if len(found) > 5 else ''}"
        what = f"{where}: {cells}, first in row {row}"
        raise BadInput(f"{what}: each cell must be true (or 1, yes) or false (or 0, no): {FLAGS}")
    return yes


def is_blank(table: Table, name: str) -> np.ndarray:
    """Where a column [rows] has no value, or spaces alone."""
    return table.data[name].isna().to_numpy() | (as_text(table, name) == "").to_numpy()


def is_unknown(table: Table, name: str) -> np.ndarray:
    """Where a column [rows] of numbers has none, however programs write that."""
    if table.data[name].dtype.kind in "biuf":
        return ~np.isfinite(to_floats(table, name))
    return as_text(table, name).isin(NO_NUMBER).to_numpy()


def count_blanks(table: Table, blank: np.ndarray) -> str:
    row = table.data.index[np.argmax(blank)] + 1
    return f"{blank.sum()} of {len(blank)} cells are blank, the first in row {row}"


def explain_cells(table: Table, name: str, values: np.ndarray, bad: np.ndarray) -> str:
    """What is wrong with the `bad` cells [rows] of a column: its kind where it has one, else the first of them."""
    text = as_text(table, name)
    where, strange = f"{table.path}, column {name}", bad & ~text.isin(("", "nan")).to_numpy()
    if not strange.any():
        return f"{where}: {count_blanks(table, bad)}: fill them in, or remove their episodes"
    place = int(np.argmax(strange))
    cell, row = repr(str(table.data[name].iloc[place]))[:80], table.data.index[place] + 1
    if np.isnan(values[place]):
        for kind, (pattern, advice) in KINDS.items():
            if re.fullmatch(pattern, text.iloc[place], flags=re.DOTALL):
                return f"{where} holds {kind}, such as {cell} in row {row}: {advice}"
        if np.isnan(values[strange]).all() and strange.sum() > len(strange) / 2:
            return f"{where} holds text, such as {cell} in row {row}: {TEXT}"
    more = f" ({strange.sum()} such cells)" if strange.sum() > 1 else ""
    advice = "repair the row or remove its episode"
    return f"{table.path}, row {row}, column {name}: {cell} is not a finite number{more}: {advice}"
