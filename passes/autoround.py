"""AutoRound: rounding learned block by block, from a closed-form start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..compiler.contract import LOSSY, Answer, Fact, Pass, Rewrite, Setting
from ..compiler.edit import Edit, Verb
from ..compiler.fake_quant import fake_act
from ..compiler.operand import Quantize
from ..compiler.pattern import Site
from ..compiler.program import Program
from ..compiler.scheme import LinearScheme
from ..compiler.view import BlockView
from ..patterns.linear import linear
from ..runtime.quantized import QuantizedLinear
from .gptq import gptq
from .linear_quant import swaps
from .minmax import input_range, minmax_weight, scale_dtype
from .scale_search import search_scale
from .sign_sgd import Rounding, train
from .sites import block_linears

LEARNED_BITS = 4
"""Widest integers that are worth a search: 8 bits are rounded to nearest."""


class Reached(Exception):
    """The linears of interest have been seen: the rest of the block need not run."""


@dataclass(frozen=True, kw_only=True)
class AutoRound(Pass):
    """Learn the rounding of all linears of a block together.

    **Why.** At 4 bits the nearest integer is not the best one: what matters is what the block computes.

    **Before / after.** As ``linear_quant``, with other integers. Scales come from a clip search weighted by the
    inputs, integers from GPTQ on the quantized inputs in the order of the dataflow, then SignSGD moves offsets
    and scales towards the float block's output. The best state on held-out calibration data is kept, the
    untrained one included. Linears of 8 bits are rounded to nearest and take part as they are.

    **Source.** AutoRound (arXiv 2309.05516), GPTQ (arXiv 2210.17323).
    """

    name = "autoround"
    summary = "replace linears by integer ones, with rounding learned block by block"
    patterns = (linear,)
    requires = frozenset()
    provides = frozenset({Fact.QUANTIZED})
    breaks = frozenset()
    before = {}
    after = {}
    claim = LOSSY

    iters: int = 50
    """Steps of SignSGD per block, one microbatch each."""
    enable_round_tuning: bool = True
    """Train rounding offsets."""
    enable_minmax_tuning: bool = True
    """Train scales."""
    quantized_input: bool = True
    """Train on what the quantized blocks before hand on; false is the reference tool's float chain."""
    include: tuple[str, ...] = ("*",)
    """Globs of linears."""
    exclude: tuple[str, ...] = ()
    """Globs of linears that stay as they are."""

    def __post_init__(self) -> None:
        if self.iters < 0:
            raise ValueError(f"iters={self.iters}: it must not be negative")

    @property
    def needs_training(self) -> bool:
        """It runs the block with gradients."""
        return True

    @property
    def propagates_quantized(self) -> bool:
        """Whether blocks see quantized inputs."""
        return self.quantized_input

    def rewrite(self, program: Program, setting: Setting) -> Answer:
        """One rewrite per block, over all its linears that are to be quantized."""
        chosen, problems = swaps(program, setting, self.include, self.exclude)
        parts = block_linears(program)
        by_block: dict[int, list[Edit]] = {}
        for name, operand in chosen.items():
            by_block.setdefault(parts[name], []).append(Edit(Verb.SWAP, Site(name), operand))
        names = {part.index: part.name for part in program.parts}
        rewrites = tuple(
            Rewrite(self.name, "linear", names[index], tuple(edits), LOSSY)
            for index, edits in by_block.items()
        )
        return Answer(rewrites, (), problems)

    def solve(self, rewrite: Rewrite, view: BlockView) -> Mapping[Any, QuantizedLinear]:
        """The start for every linear in the order of the dataflow, then training of all of them."""
        return _Block(self, rewrite, view).solve()


