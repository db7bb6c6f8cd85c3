"""Layers that share their weights: what is rewritten in one of them has to be rewritten alike in all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .contract import Answer, Pass, Rewrite
from .edit import Edit
from .operand import Gain, NormBias, Quantize
from .program import Program


def partners(program: Program) -> dict[str, frozenset[str]]:
    """Modules of blocks that hold one tensor with others, whether those run or not, with the others."""
    blocks = tuple(f"{part.name}." for part in program.blocks)
    groups: dict[str, set[str]] = {}
    for name, owner in program.ties.items():
        if name.startswith(blocks) and owner.startswith(blocks):
            groups.setdefault(owner, {owner}).add(name)
    found: dict[str, set[str]] = {}
    for names in groups.values():
        modules = {name.rpartition(".")[0] for name in names}
        for module in modules:
            found.setdefault(module, set()).update(modules - {module})
    return {module: frozenset(others) for module, others in found.items()}


def consistent(program: Program, one: Pass, answer: Answer) -> Answer:
    """The answer without rewrites that would make two tensors of one, and a note that says how many they were."""
    shared = partners(program)
    if not shared or not answer.rewrites:
        return answer
    kept = [rewrite for rewrite in answer.rewrites if not _measured(one, rewrite, shared)]
    while True:
        edits: dict[str, list[Any]] = {}
        for rewrite in kept:
            for edit in rewrite.edits:
                edits.setdefault(edit.site.module, []).append(_what(edit))
        alike = [
            rewrite
            for rewrite in kept
            if all(
                edits.get(other) == edits[module]
                for module in rewrite.modules
                for other in shared.get(module, ())
            )
        ]
        if len(alike) == len(kept):
            break
        kept = alike
    dropped = [rewrite for rewrite in answer.rewrites if rewrite not in kept]
    if not dropped:
        return answer
    count = len(dropped)
    note = (
        f"{count} {'site is' if count == 1 else 'sites are'} left alone, {dropped[0].where} first: other layers hold"
        " the same weights, and would need others"
    )
    return replace(answer, rewrites=tuple(kept), notes=(*answer.notes, note))


def _measured(one: Pass, rewrite: Rewrite, shared: Mapping[str, frozenset[str]]) -> bool:
    """Whether a rewrite of shared tensors depends on the activations of its own layer."""
    if not any(module in shared for module in rewrite.modules):
        return False
    return one.needs_training or any(slot.needs for slot in rewrite.slots)


def _what(edit: Edit) -> tuple[Any, ...]:
    """What an edit does, without the names that differ from layer to layer."""
    operand: Any = edit.operand
    if isinstance(operand, Gain | NormBias):
        operand = replace(operand, norm="")
    if isinstance(operand, Quantize):
        operand = operand.scheme
    return edit.verb, edit.site.channels, operand
