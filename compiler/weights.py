"""Checkpoint: the weights of a Hugging Face model by parameter name, read from safetensors when asked for.

Names in files are not parameter names: transformers keeps a table of renamings and conversions (experts that
are stacked, packed projections that are split), which is applied here to the names alone when a checkpoint is
opened, to the tensors of one request when they are loaded, and backwards at export.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from .errors import Refused
from .reading import Reading, run, with_prefix_of
from .safetensors_io import Entry, TensorSpec, read_tensors
from .shards import Shards, find_shards, read_json

_COMPARED = 2**24
"""Elements of two tied tensors that are compared at once."""


class Checkpoint:
    """A Hugging Face checkpoint directory as a source of weights (``WeightSource``).

    Opening it reads the config and the headers of all shards and checks that every parameter of the model is
    there with its shape; no tensor is read, except two that are tied and both stored, which are compared.

    Args:
        path: Checkpoint directory with ``config.json`` and ``model.safetensors`` or its sharded form.
        model: The model on meta; its ``state_dict`` says which names and shapes are expected. Without it,
            names are those on disk.

    Raises:
        Refused: See ``find_shards``; also no config, weights that are already quantized, a parameter that is
            missing or has another shape.
    """

    def __init__(self, path: str | Path, model: nn.Module | None = None) -> None:
        self.path = Path(path)
        if not (self.path / "config.json").is_file():
            raise Refused(
                f"{self.path}: no config.json; a Hugging Face checkpoint directory is expected"
                if self.path.is_dir()
                else f"{self.path}: no such directory"
            )
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        self._refuse_quantized()
        self.shards: Shards = find_shards(self.path)
        self._model = model if model is not None else nn.Module()
        self._expected: dict[str, torch.Tensor] = (
            self._state(model)
            if model is not None
            else {
                name: torch.empty(e.shape, dtype=e.dtype, device="meta")
                for name, e in self.shards.entries.items()
            }
        )
        self._readings: dict[str, Reading] = {}
        self._specs: dict[str, TensorSpec] = {}
        self.unused: tuple[str, ...] = tuple(self._open())
        """Tensors on disk that no parameter of the model comes from."""
        self.ties: Mapping[str, str] = dict(self._tie())
        """Parameters that are stored under the name of another one, with that name."""
        self._check()

    def _state(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The parameters and persistent buffers that transformers expects to find."""
        state = model.state_dict(keep_vars=True)
        return {name: tensor for name, tensor in state.items() if torch.is_tensor(tensor)}

    @property
    def files(self) -> tuple[Path, ...]:
        """Config, index and shards: what the weights depend on."""
        return (self.path / "config.json", *self.shards.files)

    def names(self) -> Iterable[str]:
        """Parameters and persistent buffers of the model, ties included."""
        return self._expected.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter."""
        return self._spec(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Storage dtype of a parameter."""
        return self._spec(name).dtype

    def load(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Read parameters in their storage dtype into memory of their own; tied ones are one tensor.

        Files are open for this call only.

        Raises:
            Refused: An unknown name, or a shard that was shortened since it was opened.
        """
        names = list(names)
        readings = {self._reading(name).first: self._reading(name) for name in names}
        wanted: dict[Path, dict[str, Entry]] = {}
        for reading in readings.values():
            for disk, _ in reading.sources:
                wanted.setdefault(self.shards.file[disk], {})[disk] = self.shards.entries[disk]
        stored: dict[str, torch.Tensor] = {}
        for file, entries in wanted.items():
            stored |= read_tensors(file, entries)
        loaded: dict[str, torch.Tensor] = {}
        for reading in readings.values():
            loaded |= reading.convert({disk: stored.pop(disk) for disk, _ in reading.sources}, self._model)
        return {name: loaded[self.ties.get(name, name)] for name in names}

    def disk_names(self, name: str) -> tuple[str, ...]:
        """The tensors on disk that a parameter is made from; of a tied one, those of its owner."""
        return tuple(disk for disk, _ in self._reading(name).sources)

    def disk_spec(self, disk: str) -> TensorSpec:
        """Dtype and shape of a tensor on disk."""
        entry = self.shards.entries[disk]
        return TensorSpec(entry.dtype, entry.shape)

    def disk_tensors(self, name: str, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The tensors on disk that a parameter becomes, in the dtype of ``spec``; it may be an added one."""
        reading = self._readings.get(name)
        if reading is None or reading.converter is None:
            return {self.disk_name(name): spec}
        return {disk: TensorSpec(spec.dtype, self.disk_spec(disk).shape) for disk in self.disk_names(name)}

    def separable(self, name: str) -> bool:
        """Whether a parameter has one tensor on disk that holds nothing else."""
        reading = self._readings.get(name)
        return reading is None or reading.converter is None

    def disk_name(self, name: str) -> str:
        """The name under which a tensor of the model is written so that it fits the input checkpoint.

        It need not exist: a scale beside a weight, or a head that was tied, follows the names of its
        neighbours.
        """
        reading = self._readings.get(name)
        if reading is not None and len(reading.sources) == 1 and reading.converter is None:
            return reading.sources[0][0]
        if name in self.ties and isinstance(self._model, PreTrainedModel):
            transforms = get_model_conversion_mapping(self._model, add_legacy=False)
            renamings = [t.reverse_transform() for t in reversed(transforms) if type(t) is WeightRenaming]
            return apply_renamings(name, renamings)  # pyright: ignore[reportArgumentType]
        module, _, leaf = name.rpartition(".")
        prefix = self._prefix(module)
        return f"{prefix}.{leaf}" if prefix else leaf

    def to_disk(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Invert ``load``: parameters by name to tensors by their names on disk.

        Parameters that come from one tensor on disk (a packed projection) must be given together. One that
        is not in the input (an added bias, a head that is no longer tied) gets its name from ``disk_name``.
        """
        own = {
            name: self._readings[name] for name in tensors if name in self._readings and name not in self.ties
        }
        result = {self.disk_name(name): tensor for name, tensor in tensors.items() if name not in own}
        for reading in {r.first: r for r in own.values()}.values():
            if reading.converter is None:
                result[reading.sources[0][0]] = tensors[reading.first]
                continue
            back = reading.converter.reverse_transform()
            given: list[tuple[str, str, str, torch.Tensor]] = []
            for name in (name for name, other in self._readings.items() if other is reading):
                renamed, pattern = back.rename_source_key(name)
                given.append((renamed, name, str(pattern), tensors[name]))
            inverted = run(back, given, self._model)
            for (disk, _), renamed in zip(reading.sources, reading.renamed, strict=True):
                result[disk] = inverted[renamed]
        return result

    def check_finite(self, name: str, tensor: torch.Tensor) -> None:
        """Refuse a loaded weight with NaN or infinity in it, naming its file."""
        if not tensor.is_floating_point() or tensor.numel() == 0:
            return
        low, high = torch.aminmax(tensor)
        if torch.isfinite(low) and torch.isfinite(high):
            return
        bad = ~torch.isfinite(tensor)
        place = tuple(torch.nonzero(bad)[0].tolist())
        disk = self.disk_names(name)
        files = ", ".join(sorted({self.shards.file[d].name for d in disk}))
        raise Refused(
            f"{name} has {int(bad.sum())} values that are not finite, the first at {list(place)} (on disk: "
            f"{disk[0]}{' and others' if disk[1:] else ''} in {files}); the checkpoint is damaged: download"
            " it again"
        )

    # -- opening

    def _refuse_quantized(self) -> None:
        for part in (self.config, self.config.get("text_config") or {}):
            block = part.get("quantization_config") or part.get("compression_config")
            if block:
                method = block.get("quant_method", "unknown") if isinstance(block, dict) else block
                raise Refused(
                    f"{self.path}: config.json has a quantization_config ({method}): the weights are quantized"
                    " already; start from the float checkpoint"
                )

    def _open(self) -> Iterator[str]:
        """Find out what is made from which tensors; yield the tensors from which nothing is made."""
        model = self._model
        known = isinstance(model, PreTrainedModel)
        transforms = get_model_conversion_mapping(model) if known else []
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        converter_of = {pattern: c for c in converters for pattern in c.source_patterns}
        prefix = (model.base_model_prefix or None) if known else None
        groups: dict[str, list[tuple[str, str, str]]] = {}
        used: dict[str, WeightConverter] = {}
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        for disk in sorted(self.shards.entries, key=dot_natural_key):
            name, pattern = self._parameter(disk, renamings, converters, prefix)
            if name not in self._expected:
                if not any(re.search(expression, disk) for expression in ignored):
                    yield disk
                continue
            renamed = disk
            if pattern is not None:
                used[name] = converter_of[pattern]
                renamed = apply_renamings(disk, renamings)
                renamed = with_prefix_of(name, apply_converters(renamed, converters)[0], renamed)
            groups.setdefault(name, []).append((disk, pattern or disk, renamed))
        for name, group in groups.items():
            sources = tuple((disk, pattern) for disk, pattern, _ in group)
            if name not in used and len(group) > 1:
                raise Refused(f"{self.path}: {group[0][0]} and {group[1][0]} are both the parameter {name}")
            reading = Reading(name, sources, tuple(renamed for *_, renamed in group), used.get(name))
            self._admit(reading)

    def _parameter(
        self,
        disk: str,
        renamings: list[WeightRenaming],
        converters: list[WeightConverter],
        prefix: str | None,
    ) -> tuple[str, str | None]:
        """The parameter that a tensor on disk belongs to, and the pattern of the conversion that makes it."""
        name, pattern = rename_source_key(disk, renamings, converters, prefix, self._expected)
        if name not in self._expected and disk in self._expected:
            return rename_source_key(disk, [], [], prefix, self._expected)
        return name, pattern

    def _admit(self, reading: Reading) -> None:
        """Register a reading under the names that it makes, found by running it on meta."""
        meta = {
            disk: torch.empty(
                self.shards.entries[disk].shape, dtype=self.shards.entries[disk].dtype, device="meta"
            )
            for disk, _ in reading.sources
        }
        try:
            made = reading.convert(meta, self._model)
        except (RuntimeError, ValueError, KeyError, IndexError) as error:
            raise Refused(
                f"{self.path}: {reading.first} cannot be made from {len(meta)} tensors such as"
                f" {reading.sources[0][0]}: {error}; is an expert missing?"
            ) from error
        for name, tensor in made.items():
            self._readings[name] = reading
            self._specs[name] = TensorSpec(tensor.dtype, tuple(tensor.shape))

    def _tie(self) -> Iterator[tuple[str, str]]:
        """Parameters that share storage in the model: the stored one owns it."""
        groups: dict[int, list[str]] = {}
        for name, tensor in self._expected.items():
            groups.setdefault(id(tensor), []).append(name)
        for names in groups.values():
            stored = [name for name in names if name in self._readings]
            if len(names) == 1 or not stored:
                continue
            for other in stored[1:]:
                if not self._equal(stored[0], other):
                    raise Refused(
                        f"{self.path}: config.json ties {other} to {stored[0]}, but the files hold two"
                        " different tensors; set tie_word_embeddings to false in config.json to use both"
                    )
            for name in names:
                if name != stored[0]:
                    yield name, stored[0]

    def _equal(self, left: str, right: str) -> bool:
        pair = [self._readings[name] for name in (left, right)]
        if self._specs[left] != self._specs[right] or any(r.converter is not None for r in pair):
            return False
        a, b = (
            read_tensors(self.shards.file[disk], {disk: self.shards.entries[disk]})[disk].flatten()
            for disk in (r.sources[0][0] for r in pair)
        )
        return all(torch.equal(x, y) for x, y in zip(a.split(_COMPARED), b.split(_COMPARED), strict=True))

    def _check(self) -> None:
        """Every expected parameter is stored or tied, with the shape and kind of dtype that the model has."""
        missing = [n for n in self._expected if n not in self._readings and n not in self.ties]
        if missing:
            near = get_close_matches(missing[0], self.unused, 1, 0.6)
            hint = f"; did the files mean {missing[0]} by {near[0]}?" if near else ""
            raise Refused(
                f"{self.path}: {len(missing)} of {len(self._expected)} parameters of the model are not in the"
                f" files, among them {', '.join(missing[:3])}{hint}"
            )
        for name, wanted in self._expected.items():
            found = self._spec(name)
            disk = self.disk_names(name)[0]
            where = f"{self.path / self.shards.file[disk].name}: {disk}"
            if found.shape != tuple(wanted.shape):
                raise Refused(
                    f"{where} makes {name} {list(found.shape)}, but config.json describes a model where it is"
                    f" {list(wanted.shape)}: config and weights do not belong together"
                )
            if wanted.is_floating_point() and (
                not found.dtype.is_floating_point or found.dtype.itemsize == 1
            ):
                raise Refused(
                    f"{where} is stored as {found.dtype}: the checkpoint is quantized already; start from the"
                    " float checkpoint"
                )

    # -- looking up

    def _reading(self, name: str) -> Reading:
        reading = self._readings.get(self.ties.get(name, name))
        if reading is None:
            near = get_close_matches(name, list(self._expected), 1, 0.6)
            raise Refused(
                f"{self.path}: no parameter {name}" + (f"; did you mean {near[0]}?" if near else "")
            )
        return reading

    def _spec(self, name: str) -> TensorSpec:
        self._reading(name)
        return self._specs[self.ties.get(name, name)]

    def _prefix(self, module: str) -> str:
        """The name of a module on disk, from its parameters or else from its parent."""
        if module in self._prefixes:
            return self._prefixes[module]
        parent, _, last = module.rpartition(".")
        prefix = self._prefix(parent) if module else ""
        return f"{prefix}.{last}" if prefix else last

    @cached_property
    def _prefixes(self) -> dict[str, str]:
        result: dict[str, str] = {}
        for name, reading in self._readings.items():
            disk = reading.sources[0][0]
            if reading.converter is not None:
                continue
            left, right = name.split("."), disk.split(".")
            leaf = 1
            while leaf <= min(len(left), len(right)):
                result.setdefault(".".join(left[:-leaf]), ".".join(right[:-leaf]))
                if left[-leaf - 1 : -leaf] != right[-leaf - 1 : -leaf]:
                    break
                leaf += 1
        result[""] = ""
        return result
