"""Recipes: YAML files of the ``modelslim_v1`` language, read into passes and what a compile is told besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from . import registry
from .contract import Pass
from .errors import Refused
from .qconfig import Reading, mapping
from .recipe_names import API_VERSIONS, RUNNERS
from .recipe_passes import passes_of_item, with_integers
from .yaml_text import Entry, read_yaml

API_VERSION = "modelslim_v1"
SPEC = ("process", "dataset", "save", "prior", "runner")
METADATA = ("config_id", "score", "label", "verified_model_types", "verified_tags")
LABELS = ("w_bit", "a_bit", "is_sparse", "kv_cache", "fa_quant", "fa_bit")
SAVER, SAVER_FIELDS = "ascendv1_saver", ("type", "part_file_size", "ext")
SAVERS = {
    SAVER: "modelslim",
    "mindie_format_saver": "mindie",
    "mindie_format": "mindie",
    "compressed_tensors": "compressed-tensors",
}
"""Savers to the targets that they mean."""
DISTRIBUTED = "ascendv1_saver_distributed"
"""The same files, written by several processes."""
ONE_TEXT = "the rotation is learned on the text that calibrates the rest"
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
    _prior(spec.get("prior"), reading)
    _runner(spec.get("runner"), reading)
    process = spec.get("process", Entry(None, top["spec"].line, {}))
    if not isinstance(process.value, tuple) or not process.value:
        reading.fault(
            process.line, f"process is a list of passes, '- type: NAME', not empty; this is {process.kind}"
        )
        return None
    passes = with_integers([one for item in process.value for one in passes_of_item(item, reading)], reading)
    if reading.adapted is not None and not any(one.name == "adapt_residual" for one in passes):
        reading.note("adapt_rotation of prior is left out: process has no second stage, which would apply it")
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
    saver = SAVER if kind.value == DISTRIBUTED else kind.value
    if saver not in SAVERS:
        reading.fault(kind.line, registry.unknown("saver", kind.value, {DISTRIBUTED, *SAVERS}))
        return None, None
    target = SAVERS[saver]
    found = mapping(item, SAVER_FIELDS if saver == SAVER else SAVER_FIELDS[:2], saver, reading) or {}
    if "ext" in found and found["ext"].value:
        reading.fault(found["ext"].line, f"{saver}: ext has no keys")
    size = found.get("part_file_size")
    if size is None:
        return target, None
    if isinstance(size.value, bool) or not isinstance(size.value, int) or size.value < 0:
        reading.fault(
            size.line, f"{saver}: part_file_size is GiB per file, a whole number or 0; this is {size.kind}"
        )
        return None, None
    return target, size.value or ONE_FILE


def _dataset(entry: Entry | None, reading: Reading) -> str | None:
    if entry is None:
        return None
    if isinstance(entry.value, str) and entry.value and "\0" not in entry.value:
        return entry.value
    reading.fault(entry.line, f"dataset is the name of a file of calibration text; this is {entry.kind}")
    return None


def _prior(entry: Entry | None, reading: Reading) -> None:
    """Stages before the main one: each begins from a fresh model, so that only what hands something on counts."""
    if entry is None or entry.value in (None, ()):
        return
    if not isinstance(entry.value, tuple):
        reading.fault(entry.line, f"prior is a list of stages, '- process: [...]'; this is {entry.kind}")
        return
    for stage in entry.value:
        found = mapping(stage, ("process", "dataset"), "a stage of prior", reading)
        process = (found or {}).get("process")
        if found is None or process is None or not isinstance(process.value, tuple):
            reading.fault(stage.line, "a stage of prior has a list of passes: process: [...]")
            continue
        _dataset(found.get("dataset"), reading)
        passes = [one for item in process.value for one in passes_of_item(item, reading, prior=True)]
        data = (found.get("dataset") or stage).value if reading.adapted else None
        if isinstance(data, str):
            reading.note(f"dataset {data} of the stage of prior on line {stage.line} is not read: {ONE_TEXT}")
        if passes:
            reading.note(
                f"the stage of prior on line {stage.line} ({', '.join(map(str, passes))}) is left out: it hands"
                " nothing on to the main one, which begins from the model as it is"
            )


def _runner(entry: Entry | None, reading: Reading) -> None:
    """How the reference tool shares out the work; qc works block by block whatever it says."""
    if entry is None or entry.value in ("auto", "layer_wise"):
        return
    if entry.value in RUNNERS:
        reading.note(
            f"runner {entry.value}: qc works block by block, as layer_wise does, with the same result"
        )
        return
    text = str(entry.value) if isinstance(entry.value, str) else entry.kind
    reading.fault(entry.line, registry.unknown("runner", text, {"auto", "layer_wise", *RUNNERS}))
