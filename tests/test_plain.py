"""A decoder that a user wrote, of no Hugging Face class, compiles through the same path."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import qc
from benchmarks.random_llama import character_tokenizer
from qc.compiler.execute import run

pytestmark = pytest.mark.broad

WIDTH, HEADS, ROWS = 32, 4, 96


class RootMeanSquare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Mixer(nn.Module):
    """Attention with names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.ask, self.key, self.say = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.back = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (one(x).view(b, s, HEADS, -1).transpose(1, 2) for one in (self.ask, self.key, self.say))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.back(y.transpose(1, 2).reshape(b, s, WIDTH))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.open, self.wide = nn.Linear(WIDTH, 64, bias=False), nn.Linear(WIDTH, 64, bias=False)
        self.narrow = nn.Linear(64, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(F.silu(self.open(x)) * self.wide(x))


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = RootMeanSquare(), RootMeanSquare()
        self.mixer, self.gated = Mixer(), Gated()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.before(x))
        return x + self.gated(self.between(x))


class Attributes(nn.Module):
    """Blocks are attributes, and a plain list has them in order."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(ROWS, WIDTH)
        self.places = nn.Embedding(64, WIDTH)
        self.make()
        self.last = RootMeanSquare()
        self.out = nn.Linear(WIDTH, ROWS, bias=False)

    def make(self) -> None:
        self.first, self.second = Stage(), Stage()
        self.stages = [self.first, self.second]

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1], device=input_ids.device))
        for stage in self.stages:
            x = stage(x)
        return self.out(self.last(x))


class Hidden(Attributes):
    """Blocks are in a plain list alone: PyTorch knows nothing of them."""

    def make(self) -> None:
        self.stages = [Stage(), Stage()]


class Numbered(Attributes):
    def make(self) -> None:
        self.stages = []
        for i in range(2):
            setattr(self, f"stage{i}", Stage())
            self.stages.append(getattr(self, f"stage{i}"))


NAMES = {
    Attributes: ["first", "second"],
    Hidden: ["stages.0", "stages.1"],
    Numbered: ["stage0", "stage1"],
}


def of(cls: type[Attributes]) -> Attributes:
    torch.manual_seed(0)
    return cls().eval()


@pytest.mark.parametrize("cls", NAMES)
def test_blocks_are_found_wherever_they_are_kept(cls: type[Attributes]) -> None:
    model = of(cls)
    before = list(model.state_dict())
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    program = qc.capture(model, example={"input_ids": ids})
    assert [block.name for block in program.blocks] == NAMES[cls]
    assert list(model.state_dict()) == before
    longer = torch.randint(3, 90, (3, 31), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(run(program, longer, dtype=torch.float32), model(longer))
    listing = qc.show(program)
    assert {"first": "first to second alike", "stages.0": "stages.0..1 alike", "stage0": "stage0..1 alike"}[
        NAMES[cls][0]
    ] in listing


@pytest.mark.parametrize("cls", NAMES)
def test_it_compiles_like_any_other(cls: type[Attributes], tmp_path: Path) -> None:
    model = of(cls)
    program = qc.capture(model, example={"input_ids": torch.zeros(2, 9, dtype=torch.int64)})
    result = qc.compile(
        program, "iter_smooth,quarot,linear_quant", out=tmp_path / "out", scheme="w8a8", target="modelslim",
        samples=4, length=32, tokenizer=character_tokenizer(),
    )  # fmt: skip
    assert [step.what.name for step in result.plan.steps if step.answer.rewrites] == [
        "iter_smooth", "fuse_norms", "rotate_residual", "rotate_heads", "linear_quant",
    ]  # fmt: skip
    assert result.journal.worst < 1e-12
    assert not any(check.wrong for check in qc.verify(tmp_path / "out"))
    (file,) = (tmp_path / "out").glob("*.safetensors")
    stored = load_file(file)
    integers = {name.removesuffix(".weight") for name, tensor in stored.items() if tensor.dtype == torch.int8}
    assert len(integers) == 14
