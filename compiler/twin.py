"""The twin: a narrow copy of an architecture with random weights, small enough to run for real."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from .canon import hint
from .capture_model import weight_dtype
from .program import Program
from .show.text import text

NARROW = 32
"""Sizes are halved no further than this."""
GRAIN = 16
"""Powers of two up to this stay divisors of a size that is halved."""
WINDOW = 8
"""Windows of the twin, so that short inputs are longer than every window."""
SPREAD = 0.2
"""Standard deviation of what is added to a vector parameter (a gain, a bias) of the twin."""


@dataclass(frozen=True)
class Shrunk:
    """A config of a twin and how it was made."""

    config: PretrainedConfig
    layers: int
    narrow: bool


def layers_of_every_kind(program: Program) -> int:
    """Length of the shortest prefix of blocks, two at least, that has every kind and every way to feed one."""
    seen: dict[object, int] = {}
    for number, part in enumerate(program.blocks):
        fed = tuple(
            source.name
            for node in program.nodes(part)
            for source in node.all_input_nodes
            if source.meta["part"] == 0
        )
        seen.setdefault((part.kind, fed), number)
    return min(len(program.blocks), max(2, max(seen.values()) + 1))


def _sizes(program: Program) -> set[int]:
    """Numbers that are sizes of tensors in the graph or of parameters."""
    found: set[int] = set()
    for node in program.graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, Tensor):
            found |= {size for size in val.shape if isinstance(size, int)}
    for leaf in program.leaves.values():
        found |= {size for shape in leaf.parameters.values() for size in shape}
    return found


def _literals(program: Program) -> set[int]:
    """Integers that the prologue computes with: windows and chunks of masks are among them."""
    prologue = program.parts[0]
    return {
        a
        for node in program.nodes(prologue)
        if node.op == "call_function" and not _layout(node)
        for a in node.args
        if type(a) is int
    }


def _layout(node: fx.Node) -> bool:
    words = ("unsqueeze", "view", "reshape", "slice", "transpose", "expand", "sym_size", "cat", "select")
    return any(word in str(node.target) for word in words)


def _holds(now: Mapping[str, int], was: Mapping[str, int], products: bool) -> bool:
    """Whether what was true of the sizes still is: order, divisors, even quotients and, if asked, products."""
    keys = list(was)
    for a in keys:
        if now[a] % math.gcd(was[a], GRAIN):
            return False
        for b in keys:
            if was[a] == was[b] and now[a] != now[b]:
                return False
            if was[a] > was[b] and now[a] <= now[b]:
                return False
            if was[a] % was[b] == 0 and (
                now[a] % now[b] or (was[a] // was[b] % 2 == 0 and now[a] // now[b] % 2)
            ):
                return False
    if products:
        for a in keys:
            for b in keys:
                for c in keys:
                    if was[a] == was[b] * was[c] and now[a] != now[b] * now[c]:
                        return False
    return True


def _narrowed(was: Mapping[str, int], products: bool) -> dict[str, int]:
    """Sizes halved, largest first and one round after another, as long as their relations hold."""
    now = dict(was)
    moved = True
    while moved:
        moved = False
        for key in sorted(now, key=lambda k: (-now[k], k)):
            if now[key] % 2 or now[key] // 2 < NARROW:
                continue
            group = [k for k in now if was[k] == was[key]]
            tried = now | {k: now[key] // 2 for k in group}
            if _holds(tried, was, products):
                now, moved = tried, True
        if products and not moved:
            for left, right in _pairs(now, was):
                tried = now | {k: now[k] // 2 for k in (*left, *right)}
                if _holds(tried, was, products):
                    now, moved = tried, True
                    break
    return now


def _pairs(now: Mapping[str, int], was: Mapping[str, int]) -> Iterator[tuple[list[str], list[str]]]:
    """Groups of equal sizes of which one is the product of the other and something: they shrink together."""
    for a in sorted(was):
        for b in sorted(was):
            if was[a] > was[b] > 1 and was[a] % was[b] == 0:
                left = [k for k in was if was[k] == was[a]]
                right = [k for k in was if was[k] == was[b]]
                if all(now[k] % 2 == 0 and now[k] // 2 >= NARROW // 4 for k in (*left, *right)):
                    yield left, right


def shrunk_configs(program: Program) -> Iterator[Shrunk]:
    """Configs to try for a twin, narrowest first; the last is as wide as the model and cut in depth alone."""
    config = program.config
    layers, count = layers_of_every_kind(program), len(program.blocks)
    sizes, literals = _sizes(program), _literals(program)
    values: dict[str, Any] = config.to_dict()
    numbers = {k: v for k, v in values.items() if type(v) is int and v > 1}
    depth = {k for k, v in numbers.items() if v == count and k not in _also_width(numbers, sizes, count)}
    windows = {k for k, v in numbers.items() if v in literals and v > WINDOW and v not in sizes}
    windows |= {k for k, v in numbers.items() if v in literals and "window" in k}
    fixed = depth | windows | {k for k in numbers if "position" in k}
    widths = {k: v for k, v in numbers.items() if v in sizes and k not in fixed}
    cut: dict[str, Any] = dict.fromkeys(depth, layers) | dict.fromkeys(windows, WINDOW)
    cut |= {k: v[:layers] for k, v in values.items() if isinstance(v, list) and len(v) == count}
    for products in (False, True):
        narrow = _narrowed(widths, products)
        smallest = min((narrow[k] for k in narrow if "vocab" in k), default=None)
        tokens = {
            k: 0
            for k, v in values.items()
            if k.endswith("_token_id") and type(v) is int and smallest is not None and v >= smallest
        }
        yield Shrunk(_rebuilt(config, values, cut | narrow | tokens), layers, True)
    yield Shrunk(_rebuilt(config, values, cut), layers, False)


def _also_width(numbers: Mapping[str, int], sizes: set[int], count: int) -> set[str]:
    """Keys that hold the number of layers but whose names say another count (a model with 32 layers and heads)."""
    if count not in sizes:
        return set()
    return {k for k, v in numbers.items() if v == count and "layer" not in k}


def _rebuilt(config: Any, values: Mapping[str, Any], changes: Mapping[str, Any]) -> PretrainedConfig:
    merged = copy.deepcopy({**values, **changes})
    return type(config).from_dict(merged)


def random_model(config: Any, like: nn.Module | None, dtype: torch.dtype) -> nn.Module:
    """The model of a config on CPU with random float32 weights; its buffers are what it makes in ``dtype``.

    ``like`` is a model whose class, and whose dtype of buffers, it gets instead.
    """
    with torch.random.fork_rng(devices=[]):
        if like is None:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        else:
            assert isinstance(like, PreTrainedModel)
            model = type(like)._from_config(config, dtype=weight_dtype(like))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dtype.is_floating_point:
            parameter.data = random_like(parameter.data, generator)
    return model.eval()


def random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random values for a parameter: a vector stays around its value, a matrix keeps the scale of its input."""
    noise = torch.randn([hint(size) for size in tensor.shape], generator=generator, dtype=torch.float32)
    if tensor.ndim < 2:
        return tensor.detach().float() + SPREAD * noise
    return noise * (2.0 / tensor.shape[-1]) ** 0.5


def outline(program: Program, layers: int) -> str:
    """The text of a program's first layers up to sizes and counts, to compare a model with its twin."""
    sizes = _sizes(program)
    roots = {round(v, 9) for s in sizes if s for v in (s**-0.5, s**0.5, 1 / s)}
    kept = [
        text(program, part=part) for part in (program.parts[0], *program.blocks[:layers], program.parts[-1])
    ]
    words = []
    for word in (
        "\n".join(kept).replace("[", " [ ").replace("]", " ] ").replace(",", " , ").replace(")", " )").split()
    ):
        try:
            number = float(word)
        except ValueError:
            words.append(word)
            continue
        if number.is_integer() or round(number, 9) in roots:
            words.append("#")
        else:
            words.append(word)
    return " ".join(words)
