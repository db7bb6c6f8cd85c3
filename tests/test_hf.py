"""``from_pretrained`` of transformers loads what qc wrote, and ``save_pretrained`` writes it back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import read, rewrite, save_float, save_quantized
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import qc.hf
from qc.compiler.description import block_of, described
from qc.compiler.errors import Refused
from qc.compiler.load import load
from qc.compiler.targets.verdict import verdict
from qc.runtime.formats import FORMATS
from qc.runtime.linear import IntegerLinear

TOKENS = torch.arange(3, 15).reshape(2, 6)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def from_pretrained(path: Path, config: bool = False, **options: Any) -> Any:
    more = {"quantization_config": qc.hf.Config()} if config else {}
    return AutoModelForCausalLM.from_pretrained(path, **more, **options)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_format_is_what_qc_loads_and_goes_round(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    source = save_float(tmp_path / "float", "qwen2", dtype)  # with biases at q, k and v
    path = save_quantized(source, tmp_path / "q", kind)
    wanted = logits(load(path))
    model = from_pretrained(path, config=True)
    assert {m.type for m in model.modules() if isinstance(m, IntegerLinear)} == {kind}
    assert torch.equal(logits(model), wanted)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    assert torch.equal(logits(from_pretrained(tmp_path / "saved")), wanted)
    assert torch.equal(logits(load(tmp_path / "saved")), wanted)
    assert verdict(tmp_path / "saved", "transformers").word == "loads"
    before, _ = read(path)
    after = load_file(tmp_path / "saved" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


LOST: dict[str, tuple[Any, str]] = {
    "nothing": (lambda t: None, "loads"),
    "a norm": (lambda t: t.pop("model.norm.weight"), "refuses"),
    "half a norm": (lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:8].clone()}), "refuses"),
    "its place": (lambda t: t.update({"model.more.weight": torch.ones(2)}), "refuses"),
    "a scale": (lambda t: t.pop("model.layers.0.mlp.up_proj.weight_scale"), "refuses"),
    "its dtype": (
        lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"].to(torch.int8)}),
        "refuses",
    ),
}


@pytest.mark.parametrize("what", LOST)
def test_the_verdict_is_what_from_pretrained_does(what: str, tmp_path: Path) -> None:
    change, word = LOST[what]
    from_pretrained(
        save_quantized(save_float(tmp_path / "float"), tmp_path / "q", "W8A8_DYNAMIC"), config=True
    ).save_pretrained(tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    assert verdict(tmp_path / "out", "transformers").word == word
    if word == "loads":
        from_pretrained(tmp_path / "out")
    else:
        with pytest.raises(Refused):
            from_pretrained(tmp_path / "out")


def test_without_a_block_integers_are_read_as_floats(tmp_path: Path) -> None:
    source = save_float(tmp_path / "float")
    assert verdict(source, "transformers").word == "loads"
    path = save_quantized(source, tmp_path / "q", "W8A8_DYNAMIC")
    assert verdict(path, "modelslim").word == "loads"
    assert verdict(path, "transformers").word == "ruins"
    (path / "config.json").write_text(
        json.dumps(
            json.loads((path / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
        )
    )
    assert verdict(path, "transformers").word == "refuses"


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
def test_families(tmp_path: Path, family: str, tied: bool) -> None:
    source = save_float(tmp_path / "float", family, tie_word_embeddings=tied)
    path = save_quantized(source, tmp_path / "q", "W8A8_DYNAMIC")
    model = from_pretrained(path, config=True)
    assert torch.equal(logits(model), logits(load(path)))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(from_pretrained(tmp_path / "saved")), logits(load(path)))


def test_floats_may_run_wider_and_still_go_round(tmp_path: Path) -> None:
    path = save_quantized(save_float(tmp_path / "float"), tmp_path / "q", "W8A8")
    model = from_pretrained(path, config=True, dtype=torch.float32)
    wanted = logits(load(path, dtype=torch.float32))
    assert wanted.dtype == torch.float32
    assert torch.equal(logits(model), wanted)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(from_pretrained(tmp_path / "saved")), wanted)


@pytest.mark.parametrize("kind", ["W8A8_DYNAMIC", "W8A8", "W4A4_DYNAMIC", "W8A16"])
def test_a_cache_of_keys_and_values_changes_nothing(tmp_path: Path, kind: str) -> None:
    path = save_quantized(save_float(tmp_path / "float", dtype=torch.float16), tmp_path / "q", kind)
    model = from_pretrained(path, config=True, dtype=torch.float32)
    ids = TOKENS[:1]
    answer = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
        output_logits=True, return_dict_in_generate=True, eos_token_id=None,
    )  # fmt: skip
    assert answer.past_key_values.get_seq_length() == ids.shape[1] + 5
    with torch.no_grad():
        whole = model(input_ids=answer.sequences, use_cache=False).logits[0, ids.shape[1] - 1 : -1]
    stepwise = torch.cat(answer.logits)
    # a value beside the middle of two steps of a grid may fall to the other side in another order of sums
    near = (stepwise - whole).norm() / whole.norm()
    assert near < 0.02
    assert torch.equal(stepwise.argmax(-1), answer.sequences[0, ids.shape[1] :])


def test_the_config_names_what_is_not_float(tmp_path: Path) -> None:
    kinds = {"down_proj": "W8A8_DYNAMIC", "o_proj": "FLOAT"}
    source = save_float(tmp_path / "float")
    path = save_quantized(source, tmp_path / "q", "W8A16")
    tensors, description = read(path)
    plain = load_file(source / "model.safetensors")
    for name in list(tensors):
        module, _, leaf = name.rpartition(".")
        kind = kinds.get(module.split(".")[-1])
        if kind == "FLOAT":
            del tensors[name], description[name]
            if leaf == "weight":
                tensors[name], description[name] = plain[name], "FLOAT"
    rewrite(path, tensors, description)
    model = from_pretrained(path, config=True)
    model.save_pretrained(tmp_path / "saved")
    block = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert block["quant_method"] == "qc"
    assert block["dtype"] == "bfloat16"
    assert list(block["modules"]) == ["W8A16"]
    assert "model.layers.{0,1}.self_attn.q_proj" in block["modules"]["W8A16"]
    assert not any("o_proj" in name for name in block["modules"]["W8A16"])
    names = [name for name in description if "." in name]
    assert described(block, names) == {n: description[n] for n in names}
    assert block_of(description, "bfloat16")["modules"] == block["modules"]


def test_a_copy_of_a_model_saves_itself(tmp_path: Path) -> None:
    path = save_quantized(save_float(tmp_path / "float"), tmp_path / "q", "W8A8_DYNAMIC")
    (path / "README.md").write_text("the card\n")
    model = from_pretrained(path, config=True)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_input_embeddings().weight.zero_()
    other.save_pretrained(tmp_path / "other")
    model.save_pretrained(tmp_path / "saved")
    assert not load_file(tmp_path / "other" / "model.safetensors")["model.embed_tokens.weight"].any()
    assert load_file(tmp_path / "saved" / "model.safetensors")["model.embed_tokens.weight"].any()
    for folder in ("other", "saved"):
        assert (tmp_path / folder / "README.md").read_text() == "the card\n"


def test_importing_twice_registers_once() -> None:
    from qc.compiler.load_hf import Quantizer, register

    register()
    assert qc.hf.Quantizer is Quantizer


def test_what_qc_did_not_write_is_refused(tmp_path: Path) -> None:
    path = save_float(tmp_path / "float")
    with pytest.raises(Refused, match=r"not a checkpoint that qc wrote.*make one with qc compile"):
        from_pretrained(path, config=True)
    quantized = save_quantized(path, tmp_path / "q", "W8A8_DYNAMIC")
    with pytest.raises(Refused, match="a quantized model is made from its files"):
        LlamaForCausalLM.from_pretrained(
            None, config=load(path).config, state_dict={}, quantization_config=qc.hf.Config()
        )
    tensors, description = read(quantized)
    down = "model.layers.0.mlp.down_proj"
    rewrite(quantized, tensors, description | {f"{down}.weight": "W3A3"})
    with pytest.raises(Refused, match="type 'W3A3'; this runs W8A8,"):
        from_pretrained(quantized, config=True)
    rewrite(quantized, {n: t for n, t in tensors.items() if n != f"{down}.weight_scale"}, description)
    with pytest.raises(Refused, match=r"down_proj\.weight_scale"):
        from_pretrained(quantized, config=True)
    narrowed = tensors | {f"{down}.weight_scale": tensors[f"{down}.weight_scale"].bfloat16()}
    rewrite(quantized, narrowed, description)
    with pytest.raises(Refused, match=r"stored as torch\.bfloat16; its type needs torch\.float32"):
        from_pretrained(quantized, config=True)


@pytest.mark.parametrize("dtype", ["bf17", "nn", 16])
def test_a_block_names_a_dtype(tmp_path: Path, dtype: Any) -> None:
    quantized = save_quantized(save_float(tmp_path / "float"), tmp_path / "q", "W8A8_DYNAMIC")
    with pytest.raises(Refused, match=f"says the dtype {dtype!r}, and torch has none"):
        from_pretrained(quantized, quantization_config=qc.hf.Config(dtype=dtype))


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ({"modules": ["W8A8"]}, "modules must map types to lists of names"),
        ({"modules": {"W8A8": ["a.{0..9999999}.b"]}}, "more than 1048576 names"),
        ({"tensors": {"C8": [3]}}, "tensors must map types to lists of names"),
    ],
)
def test_a_block_that_is_not_ours_is_refused(block: dict[str, Any], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        described(block, [])
