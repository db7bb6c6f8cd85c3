"""The server's own classes compute what our linears compute, on CPU kernels in the place of the NPU's.

As in ``test_contract.py``: ``QC_CONTRACT`` is the path of the harness, ``QC_VLLM_ASCEND`` a directory with vllm_ascend.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from linears import IN, OUT, example, randn

TOOL, SERVER = os.environ.get("QC_CONTRACT"), os.environ.get("QC_VLLM_ASCEND")
pytestmark = pytest.mark.skipif(
    not (TOOL and SERVER), reason="set QC_CONTRACT and QC_VLLM_ASCEND to compare with the server's classes"
)
KINDS = ("W8A8", "W8A8_DYNAMIC", "W8A8_MIX", "W8A16", "W4A4_DYNAMIC", "W4A4_FLATQUANT_DYNAMIC")
"""Types that the server has a linear for."""

HARNESS = """
import importlib, logging, sys, torch
sys.path.insert(0, sys.argv[1])
tool = importlib.import_module(sys.argv[2])
logging.disable(logging.CRITICAL)
server = tool.install(sys.argv[3])
tool.STATE.desc = {"version": "1.0.0", "group_size": 0}
cases, answers = torch.load(sys.argv[4]), []
for kind, dtype, stored, x in cases:
    tool.STATE.dtype = dtype
    bias = stored.pop("bias", None)
    out, width = stored["weight"].shape
    layer, method = tool.mk(server, kind, width, out)
    for name, tensor in stored.items():
        layer.weight_loader(getattr(layer, name), tensor)
    method.process_weights_after_loading(layer)
    answers.append(method.quant_method.apply(layer, x, bias, 0))
torch.save(answers, sys.argv[5])
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, torch.dtype], tuple[Any, Any]]:
    """Type and dtype to what we and what the server computed."""
    assert TOOL
    folder, ours, cases = tmp_path_factory.mktemp("numbers"), {}, []
    for dtype in (torch.bfloat16, torch.float16):
        for kind in KINDS:
            module, x = example(kind, bias=True, dtype=dtype), randn(9, IN, seed=3).to(dtype)
            cases.append((kind, dtype, dict(module.state_dict()), x))
            ours[kind, dtype] = module(x)
    torch.save(cases, folder / "in.pt")
    tool = Path(TOOL)
    command = [
        sys.executable,
        "-c",
        HARNESS,
        str(tool.parent),
        tool.stem,
        SERVER,
        folder / "in.pt",
        folder / "out.pt",
    ]
    subprocess.run([str(word) for word in command], capture_output=True, timeout=300, check=True)
    theirs = torch.load(folder / "out.pt")
    return {key: (y, theirs[at]) for at, (key, y) in enumerate(ours.items())}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_server_computes_the_same(
    kind: str, dtype: torch.dtype, answers: dict[tuple[str, torch.dtype], tuple[Any, Any]]
) -> None:
    ours, theirs = answers[kind, dtype]
    assert theirs.dtype == dtype
    assert theirs.shape == (9, OUT)
    if (kind, dtype) == ("W8A16", torch.bfloat16):  # our kernel rounds before the scale too, theirs once
        distance = (ours.double() - theirs.double()).abs()
        assert (distance <= torch.finfo(dtype).eps * theirs.double().abs().max()).all()
    else:
        assert torch.equal(ours, theirs)
