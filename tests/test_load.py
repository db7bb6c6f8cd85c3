"""A checkpoint is loaded from its files alone, and what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import WORDS, read, rewrite, save_float, save_quantized
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.random_llama import character_tokenizer
from qc.compiler.errors import Refused
from qc.compiler.generate import generate
from qc.compiler.load import load, load_tokenizer
from qc.runtime.formats import FORMATS
from qc.runtime.linear import IntegerLinear
from qc.runtime.norm import RMSNormBias
from qc.runtime.w4a4 import W4A4FlatQuantDynamic

TOKENS = torch.arange(3, 15).reshape(2, 6)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def reference(path: Path, **options: Any) -> Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(path, **options).eval())


def error(y: Tensor, wanted: Tensor) -> float:
    return float((y.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma", "mistral"])
def test_a_float_checkpoint_is_what_transformers_loads(tmp_path: Path, family: str, tied: bool) -> None:
    path = save_float(tmp_path / "float", family, tie_word_embeddings=tied)
    model = load(path)
    assert not model.training
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert torch.equal(logits(model), reference(path))
    assert torch.equal(logits(load(path, dtype=torch.float32)), reference(path, dtype=torch.float32))


def test_a_float32_checkpoint_stays_float32(tmp_path: Path) -> None:
    path = save_float(tmp_path / "float", dtype=torch.float32)
    assert torch.equal(logits(load(path)), reference(path))
    assert logits(load(path)).dtype == torch.float32


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_format_loads_and_answers_like_the_float_model(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    source = save_float(tmp_path / "float", "qwen2", dtype)  # with biases at q, k and v
    model = load(save_quantized(source, tmp_path / "quantized", kind))
    linears = [m for m in model.modules() if isinstance(m, IntegerLinear)]
    assert len(linears) == 14
    assert {m.type for m in linears} == {kind}
    assert {m.dtype for m in linears} == {dtype}
    bound = 0.1 if "W4" not in kind else 0.7
    assert 0 < error(logits(model), reference(source)) < bound


def test_weight_only_is_the_model_with_dequantized_weights(tmp_path: Path) -> None:
    source = save_float(tmp_path / "float", "qwen3")
    quantized = save_quantized(source, tmp_path / "quantized", "W4A16", group=16)
    tensors, _ = read(quantized)
    plain = load_file(source / "model.safetensors")
    for name in plain:
        if scale := name.endswith("_proj.weight") and name + "_scale":
            plain[name] = (tensors[name] * tensors[scale].repeat_interleave(16, 1)).to(torch.float32)
    dequantized = shutil.copytree(source, tmp_path / "dequantized")
    save_file(plain, dequantized / "model.safetensors", metadata={"format": "pt"})
    wanted = reference(dequantized, dtype=torch.float32)
    assert error(logits(load(quantized, dtype=torch.float32)), wanted) < 1e-5


def test_formats_may_differ_from_linear_to_linear(tmp_path: Path) -> None:
    source = save_float(tmp_path / "float")
    kinds = {"down_proj": "W8A8_DYNAMIC", "o_proj": "W4A4_FLATQUANT_DYNAMIC"}
    quantized = save_quantized(source, tmp_path / "q", lambda name: kinds.get(name.split(".")[-2], "W8A16"))
    model = load(quantized)
    found = {n.split(".")[-1]: m.type for n, m in model.named_modules() if isinstance(m, IntegerLinear)}
    assert found == dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "W8A16") | kinds


def test_rotation_blocks_are_read_from_the_factors(tmp_path: Path) -> None:
    source = save_float(tmp_path / "float")
    quantized = save_quantized(source, tmp_path / "q", "W4A4_FLATQUANT_DYNAMIC", blocks=2)
    linears = [m for m in load(quantized).modules() if isinstance(m, W4A4FlatQuantDynamic)]
    assert {m.blocks for m in linears} == {2}
    assert {tuple(m.get_buffer("left_trans").shape) for m in linears} == {(4, 4), (8, 8)}


@pytest.mark.parametrize(("family", "offset"), [("llama", 0.0), ("gemma", 1.0)])
def test_a_norm_may_have_a_bias(tmp_path: Path, family: str, offset: float) -> None:
    source = save_float(tmp_path / "float", family, rms_norm_eps=3e-5)
    quantized = save_quantized(source, tmp_path / "q", "W8A16")
    tensors, description = read(quantized)
    before = logits(load(quantized))
    name = "model.layers.0.input_layernorm"
    for value in (0.0, 0.5):
        bias = {f"{name}.bias": torch.full((64,), value, dtype=torch.bfloat16)}
        rewrite(quantized, tensors | bias, description | dict.fromkeys(bias, "FLOAT"))
        model = load(quantized)
        norm = model.get_submodule(name)
        assert isinstance(norm, RMSNormBias)
        assert (norm.eps, norm.offset) == (pytest.approx(3e-5, rel=0.02), offset)
        assert torch.equal(logits(model), before) == (value == 0)


def test_a_float_linear_may_have_a_bias(tmp_path: Path) -> None:
    source = save_float(tmp_path / "float")
    path = save_quantized(source, tmp_path / "q", "W8A16")
    tensors, description = read(path)
    name = "model.layers.1.mlp.down_proj"
    for leaf in ("weight", "weight_scale", "weight_offset"):
        del tensors[f"{name}.{leaf}"], description[f"{name}.{leaf}"]
    tensors[f"{name}.weight"] = load_file(source / "model.safetensors")[f"{name}.weight"]
    tensors[f"{name}.bias"] = torch.full((64,), 0.25, dtype=torch.bfloat16)
    rewrite(path, tensors, description | dict.fromkeys((f"{name}.weight", f"{name}.bias"), "FLOAT"))
    module = load(path).get_submodule(name)
    assert isinstance(module, nn.Linear)
    assert module.bias.eq(0.25).all()


Damage = Callable[[dict[str, Tensor], dict[str, Any]], Any]
DOWN = "model.layers.0.mlp.down_proj"
DAMAGE: dict[str, Damage] = {
    r"down_proj\.weight_scale": lambda t, d: t.pop(f"{DOWN}.weight_scale"),
    "by the description, but its weight is in no file": lambda t, d: t.pop(f"{DOWN}.weight"),
    "no entry for .*down_proj.weight": lambda t, d: d.pop(f"{DOWN}.weight"),
    "type 'W3A3'; this runs W8A8,": lambda t, d: d.update({f"{DOWN}.weight": "W3A3"}),
    "1 tensors belong to no part .*svd_lowrank_l1": lambda t, d: t.update(
        {f"{DOWN}.svd_lowrank_l1": torch.eye(4)}
    ),
    "weight_scale is stored as torch.bfloat16; its type needs torch.float32": lambda t, d: t.update(
        {f"{DOWN}.weight_scale": t[f"{DOWN}.weight_scale"].bfloat16()}
    ),
    "weight is stored as torch.bfloat16; its type needs torch.int8": lambda t, d: t.update(
        {f"{DOWN}.weight": t[f"{DOWN}.weight"].bfloat16()}
    ),
    r"\[64, 64\], the model's is \[64, 128\]": lambda t, d: t.update(
        {f"{DOWN}.weight": t[f"{DOWN}.weight"][:, :64].clone()}
    ),
    "has the type 5": lambda t, d: d.update({f"{DOWN}.weight": 5}),
    "no linear of its own there": lambda t, d: d.update({"model.embed_tokens.weight": "W8A16"}),
    "is a bias, and the model has no place": lambda t, d: (
        t.update({"model.embed_tokens.bias": torch.zeros(64)}),
    ),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_what_does_not_fit_is_refused(tmp_path: Path, reason: str) -> None:
    path = save_quantized(save_float(tmp_path / "float"), tmp_path / "q", "W8A8_DYNAMIC")
    tensors, description = read(path)
    DAMAGE[reason](tensors, description)
    rewrite(path, tensors, description)
    with pytest.raises(Refused, match=reason):
        load(path)


def test_float_weights_are_no_integers_without_a_description(tmp_path: Path) -> None:
    path = save_quantized(save_float(tmp_path / "float"), tmp_path / "q", "W8A8_DYNAMIC")
    (path / "quant_model_description.json").unlink()
    with pytest.raises(Refused, match="quantized"):
        load(path)


def test_a_directory_without_a_model_or_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no such directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(Refused, match="no tokenizer that can be read"):
        load_tokenizer(tmp_path)


def greedy(path: Path, ids: list[int], count: int) -> list[int]:
    model, start = load(path), len(ids)
    while len(ids) < start + count:
        with torch.no_grad():
            ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == 2:
            break
    return ids[start:]


def words(ids: list[int]) -> str:
    return " ".join(WORDS[i] for i in ids if 2 < i < len(WORDS))


def test_generate_is_greedy(tmp_path: Path) -> None:
    path = save_float(tmp_path / "float", vocab_size=len(WORDS))
    prompt = [WORDS.index(word) for word in ("mat", "dog")]
    answer = generate(path, "mat dog", max_new_tokens=6)
    assert answer == words(greedy(path, prompt, 6))
    assert len(answer.split()) > 3


def test_generate_uses_the_chat_template(tmp_path: Path) -> None:
    path = save_float(tmp_path / "float", vocab_size=len(WORDS), chat=True)
    wrapped = [1, *(WORDS.index(word) for word in ("mat", "dog", "the"))]
    answers = [generate(path, "mat dog", max_new_tokens=6, chat=chat) for chat in (None, False)]
    assert answers == [words(greedy(path, ids, 6)) for ids in (wrapped, wrapped[1:3])]
    assert answers[0] != answers[1]


def test_generate_refuses(tmp_path: Path) -> None:
    path = save_float(tmp_path / "float")
    with pytest.raises(Refused, match="no chat template"):
        generate(path, "the cat", chat=True)
    with pytest.raises(Refused, match="prompt is empty"):
        generate(path, "")
    with pytest.raises(Refused, match="max_new_tokens=0"):
        generate(path, "the cat", max_new_tokens=0)


def test_generation_settings_come_from_the_files(tmp_path: Path) -> None:
    path = save_float(tmp_path / "float")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert load(path).generation_config.eos_token_id == [2, 7]  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize(
    "change", [{"num_key_value_heads": -1}, {"vocab_size": 0}, {"text_config": 5}, {"quantization_config": 5}]
)
def test_a_config_of_no_model_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = save_float(tmp_path / "float")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(Refused, match=str(path)):
        load(path)


@pytest.mark.parametrize("text", ["[]", '"greedy"', "{"])
def test_generation_settings_that_are_none_are_refused(text: str, tmp_path: Path) -> None:
    path = save_float(tmp_path / "float")
    (path / "generation_config.json").write_text(text)
    with pytest.raises(Refused, match=r"generation_config\.json cannot be read"):
        load(path)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["[]", '"words"', "{"])
def test_files_of_a_tokenizer_that_are_none_are_refused(file: str, text: str, tmp_path: Path) -> None:
    character_tokenizer().save_pretrained(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(Refused, match="no tokenizer that can be read"):
        load_tokenizer(tmp_path)
