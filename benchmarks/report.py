"""The page of results: what the benchmarks recorded, as Markdown tables.

``python -m benchmarks.report [FOLDER]`` reads the JSON lines of a results folder (default: where benchmarks
write them) and prints one table per benchmark, the newest row of each kind. ``docs/benchmarks.md`` holds its
output between two marks; ``--into docs/benchmarks.md`` puts it there.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .records import results_folder

KEYS = ("row", "model", "layers", "case")
"""What tells the rows of one benchmark apart, the first of these that a row has."""
HIDDEN = ("when", "cores", "machine", "torch")
ELSEWHERE = ("reach",)
"""Benchmarks whose rows have a page of their own."""
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def main(arguments: list[str] | None = None) -> int:
    """Print the tables, or put them between the marks of a page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=results_folder())
    parser.add_argument(
        "--into", type=Path, metavar="PAGE", help="replace what stands between the page's marks"
    )
    options = parser.parse_args(arguments)
    files = sorted(file for file in options.folder.glob("*.jsonl") if file.stem not in ELSEWHERE)
    if not files:
        parser.error(f"no results in {options.folder}: run a benchmark first (make bench)")
    text = "\n\n".join(section(file.stem, newest(rows_of(file))) for file in files)
    if options.into is None:
        print(text)
    else:
        options.into.write_text(replaced(options.into.read_text(encoding="utf-8"), text), encoding="utf-8")
    return 0


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The rows of one benchmark, oldest first."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def newest(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The last row of each kind, in the order in which the kinds first came."""
    found: dict[Any, Mapping[str, Any]] = {}
    for row in rows:
        key = next((row[name] for name in KEYS if name in row), None)
        found[key] = row
    return list(found.values())


def section(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A heading, the command, the table, and where it was measured."""
    columns = [column for column in rows[0] if column not in HIDDEN]
    lines = [f"### {name}", "", f"`python -m benchmarks.{name}`", ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    last = rows[-1]
    where = f"{last.get('cores')} cores ({last.get('machine')}), torch {last.get('torch')}"
    return "\n".join([*lines, "", f"Measured {str(last.get('when'))[:10]} on {where}."])


def cell(value: Any) -> str:
    """A value for a reader: four digits, yes and no."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"`{text}`" if "," in text or "{" in text else text


def replaced(page: str, text: str) -> str:
    """The page with ``text`` between its marks.

    Raises:
        ValueError: The page does not have both marks.
    """
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"the page has no {BEGIN} ... {END}")
    return pattern.sub(lambda _: f"{BEGIN}\n\n{text}\n\n{END}", page)


if __name__ == "__main__":
    raise SystemExit(main())
