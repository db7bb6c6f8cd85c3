"""Every scheme of the safe intersection, compiled, loads in the server's own classes: no error, in both dtypes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.random_llama import character_tokenizer
from qc.compiler.capture import capture
from qc.compiler.compile import Options, compile
from qc.compiler.program import Program
from qc.compiler.scheme import FLOAT, W4A4, W8A8, W8A8_MIX, W8A8_STATIC, W8A16, Rule, Scheme
from tests.contract import judge
from tests.families import DENSE, build
from tests.homes import TEXT

TYPES: dict[str, tuple[str, str]] = {
    "FLOAT": ("fuse_norms", "float"),
    "W8A8": ("iter_smooth,linear_quant", "w8a8-static"),
    "W8A8_DYNAMIC": ("iter_smooth,linear_quant", "w8a8"),
    "W8A8_MIX": ("linear_quant", "w8a8-mix"),
    "W8A16": ("linear_quant", "w8a16"),
    "W4A4_DYNAMIC": ("quarot,linear_quant", "w4a4"),
    "W4A4_FLATQUANT_DYNAMIC": ("flatquant{iters=1},linear_quant", "w4a4"),
}
"""Type to the passes and the scheme that make it."""
FAMILIES = ("llama", "qwen2", "qwen3")
"""Plain, with biases, with norms of queries and keys."""
DTYPES = (torch.bfloat16, torch.float16)
EVERY = Scheme(
    "every",
    (
        Rule(include=("*layers.0.self_attn*",), scheme=W8A8),
        Rule(include=("*layers.0.mlp.down_proj",), scheme=W8A8_MIX),
        Rule(include=("*layers.0.mlp*",), scheme=W8A8_STATIC),
        Rule(include=("*layers.1.self_attn*",), scheme=W8A16),
        Rule(include=("*layers.1.mlp*", "*layers.2.mlp*"), scheme=W4A4),
        Rule(scheme=FLOAT),
    ),
)
"""All of them in one model; down_proj of the last layers is behind an online rotation."""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype], Program]:
    """Family and dtype to a captured tiny model on disk."""

    def made(family: str, dtype: torch.dtype) -> Program:
        config = DENSE[family]()
        config.intermediate_size, config.dtype = 128, dtype
        if family == "qwen3":
            config.head_dim = 32  # FlatQuant's kernel does not split 4 heads of 24
        path = tmp_path_factory.mktemp(family)
        build(config, dtype=dtype).save_pretrained(path)
        return capture(path, certify=False)

    return made


def options(**rest: Any) -> Options:
    return Options(samples=2, length=24, tokenizer=character_tokenizer(), **rest)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(TEXT * 8, encoding="utf-8")
    return path


@pytest.mark.broad
def test_all_types_in_one_model_of_every_family_and_dtype(program: Any, text: Path, tmp_path: Path) -> None:
    outs: dict[Path, str] = {}
    passes = "online_rotation{include=*layers.1.mlp.down_proj+*layers.2.mlp.down_proj},linear_quant"
    for family in FAMILIES:
        for dtype in DTYPES:
            out = tmp_path / f"{family}-{dtype}"
            compile(program(family, dtype), passes, out, options(scheme=EVERY, calib=(text,)))
            outs[out] = family
            described = json.loads((out / "quant_model_description.json").read_text())
            assert {v for k, v in described.items() if k.endswith(".weight")} == set(TYPES)
    assert {str(out): errors for out, (errors, _) in judge(list(outs)).items() if errors} == {}


@pytest.mark.slow
def test_every_type_of_every_family_and_dtype(program: Any, text: Path, tmp_path: Path) -> None:
    outs: list[Path] = []
    for family in FAMILIES:
        for dtype in DTYPES:
            captured = program(family, dtype)
            for kind, (passes, scheme) in TYPES.items():
                outs.append(tmp_path / f"{family}-{dtype}-{kind}")
                compile(captured, passes, outs[-1], options(scheme=scheme, calib=(text,)))
    assert {str(out): errors for out, (errors, _) in judge(outs).items() if errors} == {}


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_of_smollm2(dtype: torch.dtype, smollm2: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(smollm2, source)
    if dtype == torch.float16:
        for file in source.glob("*.safetensors"):
            tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
            save_file(tensors, file, metadata={"format": "pt"})
        config = json.loads((source / "config.json").read_text())
        config.pop("torch_dtype", None)
        (source / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    captured = capture(source, certify=False)
    for kind, (passes, scheme) in TYPES.items():
        out = tmp_path / kind
        compile(captured, passes, out, Options(scheme=scheme, samples=2, length=64))
        errors, _ = judge([out])[out]
        shutil.rmtree(out)
        assert errors == [], kind
