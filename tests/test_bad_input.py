"""What a new user gets wrong, on the command line: each ends with 2 and a sentence that says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qc.compiler.cli import main
from tests.checkpoints import save_float, save_quantized
from tests.homes import Home

pytestmark = pytest.mark.broad

Command = Callable[..., tuple[int, str, str]]
W8A8 = ("--passes", "linear_quant", "--scheme", "w8a8")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*argv: Any) -> tuple[int, str, str]:
        try:
            status = main([str(word) for word in argv])
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    return run


@pytest.fixture
def model(home: Callable[[str], Home], tmp_path: Path) -> Path:
    """A copy of a checkpoint that a test may spoil."""
    return Path(shutil.copytree(home("llama-128").path, tmp_path / "model"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A float checkpoint and its quantized export; nothing writes there."""
    folder = tmp_path_factory.mktemp("pair")
    source = save_float(folder / "float")
    return source, save_quantized(source, folder / "quantized", "W8A8_DYNAMIC")


def configured(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def stale(path: Path) -> None:
    names = [*load_file(path / "model.safetensors"), "ghost.weight"]
    (path / "model.safetensors").rename(path / "model-1.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-1.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def absolute(path: Path) -> None:
    names = load_file(path / "model.safetensors")
    elsewhere = path.parent / "elsewhere.safetensors"
    (path / "model.safetensors").rename(elsewhere)
    index = {"weight_map": dict.fromkeys(names, str(elsewhere))}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def rename(path: Path, name: str) -> None:
    (path / "model.safetensors").rename(path / name)


def cut(path: Path) -> None:
    """The embedding and the head lose rows that the tokenizer's tokens need."""
    tensors = load_file(path / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:40].clone()
    save_file(tensors, path / "model.safetensors")
    configured(path, vocab_size=40)


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda path: (path / "config.json").unlink(), "no config.json in this directory"),
    "config that is no JSON": (lambda path: (path / "config.json").write_text("{ no"), "not valid JSON"),
    "unknown type": (lambda path: configured(path, model_type="frobnicate"), "`frobnicate`"),
    "no type": (lambda path: (path / "config.json").write_text("{}"), "has no model_type"),
    "wrong kind": (lambda path: configured(path, hidden_size="big"), "expected int, got str (value: 'big')"),
    "no heads": (lambda path: configured(path, num_attention_heads=0), "cannot be read by transformers"),
    "no layers": (lambda path: configured(path, num_hidden_layers=0), "no stack of decoder blocks"),
    "another width": (lambda path: configured(path, hidden_size=128), "do not belong together"),
    "quantized": (lambda path: configured(path, quantization_config={"quant_method": "awq"}), "quant_method awq"),
    "a stale index": (stale, "ghost.weight should be in model-1.safetensors, which does not hold it"),
    "an index to elsewhere": (absolute, "points outside the checkpoint directory"),
    "pickles": (lambda path: rename(path, "pytorch_model.bin"), "the weights are pickles (pytorch_model.bin)"),
    "GGUF": (lambda path: rename(path, "model.gguf"), "model.gguf is GGUF, which qc does not read"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "no weights: neither model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILED)
def test_a_checkpoint_that_is_none(what: str, command: Command, model: Path, tmp_path: Path) -> None:
    spoil, words = SPOILED[what]
    spoil(model)
    before = sorted(path.name for path in tmp_path.iterdir())
    status, _, err = command("compile", model, *W8A8, "--out", tmp_path / "out")
    assert status == 2
    assert words in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_is_no_checkpoint_directory(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    status, _, err = command("plan", tmp_path / "m.gguf", *W8A8)
    assert (status, "m.gguf is a GGUF file" in err) == (2, True)

    def offline(*args: Any, **options: Any) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    status, _, err = command("plan", "some-org/some-model", *W8A8)
    assert status == 2
    assert "the hub gave none (ConnectionError: Name or service not known)" in err
    assert "Check the name and the network" in err


def test_tokens_that_the_model_has_not(command: Command, model: Path, home: Any, tmp_path: Path) -> None:
    cut(model)
    calib = ("--calib", home("llama-128").text, "--samples", 2, "--length", 24)
    status, _, err = command(
        "compile", model, "--passes", "iter_smooth,linear_quant", *calib, "--out", tmp_path / "out"
    )
    assert status == 2
    assert "the model's embedding has 40 rows: the tokenizer belongs to another model" in err
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 20)
    status, _, err = command("eval", model, "--reference", model, "--text", text, "--length", 24)
    assert (status, "its vocabulary has 40" in err) == (2, True)
    status, _, err = command("generate", model, "zzz")
    assert (status, "the model's vocabulary has 40" in err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_windows_longer_than_the_positions_of_the_model(command: Command, home: Any, tmp_path: Path) -> None:
    place = home("opt")
    argv = ("compile", place.path, "--passes", "iter_smooth,linear_quant", "--scheme", "w8a8", "--samples", 1)
    status, _, err = command(*argv, "--length", 128, "--out", tmp_path / "out")
    assert status == 2
    assert "embed_positions has 66 rows, and row 129 is looked up" in err
    assert "choose a smaller --length" in err
    assert list(tmp_path.iterdir()) == []
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 20)
    status, _, err = command("eval", place.path, "--reference", place.path, "--text", text, "--length", 128)
    assert (status, "no position for every token of a window of 128" in err) == (2, True)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--passes", ""), "no passes were given"),
        (("--passes", " , "), "there are adapt_residual, autoround"),
        (("--passes", "linear_quant,linear_quant"), "linear_quant has nothing to do: passes before it"),
        ((*W8A8, "--seed", -1), "--seed -1: between 0 and"),
        ((*W8A8, "--seed", 2**32), "between 0 and 4294967295"),
        (("--passes", "iter_smooth{alpha=lots}"), "it must be a number"),
        (("--passes", "iter_smooth{alpha=nan}"), "alpha=nan: it must be between 0 and 1"),
        (("--passes", "autoround{iters=-1}"), "iters=-1"),
        (("--passes", "linear_quant{include=*.donw_proj}"), "did you mean '*.down_proj'?"),
    ],
)
def test_words_that_make_no_plan(argv: tuple[Any, ...], words: str, command: Command, pair: Any) -> None:
    status, out, err = command("plan", pair[0], *argv)
    assert status == 2
    assert words in out + err


