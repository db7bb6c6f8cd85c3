"""The recipe language's ``qconfig``: formats of a weight and an activation, read into a ``LinearScheme``."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from . import registry
from .scheme import FLOAT, Granularity, Int, LinearScheme, Rule
from .yaml_text import Entry

DTYPES = {"int8": 8, "int4": 4}
KNOWN_DTYPES = ("float", "int8", "int4", "mxfp8", "mxfp4", "fp8_e4m3")
KNOWN_SCOPES = (
    "per_tensor", "per_channel", "per_group", "per_block", "per_token", "pd_mix", "per_head", "dual_scale",
    "per_tensor_dynamic",
)  # fmt: skip
KNOWN_METHODS = (
    "minmax", "ssz", "gptq", "histogram", "autoround", "mse_round", "ceil_x", "fouroversix", "dualscale", "none",
)  # fmt: skip
SCALE_DTYPES = ("bfloat16", "float16", "float32")
SCALES = "scale_dtype of the recipe: scales have the dtype in which the server holds them, whatever it says"
FIELDS = ("dtype", "scope", "symmetric", "method", "ext")
EXT = {"gptq": ("percdamp", "block_size"), "ssz": ("step",)}
"""Keys of ``ext`` besides those of every method."""
GPTQ_GROUP = 128
"""The group size of ``gptq`` where a recipe gives none."""


PER: dict[tuple[str, str, bool], Granularity] = {
    ("weight", "per_channel", True): "channel",
    ("weight", "per_channel", False): "channel",
    ("weight", "per_group", True): "group",
    ("weight", "per_group", False): "group",
    ("weight", "per_tensor", True): "tensor",
    ("act", "per_token", True): "token",
    ("act", "per_tensor", False): "tensor",
    ("act", "per_tensor", True): "tensor",
    ("act", "pd_mix", False): "mix",
    ("act", "per_tensor_dynamic", True): "dynamic-tensor",
}
"""Side, scope and symmetric of what is built."""
THERE_ARE = {
    "weight": "per_channel and per_group, and per_tensor with symmetric true",
    "act": "per_token and per_tensor_dynamic with symmetric true, per_tensor, pd_mix with symmetric false",
}


@dataclass(frozen=True)
class Methods:
    """The methods that a pass computes, in the words of the recipe language; the first is what it does by default."""

    weight: tuple[str, ...] = ()
    act: tuple[str, ...] = ()


class Reading:
    """What is found while a recipe is read: all that is wrong with it, each with its line, and remarks."""

    def __init__(self) -> None:
        self.faults: list[tuple[int, str]] = []
        self.count = 0
        """Calls of ``fault``: whoever compares it before and after knows whether something was wrong in between."""
        self.notes: list[str] = []
        self.adapted: dict[str, Any] | None = None
        """Options of the first stage of ``adapt_rotation``, once it was met."""

    def fault(self, line: int, why: str) -> None:
        """Keep what is wrong, once (an alias is read as often as it is used)."""
        self.count += 1
        if (line, why) not in self.faults:
            self.faults.append((line, why))

    def note(self, text: str) -> None:
        """Keep a remark for the plan, once."""
        if text not in self.notes:
            self.notes.append(text)


def rule_of(entry: Entry, reading: Reading, methods: Methods) -> Rule | None:
    """One of ``strategies``: ``{qconfig, include, exclude}``; None when something is wrong with it.

    Args:
        entry: The mapping.
        reading: Gets what is wrong.
        methods: Names of the methods that the pass computes.
    """
    found = mapping(entry, ("qconfig", "include", "exclude"), "a strategy", reading)
    if found is None:
        return None
    if "qconfig" not in found:
        reading.fault(
            entry.line, "a strategy has no qconfig: give it one, or an exclude in the others' place"
        )
        return None
    rule = qconfig_of(found["qconfig"], reading, methods)
    include = globs(found["include"], "include", reading) if "include" in found else ("*",)
    exclude = globs(found["exclude"], "exclude", reading) if "exclude" in found else ()
    if rule is None or include is None or exclude is None:
        return None
    return replace(rule, include=include, exclude=exclude)


def qconfig_of(entry: Entry, reading: Reading, methods: Methods) -> Rule | None:
    """A ``qconfig`` as a rule for every linear: ``{weight: {...}, act: {...}}``, without ``act`` it is float."""
    before = reading.count
    found = mapping(entry, ("weight", "act"), "a qconfig", reading)
    if found is None:
        return None
    if "weight" not in found:
        reading.fault(entry.line, "a qconfig has no weight: {dtype, scope, symmetric, method} of the weight")
        return None
    weight, weight_method = format_of(found["weight"], "weight", reading, methods)
    act, act_method = format_of(found["act"], "act", reading, methods) if "act" in found else (None, None)
    if reading.count > before:
        return None
    scheme = LinearScheme(weight, act)
    if scheme != FLOAT and not _held(scheme):
        reading.fault(
            entry.line,
            f"{words(scheme)} is not supported yet: no target has a linear of that kind. There are "
            + "; ".join(words(one) for one in _what_can_be_had()),
        )
        return None
    return Rule(
        scheme=scheme,
        weight_method=None if weight_method in methods.weight[:1] else weight_method,
        act_method=None if act_method in methods.act[:1] else act_method,
    )


def weight_rule_of(entry: Entry, reading: Reading, methods: Methods) -> Rule | None:
    """A ``weight_qconfig``, the format of a weight alone, as a rule for every linear."""
    weight, method = format_of(entry, "weight", reading, methods)
    return None if weight is None else Rule(scheme=LinearScheme(weight), weight_method=method)


def words(scheme: LinearScheme) -> str:
    """A scheme in the words of the recipe language."""
    weight, act = scheme.weight, scheme.act
    if weight is None:
        return "weight float" if act is None else f"weight float with act int{act.bits}"
    group = f", group_size {weight.group}" if weight.group > 1 else ""
    kind = f"weight int{weight.bits} per_{weight.per}{group}"
    if act is None:
        return f"{kind} with act float"
    act_kind = "pd_mix" if act.per == "mix" else f"per_{act.per}"
    return f"{kind} with act int{act.bits} {act_kind}" + ("" if act.symmetric else ", symmetric false")


def _held(scheme: LinearScheme) -> bool:
    targets = (registry.get("targets", name) for name in registry.names("targets"))
    return any(target.format_of(scheme, rotated=False) is not None for target in targets)


def _what_can_be_had() -> Iterator[LinearScheme]:
    """Every combination that some target holds; groups stand there once, with any size."""
    acts = (
        None, Int(8, "token"), Int(4, "token"), Int(8, "tensor", symmetric=False), Int(8, "tensor"),
        Int(8, "mix", symmetric=False),
    )  # fmt: skip
    weights = [w for bits in (8, 4) for w in (Int(bits, "channel"), Int(bits, "group", group=1))]
    for weight in weights:
        yield from (one for act in acts if _held(one := LinearScheme(weight, act)))


def format_of(entry: Entry, side: str, reading: Reading, methods: Methods) -> tuple[Int | None, str | None]:
    """The format and the method of a weight or an activation; None for float, and when something is wrong."""
    found = mapping(entry, FIELDS, f"the {side} of a qconfig", reading)
    if found is None:
        return None, None
    needed = FIELDS[:-1]
    lacking = [name for name in needed if name not in found]
    if lacking:
        why = f"the {side} of a qconfig has no {', '.join(lacking)}: it needs {', '.join(needed)}"
        reading.fault(entry.line, why)
        return None, None
    dtype = _one_of(found["dtype"], "dtype", KNOWN_DTYPES, reading)
    scope = _one_of(found["scope"], "scope", KNOWN_SCOPES, reading)
    allowed = methods.weight if side == "weight" else methods.act
    method = _one_of(found["method"], "method", dict.fromkeys((*KNOWN_METHODS, *allowed)), reading)
    symmetric = found["symmetric"].value
    if not isinstance(symmetric, bool):
        reading.fault(
            found["symmetric"].line, f"symmetric is true or false, this is {found['symmetric'].kind}"
        )
    if dtype is None or scope is None or method is None or not isinstance(symmetric, bool):
        return None, None
    if dtype == "float":
        return None, None
    if dtype not in DTYPES:
        there = f"there are float, {', '.join(DTYPES)}"
        reading.fault(found["dtype"].line, f"dtype {dtype} of the {side} is not supported yet: {there}")
        return None, None
    if method not in allowed:
        there = f"there is {' or '.join(allowed)}"
        reading.fault(found["method"].line, f"method {method} of the {side} is not supported here: {there}")
        return None, None
    per = PER.get((side, scope, symmetric))
    if per is None:
        kind = f"scope {scope} with symmetric {str(symmetric).lower()}"
        why = f"{kind} of the {side} is not supported yet: there are {THERE_ARE[side]}"
        reading.fault(found["scope"].line, why)
        return None, None
    if side == "act" and method == "histogram" and per in ("token", "dynamic-tensor"):
        why = "method histogram belongs to per_tensor and pd_mix: this range is found while the model runs"
        reading.fault(found["method"].line, why)
    group = _ext(found["ext"], side, per, method, reading) if "ext" in found else None
    if per == "group" and group is None and method == "gptq":
        group = GPTQ_GROUP
    if per == "group" and group is None:
        reading.fault(entry.line, "scope per_group needs ext.group_size, a positive whole number")
    return Int(DTYPES[dtype], per, group=group or 0, symmetric=symmetric), method


def _ext(entry: Entry, side: str, per: Granularity, method: str, reading: Reading) -> int | None:
    """The group size of ``ext``, where there is one; the dtype of scales is the server's, and the plan says so."""
    known = ("group_size", "scale_dtype", *EXT.get(method, ()))
    found = mapping(entry, known, f"the ext of the {side}", reading)
    if found is None:
        return None
    if "scale_dtype" in found and _one_of(found["scale_dtype"], "scale_dtype", SCALE_DTYPES, reading):
        reading.note(SCALES)
    if "step" in found:
        reading.note("step of ssz: qc takes 50 turns and keeps the best of them, whatever it says")
    size = found.get("group_size")
    if size is None:
        return None
    if per != "group":
        reading.fault(size.line, f"group_size belongs to scope per_group, and here the scope is per_{per}")
    if isinstance(size.value, bool) or not isinstance(size.value, int) or size.value < 1:
        reading.fault(size.line, f"group_size is a positive whole number, this is {size.kind}")
        return 1
    return size.value


