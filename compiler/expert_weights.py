"""Weights of experts that were split: pieces of the stacks in which transformers holds them, by their own names.

On disk an expert may have tensors of its own (Mixtral, Qwen3-MoE, DeepSeek) or lie in a stack with the others
(GPT-OSS). Names and values of the first kind go to and from disk piece by piece; a stack is read and cut, and
written again when the last of its pieces is there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from .capture_experts import STACKS, Stack, stacks_of
from .safetensors_io import TensorSpec
from .weights import Checkpoint

JOINING = {"MergeModulelist", "Concatenate"}
"""Conversions of transformers that put tensors side by side and change none of them."""


@dataclass(frozen=True)
class Piece:
    """One weight or bias of one linear of one expert, and the stack that holds it."""

    whole: str
    """Name of the stack in the model that transformers builds."""
    stack: Stack
    expert: int
    linear: int

    def of(self, whole: Tensor) -> Tensor:
        """The piece [out, in] or [out] of its stack."""
        return self.stack.piece(whole, self.expert, self.linear)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the piece."""
        _, *rest = self.stack.shape
        out, *inner = rest[::-1] if self.stack.transposed and self.stack.leaf == "weight" else rest
        return (out // len(self.stack.linears), *inner)


def pieces_of(model: nn.Module) -> dict[str, Piece]:
    """Every piece of every stack of a model whose experts were split, by its parameter name."""
    found: dict[str, Piece] = {}
    for name, module in model.named_modules():
        if not hasattr(module, STACKS):
            continue
        for expert in range(stacks_of(module)[0].experts):
            for stack in stacks_of(module):
                for i, linear in enumerate(stack.linears):
                    piece = Piece(f"{name}.{stack.name}", stack, expert, i)
                    found[f"{name}.{expert}.{linear}.{stack.leaf}"] = piece
    return found


def split_state(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model in memory under the names of the same model with its experts split."""
    pieces = pieces_of(model)
    wholes = {piece.whole for piece in pieces.values()}
    kept = {name: tensor for name, tensor in state.items() if name not in wholes}
    return kept | {name: piece.of(state[piece.whole].detach()) for name, piece in pieces.items()}


class SplitCheckpoint(Checkpoint):
    """A checkpoint as the source of a model whose experts were split (``capture_experts.split_experts``).

    Raises:
        Refused: See ``Checkpoint``.
    """

    def __init__(self, path: str | Path, model: nn.Module) -> None:
        self.pieces = pieces_of(model)
        self._waiting: dict[str, dict[str, Tensor]] = {}
        super().__init__(path, model)

    def _state(self, model: nn.Module) -> dict[str, Tensor]:
        state = super()._state(model)
        for name, piece in self.pieces.items():
            own = state.pop(name)
            if piece.whole not in state:
                state[piece.whole] = torch.empty(piece.stack.shape, dtype=own.dtype, device="meta")
        return state

    @cached_property
    def _of_whole(self) -> dict[str, list[str]]:
        """The pieces of each stack."""
        found: dict[str, list[str]] = {}
        for name, piece in self.pieces.items():
            found.setdefault(piece.whole, []).append(name)
        return found

    @cached_property
    def _disk(self) -> dict[str, str]:
        """Pieces that have a tensor of their own on disk, with its name."""
        found: dict[str, str] = {}
        for whole in self._of_whole:
            reading, stack = self._reading(whole), self.pieces[self._of_whole[whole][0]].stack
            if reading.converter is None or reading.first != whole:
                continue
            patterns = list(reading.converter.source_patterns)
            for (disk, pattern), renamed in zip(reading.sources, reading.renamed, strict=True):
                place = place_of(stack, patterns, pattern, renamed)
                if place is not None:
                    expert, linear = place
                    found[f"{whole.removesuffix(stack.name)}{expert}.{linear}.{stack.leaf}"] = disk
        return found

    def _alone(self, name: str) -> bool:
        """Whether a piece is read from and written to a tensor of its own, value by value."""
        converter = self._reading(self.pieces[name].whole).converter
        operations = {type(one).__name__ for one in converter.operations} if converter is not None else set()
        return name in self._disk and operations <= JOINING

    @property
    def together(self) -> tuple[tuple[str, ...], ...]:
        """Linears whose float weights lie in one tensor on disk: all of them are quantized, or none."""
        return tuple(
            tuple(name.rpartition(".")[0] for name in names)
            for names in self._of_whole.values()
            if self.pieces[names[0]].stack.leaf == "weight" and not self._alone(names[0])
        )

    def names(self) -> Iterator[str]:
        """Parameters and persistent buffers of the model with its experts split."""
        for name in super().names():
            yield from self._of_whole.get(name, (name,))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter."""
        return self.pieces[name].shape if name in self.pieces else super().shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Storage dtype of a parameter."""
        return super().dtype(self.pieces[name].whole if name in self.pieces else name)

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read parameters: see ``Checkpoint.load``. Of several pieces of one stack the stack is read once."""
        names = list(names)
        wholes = {self.pieces[name].whole for name in names if name in self.pieces}
        loaded = super().load(name for name in names if name not in self.pieces)
        for whole in wholes:
            (stack,) = super().load([whole]).values()
            loaded |= {n: self.pieces[n].of(stack) for n in self._of_whole[whole] if n in set(names)}
        return {name: loaded[name] for name in names}

    def separable(self, name: str) -> bool:
        """Whether a parameter can be replaced alone: a stack of experts as a whole can (``together``)."""
        return name in self.pieces or super().separable(name)

    def disk_name(self, name: str) -> str:
        """The name under which a tensor is written: that of the input, or one beside the stack that held it."""
        if name not in self.pieces:
            return super().disk_name(name)
        whole, stack = self.pieces[name].whole, self.pieces[name].stack
        if name in self._disk:
            return self._disk[name]
        parent, _, experts = whole.removesuffix(f".{stack.name}").rpartition(".")
        return f"{self._prefix(parent)}.{experts}{name[len(parent) + 1 + len(experts) :]}"

    def disk_tensors(self, name: str, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The tensors on disk that a parameter becomes; those of a stack are told of its last piece."""
        piece = self.pieces.get(name)
        if piece is None:
            return super().disk_tensors(name, spec)
        if self._alone(name):
            return {self._disk[name]: spec}
        if name != self._of_whole[piece.whole][-1]:
            return {}
        return super().disk_tensors(piece.whole, TensorSpec(spec.dtype, piece.stack.shape))

    def to_disk(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Invert ``load``; a stack comes out with the last of its pieces."""
        result = super().to_disk({n: t for n, t in tensors.items() if n not in self.pieces})
        for name, tensor in tensors.items():
            if name not in self.pieces:
                continue
            if self._alone(name):
                result[self._disk[name]] = tensor
                continue
            whole, stack = self.pieces[name].whole, self.pieces[name].stack
            waiting = self._waiting.setdefault(whole, {})
            waiting[name] = tensor
            if len(waiting) == len(self._of_whole[whole]):
                per = len(stack.linears)
                rows = [waiting[n] for n in self._of_whole[whole]]
                pieces = [rows[i : i + per] for i in range(0, len(rows), per)]
                result |= super().to_disk({whole: stack.joined(pieces).contiguous()})
                del self._waiting[whole]
        return result

    def check_finite(self, name: str, tensor: Tensor) -> None:
        """Refuse a loaded weight with NaN or infinity in it, naming its file."""
        super().check_finite(self.pieces[name].whole if name in self.pieces else name, tensor)


def place_of(stack: Stack, patterns: Sequence[str], pattern: str, renamed: str) -> tuple[int, str] | None:
    """Expert and linear of a tensor on disk, by the pattern of transformers' conversion that it matches."""
    found = re.search(pattern.replace(".*.", r"\.(\d+)\."), renamed)
    if len(patterns) != len(stack.linears) or found is None or not found.groups():
        return None
    return int(found.group(1)), stack.linears[patterns.index(pattern)]


def checkpoint(path: str | Path, model: nn.Module) -> Checkpoint:
    """The checkpoint of a model on meta, whose experts may have been split."""
    return SplitCheckpoint(path, model) if pieces_of(model) else Checkpoint(path, model)
