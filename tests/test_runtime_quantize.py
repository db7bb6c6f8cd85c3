"""The arithmetic of quantization: worked values, round trips, rows of zeros."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qc.runtime.int_matmul import int_matmul
from qc.runtime.quantize import (
    EPS,
    dequantize,
    fake_quant_per_token,
    quantize,
    quantize_per_token,
    round_scale,
    scale_for,
    scale_offset_for,
)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_worked_symmetric_values() -> None:
    scale = scale_for(torch.tensor([1.0]), 8)
    assert scale.item() == pytest.approx(1 / 127)
    assert quantize(torch.tensor([1.0, 0.5, 0.25]), scale, 8).tolist() == [127, 64, 32]


def test_worked_asymmetric_values() -> None:
    scale, offset = scale_offset_for(torch.tensor([-0.5]), torch.tensor([1.5]), 8, torch.float32)
    assert scale.item() == pytest.approx(2 / 255)
    assert offset.item() == -64
    x = torch.tensor([0.0, 1.5, -0.5])
    assert quantize(x, scale, 8, offset).tolist() == [-64, 127, -128]
    assert dequantize(quantize(x, scale, 8, offset), scale, offset)[0] == 0


def test_worked_int4_row_with_a_rounded_scale() -> None:
    row = torch.tensor([[0.7, -1.4, 0.2, 1.05]])
    scale = round_scale(scale_for(row.abs().amax(1, keepdim=True), 4), torch.bfloat16)
    assert scale.item() == 0.2001953125
    assert quantize(row, scale, 4).tolist() == [[3, -7, 1, 5]]


def test_rounding_is_half_to_even_and_clamps() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 400.0, -400.0])
    assert quantize(x, torch.tensor(1.0), 8).tolist() == [0, 2, 2, 0, -2, 127, -128]


def test_input_is_left_alone() -> None:
    x = torch.tensor([0.4, 0.6])
    quantize(x, torch.tensor(1.0), 8)
    fake_quant_per_token(x, 8)
    assert x.tolist() == pytest.approx([0.4, 0.6])


def test_groups_scale_their_own_channels() -> None:
    w = randn(3, 8)
    scale = scale_for(w.abs().unflatten(1, (2, 4)).amax(-1), 4)
    grouped = quantize(w, scale, 4)
    halves = [quantize(w[:, i : i + 4], scale[:, i // 4 : i // 4 + 1], 4) for i in (0, 4)]
    assert torch.equal(grouped, torch.cat(halves, 1))
    assert (dequantize(grouped, scale) - w).abs().max() <= scale.max() / 2 + 1e-6
    with pytest.raises(ValueError, match="3 groups do not divide 8"):
        quantize(w, torch.ones(3, 3), 4)


@given(st.integers(0, 1000), st.sampled_from([4, 8]), st.floats(-30, 30))
def test_per_token_error_is_half_a_step(seed: int, bits: int, exponent: float) -> None:
    x = randn(4, 16, seed=seed) * 2.0**exponent
    integers, scale = quantize_per_token(x, bits)
    assert integers.abs().amax(-1).eq(2 ** (bits - 1) - 1).all()  # the row's maximum is on the grid's edge
    assert ((integers * scale - x).abs() <= scale * 0.5001).all()
    assert torch.equal(fake_quant_per_token(x, bits), integers * scale)


def test_clip_cuts_the_range() -> None:
    x = torch.tensor([[1.0, 0.5]])
    integers, scale = quantize_per_token(x, 4, clip=0.5)
    assert scale.item() == pytest.approx(0.5 / 7)
    assert integers.tolist() == [[7, 7]]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_of_zeros_stays_zero(bits: int) -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    integers, scale = quantize_per_token(x, bits)
    assert scale[0].item() == pytest.approx(EPS)
    assert integers[0].tolist() == [0, 0]
    assert fake_quant_per_token(x, bits).isfinite().all()
    assert fake_quant_per_token(torch.full((1, 4), 1e-44), bits).isfinite().all()


def test_a_scale_rounds_to_its_dtype_and_never_to_zero() -> None:
    scale = round_scale(torch.tensor([0.1234567, 1e-12, EPS]), torch.float16)
    assert torch.equal(scale, scale.half().float())
    assert (scale > 0).all()
    assert round_scale(torch.tensor(0.1234567), torch.float32).item() == pytest.approx(0.1234567, rel=1e-7)


@given(st.integers(1, 40), st.sampled_from([1, 7, 64, 1025, 3000]), st.integers(1, 33))
def test_int_matmul_is_exact(rows: int, width: int, out: int) -> None:
    generator = torch.Generator().manual_seed(rows * out)
    x, w = (torch.randint(-128, 128, (n, width), generator=generator).to(torch.int8) for n in (rows, out))
    assert torch.equal(int_matmul(x, w), (x.double() @ w.double().T).to(torch.int32))


def test_int_matmul_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qc.runtime.int_matmul.int_mm_is_fast_and_exact", lambda: False)
    x = torch.full((2, 3000), -128, dtype=torch.int8)
    assert torch.equal(int_matmul(x, x), torch.full((2, 2), 3000 * 128 * 128, dtype=torch.int32))
    assert int_matmul(x[:0], x).shape == (0, 2)
    with pytest.raises(ValueError, match="overflow"):
        int_matmul(torch.zeros(1, 2**17, dtype=torch.int8), torch.zeros(1, 2**17, dtype=torch.int8))