def mapping(entry: Entry, known: Collection[str], what: str, reading: Reading) -> dict[str, Entry] | None:
    """The values of a mapping by key, with a fault for every key that is not known; None where it is no mapping."""
    if not isinstance(entry.value, dict):
        reading.fault(entry.line, f"{what} is a mapping with {', '.join(known)}; this is {entry.kind}")
        return None
    for key in entry.value:
        if key not in known:
            reading.fault(entry.lines[key], registry.unknown(f"key of {what}", key, known))
    return {key: value for key, value in entry.value.items() if key in known}


def globs(entry: Entry, what: str, reading: Reading) -> tuple[str, ...] | None:
    """A list of globs; None when it is something else."""
    if not isinstance(entry.value, tuple):
        reading.fault(entry.line, f"{what} is a list of globs, such as ['*.down_proj']; this is {entry.kind}")
        return None
    texts = [one.value for one in entry.value if isinstance(one.value, str)]
    for one in entry.value:
        if not isinstance(one.value, str):
            reading.fault(one.line, f"{what} is a list of globs, one of them is {one.kind}")
    if what == "include" and not entry.value:
        reading.fault(
            entry.line, "include is an empty list, which chooses nothing: leave it out for everything"
        )
        return None
    return tuple(texts) if len(texts) == len(entry.value) else None


def _one_of(entry: Entry, what: str, known: Collection[str], reading: Reading) -> str | None:
    if not isinstance(entry.value, str):
        reading.fault(entry.line, f"{what} is one of {', '.join(known)}; this is {entry.kind}")
    elif entry.value not in known:
        reading.fault(entry.line, registry.unknown(what, entry.value, known))
    else:
        return entry.value
    return None
