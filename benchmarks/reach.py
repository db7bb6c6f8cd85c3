"""Reach: every causal language model type of transformers, from its config to a quantized checkpoint and back.

``python -m benchmarks.reach [--types GLOB ...] [--again] [--jobs 2] [--page]`` keeps one JSON line per type in
``reach.jsonl`` of the results folder, skips the types that have one of these versions already, prints what was
reached and compares it with the bars. ``--again`` repeats the types that failed; ``--page`` writes
``docs/architectures.md`` from the rows and runs nothing.
"""

from __future__ import annotations

import argparse
import json
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

from .reach_configs import TYPES
from .reach_page import bars, page, summary
from .reach_row import Row
from .records import results_folder

LIMIT = 300.0
"""Seconds that one type may take: a model that takes longer is not the small one that it should be."""
PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, print, compare; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--types", nargs="+", default=["*"], metavar="GLOB")
    parser.add_argument("--again", action="store_true", help="repeat the types that failed")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes (default 2)")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds per type")
    parser.add_argument(
        "--page", action="store_true", help="write docs/architectures.md from the rows, run nothing"
    )
    options = parser.parse_args(arguments)
    file = results_folder() / "reach.jsonl"
    if options.page:
        PAGE.write_text(page(list(read(file).values()), versions()), encoding="utf-8")
        return 0
    wanted = [name for name in TYPES if any(fnmatch(name, glob) for glob in options.types)]
    if not wanted:
        parser.error(f"no type matches {' '.join(options.types)}")
    known = read(file)
    left = [name for name in wanted if name not in known or (options.again and known[name].failed)]
    started = time.monotonic()
    for row in run(left, options.jobs, options.limit):
        write(file, row)
        print(f"{row.type:28} {row.seconds:6.1f} s  {row.failed or 'ok'} {row.reason[:120]}", flush=True)
    if left:
        print(f"{len(left)} types in {(time.monotonic() - started) / 60:.1f} minutes")
    rows = [row for name, row in read(file).items() if name in wanted]
    print(summary(rows))
    return (
        0 if all(met for *_, met in bars(rows, len(TYPES) if wanted == list(TYPES) else len(wanted))) else 1
    )


def versions() -> dict[str, str]:
    """The versions that a row depends on."""
    return {name: version(name) for name in ("qc", "torch", "transformers")}


def read(file: Path) -> dict[str, Row]:
    """The last row of every type that was made with these versions."""
    found: dict[str, Row] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        record = json.loads(line)
        if record.pop("versions") == versions():
            found[record["type"]] = Row(**record)
    return {name: found[name] for name in TYPES if name in found}


def write(file: Path, row: Row) -> None:
    """Append a row."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({**asdict(row), "versions": versions()}) + "\n")


def run(types: Iterable[str], jobs: int, limit: float) -> Iterable[Row]:
    """The rows of some types as they are done, from worker processes that are used again."""
    waiting: queue.Queue[str] = queue.Queue()
    done: queue.Queue[Row] = queue.Queue()
    count = 0
    for name in types:
        waiting.put(name)
        count += 1
    for _ in range(min(jobs, count)):
        threading.Thread(target=_work, args=(waiting, done, limit), daemon=True).start()
    for _ in range(count):
        yield done.get()


def _work(waiting: queue.Queue[str], done: queue.Queue[Row], limit: float) -> None:
    worker: subprocess.Popen[str] | None = None
    while True:
        try:
            name = waiting.get_nowait()
        except queue.Empty:
            if worker is not None:
                worker.kill()
            return
        if worker is None or worker.poll() is not None:
            worker = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.reach_row"], text=True, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        row = _answer(worker, name, limit)
        if row.failed == "process":
            worker.kill()
            worker = None
        done.put(row)


def _answer(worker: subprocess.Popen[str], name: str, limit: float) -> Row:
    """A worker's row for a type, or one that says what became of the worker."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    started = time.monotonic()
    worker.stdin.write(name + "\n")
    worker.stdin.flush()
    ready, _, _ = select.select([worker.stdout], [], [], limit)
    line = worker.stdout.readline() if ready else ""
    if line:
        return Row(**json.loads(line))
    why = f"took more than {limit:.0f} s" if not ready else f"the process ended with status {worker.wait()}"
    return Row(name, failed="process", reason=why, seconds=round(time.monotonic() - started, 1))


if __name__ == "__main__":
    raise SystemExit(main())
