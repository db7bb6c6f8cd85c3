"""The layout that docs promise: who may import whom, how files are named, how long they may get."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("compiler", "passes", "patterns", "runtime")
MAY_IMPORT = {
    "runtime": {"runtime"},
    "compiler": {"compiler", "runtime"},
    "patterns": {"patterns", "compiler"},
    "passes": {"passes", "patterns", "compiler", "runtime"},
}
READS_HUGGING_FACE = (
    "compiler/capture*.py",
    "compiler/certify.py",
    "compiler/twin.py",
    "compiler/narrow.py",
    "compiler/weights.py",
    "compiler/load*.py",
    "compiler/program_file.py",
    "compiler/testing_models.py",
    "runtime/hf.py",
)
"""The only files of the package that import transformers."""
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "base", "manager", "factory", "misc"}
LONGEST = 400


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(source: str, file: PurePosixPath) -> Iterator[str]:
    """Absolute names of all modules that a file of the package imports, wherever in the file."""
    package = ("qc", *file.parent.parts)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            anchor = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join((*anchor, *([node.module] if node.module else [])))
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def violations(source: str, name: str) -> list[str]:
    """What a file imports although its folder may not."""
    file = PurePosixPath(name)
    folder = file.parts[0]
    found = set()
    for module in imported(source, file):
        top, *rest = module.split(".")
        if top == "qc" and (not rest or rest[0] not in FOLDERS):
            found.add("qc, the public face: import the module that defines the name")
        elif top == "qc" and rest[0] not in MAY_IMPORT[folder]:
            found.add(f"qc.{rest[0]}")
        elif top in FOLDERS:
            found.add(f"{top} as a top-level package: use a relative import")
        elif top == "transformers" and not any(file.match(glob) for glob in READS_HUGGING_FACE):
            found.add("transformers")
        elif folder == "runtime" and top not in {"qc", "torch", "transformers"} | sys.stdlib_module_names:
            found.add(f"{top}: the runtime imports torch alone")
    return sorted(found)


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("compiler/plan.py", "from ..passes.gptq import Gptq", ["qc.passes"]),
        ("compiler/plan.py", "from .. import patterns", ["qc.patterns"]),
        ("compiler/targets/numpy.py", "from ...passes import x", ["qc.passes"]),
        ("compiler/plan.py", "def late():\n    import qc.passes.gptq", ["qc.passes"]),
        ("patterns/ov.py", "from ..runtime import hadamard", ["qc.runtime"]),
        ("runtime/linear.py", "from qc.compiler import scheme", ["qc.compiler"]),
        ("runtime/linear.py", "import numpy as np", ["numpy: the runtime imports torch alone"]),
        ("compiler/solve.py", "from transformers import AutoConfig", ["transformers"]),
        ("passes/smooth.py", "import transformers.utils", ["transformers"]),
        ("passes/a.py", "import compiler.edit", ["compiler as a top-level package: use a relative import"]),
        ("passes/a.py", "import qc", ["qc, the public face: import the module that defines the name"]),
        (
            "passes/a.py",
            "from .. import plan",
            ["qc, the public face: import the module that defines the name"],
        ),
        ("passes/a.py", "from ..patterns.ov import ov\nfrom ..runtime import hadamard\nimport numpy", []),
        ("compiler/capture_leaf.py", "import transformers", []),
        ("compiler/targets/numpy.py", "from ..scheme import Int\nfrom ...runtime import packing", []),
        ("runtime/hf.py", "import math, torch, transformers\nfrom .linear import Linear", []),
    ],
)
def test_the_check_itself(name: str, source: str, expected: list[str]):
    assert violations(source, name) == expected


def test_who_may_import_whom():
    names = {path: path.relative_to(ROOT).as_posix() for path in sources(*FOLDERS)}
    found = [
        f"{name} imports {module}"
        for path, name in names.items()
        for module in violations(path.read_text(encoding="utf-8"), name)
    ]
    assert found == []


def test_the_folders_are_parts_of_qc_and_nothing_else():
    for folder in FOLDERS:
        link = ROOT / "qc" / folder
        assert link.is_symlink()
        assert link.readlink() == Path("..", folder)


def test_no_file_is_a_drawer_for_odds_and_ends():
    files = sources(*FOLDERS, "tests", "benchmarks")
    assert [str(path) for path in files if FORBIDDEN_NAMES & set(path.stem.split("_"))] == []


def test_no_file_is_too_long():
    lengths = {
        path: len(path.read_text(encoding="utf-8").splitlines())
        for path in sources(*FOLDERS, "tests", "benchmarks")
    }
    assert [f"{path}: {length} lines" for path, length in lengths.items() if length > LONGEST] == []


def probe(code: str) -> dict[str, object]:
    """Run code in a fresh interpreter; it prints one JSON object on its last line."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


HEAVY = ("transformers", "networkx", "rich")


def test_importing_qc_is_light():
    code = f"import qc, sys, json; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    assert probe(code) == []


IMPORT_EVERYTHING = """
import importlib, io, json, logging, os, sys, warnings
import torch, transformers
from contextlib import redirect_stderr, redirect_stdout

def state():
    return {
        "environment": dict(os.environ),
        "random": torch.random.get_rng_state().tolist(),
        "dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "log handlers": len(logging.getLogger().handlers),
        "path": list(sys.path),
    }

before, said = state(), io.StringIO()
with redirect_stdout(said), redirect_stderr(said):
    for name in MODULES:
        importlib.import_module(name)
after = state()
print(json.dumps({"changed": [key for key in before if before[key] != after[key]], "said": said.getvalue()}))
"""


def test_importing_any_module_changes_nothing_and_says_nothing():
    names = [
        "qc." + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sources(*FOLDERS)
        if path.stem != "__main__"
    ]
    assert probe(f"MODULES = {names!r}\n{IMPORT_EVERYTHING}") == {"changed": [], "said": ""}
