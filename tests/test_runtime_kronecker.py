"""Kronecker-factored rotation: the server's split, and a fold that cancels what is stored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qc.runtime.hadamard import random_hadamard, random_orthogonal
from qc.runtime.kronecker import fold, rotate, split


@pytest.mark.parametrize(
    ("width", "factors"),
    [
        (25600, (160, 160)),
        (12288, (96, 128)),
        (17408, (128, 136)),
        (27648, (144, 192)),
        (11008, (86, 128)),
        (14336, (112, 128)),
        (4096, (64, 64)),
        (1536, (32, 48)),
        (896, (28, 32)),
        (576, (24, 24)),
    ],
)
def test_split_is_the_servers(width: int, factors: tuple[int, int]) -> None:
    assert split(width) == factors


@pytest.mark.parametrize(
    ("width", "reason"),
    [
        (4864, "64 x 76.*76 to be a multiple of 8"),
        (18944, "128 x 148.*148 to be a multiple of 8"),
        (131072, "256 x 512.*at most 256"),
        (100, "not a multiple of 8"),
        (0, "not a multiple of 8"),
    ],
)
def test_split_refuses_what_the_kernel_cannot_run(width: int, reason: str) -> None:
    with pytest.raises(ValueError, match=f"width {width} .*{reason}"):
        split(width)


@given(st.integers(1, 1000))
def test_split_is_the_nearest_pair_of_one_parity(eighths: int) -> None:
    width = 8 * eighths
    pairs = [(a, width // a) for a in range(1, int(width**0.5) + 1) if width % a == 0]
    a, b = max(p for p in pairs if sum(p) % 2 == 0)
    if b % 8 == 0 and b <= 256:
        assert split(width) == (a, b)
    else:
        with pytest.raises(ValueError, match=f"width {width} "):
            split(width)


@given(st.sampled_from([(24, 24, 1), (4, 8, 1), (4, 8, 3)]), st.sampled_from([torch.bfloat16, torch.float16]))
def test_fold_cancels_the_stored_factors(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    a, b, n = sizes
    generator = torch.Generator().manual_seed(0)
    left, right = random_hadamard(a, 1).to(dtype), random_orthogonal(b, 2).to(dtype)
    x = torch.randn(5, n * a * b, generator=generator, dtype=torch.float64)
    weight = torch.randn(7, n * a * b, generator=generator, dtype=torch.float64)
    y = rotate(x, left, right) @ fold(weight, left, right).T
    torch.testing.assert_close(y, x @ weight.T, rtol=1e-11, atol=1e-11)


def test_a_transpose_would_not_cancel_a_rounded_hadamard() -> None:
    factor = random_hadamard(48, 1).to(torch.bfloat16)
    gain = float((factor.double() @ factor.double().T).diagonal().mean())
    assert abs(gain - 1) > 2e-3  # so a fold that used the transposed factor would be off by as much


def test_rotate_is_the_kronecker_product() -> None:
    left, right = random_orthogonal(3, 1), random_orthogonal(8, 2)
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(rotate(x, left, right), x @ torch.kron(left, right))


def test_factors_that_do_not_fit() -> None:
    eye = torch.eye(8)
    with pytest.raises(ValueError, match="do not fit width 100"):
        rotate(torch.zeros(1, 100), eye, eye)
    with pytest.raises(ValueError, match="do not fit width 64"):
        fold(torch.zeros(1, 64), torch.zeros(8, 4), eye)
    with pytest.raises(ValueError, match=r"left factor .* cannot be inverted"):
        fold(torch.zeros(1, 64), torch.zeros(8, 8), eye)
