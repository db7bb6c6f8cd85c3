"""A compile that stops, for whatever reason, says why and leaves nothing at its output."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qc.compiler import edit as edits_of
from qc.compiler.cli import main
from qc.compiler.compile import Options, compile, plan
from qc.compiler.edit import Verb
from qc.compiler.errors import Refused
from qc.compiler.load import load
from qc.compiler.program import Program
from qc.compiler.safetensors_io import ShardWriter
from qc.compiler.solve import Progress
from qc.compiler.weights import Checkpoint
from tests.homes import SAMPLES, Home, compiled, logits
from tests.programs import relative

pytestmark = pytest.mark.broad


class Stopped(Exception):
    """What a test raises in the middle of the work."""


def nothing_at(out: Path) -> None:
    assert not out.exists()
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(out.name)] == []


@pytest.mark.parametrize("error", [Stopped, KeyboardInterrupt])
def test_an_exception_in_the_middle_leaves_nothing(
    error: type[BaseException], home: Callable[[str], Home], tmp_path: Path
) -> None:
    place = home("llama-128")

    def stop(progress: Progress) -> None:
        if progress.index == 2:
            raise error

    options = Options(scheme="w8a8", calib=(place.text,), **SAMPLES)
    with pytest.raises(error):
        compile(place.program, "iter_smooth,linear_quant", tmp_path / "out", options, stop)
    nothing_at(tmp_path / "out")


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from qc.compiler.capture import capture
from qc.compiler.compile import Options, compile
path, text, out = sys.argv[1:]
program = capture(path, certify=False)
options = Options(scheme="w8a8", calib=(text,), samples=2, length=24)
for number in (signal.SIGKILL, signal.SIGTERM):
    child = os.fork()
    if not child:
        stop = lambda progress: os.kill(os.getpid(), number) if progress.index == 2 else None
        compile(program, "iter_smooth,linear_quant", out, options, stop)
        os._exit(0)
    print(number.name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), os.path.exists(out), flush=True)
"""


