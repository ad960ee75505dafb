"""CSV files in their dialects: what separates columns, which mark decimals have, how text is encoded.

pyarrow reads them, and refuses rows with too few or too many cells. A dialect other than commas and points is said.
"""

import codecs
import csv
import gzip
import io
import itertools
import re
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from common.command_line import BadInput, check, explain, one_line

DELIMITERS = ",;\t|"
COMMA_NUMBER = re.compile(r"\s*[-+]?\d*,\d+([eE][-+]?\d+)?\s*")  # 0,5 and 1,234, which may be a thousand
PERHAPS_THOUSANDS = re.compile(r"\s*[-+]?[1-9]\d{0,2},\d{3}\s*")


class Dialect(NamedTuple):
    encoding: str
    delimiter: str
    names: list[str]  # of the columns, as the file has them


def open_file(path: Path) -> IO[bytes]:
    """The bytes of a file that may be compressed with gzip, whatever its name says."""
    return cast(IO[bytes], gzip.open(path)) if is_zipped(path) else path.open("rb")


def is_zipped(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def find_encoding(path: Path) -> str:
    """UTF-16 by its mark, UTF-8 if it is, else Latin-1: that takes any bytes, and digits are the same in all its kin.

    Raises BadInput at bytes of zero, which no such text holds.
    """
    decoder, encoding = codecs.getincrementaldecoder("utf-8")(), "utf-8"
    with open_file(path) as file:
        start = file.read(2)
        if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return "utf-16"
        blocks = itertools.chain([start], iter(lambda: file.read(2**20), b""))
        for block in blocks:
            problem = "it holds bytes of zero, so it is no text, or UTF-16 without a mark"
            check(b"\0" not in block, f"{problem}: save it as text, CSV with UTF-8")
            try:
                decoder.decode(block if encoding == "utf-8" else b"")
            except UnicodeDecodeError:
                encoding = "latin-1"
    return encoding if decoder.getstate()[0] == b"" else "latin-1"


def find_dialect(path: Path, delimiter: str, wanted: list[str]) -> Dialect:
    """The dialect by the first line; `delimiter` may be empty: then it is the one that gives most of the columns
    `wanted`, and most columns. Raises BadInput if the file cannot be read.
    """
    with explain(f"cannot read {path}"):
        encoding = find_encoding(path)
        headers = {mark: read_first(path, encoding, mark) for mark in delimiter or DELIMITERS}

    def fits(mark: str) -> tuple[int, int]:
        names = [name.strip() for name in headers[mark]]
        return len(set(wanted) & set(names)), len(names)

    best = max(headers, key=fits)  # of equals the first: a comma
    check(bool(headers[best]), f"cannot read {path}: it is empty")
    return Dialect(encoding, best, headers[best])


def read_first(path: Path, encoding: str, delimiter: str) -> list[str]:
    """The cells of the first line that is not empty."""
    encoding = "utf-8-sig" if encoding == "utf-8" else encoding
    with io.TextIOWrapper(open_file(path), encoding, newline="") as text:
        return next((cells for cells in csv.reader(text, delimiter=delimiter) if cells), [])


def read_csv(path: Path, dialect: Dialect, names: list[str], texts: list[str], decimal: str) -> tuple[Any, str]:
    """An Arrow table of the columns `names`, of which `texts` are not to become numbers; and the decimal mark, found
    where `decimal` is empty. Raises BadInput if the file is damaged.
    """
    table = parse(path, dialect, names, texts, decimal or ".")
    if not decimal and has_decimal_commas(path, table, texts):
        table, decimal = parse(path, dialect, names, texts, ","), ","
    words = [] if dialect.delimiter == "," else [f"{dialect.delimiter!r} between columns (--delimiter)"]
    words += ["',' as decimal mark (--decimal)"] if decimal == "," else []
    words += [] if dialect.encoding == "utf-8" else [f"text in {dialect.encoding.upper()}"]
    words += ["gzip"] if is_zipped(path) else []
    if words:
        print("read with", ", ".join(words))
    return table, decimal or "."


def parse(path: Path, dialect: Dialect, names: list[str], texts: list[str], decimal: str) -> Any:
    import pyarrow
    from pyarrow import csv as arrow

    kinds = {name: pyarrow.string() for name in texts}
    try:
        with open_file(path) as file:
            return arrow.read_csv(
                file,
                read_options=arrow.ReadOptions(encoding=dialect.encoding),
                parse_options=arrow.ParseOptions(delimiter=dialect.delimiter, newlines_in_values=True),
                convert_options=arrow.ConvertOptions(include_columns=names, column_types=kinds, decimal_point=decimal),
            )
    except Exception as error:  # the reader raises many kinds
        commas = dialect.delimiter == "," and "columns, got" in str(error)
        hint = ": decimal commas, or commas in text, need quotes or another --delimiter" if commas else ""
        raise BadInput(f"cannot read {path}: {one_line(error)}{hint}") from None


def has_decimal_commas(path: Path, table: Any, texts: list[str]) -> bool:
    """Whether numbers have commas for points. Raises BadInput where they may as well be thousands."""
    import pyarrow

    commas, points = [], False
    for name in set(table.column_names) - set(texts):
        column = table[name]
        points |= pyarrow.types.is_floating(column.type)
        if pyarrow.types.is_string(column.type):
            cells = column.unique().to_pylist()
            commas += [cell for cell in cells if COMMA_NUMBER.fullmatch(cell)]
            points |= any(re.fullmatch(r"\s*[-+]?\d*\.\d+\s*", cell) for cell in cells)
    if points or not commas:  # a column with both is refused where its numbers are read
        return False
    unclear = all(PERHAPS_THOUSANDS.fullmatch(cell) for cell in commas)
    advice = "give --decimal , if these are decimals; else write numbers without separators of thousands"
    check(not unclear, f"{path}: {commas[0].strip()!r} is a thousand or a fraction: {advice}")
    return True
