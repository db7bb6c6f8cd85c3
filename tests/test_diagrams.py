"""Diagrams: what is one box, what is highlighted, where things are placed, and which colours are used."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qc.compiler.plan import make_plan
from qc.compiler.show.block import block_diagram
from qc.compiler.show.diagram import Diagram
from qc.compiler.show.layout import layout
from qc.compiler.show.matched import matched
from qc.compiler.show.overview import model_diagram
from qc.compiler.show.palette import FILLS, INK, MARKS, MUTED, PAPER, contrast
from qc.compiler.show.states import state_after
from qc.compiler.show.svg import STYLE, svg
from tests.programs import captured


def drawn(family: str, passes: str, layer: int = 1, scheme: str = "auto") -> Diagram:
    plan = make_plan(captured(family), passes, scheme=scheme)
    state = state_after(plan, len(plan.steps))
    part = state.program.blocks[layer]
    return block_diagram(state.program, part, matches=state.matches(parts=[part]), rewrites=state.rewrites)


def test_a_block_of_llama_is_few_boxes() -> None:
    diagram = drawn("llama", "iter_smooth,quarot,linear_quant")
    titles = [box.title for box in diagram.boxes]
    assert titles.count("rotary embedding") == 2
    assert titles.count("+") == 2
    assert len(titles) == 20
    assert {(box.format, box.bits) for box in diagram.boxes if box.kind == "linear"} == {
        ("W8A8", 8),
        ("W4A4", 4),
    }


def test_matches_are_captioned_with_the_passes_that_rewrote_them() -> None:
    diagram = drawn("llama", "iter_smooth,quarot,linear_quant")
    assert [mark.caption for mark in diagram.marks] == [
        "norm-linear: fuse_norms", "norm-linear: fuse_norms", "ov: iter_smooth, rotate_heads",
        "up-down: iter_smooth", "residual: rotate_residual",
    ]  # fmt: skip
    ov = next(mark for mark in diagram.marks if mark.pattern == "ov")
    assert [diagram.box(id).title for id in ov.boxes] == ["self_attn.v_proj", "self_attn.o_proj"]
    ways = [
        (diagram.box(diagram.arrows[i].source).title, diagram.box(diagram.arrows[i].target).title)
        for i in ov.arrows
    ]
    assert ways == [("self_attn.v_proj", "attention"), ("attention", "self_attn.o_proj")]


def test_what_passes_insert_has_boxes_of_its_own() -> None:
    diagram = drawn("llama-128", "online_rotation,linear_quant,dynamic_cache", scheme="w4a4")
    kinds = [box.kind for box in diagram.boxes]
    assert (kinds.count("inserted"), kinds.count("stub")) == (2, 2)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3", "smollm2"])
def test_every_row_is_in_one_box_and_boxes_come_in_order(family: str) -> None:
    program = captured(family)
    for part in program.parts:
        for whole in (True, False):
            diagram = block_diagram(program, part, whole=whole)
            place = {box.id: i for i, box in enumerate(diagram.boxes)}
            assert len(place) == len(diagram.boxes)
            assert all(place[arrow.source] < place[arrow.target] for arrow in diagram.arrows)
            rows = [row for box in diagram.boxes if box.kind not in ("input", "output") for row in box.rows]
            assert len(rows) == len(set(rows))


def test_a_deep_model_is_one_card_per_run() -> None:
    program = captured("llama")
    diagram = model_diagram(program, matches=matched(program))
    assert [box.title for box in diagram.boxes] == ["prologue", "model.layers.0..2 alike", "epilogue"]
    assert [(a.source, a.target) for a in diagram.arrows] == [
        ("prologue", "model.layers.0"), ("model.layers.0", "epilogue")
    ]  # fmt: skip
    assert "2 norm-linear, 1 ov, 1 up-down" in diagram.boxes[1].lines


def test_matches_of_alike_blocks_are_those_of_the_whole_search() -> None:
    program = captured("qwen3")
    part = program.blocks[-1]
    here = [m for m in matched(program, ["norm_linear"], [part]) if part.name in str(m)]
    from qc.patterns.norm_linear import norm_linear

    full = [m.norm.module for m in norm_linear.find(program) if part.name in m.norm.module]
    assert [m.names[0] for m in here] == full


@given(
    st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=24),
    st.lists(st.tuples(st.integers(20, 200), st.integers(20, 90)), min_size=12, max_size=12),
)
def test_no_two_boxes_overlap(pairs: list[tuple[int, int]], sizes: list[tuple[int, int]]) -> None:
    arrows = list(dict.fromkeys((str(min(p)), str(max(p))) for p in pairs if p[0] != p[1]))
    given_sizes = {str(i): (float(w), float(h)) for i, (w, h) in enumerate(sizes)}
    placed = layout(given_sizes, arrows)
    boxes = list(placed.places.values())
    for i, one in enumerate(boxes):
        assert one.x - one.width / 2 >= -0.2
        for other in boxes[:i]:
            apart_x = abs(one.x - other.x) >= (one.width + other.width) / 2 - 0.2
            apart_y = abs(one.y - other.y) >= (one.height + other.height) / 2 - 0.2
            assert apart_x or apart_y
    for (source, target), path in zip(arrows, placed.paths, strict=True):
        assert path[0][1] < path[-1][1]
        assert abs(path[0][0] - placed.places[source].x) <= placed.places[source].width / 2 + 0.2
        assert abs(path[-1][0] - placed.places[target].x) <= placed.places[target].width / 2 + 0.2


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read_on_every_colour(theme: str) -> None:
    def c(colour: object) -> str:
        return getattr(colour, theme)

    pairs = [(c(ink), c(fill.area)) for fill in FILLS.values() for ink in (INK, MUTED)]
    pairs += [(c(fill.on), c(fill.edge)) for name, fill in FILLS.items() if name != "plain"]
    pairs += [(c(fill.edge), c(fill.area)) for name, fill in FILLS.items() if name in ("w8", "w4", "w2")]
    pairs += [(c(colour), c(PAPER)) for colour in (*MARKS.values(), INK, MUTED)]
    assert [pair for pair in pairs if contrast(*pair) < 4.5] == []


def test_an_svg_needs_nothing_from_outside() -> None:
    whole = svg(drawn("llama", "quarot,linear_quant"))
    assert "url(" not in whole
    assert " id=" not in whole
    assert "<script" not in whole
    assert STYLE in whole
    assert STYLE not in svg(drawn("llama", "quarot,linear_quant"), style=False)
