"""A layered layout: boxes in ranks from top to bottom, few crossings, straight long arrows. Deterministic.

After Sugiyama, Tagawa and Toda (1981): ranks by longest path, order by barycentres, and positions as the least squares
solution that keeps the order, found by pooling adjacent violators (de Leeuw, Hornik and Mair 2009).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

GAP = 28.0
"""Least space between two boxes of a rank, in pixels."""
RANK_GAP = 34.0
WIRE = 14.0
"""Width that an arrow takes where it passes a rank."""
SWEEPS = 16
ROUNDS = 60
SMALL = 40.0
"""Width below which a box stands under the long arrow that leads to it."""
STRAIGHT = 8.0
"""How much more a bend in a long arrow costs than one at its end."""

Point = tuple[float, float]
Node = str | tuple[int, int]
"""A box, or the place (arrow, rank) where an arrow passes a rank."""


@dataclass(frozen=True)
class Place:
    """Where a box is: its centre and its size, in pixels."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Layout:
    """Places of boxes and ways of arrows; the drawing begins at (0, 0)."""

    places: Mapping[str, Place]
    paths: tuple[tuple[Point, ...], ...]
    """Per arrow: from the lower edge of a box to the upper edge of another; between two points it may bend."""
    width: float
    height: float


def layout(
    sizes: Mapping[str, tuple[float, float]],
    arrows: Sequence[tuple[str, str]],
    late: frozenset[str] = frozenset(),
) -> Layout:
    """Place boxes.

    Args:
        sizes: Width and height of each box, in an order in which readers come after what they read.
        arrows: From box to box.
        late: Boxes without arrows into them that stand right above the first one that reads them.
    """
    rank = _ranks(list(sizes), arrows, late)
    rows: list[list[Node]] = [[] for _ in range(max(rank.values(), default=-1) + 1)]
    for id in sizes:
        rows[rank[id]].append(id)
    links: list[tuple[Node, Node]] = []
    chains: list[list[Node]] = []
    for i, (source, target) in enumerate(arrows):
        passing: list[Node] = [(i, r) for r in range(rank[source] + 1, rank[target])]
        for place in passing:
            assert isinstance(place, tuple)
            rows[place[1]].append(place)
        chain: list[Node] = [source, *passing, target]
        chains.append(chain)
        links += itertools.pairwise(chain)
    rows = _ordered(rows, links)
    x = _straightened(_across(rows, links, sizes), rows, chains, sizes)
    return _finished(rows, x, sizes, chains)


def _ranks(ids: Sequence[str], arrows: Sequence[tuple[str, str]], late: frozenset[str]) -> dict[str, int]:
    into: dict[str, list[str]] = {id: [] for id in ids}
    out: dict[str, list[str]] = {id: [] for id in ids}
    for source, target in arrows:
        into[target].append(source)
        out[source].append(target)
    rank: dict[str, int] = {}
    for id in ids:
        rank[id] = max((rank[source] + 1 for source in into[id]), default=0)
    for id in ids:
        if id in late and not into[id] and out[id]:
            rank[id] = max(0, min(rank[target] for target in out[id]) - 1)
    lowest = min(rank.values(), default=0)
    return {id: r - lowest for id, r in rank.items()}


def _ordered(rows: list[list[Node]], links: Sequence[tuple[Node, Node]]) -> list[list[Node]]:
    """The ranks, each in an order with few crossings."""
    above, below = _neighbours(links)
    best, fewest = [list(row) for row in rows], _crossings(rows, below)
    rows = [list(row) for row in rows]
    for sweep in range(SWEEPS):
        if not fewest:
            break
        down = sweep % 2 == 0
        near = above if down else below
        for r in range(1, len(rows)) if down else range(len(rows) - 2, -1, -1):
            place = {node: i for i, node in enumerate(rows[r - 1 if down else r + 1])}
            own = {node: i for i, node in enumerate(rows[r])}
            rows[r].sort(
                key=lambda node, p=place, o=own, n=near: _middle([p[x] for x in n.get(node, ())], o[node])
            )
        count = _crossings(rows, below)
        if count < fewest:
            best, fewest = [list(row) for row in rows], count
    return best


def _neighbours(links: Sequence[tuple[Node, Node]]) -> tuple[dict[Node, list[Node]], dict[Node, list[Node]]]:
    above: dict[Node, list[Node]] = {}
    below: dict[Node, list[Node]] = {}
    for source, target in links:
        above.setdefault(target, []).append(source)
        below.setdefault(source, []).append(target)
    return above, below


