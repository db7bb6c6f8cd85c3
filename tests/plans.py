"""Plans of captured families whose weights nobody may read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qc.compiler.errors import Refused
from qc.compiler.plan import Plan, make_plan
from qc.compiler.program import Program
from tests.programs import captured

RTN = "linear_quant"


class Unread:
    """Weights that must not be asked for; shapes may."""

    def __init__(self, program: Program) -> None:
        self.source = program.source

    def __getattr__(self, name: str) -> Any:
        if name in ("load", "check_finite"):
            raise AssertionError("the plan read a weight")
        return getattr(self.source, name)


def planned(family: str, passes: Any, **options: Any) -> Plan:
    program = captured(family)
    source: Any = Unread(program)
    return make_plan(replace(program, source=source), passes, **options)


def only(found: Plan, *expected: str) -> None:
    """The plan has exactly one problem for each of these, with these words in it."""
    assert len(found.problems) == len(expected), found.problems
    for words in expected:
        assert any(all(word in problem for word in words.split("|")) for problem in found.problems), words
    if expected:
        with pytest.raises(Refused) as refused:
            found.require()
        assert all(problem in str(refused.value) for problem in found.problems)


def schemes(found: Plan) -> dict[str, str]:
    """Linear to scheme, as the plan has them in the end."""
    return {str(n.target): str(n.meta["scheme"]) for n in found.final.graph.nodes if "scheme" in n.meta}
