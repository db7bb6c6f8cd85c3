"""The spelling of passes on the command line: ``iter_smooth{alpha=0.7, enable_subgraph_type=ov+up-down},quarot``."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from . import registry
from .contract import Pass
from .errors import Refused
from .named import named


def passes_of(given: str | Iterable[str | Pass]) -> tuple[tuple[Pass, ...], tuple[str, ...]]:
    """Passes of a command-line string or a list of strings and passes; presets expanded, each with a note.

    A string that is the name of a whole plan stands for its passes; formats and target of it are the caller's business.
    """
    whole = named(given)
    if whole is not None:
        passes, notes = passes_of(whole.passes)
        return passes, (f"{str(given).strip()} is {whole.passes} --scheme {whole.scheme}", *notes)
    items: Sequence[str | Pass] = split(given) if isinstance(given, str) else list(given)
    found: list[Pass] = []
    told: list[str] = []
    for item in items:
        if isinstance(item, Pass):
            found.append(item)
            continue
        if not isinstance(item, str):
            raise Refused(f"{item!r} is not a pass: give a name or an instance of qc.Pass")
        for text in split(item):
            expanded = one(text)
            if expansion(text.partition("{")[0].strip(), expanded):
                told.append(f"{text} is {', '.join(str(p) for p in expanded)}")
            found += expanded
    if not found:
        there = ", ".join([*registry.names("passes"), *registry.names("presets")])
        raise Refused(
            f"no passes were given: e.g. --passes 'iter_smooth,quarot,autoround'; there are {there}"
        )
    return tuple(found), tuple(told)


def split(text: str, separator: str = ",") -> list[str]:
    """The items of a string, stripped and not empty; a separator inside braces separates nothing."""
    items, depth, current = [], 0, ""
    for char in text:
        depth += {"{": 1, "}": -1}.get(char, 0)
        if depth < 0:
            raise Refused(f"--passes {text!r}: braces do not pair up")
        if char == separator and depth == 0:
            items.append(current.strip())
            current = ""
        else:
            current += char
    if depth:
        raise Refused(f"--passes {text!r}: a brace is not closed")
    return [item for item in [*items, current.strip()] if item]


def parse(text: str) -> tuple[str, dict[str, str]]:
    """The name of one item and its options, still as text."""
    name, brace, rest = text.partition("{")
    name = name.strip()
    options: dict[str, str] = {}
    if brace:
        if not rest.endswith("}"):
            raise Refused(f"--passes: {text!r} has something after its closing brace")
        for pair in split(rest[:-1]):
            key, equals, value = pair.partition("=")
            if not equals:
                raise Refused(f"--passes: option {pair!r} of {name} has no value; write {key.strip()}=VALUE")
            if key.strip() in options:
                raise Refused(f"--passes: option {key.strip()!r} of {name} is given twice")
            options[key.strip()] = value.strip()
    return name, options


def one(text: str) -> tuple[Pass, ...]:
    """One item: a pass or a preset with its options."""
    name, options = parse(text)
    known = [*registry.names("passes"), *registry.names("presets")]
    if name not in known:
        if name in registry.names("recipes"):
            raise Refused(
                f"--passes: {name} is a whole plan: give it alone, without options (qc recipes {name})"
            )
        known += registry.names("recipes")
        if "=" in name and any(name.startswith(k) for k in known):
            raise Refused(f"--passes: {name!r} looks like a pass whose braces the shell has expanded: quote the list, "
                          "--passes \"iter_smooth{alpha=0.7, scale_min=1e-4},quarot\"")  # fmt: skip
        raise Refused(registry.unknown("pass", name, known))
    make, fields = maker(name)
    built = build(make, name, options, fields)
    return built if isinstance(built, tuple) else (built,)


def maker(name: str) -> tuple[Any, dict[str, Any]]:
    """What makes the pass, or the passes of the preset, of a registered name; and the types of its options."""
    if name in registry.names("presets"):
        preset = registry.get("presets", name)
        parameters = inspect.signature(preset, eval_str=True).parameters.values()
        return preset, {p.name: p.annotation for p in parameters}
    cls = registry.get("passes", name)
    return cls, kinds_of(cls)


def kinds_of(cls: type[Pass]) -> dict[str, Any]:
    """The types of the options of a pass."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def kind_text(kind: Any) -> str:
    """A type of an option in words: ``number``, ``true or false``, ``list of text``, ``max or mean``."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        words = [kind_text(arm) for arm in inside if arm is not type(None)]
        return " or ".join(words[:1] + ["none"] * (type(None) in inside))
    if origin is Literal:
        return " or ".join(map(str, inside))
    if origin is tuple:
        return f"list of {kind_text(inside[0])}"
    return {bool: "true or false", int: "whole number", float: "number"}.get(kind, "text")


def expansion(name: str, passes: Sequence[Pass]) -> bool:
    """Whether a name stands for other passes, which the plan then tells."""
    return len(passes) != 1 or passes[0].name != name


def build(make: Any, name: str, options: dict[str, str], kinds: dict[str, Any]) -> Any:
    """Call ``make`` with the options converted to the types of its fields; errors name pass, option and value."""
    values = {}
    for key, text in options.items():
        if key not in kinds:
            raise Refused(
                registry.unknown(f"option of {name}", key, kinds) if kinds else f"{name} has no options"
            )
        try:
            values[key] = convert(text, kinds[key])
        except ValueError as error:
            raise Refused(f"{name}{{{key}={text}}}: {error}") from None
    try:
        return make(**values)
    except ValueError as error:
        raise Refused(f"{name}: {error}") from None


def convert(text: str, kind: Any) -> Any:
    """A value from its spelling: lists are joined by ``+``, booleans are true or false."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if type(None) in inside and text.lower() == "none":
            return None
        return convert(text, next(arm for arm in inside if arm is not type(None)))
    if origin is Literal:
        if text not in map(str, inside):
            raise ValueError(f"it must be one of {', '.join(map(str, inside))}")
        return next(value for value in inside if str(value) == text)
    if origin is tuple:
        return tuple(convert(item, inside[0]) for item in split(text, "+"))
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("it must be true or false")
        return text.lower() == "true"
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"it must be {'a whole number' if kind is int else 'a number'}") from None
    return text
