"""The modules that a quantized checkpoint calls for, put into a model of transformers on meta."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    rename_source_key,
)

from ..runtime.divided import INNER, LEAF, DividedLinear
from ..runtime.formats import BESIDE, FORMATS, type_of
from ..runtime.linear import ROTATIONS, IntegerLinear
from ..runtime.norm import RMSNormBias
from ..runtime.w4a8 import SHARES, W4A8Dynamic
from .capture_attention import NAME
from .capture_experts import stacks_of, use_experts
from .capture_grids import install_grids
from .description import DESCRIPTION, FLOAT, FLOATS
from .errors import Refused
from .expert_weights import place_of
from .safetensors_io import Entry
from .shards import find_shards
from .weights import Checkpoint

_PROBE = 1e-2
"""Input at which a norm shows its eps: its square is near what eps usually is."""


class QuantizedCheckpoint(Checkpoint):
    """A checkpoint whose tensors are those of integer linears: ``name_of`` says to which parameter one belongs.

    Raises:
        Refused: As for ``Checkpoint``; also a tensor that belongs to no part of the model.
    """

    def __init__(self, path: Path, model: nn.Module, name_of: Callable[[str], str]) -> None:
        self._name_of = name_of
        super().__init__(path, model)
        if self.unused:
            raise Refused(
                f"{path}: {len(self.unused)} tensors belong to no part of the model that config.json describes,"
                f" among them {', '.join(self.unused[:3])}"
            )

    def _parameter(self, disk: str, *table: Any) -> tuple[str, str | None]:
        name = self._name_of(disk)
        return (name, None) if name in self._expected else super()._parameter(disk, *table)

    def _refuse_quantized(self) -> None:
        """It is."""


def check_exact(model: nn.Module, source: Checkpoint) -> None:
    """Refuse a tensor of an integer linear that is stored in another dtype than its type has: it is never cast."""
    for prefix, module in model.named_modules():
        if not isinstance(module, IntegerLinear):
            continue
        for leaf, (wanted, _) in module.tensors(bias=module.bias is not None).items():
            name = f"{prefix}.{leaf}"
            found = source.dtype(name)
            if found != wanted:
                raise Refused(f"{source.path}: {name} is stored as {found}; its type needs {wanted}")


def install(
    model: PreTrainedModel,
    path: Path,
    description: Mapping[str, Any],
    stored: torch.dtype,
    dtype: torch.dtype,
) -> tuple[Callable[[str], str], frozenset[str]]:
    """Put the modules on meta that the files call for.

    Args:
        model: A float model on meta, which is changed.
        path: The directory with the tensors.
        description: Their types.
        stored: The dtype of the model that they were made for.
        dtype: In which floats are going to run.

    Returns:
        How a tensor on disk is named in the model, and the attentions that run on int8 grids.

    Raises:
        Refused: A type that there is not, or a quantized tensor where the model has no place for it.
    """
    entries = find_shards(path).entries
    name_of = _install_linears(model, path, description, entries, stored, dtype)
    return name_of, install_grids(model, description, entries, name_of, str(path))


def _install_linears(
    model: PreTrainedModel, path: Path, description: Mapping[str, Any], entries: Mapping[str, Entry],
    stored: torch.dtype, dtype: torch.dtype,
) -> Callable[[str], str]:  # fmt: skip
    name_of = renaming(model)
    types = {
        key.removesuffix(".weight"): kind for key, kind in description.items() if key.endswith(".weight")
    }
    for disk in entries:
        if disk.endswith(".weight") and disk.removesuffix(".weight") not in types:
            raise Refused(f"{path / DESCRIPTION}: no entry for {disk}, so its type is not known")
    inside = {name for name, module in model.named_modules() if stacks_of(module)}
    integers = (name_of(f"{prefix}.weight") for prefix, kind in types.items() if kind not in FLOATS)
    if any(name.rsplit(".", 3)[0] in inside for name in integers):
        use_experts(model, NAME)
    for prefix, kind in types.items():
        if kind in FLOATS:
            continue
        where = f"{path}: {prefix}"
        if f"{prefix}.weight" not in entries:
            raise Refused(f"{where} is {kind} by the description, but its weight is in no file")
        outer = prefix.removesuffix(f".{INNER}")
        whole = f"{outer}.{LEAF}" in entries and outer != prefix
        name = name_of(f"{outer if whole else prefix}.weight").removesuffix(".weight")
        module: nn.Module = _linear(model, name, kind, prefix, entries, stored, where)
        if whole:
            module = DividedLinear(module, entries[f"{outer}.{LEAF}"].shape[0], dtype)
        _replace(model, name, module)
    expected = model.state_dict()
    for disk in entries:
        name = name_of(disk)
        if disk.endswith(".bias") and name not in expected:
            _give_bias(model, name.removesuffix(".bias"), dtype, f"{path}: {disk}")
    return name_of


def renaming(model: nn.Module) -> Callable[[str], str]:
    """Names on disk to names in the model, as transformers renames them; those of an expert to its own linears."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    patterns = {pattern: list(c.source_patterns) for c in converters for pattern in c.source_patterns}
    expected, prefix = model.state_dict(), getattr(model, "base_model_prefix", None) or None
    stacks = {f"{n}.{s.name}": (n, s) for n, module in model.named_modules() for s in stacks_of(module)}

    def name_of(disk: str) -> str:
        plain, _ = rename_source_key(disk, renamings, [], prefix, expected)
        if plain in expected:
            return plain
        module, _, leaf = disk.rpartition(".")
        whole, pattern = rename_source_key(f"{module}.weight", renamings, converters, prefix, expected)
        if pattern is not None and whole in stacks:
            experts, stack = stacks[whole]
            renamed = apply_renamings(f"{module}.weight", renamings)  # type: ignore[arg-type]
            place = place_of(stack, patterns[pattern], pattern, renamed)
            if place is not None:
                return f"{experts}.{place[0]}.{place[1]}.{leaf}"
        name, _ = rename_source_key(f"{module}.weight", renamings, [], prefix, expected)
        return name.removesuffix("weight") + leaf

    return name_of


