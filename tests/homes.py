"""Tiny checkpoints on disk with their programs, compiled and read back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.random_llama import character_tokenizer
from qc.compiler.capture import capture
from qc.compiler.compile import Options, Result, compile
from qc.compiler.expert_weights import checkpoint
from qc.compiler.program import Program
from tests.families import build
from tests.programs import captured, config_of

TEXT = "the quick brown fox jumps over the lazy dog; "
SAMPLES: dict[str, Any] = {"samples": 15, "length": 24}


@dataclass(frozen=True)
class Home:
    """A tiny model on disk: its directory, its program, a calibration file beside it."""

    path: Path
    program: Program
    text: Path


def homes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Home]:
    """Family to a checkpoint and its program. Small weights do not blow noise up layer by layer."""

    @cache
    def made(family: str) -> Home:
        path, model = tmp_path_factory.mktemp(family), build(config_of(family))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim > 1 and "embed" not in name and "wte" not in name:
                    weight.mul_(0.5)
        model.save_pretrained(path)
        character_tokenizer().save_pretrained(path)
        text = tmp_path_factory.mktemp("text") / "calibration.txt"
        text.write_text(TEXT * 8, encoding="utf-8")
        if family == "llama-128":
            return Home(path, capture(path, certify=False), text)
        source = checkpoint(path, captured(family).root)
        program = replace(captured(family), path=str(path), source=source, ties=dict(source.ties))
        return Home(path, program, text)

    return made


def compiled(home: Home, out: Path, passes: str, **options: Any) -> Result:
    chosen = Options(calib=(home.text,), tokenizer=character_tokenizer(), **{**SAMPLES, **options})
    return compile(home.program, passes, out, chosen)


def rows() -> tuple[Tensor, Tensor]:
    """Windows of the calibration text (a static range holds for what was seen), and their mask."""
    ids = torch.tensor(character_tokenizer()(TEXT * 2)["input_ids"][:72]).view(3, 24)
    return ids, torch.ones_like(ids)


def logits(model: Any) -> Tensor:
    ids, mask = rows()
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits.float()[mask.bool()]


def tensors_of(out: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(out.glob("*.safetensors")):
        found |= load_file(file)
    return found
