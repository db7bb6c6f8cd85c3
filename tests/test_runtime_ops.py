"""The ops of the namespace ``qc``: their numbers, torch's own checks, export, and what the NPU bodies refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from linears import IN, OUT, example, randn
from torch import Tensor

import qc.runtime.ops
from qc.runtime.beside import Beside
from qc.runtime.formats import FORMATS
from qc.runtime.int4_pack import pack_int4, unpack_int4
from qc.runtime.kronecker import rotate
from qc.runtime.low_rank import LowRankBranch
from qc.runtime.op import decompositions
from qc.runtime.outlier_channels import OutlierChannels
from qc.runtime.outlier_weights import OutlierWeights, to_csr
from qc.runtime.w8a8 import W8A8Dynamic
from qc.runtime.w8a8_mix import W8A8Mix

BF16 = torch.bfloat16
OPS = torch.ops.qc


def integers(rows: int, columns: int, top: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-top - 1, top + 1, (rows, columns), generator=generator).to(torch.int8)


def scale(*shape: int) -> Tensor:
    return randn(*shape, seed=9).abs() * 0.01 + 0.01


def offsets(top: int) -> Tensor:
    return integers(OUT, 1, top, seed=5).float()


X = randn(2, 5, IN).to(BF16)
CSR = to_csr(randn(OUT, IN, seed=3) > 2.2, randn(OUT, IN).to(BF16))
"""Rows of a sparse matrix, some of them empty."""
ARGUMENTS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "w8a8_dynamic": lambda: (X, integers(OUT, IN, 127), scale(OUT, 1), None, randn(OUT).to(BF16)),
    "w8a8_dynamic_tensor": lambda: (X, integers(OUT, IN, 127), scale(OUT, 1), None, randn(OUT).to(BF16)),
    "w8a8_static": lambda: (
        X, integers(OUT, IN, 127), torch.tensor([32.0], dtype=BF16), torch.tensor([3], dtype=torch.int8),
        torch.arange(OUT, dtype=torch.int32), scale(OUT),
    ),
    "w8a16": lambda: (X, integers(OUT, IN, 127), scale(OUT, 1), torch.zeros(OUT, 1), None),
    "w4a16": lambda: (X, integers(OUT, IN, 7), scale(OUT, 4), torch.ones(OUT, 4), randn(OUT)),
    "w4a8_dynamic": lambda: (X, integers(OUT // 2, IN, 127), scale(OUT, 1), scale(OUT, 1)),
    "w4a4_dynamic": lambda: (X, integers(OUT, IN, 7), scale(OUT, 1), offsets(7)),
    "w4a4_flatquant": lambda: (X, integers(OUT, IN, 7), scale(OUT, 1), None, randn(8, 8), randn(8, 8), 0.9),
    "quantize": lambda: (X, scale(5), torch.arange(5.0), 1),
    "dequantize": lambda: (integers(4, IN, 127), scale(IN), None, BF16),
    "dynamic_quantize": lambda: (X,),
    "rms_norm": lambda: (X, randn(IN).to(BF16), 1e-5),
    "sparse_rows": lambda: (X, *CSR.values()),
}  # fmt: skip


def test_every_op_is_looked_at() -> None:
    assert {str(op).split(".")[1] for op in decompositions()} == set(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_torch_finds_nothing_wrong_with_an_op(name: str) -> None:
    results = torch.library.opcheck(getattr(OPS, name).default, ARGUMENTS[name]())
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("offset", [None, offsets(127)], ids=["symmetric", "offsets"])
@pytest.mark.parametrize(("name", "dims"), [("w8a8_dynamic", (-1,)), ("w8a8_dynamic_tensor", (0, 1, 2))])
def test_a_dynamic_product_is_exact_in_integers(
    name: str, dims: tuple[int, ...], offset: Tensor | None
) -> None:
    x, weight, weight_scale, _, bias = ARGUMENTS[name]()
    step = x.float().abs().amax(dims, keepdim=True) / 127
    shifted = weight.double() + (0 if offset is None else offset.double())
    sums = (x.float() / step).round().double() @ shifted.T
    wanted = (sums.float() * weight_scale.T) * step + bias.float()
    assert torch.equal(getattr(OPS, name)(x, weight, weight_scale, offset, bias), wanted.to(BF16))


def test_a_static_product_is_exact_in_integers() -> None:
    x, weight, reciprocal, offset, quant_bias, deq_scale = ARGUMENTS["w8a8_static"]()
    q = (x.double() * reciprocal.double() + offset).round().clamp(-128, 127)
    wanted = ((q @ weight.double().T + quant_bias) * deq_scale.double()).to(BF16)
    assert torch.equal(OPS.w8a8_static(x, weight, reciprocal, offset, quant_bias, deq_scale), wanted)
    bits = deq_scale.view(torch.int32).to(torch.int64)
    assert torch.equal(OPS.w8a8_static(x, weight, reciprocal, offset, quant_bias, bits), wanted)


def test_a_turned_product_is_that_of_the_turned_activation() -> None:
    x, weight, weight_scale, _, *turn = ARGUMENTS["w4a4_flatquant"]()
    left, right, clip = turn
    turned = rotate(x.float(), left, right)
    step = turned.abs().amax(-1, keepdim=True) * clip / 7
    q = (turned / step).round().clamp(-8, 7)
    for offset in (torch.zeros(OUT, 1), offsets(7)):
        wanted = ((q.double() @ (weight + offset).double().T).float() * weight_scale.T) * step
        assert torch.equal(OPS.w4a4_flatquant(x, weight, weight_scale, offset, *turn), wanted.to(BF16))


def test_ranks_of_a_turned_product_share_offsets() -> None:
    x, weight, weight_scale, _, *turn = ARGUMENTS["w4a4_flatquant"]()
    twice, wide, offset = torch.cat([x, 2 * x], -1), torch.cat([weight, weight], 1), offsets(7)
    y = OPS.w4a4_flatquant(twice.float(), wide, weight_scale, offset, *turn)
    torch.testing.assert_close(
        y, 3 * OPS.w4a4_flatquant(x.float(), weight, weight_scale, offset, *turn), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("rows", [1, 16, 17, 64])
def test_weights_alone_are_near_the_dequantized_linear_whatever_the_kernel(rows: int) -> None:
    _, weight, weight_scale, zero, _ = ARGUMENTS["w8a16"]()
    x = randn(rows, IN, seed=rows).to(BF16)
    for offset in (zero, zero + 3):
        wanted = x.double() @ ((weight.double() + offset) * weight_scale.double()).T
        y = OPS.w8a16(x, weight, weight_scale, offset, None)
        assert (y.double() - wanted).norm() < 4e-3 * wanted.norm()


def test_a_cache_reads_what_it_wrote() -> None:
    x, steps = randn(2, 7, IN), scale(IN) * 4
    q = OPS.quantize(x, steps, None, -1)
    assert torch.equal(q, (x / steps).round().clamp(-128, 127).to(torch.int8))
    assert ((OPS.dequantize(q, steps, None, torch.float32) - x).abs() <= steps / 2 + 1e-6).all()
    rows, row_scale = OPS.dynamic_quantize(x)
    assert rows.abs().amax(-1).eq(127).all()
    assert torch.equal(row_scale, x.abs().amax(-1) / 127)


def test_eight_int4_are_a_word() -> None:
    weight = integers(3, 16, 7)
    packed = pack_int4(weight)
    assert torch.equal(unpack_int4(packed), weight)
    worked = pack_int4(torch.tensor([[1, -1, 0, 0, 0, 0, 0, -8]], dtype=torch.int8))
    assert worked.tolist() == [[0x800000F1 - 2**32]]
    with pytest.raises(ValueError, match="12 int4 do not fill words of 8"):
        pack_int4(torch.zeros(2, 12, dtype=torch.int8))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_prepared_module_computes_the_same(kind: str) -> None:
    module, x = example(kind, bias=True), randn(3, IN, seed=2).to(BF16)
    before, held = module(x), set(module.state_dict())
    assert module.prepare_for_npu() is module
    assert torch.equal(module(x), before)
    prepared = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.prepare_for_npu()
    assert set(prepared) == held
    assert all(torch.equal(tensor, prepared[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize(
    "kind", ["W8A8_DYNAMIC", "W8A8_DYNAMIC_TENSOR", "W4A4_DYNAMIC", "W4A4_FLATQUANT_DYNAMIC"]
)
def test_offsets_reach_the_op_where_there_are_some(kind: str) -> None:
    module, x = example(kind), randn(3, IN, seed=2)
    assert module.offset is None
    plain, held = module(x), dict(module.state_dict())
    module.load_state_dict(held | {"weight_offset": offsets(7)})
    shifted = module(x)
    assert not torch.equal(shifted, plain)
    assert torch.equal(module.prepare_for_npu()(x), shifted)
    again = FORMATS[kind](IN, OUT, device="meta")
    again.load_state_dict(held | {"weight_offset": torch.zeros(OUT, 1)}, assign=True)
    assert torch.equal(again(x), plain)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_module_exports_as_one_op_for_any_number_of_tokens(kind: str) -> None:
    module = example(kind, bias=True)
    wanted = [module(randn(2, n, IN, seed=n).to(BF16)) for n in (5, 9)]
    tokens = {"x": {1: torch.export.Dim.AUTO}}
    program = torch.export.export(module, (randn(2, 5, IN).to(BF16),), dynamic_shapes=tokens)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert len([name for name in called if name.startswith("qc.")]) == 1
    again = [program.module()(randn(2, n, IN, seed=n).to(BF16)) for n in (5, 9)]
    assert all(torch.equal(a, b) for a, b in zip(again, wanted, strict=True))


@pytest.mark.parametrize(
    "beside", [LowRankBranch(4), OutlierChannels(3), OutlierWeights(len(CSR["outlier_value"]))], ids=str
)
def test_what_stands_beside_is_added_to_one_op(beside: Beside) -> None:
    held = dict(example("W8A8_DYNAMIC", bias=True).state_dict())
    for leaf, (kind, shape) in beside.tensors(IN, OUT, BF16).items():
        held[leaf] = randn(*shape, seed=6).to(kind)
    if "outlier_index" in held:
        held["outlier_index"] = torch.tensor([5, 40, -1], dtype=torch.int32)
    held |= CSR if "outlier_start" in held else {}
    module, x = W8A8Dynamic(IN, OUT, bias=True, beside=beside), randn(2, 5, IN).to(BF16)
    module.load_state_dict(held)
    read = module.get_buffer
    op = OPS.w8a8_dynamic(beside.rest(x, read), module.weight, module.scale, None, None)
    wanted = (op + beside.product(x, read)).to(BF16) + read("bias")
    assert torch.equal(module(x), wanted)
    program = torch.export.export(module, (x,), dynamic_shapes={"x": {1: torch.export.Dim.AUTO}})
    ops = [str(n.target) for n in program.graph.nodes if str(n.target).startswith("qc.")]
    assert ops.count("qc.w8a8_dynamic.default") == 1
    assert torch.equal(program.module()(x), wanted)
    longer = randn(2, 9, IN, seed=4).to(BF16)
    assert torch.equal(program.module()(longer), module(longer))


def test_a_product_with_sparse_rows_is_one_with_the_dense_matrix() -> None:
    dense = torch.zeros(OUT, IN)
    mask = randn(OUT, IN, seed=3) > 2.2
    dense[mask] = randn(OUT, IN).to(BF16).float()[mask]
    assert bool((~mask).all(1).any()), "a row without values"
    wanted = X.double() @ dense.double().T
    for run in (OPS.sparse_rows.default, decompositions()[OPS.sparse_rows.default]):
        found = run(X, *CSR.values())
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)


def test_a_mix_exports_the_phase_that_is_set() -> None:
    module = example("W8A8_MIX", bias=True)
    assert isinstance(module, W8A8Mix)
    for decode, name in ((False, "qc.w8a8_dynamic.default"), (True, "qc.w8a8_static.default")):
        module.decode = decode
        program = torch.export.export(module, (randn(3, IN).to(BF16),))
        assert name in [str(node.target) for node in program.graph.nodes]


def test_npu_bodies_refuse_what_the_npu_has_no_op_for() -> None:
    bodies = {str(op).split(".")[1]: body for op, body in decompositions().items()}
    x, weight, weight_scale, offset = ARGUMENTS["w4a4_dynamic"]()
    with pytest.raises(ValueError, match="call prepare_for_npu"):
        qc.runtime.ops.w4a8._npu(*ARGUMENTS["w4a8_dynamic"]())
    with pytest.raises(ValueError, match="16 and 8 for 64 channels"):
        bodies["w4a4_flatquant"](x, pack_int4(weight), weight_scale, None, torch.eye(16), torch.eye(8), 1.0)
    for name in ("w8a8_dynamic", "w8a8_dynamic_tensor", "w4a4_dynamic", "w4a4_flatquant"):
        rest = ARGUMENTS[name]()[4:]
        with pytest.raises(ValueError, match=f"qc::{name}: the NPU has no op for offsets of a weight"):
            bodies[name](x, weight, weight_scale, offset, *rest)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rows", [1, 17, 40])
def test_cuda_computes_what_the_cpu_does(kind: str, rows: int) -> None:
    module, x = example(kind, bias=True), randn(rows, IN).to(BF16)
    torch.testing.assert_close(module.cuda()(x.cuda()).cpu(), example(kind, bias=True)(x))
