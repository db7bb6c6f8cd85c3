"""Named plans: what a name stands for, and that their numbers are those of the benchmarks."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.accuracy import RECIPES
from qc.compiler import registry
from qc.compiler.cli import main
from qc.compiler.compile import Options, plan
from qc.compiler.errors import Refused
from qc.compiler.named import Named, recipes_text
from tests.programs import captured

NAMES = sorted(registry.names("recipes"))
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_its_passes_formats_and_target(name: str) -> None:
    one: Named = registry.get("recipes", name)
    got, want = (
        plan(captured("llama-128"), passes, options)
        for passes, options in (
            (name, Options()),
            (one.passes, Options(scheme=one.scheme, target=one.target)),
        )
    )
    assert got.problems == want.problems == ()
    assert [str(step.what) for step in got.steps] == [str(step.what) for step in want.steps]
    assert (got.scheme, got.target) == (want.scheme, want.target)
    assert any(note.startswith(f"{name} is ") for note in got.notes)
    other = plan(captured("llama-128"), name, Options(scheme="w8a16", target="modelslim"))
    assert (other.scheme.name, other.target.name) == ("w8a16", "modelslim")


@pytest.mark.parametrize("name", NAMES)
def test_what_it_says_it_reached_is_what_was_measured(name: str) -> None:
    one: Named = registry.get("recipes", name)
    row = RECIPES[one.row]
    assert (row.passes, row.scheme, row.target) == (one.passes, one.scheme, one.target)
    measured = rows_of_page()[one.row]
    assert f"`{one.passes}`" == measured["passes"] or one.passes == measured["passes"]
    assert measured["scheme"] == one.scheme
    assert one.multiple == float(measured["multiple"].partition(" ")[0])
    assert one.kl == float(measured["KL"])


def rows_of_page() -> dict[str, dict[str, str]]:
    """Rows of the accuracy tables by name; those on more windows come first and count."""
    found: dict[str, dict[str, str]] = {}
    head: list[str] = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            head = []
        elif not head:
            head = cells
        elif head[0] == "row":
            found.setdefault(cells[0], dict(zip(head, cells, strict=True)))
    return found


def test_a_name_among_passes_is_refused_and_a_near_miss_is_told() -> None:
    with pytest.raises(Refused, match="best-w4a4 is a whole plan: give it alone"):
        plan(captured("llama"), "best-w4a4,linear_quant")
    with pytest.raises(Refused, match="did you mean best-w4a4"):
        plan(captured("llama"), "best_w4a4")


def test_the_command_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()[::3]] == NAMES
    assert main(["recipes", "best-w4a4"]) == 0
    assert capsys.readouterr().out.strip() == recipes_text("best-w4a4")
    assert main(["recipes", "best-w9"]) == 2
    assert "best-w8a8" in capsys.readouterr().err
