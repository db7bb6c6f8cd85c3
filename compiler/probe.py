"""What a leaf is, found from its ops and by running it: a linear, an embedding, a norm, or something else."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from .canon import aten, cast_dtype, op_name, symbolic
from .interpret import Semantics, interpret
from .program import Kind, Norm

LAYOUT = frozenset({"view", "reshape", "_unsafe_view"})
ROWS = 6
TIGHT = 1e-9
"""Largest relative error at which a leaf still is the norm that it was taken for."""


def _compute(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_function" and not symbolic(n)]


def _sizes(val: Tensor) -> list[str]:
    return [str(size) for size in val.shape]


def _is_attr(value: object, name: str) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr" and value.target == name


def _uncast(value: object) -> object:
    """A value before the casts that were made of it."""
    while isinstance(value, fx.Node) and cast_dtype(value) is not None:
        value = value.args[0]
    return value


def _held(value: object) -> bool:
    """Whether a value is a tensor of the leaf itself."""
    return isinstance(value, fx.Node) and value.op == "get_attr"


def linear(graph: fx.Graph) -> bool | None:
    """Whether the weight is stored as [in, out], for a graph that is one linear; None for any other graph.

    Weight and bias may be cast (a router of experts computes in float32).
    """
    ops = [n for n in _compute(graph) if not _held(_uncast(n))]
    if len(ops) == 1 and ops[0].target is aten.linear.default:
        x, *held = [*ops[0].args, None][:3]
        weight, bias = map(_uncast, held)
        if not _is_attr(weight, "weight") or not (bias is None or _is_attr(bias, "bias")):
            return None
        return False if isinstance(x, fx.Node) and x.op == "placeholder" else None
    core = [n for n in ops if op_name(n) not in LAYOUT]
    if _is_product(ops):
        return False
    if len(core) == 1 and core[0].target is aten.addmm.default:
        args = core[0].args
        (given,) = (n for n in graph.nodes if n.op == "placeholder")
        val, result = given.meta["val"], next(iter(reversed(graph.nodes))).args[0]
        if (
            len(args) == 3
            and not core[0].kwargs
            and _is_attr(args[0], "bias")
            and _is_attr(args[2], "weight")
        ):
            same = isinstance(result, fx.Node) and _sizes(result.meta["val"])[:-1] == _sizes(val)[:-1]
            return True if same else None
    return None


def _is_product(ops: list[fx.Node]) -> bool:
    """Whether ops are ``x @ weight.T``, or that plus the bias."""
    turned = [n for n in ops if op_name(n) in ("numpy_T", "t", "transpose") and _is_attr(n.args[0], "weight")]
    rest = [n for n in ops if n not in turned]
    if len(turned) != 1 or not 1 <= len(rest) <= 2 or rest[0].target is not aten.matmul.default:
        return False
    x, weight = rest[0].args
    if not (isinstance(x, fx.Node) and x.op == "placeholder" and weight is turned[0]):
        return False
    sums = rest[1:]
    return all(
        n.target is aten.add.Tensor and n.args[0] is rest[0] and _is_attr(n.args[1], "bias") and not n.kwargs
        for n in sums
    )


def embedding(graph: fx.Graph) -> bool:
    """Whether the graph looks rows up in a table named ``weight`` and does nothing else."""
    ops = _compute(graph)
    if len(ops) != 1 or ops[0].target is not aten.embedding.default:
        return False
    table, *_ = ops[0].args
    return _is_attr(table, "weight")


def norm(graph: fx.Graph, parameters: Mapping[str, tuple[int, ...]]) -> Norm | None:
    """The norm that a graph computes over the last axis of its only input, or None where it is not a norm.

    Run in float64 on random numbers: weights of zero and one give the offset, tiny inputs give eps, shifted
    ones say whether the mean is subtracted; then the formula has to reproduce fresh random inputs and
    weights.
    """
    given = [n for n in graph.nodes if n.op == "placeholder"]
    result = next(iter(reversed(graph.nodes))).args[0]
    if len(given) != 1 or not isinstance(result, fx.Node) or set(parameters) - {"weight", "bias"}:
        return None
    val, out = given[0].meta.get("val"), result.meta.get("val")
    if not isinstance(val, Tensor) or not isinstance(out, Tensor) or not val.is_floating_point():
        return None
    if val.ndim != out.ndim or val.ndim == 0 or not isinstance(val.shape[-1], int):
        return None
    width = val.shape[-1]
    if any(shape[-1:] != (width,) for shape in parameters.values()):
        return None
    if any(op_name(n) == "rms_norm" and (n.args[3:] or (None,))[0] is None for n in _compute(graph)):
        return None  # an eps that follows the dtype is no number that could be kept
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    heads = tuple(next((s[:-1] for s in parameters.values() if len(s) > 1), ()))
    inner = tuple(d if isinstance(d, int) else 3 for d in val.shape[:-1])
    lead = (*inner[: len(inner) - len(heads)], *heads)

    def run(x: Tensor, weight: float | Tensor, bias: float | Tensor) -> Tensor:
        given_values = {"weight": weight, "bias": bias}
        tensors = {
            name: torch.as_tensor(given_values[name], dtype=torch.float64).expand(shape).clone()
            for name, shape in parameters.items()
        }
        return interpret(graph, [x], tensors, Semantics(val.dtype, torch.float64))

    def formula(x: Tensor, found: Norm, weight: Tensor, bias: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if found.mean_subtracting else x
        y = x / torch.sqrt(x.square().mean(-1, keepdim=True) + found.eps)
        y = y * (weight + found.offset) if found.weight else y
        return y + bias if found.bias else y

    try:
        x = draw(*lead, width) + 0.5
        one, zero = run(x, 1.0, 0.0), run(x, 0.0, 0.0)
        unit = one - zero if "weight" in parameters else one
        if one.shape != x.shape or not unit.abs().max() > 0:
            return None
        offset = 0.0 + float((zero / unit).median().round(decimals=6)) if "weight" in parameters else 0.0
        shifted = run(x + 3.0, 1.0, 0.0)
        centred = bool((shifted - one).norm() < 1e-6 * one.norm())
        small = 1e-4 * draw(*lead, width)
        y = run(small, 1.0, 0.0) / (1.0 + offset if "weight" in parameters else 1.0)
        part = small - small.mean(-1, keepdim=True) if centred else small
        eps = float(((part / y).square() - part.square().mean(-1, keepdim=True)).median())
        found = Norm(
            mean_subtracting=centred,
            offset=offset,
            bias="bias" in parameters,
            weight="weight" in parameters,
            eps=_written(graph, eps),
            width=width,
        )
        for scale in (1e-3, 1.0, 30.0):
            x, weight, bias = (
                scale * draw(*lead, width) + scale,
                draw(*(parameters.get("weight") or (1,))),
                draw(*(parameters.get("bias") or (1,))),
            )
            got, want = run(x, weight, bias), formula(x, found, weight, bias)
            if not (got - want).norm() <= TIGHT * want.norm():
                return None
    except (RuntimeError, IndexError, TypeError, NotImplementedError):
        return None  # does not even run on rows of its width: whatever it is, it is not a norm
    return found


def _written(graph: fx.Graph, eps: float) -> float:
    """The number in the graph's text that a measured eps stands for, or the measured one."""
    numbers = [a for n in _compute(graph) for a in (*n.args, *n.kwargs.values()) if isinstance(a, float)]
    near = [n for n in numbers if abs(n - eps) <= 1e-3 * abs(n)]
    return near[0] if near else eps


def kind_of(graph: fx.Graph, parameters: Mapping[str, tuple[int, ...]]) -> tuple[Kind, Norm | None, bool]:
    """Kind of a leaf with the facts that belong to it: (kind, norm, weight stored transposed)."""
    transposed = linear(graph)
    if transposed is not None:
        return "linear", None, transposed
    if embedding(graph):
        return "embedding", None, False
    found = norm(graph, parameters)
    return ("norm", found, False) if found else ("opaque", None, False)
