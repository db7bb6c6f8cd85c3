"""Layer error: how far the hidden states of a quantized model are from those of its float reference, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import Refused

FIT = 0.02
"""How far the embeddings may be from each other's rotation, relative; bfloat16 rounds to 0.002."""


@dataclass(frozen=True)
class LayerError:
    """One decoder layer of the quantized model. Errors are roots of means over tokens of relative square errors."""

    layer: str
    own: float
    """Of its output on the hidden states of the float model, relative to what the float layer adds to them."""
    reached: float
    """Of its output when all layers before it are quantized too, relative to the hidden state."""


@torch.no_grad()
def layer_errors(quantized: nn.Module, reference: nn.Module, tokens: Tensor) -> tuple[LayerError, ...]:
    """The errors of every layer on windows of tokens, int64 [windows, length]; one window runs at a time.

    A rotation of the hidden state is found from the embeddings of both models and taken back, so that rotated
    models are measured as any others.

    Raises:
        Refused: The models have no layers in common, or their hidden states no common basis.
    """
    names, own_layers = _layers(quantized)
    reference_names, float_layers = _layers(reference)
    if names != reference_names:
        raise Refused(f"the models have {len(names)} and {len(reference_names)} layers: not the same model")
    turn = _turn(quantized, reference)
    sums = torch.zeros(len(names), 2, dtype=torch.float64)
    for ids in tokens.split(1):
        states = _states(reference, float_layers, ids)
        sums += _window(quantized, own_layers, states, turn, ids)
    means = (sums / len(tokens)).sqrt().tolist()
    return tuple(LayerError(name, own, reached) for name, (own, reached) in zip(names, means, strict=True))


def _layers(model: nn.Module) -> tuple[list[str], list[nn.Module]]:
    """The decoder layers of a model of transformers, by name."""
    config: Any = getattr(model, "config", None)
    count = getattr(config.get_text_config(), "num_hidden_layers", None) if config is not None else None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return [f"{name}.{i}" for i in range(len(module))], list(module)
    raise Refused(f"{type(model).__name__}: no list of {count} decoder layers is in it; leave --by layer out")


def _turn(quantized: Any, reference: Any) -> Tensor | None:
    """Q [h, h] with hidden = float hidden · Q, from the embeddings; None where both are in one basis."""
    ours, theirs = (
        m.get_input_embeddings().get_parameter("weight").to(torch.float64) for m in (quantized, reference)
    )
    if ours.shape != theirs.shape:
        raise Refused(f"embeddings are {list(ours.shape)} and {list(theirs.shape)}: not the same model")
    if _relative(ours - theirs, theirs) < FIT:
        return None
    left, _, right = torch.linalg.svd(theirs.T @ ours)
    turn = left @ right
    if ours.shape[0] < ours.shape[1] or _relative(theirs @ turn - ours, ours) > FIT:
        raise Refused(
            "the embedding of the quantized model is no rotation of the reference's, so that their hidden states"
            " cannot be compared: leave --by layer out"
        )
    return turn.to(torch.float32)


def _relative(difference: Tensor, whole: Tensor) -> float:
    return float(difference.norm() / whole.norm())


def _states(model: nn.Module, layers: Sequence[nn.Module], ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What each layer reads and makes, float32."""
    found: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        found.append((_first(args, kwargs).float(), _hidden(out).float()))

    _run(model, layers, [keep] * len(layers), ids)
    return found


def _window(
    model: nn.Module,
    layers: Sequence[nn.Module],
    states: Sequence[tuple[Tensor, Tensor]],
    turn: Tensor | None,
    ids: Tensor,
) -> Tensor:
    """Mean square errors of one window, [layers, 2]."""
    sums = torch.zeros(len(layers), 2, dtype=torch.float64)

    def compare(index: int) -> Any:
        before, after = states[index]

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            given = _first(args, kwargs)
            same = (before if turn is None else before @ turn).to(given.dtype)
            if args:
                args = (same, *args[1:])
            else:
                kwargs = kwargs | {"hidden_states": same}
            alone, reached = (
                hidden.float() if turn is None else hidden.float() @ turn.T
                for hidden in (_hidden(module.forward(*args, **kwargs)), _hidden(out))
            )
            sums[index, 0] = _mean_square(alone - after, after - before)
            sums[index, 1] = _mean_square(reached - after, after)

        return hook

    _run(model, layers, [compare(index) for index in range(len(layers))], ids)
    return sums


def _run(model: nn.Module, layers: Sequence[nn.Module], hooks: Sequence[Any], ids: Tensor) -> None:
    handles = [
        layer.register_forward_hook(hook, with_kwargs=True) for layer, hook in zip(layers, hooks, strict=True)
    ]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _hidden(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _mean_square(error: Tensor, whole: Tensor) -> float:
    """Mean over tokens of the square error of each over its own size."""
    share = error.double().square().sum(-1) / whole.double().square().sum(-1).clamp_min(1e-30)
    return float(share.mean())


def table(errors: Sequence[LayerError], width: int = 30) -> str:
    """The errors as a table with bars; a bar has the length of ``own``, the longest ``width`` signs."""
    longest = max((e.own for e in errors), default=0.0) or 1.0
    size = max((len(e.layer) for e in errors), default=0)
    lines = [f"{'error by layer':<{size}}  {'own':>8}  {'reached':>8}"]
    for e in errors:
        bar = "#" * math.ceil(width * e.own / longest) if math.isfinite(e.own) else "?"
        lines.append(f"{e.layer:<{size}}  {e.own:8.3%}  {e.reached:8.3%}  {bar}")
    return "\n".join(lines)
