"""Globs that choose nothing: why, and what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from .contract import Pass, Setting
from .program import Program
from .scheme import Scheme, matches


def unused_globs(one: Pass, program: Program, setting: Setting) -> list[str]:
    """Globs of a pass that choose none of the modules that it works on."""
    problems = []
    for option in ("include", "exclude"):
        globs = [glob for glob in getattr(one, option, None) or () if glob != "*"]
        names = list(one.named(program, setting)) if globs else []
        problems += [f"{one.name}: {option} {why}" for glob in globs if (why := unused(glob, names, program))]
    return problems


def unused_rules(scheme: Scheme, program: Program) -> list[str]:
    """Globs of a scheme that match no linear of a block."""
    blocks = {part.index for part in program.blocks}
    linears = [
        str(node.target)
        for node in program.graph.nodes
        if (leaf := program.leaf(node)) and leaf.kind == "linear" and node.meta["part"] in blocks
    ]
    globs = [glob for rule in scheme.rules for glob in (*rule.include, *rule.exclude) if glob != "*"]
    return [f"scheme {scheme.name}: {why}" for glob in globs if (why := unused(glob, linears, program))]


def unused(glob: str, names: Iterable[str], program: Program) -> str:
    """Why a glob chooses nothing among ``names``; empty when it chooses something."""
    names = list(names)
    if any(matches(name, (glob,)) for name in names):
        return ""
    if any(matches(name, (glob,)) for name in program.leaves):
        return (
            f"{glob!r} matches modules, but none that could be chosen here (such as {', '.join(names[:3])})"
        )
    return f"{glob!r} matches nothing{suggest(glob, names)}"


def suggest(glob: str, names: Iterable[str]) -> str:
    """``; did you mean '*.down_proj'?``: the glob with its last component spelled as a module is."""
    head, dot, last = glob.rpartition(".")
    close = difflib.get_close_matches(
        last.strip("*"), sorted({name.rpartition(".")[2] for name in names}), n=1
    )
    return f"; did you mean {head + dot + close[0]!r}?" if close else ""
