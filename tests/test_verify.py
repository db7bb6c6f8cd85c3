"""``qc verify``: every way in which an output may be spoiled is found, and an unspoiled one passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qc.compiler.cli import main
from qc.compiler.errors import Refused
from qc.compiler.export import MANIFEST, RUN, digests
from qc.compiler.journal import FILE as JOURNAL
from qc.compiler.verify import verify
from tests.homes import Home, compiled, homes

DESCRIPTION = "quant_model_description.json"
ROTATED = "model.layers.0.mlp.down_proj"
PLAIN = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return homes(tmp_path_factory)("llama-128")


@pytest.fixture(scope="module")
def good(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("good") / "out"
    compiled(
        home, out, "iter_smooth,quarot,online_rotation,linear_quant", scheme="w4a4", target="vllm-ascend"
    )
    return out


@pytest.fixture
def out(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "out"))


def wrong(out: Path) -> dict[str, str]:
    return {check.name: "\n".join(check.wrong) for check in verify(out) if check.wrong}


def weights(out: Path) -> Path:
    (file,) = out.glob("*.safetensors")
    return file


def sign(out: Path) -> None:
    """Let the manifest say that the files are as they are now."""
    files = {
        f.relative_to(out).as_posix(): f
        for f in out.rglob("*")
        if f.is_file() and f.name not in (MANIFEST, RUN)
    }
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["outputs"] = digests(files)
    (out / MANIFEST).write_text(json.dumps(manifest))


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def mutate(out: Path) -> None:
        found = load_file(weights(out))
        change(found)
        save_file(found, weights(out))
        index = out / "quant_model_weights.safetensors.index.json"
        if index.is_file():
            whole = json.loads(index.read_text())
            whole["weight_map"] = dict.fromkeys(found, weights(out).name)
            index.write_text(json.dumps(whole))

    return mutate


def put(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return tensors(lambda found: found.update({name: change(found[name]).contiguous()}))


def first(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


def float8(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float8_e4m3fn)


def described(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def mutate(out: Path) -> None:
        found = json.loads((out / DESCRIPTION).read_text())
        change(found)
        (out / DESCRIPTION).write_text(json.dumps(found))

    return mutate


def journal(change: Callable[[list[dict]], object]) -> Callable[[Path], None]:
    def mutate(out: Path) -> None:
        lines = [json.loads(line) for line in (out / JOURNAL).read_text().splitlines()]
        change(lines)
        (out / JOURNAL).write_text("\n".join(json.dumps(line) for line in lines))

    return mutate


def proof(**values: object) -> Callable[[Path], None]:
    return journal(lambda lines: next(e for e in lines if "certificate" in e)["certificate"].update(values))


def nowhere(lines: list[dict]) -> None:
    """One rewrite is in the journal of no part."""
    where = next(e["where"] for e in lines if e.get("pass") == "iter_smooth")
    lines[:] = [e for e in lines if (e.get("pass"), e.get("where")) != ("iter_smooth", where)]


SPOILED: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "an int4 of 8": (put(f"{PLAIN}.weight", first(8)), "values", "integers from"),
    "a scale of nan": (put(f"{PLAIN}.weight_scale", first(float("nan"))), "values", "not positive"),
    "a scale of 0": (put(f"{PLAIN}.weight_scale", first(0)), "values", "not positive"),
    "a negative scale": (put(f"{PLAIN}.weight_scale", first(-1)), "values", "not positive"),
    "an infinite scale": (put(f"{PLAIN}.weight_scale", first(float("inf"))), "values", "not positive"),
    "an offset": (put(f"{PLAIN}.weight_offset", first(0.5)), "values", "whole numbers"),
    "a stretched rotation": (put(f"{ROTATED}.left_trans", lambda t: t * 1.1), "values", "not orthogonal"),
    "a rotation with a lost row": (put(f"{ROTATED}.right_trans", first(0)), "values", "not orthogonal"),
    "a clip ratio above 1": (put(f"{ROTATED}.clip_ratio", first(1.5)), "values", "clip ratio"),
    "a norm of nan": (put("model.norm.weight", first(float("nan"))), "values", "not finite"),
    "an infinite embedding": (put("model.embed_tokens.weight", first(float("inf"))), "values", "not finite"),
    "a lost tensor": (tensors(lambda t: t.pop("model.norm.weight")), "tensors", "in no file"),
    "a lost scale": (tensors(lambda t: t.pop(f"{PLAIN}.weight_scale")), "tensors", "is missing"),
    "a tensor too many": (
        tensors(lambda t: t.update({"more.weight": torch.ones(2)})), "tensors", "has no type",
    ),
    "scales of half the size": (put(f"{PLAIN}.weight_scale", lambda t: t[:8]), "tensors", "needs"),
    "scales in bfloat16": (put(f"{PLAIN}.weight_scale", lambda t: t.bfloat16()), "tensors", "needs"),
    "a weight in int32": (put(f"{PLAIN}.weight", lambda t: t.int()), "tensors", "needs"),
    "a weight without numbers": (put(f"{PLAIN}.weight", lambda t: t[:0]), "tensors", "needs"),
    "a scale in float8": (put(f"{PLAIN}.weight_scale", float8), "tensors", "needs"),
    "a norm of nan in float8": (
        put("model.norm.weight", lambda t: float8(first(float("nan"))(t))), "values", "1 of 64 numbers",
    ),
    "a factor without rows": (put(f"{ROTATED}.left_trans", lambda t: t[:0]), "tensors", "square matrix"),
    "a factor of one number": (put(f"{ROTATED}.right_trans", lambda t: t[0, 0]), "tensors", "square matrix"),
    "a type that is a number": (described(lambda d: d.update({f"{PLAIN}.weight": 5})), "tensors", "the type 5"),
    "another type": (described(lambda d: d.update({f"{PLAIN}.weight": "W8A8"})), "tensors", "is missing"),
    "another type of a scale": (
        described(lambda d: d.update({f"{PLAIN}.weight_scale": "W8A8_DYNAMIC"})), "tensors", "its linear is",
    ),
    "a type that nobody knows": (described(lambda d: d.update({f"{PLAIN}.weight": "W3A3"})), "tensors", "W3A3"),
    "a tensor without a type": (described(lambda d: d.pop("model.norm.weight")), "tensors", "has no type"),
    "a float tensor that is none": (
        described(lambda d: d.update({"model.norm.weight": "W8A8"})), "tensors", "model.norm.weight",
    ),
    "no description": (lambda out: (out / DESCRIPTION).unlink(), "tensors", DESCRIPTION),
    "a certificate that failed": (proof(math=1e-3), "certificates", "no proof"),
    "a certificate of nan": (proof(math=float("nan")), "certificates", "no proof"),
    "a certificate on no rows": (proof(rows=0), "certificates", "no proof"),
    "no certificate": (
        journal(lambda lines: next(e for e in lines if "certificate" in e).pop("certificate")),
        "certificates", "no proof",
    ),
    "a rewrite that nobody did": (journal(nowhere), "certificates", "the plan has"),
    "a rewrite that nobody planned": (
        journal(lambda lines: lines.append(
            {"part": "model.layers.0", "pass": "fuse_norms", "where": "elsewhere", "claim": "EXACT",
             "certificate": {"math": 0.0, "stored": 0.0, "rows": 1}})),
        "certificates", "the plan has",
    ),
    "no journal": (lambda out: (out / JOURNAL).unlink(), "certificates", "cannot be read"),
    "a journal of numbers": (lambda out: (out / JOURNAL).write_text("5\n6"), "certificates", "cannot be read"),
    "edits that are numbers": (
        journal(lambda lines: next(e for e in lines if "edits" in e).update(edits=[1])), "certificates", "is none of",
    ),
    "no edits": (
        journal(lambda lines: next(e for e in lines if "edits" in e).update(edits=None)), "certificates", "is none of",
    ),
    "a pass that is no name": (
        journal(lambda lines: next(e for e in lines if "pass" in e).update({"pass": []})), "certificates", "is none of",
    ),
    "an error in words": (proof(math="small"), "certificates", "no proof"),
    "rewrites in words": (
        lambda out: (out / MANIFEST).write_text(
            json.dumps(json.loads((out / MANIFEST).read_text()) | {"rewrites": {"linear_quant": "all"}})
        ),
        "certificates", "how many rewrites",
    ),
    "a certificate of words": (
        journal(lambda lines: next(e for e in lines if "certificate" in e).update(certificate="yes")),
        "certificates", "no proof",
    ),
    "half a journal": (
        lambda out: (out / JOURNAL).write_text((out / JOURNAL).read_text()[:-9]), "certificates", "cannot be read",
    ),
}  # fmt: skip
"""How an output is spoiled, though its digests agree; the check that says so, and words that it says."""


def test_an_output_as_it_was_written_passes(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert wrong(good) == {}
    assert main(["verify", str(good)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["files", "tensors", "values", "certificates"]


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_spoiled_is_found_by_its_check(name: str, out: Path) -> None:
    mutate, check, words = SPOILED[name]
    mutate(out)
    sign(out)
    found = wrong(out)
    assert words in found.get(check, ""), found
    assert "files" not in found


@pytest.mark.parametrize(
    ("mutate", "words"),
    [
        (lambda out: weights(out).write_bytes(weights(out).read_bytes()[:-1] + b"\7"), "has changed"),
        (lambda out: (out / "qc_plan.txt").write_text("nothing"), "qc_plan.txt has changed"),
        (lambda out: (out / "config.json").unlink(), "config.json is missing"),
        (lambda out: (out / "extra.py").write_text("pass"), "extra.py is in no manifest"),
    ],
)
def test_files_are_compared_with_their_digests(mutate: Callable, words: str, out: Path) -> None:
    mutate(out)
    assert words in wrong(out)["files"]


def test_a_digest_that_is_none_is_found_without_a_crash(out: Path) -> None:
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["outputs"]["config.json"] = {"size": 1}
    (out / MANIFEST).write_text(json.dumps(manifest))
    assert "config.json has changed" in wrong(out)["files"]


def test_a_file_cut_short_is_found_without_a_crash(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights(out).write_bytes(weights(out).read_bytes()[:-100])
    assert main(["verify", str(out)]) == 1
    text = capsys.readouterr().out
    assert "files: 1 wrong" in text
    assert "tensors: 1 wrong" in text


def test_the_checkpoint_that_it_was_made_from(good: Path, home: Home, tmp_path: Path) -> None:
    same = {check.name: check for check in verify(good, home.path)}
    assert not same["inputs"].wrong
    assert "files of" in str(same["inputs"])
    other = Path(shutil.copytree(home.path, tmp_path / "other"))
    save_file({"another": torch.ones(1)}, other / "model.safetensors")
    assert "model.safetensors has changed" in str(verify(good, other)[1])
    assert "is missing" in str(verify(good, tmp_path)[1])
    with pytest.raises(Refused, match=r"--model .*nowhere: no such directory; give the checkpoint"):
        verify(good, tmp_path / "nowhere")


def test_the_size_of_the_files_is_in_units_that_fit(good: Path) -> None:
    size = sum(file.stat().st_size for file in good.rglob("*") if file.is_file())
    assert f" with {size / 1024:.0f} KiB, as they were written" in str(verify(good)[0])


def test_what_qc_did_not_write_is_refused(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, words in ((tmp_path / "nothing", "no such directory"), (home.path, MANIFEST)):
        assert main(["verify", str(path)]) == 2
        assert words in capsys.readouterr().err
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(Refused, match="cannot be read"):
        verify(tmp_path)


def test_the_answer_for_machines_is_one_json_value(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put("model.norm.weight", first(float("nan")))(out)
    assert main(["verify", str(out), "--json"]) == 1
    found = {check["name"]: check["wrong"] for check in json.loads(capsys.readouterr().out)}
    assert found["values"]
    assert not found["certificates"]
