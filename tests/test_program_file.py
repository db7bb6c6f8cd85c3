"""A model as a program of torch.export computes what the model computes, for every batch and length."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import save_float, save_quantized

import qc
from qc.compiler.errors import Refused
from qc.compiler.load import load
from qc.compiler.program_file import Logits, program_of, save_programs
from qc.runtime.formats import FORMATS
from qc.runtime.ops import npu_known


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "W8A8" else pytest.mark.broad) for kind in FORMATS]
)
def test_every_format(tmp_path: Path, kind: str) -> None:
    path = save_quantized(save_float(tmp_path / "float", "qwen2"), tmp_path / "q", kind)
    assert save_programs(path)[0] == "model.pt2"
    program = qc.load_program(path)
    called = {str(node.target) for node in program.graph.nodes if str(node.target).startswith("qc.")}
    assert len(called) == 1, called  # the op of the format, and no attention of ours
    ids = torch.arange(3, 43).reshape(4, 10)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.no_grad():
        wanted, found = Logits(load(path))(ids, mask), program.module()(ids, mask)
    assert found.dtype == torch.bfloat16
    off = (found.float() - wanted.float()).norm() / wanted.float().norm()
    assert off < 5e-3


def test_what_there_is_no_program_of(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no such file; qc compile --target pt2 writes"):
        qc.load_program(tmp_path)
    (tmp_path / "model.pt2").write_bytes(b"nothing")
    with pytest.raises(Refused, match="cannot be read as a program"):
        qc.load_program(tmp_path)
    if not npu_known():
        model = load(save_float(tmp_path / "float"))
        with pytest.raises(Refused, match="import torch_npu first"):
            program_of(model, npu=True)
