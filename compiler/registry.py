"""Where passes, patterns, laws, schemes, readers of data sets are found: entry points, ours like anybody's."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .errors import Refused

GROUPS = ("passes", "presets", "recipes", "patterns", "laws", "schemes", "targets", "calibration_readers")
OPTIONAL = ("laws",)
"""Groups in which qc itself registers nothing."""
SINGULAR = {"passes": "pass", "calibration_readers": "reader"}
KINDS = {
    "recipes": (".named", "Named"),
    "patterns": (".pattern", "Pattern"),
    "schemes": (".scheme", "Scheme"),
    "targets": (".targets.target", "Target"),
}
"""Of what class the values of a group are."""


@lru_cache
def names(group: str) -> dict[str, EntryPoint]:
    """Name to entry point of one group, nothing imported. Two packages with one name are an error."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=f"qc.{group}"):
        other = found.get(point.name)
        if other is not None and other.value != point.value:
            owners = " and ".join(sorted({package(other), package(point)}))
            raise Refused(
                f"{singular(group)} {point.name!r} is registered twice, by {owners}: uninstall one of them"
            )
        found[point.name] = point
    if not found and group not in OPTIONAL:
        raise Refused(f"no {group} are registered: qc is not installed (pip install -e . in its directory)")
    return dict(sorted(found.items()))


def singular(group: str) -> str:
    """What one thing of a group is called."""
    return SINGULAR.get(group, group.removesuffix("s"))


def package(point: EntryPoint) -> str:
    """The distribution that registers an entry point."""
    return point.dist.name if point.dist is not None else point.value.split(".")[0]


def get(group: str, name: str) -> Any:
    """Import what is registered under a name.

    Raises:
        Refused: There is no such name (with suggestions), its package does not import, or what it registers is
            something else than the group holds. The last two name the package that registered it.
    """
    point = names(group).get(name)
    if point is None:
        raise Refused(unknown(singular(group), name, names(group)))
    owner = f"{singular(group)} {name!r}, which {package(point)} registers as {point.value!r},"
    mend = f"mend {package(point)}, or pip uninstall {package(point)}"
    try:
        found = point.load()
    except Exception as error:  # whatever a module of somebody else does while it is imported
        raise Refused(f"{owner} does not import: {type(error).__name__}: {error}; {mend}") from error
    fault = misfit(group, found)
    if fault:
        raise Refused(f"{owner} {fault}; {mend}")
    return found


def each(group: str) -> Iterator[tuple[str, Any]]:
    """Name and value of everything in a group that imports; what does not is left to whoever asks for it by name."""
    for name in names(group):
        try:
            yield name, get(group, name)
        except Refused:
            continue


def misfit(group: str, found: Any) -> str:
    """Why something is not what a group holds; empty where it is."""
    if group == "passes":
        from .contract import Pass, faults

        if not (isinstance(found, type) and issubclass(found, Pass)):
            return "is no class derived from qc.Pass"
        return "; ".join(faults(found))
    if group in KINDS:
        module, kind = KINDS[group]
        if not isinstance(found, getattr(import_module(module, __package__), kind)):
            return f"is no {kind} but a {type(found).__name__}"
    elif not callable(found):
        return f"is no function but a {type(found).__name__}"
    return ""


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """``unknown pass 'quarrot'; did you mean quarot?``, or the list of what there is."""
    known = sorted(set(known))
    found = close(name, known)
    hint = f"did you mean {' or '.join(found)}?" if found else f"there are {', '.join(known)}"
    return f"unknown {what} {name!r}; {hint}"


def close(name: str, known: Iterable[str]) -> list[str]:
    """The one or two names most like ``name``, if any is like it at all."""
    return difflib.get_close_matches(name, list(known), n=2, cutoff=0.6)
