"""How benchmarks report: a table for people on stdout, one JSON object per row in a file."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

Row = Mapping[str, str | float | int | bool | None]


def results_folder() -> Path:
    """Where the JSON lines go: ``QC_RESULTS``, or ``out/benchmarks`` below the current directory."""
    return Path(os.environ.get("QC_RESULTS") or "out/benchmarks")


def record(benchmark: str, row: Row) -> Path:
    """Append a row, with the host and the time, to ``<results>/<benchmark>.jsonl``; returns that file."""
    file = results_folder() / f"{benchmark}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    host = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "torch": torch.__version__,
    }
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({**row, **host}) + "\n")
    return file


def table(title: str, rows: Sequence[Row]) -> None:
    """Print rows that have the same keys; floats get four significant digits."""
    shown = Table(title=title, title_justify="left")
    for column in rows[0]:
        shown.add_column(column)
    for row in rows:
        shown.add_row(*map(_cell, row.values()))
    Console(width=None if Console().is_terminal else 160).print(shown)


def _cell(value: str | float | int | bool | None) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
