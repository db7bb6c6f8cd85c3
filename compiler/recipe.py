"""Recipes: YAML files of the ``modelslim_v1`` language, read into passes and what a compile is told besides."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import registry
from .contract import Pass, spell
from .errors import Refused
from .qconfig import Methods, Reading, mapping, qconfig_of, rule_of, weight_rule_of
from .recipe_names import API_VERSIONS, OPTIONS, PROCESSORS, RUNNERS, SAVERS
from .scheme import Rule
from .spelling import convert, expansion, maker
from .yaml_text import Entry, read_yaml

API_VERSION = "modelslim_v1"
SPEC = ("process", "dataset", "save", "prior", "runner")
METADATA = ("config_id", "score", "label", "verified_model_types", "verified_tags")
LABELS = ("w_bit", "a_bit", "is_sparse", "kv_cache", "fa_quant", "fa_bit")
SAVER, SAVER_FIELDS = "ascendv1_saver", ("type", "part_file_size", "ext")
ONE_FILE = 1 << 20
"""GiB of a shard that holds everything: what a ``part_file_size`` of 0 means."""


@dataclass(frozen=True)
class Recipe:
    """What a recipe file says; ``Options`` of a compile take the place of what stands here."""

    path: Path
    passes: tuple[Pass, ...]
    notes: tuple[str, ...] = ()
    """Remarks for the plan: presets expanded, settings that mean less than they seem to."""
    target: str | None = None
    dataset: str | None = None
    """Calibration text, by its path from the directory of the recipe."""
    part_file_size: int | None = None
    """Largest file of weights in GiB."""

    def calibration(self) -> tuple[Path, ...]:
        """The file that ``dataset`` names, if it names one; Refused when it is not there."""
        if self.dataset is None:
            return ()
        file = self.path.parent / self.dataset
        if not file.is_file():
            raise Refused(
                f"{self.path}: dataset {self.dataset!r} is no file beside it ({file}): give --calib FILE"
            )
        return (file,)


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a file.

    Raises:
        Refused: It cannot be read, or says something that is wrong or not supported yet: all of that, with lines.
    """
    path = Path(path)
    root = read_yaml(path)
    reading = Reading()
    recipe = _recipe(path, root, reading)
    if recipe is None or reading.faults:
        faults = sorted(reading.faults, key=lambda fault: fault[0])
        if len(faults) == 1:
            raise Refused(f"{path}, line {faults[0][0]}: {faults[0][1]}")
        listed = "\n".join(f"  {i}. line {line}: {why}" for i, (line, why) in enumerate(faults, 1))
        raise Refused(f"{path} has {len(faults)} problems:\n{listed}")
    return recipe


def _recipe(path: Path, root: Entry, reading: Reading) -> Recipe | None:
    """The whole file: ``apiversion``, ``metadata``, ``spec``; other keys are homes of anchors."""
    if not isinstance(root.value, Mapping):
        reading.fault(root.line, f"a recipe is a mapping with apiversion and spec; this is {root.kind}")
        return None
    top = dict(root.value)
    _api_version(top, root, reading)
    if "metadata" in top and top["metadata"].value is not None:
        found = mapping(top["metadata"], METADATA, "metadata", reading) or {}
        if "label" in found:
            mapping(found["label"], LABELS, "the label", reading)
    if "spec" not in top:
        reading.fault(root.line, f"no spec in this recipe{_near('spec', top, root)}")
        return None
    spec = mapping(top["spec"], SPEC, "spec", reading)
    if spec is None:
        return None
    target, size = _save(spec.get("save"), reading)
    dataset = _dataset(spec.get("dataset"), reading)
    _not_yet(spec, reading)
    process = spec.get("process", Entry(None, top["spec"].line, {}))
    if not isinstance(process.value, tuple) or not process.value:
        reading.fault(
            process.line, f"process is a list of passes, '- type: NAME', not empty; this is {process.kind}"
        )
        return None
    passes = [one for item in process.value for one in _item(item, reading)]
    return Recipe(path, tuple(passes), tuple(reading.notes), target, dataset, size)


