"""What a pass says of itself: docstring, contract and options, as ``qc passes`` tells them."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from . import registry
from .contract import Fact, Pass, spell
from .errors import Refused
from .spelling import kind_text, maker

SECTION = re.compile(r"\*\*(.+?)\.\*\*\s*(.*?)(?=\n\s*\n|\Z)", re.S)


@dataclass(frozen=True)
class Option:
    """One option of a pass or a preset."""

    name: str
    kind: str
    """Its type in words."""
    default: str
    """As the command line takes it; ``none`` where there is none."""
    doc: str


@dataclass(frozen=True)
class About:
    """Everything that a pass or a preset declares, as plain text."""

    name: str
    sort: str
    """``pass`` or ``preset``."""
    package: str
    """The distribution that registers it."""
    home: str
    """Module and class."""
    summary: str
    doc: str
    """The first sentence of its docstring."""
    sections: Mapping[str, str]
    """``Why``, ``Before / after``, ``Source``: the paragraphs of its docstring."""
    claim: str
    patterns: tuple[str, ...]
    requires: tuple[str, ...]
    provides: tuple[str, ...]
    breaks: tuple[str, ...]
    before: Mapping[str, str]
    """Passes that must not stand earlier, with the patterns for which, and why."""
    after: Mapping[str, str]
    """Passes that must not stand later."""
    options: tuple[Option, ...]
    same_as: str = ""
    """The pass of which this is another name."""


def about(name: str) -> About:
    """What is registered under the name of a pass or preset. Refused where there is no such name."""
    known = [*registry.names("passes"), *registry.names("presets")]
    if name not in known:
        raise Refused(registry.unknown("pass", name, known))
    preset = name in registry.names("presets")
    point = registry.names("presets" if preset else "passes")[name]
    make, kinds = maker(name)
    docs = {} if preset else option_docs(make)
    options = tuple(
        Option(option, kind_text(kind), spelled(default_of(make, option)), docs.get(option, ""))
        for option, kind in kinds.items()
    )
    text = inspect.cleandoc(make.__doc__ or "")
    first, sections = one_line(text.partition("\n\n")[0]), {k: one_line(v) for k, v in SECTION.findall(text)}
    if preset:
        rest = one_line(text.partition("\n\n")[2])
        return About(
            name, "preset", registry.package(point), point.value, first, first, {"More": rest} if rest else {},
            "", (), (), (), (), {}, {}, options,
        )  # fmt: skip
    cls: type[Pass] = make
    return About(
        name, "pass", registry.package(point), point.value, cls.summary, first, sections, cls.claim.name,
        tuple(p.name for p in cls.patterns), facts(cls.requires), facts(cls.provides), facts(cls.breaks),
        order(cls.before), order(cls.after), options, "" if cls.name == name else cls.name,
    )  # fmt: skip


def facts(found: Iterable[Fact]) -> tuple[str, ...]:
    """Names of facts, sorted."""
    return tuple(sorted(fact.name for fact in found))


def order(declared: Mapping[Any, Mapping[str, str]]) -> dict[str, str]:
    """Pass to reason; with the patterns in front where not all of them are meant."""
    found: dict[str, dict[str, list[str]]] = {}
    for pattern, reasons in declared.items():
        for other, why in reasons.items():
            found.setdefault(other, {}).setdefault(why, []).append(pattern.name)
    return {
        other: "; ".join(f"at {', '.join(names)}: {why}" for why, names in reasons.items())
        for other, reasons in sorted(found.items())
    }


def spelled(default: Any) -> str:
    """A default as the command line takes it."""
    return "none" if default in ((), None) else spell(default)


def one_line(text: str) -> str:
    """A paragraph with its line breaks as spaces."""
    return " ".join(text.split())


def default_of(make: Any, option: str) -> Any:
    """The default of an option of a pass or a preset."""
    return inspect.signature(make).parameters[option].default


def option_docs(cls: type) -> dict[str, str]:
    """The text under every option in the source of a class and of those that it is derived from, in one line."""
    found: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(one)))
        except (OSError, TypeError, SyntaxError):  # written in a shell, or not in Python
            continue
        (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef))
        for field, text in pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                found[field.target.id] = one_line(str(text.value.value))
    return found


def about_text(found: About) -> str:
    """What ``qc passes NAME`` prints."""
    lines = [f"{found.name}: {found.summary}"]
    rows = [("", found.doc)] if found.doc != found.summary else []
    rows += [(title.lower(), text) for title, text in found.sections.items()]
    if found.sort == "pass":
        rows += [("claim", found.claim), ("patterns", ", ".join(found.patterns) or "none")]
        rows += [
            (one, ", ".join(getattr(found, one)) or "nothing") for one in ("requires", "provides", "breaks")
        ]
        for title, reasons in (("not after", found.before), ("not before", found.after)):
            whys: dict[str, list[str]] = {}
            for other, why in reasons.items():
                whys.setdefault(why, []).append(other)
            rows += [(title, f"{', '.join(others)}: {why}") for why, others in whys.items()]
    rows += [("name of", found.same_as)] if found.same_as else []
    rows.append((found.sort, f"of {found.package}, {found.home}"))
    lines += [line for title, text in rows for line in row(title, text)]
    lines += ["", "options" if found.options else "no options"]
    for option in found.options:
        lines.append(f"    {option.name}={option.default}  ({option.kind})")
        lines += textwrap.wrap(plain(option.doc), 100, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)


def row(title: str, text: str) -> list[str]:
    """A title in a column of its own, and the text beside it in lines."""
    return textwrap.wrap(
        plain(text),
        104,
        initial_indent=f"    {title:<16}",
        subsequent_indent=" " * 20,
        break_on_hyphens=False,
    )


def plain(text: str) -> str:
    """A docstring without its marks of code."""
    return text.replace("``", "")


def passes_text() -> str:
    """What ``qc passes`` prints: every pass and preset in one line, and what does not import."""
    lines = []
    for group in ("passes", "presets"):
        for name, point in registry.names(group).items():
            try:
                found = about(name)
            except Refused as error:
                lines.append(f"{name:<18}broken  {error}")
                continue
            claim = found.claim.lower() or found.sort
            what = f"another name of {found.same_as}" if found.same_as else plain(found.summary)
            owner = "" if registry.package(point) == "qc" else f" (of {registry.package(point)})"
            lines.append(f"{name:<18}{claim:<8}{what}{owner}")
    return "\n".join(lines)
