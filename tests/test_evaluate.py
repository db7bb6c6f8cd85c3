"""Evaluation: numbers that are known beforehand, and the two ends of a compile on one text."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import WORDS, save_float, save_quantized
from torch import Tensor

from qc.compiler.errors import Refused
from qc.compiler.evaluate import compare, evaluate, format, undo_separators
from qc.compiler.half_linear import HalfLinear
from qc.compiler.load import load

VOCABULARY = 11
TOKENS = torch.randint(0, VOCABULARY, (6, 300), generator=torch.Generator().manual_seed(0))


def uniform(ids: Tensor) -> Tensor:
    return torch.zeros(*ids.shape, VOCABULARY)


def biased(ids: Tensor) -> Tensor:
    """Three quarters on token 0, the rest spread evenly."""
    row = torch.full((VOCABULARY,), 0.25 / (VOCABULARY - 1))
    row[0] = 0.75
    return row.log().expand(*ids.shape, VOCABULARY)


def noisy(ids: Tensor) -> Tensor:
    return torch.randn(*ids.shape, VOCABULARY, generator=torch.Generator().manual_seed(int(ids.sum())))


def test_a_model_equals_itself() -> None:
    e = compare(noisy, noisy, TOKENS)
    assert (e.kl, e.agreement, e.ratio, e.difference_error) == (0, 1, 1, 0)
    assert e.within_noise
    assert "inside its standard error" in format(e)


def test_known_distributions() -> None:
    e = compare(uniform, biased, TOKENS)
    assert e.perplexity == pytest.approx(VOCABULARY, rel=1e-5)
    assert e.nll_error == pytest.approx(0, abs=1e-6)
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.025)
    assert e.kl == pytest.approx(math.log(VOCABULARY) - entropy, rel=1e-5)
    assert e.agreement == 1  # both take the first of the likeliest
    zeros = (TOKENS[:, 1:] == 0).double()
    nll = -(zeros * math.log(0.75) + (1 - zeros) * math.log(0.025)).mean(1)
    assert e.reference_nll == pytest.approx(float(nll.mean()), rel=1e-5)
    assert e.reference_nll_error == pytest.approx(float(nll.std() / 6**0.5), rel=1e-4)
    assert e.difference_error == pytest.approx(e.reference_nll_error, rel=1e-4)


def test_divergence_is_from_the_reference() -> None:
    forward, backward = compare(uniform, biased, TOKENS).kl, compare(biased, uniform, TOKENS).kl
    assert abs(forward - backward) > 0.1


def test_agreement_counts_positions() -> None:
    def flipped(ids: Tensor) -> Tensor:
        logits = noisy(ids)
        logits[:, ::2] *= -1
        return logits

    assert compare(flipped, noisy, TOKENS).agreement == pytest.approx(149 / 299)


def test_every_position_is_predicted_from_those_before() -> None:
    def oracle(ids: Tensor) -> Tensor:
        following = torch.nn.functional.one_hot(ids.roll(-1, 1), VOCABULARY)
        return following * 50.0

    assert compare(oracle, uniform, TOKENS).perplexity == pytest.approx(1, abs=1e-4)


def test_noise_is_measured_on_pairs() -> None:
    e = compare(noisy, noisy, TOKENS)
    assert replace(e, nll=e.nll + 0.01, difference_error=0.02).within_noise
    worse = replace(e, nll=e.nll + 0.01, difference_error=0.005)
    assert not worse.within_noise  # although far inside the error of either perplexity
    assert worse.nll_error > 0.01
    assert "inside" not in format(worse)


def test_one_window_has_no_standard_error() -> None:
    assert math.isinf(compare(noisy, uniform, TOKENS[:1]).nll_error)


def test_overflow_is_refused() -> None:
    with pytest.raises(Refused, match=r"window 0 .* not finite"):
        compare(lambda ids: uniform(ids) * math.nan, uniform, TOKENS)


def test_only_the_three_separators_are_undone() -> None:
    text = "a well @-@ known 1 @,@ 000 and 2 @.@ 5 , mail me @ home @/@ x ( a ) ."
    assert undo_separators(text) == "a well-known 1,000 and 2.5 , mail me @ home @/@ x ( a ) ."


@pytest.fixture
def text(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(3, len(WORDS), (200,), generator=generator).tolist()
    file = tmp_path / "text.txt"
    file.write_text(" ".join(WORDS[i] for i in picks))
    return file


def test_checkpoints_are_compared_from_their_files(tmp_path: Path, text: Path) -> None:
    source = save_float(tmp_path / "float")
    good, bad = (save_quantized(source, tmp_path / kind, kind) for kind in ("W8A16", "W4A4_DYNAMIC"))
    same = evaluate(source, source, text, windows=4, length=32)
    assert (same.windows, same.length, same.kl, same.agreement) == (4, 32, 0, 1)
    first, second = (evaluate(path, source, text, windows=4, length=32) for path in (good, bad))
    assert 0 < first.kl < second.kl
    assert first.agreement > second.agreement
    assert first.reference_nll == same.nll
    assert evaluate(good, source, text, windows=99, length=32).windows == 6


def test_perplexity_is_the_models_loss(tmp_path: Path, text: Path) -> None:
    source = save_float(tmp_path / "float", dtype=torch.float32)
    ids = torch.tensor([[WORDS.index(word) for word in text.read_text().split()[:64]]])
    with torch.no_grad():
        loss = load(source)(input_ids=ids, labels=ids).loss
    assert evaluate(source, source, text, windows=1, length=64).nll == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_linear_is_a_float32_product_rounded_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 300, generator=generator).to(dtype) for n in (5, 7))
    bias = torch.randn(7, generator=generator).to(dtype)
    linear = torch.nn.functional.linear
    with HalfLinear():
        plain, shifted, wide = (
            linear(x, weight),
            linear(x, weight, bias=bias),
            linear(x.double(), weight.double()),
        )
    exact = x.double() @ weight.double().T
    torch.testing.assert_close(plain, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(shifted, (exact + bias).to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-4)
    assert torch.equal(wide, linear(x.double(), weight.double()))


def test_cleaning_is_an_option(tmp_path: Path) -> None:
    source = save_float(tmp_path / "float")
    file = tmp_path / "text.txt"
    file.write_text("the cat @-@ dog sat " * 40)
    lengths = []
    for clean in (True, False):
        with pytest.raises(Refused, match=r"has (\d+) tokens") as refused:
            evaluate(source, source, file, length=1000, clean=clean)
        lengths.append(int(str(refused.value).split("has ")[1].split()[0]))
    assert lengths[0] < lengths[1]


def test_two_vocabularies_are_refused(tmp_path: Path, text: Path) -> None:
    source = save_float(tmp_path / "float")
    other = save_float(tmp_path / "other", vocab_size=40)
    with pytest.raises(Refused, match=r"vocabulary of 40.*one of 48"):
        evaluate(other, source, text, length=32)


def test_the_table() -> None:
    e = replace(
        compare(noisy, noisy, TOKENS), nll=math.log(24.5), reference_nll=math.log(20), kl=0.125, agreement=0.5
    )
    table = format(e)
    assert "6 windows of 300 tokens" in table
    for shown in ("24.500", "20.000", "1.2250", "0.12500", "50.00%"):
        assert shown in table
