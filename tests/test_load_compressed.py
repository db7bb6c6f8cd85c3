"""A checkpoint of compressed-tensors is loaded as its consumers load it, measured and spoken with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qc.compiler.capture import capture
from qc.compiler.cli import main
from qc.compiler.compile import Options, plan
from qc.compiler.errors import Refused
from qc.compiler.load import load
from qc.compiler.scheme import W4A16, W8A8, W8A16, Rule, Scheme
from qc.compiler.targets.compressed_tensors import EXPERTS
from qc.compiler.targets.verdict import verdict
from qc.compiler.verify import verify
from tests.families import gpt_oss
from tests.homes import Home, compiled, homes, logits
from tests.programs import relative
from tests.simulation import of_compressed_tensors, recorded, simulated

pytest.importorskip("compressed_tensors")
SAME = 4e-3
"""Float32 rounds to far less, but for an activation on the edge between two integers."""
SCHEMES = ("w8a8", "w8a8-static", "w8a8-static-symmetric", "w4a8", "w4a8-g64", "w8a16", "w4a16", "w4a16-g64")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Home]:
    return homes(tmp_path_factory)


@pytest.mark.parametrize(
    ("family", "scheme"), [("llama-128", scheme) for scheme in SCHEMES] + [("qwen2", s) for s in SCHEMES[:3]]
)
def test_it_computes_what_the_compiler_rounded(
    family: str, scheme: str, home: Callable[[str], Home], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = recorded(monkeypatch)
    passes = "iter_smooth{enable_subgraph_type=ov+up-down},linear_quant"
    result = compiled(home(family), tmp_path / "out", passes, scheme=scheme, target="compressed-tensors")
    got, want = logits(load(result.path, dtype=torch.float32)), simulated(result, held, of_compressed_tensors)
    assert relative(got, want) < SAME
    assert relative(want, logits(load(home(family).path, dtype=torch.float32))) > 3 * SAME
    theirs = AutoModelForCausalLM.from_pretrained(result.path)
    assert torch.equal(logits(load(result.path)), logits(theirs.eval()))
    assert [check.wrong for check in verify(result.path)] == [()] * 4


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([], "must map names to groups"),
        ({"group_0": {"targets": 5}}, "must map names to groups"),
        ({"group_0": {"targets": ["re:("]}}, "must map names to groups"),
        (
            {"group_0": {"targets": ["re:.*"], "weights": {"type": "int", "num_bits": "four"}}},
            "does not write",
        ),
    ],
)
def test_verify_tells_of_groups_that_are_none(
    groups: Any, words: str, home: Callable[[str], Home], tmp_path: Path
) -> None:
    passes = "linear_quant"
    out = compiled(
        home("llama-128"), tmp_path / "out", passes, scheme="w8a8", target="compressed-tensors", samples=2
    ).path
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["config_groups"] = groups
    (out / "config.json").write_text(json.dumps(config))
    assert words in "\n".join(next(check for check in verify(out) if check.name == "tensors").wrong)


MIXED = Scheme("mixed", (Rule(include=("*.experts.*",), scheme=W4A16), Rule(scheme=W8A8)))


@pytest.mark.parametrize(
    ("family", "scheme"), [("mixtral", "w4a16"), ("qwen3_moe", "w8a16"), ("qwen3_moe", MIXED)]
)
def test_experts_load_from_packed_integers(
    family: str, scheme: Any, home: Callable[[str], Home], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = recorded(monkeypatch)
    out = tmp_path / "out"
    result = compiled(home(family), out, "linear_quant", scheme=scheme, target="compressed-tensors")
    got = logits(load(out, dtype=torch.float32))
    assert relative(got, simulated(result, held, of_compressed_tensors)) < SAME
    assert relative(got, logits(load(home(family).path, dtype=torch.float32))) > 2 * SAME
    assert [check.wrong for check in verify(out)] == [()] * 4
    assert verdict(out, "compressed-tensors").findings == ()
    block = json.loads((out / "config.json").read_text())["quantization_config"]
    targets = [target for group in block["config_groups"].values() for target in group["targets"]]
    assert [target for target in targets if "experts" in target] == [EXPERTS]
    (file,) = out.glob("*.safetensors")
    tensors = load_file(file)
    del tensors[next(name for name in tensors if ".experts.1." in name and name.endswith("weight_scale"))]
    save_file(tensors, file)
    file.rename(out / "model.safetensors")
    (out / "model.safetensors.index.json").unlink()
    assert [finding.rule for finding in verdict(out, "compressed-tensors").findings] == ["C3"]


@pytest.mark.parametrize(
    ("family", "passes", "scheme", "words"),
    [
        ("mixtral", "linear_quant", "w8a8", "W8A8: transformers loads experts with float activations alone"),
        (
            "mixtral",
            "linear_quant{exclude=*experts*}",
            "w8a8",
            "does not load float experts beside quantized",
        ),
        (
            "mixtral",
            "linear_quant{exclude=*experts.0.*}",
            "w4a16",
            "does not load float experts beside quant",
        ),
        (
            "qwen3_moe",
            "linear_quant",
            Scheme("two", (Rule(include=("*.experts.1.*",), scheme=W8A16), Rule(scheme=W4A16))),
            "W8A16 beside experts of W4A16",
        ),
        ("gpt_oss", "linear_quant", "w4a16", "lies in a stack with other experts on disk"),
    ],
)
def test_experts_that_transformers_does_not_load_are_refused_in_the_plan(
    family: str, passes: str, scheme: Any, words: str, home: Callable[[str], Home], tmp_path: Path
) -> None:
    if family == "gpt_oss":
        gpt_oss(tmp_path)
    program = capture(tmp_path, certify=False) if family == "gpt_oss" else home(family).program
    found = plan(program, passes, Options(scheme=scheme, target="compressed-tensors")).problems
    assert any(words in problem and "--target transformers" in problem for problem in found), found


@pytest.fixture
def out(home: Callable[[str], Home], tmp_path: Path) -> Path:
    return compiled(
        home("llama-128"), tmp_path / "out", "linear_quant", scheme="w4a16", target="compressed-tensors"
    ).path


def test_the_commands_take_it(
    out: Path, home: Callable[[str], Home], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = home("llama-128")
    assert main(["verify", str(out), "--target", "compressed-tensors"]) == 0
    assert main(["verify", str(out)]) == 0
    common = ["eval", str(out), "--reference", str(place.path), "--text", str(place.text), "--length", "24"]
    capsys.readouterr()
    assert main([*common, "--json", "--by", "layer"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["kl"] > 0
    assert len(found["layers"]) == len(place.program.blocks)
    assert captured.err == ""
    assert main(["generate", str(out), "the quick", "--max-new-tokens", "4"]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert captured.err == ""


DAMAGE: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "down_proj.weight_scale is in no file": lambda t: t.pop("model.layers.0.mlp.down_proj.weight_scale"),
    "down_proj.weight_offset belongs to no part": lambda t: t.update(
        {"model.layers.0.mlp.down_proj.weight_offset": torch.zeros(1)}
    ),
    "does not load it": lambda t: t.update({"model.layers.0.mlp.down_proj.weight_scale": torch.ones(3, 1)}),
}


@pytest.mark.parametrize("told", DAMAGE)
def test_what_transformers_would_go_on_with_is_refused(told: str, out: Path) -> None:
    (file,) = out.glob("*.safetensors")
    for index in out.glob("*.index.json"):
        index.unlink()
    tensors = load_file(file)
    file.unlink()
    DAMAGE[told](tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Refused, match=told):
        load(out)


DOWN = "model.layers.0.mlp.down_proj"
WRONG: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    f"{DOWN}.weight_scale: 1 of 64 scales are not positive": lambda t: t[f"{DOWN}.weight_scale"][0].neg_(),
    f"{DOWN}.weight_packed is int32[64, 16], W4A16 needs int32[64, 8]": lambda t: t.update(
        {f"{DOWN}.weight_shape": torch.tensor([64, 64])}
    ),
    f"{DOWN} has no weight of two axes": lambda t: t.pop(f"{DOWN}.weight_shape"),
    "model.embed_tokens has integers and is in no group": lambda t: t.update(
        {"model.embed_tokens.weight_scale": torch.ones(96, 1)}
    ),
}


@pytest.mark.parametrize("told", WRONG)
def test_verify_finds_what_does_not_fit(told: str, out: Path) -> None:
    (file,) = out.glob("*.safetensors")
    tensors = load_file(file)
    WRONG[told](tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    (index,) = out.glob("*.index.json")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, file.name)}))
    found = [wrong for check in verify(out) for wrong in check.wrong]
    assert any(wrong.startswith(told) for wrong in found), found


def test_a_block_that_the_library_does_not_take_is_refused(out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = "many"
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refused, match="does not load it"):
        load(out)


def test_without_the_library_it_says_what_to_install(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qc.compiler.compressed_library.find_spec", lambda name: None)
    with pytest.raises(Refused, match=r"pip install 'qc\[compressed-tensors\]'"):
        load(out)


def test_other_methods_are_refused(out: Path) -> None:
    config: dict[str, Any] = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refused, match="quant_method awq; qc loads qc and compressed-tensors"):
        load(out)
