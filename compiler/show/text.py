"""The canonical text of a program: equal programs print alike, and layers that are alike print once."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from ..program import Part, Program
from .rows import Sizes, names_of, outside, rows


def text(program: Program, *, layer: int | None = None, part: Part | None = None) -> str:
    """The program as text: prologue, blocks, epilogue, ties and notes. No ids, no times, no paths.

    Consecutive blocks whose lines are the same are printed once, with a table that says which value feeds
    which input in which layer. ``layer`` prints that block alone, ``part`` any part alone.

    Raises:
        IndexError: There is no block ``layer``.
    """
    sizes = Sizes(program)
    blocks = program.blocks
    if layer is not None:
        if not 0 <= layer < len(blocks):
            raise IndexError(f"layer {layer} of a model with layers 0..{len(blocks) - 1}")
        part = blocks[layer]
    if part is not None:
        return (
            "\n".join([part.name, *_bindings(program, [part], sizes), *_lines(program, part, sizes)]) + "\n"
        )
    out: list[str] = []
    for group in _groups(program, sizes):
        out += ["", _title(group)] if out else [_title(group)]
        out += _bindings(program, group, sizes)
        out += _lines(program, group[0], sizes)
    out += [f"tied: {name} is {owner}" for name, owner in sorted(program.ties.items())]
    out += [f"note: {note}" for note in program.notes]
    return "\n".join(out) + "\n"


def around(program: Program, node: fx.Node, count: int = 10) -> str:
    """The ``count`` lines of a part around one value, which is marked with ``>``."""
    part = next(part for part in program.parts if part.index == node.meta["part"])
    order = {other: i for i, other in enumerate(program.nodes(part))}
    found = list(rows(program, part, Sizes(program)))
    at = max((i for i, row in enumerate(found) if order[row.node] <= order[node]), default=0)
    start = max(0, min(at - count // 2, len(found) - count))
    return "\n".join(
        f"{'>' if start + i == at else ' '} {row.line()}"
        for i, row in enumerate(found[start : start + count])
    )


def _lines(program: Program, part: Part, sizes: Sizes) -> list[str]:
    return [f"  {row.line()}" for row in rows(program, part, sizes)]


def _groups(program: Program, sizes: Sizes) -> Iterable[list[Part]]:
    """Parts in order, consecutive blocks with the same lines together."""
    group: list[Part] = []
    before: list[str] = []
    for part in program.parts:
        lines = _lines(program, part, sizes)
        if group and part.kind >= 0 and group[0].kind >= 0 and lines == before:
            group.append(part)
            continue
        if group:
            yield group
        group, before = [part], lines
    yield group


def _number(part: Part) -> int:
    """The index of a block in its stack."""
    return part.index - 1


def _title(group: list[Part]) -> str:
    first, last = group[0], group[-1]
    if len(group) == 1:
        return first.name
    number = str(_number(first))
    if not first.name.endswith(number):
        return f"{first.name} to {last.name} alike"
    return f"{first.name.removesuffix(number)}{number}..{_number(last)} alike"


def _span(numbers: list[int]) -> str:
    """Numbers as ranges: ``0, 2..4``."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}..{r[-1]}" for r in runs)


def _bindings(program: Program, group: list[Part], sizes: Sizes) -> list[str]:
    """Which value feeds which input of the blocks of a group."""
    if group[0].index == 0:
        return []
    parts = {part.index: part for part in program.parts}
    named: dict[int, dict[fx.Node, str]] = {}
    found: dict[str, dict[str, list[int]]] = {}
    for part in group:
        for i, source in enumerate(outside(program, part)):
            origin = source.meta["part"]
            if origin not in named:
                named[origin] = names_of(program, parts[origin], sizes)
            near = origin == part.index - 1 and origin > 0
            where = "before" if near else parts[origin].name
            label = f"in{i}: {sizes.type(source.meta['val'])}"
            found.setdefault(label, {}).setdefault(f"{where}.{named[origin][source]}", []).append(
                _number(part)
            )
    lines = []
    for label, origins in found.items():
        said = [o if len(origins) == 1 else f"{o} in {_span(n)}" for o, n in origins.items()]
        lines.append(f"  {label} = {'; '.join(said)}")
    return lines
