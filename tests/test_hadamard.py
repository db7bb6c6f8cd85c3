"""Hadamard matrices are derived: they must be Hadamard, and refuse what they are not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qc.runtime.hadamard import hadamard, has_hadamard, random_hadamard, random_orthogonal, random_signs
from qc.runtime.paley import paley, prime_power

# cores that the published rotation codes ship as pasted tables, and the width that none of them has
PUBLISHED = (12, 20, 28, 36, 40, 44, 52, 60, 76, 108, 136, 140, 148, 160, 200)
PRIME_POWERS = (28, 52, 100, 164)  # 27 + 1, 2 (25 + 1), 2 (49 + 1), 2 (81 + 1)
WILLIAMSON = (92, 116, 156)


def assert_hadamard(matrix: torch.Tensor, n: int) -> None:
    assert matrix.shape == (n, n)
    assert matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=matrix.dtype))


@pytest.mark.parametrize("n", sorted({1, 2, 4, 8, 16, 64, 144, 576, *PUBLISHED, *PRIME_POWERS, *WILLIAMSON}))
def test_rows_are_orthogonal(n: int) -> None:
    assert has_hadamard(n)
    assert_hadamard(hadamard(n), n)


@given(st.integers(1, 400))
def test_every_order_is_either_given_or_refused(n: int) -> None:
    if has_hadamard(n):
        assert_hadamard(hadamard(n, dtype=torch.float32), n)
    else:
        with pytest.raises(ValueError, match=f"order {n} "):
            hadamard(n)


def test_the_gaps_are_known() -> None:
    assert [n for n in range(4, 260, 4) if not has_hadamard(n)] == [172, 188, 236]
    assert has_hadamard(18944)  # 148 x 128, an MLP width without a published table


def test_refusal_says_which_orders_exist() -> None:
    with pytest.raises(ValueError, match=r"order 1026 .*1, 2 and multiples of 4"):
        hadamard(1026)
    with pytest.raises(ValueError, match=r"order 172 .*random orthogonal"):
        hadamard(172)


@pytest.mark.parametrize("n", [0, -4])
def test_no_order_below_one(n: int) -> None:
    assert not has_hadamard(n)
    with pytest.raises(ValueError, match="multiples of 4"):
        hadamard(n)


def test_prime_powers() -> None:
    assert [prime_power(q) for q in (2, 9, 27, 12, 1, 97)] == [(2, 1), (3, 2), (3, 3), None, None, (97, 1)]
    with pytest.raises(ValueError, match="no Hadamard matrix of order 92"):
        paley(92)


@given(st.sampled_from([1, 2, 12, 24, 64]), st.integers(0, 2**31))
def test_random_hadamard_is_orthogonal_and_flat(n: int, seed: int) -> None:
    q = random_hadamard(n, seed)
    torch.testing.assert_close(q @ q.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(q.abs(), torch.full_like(q, n**-0.5))


def test_random_hadamard_depends_on_its_arguments_alone() -> None:
    state = torch.get_rng_state()
    first = random_hadamard(64, 3)
    torch.manual_seed(99)
    assert torch.equal(first, random_hadamard(64, 3))
    assert not torch.equal(first, random_hadamard(64, 4))
    torch.set_rng_state(state)
    for draw in (random_hadamard, random_orthogonal, random_signs):
        draw(8, 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_blocks_repeat_on_the_diagonal() -> None:
    q = random_hadamard(48, 5, block_size=16)
    assert torch.equal(q, torch.block_diag(*[random_hadamard(16, 5)] * 3))
    with pytest.raises(ValueError, match="block_size 32 does not divide the width 48"):
        random_hadamard(48, 5, block_size=32)


def test_random_orthogonal() -> None:
    q = random_orthogonal(86, 1)
    torch.testing.assert_close(q @ q.T, torch.eye(86, dtype=torch.float64), rtol=0, atol=1e-12)
    assert not torch.equal(q, random_orthogonal(86, 2))
