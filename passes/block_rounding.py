"""The linears of one block while their integers are found: a closed-form start, then training of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isfinite

import torch
from torch import Tensor
from torch.nn import functional as F

from ..compiler.errors import Failed
from ..compiler.fake_quant import fake_act
from ..compiler.operand import Quantize
from ..compiler.scheme import LinearScheme
from ..compiler.view import BlockView
from ..compiler.walk import Walk
from ..runtime.outlier_weights import OutlierWeights, to_csr
from ..runtime.quantized import QuantizedLinear
from .act_clip import ClipSearch
from .act_range import static_range
from .column_rounding import gptq, inverse_diagonal
from .gram import Gram
from .importance import relative_error, token_importance
from .minmax import rounded_weight, scale_dtype
from .outlier_search import outlier_mask
from .sign_sgd import Rounding, train
from .weight_scale import weight_grid

LEARNED_BITS = 4
"""Widest integers that are worth training: 8 bits are rounded to nearest."""
NOT_FINITE = (
    "its outputs are not finite on the calibration text. Look for inf or NaN in the weights before it, or calibrate in"
    " --dtype float32"
)
HELD_OUT = 8
"""One microbatch in so many is kept for choosing among states."""


@dataclass(frozen=True)
class Start:
    """How the closed-form start is found."""

    bits: int = LEARNED_BITS
    """Widest integers that are searched; the others are rounded to nearest."""
    damping: float = 0.01
    act_order: bool = True
    weighted: bool = True
    """Whether tokens weigh as much as an error there moves the output of the block."""


@dataclass(frozen=True)
class Training:
    """How long to train, and what."""

    iters: int
    round_tuning: bool
    scale_tuning: bool
    quantized_act: bool = True

    @property
    def moves(self) -> bool:
        """Whether anything is trained at all."""
        return self.iters > 0 and (self.round_tuning or self.scale_tuning)


class BlockRounding:
    """One block: ``swaps`` names the linears to be quantized, ``view`` holds their weights and runs the block."""

    def __init__(
        self, swaps: Mapping[str, Quantize], view: BlockView, where: str, begin: Start | None = None
    ) -> None:
        self.swaps, self.view, self.where, self.begin = swaps, view, where, begin or Start()
        self.done: dict[str, QuantizedLinear] = dict(view.quantized)
        self.weights: dict[str, Tensor] = {n: q.dense for n, q in self.done.items()}
        self.roundings: dict[str, Rounding] = {}
        self.walk: Walk | None = None
        self.ahead: list[tuple[str, ...]] = []
        """What ``groups`` says."""
        self.trains = self.training = False
        self.quantized_act = True

    def solve(self, training: Training | None = None) -> Mapping[str, QuantizedLinear]:
        """The quantized linears by name; None keeps the start."""
        self.trains = training is not None and training.moves
        self.quantized_act = training is None or training.quantized_act
        for name in self.swaps:
            self.done[name] = self.nearest(name)
            if not self.learned(name):
                self.weights[name] = self.done[name].dense
        self.ahead = self.groups()
        importance: list[dict[str, Tensor]] = []
        if self.ahead and self.begin.weighted:
            importance = token_importance(
                self.view, {name for group in self.ahead for name in group}, self.where
            )
        self.walk = self.view.walk() if self.ahead and self.view.walk is not None else None
        for group in self.ahead:
            self.start(group, importance)
        if self.walk is not None and not self.trains:
            self.view.report("to its end")
            for index in range(self.view.batches):
                self.walk.finish(index, self.run)
        self.walk = None
        if self.roundings and training is not None:
            self.train(training)
        return {name: self.done[name] for name in self.swaps}

    def groups(self) -> list[tuple[str, ...]]:
        """Linears whose integers are searched for, those that read one value together, in the order of the dataflow."""
        learned = [name for name in self.swaps if self.learned(name)]
        groups = dict.fromkeys(self.view.together(name) for name in learned)
        return [tuple(name for name in group if name in learned) for group in groups]

    def scheme(self, name: str) -> LinearScheme:
        """The scheme of a linear that is to be quantized."""
        return self.swaps[name].scheme

    def learned(self, name: str) -> bool:
        """Whether the integers of a linear are searched for."""
        weight = self.scheme(name).weight
        return weight is not None and weight.bits <= self.begin.bits

    def start(self, group: tuple[str, ...], importance: list[dict[str, Tensor]]) -> None:
        """Closed-form integers of linears that read one value, with everything before them quantized."""
        rows = [torch.stack([weights[name] for name in group]).mean(0) for weights in importance]
        self.clip(group, rows)
        hessian = self.hessian(group[0], rows)
        for alike in self.alike(group):
            self.search(alike, hessian)
        for name in group:
            self.weights[name] = self.done[name].dense

    def nearest(self, name: str) -> QuantizedLinear:
        """Rounded to nearest in its whole range."""
        swap = self.swaps[name]
        statistics = {need.kind: self.view.statistic(need) for need in swap.slot.needs}
        scale, offset = static_range(statistics, swap, self.view.export_dtype)
        return rounded_weight(self.view, name, swap.scheme, input_scale=scale, input_offset=offset)

    def clip(self, names: tuple[str, ...], importance: list[Tensor]) -> None:
        """One clip ratio for the activation that these linears read, where their format has a place for it."""
        q = self.done[names[0]]
        if q.left is None or q.online is not None:
            return
        scheme = self.scheme(names[0])
        search = ClipSearch(
            [self.view.weight(name) for name in names],
            lambda x, ratio: fake_act(x, scheme, replace(q, clip=ratio)),
        )
        batches = range(0, self.view.batches, max(1, self.view.batches // 2))
        even = lambda x: x.new_ones(len(x), dtype=torch.float32)  # noqa: E731
        self.each_input(
            names[0], batches, lambda index, x: search.add(x, importance[index] if importance else even(x))
        )
        for name in names:
            self.done[name] = replace(self.done[name], clip=search.best)

    def hessian(self, name: str, importance: list[Tensor]) -> Tensor:
        """``X diag(importance) Xᵀ / n`` [in, in] of the quantized input of a linear; no importance weighs all alike."""
        gram = Gram()

        def add(index: int, x: Tensor) -> None:
            rows = self.act(name, x).float()
            gram.add(rows * importance[index].sqrt()[:, None] if importance else rows)

        self.each_input(name, range(self.view.batches), add)
        return gram.mean  # zero for an expert that nothing is sent to

    @torch.no_grad()
    def each_input(self, name: str, batches: range, take: Callable[[int, Tensor], None]) -> None:
        """Hand ``take`` the input [rows, in] of a linear, microbatch by microbatch, all before it quantized."""
        assert self.walk is not None
        last = self.trains and name == self.ahead[-1][0]
        for index in batches:
            x = self.walk.input(name, index, self.run, last=last)
            take(index, x.reshape(-1, x.shape[-1]))

    def alike(self, names: tuple[str, ...]) -> list[list[str]]:
        """Linears whose weights get integers of one kind, and share no scale: they are searched as one."""
        found: dict[object, list[str]] = {}
        for name in names:
            weight = self.scheme(name).weight
            own = name if weight is not None and weight.per == "tensor" else ""
            kind = (weight, scale_dtype(self.view, name, self.scheme(name)), own)
            found.setdefault(kind, []).append(name)
        return list(found.values())

    def search(self, names: list[str], hessian: Tensor) -> None:
        """Scales by search, integers by GPTQ, for linears that read one value."""
        bits, held = self.scheme(names[0]).weight, scale_dtype(self.view, names[0], self.scheme(names[0]))
        assert bits is not None
        weight, outliers = torch.cat([self.view.weight(name) for name in names]), None
        try:
            if self.scheme(names[0]).outliers:
                outliers = torch.cat([self.outliers(name, hessian, held) for name in names])
            kept = weight if outliers is None else weight.masked_fill(outliers, 0.0)
            scale, offset = weight_grid(kept, bits, held, "clip", hessian.diagonal())
            integers, compensated = gptq(
                weight, scale, hessian, bits.bits, self.begin.damping, self.begin.act_order, offset,
                outliers, self.view.export_dtype,
            )  # fmt: skip
        except ValueError as error:
            raise Failed(
                f"{names[0]} in {self.where}: {error}. Look at its inputs on the calibration text, exclude it, or"
                " calibrate in --dtype float32"
            ) from None
        rows = [self.view.weight(name).shape[0] for name in names]
        empty = torch.empty(sum(rows), 0)
        pieces = (
            tensor.split(rows)
            for tensor in (integers.to(torch.int8), compensated, scale, empty if offset is None else offset)
        )
        for name, integer, target, step, zero in zip(names, *pieces, strict=True):
            zero = zero if zero.numel() else None
            self.done[name] = replace(self.done[name], weight=integer, scale=step, offset=zero)
            if outliers is not None:
                mask, outliers = outliers[: len(integer)], outliers[len(integer) :]
                single = to_csr(mask, target.to(self.view.export_dtype))
                self.done[name] = replace(self.done[name], beside={**self.done[name].beside, **single})
            if self.trains:
                self.roundings[name] = Rounding(target, step, bits.bits, held, bits.per == "tensor", zero)

    def outliers(self, name: str, hessian: Tensor, held: torch.dtype) -> Tensor:
        """Mask [out, in] of the single weights of a linear that its scheme keeps in float."""
        weight, scheme = self.view.weight(name), self.scheme(name)
        assert scheme.weight is not None
        count = OutlierWeights.of_share(scheme.outliers, weight.numel()).count
        sensitivity = 1 / inverse_diagonal(hessian, self.begin.damping)
        return outlier_mask(weight, scheme.weight, held, sensitivity, count)

    def act(self, name: str, x: Tensor) -> Tensor:
        """The input of a quantized linear on its grid; the gradient passes straight through."""
        scheme = self.scheme(name) if name in self.swaps else self.view.schemes[name]
        if scheme.act is None:
            return x
        with torch.no_grad():
            clean = x.detach()
            gridded = fake_act(clean, scheme, self.done[name])
        return x + (gridded - clean) if x.requires_grad else gridded

    def run(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A linear in its present state: trained, started, or still float."""
        if self.training and name in self.roundings:
            weight = self.view.made(lambda: self.roundings[name].fake(x.dtype))
        elif name in self.weights:
            weight = self.weights[name] = self.weights[name].to(x.dtype)
        on_grids = name in self.weights and (self.quantized_act or not self.training)
        x = self.act(name, x) if on_grids else x
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def train(self, training: Training) -> None:
        """Move the offsets of all learned linears towards the float output of the block."""
        view = self.view
        assert view.forward is not None
        assert view.target is not None
        forward, target = view.forward, view.target
        indices = list(range(view.batches))
        held = indices[HELD_OUT - 1 :: HELD_OUT] or indices[-1:]
        self.training = True
        losses = train(
            self.roundings, lambda index: relative_error(forward(self.run, index), target(index)),
            [i for i in indices if i not in held] or indices, held, iters=training.iters,
            round_tuning=training.round_tuning, scale_tuning=training.scale_tuning,
            generator=view.generator(self.where), report=view.report,
        )  # fmt: skip
        if not isfinite(losses.start):
            raise Failed(f"{self.where}: {NOT_FINITE}")
        losses.tell(view)
        for name, rounding in self.roundings.items():
            integers, scale = rounding.result()
            self.done[name] = replace(self.done[name], weight=integers, scale=scale)