def test_places_in_a_model_that_are_not_there(command: Command, pair: Any) -> None:
    for layer in (-1, 2):
        status, _, err = command("show", pair[0], "--layer", layer)
        assert (status, "the model has layers 0 to 1" in err) == (2, True)
    status, _, err = command("why", pair[0], "up_down", "--at", "model.layers.0.mpl")
    assert (status, "did you mean model.layers.0.mlp?" in err) == (2, True)


def test_places_for_an_output_that_are_none(command: Command, pair: Any) -> None:
    for out, words in (("", "--out is empty"), (pair[0] / "below", "is inside the input")):
        status, _, err = command("compile", pair[0], *W8A8, "--force", "--out", out)
        assert (status, words in err) == (2, True)
    assert not (pair[0] / "below").exists()


def test_what_is_quantized_is_not_quantized_again(command: Command, pair: Any, tmp_path: Path) -> None:
    status, _, err = command("compile", pair[1], *W8A8, "--out", tmp_path / "out")
    assert status == 2
    assert "the checkpoint is quantized already; start from the float checkpoint" in err


def test_evaluating_what_can_not_be(command: Command, pair: Any, tmp_path: Path) -> None:
    text, few = tmp_path / "text.txt", tmp_path / "few.txt"
    text.write_text("the cat sat on the mat " * 30)
    few.write_text("the cat")
    other = save_float(tmp_path / "other", vocab_size=40)
    for out, reference, file, more, words in (
        (pair[1], pair[0], few, (), "fewer than one window of 32"),
        (pair[1], other, text, (), "not the same model"),
        (tmp_path, pair[0], text, (), "no config.json"),
        (tmp_path / "nowhere", pair[0], text, (), "no such directory"),
        (pair[1], tmp_path / "nowhere", text, (), "nowhere: no such directory"),
        (pair[1], pair[0], tmp_path / "none.txt", (), "no such file"),
        (pair[1], pair[0], text, ("--windows", 0), "--windows 0"),
    ):
        argv = ("eval", out, "--reference", reference, "--text", file, "--length", 32, *more)
        status, _, err = command(*argv)
        assert (status, words in err) == (2, True), err


@pytest.mark.parametrize(
    ("prompt", "words"), [("", "the prompt is empty"), ("\udcff\udcfe", "the prompt is not UTF-8 text")]
)
def test_prompts_that_are_none(prompt: str, words: str, command: Command, pair: Any) -> None:
    status, _, err = command("generate", pair[1], prompt)
    assert (status, words in err) == (2, True)


def test_fewer_windows_than_asked_for_are_told_of(
    command: Command, model: Path, home: Any, tmp_path: Path
) -> None:
    text = home("llama-128").text
    argv = ("compile", model, "--passes", "iter_smooth,linear_quant", "--scheme", "w8a8", "--calib", text)
    status, out, _ = command(*argv, "--samples", 99, "--length", 24, "--out", tmp_path / "out")
    assert status == 0
    assert f"calibrated on 15 windows of 24 tokens from {text}, fewer than the 99 asked for" in out
