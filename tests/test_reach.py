"""The reach benchmark: small configs of any type, one row each, resumable, never silent."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import reach, reach_row
from benchmarks.reach_configs import TYPES, small_config
from benchmarks.reach_page import bars, page
from benchmarks.reach_row import Row, row_of

pytestmark = pytest.mark.broad


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QC_RESULTS", str(tmp_path))
    return tmp_path / "reach.jsonl"


@pytest.mark.parametrize(
    "name", ["llama", "gemma3_text", "deepseek_v3", "qwen3_next", "jamba", "gpt_oss", "falcon", "zamba2"]
)
def test_a_small_config_has_a_layer_of_every_kind(name: str) -> None:
    config = small_config(name).get_text_config()
    full = type(config)()
    for key in ("layer_types", "layers_block_type", "mlp_layer_types"):
        if isinstance(kinds := getattr(full, key, None), list):
            assert set(getattr(config, key)) == set(kinds), key
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small_config(name))
    assert sum(p.numel() for p in model.parameters()) < 2e6


def test_a_row_says_how_far_a_type_goes() -> None:
    row = row_of("llama")
    assert (row.failed, row.reason) == ("", "")
    assert row.captured
    assert (row.blocks, row.linears, row.rotated, row.heads) == (2, 14, "plain", 2)
    assert row.sites["norm_linear"] == 5
    assert row.proofs > 0
    assert 0 < row.worst < 1e-12
    assert row.divergence is not None
    assert 0 < row.divergence < 0.1


def test_a_type_that_fails_has_a_reason_and_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ValueError(f"{name} needs a value")

    monkeypatch.setattr(reach_row, "small_config", broken)
    row = row_of("llama")
    assert row.failed == "build"
    assert row.reason == "ValueError: llama needs a value"
    assert "test_reach.py" in row.place


def test_what_is_done_is_not_done_again(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def run(types: list[str], jobs: int, limit: float) -> list[Row]:
        asked[:] = types
        return [
            Row(name, captured=True, failed="compile" if name == "phi" else "", reason="so") for name in types
        ]

    monkeypatch.setattr(reach, "run", run)
    reach.main(["--types", "phi", "phi3"])
    assert asked == ["phi", "phi3"]
    reach.main(["--types", "phi*"])
    assert set(asked) == {name for name in TYPES if name.startswith("phi")} - {"phi", "phi3"}
    reach.main(["--types", "phi", "phi3", "--again"])
    assert asked == ["phi"]
    old = json.loads(results.read_text().splitlines()[0])
    results.write_text(json.dumps(old | {"versions": {"qc": "0"}}) + "\n")
    reach.main(["--types", "phi"])
    assert asked == ["phi"]


def test_a_worker_that_dies_is_a_row_with_a_reason() -> None:
    (row,) = reach.run(["llama"], jobs=1, limit=0.0)
    assert (row.failed, row.reason) == ("process", "took more than 0 s")


def test_the_page_names_every_miss_and_no_folder_of_this_machine() -> None:
    rows = [
        Row("one", captured=True, rotated="plain", linears=3),
        Row("two", captured=True, rotation="the residual stream can not be rotated: /me/x.py says no. Leave quarot"),
        Row("three", failed="capture", reason="Refused: at /home/me/.venv/lib/modeling_three.py:9", place="x.py:1: y"),
    ]  # fmt: skip
    text = page(rows, {"transformers": "5", "torch": "2"})
    assert "- x.py says no: two" in text
    assert "| three | capture | Refused: at modeling_three.py:9 | x.py:1: y |" in text
    assert "/me" not in text
    assert [met for *_, met in bars(rows, 3)] == [True, False, True, True]
    assert json.loads(json.dumps(asdict(rows[0])))["type"] == "one"
