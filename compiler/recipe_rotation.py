"""``adapt_rotation`` of a recipe: a stage in ``prior`` learns a rotation, one in ``process`` applies it."""

from __future__ import annotations

import inspect
from typing import Any

from . import registry
from .contract import Pass
from .qconfig import Methods, Reading
from .yaml_text import Entry

NAME = "adapt_rotation"
STAGES = {
    1: ("steps", "quant_dtype", "layer_type", "block_size", "max_samples"),
    2: ("online", "block_size", "down_proj_online_layers", "max_tp_size"),
}
"""Options of each stage."""
SECTION = {1: "prior", 2: "process"}


def adapted(item: Entry, stage: int, value_of: Any, reading: Reading) -> tuple[Pass, ...]:
    """The passes of an ``adapt_rotation`` that stands in the section of a stage.

    The first stage is kept in ``reading`` and becomes no pass; the second takes it from there. Without a first stage
    the rotation is the plain one, as in the reference tool, and a note says so.
    """
    values = _values(item, stage, value_of, reading)
    if values is None:
        return ()
    if stage == 1:
        reading.adapted = values
        return ()
    first, online = reading.adapted, bool(values.pop("online", False))
    more = {key: values.pop(key) for key in ("max_tp_size", "down_proj_online_layers") if key in values}
    if online:
        more = {"max_tp_size": 4, "down_proj_online_layers": (), **more, "online": True}
    elif more.get("down_proj_online_layers"):
        reading.note(
            f"{NAME}: down_proj_online_layers is for online: true; without it nothing is rotated online"
        )
        more = {}
    else:
        more = {}
    name = "quarot" if first is None else NAME
    if first is None:
        reading.note(f"{NAME}: no stage 1 in prior, so the rotation is that of quarot")
    sizes = {size for one in (first or {}, values) if (size := one.get("block_size")) is not None}
    if len(sizes) > 1:
        reading.fault(
            item.line, f"{NAME}: block_size is {' and '.join(map(str, sorted(sizes)))} in its two stages"
        )
        return ()
    try:
        made = registry.get("presets", name)(**{**(first or {}), **values, **more})
    except ValueError as error:
        reading.fault(item.lines.get(str(error).partition("=")[0], item.line), f"{NAME}: {error}")
        return ()
    reading.note(f"{NAME} on line {item.line} is {', '.join(map(str, made))}")
    return made


def _values(item: Entry, stage: int, value_of: Any, reading: Reading) -> dict[str, Any] | None:
    """The options of one stage by name; None when something is wrong with them."""
    assert isinstance(item.value, dict)
    before = reading.count
    given = item.value.get("stage")
    if given is None or given.value not in STAGES or isinstance(given.value, bool):
        reading.fault(item.line, f"{NAME} has a stage: 1 in prior, 2 in process")
        return None
    if given.value != stage:
        reading.fault(
            given.line, f"{NAME}: stage {given.value} belongs into spec.{SECTION[int(str(given.value))]}"
        )
        return None
    parameters = inspect.signature(registry.get("presets", NAME), eval_str=True).parameters
    values: dict[str, Any] = {}
    for key, entry in item.value.items():
        if key in ("type", "stage"):
            continue
        if key in STAGES[stage]:
            values[key] = value_of(entry, parameters[key].annotation, f"{NAME}: {key}", Methods(), reading)
        elif key in STAGES[3 - stage]:
            reading.fault(item.lines[key], f"{NAME}: {key} belongs to stage {3 - stage}")
        else:
            reading.fault(item.lines[key], registry.unknown(f"option of {NAME}", key, STAGES[stage]))
    return values if reading.count == before else None
