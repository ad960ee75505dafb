"""The files of gpu.py: gpu.csv, which keeps the rows of earlier commands and of other machines, and the page gpu.md."""

import csv
from pathlib import Path

from scratch import replace, replace_table

from common.command_line import check, explain

COLUMNS = ("machine", "measurement", "algorithm", "mode", "value")
Table = dict[tuple[str, str, str, str], float]  # the values by the other columns
Row = tuple[str, str, str, float]  # measurement, algorithm, mode, value


def read(path: Path) -> Table:
    """What the file has, if there is one. Raises BadInput unless its columns are these."""
    if not path.exists():
        return {}
    with explain(f"cannot read {path}, take another --out"):
        head, *rows = csv.reader(path.read_text().splitlines())
        check(tuple(head) == COLUMNS, f"its columns are not {', '.join(COLUMNS)}")
        return {(of, what, algorithm, mode): float(value) for of, what, algorithm, mode, value in rows}


def write(path: Path, table: Table) -> None:
    replace_table(path, [COLUMNS, *((*key, f"{value:.6g}") for key, value in table.items())])


def write_page(path: Path, table: Table) -> None:
    """A chapter for each machine."""
    chapters = dict[str, list[Row]]()
    for (machine, measurement, algorithm, mode), value in table.items():
        chapters.setdefault(machine, []).append((measurement, algorithm, mode, value))
    replace(path, "\n".join(f"# {machine}\n\n{page(rows)}" for machine, rows in chapters.items()).encode())


def page(rows: list[Row]) -> str:
    lines = list[str]()
    for title, measurements in {
        "Updates a second": ["updates_per_second"],
        "Weights after 50 updates: differences": ["difference", "repetition"],
        "Largest difference of the checkpoint": ["resume"],
    }.items():
        found = [row for row in rows if row[0] in measurements]
        columns = list(dict.fromkeys((row[0], row[2]) for row in found))
        values = {(row[1], row[0], row[2]): row[3] for row in found}
        if found:
            heads = [f"{what} {mode}" if len(measurements) > 1 else mode for what, mode in columns]
            lines += [f"## {title}", "", "| " + " | ".join(["", *heads]) + " |", "|---" * (1 + len(heads)) + "|"]
            for algorithm in sorted({row[1] for row in found}):
                cells = [f"{values[algorithm, *c]:.4g}" if (algorithm, *c) in values else "" for c in columns]
                lines.append("| " + " | ".join([algorithm, *cells]) + " |")
            lines.append("")
    rest = [row for row in rows if " of " in row[0]]
    if rest:
        lines += ["## Sharing and whole runs", "", "| | | | |", "|---|---|---|---|"]
        lines += [f"| {what} | {algorithm} | {mode} | {value:.4g} |" for what, algorithm, mode, value in rest]
    return "\n".join(lines) + "\n"
