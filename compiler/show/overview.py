"""The diagram of a whole model: one card per run of alike blocks, with its linears and what passes inserted."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator

from torch import fx

from ..contract import Rewrite
from ..program import Program
from .alike import alike_experts
from .diagram import Arrow, Box, Chip, Diagram
from .matched import Matched
from .regions import INSERTED, STUBS
from .rows import Sizes, outside
from .runs import Run, runs


def model_diagram(
    program: Program, *, matches: Iterable[Matched] = (), rewrites: Iterable[Rewrite] = ()
) -> Diagram:
    """A whole program as cards from prologue to epilogue, with the values that go from one to the next.

    Args:
        program: A program in any state of a plan.
        matches: Of the first block of every run, see ``matched``: a card says how many it has of each pattern.
        rewrites: What passes did so far: a card says how many sites of its first block each pass rewrote.
    """
    sizes, found = Sizes(program), runs(program)
    matches, rewrites = tuple(matches), tuple(rewrites)
    cards = [_card(program, run, matches, rewrites) for run in found]
    card_of = {part.index: card.id for card, run in zip(cards, found, strict=True) for part in run.parts}
    arrows: dict[tuple[str, str], str] = {}
    for before, run in itertools.pairwise(found):
        ends = (before.parts[-1].index, run.first.index)
        for source in outside(program, run.first):
            origin = source.meta["part"]
            if origin and (origin == ends[0] or card_of[origin] != card_of[ends[1]]):
                arrows.setdefault((card_of[origin], card_of[ends[1]]), sizes.type(source.meta["val"]))
        if not any(target == card_of[ends[1]] for _, target in arrows) and outside(program, run.first):
            first = outside(program, run.first)[0]
            arrows[card_of[first.meta["part"]], card_of[ends[1]]] = sizes.type(first.meta["val"])
    return Diagram(program.title, tuple(cards), tuple(Arrow(*ends, type_) for ends, type_ in arrows.items()))


def _card(program: Program, run: Run, matches: tuple[Matched, ...], rewrites: tuple[Rewrite, ...]) -> Box:
    part = run.first
    own = list(program.nodes(part))
    names = {node.name for node in own} | {str(node.target) for node in own if node.op == "call_module"}
    lines = []
    if len(run.parts) > 1:
        lines.append(f"{len(run.parts)} blocks; of each:")
    seen = Counter(match.title for match in matches if not match.flow and names.issuperset(match.names))
    if seen:
        lines.append(", ".join(f"{count} {title}" for title, count in seen.items()))
    hit = Counter(rewrite.pass_name for rewrite in rewrites if names.intersection(rewrite.modules))
    if hit:
        lines.append("rewritten by " + ", ".join(hit))
    prefix = part.name + "." if part.kind >= 0 else ""
    holders: dict[str, list[Chip]] = {}
    for holder, chip in _chips(program, run, prefix):
        holders.setdefault(holder, []).append(chip)
    chips = tuple((holder, tuple(found)) for holder, found in holders.items())
    return Box(part.name, "run", run.title, tuple(lines), chips=chips)


def _chips(program: Program, run: Run, prefix: str) -> Iterator[tuple[str, Chip]]:
    """Holder and chip of everything on a card, in graph order."""
    hidden = alike_experts(program, run.first)
    holder = ""
    for node in program.nodes(run.first):
        if node in hidden:
            if hidden[node] is not None:
                yield holder, Chip(str(hidden[node]), "alike", "", 0)
            continue
        leaf = program.leaf(node)
        if leaf is not None:
            name = str(node.target).removeprefix(prefix)
            holder, _, title = name.rpartition(".")
            if leaf.kind == "linear":
                scheme = node.meta.get("scheme")
                bits = 16 if scheme is None else scheme.bits
                yield holder, Chip(title, "linear", str(scheme or node.meta.get("note", "")), bits)
            else:
                yield holder, Chip(title, leaf.kind, "", 0)
        elif node.target in (*INSERTED, *STUBS):
            kind = "stub" if node.target in STUBS else "inserted"
            yield _reader(program, node, prefix) or holder, Chip(str(node.meta["note"]), kind, "", 0)


def _reader(program: Program, node: fx.Node, prefix: str) -> str:
    """The holder of the linear that reads an inserted op; empty where another op does."""
    for user in node.users:
        if program.leaf(user) is not None:
            return str(user.target).removeprefix(prefix).rpartition(".")[0]
    return ""
