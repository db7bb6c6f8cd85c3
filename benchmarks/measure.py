"""Run qc in a process of its own and say how long it took and how much memory it held at its peak."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

CHILD = """
import atexit, sys
from pathlib import Path

def report(place=sys.argv[1]):
    status = Path("/proc/self/status").read_text()
    Path(place).write_text(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))

atexit.register(report)
code = sys.argv[2]
sys.argv[1:] = sys.argv[3:]
exec(code)
"""
COMMAND_LINE = "import sys; from qc.compiler.cli import main; sys.argv[0] = 'qc'; sys.exit(main())"


@dataclass(frozen=True)
class Measured:
    """One finished process."""

    seconds: float
    """Wall-clock time from start to end, imports included."""
    cpu: float
    """Seconds on the CPU, of all its threads, user and system."""
    peak: int
    """VmHWM in bytes: the most memory that was resident, pages of mapped files included."""
    output: str
    """What it wrote to stdout."""


def run_qc(*arguments: str | Path, quiet: bool = True) -> Measured:
    """Run ``qc`` with these arguments; a failure is a RuntimeError with its message."""
    return run_python(COMMAND_LINE, *arguments, quiet=quiet)


def run_python(code: str, *arguments: str | Path, quiet: bool = True) -> Measured:
    """Run Python code with ``sys.argv[1:] = arguments``; progress on stderr is shown unless quiet.

    The peak is read from /proc by the process itself as it ends, so Linux is needed. Raises RuntimeError,
    with the end of what it said, when the exit status is not 0.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "peak"
        command = [sys.executable, "-c", CHILD, str(place), code, *map(str, arguments)]
        start, before = time.perf_counter(), children()
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if quiet else None,
            text=True,
            check=False,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
        )
        seconds = time.perf_counter() - start
        if done.returncode != 0:
            said = "\n".join((done.stdout + (done.stderr or "")).strip().splitlines()[-20:])
            raise RuntimeError(f"{' '.join(map(str, arguments))}: exit status {done.returncode}\n{said}")
        return Measured(seconds, children() - before, int(place.read_text()) * 1024, done.stdout)


def children() -> float:
    """Seconds on the CPU of all processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
