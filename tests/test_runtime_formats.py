"""Integer linears: what they store, what they compute, what they refuse to pack."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linears import BF16, FP16, IN, OUT, module, quantized, randn
from torch import Tensor, nn

from qc.compiler.scheme import Int
from qc.passes.weight_scale import weight_grid
from qc.runtime.formats import FORMATS, format_of
from qc.runtime.hadamard import random_hadamard
from qc.runtime.kronecker import rotate
from qc.runtime.linear import IntegerLinear
from qc.runtime.norm import RMSNormBias
from qc.runtime.quantize import (
    fake_quant_per_tensor,
    fake_quant_per_token,
    quantize,
    quantize_per_tensor,
)
from qc.runtime.quantized import QuantizedLinear
from qc.runtime.w4a4 import W4A4Dynamic, W4A4FlatQuantDynamic
from qc.runtime.w4a8 import SHARES, W4A8Dynamic, pack_pairs, unpack_pairs
from qc.runtime.w8a8 import W8A8, W8A8Dynamic, W8A8DynamicTensor
from qc.runtime.w8a8_mix import W8A8Mix
from qc.runtime.weight_only import W4A16, W8A16


def error(y: Tensor, wanted: Tensor) -> float:
    return float((y.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("cls", FORMATS.values(), ids=list(FORMATS))
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_module_holds_what_is_packed(cls: type[IntegerLinear], dtype: torch.dtype, bias: bool) -> None:
    packed = cls.pack(quantized(cls, randn(OUT, IN), dtype=dtype, bias=bias), dtype)
    built = cls(IN, OUT, bias="bias" in packed, dtype=dtype, device="meta")
    state = built.state_dict()
    assert {n: (t.dtype, t.shape) for n, t in state.items()} == {
        n: (t.dtype, t.shape) for n, t in packed.items()
    }
    assert {n: (t.dtype, tuple(t.shape)) for n, t in packed.items()} == built.tensors("bias" in packed)
    assert ("bias" in packed) == (bias and cls is not W8A8)


BOUND = {
    "W8A8": 0.02,
    "W8A8_DYNAMIC": 0.015,
    "W8A8_DYNAMIC_TENSOR": 0.02,
    "W8A8_MIX": 0.015,
    "W8A16": 0.01,
    "W4A16": 0.15,
    "W4A8_DYNAMIC": 0.15,
    "W4A4_DYNAMIC": 0.2,
    "W4A4_FLATQUANT_DYNAMIC": 0.2,
}


@pytest.mark.parametrize("cls", FORMATS.values(), ids=list(FORMATS))
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_module_is_near_the_float_linear(cls: type[IntegerLinear], dtype: torch.dtype) -> None:
    weight = randn(OUT, IN)
    q = quantized(cls, weight, dtype=dtype, bias=True)
    x = randn(2, 9, IN, seed=1).to(dtype)
    assert q.bias is not None
    y = module(cls, cls.pack(q, dtype), dtype)(x)
    assert y.dtype == dtype
    assert y.shape == (2, 9, OUT)
    assert error(y, x.double() @ weight.double().T + q.bias.double()) < BOUND[cls.type]


@given(st.integers(0, 100), st.sampled_from([W8A8Dynamic, W4A4Dynamic, W4A8Dynamic]))
def test_dynamic_arithmetic_is_exact(seed: int, cls: type[IntegerLinear]) -> None:
    q = quantized(cls, randn(OUT, IN, seed=seed))
    x = randn(5, IN, seed=seed + 1)
    top = 2 ** ((cls.act_bits or 0) - 1) - 1
    step = x.abs().amax(-1, keepdim=True) / top
    integers = (x / step).round()
    wanted = ((integers.double() @ q.weight.double().T).float() * q.scale.T) * step
    y = module(cls, cls.pack(q, BF16))(x)
    assert torch.equal(y, wanted.half().float() if cls is W4A4Dynamic else wanted)


def test_static_arithmetic_uses_the_reciprocal_in_the_models_dtype() -> None:
    q = replace(quantized(W8A8, randn(OUT, IN)), input_scale=torch.tensor([0.03]).bfloat16().float())
    x = randn(5, IN, seed=3).bfloat16()
    packed = W8A8.pack(q, BF16)
    assert q.input_offset is not None
    reciprocal = (1 / packed["input_scale"]).float()
    integers = (x.float() * reciprocal + q.input_offset).round().clamp(-128, 127)
    wanted = (integers.double() @ q.weight.double().T + packed["quant_bias"]) * packed["deq_scale"].double()
    assert torch.equal(module(W8A8, packed)(x), wanted.bfloat16())


def test_a_mix_is_the_dynamic_linear_in_prefill_and_the_static_one_in_decode() -> None:
    q, x = quantized(W8A8Mix, randn(OUT, IN), bias=True), randn(5, IN, seed=3).bfloat16()
    mix, dynamic = (
        module(cls, cls.pack(replace(q, **change), BF16))
        for cls, change in ((W8A8Mix, {}), (W8A8Dynamic, {"input_scale": None, "input_offset": None}))
    )
    static = module(W8A8, W8A8.pack(q, BF16))
    assert torch.equal(mix(x), dynamic(x))
    assert isinstance(mix, W8A8Mix)
    mix.decode = True
    assert torch.equal(mix(x), static(x))


def test_worked_static_values() -> None:
    q = QuantizedLinear(
        torch.tensor([[10, -20, 30]], dtype=torch.int8),
        torch.tensor([[0.005]]),
        bias=torch.tensor([0.1]),
        input_scale=torch.tensor([0.02]),
        input_offset=torch.tensor([-10.0]),
    )
    packed = W8A8.pack(q, torch.float32)
    assert packed["quant_bias"].tolist() == [1200]
    assert packed["deq_scale"].item() == pytest.approx(1e-4)


@pytest.mark.parametrize(("scale", "bits"), [(0.00123, 983644148), (0.5, 1056964608), (0.0001, 953267991)])
def test_deq_scale_of_a_half_model_is_the_bit_pattern(scale: float, bits: int) -> None:
    q = QuantizedLinear(
        torch.ones(1, 4, dtype=torch.int8),
        torch.tensor([[scale]]),
        input_scale=torch.ones(1),
        input_offset=torch.zeros(1),
    )
    packed = W8A8.pack(q, FP16)
    assert packed["deq_scale"].dtype == torch.int64
    assert packed["deq_scale"].tolist() == [bits]


@pytest.mark.parametrize("cls", [W8A16, W4A16])
@pytest.mark.parametrize("group", [0, 16])
def test_weight_only_is_the_dequantized_linear(cls: type[IntegerLinear], group: int) -> None:
    q = quantized(cls, randn(OUT, IN), group=group)
    x = randn(3, IN, seed=4)
    dequantized = q.weight.double() * q.scale.double().repeat_interleave(IN // q.scale.shape[1], 1)
    y = module(cls, cls.pack(q, BF16), group_size=group)(x)
    assert error(y, x.double() @ dequantized.T) < 1e-6


def test_weight_only_adds_a_stored_offset() -> None:
    packed = W8A16.pack(quantized(W8A16, randn(OUT, IN)), BF16)
    shifted = packed | {"weight_offset": torch.full((OUT, 1), 2.0)}
    x = randn(3, IN, seed=4)
    wanted = x.double() @ ((packed["weight"].double() + 2) * packed["weight_scale"].double()).T
    assert error(module(W8A16, shifted)(x), wanted) < 1e-6


@pytest.mark.parametrize("cls", [W8A8Dynamic, W4A4Dynamic])
def test_groups_of_the_dynamic_formats(cls: type[IntegerLinear]) -> None:
    weight, x = randn(OUT, IN), randn(3, IN, seed=4)
    grouped = module(cls, cls.pack(quantized(cls, weight, group=8), BF16), group_size=8)(x)
    plain = module(cls, cls.pack(quantized(cls, weight), BF16))(x)
    wanted = x @ weight.T
    assert error(grouped, wanted) < error(plain, wanted) < 0.2


def test_flatquant_rotates_with_the_stored_factors() -> None:
    weight, x = randn(OUT, IN), randn(5, IN, seed=2)
    q = quantized(W4A4FlatQuantDynamic, weight)
    assert q.left is not None
    assert q.right is not None
    turned = rotate(x, q.left, q.right)
    inner = module(W4A4Dynamic, W4A4Dynamic.pack(replace(q, left=None, right=None), BF16))
    y = module(W4A4FlatQuantDynamic, W4A4FlatQuantDynamic.pack(q, BF16))(x)
    torch.testing.assert_close(y, inner(turned), rtol=1e-3, atol=1e-3)


def test_flatquant_blocks_are_ranks_side_by_side() -> None:
    weight, x = randn(OUT, 2 * IN), randn(5, 2 * IN, seed=2)
    q = quantized(W4A4FlatQuantDynamic, weight)
    whole = module(W4A4FlatQuantDynamic, W4A4FlatQuantDynamic.pack(q, BF16), blocks=2)
    ranks = [
        module(W4A4FlatQuantDynamic, W4A4FlatQuantDynamic.pack(replace(q, weight=part), BF16))
        for part in q.weight.split(IN, 1)
    ]
    wanted = sum(rank(part) for rank, part in zip(ranks, x.split(IN, 1), strict=True))
    torch.testing.assert_close(whole(x), wanted)


def test_clip_reaches_the_activation() -> None:
    q = quantized(W4A4FlatQuantDynamic, randn(OUT, IN))
    x = randn(5, IN, seed=2)
    full, cut = (
        module(W4A4FlatQuantDynamic, W4A4FlatQuantDynamic.pack(replace(q, clip=c), BF16))(x)
        for c in (1.0, 0.5)
    )
    assert error(cut, full) > 0.05


def test_int4_output_passes_through_float16() -> None:
    q = quantized(W4A4Dynamic, torch.ones(1, IN))
    y = module(W4A4Dynamic, W4A4Dynamic.pack(q, BF16))(torch.full((1, IN), 2000.0, dtype=BF16))
    assert y.isinf().all()


def test_a_token_of_zeros_gives_the_bias() -> None:
    for cls in FORMATS.values():
        q = quantized(cls, randn(OUT, IN), bias=True)
        y = module(cls, cls.pack(q, BF16))(torch.zeros(1, IN, dtype=BF16))
        assert q.bias is not None
        torch.testing.assert_close(y[0], q.bias, rtol=0.01, atol=0.02, msg=cls.type)


def test_worked_packed_values() -> None:
    packed = pack_pairs(torch.tensor([[3, -2], [-8, 7]], dtype=torch.int8))
    assert packed.tolist() == [[-125, 126]]  # 0x83, 0x7E
    assert unpack_pairs(packed).tolist() == [[3, -2], [-8, 7]]


@given(st.integers(0, 100), st.booleans())
def test_pairs_and_sums_are_those_of_the_weight(seed: int, row_parallel: bool) -> None:
    q = quantized(W4A8Dynamic, randn(OUT, IN, seed=seed))
    packed = W4A8Dynamic.pack(q, BF16, row_parallel)
    assert torch.equal(unpack_pairs(packed["weight"]), q.weight)
    parts = (q.weight.double() * q.scale.double()).chunk(SHARES if row_parallel else 1, dim=1)
    wanted = 8 * torch.stack([part.sum(1) for part in parts], dim=1)
    torch.testing.assert_close(packed["scale_bias"], wanted.float())
    built = module(W4A8Dynamic, packed, row_parallel=row_parallel)
    assert torch.equal(built(randn(3, IN)), module(W4A8Dynamic, W4A8Dynamic.pack(q, BF16))(randn(3, IN)))


REFUSED: dict[str, tuple[type[IntegerLinear], dict[str, Any]]] = {
    "integers lie outside -8..7": (W4A16, {"weight": torch.full((OUT, IN), 8, dtype=torch.int8)}),
    "the weight must be int8": (W8A16, {"weight": torch.zeros(OUT, IN)}),
    "finite and above zero": (W8A16, {"scale": torch.zeros(OUT, 1)}),
    r"the scale must be \[24, groups\]": (W8A16, {"scale": torch.ones(OUT)}),
    "5 scales per channel do not fit": (W8A16, {"scale": torch.ones(OUT, 5)}),
    "2 scales per channel do not fit": (W8A8, {"scale": torch.ones(OUT, 2)}),
    "round the scales to torch.bfloat16": (W8A8Dynamic, {"scale": torch.full((OUT, 1), 0.1)}),
    "an input scale and offset are needed": (W8A8, {"input_scale": None}),
    "round the input scale": (W8A8, {"input_scale": torch.tensor([0.1])}),
    "is not an int8": (W8A8, {"input_offset": torch.tensor([0.5])}),
    "a bias is too large": (W8A8, {"bias": torch.full((OUT,), 1e9)}),
    "no place for an input scale": (W8A8Dynamic, {"input_scale": torch.ones(1)}),
    "a left and a right factor are needed": (W4A4FlatQuantDynamic, {"left": None}),
    "no place for an online rotation": (W4A4Dynamic, {"left": torch.eye(8)}),
    "no place for a clip ratio": (W4A4Dynamic, {"clip": 0.5}),
    r"clip ratio 1.5 is not in \(0, 1\]": (W4A4FlatQuantDynamic, {"clip": 1.5}),
    "outputs go in pairs": (W4A8Dynamic, {"weight": torch.zeros(3, IN).char(), "scale": torch.ones(3, 1)}),
    "round the factors": (W4A4FlatQuantDynamic, {"left": random_hadamard(8, 1) * 1.01}),
    r"factors of \(4, 16\), but the server splits into \(8, 8\)": (
        W4A4FlatQuantDynamic,
        {"left": torch.eye(4, dtype=BF16), "right": torch.eye(16, dtype=BF16)},
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_packing_refuses(reason: str) -> None:
    cls, change = REFUSED[reason]
    with pytest.raises(ValueError, match=f"{cls.type}: .*{reason}"):
        cls.pack(replace(quantized(cls, randn(OUT, IN)), **change), BF16)


def test_construction_refuses() -> None:
    with pytest.raises(ValueError, match="group of 48 does not divide 64"):
        W8A16(64, 8, group_size=48)
    with pytest.raises(ValueError, match=r"W8A8: .*not possible"):
        W8A8(64, 8, group_size=16)
    with pytest.raises(ValueError, match="100 cannot carry"):
        W4A4FlatQuantDynamic(100, 8)
    with pytest.raises(ValueError, match="in pairs, and there are 7"):
        W4A8Dynamic(64, 7)
    with pytest.raises(ValueError, match="24 inputs are not 16 equal"):
        W4A8Dynamic(24, 8, row_parallel=True)
    with pytest.raises(ValueError, match="3 equal blocks"):
        W4A4FlatQuantDynamic(64, 8, blocks=3)


def test_format_of() -> None:
    assert format_of(8, 8, "tensor", False) is W8A8
    assert format_of(8, 8, "token", False) is W8A8Dynamic
    assert format_of(8, 8, "mix", False) is W8A8Mix
    assert format_of(8, 8, "dynamic-tensor", False) is W8A8DynamicTensor
    assert format_of(8, None, None, False) is W8A16
    assert format_of(4, None, None, False) is W4A16
    assert format_of(4, 8, "token", False) is W4A8Dynamic
    assert format_of(4, 4, "token", False) is W4A4Dynamic
    assert format_of(4, 4, "token", True) is W4A4FlatQuantDynamic
    with pytest.raises(ValueError, match="int8 weights, int8 activations, per token, online rotation"):
        format_of(8, 8, "token", True)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm_with_bias(offset: float) -> None:
    norm = RMSNormBias(16, eps=1e-5, offset=offset, dtype=torch.float32)
    x = randn(3, 16)
    plain = nn.RMSNorm(16, eps=1e-5)
    torch.testing.assert_close(norm(x), plain(x))
    norm.load_state_dict({"weight": torch.full((16,), 2.0), "bias": torch.full((16,), 3.0)})
    torch.testing.assert_close(norm(x), plain(x) * (2 + offset) + 3)


@pytest.mark.parametrize("kind", [W8A8Dynamic, W8A8DynamicTensor, W4A4Dynamic])
@pytest.mark.parametrize("group", [0, 16])
def test_offsets_of_weights_are_taken_off_exactly(kind: type[IntegerLinear], group: int) -> None:
    weight, x = randn(24, 64) + 1.5, randn(7, 64)
    per = Int(kind.weight_bits, "group" if group else "channel", group=group, symmetric=False)
    scale, offset = weight_grid(weight, per, torch.float32)
    assert offset is not None
    q = QuantizedLinear(quantize(weight, scale, per.bits, offset), scale, offset=offset)
    module = kind(64, 24, dtype=torch.float32, group_size=group)
    module.load_state_dict(kind.pack(q, torch.float32))
    grid = fake_quant_per_tensor if kind is W8A8DynamicTensor else fake_quant_per_token
    torch.testing.assert_close(module(x), grid(x, kind.act_bits or 0) @ q.dense.T, rtol=2e-3, atol=2e-3)


def test_a_scale_of_a_whole_call_is_that_of_its_largest_value() -> None:
    x = torch.cat([randn(3, 64), 100 * randn(1, 64, seed=1)])
    integers, scale = quantize_per_tensor(x, 8)
    assert float(scale) == pytest.approx(float(x.abs().max()) / 127)
    assert int(integers.abs().max()) == 127
    assert int(integers[:3].abs().max()) < 5
    assert quantize_per_tensor(x[:0], 8)[0].shape == (0, 64)