def _linear(
    model: nn.Module,
    name: str,
    kind: str,
    prefix: str,
    entries: Mapping[str, Entry],
    stored: torch.dtype,
    where: str,
) -> IntegerLinear:
    known = dict(model.named_modules())
    weight_there = getattr(known.get(name), "weight", None)
    if not isinstance(weight_there, Tensor) or isinstance(known[name], nn.Embedding):
        near = get_close_matches(name, known, 1, 0.6)
        hint = f"; the nearest module is {near[0]}" if near else ""
        raise Refused(f"{where} is {kind}, but the model has no linear of its own there{hint}")
    module = format_on_meta(kind, prefix, entries, stored, where)
    if sorted((module.out_features, module.in_features)) != sorted(weight_there.shape):
        shape = list(entries[f"{prefix}.weight"].shape)
        raise Refused(f"{where} has an integer weight {shape}, the model's is {list(weight_there.shape)}")
    return module


def format_on_meta(
    kind: str, prefix: str, entries: Mapping[str, Entry], stored: torch.dtype, where: str
) -> IntegerLinear:
    """The module on meta that holds the tensors ``prefix.*`` of a linear of type ``kind`` in a model of ``stored``.

    Raises:
        Refused: There is no such type, or the shapes are not those of one.
    """
    format, beside = type_of(kind) if isinstance(kind, str) else (None, None)  # a file can say anything
    if format is None or (beside and (format.packed or format.rotated)):
        raise Refused(
            f"{where} has the type {kind!r}; this runs {', '.join(FORMATS)} and {FLOAT}, some with"
            f" {', '.join(BESIDE)} behind"
        )
    weight = entries[f"{prefix}.weight"]
    if len(weight.shape) != 2:
        raise Refused(f"{where} has an integer weight of {len(weight.shape)} axes, a linear has 2")
    out_features, in_features = weight.shape
    options: dict[str, Any] = {}
    if issubclass(format, W4A8Dynamic):
        shares = entries.get(f"{prefix}.scale_bias")
        out_features, options["row_parallel"] = (
            2 * out_features,
            shares is not None and shares.shape[1:] == (SHARES,),
        )
    if format.rotated:
        sizes = _sides(prefix, ("left_trans", "right_trans"), entries, where)
        if len(sizes) == 2 and in_features % (sizes[0] * sizes[1]) == 0:
            options["blocks"] = in_features // (sizes[0] * sizes[1])
    for turn, names in ROTATIONS.items():
        sizes = _sides(prefix, names, entries, where)
        if len(sizes) == len(names):
            options["rotation"] = (turn, sizes[0], sizes[1] if len(sizes) > 1 else in_features // sizes[0])
    if beside is not None:
        there = {leaf: entries.get(f"{prefix}.{leaf}") for leaf in beside.leaves}
        try:
            options["beside"] = beside.of_shapes({n: e.shape for n, e in there.items() if e is not None})
        except ValueError as error:
            raise Refused(f"{where} is {kind}, but {error}") from error
    scale = entries.get(f"{prefix}.weight_scale")
    groups = scale.shape[-1] if scale is not None and scale.shape else 1
    try:
        return format(
            in_features,
            out_features,
            bias=f"{prefix}.bias" in entries,
            dtype=stored,
            group_size=in_features // groups if groups > 1 else 0,
            device="meta",
            **options,
        )
    except ValueError as error:
        raise Refused(f"{where}: {error}") from error


def _sides(prefix: str, leaves: Sequence[str], entries: Mapping[str, Entry], where: str) -> list[int]:
    """Sizes of the factors of a rotation that are in the files; Refused where one is no matrix."""
    found = {leaf: entries[f"{prefix}.{leaf}"].shape for leaf in leaves if f"{prefix}.{leaf}" in entries}
    for leaf, shape in found.items():
        if len(shape) != 2 or not shape[0]:
            raise Refused(f"{where} has a {leaf} {list(shape)}, and a rotation is a square matrix")
    return [shape[0] for shape in found.values()]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _give_bias(model: nn.Module, name: str, dtype: torch.dtype, where: str) -> None:
    """Give a float linear, or an RMS norm, the bias that the model's own has not."""
    module = dict(model.named_modules()).get(name)
    if isinstance(module, nn.Linear):
        module.bias = nn.Parameter(torch.empty(module.out_features, dtype=dtype, device="meta"))
        return
    weight = getattr(module, "weight", None)
    if module is None or not isinstance(weight, Tensor) or weight.dim() != 1:
        raise Refused(f"{where} is a bias, and the model has no place for one there")
    eps, offset = _rms_norm(module, weight.shape[0], where)
    _replace(model, name, RMSNormBias(weight.shape[0], eps=eps, offset=offset, dtype=dtype, device="meta"))


def _rms_norm(module: nn.Module, width: int, where: str) -> tuple[float, float]:
    """Eps of an RMS norm and what it adds to its weight, found by running a copy of it."""
    norm = deepcopy(module).to_empty(device="cpu").to(torch.float32)

    def run(x: Tensor, weight: float) -> Tensor:
        norm.load_state_dict({"weight": torch.full((width,), weight)})
        return norm(x).to(torch.float64)

    with torch.no_grad():
        constant = torch.full((1, width), _PROBE)
        one, zero = run(constant, 1.0), run(constant, 0.0)
        offset = float((zero / (one - zero)).mean().round())
        gain = one.mean() / (1 + offset)
        eps = float(f"{float(_PROBE**2 * (1 / gain**2 - 1)):.3g}")
        x = torch.linspace(-1, 2, width).unsqueeze(0)
        y = run(x, 0.5)
    wanted = x / (x.square().mean() + eps).sqrt() * (0.5 + offset)
    if not torch.allclose(y, wanted.to(torch.float64), rtol=1e-4, atol=1e-5):
        raise Refused(f"{where} is the bias of a norm that is no RMS norm")
    return eps, offset