def _middle(places: Sequence[int], own: int) -> float:
    return sum(places) / len(places) if places else float(own)


def _crossings(rows: Sequence[Sequence[Node]], below: Mapping[Node, Sequence[Node]]) -> int:
    total = 0
    for upper, lower in itertools.pairwise(rows):
        place = {node: i for i, node in enumerate(lower)}
        ends = [sorted(place[target] for target in below.get(node, ())) for node in upper]
        passed: list[int] = []
        for group in ends:
            total += sum(before > end for end in group for before in passed)
            passed += group
    return total


def _across(
    rows: Sequence[Sequence[Node]],
    links: Sequence[tuple[Node, Node]],
    sizes: Mapping[str, tuple[float, float]],
) -> dict[Node, float]:
    """Centres of boxes and of passing arrows."""
    weighted: dict[Node, list[tuple[Node, float]]] = {}
    for source, target in links:
        weight = STRAIGHT ** (isinstance(source, tuple) + isinstance(target, tuple))
        weighted.setdefault(source, []).append((target, weight))
        weighted.setdefault(target, []).append((source, weight))
    rank = {node: r for r, row in enumerate(rows) for node in row}
    x: dict[Node, float] = {}
    for row in rows:
        x |= zip(row, _offsets(row, sizes), strict=True)
    for sweep in range(ROUNDS):
        side = (-1, 1, 0)[sweep % 3] if sweep < ROUNDS - 6 else 0
        order = range(len(rows)) if side <= 0 else range(len(rows) - 1, -1, -1)
        for r in order:
            targets, weights = [], []
            for node in rows[r]:
                near = [(x[n], w) for n, w in weighted.get(node, ()) if side == 0 or rank[n] - r == side]
                total = sum(w for _, w in near)
                targets.append(sum(at * w for at, w in near) / total if near else x[node])
                weights.append(total or 0.01)
            x |= zip(rows[r], _apart(targets, weights, _offsets(rows[r], sizes)), strict=True)
    return x


def _straightened(
    x: dict[Node, float],
    rows: Sequence[Sequence[Node]],
    chains: Sequence[Sequence[Node]],
    sizes: Mapping[str, tuple[float, float]],
) -> dict[Node, float]:
    """Long arrows upright, and the small boxes at their ends under them, where there is room."""
    x = dict(x)
    rank = {node: r for r, row in enumerate(rows) for node in row}
    seat = {node: i for row in rows for i, node in enumerate(row)}

    def room(node: Node) -> tuple[float, float]:
        row, i = rows[rank[node]], seat[node]
        packed = _offsets(row, sizes)
        low = x[row[i - 1]] + packed[i] - packed[i - 1] if i else float("-inf")
        high = x[row[i + 1]] - packed[i + 1] + packed[i] if i + 1 < len(row) else float("inf")
        return low, high

    def move(nodes: Sequence[Node], target: float) -> None:
        low = max(room(node)[0] for node in nodes)
        high = min(room(node)[1] for node in nodes)
        if low <= high:
            x.update(dict.fromkeys(nodes, min(max(target, low), high)))

    for chain in sorted((chain for chain in chains if len(chain) > 2), key=len, reverse=True):
        move(chain[1:-1], sum(x[node] for node in chain[1:-1]) / (len(chain) - 2))
    for line in _lines(chains, sizes):
        at = [x[node] for node in line if isinstance(node, tuple)]
        move(line, sum(at) / len(at))
        level = x[line[0]]
        for chain in chains:
            for end, near in ((chain[0], chain[1]), (chain[-1], chain[-2])):
                if near in line and end not in line and len(rows[rank[end]]) == 1:
                    move([end], level)
    return x


def _lines(chains: Sequence[Sequence[Node]], sizes: Mapping[str, tuple[float, float]]) -> list[list[Node]]:
    """Long arrows with the small boxes at their ends, those that meet in one together."""
    found: list[dict[Node, None]] = []
    for chain in chains:
        if len(chain) < 3:
            continue
        ends = [end for end in (chain[0], chain[-1]) if isinstance(end, str) and sizes[end][0] < SMALL]
        if not ends:
            continue
        own: dict[Node, None] = dict.fromkeys([*chain[1:-1], *ends])
        apart = []
        for line in found:
            if any(end in line for end in ends):
                own = line | own
            else:
                apart.append(line)
        found = [*apart, own]
    return [list(line) for line in found]


