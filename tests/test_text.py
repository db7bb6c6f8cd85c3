"""The text of a program: canonical, folded, complete, and readable."""

from __future__ import annotations

import re

import pytest
from syrupy.assertion import SnapshotAssertion

from qc.compiler.show.rows import Sizes, rows
from qc.compiler.show.text import text
from tests.programs import captured


@pytest.mark.parametrize("family", ["smollm2", "gemma2", "gpt2"])
def test_the_text_is_what_it_was(family: str, snapshot: SnapshotAssertion) -> None:
    assert text(captured(family)) == snapshot


def test_equal_programs_have_equal_texts() -> None:
    program = captured("llama")
    assert text(program) == text(program.fork())


def test_the_text_of_a_layer_is_the_text_of_its_run() -> None:
    program = captured("llama")
    lines = text(program, layer=1).splitlines()
    assert lines[0] == "model.layers.1"
    body = [line for line in lines if re.match(r"  v\d", line)]
    assert "\n".join(body) in text(program)
    with pytest.raises(IndexError, match=r"layer 3 of a model with layers 0\.\.2"):
        text(program, layer=3)


def test_every_value_of_a_part_has_a_row_and_a_name_of_its_own() -> None:
    program = captured("qwen3")
    sizes = Sizes(program)
    for part in program.parts:
        names = [row.name for row in rows(program, part, sizes) if row.name]
        assert len(names) == len(set(names))
    printed = text(program)
    for name in ("v0", "self_attn.q_norm", "[b, s, 4, 24]", "rms norm, weight [24], eps 1e-06"):
        assert name in printed
    assert "0x" not in printed
    assert not re.search(r"\bs\d+\b", printed)


def test_a_note_of_an_edit_is_printed_and_ends_the_fold_of_its_layer() -> None:
    program = captured("llama").fork()
    node = next(n for n in program.graph.nodes if n.target == "model.layers.1.mlp.up_proj")
    node.meta["note"] = "W4A4"
    printed = text(program)
    assert "mlp.up_proj(v30)  weight [96, 64]  # W4A4" in printed
    titles = [line for line in printed.splitlines() if line.startswith("model.layers")]
    assert titles == ["model.layers.0", "model.layers.1", "model.layers.2"]


def test_which_value_feeds_a_layer_is_said_beside_it() -> None:
    printed = text(captured("gemma2"))
    assert "model.layers.0..2 alike" in printed
    (line,) = [row for row in printed.splitlines() if row.startswith("  in3: bool[b, 1, s, s] = ")]
    assert re.search(r"prologue\.v\d+ in 0, 2; prologue\.v\d+ in 1$", line)
