"""Names that differ in their numbers alone, in one: ``layers.{0..29}.down_proj`` for thirty of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import bracex

from .errors import Refused

MOST = 2**20
"""Names that one may stand for; the largest mixtures have a tenth of that."""
_NUMBER = re.compile(r"(?<![^.])(0|[1-9]\d*)(?![^.])")
"""A component of a name that is a number as numbers are written."""


def folded(names: Iterable[str]) -> list[str]:
    """Names in braces, from which ``unfolded`` makes exactly them; in the order in which each kind first comes."""
    kinds: dict[tuple[str, ...], dict[tuple[int, ...], None]] = {}
    for name in names:
        pieces = _NUMBER.split(name)
        kinds.setdefault(tuple(pieces[::2]), {})[tuple(map(int, pieces[1::2]))] = None
    return [
        "".join(piece for pair in zip(text, (*numbers, ""), strict=True) for piece in pair)
        for text, rows in kinds.items()
        for numbers in _rows(sorted(rows))
    ]


def unfolded(pattern: str) -> list[str]:
    """The names that one in braces stands for. Refused beyond a million of them."""
    try:
        return bracex.expand(pattern, limit=MOST)
    except bracex.ExpansionLimitException:
        raise Refused(f"{pattern}: it stands for more than {MOST} names") from None


def _rows(rows: Sequence[tuple[int, ...]]) -> Iterator[tuple[str, ...]]:
    """Sorted rows of numbers as products of sets: rows with the same tails share one set of heads."""
    if not rows[0]:
        yield ()
        return
    by_tails: dict[tuple[tuple[str, ...], ...], list[int]] = {}
    for head, own in groupby(rows, key=lambda row: row[0]):
        tails = tuple(_rows([row[1:] for row in own]))
        by_tails.setdefault(tails, []).append(head)
    for tails, heads in by_tails.items():
        for tail in tails:
            yield (_set(heads), *tail)


def _set(numbers: Sequence[int]) -> str:
    """Ascending numbers in braces: ``7``, ``{0..29}``, ``{0,3}``, ``{{0..4},7}``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown: list[str] = []
    for first, last in runs:
        shown += [f"{{{first}..{last}}}"] if last > first + 1 else [str(n) for n in range(first, last + 1)]
    return shown[0] if len(shown) == 1 else f"{{{','.join(shown)}}}"
