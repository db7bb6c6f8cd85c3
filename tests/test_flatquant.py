"""Learned transforms: exact as they stand, better than fixed ones for what is measured, one per group of readers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from qc.compiler.errors import Failed
from qc.compiler.load import load
from qc.compiler.operand import Kronecker
from qc.compiler.program import Leaf
from qc.compiler.scheme import W4A4
from qc.compiler.verify import verify
from qc.compiler.view import BlockView
from qc.passes.affine import Affine, cayley, on_grid, train
from qc.runtime.hadamard import random_hadamard
from qc.runtime.kronecker import fold, rotate, split
from qc.runtime.quantize import fake_quant_per_token
from tests.homes import Home, compiled, logits, tensors_of
from tests.plans import planned
from tests.programs import captured, relative


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def affine(width: int = 32, out: int = 24, diagonal: bool = False) -> Affine:
    one = Affine(
        random_hadamard(4, 0).float(), random_hadamard(width // 4, 1).float(), torch.bfloat16, {"w": W4A4}
    )
    one.weight_clip["w"] = torch.full((out, 1, 1), 30.0)
    one.clip = torch.full((1,), 30.0)
    if diagonal:
        one.log_diagonal = randn(width, seed=5) * 0.3
    return one


def test_a_grid_is_that_of_the_runtime() -> None:
    x = randn(6, 16)
    torch.testing.assert_close(on_grid(x, 4, torch.ones(1)), fake_quant_per_token(x, 4))
    torch.testing.assert_close(on_grid(x, 4, torch.full((1,), 0.7)), fake_quant_per_token(x, 4, 0.7))


@given(st.integers(0, 30), st.integers(1, 9))
def test_a_cayley_transform_is_a_rotation(seed: int, order: int) -> None:
    found = cayley(randn(order, order, seed=seed).double())
    torch.testing.assert_close(found @ found.T, torch.eye(order, dtype=torch.float64))
    assert float(torch.linalg.det(found)) == pytest.approx(1)
    assert torch.equal(cayley(torch.zeros(order, order)), torch.eye(order))


@pytest.mark.broad
def test_learned_rotations_stay_rotations(home: Callable[[str], Home], tmp_path: Path) -> None:
    passes = "flatquant{iters=8, lr=0.05, factors=orthogonal},gptq"
    result = compiled(home("llama-128"), tmp_path / "out", passes, scheme="w4a4")
    assert result.journal.worst < 1e-12
    start = random_hadamard(8, result.plan.seed).float()
    moved = 0
    for name, factor in tensors_of(tmp_path / "out").items():
        if name.endswith(("left_trans", "right_trans")):
            wide = factor.float()
            torch.testing.assert_close(wide @ wide.T, torch.eye(len(wide)), atol=0.02, rtol=0)
            moved += len(wide) == 8 and not torch.allclose(wide, start, atol=0.02)
    assert moved


@pytest.mark.parametrize("diagonal", [False, True])
def test_what_is_trained_is_what_is_stored(diagonal: bool) -> None:
    one, x, weight = affine(diagonal=diagonal), randn(9, 32), randn(24, 32, seed=1)
    d = one.diagonal()
    d = torch.ones(32) if d is None else d
    left, right = (factor.to(torch.bfloat16).float() for factor in (one.left, one.right))
    turned = rotate(x / d, left, right)
    folded = fold((weight * d).double(), left, right).float()
    torch.testing.assert_close(turned @ folded.T, x @ weight.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one.act(x, W4A4), fake_quant_per_token(turned, 4), atol=1e-4, rtol=1e-4)
    scale = folded.abs().amax(1, keepdim=True) / 7
    want = (folded / scale).round() * scale
    torch.testing.assert_close(one.weight("w", weight, W4A4), want, atol=1e-3, rtol=1e-3)


def test_training_finds_what_a_fixed_rotation_does_not_have() -> None:
    one, weight = affine(), randn(24, 32, seed=1)
    x = randn(512, 32, seed=2) * torch.logspace(-1.5, 1, 32)
    one.log_diagonal = torch.zeros(32)

    def loss(index: int) -> torch.Tensor:
        rows = x[index * 64 : index * 64 + 64]
        got = one.act(rows, W4A4) @ one.weight("w", weight, W4A4).T
        return (got - rows @ weight.T).square().mean()

    generator = torch.Generator().manual_seed(0)
    losses = train(
        [one], loss, list(range(7)), [7], iters=60, rate=0.02, generator=generator, report=lambda text: None
    )
    assert losses.best < 0.8 * losses.start
    assert float(loss(7)) == pytest.approx(losses.best)
    assert len(losses.training) == 60
    assert not any(tensor.requires_grad for tensor in [*one.parameters(), *one.logits()])


@pytest.mark.broad
@pytest.mark.parametrize(("family", "scheme"), [("llama-128", "w4a4"), ("llama-128", "auto")])
def test_a_learned_transform_keeps_the_function_and_loads(
    family: str, scheme: str, home: Callable[[str], Home], tmp_path: Path
) -> None:
    place, out = home(family), tmp_path / "out"
    result = compiled(place, out, "iter_smooth,flatquant{iters=6},gptq", scheme=scheme)
    assert result.journal.worst < 1e-12
    tensors = tensors_of(out)
    pairs = [("mlp.gate_proj", "mlp.up_proj")] + [("self_attn.q_proj", "self_attn.k_proj")] * (
        scheme == "w4a4"
    )
    for layer in range(len(place.program.blocks)):
        for first, second in pairs:
            for leaf in ("left_trans", "right_trans", "clip_ratio"):
                one, other = (tensors[f"model.layers.{layer}.{name}.{leaf}"] for name in (first, second))
                assert torch.equal(one, other)
        left = tensors[f"model.layers.{layer}.mlp.up_proj.left_trans"].float()
        assert not torch.allclose(left @ left.T, torch.eye(len(left)), atol=0.02)  # it has learned something
    assert ("model.layers.0.mlp.down_proj.left_trans" in tensors) == (scheme == "w4a4")
    assert not [str(check) for check in verify(out) if check.wrong]
    want, got = (logits(load(path, dtype=torch.float32)) for path in (place.path, out))
    assert 1e-4 < relative(got, want) < 0.5
    name = "model.layers.0.mlp.up_proj.left_trans"
    (file,) = out.glob("*.safetensors")
    tensors[name][0] = 0
    save_file(tensors, file, metadata={"format": "pt"})
    assert any(name in wrong and "can hardly be inverted" in wrong for c in verify(out) for wrong in c.wrong)


@pytest.mark.broad
@pytest.mark.parametrize("family", ["phi3", "gpt2", "qwen2", "gemma2", "mixtral"])
def test_it_works_on_packed_turned_biased_and_routed_linears(
    family: str, home: Callable[[str], Home], tmp_path: Path
) -> None:
    place, out = home(family), tmp_path / "out"
    wide = [
        name
        for name, leaf in place.program.leaves.items()
        if leaf.kind == "linear"
        and name.partition("layers.")[2] + name.partition(".h.")[2]
        and not fits(leaf)
    ]
    exclude = "+".join(dict.fromkeys(f"*.{name.rpartition('.')[2]}" for name in wide)) or "none"
    passes = "iter_smooth,flatquant{iters=3" + (f", exclude={exclude}" if wide else "") + "},gptq"
    strategies = f"{{strategies=w8a8:{exclude.replace('+', '|')}+w4a4}}" if wide else ""
    result = compiled(place, out, passes + strategies, scheme=None if wide else "w4a4", target="modelslim")
    assert result.journal.worst < 1e-11
    assert any(name.endswith("left_trans") for name in tensors_of(out))
    assert not [str(check) for check in verify(out) if check.wrong]
    want, got = (logits(load(path, dtype=torch.float32)) for path in (place.path, out))
    assert 1e-4 < relative(got, want) < 0.7


def fits(leaf: Leaf) -> bool:
    """Whether the kernel can split the width that a linear reads."""
    try:
        split(leaf.parameters["weight"][0 if leaf.transposed else 1])
    except ValueError:
        return False
    return True


@pytest.mark.broad
def test_a_clip_that_was_learned_is_stored_by_plain_rounding_too(
    home: Callable[[str], Home], tmp_path: Path
) -> None:
    compiled(home("llama-128"), tmp_path / "out", "flatquant{iters=8, lr=0.05},linear_quant", scheme="w4a4")
    clips = [t for name, t in tensors_of(tmp_path / "out").items() if name.endswith("clip_ratio")]
    assert clips
    assert all(0.5 < float(clip) < 1 for clip in clips)
    assert len({float(clip) for clip in clips}) > 1


def test_groups_share_one_transform_and_eight_bits_have_none() -> None:
    (step,) = planned("llama-128", "flatquant", scheme="auto").steps
    for rewrite in step.answer.rewrites:
        edits = [edit for edit in rewrite.edits if isinstance(edit.operand, Kronecker)]
        turned = {edit.site.module.rpartition(".")[2]: edit.operand for edit in edits}
        assert turned.keys() == {"gate_proj", "up_proj"}
        assert len(set(turned.values())) == 1


@pytest.mark.parametrize(
    ("passes", "why"),
    [
        ("flatquant{exclude=*.gate_proj},gptq", "gate_proj reads the same value and is left out"),
        ("flatquant,iter_smooth,gptq", "flatquant takes linear sites before iter_smooth"),
        ("flatquant,quarot,gptq", "flatquant takes linear sites before rotate_residual"),
        ("flatquant", "an online rotation is served before int4 linears only"),
    ],
)
def test_what_would_not_be_served_or_not_be_true_is_a_problem(passes: str, why: str) -> None:
    found = planned("llama-128", passes, scheme="w4a4", target="vllm-ascend").problems
    assert any(why in problem for problem in found), found


def test_a_width_that_the_kernel_cannot_split_is_a_problem() -> None:
    found = planned("llama", "flatquant,gptq", scheme="w4a4", target="vllm-ascend").problems
    assert any("the kernel needs" in problem and "exclude it" in problem for problem in found), found


@pytest.mark.parametrize("options", ["iters=-1", "lr=0", "lr=1.5", "factors=round"])
def test_options_out_of_range_are_refused(options: str) -> None:
    from qc.compiler.errors import Refused
    from qc.compiler.spelling import passes_of

    with pytest.raises(Refused, match=options.partition("=")[0]):
        passes_of(f"flatquant{{{options}}}")


def test_outputs_that_are_not_finite_stop_it() -> None:
    (step,) = planned("llama-128", "flatquant", scheme="w4a4").steps
    (rewrite, *_) = step.answer.rewrites
    names = [edit.site.module for edit in rewrite.edits if isinstance(edit.operand, Kronecker)]
    leaves = captured("llama-128").leaves
    weights = {f"{name}.weight": randn(*leaves[name].parameters["weight"]) for name in names}
    view = BlockView(rewrite.where, weights, {}, torch.bfloat16, 0, batches=1)
    first = weights[f"{names[0]}.weight"]
    view.forward = lambda hook, index: hook(names[0], torch.full((1, 2, 64), torch.nan), first, None)
    view.target = lambda index: torch.zeros(1, 2, first.shape[0])
    with pytest.raises(Failed, match=r"model.layers.0: its outputs are not finite"):
        step.what.solve(rewrite, view)
