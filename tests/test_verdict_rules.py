"""Rules of ``qc verify --target`` beside the corpus: files, ties, mixtures, releases, and what is refused outright."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qc.compiler.cli import main
from qc.compiler.errors import Failed, Refused
from qc.compiler.targets.spelled import target_named
from qc.compiler.targets.target import Finding
from qc.compiler.targets.verdict import Verdict, verdict
from qc.compiler.targets.vllm_ascend import VllmAscend
from tests.checkpoints import read, rewrite, save_float, save_quantized
from tests.homes import compiled, homes

WEIGHTS = "quant_model_weights.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with tied embeddings, all of it W8A8_DYNAMIC."""
    source = save_float(tmp_path_factory.mktemp("float"), head_dim=32, tie_word_embeddings=True)
    return save_quantized(source, tmp_path_factory.mktemp("good") / "out", "W8A8_DYNAMIC")


@pytest.fixture
def out(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "out"))


def rules(found: Verdict) -> set[tuple[str, str]]:
    return {(one.outcome, one.rule) for one in found.findings}


def change(out: Path, tensors: dict[str, Any], description: dict[str, Any]) -> None:
    found, described = read(out)
    rewrite(out, found | tensors, described | description)


def test_a_tensor_in_two_files_is_ruined(out: Path) -> None:
    save_file({"model.norm.weight": torch.zeros(64).bfloat16()}, out / "z.safetensors")
    assert rules(verdict(out, "vllm-ascend")) == {("ruins", "A2")}


@pytest.mark.parametrize(
    ("tp", "where"),
    [(1, set()), (2, set()), (4, set()), (3, {"config.json", "down_proj"}), (8, {"config.json"})],
)
def test_ranks_over_which_nothing_can_be_dealt_out_are_refused(tp: int, where: set[str], out: Path) -> None:
    """Four heads, 128 channels of the MLP: three ranks divide neither."""
    found = verdict(out, "vllm-ascend", tp)
    told = {f.tensor.rpartition(".layers.0.mlp.")[2] for f in found.findings if "layers.1" not in f.tensor}
    assert where <= told
    assert found.word == ("refuses" if where else "loads")
    assert {f.rule for f in found.findings} <= {"A10"}


