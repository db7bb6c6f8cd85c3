"""Progress of a compile: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from .solve import Progress


@contextmanager
def shown() -> Iterator[Callable[[Progress], None]]:
    """A report function for the solver, for as long as the context lasts. It writes to standard error."""
    console = Console(stderr=True)
    if not console.is_terminal:
        last, started = "", time.monotonic()

        def plain(progress: Progress) -> None:
            nonlocal last
            if progress.part != last:
                last = progress.part
                left = time_left(time.monotonic() - started, progress.index, progress.total)
                at = min(progress.index + 1, progress.total)  # the index of what is done is the total
                line = f"[{at}/{progress.total}] {progress.part}{left}"
                print(line, file=sys.stderr, flush=True)

        yield plain
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console) as bar:
        task = bar.add_task("capture", total=None)
        yield lambda progress: bar.update(
            task,
            total=progress.total,
            completed=progress.index,
            description=f"{progress.part}: {progress.what}",
        )


def time_left(seconds: float, done: int, total: int) -> str:
    """``, about 4 min left``, once two parts of ``total`` are done in so many seconds; empty before."""
    if done < 2:
        return ""
    left = seconds / done * (total - done)
    return f", about {left / 60:.0f} min left" if left >= 90 else f", about {left:.0f} s left"
