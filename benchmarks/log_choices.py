"""Choices in a table: which of several actions was taken, which were legal, and how probable the taken one was."""

import re
from typing import NamedTuple

import numpy as np
from log_cells import NO_NUMBER, Table, as_text, count_blanks, is_blank, to_flags, to_floats

from common.command_line import BadInput, check

MOST_CHOICES = 1000  # a column of more different values is taken for an amount, or an id
# a list's brackets; in round ones are marks or numbers: a name may end in some, too
AROUND = r"^(?:\[+([^\[\]]*)\]+|\{+([^{}]*)\}+|\(+((?:[-\d.\s;,|]*|[^()]*[;,|][^()]*))\)+)$"


class Choices(NamedTuple):
    """What the rows say of discrete actions."""

    names: list[str]  # of the actions: whole numbers by size, else words in the order of the alphabet
    taken: np.ndarray  # [rows], int64, counted from 0; where a row is no transition, 0
    legal: np.ndarray | None  # [rows, len(names)], bool


def read_choices(
    table: Table, name: str, used: np.ndarray, legal_columns: dict[str, str], legal_list: str | None
) -> Choices:
    """The actions in column `name`, of which the rows `used` [rows] have one. `legal_columns` are those of a mask, by
    the action they speak of; `legal_list` is a column that lists the legal ones. Raises BadInput at a blank cell, a
    number with a fraction, too many different values, or a mask that forbids what was taken or everything.
    """
    check(bool(used.any()), f"{table.path}: no transition is left: each row is the last of an episode that was cut")
    cells = to_names(table, name, used)
    lists = None if legal_list is None else split_lists(table, legal_list)
    known = {*cells[used], *legal_columns, *(each for listed in lists or [] for each in listed)}
    names = sorted(known, key=lambda each: (0, int(each), each) if is_whole(each) else (1, 0, each))
    where = f"{table.path}, column {name}"
    advice = "amounts are columns that begin with --action-prefix"
    check(len(names) <= MOST_CHOICES, f"{where} holds {len(names)} different values, too many for choices: {advice}")
    check(len(names) > 1, f"{where} holds one choice alone, {names[0]}: there is nothing to choose")
    number = {each: index for index, each in enumerate(names)}
    taken = np.array([number[each] if is_used else 0 for each, is_used in zip(cells, used, strict=True)])
    legal = None
    if legal_columns:
        missing = [each for each in names if each not in legal_columns]
        check(
            not missing,
            f"{table.path}: no column says when {', '.join(missing)} is legal: it was taken in column {name}",
        )
        legal = np.stack([to_flags(table, legal_columns[each]) for each in names], axis=1)
    if lists is not None:
        legal = np.array([[each in listed for each in names] for listed in map(set, lists)])
    if legal is not None:
        check_legal(table, legal, taken, used, names)
    return Choices(names, taken, legal)


def check_legal(table: Table, legal: np.ndarray, taken: np.ndarray, used: np.ndarray, names: list[str]) -> None:
    """Raises BadInput at the first row whose mask [rows, actions] forbids its action, or everything."""
    forbidden = used & ~legal[np.arange(len(taken)), taken]
    if forbidden.any():
        row = int(np.argmax(forbidden))
        more = f" ({forbidden.sum()} such rows)" if forbidden.sum() > 1 else ""
        what = f"{table.path}, row {table.data.index[row] + 1}: action {names[taken[row]]} was taken, and is not legal"
        raise BadInput(f"{what}{more}: repair the mask, or leave it out")
    if not legal.any(axis=1).all():
        row = int(np.argmin(legal.any(axis=1)))
        raise BadInput(f"{table.path}, row {table.data.index[row] + 1}: no action is legal: each row needs one")


def to_names(table: Table, name: str, used: np.ndarray) -> np.ndarray:
    """A column [rows] of choices as texts: 2 of 2, 2.0 and "2"; else as they are written, for ids may be long, or alike
    as numbers. Raises BadInput where a `used` cell is blank, or a number with a fraction.
    """
    numbers, blank = to_floats(table, name), is_blank(table, name) & used
    where = f"{table.path}, column {name}"
    words = as_text(table, name)[used & ~np.isfinite(numbers)]
    if words.isin({*NO_NUMBER} - {"none"}).all():  # else "na" may be a choice's name, as "none" is among numbers
        blank = used & ~np.isfinite(numbers)
    if blank.any():
        raise BadInput(f"{where}: {count_blanks(table, blank)}: each step needs the choice that was taken")
    fractions = used & np.isfinite(numbers) & (np.nan_to_num(numbers, posinf=0, neginf=0) % 1 != 0)
    if fractions.any():
        row = int(np.argmax(fractions))
        what = f"{where}: {numbers[row]:g} in row {table.data.index[row] + 1} is no choice"
        raise BadInput(f"{what}: amounts are columns that begin with --action-prefix")
    if table.data[name].dtype.kind == "f":
        return np.array([f"{number + 0.0:.0f}" for number in numbers])  # -0 is 0
    text, zeros = table.data[name].astype(str).str.strip(), rf"{re.escape(table.decimal)}0*$"
    if not text[used].str.fullmatch(rf"-?\d+({zeros})?").all():
        return text.to_numpy()
    return text.str.replace(zeros, "", regex=True).replace("-0", "0").to_numpy()


def split_lists(table: Table, name: str) -> list[list[str]]:
    """A column of lists such as 0;2 or [0, 2] or "low | very high", or 0 2: [rows] of the names in each. Spaces divide
    where no cell has a mark, and numbers.
    """
    column = table.data[name]
    if any(isinstance(cell, (list, np.ndarray)) for cell in column):  # of Parquet
        cells = [cell if isinstance(cell, (list, np.ndarray)) else [] for cell in column]
    else:
        texts = column.astype(str).where(column.notna(), "").str.strip()
        texts = texts.str.replace(AROUND, r"\1\2\3", regex=True)
        words = r"[;,|]" if texts.str.contains(r"[;,|]").any() else r"\s"
        cells = [re.split(r"[\s;,|]" if re.fullmatch(r"[-\d.\s;,|]*", text) else words, text) for text in texts]
    names = [[part for each in cell if (part := str(each).strip(" '\""))] for cell in cells]
    if all(re.fullmatch(r"-?\d+(\.0*)?", part) for parts in names for part in parts):
        return [[re.sub(r"^-0$", "0", part.partition(".")[0]) for part in parts] for parts in names]
    return names


def is_whole(name: str) -> bool:
    return re.fullmatch(r"-?\d{1,18}", name) is not None


def read_log_probabilities(table: Table, name: str, used: np.ndarray, discrete: bool) -> np.ndarray:
    """The logarithms [rows] of a column of probabilities, or of densities; NaN in rows that are not `used`. Raises
    BadInput where a used one is missing, not above 0 or, of a probability, above 1.
    """
    values, blank, where = to_floats(table, name), is_blank(table, name) & used, f"{table.path}, column {name}"
    if blank.any():
        raise BadInput(f"{where}: {count_blanks(table, blank)}: give all probabilities, or leave --propensity out")
    wrong = used & ~((values > 0) & (values < np.inf) & ((values <= 1) | (not discrete)))
    if wrong.any():
        row = int(np.argmax(wrong))
        cell, kind = str(table.data[name].iloc[row]), "in (0, 1]" if discrete else "a density above 0"
        what = f"{where}: {cell} in row {table.data.index[row] + 1} is not {kind}"
        raise BadInput(
            f"{what}: the action was taken, so its probability is not 0: repair it, or leave --propensity out"
        )
    return np.log(np.where(used, values, np.nan))
