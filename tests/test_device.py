"""``--device``: the tests in ``on_device.py``, in a process of their own.

PyTorch takes one backend that is not its own per process, before the first backward pass, and asks it from then on
whatever it asks an accelerator: other tests would meet it, and a real NPU could not be taken.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("tier", ["not broad", pytest.param("broad", marks=pytest.mark.broad)])
def test_on_a_device(tier: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", tier, "-p", "no:xdist", "-p", "no:cacheprovider"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, "tests/on_device.py"], cwd=ROOT, env={**inherited, "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