def _offsets(row: Sequence[Node], sizes: Mapping[str, tuple[float, float]]) -> list[float]:
    """Centres of a rank that is packed as tightly as it may be."""
    found, edge = [], 0.0
    for i, node in enumerate(row):
        width = sizes[node][0] if isinstance(node, str) else WIRE
        edge += GAP if i else 0.0
        found.append(edge + width / 2)
        edge += width
    return found


def _apart(targets: Sequence[float], weights: Sequence[float], offsets: Sequence[float]) -> list[float]:
    """Positions nearest to the targets, by weighted least squares, at least as far apart as ``offsets`` are."""
    pools: list[list[float]] = []  # [weighted mean, weight, how many]
    for target, weight, offset in zip(targets, weights, offsets, strict=True):
        pools.append([target - offset, weight, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            mean, mass, count = pools.pop()
            last = pools[-1]
            last[0] = (last[0] * last[1] + mean * mass) / (last[1] + mass)
            last[1] += mass
            last[2] += count
    shifts = [mean for mean, _, count in pools for _ in range(int(count))]
    return [shift + offset for shift, offset in zip(shifts, offsets, strict=True)]


def _finished(
    rows: Sequence[Sequence[Node]],
    x: Mapping[Node, float],
    sizes: Mapping[str, tuple[float, float]],
    chains: Sequence[Sequence[Node]],
) -> Layout:
    left = min(
        (x[n] - (sizes[n][0] if isinstance(n, str) else WIRE) / 2 for row in rows for n in row), default=0
    )
    at: dict[str, Place] = {}
    bands: list[tuple[float, float]] = []
    top = 0.0
    for row in rows:
        height = max((sizes[n][1] for n in row if isinstance(n, str)), default=0.0)
        bands.append((top, top + height))
        for node in row:
            if isinstance(node, str):
                width, own = sizes[node]
                at[node] = Place(round(x[node] - left, 1), round(top + height / 2, 1), width, own)
        top += height + RANK_GAP
    ports = _ports(chains, x, left, at)
    paths = []
    for i, chain in enumerate(chains):
        source, target = chain[0], chain[-1]
        assert isinstance(source, str)
        assert isinstance(target, str)
        points = [(ports[i, 0], round(at[source].y + at[source].height / 2, 1))]
        for node in chain[1:-1]:
            assert isinstance(node, tuple)
            points += [(round(x[node] - left, 1), round(y, 1)) for y in bands[node[1]]]
        points.append((ports[i, 1], round(at[target].y - at[target].height / 2, 1)))
        paths.append(tuple(points))
    width = max((p.x + p.width / 2 for p in at.values()), default=0.0)
    width = max([width, *(px for path in paths for px, _ in path)])
    return Layout(at, tuple(paths), round(width, 1), round(max(top - RANK_GAP, 0.0), 1))


def _ports(
    chains: Sequence[Sequence[Node]], x: Mapping[Node, float], left: float, at: Mapping[str, Place]
) -> dict[tuple[int, int], float]:
    """Where an arrow leaves (i, 0) and meets (i, 1) the edge of a box: in the order of where it comes from."""
    ends: dict[tuple[str, int], list[tuple[float, int]]] = {}
    for i, chain in enumerate(chains):
        for side, (box, near) in enumerate(((chain[0], chain[1]), (chain[-1], chain[-2]))):
            assert isinstance(box, str)
            ends.setdefault((box, side), []).append((x[near] - left, i))
    found: dict[tuple[int, int], float] = {}
    for (box, side), group in ends.items():
        place, group = at[box], sorted(group)
        room = max(0.0, place.width - 24) if place.width > SMALL else 0.0
        step = min(22.0, room / max(1, len(group) - 1))
        upright = [
            k for k, (near, i) in enumerate(group) if len(chains[i]) > 2 and abs(near - place.x) < room / 2
        ]
        first = place.x - step * (len(group) - 1) / 2
        if len(upright) == 1:
            first = group[upright[0]][0] - step * upright[0]
        for k, (_, i) in enumerate(group):
            found[i, side] = round(
                min(max(first + step * k, place.x - place.width / 2), place.x + place.width / 2), 1
            )
    return found
