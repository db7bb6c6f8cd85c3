"""A quantized model as a program of ``torch.export``: one ``.pt2`` file with graph and weights.

The portable program calls ops of ``qc::`` and runs wherever torch does. The NPU program calls ``torch.ops.npu`` in
their place; it can be made where the schemas of torch_npu are known, and runs on its device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel

from ..runtime import ops
from ..runtime.linear import IntegerLinear
from ..runtime.ops import npu_known
from .attention import attend
from .capture_attention import NAME, Uncarried, register
from .capture_grids import NAME as GRIDS
from .errors import Failed, Refused
from .experts import COMBINED, ROUTED
from .export_module import quiet

PORTABLE, NPU = "model.pt2", "model_npu.pt2"
_ROWS, _LENGTH = 2, 7
"""The example; neither size occurs in it again, so that both stay open."""


class Logits(nn.Module):
    """``input_ids`` and ``attention_mask`` [batch, length] int64 to logits [batch, length, vocabulary]; no cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The logits."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def program_of(model: PreTrainedModel, *, npu: bool = False) -> ExportedProgram:
    """A loaded model as a program; batch and length are open.

    Args:
        model: What ``load`` returns. With ``npu`` its integer linears are brought into the form of the device.
        npu: Whether ops of ``qc::`` are replaced by calls of ``torch.ops.npu``.

    Raises:
        Refused: The model's code has no graph that holds for every input, or, with ``npu``, the schemas of torch_npu
            are not known or an op has no body for the device.
    """
    if npu and not npu_known():
        raise Refused(
            "no schemas of torch_npu are registered: import torch_npu first (pip install 'qc[npu]'), or take the"
            " portable program"
        )
    if model.config._attn_implementation != GRIDS:
        register()
        model.set_attn_implementation(NAME)
    if npu:
        for module in model.modules():
            if isinstance(module, IntegerLinear):
                module.prepare_for_npu()
    ids = torch.arange(_ROWS * _LENGTH).reshape(_ROWS, _LENGTH) % _vocabulary(model)
    mask = torch.ones_like(ids)
    axes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    try:
        with quiet(), torch.no_grad():
            model(
                input_ids=ids, attention_mask=mask, use_cache=False
            )  # what a module finds out once, is found
            program = torch.export.export(
                Logits(model), (ids, mask), dynamic_shapes=(axes, axes), strict=False
            )
            bodies: dict[Any, Any] = {torch.ops.qc.attention.default: attend}
            if npu:
                bodies |= {ROUTED: _every_row, COMBINED: _summed, **ops.decompositions()}
            return program.run_decompositions(bodies)
    except Uncarried as error:
        raise Refused(
            f"{error}, which the op of attention has no place for: there is no program of it"
        ) from error
    except Exception as error:  # torch.export and the model's code raise whatever they like
        reason = " ".join(str(error).split())[:300]
        raise Refused(
            f"{type(model).__name__} cannot be made a program ({type(error).__name__}: {reason}); take another --target"
        ) from error


def save_programs(directory: Path) -> tuple[str, ...]:
    """Write the programs of the checkpoint in a directory beside it; returns the names of the files.

    The portable one is run and compared with the model. The NPU one is written where torch_npu's schemas are known.

    Raises:
        Refused: As for ``program_of``.
        Failed: The program computes something else than the model.
    """
    from .load import load

    model = load(directory)
    program = program_of(model)
    ids = torch.arange(3 * 11).reshape(3, 11).flip(1) % _vocabulary(model)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        wanted, found = Logits(model)(ids, mask), program.module()(ids, mask)
    off = float((found.float() - wanted.float()).norm() / wanted.float().norm())
    if not off < 1e-2:
        raise Failed(
            f"{PORTABLE}: its logits differ from the model's by {off:.2g}, relative: nothing is written"
        )
    torch.export.save(program, directory / PORTABLE)
    if not npu_known():
        return (PORTABLE,)
    del program
    torch.export.save(program_of(load(directory), npu=True), directory / NPU)
    return PORTABLE, NPU


def load_program(path: str | Path) -> ExportedProgram:
    """Read a program that ``--target pt2`` wrote; ``.module()`` of it is called with ``input_ids, attention_mask``.

    Raises:
        Refused: There is no such file, or it is no program, or it calls ops that this process does not know.
    """
    path = Path(path) / PORTABLE if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise Refused(f"{path}: no such file; qc compile --target pt2 writes {PORTABLE}")
    try:
        with quiet():
            return torch.export.load(path)
    except Exception as error:  # of the archive, of schemas
        reason = " ".join(str(error).split())[:300]
        hint = "; import torch_npu before reading it" if "npu" in reason else ""
        raise Refused(
            f"{path}: cannot be read as a program ({type(error).__name__}: {reason}){hint}"
        ) from error


def _vocabulary(model: PreTrainedModel) -> int:
    return model.get_input_embeddings().get_parameter("weight").shape[0]


def _every_row(x: Tensor, index: Tensor, expert: int, every: bool = False) -> Tensor:
    """``qc::routed`` with a fixed number of rows: all of them, of which ``_summed`` takes those that count."""
    return x.clone()


def _summed(index: Tensor, weight: Tensor, ys: list[Tensor]) -> Tensor:
    """``qc::combined`` of experts that saw every row."""
    out = torch.zeros_like(ys[0])
    for expert, y in enumerate(ys):
        share = torch.where(index == expert, weight, torch.zeros_like(weight)).sum(-1, keepdim=True)
        out = out + (y * share).to(out.dtype)
    return out