def test_a_stale_index_is_refused(out: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    found = verdict(out, "vllm-ascend")
    assert found.word == "refuses"
    assert ("refuses", "A2") in rules(found)


@pytest.mark.parametrize(("factor", "word"), [(1, "loads"), (2, "ruins")])
def test_a_tied_head_of_its_own_is_dropped(factor: int, word: str, out: Path) -> None:
    table = read(out)[0]["model.embed_tokens.weight"]
    change(out, {"lm_head.weight": (table * factor).contiguous()}, {"lm_head.weight": "FLOAT"})
    found = verdict(out, "vllm-ascend")
    assert found.word == word
    assert {one.rule for one in found.findings} == {"A7"}


def test_a_norm_bias_without_a_key_is_skipped(out: Path) -> None:
    change(out, {"model.norm.bias": torch.ones(64).bfloat16()}, {})
    assert ("ruins", "A12") in rules(verdict(out, "vllm-ascend"))


def test_a_name_that_begins_a_float_one_is_taken_for_float(out: Path) -> None:
    change(out, {}, {"model.layers.0.mlp.down_proj_extra.weight": "FLOAT"})
    assert ("refuses", "A14") in rules(verdict(out, "vllm-ascend"))


def test_embeddings_need_an_entry_in_0_18_alone(out: Path) -> None:
    found, described = read(out)
    del described["model.embed_tokens.weight"]
    rewrite(out, found, described)
    words = {version: verdict(out, f"vllm-ascend=={version}").word for version in ("0.18", "0.23", "main")}
    assert words == {"0.18": "refuses", "0.23": "loads", "main": "loads"}


def test_cache_offsets_are_taken_off_by_0_18_alone(out: Path) -> None:
    key, other = (f"model.layers.0.self_attn.{one}_proj.kv_cache" for one in "kv")
    change(
        out,
        {f"{key}_scale": torch.ones(64), f"{other}_scale": torch.ones(64), f"{key}_offset": torch.ones(64)},
        {f"{key}_scale": "C8", f"{key}_offset": "C8", "kv_cache_type": "C8"},
    )
    words = {version: verdict(out, f"vllm-ascend=={version}").word for version in ("0.18", "0.23", "main")}
    assert words == {"0.18": "loads", "0.23": "ruins", "main": "ruins"}


def test_a_cache_needs_the_scales_of_keys_and_of_values(out: Path) -> None:
    key = "model.layers.0.self_attn.k_proj.kv_cache_scale"
    change(out, {key: torch.ones(64)}, {key: "C8", "kv_cache_type": "C8"})
    found = verdict(out, "vllm-ascend")
    assert [(f.outcome, f.rule, f.tensor) for f in found.findings if f.outcome != "warns"] == [
        ("refuses", "A11", key.replace("k_proj", "v_proj"))
    ]


@pytest.mark.parametrize("leaf", ["weight", "weight_scale", "weight_offset"])
@pytest.mark.parametrize("change_of", [lambda t: t[:0], lambda t: t.reshape(-1)[0]])
def test_a_tensor_without_numbers_or_axes_is_told_by_its_shape(leaf: str, change_of: Any, out: Path) -> None:
    name = f"model.layers.0.mlp.down_proj.{leaf}"
    change(out, {name: change_of(read(out)[0][name]).contiguous()}, {})
    assert ("refuses", "A5") in rules(verdict(out, "vllm-ascend"))


def test_w4a8_linears_are_per_group_until_0_23_and_gone_since(out: Path) -> None:
    change(out, {}, {"model.layers.0.mlp.down_proj.weight": "W4A8_DYNAMIC", "group_size": 0})
    told = {
        version: [
            f.message for f in verdict(out, f"vllm-ascend=={version}").findings if f.outcome == "refuses"
        ]
        for version in ("0.18", "0.23", "main")
    }
    assert "ZeroDivisionError" in told["0.18"][0]
    assert "ZeroDivisionError" in told["0.23"][0]
    assert "NotImplementedError" in told["main"][0]


def test_experts_share_the_type_of_the_first(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    home = homes(tmp_path_factory)("mixtral")
    compiled(home, tmp_path / "out", "linear_quant", scheme="w8a8", samples=2)
    out = tmp_path / "out"
    assert verdict(out, "vllm-ascend").word == "loads"
    file = out / "quant_model_description.json"
    description = json.loads(file.read_text())
    (name,) = [key for key in description if "layers.0" in key and "experts.3." in key and "w2.weight" in key
               and key.endswith("weight")]  # fmt: skip
    file.write_text(json.dumps(description | {name: "FLOAT"}))
    assert [(f.outcome, f.rule) for f in verdict(out, "vllm-ascend").findings] == [("ruins", "A4")]
    first = name.replace("experts.3.", "experts.0.")
    file.write_text(json.dumps(description | {first: "FLOAT"}))
    assert rules(verdict(out, "vllm-ascend")) == {("refuses", "A4")}


def test_a_float_checkpoint_is_served_as_one(tmp_path: Path) -> None:
    found = verdict(save_float(tmp_path / "model"), "vllm-ascend")
    assert (found.word, rules(found)) == ("loads", {("warns", "A1")})


def test_a_compile_whose_files_the_target_would_not_take_fails(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = (Finding("ruins", "A9", "x.weight", "nonsense"),)
    monkeypatch.setattr(VllmAscend, "judge", lambda *args, **rest: wrong)
    with pytest.raises(Failed, match=r"x\.weight: nonsense"):
        compiled(homes(tmp_path_factory)("llama"), tmp_path / "out", "linear_quant", scheme="w8a8", samples=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        ("vllm-ascend==0.24", "there are rules for 0.18, 0.23, main"),
        ("vllm-ascend[A7]", "A2, A3|did you mean A"),
        ("vllm-ascend[310P]==0.18", "linears of its own"),
        ("modelslim==26", "has no versions"),
        ("vllm-ascend=0.18", "NAME==VERSION"),
        ("vllm-asend", "did you mean vllm-ascend"),
    ],
)
def test_unknown_targets_are_refused(spelling: str, words: str) -> None:
    with pytest.raises(Refused, match=words):
        target_named(spelling)


def test_what_is_no_checkpoint_is_refused(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (out / WEIGHTS).write_bytes((out / WEIGHTS).read_bytes()[:100])
    cases = {"nowhere": "no such directory", "empty": "no config.json", "out": "truncated shard"}
    for name, words in cases.items():
        assert main(["verify", str(tmp_path / name), "--target", "vllm-ascend"]) == 2
        assert words in capsys.readouterr().err
    assert main(["verify", str(out), "--tp", "2"]) == 2
    assert "--target" in capsys.readouterr().err


def test_the_command_says_rule_and_tensor(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(out / WEIGHTS)
    for layer in (0, 1):
        del tensors[f"model.layers.{layer}.mlp.down_proj.weight_scale"]
    save_file(tensors, out / WEIGHTS)
    assert main(["verify", str(out), "--target", "vllm-ascend[A3]==0.18"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "vllm-ascend[A3]==0.18, tp 1: the server would load it and silently ruin it"
    assert "A5   model.layers.0.mlp.down_proj.weight_scale and 1 more alike:" in said[1]
    assert main(["verify", str(out), "--target", "vllm-ascend", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], len(found["findings"])) == ("ruins", 2)
