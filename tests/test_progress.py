"""What is printed while a compile works."""

from __future__ import annotations

import pytest

from qc.compiler.progress import shown, time_left
from qc.compiler.solve import Progress


def test_a_pipe_gets_one_plain_line_per_part(capsys: pytest.CaptureFixture[str]) -> None:
    with shown() as report:
        for index, part in enumerate(("prologue", "model.layers.0", "epilogue")):
            for what in ("load", "iter_smooth", "autoround 10/50"):
                report(Progress(part, index, 3, what))
    out, err = capsys.readouterr()
    assert not out
    first, second, third = err.splitlines()
    assert [first, second] == ["[1/3] prologue", "[2/3] model.layers.0"]
    assert third == "[3/3] epilogue, about 0 s left"


def test_what_is_done_is_not_counted_beyond_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with shown() as report:
        report(Progress("boolq", 1, 1, "questions answered right"))
    assert capsys.readouterr().err == "[1/1] boolq\n"


def test_time_left_is_said_once_it_can_be_known() -> None:
    assert time_left(10, 1, 32) == ""
    assert time_left(20, 2, 8) == ", about 60 s left"
    assert time_left(120, 2, 32) == ", about 30 min left"
