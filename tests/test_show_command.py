"""``qc show`` and ``qc diff``: what they print and write, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

from qc.compiler.capture import capture
from qc.compiler.show.formats import SUFFIXES
from tests.homes import Home
from tests.pages import qc
from tests.programs import captured

PASSES = "iter_smooth,quarot,linear_quant"


@pytest.fixture
def model(home: Callable[[str], Home], monkeypatch: pytest.MonkeyPatch) -> str:
    """A checkpoint of a tiny Llama, captured once."""
    for module in ("qc.compiler.capture", "qc.compiler.compile"):
        monkeypatch.setattr(f"{module}.capture", lambda model, **options: captured("llama-128"))
    return "tiny"


def shown(*words: str) -> str:
    status, got = qc(list(words))
    assert status == 0, got
    return got


def test_after_is_a_pass_a_preset_or_a_number(model: str) -> None:
    by_name = shown("show", model, "--passes", PASSES, "--after", "rotate_heads")
    assert by_name == shown("show", model, "--passes", PASSES, "--after", "quarot")
    assert by_name == shown("show", model, "--passes", PASSES, "--after", "4")
    assert "W8A8" not in by_name
    assert "W8A8" in shown("show", model, "--passes", PASSES)


def test_every_rewrite_has_a_line(model: str) -> None:
    got = shown("show", model, "--passes", PASSES)
    assert (
        "    iter_smooth up-down at mlp.up_proj: exact; scale_out of mlp.up_proj; scale_in of mlp.down_proj"
        in got
    )
    assert "\nacross blocks\n  rotate_residual residual at residual stream: exact; rotate_out H64 of" in got


def test_only_prints_the_rows_of_matches(model: str) -> None:
    got = shown("show", model, "--passes", PASSES, "--only", "ov", "--layer", "1")
    lines = got.splitlines()
    assert lines[:2] == ["model.layers.1", "  ov: iter_smooth, rotate_heads"]
    assert ["v_proj" in lines[2], "attention" in lines[3], "o_proj" in lines[4], len(lines)] == [
        True,
        True,
        True,
        5,
    ]


def test_only_shows_matches_that_name_one_module(model: str) -> None:
    lines = shown("show", model, "--only", "linear", "--layer", "0").splitlines()
    rows = [line.partition(" = linear ")[2].partition("(")[0] for line in lines if " = linear " in line]
    assert rows == [
        *(f"self_attn.{name}_proj" for name in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
    ]  # fmt: skip
    assert (
        shown("show", model, "--only", "residual") == "no match of residual: qc why MODEL residual says why\n"
    )


def test_diff_keeps_the_names_of_values(model: str) -> None:
    got = shown("diff", model, "--passes", "online_rotation,linear_quant", "--scheme", "w4a4", "--step", "1")
    changed = [line for line in got.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert sum("linear" in line for line in changed) == 4  # o and down, before and after
    assert sum(line.startswith("+new") for line in changed) == 6
    assert "model.layers.0..2 alike" in got


@pytest.mark.parametrize("suffix", sorted(set(SUFFIXES) - {".png"}))
@pytest.mark.parametrize("where", [[], ["--layer", "1"]])
def test_same_input_same_bytes(model: str, suffix: str, where: list[str], tmp_path: Path) -> None:
    one, other = tmp_path / f"one{suffix}", tmp_path / f"other{suffix}"
    for file in (one, other):
        shown("show", model, "--passes", PASSES, *where, "--out", str(file))
    assert one.read_bytes() == other.read_bytes()
    assert b"self_attn" in one.read_bytes()
    if suffix == ".svg":
        ElementTree.fromstring(one.read_text(encoding="utf-8"))


def test_model_explorer_json_has_every_edge(model: str, tmp_path: Path) -> None:
    file = tmp_path / "graph.json"
    shown("show", model, "--out", str(file))
    (graph,) = json.loads(file.read_text(encoding="utf-8"))["graphs"]
    ids = {node["id"] for node in graph["nodes"]}
    assert all(edge["sourceNodeId"] in ids for node in graph["nodes"] for edge in node["incomingEdges"])
    assert {"model/layers/0/self_attn", "model/layers/2/mlp"} <= {
        node["namespace"] for node in graph["nodes"]
    }


def test_a_journal_that_is_cut_off_is_refused(model: str, tmp_path: Path) -> None:
    (tmp_path / "qc_journal.jsonl").write_text('{"where": "mod', encoding="utf-8")
    status, said = qc(["show", model, "--passes", PASSES, "--journal", str(tmp_path)])
    assert status == 2
    assert "qc_journal.jsonl: not readable as lines of JSON" in said


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (
            ["--passes", PASSES, "--after", "iter_smoth"],
            "unknown step 'iter_smoth'; did you mean iter_smooth?",
        ),
        (["--passes", PASSES, "--after", "9"], "the plan has the steps 1 iter_smooth, 2 fuse_norms"),
        (["--passes", "iter_smooth,iter_smooth", "--after", "iter_smooth"], "at 1 and 2: give the number"),
        (["--after", "iter_smooth"], "no passes were given: add --passes or --config"),
        (["--layer", "7"], "the model has layers 0 to 2"),
        (["--only", "up-down"], "did you mean up_down"),
        (["--format", "svgg"], "unknown format 'svgg'; did you mean svg?"),
        (["--out", "a.pdf"], "its suffix says no format: give --format, or one of .txt"),
        (["--journal", ".", "--passes", PASSES], "it is not the output of qc compile"),
        (["--journal", "."], "--journal .: no passes were given"),
        (["--journal", ".", "--passes", PASSES, "--out", "a.svg"], "printed in text and html, not in svg"),
        (["--out", "no/where.svg"], "--out no/where.svg: its directory does not exist"),
        (["--out", ".", "--format", "svg"], "--out .: this is a directory"),
        (["--only", "ov", "--out", "a.json"], "--only ov: model-explorer takes whole graphs"),
        (["--every-op", "--out", "a.svg"], "a svg of the whole model has no box per op"),
    ],
)
def test_what_is_refused_says_the_fix(model: str, words: list[str], why: str) -> None:
    status, got = qc(["show", model, *words])
    assert status == 2
    assert why in got


def test_png_without_graphviz_says_what_to_install(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "graphviz", None)
    status, got = qc(["show", model, "--layer", "0", "--out", "a.png"])
    assert status == 2
    assert "pip install 'qc[png]'" in got
    assert "--format svg" in got


def test_a_plan_with_problems_is_shown_and_then_refused(model: str) -> None:
    status, got = qc(["show", model, "--passes", "online_rotation,linear_quant", "--layer", "0"])
    assert status == 2
    assert got.startswith("model.layers.0\n")
    assert "an online rotation is served before int4 linears only" in got


def test_networkx_export_is_whole_and_can_be_written(tmp_path: Path) -> None:
    program = captured("llama")
    graph = program.to_networkx()
    assert nx.is_directed_acyclic_graph(graph)
    modules = [held["target"] for held in graph.nodes.values() if held["bits"]]
    assert sorted(modules) == sorted(name for name, leaf in program.leaves.items() if leaf.kind == "linear")
    nx.write_graphml(graph, tmp_path / "graph.graphml")


class Squared(nn.Module):
    """A block that multiplies a value by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x * x


class Squares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 8), nn.Linear(8, 32)
        self.layers = nn.ModuleList([Squared(), Squared()])

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_a_value_that_is_read_twice_has_both_places_on_its_edge() -> None:
    graph = capture(Squares(), example={"input_ids": torch.zeros(1, 4, dtype=torch.long)}).to_networkx()
    products = [edge for edge in graph.edges if graph.nodes[edge[1]]["op"] == "mul"]
    places = [graph.edges[edge]["operands"] for edge in products]
    assert places == ["0,1", "0,1"]


@pytest.mark.real
def test_the_picture_of_the_readme_is_what_the_command_makes(smollm2: Path, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    page = (root / "docs" / "inspecting.md").read_text(encoding="utf-8")
    passes = page.partition('--passes "')[2].partition('"')[0]
    shown("show", str(smollm2), "--layer", "0", "--passes", passes, "--out", str(tmp_path / "block.svg"))
    assert (tmp_path / "block.svg").read_text() == (root / "docs" / "block.svg").read_text()
