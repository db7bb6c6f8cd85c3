"""Items of a recipe's ``process``: each becomes the passes that it stands for."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from . import registry
from .contract import Fact, Pass, spell
from .errors import Refused
from .qconfig import Methods, Reading, mapping, qconfig_of, rule_of, weight_rule_of
from .recipe_grids import GRIDS, grid_options
from .recipe_names import OPTIONS, PROCESSORS
from .recipe_rotation import NAME as ROTATION
from .recipe_rotation import adapted
from .scheme import W4A4, Rule
from .spelling import convert, expansion, maker
from .yaml_text import Entry


def passes_of_item(item: Entry, reading: Reading, *, prior: bool = False) -> tuple[Pass, ...]:
    """The passes of one item of ``process``, or of a stage of ``prior``; a preset is several."""
    if not isinstance(item.value, Mapping) or "type" not in item.value:
        keys = f" with the keys {', '.join(item.value)}" if isinstance(item.value, Mapping) else ""
        reading.fault(
            item.line,
            f"a pass is a mapping with type, '- type: NAME' and its options indented below; this is {item.kind}{keys}",
        )
        return ()
    kind = item.value["type"]
    registered = [*registry.names("passes"), *registry.names("presets")]
    if not isinstance(kind.value, str):
        reading.fault(kind.line, f"type is the name of a pass; this is {kind.kind}")
        return ()
    name = kind.value
    if name == "group":
        return _group(item, reading)
    if name == ROTATION:
        return adapted(item, 1 if prior else 2, _value, reading)
    if name not in registered:
        why = f"{name} is not supported yet; there are {', '.join(registered)}"
        unknown = registry.unknown("pass", name, {*registered, *PROCESSORS})
        reading.fault(kind.line, why if name in PROCESSORS else unknown)
        return ()
    before = reading.count
    ext = _gptq_ext(item, reading) if name == "linear_quant" else None
    name = name if ext is None else "gptq"
    make, fields = maker(name)
    methods = Methods(getattr(make, "weight_methods", ()), getattr(make, "act_methods", ()))
    values = {**(ext or {}), **_options(name, item, fields, methods, reading)}
    if name == "quarot" and values.get("online"):
        values = {"max_tp_size": 4, "down_proj_online_layers": (), **values}  # what recipes mean by it
    if reading.count > before:
        return ()
    try:
        made = make(**values)
    except (ValueError, Refused) as error:
        line = item.lines.get(str(error).partition("=")[0], kind.line)
        reading.fault(line, f"{name}: {error}")
        return ()
    passes = made if isinstance(made, tuple) else (made,)
    if expansion(name, passes):
        told = passes[0].name if len(passes) == 1 else ", ".join(map(str, passes))
        reading.note(f"{name} on line {kind.line} is {told}")
    return passes


def with_integers(passes: list[Pass], reading: Reading) -> list[Pass]:
    """A ``flatquant`` that no quantizer follows makes the integers too, as in the reference tool."""
    at = next((i for i, one in enumerate(passes) if one.name == "flatquant"), None)
    if at is None or any(Fact.QUANTIZED in one.provides for one in passes[at:]):
        return passes
    chosen = passes[at].options()
    rule = Rule(scheme=W4A4, include=chosen["include"], exclude=chosen["exclude"])
    more: Pass = registry.get("passes", "gptq")(strategies=(rule,))
    reading.note(f"flatquant learns transforms, and {more} makes the integers")
    return [*passes[: at + 1], more, *passes[at + 1 :]]


def _gptq_ext(item: Entry, reading: Reading) -> dict[str, Any] | None:
    """Options of ``gptq`` where a ``linear_quant`` asks for that method of its weights; None where it does not."""
    at: Entry | None = item
    for key in ("qconfig", "weight"):
        at = at.value.get(key) if at is not None and isinstance(at.value, dict) else None
    weight = at.value if at is not None and isinstance(at.value, dict) else {}
    method, ext = weight.get("method"), weight.get("ext")
    if method is None or method.value != "gptq":
        return None
    found: dict[str, Any] = {}
    given = ext.value if ext is not None and isinstance(ext.value, dict) else {}
    if "percdamp" in given:
        found["percdamp"] = _value(given["percdamp"], float, "gptq: percdamp", Methods(), reading)
    if "block_size" in given:
        reading.note(
            "block_size of gptq: how many columns share a product; it changes no result and is not read"
        )
    return found


def _group(item: Entry, reading: Reading) -> tuple[Pass, ...]:
    """``group``: passes that share their runs over the calibration data, which qc decides by itself."""
    found = mapping(item, ("type", "configs"), "group", reading) or {}
    configs = found.get("configs")
    if configs is None or not isinstance(configs.value, tuple) or not configs.value:
        reading.fault(item.line, "group has a list of passes: configs: [...]")
        return ()
    return tuple(one for inner in configs.value for one in passes_of_item(inner, reading))


def _options(
    name: str, item: Entry, fields: Mapping[str, Any], methods: Methods, reading: Reading
) -> dict[str, Any]:
    """Values of the fields of a pass. ``qconfig`` is one strategy for all linears that the pass takes."""
    assert isinstance(item.value, Mapping)
    values: dict[str, Any] = {}
    missing = OPTIONS.get(name, {})
    short = "strategies" in fields and "qconfig" not in fields
    for key, entry in item.value.items():
        line = item.lines[key]
        if key == "type" or (key in ("include", "exclude") and entry.value is None):
            continue  # no globs: the field's default, in the language of recipes too
        if key in missing:
            reading.fault(line, f"{name}: {key} is not supported yet ({missing[key]})")
        elif name in GRIDS and key in ("qconfig", "details"):
            values |= grid_options(name, key, entry, reading)
        elif short and key == "qconfig":
            if "strategies" in item.value:
                reading.fault(line, f"{name} has a qconfig and strategies: give one of them")
            rule = qconfig_of(entry, reading, methods)
            values["strategies"] = () if rule is None else (rule,)
        elif key not in fields:
            known = [*fields, *missing, *(["qconfig"] if short else [])]
            reading.fault(
                line, registry.unknown(f"option of {name}", key, known) if known else f"{name} has no options"
            )
        elif key in ("include", "strategies") and entry.value == ():
            reading.fault(line, f"{name}: {key} is an empty list, which chooses nothing: leave it out")
        else:
            values[key] = _value(entry, fields[key], f"{name}: {key}", methods, reading)
    return values


def _value(entry: Entry, kind: Any, what: str, methods: Methods, reading: Reading) -> Any:
    """A value of the type of a field: as on the command line, but for lists, which are lists here."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    value = entry.value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in inside:
            return None
        if Rule in inside and isinstance(value, Mapping):
            if what.endswith("weight_qconfig"):
                return weight_rule_of(entry, reading, methods)
            if what.endswith("qconfig"):
                return qconfig_of(entry, reading, methods)
            return rule_of(entry, reading, methods)
        return _value(entry, next(arm for arm in inside if arm is not type(None)), what, methods, reading)
    if origin is tuple:
        if isinstance(value, tuple):
            return tuple(_value(one, inside[0], what, methods, reading) for one in value)
        reading.fault(entry.line, f"{what} is a list, such as [a, b]; this is {entry.kind}")
    elif isinstance(value, Mapping | tuple) or value is None:
        reading.fault(entry.line, f"{what} is one value; this is {entry.kind}")
    elif kind is str and not isinstance(value, str):
        reading.fault(entry.line, f"{what} is text; this is {entry.kind}")
    elif kind in (int, float) and isinstance(value, str) and re.match(r"[-+]?0[0-9_]", value):
        reading.fault(
            entry.line, f"{what} is {entry.kind}: with a leading zero, readers differ over its base"
        )
    else:
        try:
            return convert(spell(value), kind)
        except ValueError as error:
            reading.fault(entry.line, f"{what} is {entry.kind}: {error}")
    return None
