"""compressed-tensors, mindie and numpy: what is written is what their readers compute with."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import qc.hf
from qc.compiler.cli import main
from qc.compiler.compile import Options, plan
from qc.compiler.errors import Refused
from qc.compiler.export import MANIFEST
from qc.compiler.load import load
from qc.compiler.recipe import read_recipe
from qc.compiler.recipe_yaml import recipe_yaml
from qc.compiler.targets.verdict import verdict
from qc.compiler.verify import verify
from tests.homes import Home, compiled, homes, logits, tensors_of
from tests.programs import captured

PASSES = "iter_smooth{enable_subgraph_type=ov+up-down},linear_quant"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return homes(tmp_path_factory)("llama-128")


class Simulated(nn.Module):
    """A linear on qc's integers, with the activation on the library's grid: int8 per token, steps of absmax / 127.5."""

    def __init__(self, weight: Tensor, bits: int | None) -> None:
        super().__init__()
        self.weight, self.bits = weight, bits

    def forward(self, x: Tensor) -> Tensor:
        if self.bits is not None:
            step = x.abs().amax(-1, keepdim=True) / 127.5
            x = (x / step).round().clamp(-128, 127) * step
        return x @ self.weight.T


def simulated(out: Path, tensors: dict[str, Tensor], bits: int | None) -> nn.Module:
    """The float model in float32 with every quantized linear run on its integers, read without the library."""
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    model = AutoModelForCausalLM.from_config(
        type(AutoModelForCausalLM.from_pretrained(out).config).from_dict(config), dtype=torch.float32
    ).eval()
    plain = {k: v.float() for k, v in tensors.items() if k in model.state_dict() and v.is_floating_point()}
    model.load_state_dict(plain, strict=False)
    for name in [key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")]:
        scale = tensors[f"{name}.weight_scale"].float()
        if f"{name}.weight_packed" in tensors:
            words = tensors[f"{name}.weight_packed"].to(torch.int64).unsqueeze(-1)
            integers = (((words >> (4 * torch.arange(8))) & 15) - 8).flatten(1)
        else:
            integers = tensors[f"{name}.weight"]
        groups = scale.shape[1]
        weight = (integers.float().unflatten(1, (groups, -1)) * scale.unsqueeze(-1)).flatten(1)
        model.set_submodule(name, Simulated(weight, bits))
    return model


@pytest.mark.parametrize(("scheme", "bits"), [("w8a8", 8), ("w4a8", 8), ("w4a16", None), ("w4a16-g64", None)])
def test_transformers_computes_what_qc_wrote(
    scheme: str, bits: int | None, home: Home, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    compiled(home, tmp_path / "out", PASSES, scheme=scheme, target="compressed-tensors")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ours = logits(simulated(tmp_path / "out", tensors_of(tmp_path / "out"), bits))
    found = logits(theirs)
    error = float((found - ours).norm() / ours.norm())
    floats = logits(AutoModelForCausalLM.from_pretrained(home.path, dtype=torch.float32).eval())
    lost = float((floats - ours).norm() / ours.norm())
    assert error < 4e-3, "bfloat16 rounds to this"
    assert error < lost / 3, "and the integers are there"
    assert verdict(tmp_path / "out", "compressed-tensors").word == "loads"


def test_what_transformers_would_make_up_is_told(home: Home, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    out = tmp_path / "out"
    compiled(home, out, "linear_quant", scheme="w8a8", target="compressed-tensors", samples=2)
    (file,) = out.glob("*.safetensors")
    tensors = load_file(file)
    name = "model.layers.0.mlp.down_proj.weight_scale"
    del tensors[name]
    save_file(tensors, file)
    for index in out.glob("*.index.json"):
        index.unlink()
    file.rename(out / "model.safetensors")
    found = verdict(out, "compressed-tensors")
    assert found.word == "ruins"
    assert [(one.rule, one.tensor) for one in found.findings] == [("C3", name)]


def test_what_transformers_does_with_files_is_told(home: Home, tmp_path: Path) -> None:
    """Files that it does not look for, integers under a float name, scales and shapes that cannot be."""
    pytest.importorskip("compressed_tensors")
    made = compiled(
        home, tmp_path / "made", "linear_quant", scheme="w8a8-static", target="compressed-tensors"
    ).path

    def told(
        change: Callable[[dict[str, Tensor]], object], made: Path = made, stem: str = "model"
    ) -> list[Any]:
        out = Path(shutil.copytree(made, tmp_path / "changed"))
        (file,) = out.glob("*.safetensors")
        tensors = load_file(file)
        change(tensors)
        for old in (file, *out.glob("*.index.json")):
            old.unlink()
        save_file(tensors, out / f"{stem}.safetensors")
        if stem == "model":
            save_file({"model.norm.weight": torch.zeros(1)}, out / "unread.safetensors")
        found = verdict(out, "compressed-tensors")
        shutil.rmtree(out)
        return [(one.outcome, one.rule, one.tensor) for one in found.findings if one.outcome != "warns"]

    norm, up = "model.norm.weight", "model.layers.0.mlp.up_proj"
    assert told(lambda t: None) == []
    assert told(lambda t: None, stem="quant_model_weights") == [
        ("refuses", "C1", "quant_model_weights.safetensors")
    ]
    assert told(lambda t: t.update({norm: (9 * t[norm]).to(torch.int8)})) == [("ruins", "C4", norm)]
    assert told(lambda t: t.update({f"{up}.weight_scale": 0 * t[f"{up}.weight_scale"]})) == [
        ("ruins", "C6", f"{up}.weight_scale")
    ]
    assert told(lambda t: t.pop(f"{up}.input_zero_point")) == [("ruins", "C3", f"{up}.input_zero_point")]
    packed = compiled(
        home, tmp_path / "packed", "linear_quant", scheme="w4a16", target="compressed-tensors"
    ).path
    shape = f"{up}.weight_shape"
    assert told(lambda t: t.update({shape: torch.tensor([128, 7])}), packed) == [("refuses", "C4", shape)]


def test_a_packed_weight_that_says_another_width_is_refused(home: Home, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    out = compiled(
        home, tmp_path / "out", "linear_quant", scheme="w4a16-g64", target="compressed-tensors"
    ).path
    (file,) = out.glob("*.safetensors")
    shape = "model.layers.0.mlp.up_proj.weight_shape"
    save_file(load_file(file) | {shape: torch.tensor([128, 7])}, file)
    with pytest.raises(Refused, match="transformers does not load it"):
        load(out)


def test_without_the_library_the_plan_says_what_to_install(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qc.compiler.compressed_library.find_spec", lambda name: None)
    found = plan(home.program, "linear_quant", Options(scheme="w8a8", target="compressed-tensors"))
    assert any("pip install 'qc[compressed-tensors]'" in problem for problem in found.problems)
    with pytest.raises(Refused, match="pip install"):
        verdict(home.path, "compressed-tensors")


@pytest.mark.parametrize(
    ("passes", "scheme", "words"),
    [
        ("linear_quant", "w4a4", "is not among what is written"),
        ("linear_quant", "w4a16-asym", "is not among what is written"),
        ("online_rotation,linear_quant", "w8a8", "has no place"),
        ("linear_quant,dynamic_cache", "w8a8", "not written for this target"),
    ],
)
def test_the_plan_refuses_what_compressed_tensors_cannot_say(
    passes: str, scheme: str, words: str, home: Home
) -> None:
    found = plan(home.program, passes, Options(scheme=scheme, target="compressed-tensors"))
    assert any(words in problem for problem in found.problems), found.problems


@pytest.mark.parametrize(("scheme", "kind"), [("w8a8", "w8a8_dynamic"), ("w8a8-static", "w8a8")])
def test_mindie_has_its_own_file_names(scheme: str, kind: str, home: Home, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compiled(home, out, PASSES, scheme=scheme, target="mindie")
    description = json.loads((out / f"quant_model_description_{kind}.json").read_text())
    tensors = load_file(out / f"quant_model_weight_{kind}.safetensors")
    assert set(tensors) == {
        name for name, value in description.items() if "." in name and isinstance(value, str)
    }
    assert description["model_quant_type"] == kind.upper()
    assert verdict(out, "mindie").word == "loads"
    assert verdict(out, "modelslim").word == "refuses", "other readers look for other names"
    plain = compiled(home, tmp_path / "plain", PASSES, scheme=scheme, target="modelslim").path
    assert torch.equal(logits(load(out)), logits(load(plain)))
    theirs = AutoModelForCausalLM.from_pretrained(out, quantization_config=qc.hf.Config())
    assert torch.equal(logits(theirs), logits(load(plain)))
    assert [check.wrong for check in verify(out)] == [()] * 4


def test_mindie_takes_w8a8_alone(home: Home) -> None:
    found = plan(home.program, "linear_quant", Options(scheme="w4a16", target="mindie"))
    assert any("the saver of MindIE" in problem for problem in found.problems)


def test_numpy_holds_the_same_numbers_as_the_safetensors(home: Home, tmp_path: Path) -> None:
    passes = "iter_smooth{enable_subgraph_type=norm-linear},linear_quant"
    compiled(home, tmp_path / "npy", passes, scheme="w8a8-static", target="numpy")
    compiled(home, tmp_path / "st", passes, scheme="w8a8-static", target="modelslim")
    assert not list((tmp_path / "npy").glob("*.safetensors*"))
    tensors = tensors_of(tmp_path / "st")
    read: dict[str, dict[str, Any]] = {
        file.stem: np.load(file, allow_pickle=True).item() for file in (tmp_path / "npy").glob("*.npy")
    }
    assert set(read) == {
        "quant_weight",
        "deq_scale",
        "input_scale",
        "input_offset",
        "quant_bias",
        "anti_fp_norm",
    }
    for kind, leaf in {"quant_weight": "weight"}.items() | {
        (k, k) for k in set(read) - {"quant_weight", "anti_fp_norm"}
    }:
        assert len(read[kind]) == 21
        for module, array in read[kind].items():
            assert np.array_equal(array, tensors[f"{module}.{leaf}"].to(torch.float64).numpy()), (
                kind,
                module,
            )
    for name, array in read["anti_fp_norm"].items():
        assert np.array_equal(array, tensors[name].float().numpy())
    with pytest.raises(Refused, match="written and never read"):
        verdict(tmp_path / "npy", "numpy")
    with pytest.raises(Refused, match=r"qc writes them and never reads them. Compile for --target modelslim"):
        load(tmp_path / "npy")
    checks = {check.name: check for check in verify(tmp_path / "npy")}
    assert not [check for check in checks.values() if check.wrong]
    assert checks["tensors"].looked_at.startswith("not looked at")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("compressed-tensors", 'AutoModelForCausalLM.from_pretrained("OUT")\n'),
        ("numpy", 'numpy.load("OUT/quant_weight.npy"'),
        ("mindie", 'from_pretrained("OUT", quantization_config=qc.hf.Config())'),
    ],
)
def test_the_card_says_how_to_read_it(target: str, words: str, home: Home, tmp_path: Path) -> None:
    out = compiled(home, tmp_path / "out", "linear_quant", scheme="w8a8", target=target).path
    assert words in (out / "README.md").read_text()


def test_the_command_on_the_card_makes_the_same_output(home: Home, tmp_path: Path) -> None:
    out = compiled(
        home,
        tmp_path / "out",
        "iter_smooth,linear_quant",
        scheme="w8a8",
        target="vllm-ascend[A3]==0.18",
        samples=3,
    ).path
    card = (out / "README.md").read_text()
    command = next(line.strip("`") for line in card.splitlines() if line.startswith("`qc compile"))
    places = {"MODEL": str(home.path), "OUT": str(tmp_path / "again"), home.text.name: str(home.text)}
    assert main([places.get(word, word) for word in shlex.split(command)[1:]]) == 0
    first, second = (json.loads((path / MANIFEST).read_text()) for path in (out, tmp_path / "again"))
    assert first["outputs"] == second["outputs"]
    assert json.dumps(command)[1:-1] in (out / "report.html").read_text()


def test_numpy_refuses_rewritten_floats(home: Home) -> None:
    found = plan(home.program, "quarot,linear_quant", Options(scheme="w8a8", target="numpy"))
    assert any("embed_tokens" in p and "have no place" in p for p in found.problems), found.problems


@pytest.mark.parametrize(
    ("family", "passes", "scheme", "words"),
    [
        ("llama-128", "quarot_online,linear_quant", "w4a4", "an online rotation"),
        ("llama-128", "svd_res,linear_quant", "w8a8", "leave svd_res out"),
        ("gpt2", "iter_smooth{enable_subgraph_type=non-fusion},linear_quant", "w8a8", "a division"),
        ("llama-128", "iter_smooth{symmetric=false},linear_quant", "w8a8", "changes its bias"),
        ("llama-128", "iter_smooth{symmetric=false},linear_quant", "w8a8-static", ""),
        ("qwen2", "iter_smooth{enable_subgraph_type=ov},linear_quant", "w8a8", "changes its bias"),
        ("qwen2", "iter_smooth{enable_subgraph_type=ov},linear_quant", "w8a8-static", ""),
        ("qwen2", "iter_smooth{enable_subgraph_type=norm-linear},linear_quant", "w8a8", ""),
    ],
)
def test_numpy_refuses_what_stands_beside_integers(family: str, passes: str, scheme: str, words: str) -> None:
    """None of it is in a dictionary: whoever reads them would compute with the float model's, or with nothing."""
    found = plan(captured(family), passes, Options(scheme=scheme, target="numpy")).problems
    assert any(words in problem for problem in found) if words else not found, found


RECIPE = """apiversion: modelslim_v1
spec:
  process:
    - type: linear_quant
      qconfig:
        weight: {scope: per_channel, dtype: int8, symmetric: true, method: minmax}
        act: {scope: per_token, dtype: int8, symmetric: true, method: minmax}
  save: [{type: SAVER, part_file_size: 2}]
"""


@pytest.mark.parametrize(
    ("saver", "target"), [("mindie_format_saver", "mindie"), ("compressed_tensors", "compressed-tensors")]
)
def test_recipes_ask_for_targets_by_their_savers(
    saver: str, target: str, home: Home, written: Callable[[str], Path]
) -> None:
    recipe = read_recipe(written(RECIPE.replace("SAVER", saver)))
    assert (recipe.target, recipe.part_file_size) == (target, 2)
    planned = plan(home.program, recipe)
    assert planned.target.spelling == target
    again = read_recipe(written(recipe_yaml(planned)))
    assert again.target == target