def _api_version(top: Mapping[str, Entry], root: Entry, reading: Reading) -> None:
    found = top.get("apiversion")
    if found is None:
        reading.fault(
            root.line, f"no apiversion in this recipe{_near('apiversion', top, root)}: write {API_VERSION}"
        )
    elif not isinstance(found.value, str):
        reading.fault(found.line, f"apiversion is {API_VERSION}; this is {found.kind}")
    elif found.value in API_VERSIONS:
        reading.fault(
            found.line,
            f"apiversion {found.value} is not supported: {API_VERSIONS[found.value]}; qc reads {API_VERSION}",
        )
    elif found.value != API_VERSION:
        reading.fault(found.line, registry.unknown("apiversion", found.value, [API_VERSION]))


def _near(name: str, top: Mapping[str, Entry], root: Entry) -> str:
    """``; is 'sepc' on line 3 meant?``, for a top-level key that is not there."""
    close = [key for key in top if sorted(key) == sorted(name) or registry.close(name, [key])]
    return f"; is {close[0]!r} on line {root.lines[close[0]]} meant?" if close else ""


# -- process


def _item(item: Entry, reading: Reading) -> tuple[Pass, ...]:
    """The passes of one item of ``process``; a preset is several."""
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
    if name not in registered:
        why = f"{name} is not supported yet; there are {', '.join(registered)}"
        unknown = registry.unknown("pass", name, {*registered, *PROCESSORS})
        reading.fault(kind.line, why if name in PROCESSORS else unknown)
        return ()
    before = reading.count
    make, fields = maker(name)
    methods = Methods(getattr(make, "weight_methods", ()), getattr(make, "act_methods", ()))
    values = _options(name, item, fields, methods, reading)
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


# -- what stands beside the passes


def _save(entry: Entry | None, reading: Reading) -> tuple[str | None, int | None]:
    """The target and the file size that ``save`` asks for."""
    if entry is None or entry.value in (None, ()):
        return None, None
    if not isinstance(entry.value, tuple) or len(entry.value) != 1:
        reading.fault(entry.line, f"save is a list of one saver, '- type: {SAVER}'; this is {entry.kind}")
        return None, None
    (item,) = entry.value
    kind = item.value.get("type") if isinstance(item.value, Mapping) else None
    if kind is None or not isinstance(kind.value, str):
        reading.fault(item.line, f"a saver is a mapping with type, '- type: {SAVER}'; this is {item.kind}")
        return None, None
    if kind.value != SAVER:
        unknown = registry.unknown("saver", kind.value, {SAVER, *SAVERS})
        why = f"{kind.value} is not supported yet; there is {SAVER}"
        reading.fault(kind.line, why if kind.value in SAVERS else unknown)
        return None, None
    found = mapping(item, SAVER_FIELDS, SAVER, reading) or {}
    if "ext" in found and found["ext"].value:
        reading.fault(found["ext"].line, f"{SAVER}: ext has no keys")
    size = found.get("part_file_size")
    if size is None:
        return "modelslim", None
    if isinstance(size.value, bool) or not isinstance(size.value, int) or size.value < 0:
        reading.fault(
            size.line, f"{SAVER}: part_file_size is GiB per file, a whole number or 0; this is {size.kind}"
        )
        return None, None
    return "modelslim", size.value or ONE_FILE


def _dataset(entry: Entry | None, reading: Reading) -> str | None:
    if entry is None:
        return None
    if isinstance(entry.value, str) and entry.value and "\0" not in entry.value:
        return entry.value
    reading.fault(entry.line, f"dataset is the name of a file of calibration text; this is {entry.kind}")
    return None


def _not_yet(spec: Mapping[str, Entry], reading: Reading) -> None:
    """Parts of ``spec`` that only some of their values are supported of."""
    prior, runner = spec.get("prior"), spec.get("runner")
    if prior is not None and prior.value not in (None, ()):
        reading.fault(prior.line, "prior is not supported yet: stages that run before process")
    if runner is None or runner.value in ("auto", "layer_wise"):
        return
    if runner.value in RUNNERS:
        reading.fault(
            runner.line, f"runner {runner.value} is not supported yet: qc works block by block (layer_wise)"
        )
    else:
        text = str(runner.value) if isinstance(runner.value, str) else runner.kind
        reading.fault(runner.line, registry.unknown("runner", text, {"auto", "layer_wise", *RUNNERS}))
