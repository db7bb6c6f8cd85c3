"""What the benchmarks stand on: measuring, random checkpoints, texts, records."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.measure import run_python
from benchmarks.random_llama import Shape, character_tokenizer, write
from benchmarks.records import record
from benchmarks.report import main as report
from benchmarks.texts import find_texts

SMALL = Shape(layers=3, hidden=32, intermediate=48, vocabulary=96, heads=4, key_heads=2)


def test_peak_memory_is_that_of_the_process_and_not_what_it_ended_with():
    idle = run_python("import sys; print(sys.argv[1])", "words")
    busy = run_python("x = bytearray(200_000_000); x[::4096] = b'x' * len(x[::4096]); del x")
    assert idle.output == "words\n"
    assert 190e6 < busy.peak - idle.peak < 260e6


def test_a_process_that_fails_is_an_error_with_its_last_words():
    with pytest.raises(RuntimeError, match=r"exit status 2\n.*no such plan"):
        run_python("import sys; print('no such plan', file=sys.stderr); sys.exit(2)")


def test_random_checkpoints_load_in_transformers(tmp_path: Path):
    folder = write(tmp_path / "model", SMALL)
    model = AutoModelForCausalLM.from_pretrained(folder)
    stored = {name: shape for shapes in SMALL.shards for name, shape in shapes.items()}
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == stored
    assert model.dtype == torch.bfloat16
    assert len(list(folder.glob("*.safetensors"))) == SMALL.layers + 1
    text = "Two lines,\nin one file."
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert len(ids) == len(text)
    assert character_tokenizer().convert_ids_to_tokens(ids) == list(text.lower())
    assert torch.isfinite(model(input_ids=torch.tensor([ids])).logits).all()


def test_a_seed_is_a_checkpoint(tmp_path: Path):
    shard = "model-00002-of-00004.safetensors"
    same, again, other = (
        (write(tmp_path / name, SMALL, seed=seed) / shard).read_bytes()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert same == again
    assert same != other


def test_shared_texts_are_used_only_when_all_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QC_DATA", str(tmp_path))
    for name in ("boolq.jsonl", "mix_calib.jsonl"):
        (tmp_path / name).write_text('{"text": "t"}', encoding="utf-8")
    own = find_texts()
    assert (own.calibration, own.comparable) == ((), False)
    assert own.evaluation.read_text(encoding="utf-8")
    assert "compare with no published ones" in str(own)
    (tmp_path / "wikitext2-valid.txt").write_text("t", encoding="utf-8")
    shared = find_texts()
    assert [path.name for path in shared.calibration] == ["boolq.jsonl", "mix_calib.jsonl"]
    assert shared.comparable


def test_records_are_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QC_RESULTS", str(tmp_path))
    record("speed", {"seconds": 1.5, "met": True})
    file = record("speed", {"seconds": 2.5, "met": False})
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [(row["seconds"], row["met"]) for row in rows] == [(1.5, True), (2.5, False)]
    assert {"when", "cores", "torch"} <= rows[0].keys()


def test_saved_families_have_a_model_and_a_tokenizer_that_fit(checkpoint: Callable[[str], Path]):
    folder = checkpoint("llama")
    assert checkpoint("llama") == folder
    ids = AutoTokenizer.from_pretrained(folder)("Every character ~ {is} a token.", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model(**ids).logits.shape == (1, 31, model.config.vocab_size)


def test_a_page_holds_the_newest_row_of_each_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QC_RESULTS", str(tmp_path))
    for multiple in (2.5, 1.25):
        record(
            "accuracy",
            {"row": "w4a4", "passes": "quarot,autoround", "multiple": multiple, "met": multiple < 2},
        )
    record("accuracy", {"row": "auto", "passes": "linear_quant", "multiple": 1.0, "met": None})
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- results: begin -->\nold\n<!-- results: end -->\nafter\n")
    assert report([str(tmp_path), "--into", str(page)]) == 0
    text = page.read_text()
    assert "| w4a4 | `quarot,autoround` | 1.25 | yes |" in text
    assert "| auto | linear_quant | 1 |  |" in text
    assert "2.5" not in text.partition("Measured")[0]
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert report([str(tmp_path), "--into", str(page)]) == 0
    assert page.read_text() == text


def test_a_page_without_results_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        report([str(tmp_path)])
    assert "run a benchmark first" in capsys.readouterr().err
