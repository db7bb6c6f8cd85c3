"""Memory does not grow with depth: peak memory of compiling 8 layers and 64 layers of one shape.

``python -m benchmarks.depth_memory [--layers 8 64]`` writes random Llama-shaped checkpoints (hidden 1024,
intermediate 4096, vocabulary 32,000, bfloat16), compiles both with the headline passes and compares VmHWM.
The bar: the deepest at most 1.15 times the shallowest. Needs about 4 GB of disk.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from .measure import run_qc
from .random_llama import Shape, write
from .records import record, table

RATIO = 1.15
PASSES = "iter_smooth,quarot,autoround{iters=2}"
SAMPLES, LENGTH = 16, 256


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, record; 1 when the bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs=2, default=[8, 64], metavar=("FEW", "MANY"))
    parser.add_argument("--scratch", type=Path, help="folder for the checkpoints (default: a temporary one)")
    options = parser.parse_args(arguments)
    rows = [_compile(layers, options.scratch) for layers in options.layers]
    ratio = rows[1]["peak MB"] / rows[0]["peak MB"]
    met = ratio <= RATIO
    table(f"{PASSES}, {SAMPLES} x {LENGTH} tokens", rows)
    print(f"ratio {ratio:.3f}, bar {RATIO}: {'met' if met else 'MISSED'}")
    for row in rows:
        record("depth_memory", {**row, "ratio": ratio, "bar": RATIO, "met": met})
    return 0 if met else 1


def _compile(layers: int, scratch: Path | None) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        model = write(Path(folder) / "model", Shape(layers=layers))
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        run = run_qc(
            *("compile", model, "--passes", PASSES, "--scheme", "auto"),
            *("--samples", str(SAMPLES), "--length", str(LENGTH), "--out", Path(folder) / "out"),
        )
    return {
        "layers": layers,
        "weights MB": size / 1e6,
        "peak MB": run.peak / 1e6,
        "seconds": run.seconds,
        "seconds per layer": run.seconds / layers,
    }


if __name__ == "__main__":
    raise SystemExit(main())