def test_a_killed_run_leaves_nothing_at_its_output(home: Callable[[str], Home], tmp_path: Path) -> None:
    place = home("llama-128")
    command = [sys.executable, "-c", KILLED, str(place.path), str(place.text), str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.splitlines() == ["SIGKILL -9 False", "SIGTERM 143 False"], done.stderr
    nothing_at(tmp_path / "out")  # the second run removed what the first had left beside it


def test_an_existing_output_is_refused_before_any_work(home: Callable[[str], Home], tmp_path: Path) -> None:
    place, out = home("llama-128"), tmp_path / "out"
    compiled(place, out, "linear_quant", scheme="w8a8")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    called: list[Progress] = []
    with pytest.raises(Refused, match="--force"):
        compile(place.program, "linear_quant", out, Options(scheme="w4a4", **SAMPLES), called.append)
    assert called == []
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    compiled(place, out, "linear_quant", scheme="w8a16", force=True)
    kinds = json.loads((out / "quant_model_description.json").read_text())
    assert "W8A16" in kinds.values()
    assert "W8A8_DYNAMIC" not in kinds.values()
    with pytest.raises(Refused, match="input"):
        compiled(place, place.path, "linear_quant", scheme="w8a8", force=True)


@pytest.fixture
def qc(
    home: Callable[[str], Home], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Run ``qc`` with the graph of llama-128 for any directory: exit status and errors, never a traceback."""
    base = home("llama-128").program

    def graph(path: str, **options: Any) -> Program:
        return replace(base, path=str(path), source=Checkpoint(Path(path), base.root))

    monkeypatch.setattr("qc.compiler.compile.capture", graph)

    def run(*argv: str | Path) -> tuple[int, str]:
        try:
            status = main([str(word) for word in argv])
        except SystemExit as stop:
            status = int(stop.code or 0)
        err = capsys.readouterr().err
        assert "Traceback" not in err
        return status, err

    return run


@pytest.fixture
def damaged(home: Callable[[str], Home], tmp_path: Path) -> Path:
    """A copy of a checkpoint that a test may spoil."""
    return Path(shutil.copytree(home("llama-128").path, tmp_path / "model"))


def test_a_whole_command_with_the_certificate_of_its_capture(
    home: Callable[[str], Home], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, out = home("llama-128"), tmp_path / "out"
    passes = ("--passes", "iter_smooth,quarot,linear_quant", "--calib", place.text, place.text)
    argv = ("compile", place.path, *passes, "--samples", "4", "--length", "24", "--out", out)
    assert main([str(word) for word in argv]) == 0
    assert "rewrites, proved" in capsys.readouterr().out
    journal = (out / "qc_journal.jsonl").read_text()
    assert "keep the twin's logits" in journal
    assert relative(logits(load(out)), logits(load(place.path))) < 0.5


COMPILE = ("--passes", "iter_smooth,linear_quant", "--scheme", "w8a8", "--samples", "2", "--length", "24")


def test_the_command_line_compiles_and_says_what_it_wrote(
    qc: Any, damaged: Path, tmp_path: Path, home: Any
) -> None:
    status, err = qc(
        "compile", damaged, *COMPILE, "--calib", home("llama-128").text, "--out", tmp_path / "out"
    )
    assert status == 0
    assert "model.layers.0" in err
    assert (tmp_path / "out" / "quant_model_description.json").is_file()


def test_a_weight_that_is_no_number_is_refused_by_its_name(qc: Any, damaged: Path, tmp_path: Path) -> None:
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    status, err = qc("compile", damaged, *COMPILE, "--out", tmp_path / "out")
    assert status == 2
    assert "model.layers.1.mlp.up_proj.weight" in err
    nothing_at(tmp_path / "out")


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def remove(path: Path) -> None:
    index = {"metadata": {}, "weight_map": {}}
    with safe_open(path / "model.safetensors", "pt") as shard:
        index["weight_map"] = dict.fromkeys(shard.keys(), "model-00001-of-00001.safetensors")
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def outside(path: Path) -> None:
    names = list(load_file(path / "model.safetensors"))
    (path / "model.safetensors").rename(path.parent / "elsewhere.safetensors")
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "../elsewhere.safetensors")})
    )


def no_tokenizer(path: Path) -> None:
    for file in path.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (truncate, "model.safetensors"),
        (remove, "model-00001-of-00001.safetensors"),
        (outside, "elsewhere.safetensors"),
        (no_tokenizer, "tokenizer"),
    ],
)
def test_a_damaged_checkpoint_exits_with_2_and_names_the_file(
    spoil: Callable[[Path], None], words: str, qc: Any, damaged: Path, tmp_path: Path
) -> None:
    spoil(damaged)
    status, err = qc("compile", damaged, *COMPILE, "--out", tmp_path / "out")
    assert status == 2
    assert words in err
    nothing_at(tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no text"),
        ("   \n \n", "holds no text"),
        ("too short", "fewer than one window"),
        (None, "no such file"),
    ],
)
def test_calibration_that_can_not_be_used_exits_with_2(
    content: str | None, words: str, qc: Any, damaged: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_text(content)
    status, err = qc("compile", damaged, *COMPILE, "--calib", text, "--out", tmp_path / "out")
    assert status == 2
    assert words in err
    nothing_at(tmp_path / "out")


def test_a_plan_lists_the_calibration_text_that_is_not_there(
    home: Callable[[str], Home], tmp_path: Path
) -> None:
    place, missing = home("llama-128"), tmp_path / "missing.txt"
    options = Options(scheme="w8a8", calib=(place.text, missing))
    problems = plan(place.program, "iter_smooth,linear_quant", options).problems
    assert problems == (f"--calib {missing}: no such file; give a text that exists",)
    assert plan(place.program, "linear_quant", options).problems == ()  # nothing is read for it


def test_a_plan_with_problems_is_refused_before_weights_are_read(
    qc: Any, damaged: Path, tmp_path: Path
) -> None:
    status, err = qc("compile", damaged, "--passes", "linear_quant,quarot", "--out", tmp_path / "out")
    assert status == 2
    assert "this plan has 3 problems" in err
    nothing_at(tmp_path / "out")


def test_a_failed_proof_exits_with_1_and_leaves_nothing(
    qc: Any, damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(edits_of.VERBS, Verb.SCALE_OUT, lambda *args: None)
    status, err = qc("compile", damaged, *COMPILE, "--out", tmp_path / "out")
    assert status == 1
    assert "iter_smooth at model.layers.0" in err
    assert "claims to keep the function" in err
    nothing_at(tmp_path / "out")


def test_a_disk_that_is_full_exits_with_1_and_leaves_nothing(
    qc: Any, damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: ShardWriter, name: str, tensor: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ShardWriter, "write", full)
    status, err = qc("compile", damaged, *COMPILE, "--out", tmp_path / "out")
    assert status == 1
    assert f"{tmp_path / 'out'}: No space left on device; nothing is left there" in err
    nothing_at(tmp_path / "out")


def test_an_output_that_will_not_fit_is_refused_before_any_work(
    qc: Any, damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    status, err = qc("compile", damaged, *COMPILE, "--out", tmp_path / "out")
    assert status == 2
    assert "0.000 GB are free there; make room" in err
    nothing_at(tmp_path / "out")


def test_an_interrupted_command_says_so(
    qc: Any, damaged: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(self: ShardWriter, name: str, tensor: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardWriter, "write", interrupt)
    status, err = qc("compile", damaged, *COMPILE, "--out", tmp_path / "out")
    assert status == 130
    assert "interrupted; nothing was written" in err
    nothing_at(tmp_path / "out")


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("model", "is or contains the input"),
        ("file", "exists and is not a directory"),
        ("file/out", "is not a directory"),
    ],
)
def test_a_place_where_nothing_can_be_made_exits_with_2(
    out: str, words: str, qc: Any, damaged: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("a file")
    status, err = qc("compile", damaged, *COMPILE, "--out", tmp_path / out, "--force")
    assert status == 2
    assert words in err
    assert (tmp_path / "file").read_text() == "a file"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model"]


@pytest.mark.parametrize("model", ["nowhere", "empty", "file"])
def test_a_model_that_is_not_there_exits_with_2(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("{}")
    assert main(["plan", str(tmp_path / model), "--passes", "linear_quant"]) == 2
    assert model in capsys.readouterr().err


def test_a_layer_and_a_directory_that_are_not_there(
    home: Callable[[str], Home], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = home("llama-128").program
    monkeypatch.setattr("qc.compiler.capture.capture", lambda path, **options: program)
    last = len(program.blocks) - 1
    assert main(["show", "model", "--layer", str(last)]) == 0
    assert f"model.layers.{last}" in capsys.readouterr().out
    for layer in ("-1", str(last + 1)):
        assert main(["show", "model", "--layer", layer]) == 2
        assert f"layers 0 to {last}" in capsys.readouterr().err
    assert main(["generate", "nowhere", "hello"]) == 2  # at once: the hub is not asked for a plain name
    assert "nowhere: no such directory" in capsys.readouterr().err
