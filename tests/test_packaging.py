"""What a user gets from a wheel: real files below qc/, its data, and nothing beside qc."""

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("compiler", "passes", "patterns", "runtime")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this clone, built without network and without touching the clone."""
    pytest.importorskip("setuptools", minversion="77", reason="the wheel is built without isolation")
    folder = tmp_path_factory.mktemp("wheel")
    clone = folder / "clone"
    clone.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "qc", *FOLDERS):
        subprocess.run(["cp", "-a", str(ROOT / name), str(clone)], check=True)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command = [*pip, "--wheel-dir", str(folder), str(clone)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("qc-*.whl")
    return built


def test_the_wheel_holds_every_source_as_a_real_file(wheel: Path):
    expected = {
        f"qc/{path.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        links = [item.filename for item in archive.infolist() if (item.external_attr >> 28) == 0xA]
        text = archive.read("qc/compiler/calibration_default.txt")
    assert expected - names == set()
    assert links == []
    assert {"qc/__init__.py", "qc/py.typed"} <= names
    assert text == (ROOT / "compiler" / "calibration_default.txt").read_bytes()


def test_the_wheel_brings_no_other_import_name(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"qc"}


def test_the_wheel_imports_from_outside_the_clone(wheel: Path, tmp_path: Path):
    """From the archive itself, with the clone's own qc out of reach."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import qc; assert sys.argv[1] in qc.__file__; "
        "from qc.compiler.calibration import shipped_text; print(len(shipped_text()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(wheel)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10_000


def test_every_entry_point_loads():
    points = [point for point in metadata.distribution("qc").entry_points if point.value.startswith("qc.")]
    assert "qc" in {point.name for point in points if point.group == "console_scripts"}
    for point in points:
        assert point.load() is not None, point


def test_constraints_pin_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    names = {re.split(r"[\[<>=]", name)[0].lower() for name in wanted}
    assert names - pinned == set()
    assert "torch==2.13.0" in lines
