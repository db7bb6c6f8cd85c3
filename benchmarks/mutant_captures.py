"""Captures that lost something on purpose: each has to be caught when the capture is compared with the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from torch import fx

from qc.compiler import capture as capturing
from qc.compiler.canon import aten
from qc.compiler.capture import ATTENTION, capture
from qc.compiler.errors import NotEquivalent

from .reach_configs import small_config

OTHER = {"sliding_window": 5, "residual_multiplier": 0.25, "embedding_multiplier": 3.0, "logits_scaling": 4.0}
"""Values of configs that would change nothing as they are: a window wider than the input, a factor of one."""

Spoil = Callable[[fx.Graph], int]
"""Spoils a graph; how many places it found."""


@dataclass(frozen=True)
class Mutant:
    """One way for a capture to be wrong."""

    name: str
    families: tuple[str, ...]
    spoil: Spoil


def killed_by(mutant: Mutant, family: str) -> str:
    """What certifying said of a spoiled capture, empty where it let it through.

    Raises:
        ValueError: There was nothing to spoil.
    """
    found: list[int] = []
    canonical = capturing.canonical

    def spoiled(*args: Any) -> Any:
        graph, made = canonical(*args)
        found.append(mutant.spoil(graph))
        return graph, made

    own = patch.object(
        capturing, "ATTENTIONS", (capturing.NAME,)
    )  # eager attention would have nothing to spoil
    with own, patch.object(capturing, "canonical", spoiled):
        try:
            capture(_config(family))
        except NotEquivalent as error:
            return " ".join(str(error).split())
        finally:
            if not any(found):
                raise ValueError(f"{mutant.name}: nothing to do wrong in {family}")
    return ""


def _config(family: str) -> Any:
    config = small_config(family)
    text = config.get_text_config()
    for name, value in OTHER.items():
        if getattr(text, name, None):
            setattr(text, name, value)
    return config


def window(graph: fx.Graph) -> int:
    """Of ``a and key > query - window`` only ``a`` is left."""
    found = 0
    for node in [n for n in graph.nodes if n.target is aten.__and__.Tensor]:
        kept = [a for a in node.args if isinstance(a, fx.Node) and a.target is not aten.gt.Tensor]
        if len(kept) == 1:
            node.replace_all_uses_with(kept[0])
            graph.erase_node(node)
            found += 1
    return found


def _argument(index: int, value: Callable[[Any], Any]) -> Spoil:
    """An argument of every attention is another one."""

    def spoil(graph: fx.Graph) -> int:
        found = 0
        for node in graph.find_nodes(op="call_function", target=ATTENTION):
            args = [*node.args, *[None] * (7 - len(node.args))]
            if args[index] is not None:
                args[index] = value(args[index])
                node.args = tuple(args)
                found += 1
        return found

    return spoil


def _skip(*targets: Any, where: Callable[[fx.Node], bool] = lambda node: True) -> Spoil:
    """The last op of a kind gives its first operand."""

    def spoil(graph: fx.Graph) -> int:
        found = [n for n in graph.nodes if n.target in targets and where(n) and _alike(n)]
        for node in found[-1:]:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        return len(found)

    return spoil


def _alike(node: fx.Node) -> bool:
    """Whether a node and its first operand have one shape and dtype."""
    source = node.args[0]
    return isinstance(source, fx.Node) and all(
        getattr(node.meta["val"], what) == getattr(source.meta["val"], what) for what in ("shape", "dtype")
    )


def _by_a_number(node: fx.Node) -> bool:
    return isinstance(node.args[1], float) and node.args[1] != 1


MUTANTS = (
    # transformers has two causal models with a soft cap on the scores; T5Gemma is an encoder-decoder
    Mutant("soft cap of the scores dropped", ("gemma2", "vaultgemma"), _argument(5, lambda _: None)),
    Mutant("soft cap of the logits dropped", ("gemma2", "vaultgemma", "nanochat"), _skip(aten.tanh.default)),
    Mutant("window dropped", ("mistral", "gemma2", "gemma3_text", "cohere2"), window),
    Mutant("sinks dropped", ("gpt_oss", "granite_swa", "mimo_v2_flash"), _argument(6, lambda _: None)),
    Mutant("attention scale changed", ("llama", "gemma2", "granite"), _argument(4, lambda scale: scale * 1.1)),
    Mutant("mask dropped", ("llama", "mistral", "gemma2"), _argument(3, lambda _: None)),
    Mutant("residual multiplier dropped", ("granite", "granitemoe", "granitemoeshared"),
           _skip(aten.mul.Tensor, where=_by_a_number)),
    Mutant("sign of a rope half dropped", ("llama", "qwen2", "gemma"), _skip(aten.neg.default)),
)  # fmt: skip
