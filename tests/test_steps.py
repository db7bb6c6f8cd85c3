"""Steps of a plan by name or number, and the program after each (``--print-after``)."""

from __future__ import annotations

import pytest

import qc
from qc.compiler.steps import after, steps_named
from tests.programs import captured


def test_a_step_is_found_by_name_and_by_number() -> None:
    plan = qc.plan(
        captured("llama"), "smooth_quant,linear_quant{include=*.q_proj},linear_quant", scheme="w8a8"
    )
    assert steps_named(plan, ["linear_quant"]) == [1, 2]
    assert steps_named(plan, ["2", "1"]) == [0, 1]
    assert steps_named(plan, ["all"]) == [0, 1, 2]
    assert after(plan, 0) is plan.steps[1].program
    assert after(plan, 2) is plan.final
    for wrong in ("4", "0", "smooth_qant"):
        with pytest.raises(
            qc.Refused, match=f"the plan has no step '{wrong}': .*1. smooth_quant, 2. linear_quant"
        ):
            steps_named(plan, [wrong])