class _Block:
    """The linears of one block while they are solved."""

    def __init__(self, options: AutoRound, rewrite: Rewrite, view: BlockView) -> None:
        self.options, self.view, self.where = options, view, rewrite.where
        self.swaps: dict[str, Quantize] = {}
        for edit in rewrite.edits:
            assert isinstance(edit.operand, Quantize)
            self.swaps[edit.site.module] = edit.operand
        self.done: dict[str, QuantizedLinear] = dict(view.quantized)
        self.weights: dict[str, Tensor] = {}
        self.roundings: dict[str, Rounding] = {}

    def solve(self) -> Mapping[Any, QuantizedLinear]:
        for group in self.groups():
            self.start(group)
        if self.roundings:
            self.train()
        return {operand.slot: self.done[name] for name, operand in self.swaps.items()}

    def groups(self) -> list[tuple[str, ...]]:
        """Linears that read the same value, in the order of the dataflow."""
        return list(dict.fromkeys(self.view.together(name) for name in self.swaps))

    def scheme(self, name: str) -> LinearScheme:
        return self.swaps[name].scheme

    def start(self, group: tuple[str, ...]) -> None:
        """Closed-form integers of linears that read one value, with everything before them quantized."""
        mine = [name for name in group if name in self.swaps]
        wanting = [name for name in mine if self.learned(name)]
        hessian = self.hessian(wanting[0]) if wanting else None
        for name in mine:
            scheme, bits = self.scheme(name), self.scheme(name).weight
            assert bits is not None
            range_of = self.swaps[name].slot.needs
            scale, offset = (
                input_range(self.view.statistic(range_of[0]), scheme, self.view.export_dtype)
                if scheme.static else (None, None)
            )  # fmt: skip
            q = minmax_weight(self.view, name, scheme, input_scale=scale, input_offset=offset)
            if hessian is not None and name in wanting:
                weight, held = self.view.weight(name), scale_dtype(self.view, name, scheme)
                found = search_scale(weight, bits.bits, bits.group, held, hessian.diagonal())
                integers, compensated = gptq(weight, found, hessian, bits.bits)
                q = _with(q, integers.to(torch.int8), found)
                self.roundings[name] = Rounding(compensated, found, bits.bits, held)
            self.done[name] = q
            self.weights[name] = _dense(q)

    def learned(self, name: str) -> bool:
        weight = self.scheme(name).weight
        return weight is not None and weight.bits <= LEARNED_BITS

    @torch.no_grad()
    def hessian(self, name: str) -> Tensor:
        """``X Xᵀ / n`` [in, in] of the quantized input of a linear."""
        total: Tensor | None = None
        rows = 0

        def hook(at: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            nonlocal total, rows
            if at != name:
                return self.run(at, x, weight, bias)
            flat = self.act(at, x).reshape(-1, x.shape[-1]).float()
            total = flat.T @ flat if total is None else total.addmm_(flat.T, flat)
            rows += len(flat)
            raise Reached

        assert self.view.forward is not None
        for index in range(self.view.batches):
            try:
                self.view.forward(hook, index)
            except Reached:
                continue
        assert total is not None, f"{name} was not run"
        return total / rows

    def act(self, name: str, x: Tensor) -> Tensor:
        """The input of a linear on its grid; the gradient passes straight through."""
        scheme = self.scheme(name) if name in self.swaps else None
        if scheme is None or scheme.act is None:
            return x
        found = self.done.get(name)
        with torch.no_grad():
            clean = x.detach()
            change = fake_act(clean, scheme, found or QuantizedLinear(x[:0], x[:0])) - clean
        return x + change

    def run(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A linear in its present state: trained, started, or still float."""
        if name in self.roundings and name in self.weights:
            rounding = self.roundings[name]
            weight = rounding.fake() if torch.is_grad_enabled() or self.training else self.weights[name]
        elif name in self.weights:
            weight = self.weights[name]
        x = self.act(name, x) if name in self.done else x
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    training = False

    def train(self) -> None:
        """SignSGD on all learned linears, towards the float output of the block."""
        view, options = self.view, self.options
        assert view.forward is not None and view.target is not None
        forward, target = view.forward, view.target
        indices = list(range(view.batches))
        held = indices[-max(1, len(indices) // 8) :] if len(indices) > 1 else indices
        training = [i for i in indices if i not in held] or indices

        def loss(index: int) -> Tensor:
            want = target(index).float()
            got = forward(self.run, index).float()
            size = want.square().mean(-1, keepdim=True).clamp(min=1e-12)
            return ((got - want).square() / size).mean()

        self.training = True
        train(
            self.roundings, loss, training, held, iters=options.iters,
            round_tuning=options.enable_round_tuning, scale_tuning=options.enable_minmax_tuning,
            generator=view.generator(self.where), report=view.report,
        )  # fmt: skip
        with torch.no_grad():
            for name, rounding in self.roundings.items():
                scale = rounding.current_scale()
                self.done[name] = _with(self.done[name], rounding.integers(scale).to(torch.int8), scale)


def _with(q: QuantizedLinear, integers: Tensor, scale: Tensor) -> QuantizedLinear:
    """The same linear with other integers and scales."""
    return QuantizedLinear(
        integers, scale.detach(), q.bias, q.input_scale, q.input_offset, q.left, q.right, q.clip
    )  # fmt: skip


def _dense(q: QuantizedLinear) -> Tensor:
    """The weight that the integers stand for, float32."""
    return q.weight.float() * q.scale.repeat_interleave(q.weight.shape[1] // q.scale.shape[1], dim=1)
