"""The layers that vllm-ascend makes of a model, and the type that it finds for each (rules A3, A4, A13, A14)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from ..capture_sizes import LinearShape, Sizes
from .releases import Release
from .target import Finding
from .vllm_parameters import Parameter, expert_parameters, linear_parameters

FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
"""Linears that the server runs as one, by the names that its model classes have for them."""
ROW_PARALLEL = ("o_proj", "down_proj", "out_proj", "w2", "dense", "fc2", "dense_4h_to_h", "c_proj")
"""Linears whose input channels it deals out over ranks."""
FLOAT = "FLOAT"


@dataclass(frozen=True)
class Layer:
    """One linear of the server: one of the model's, or several that it fuses."""

    name: str
    shards: Mapping[str, LinearShape]
    """The model's linears that it is made of, by their full names."""
    head: bool = False

    @property
    def fused(self) -> bool:
        """Whether it stands for more than one."""
        return len(self.shards) > 1

    @property
    def row_parallel(self) -> bool:
        """Whether ranks cut its input channels."""
        return self.name.rpartition(".")[2] in ROW_PARALLEL


@dataclass
class Served:
    """What the server registers for a whole model: parameters by the names that the model has for them."""

    layers: dict[str, tuple[Layer, str]] = field(default_factory=dict)
    """Layer by name, with its type; those that it refuses are not there."""
    parameters: dict[str, dict[str, Parameter]] = field(default_factory=dict)
    """Linear of the model (a shard, or one of an expert) to its parameters by leaf."""
    kinds: dict[str, str] = field(default_factory=dict)
    """Linear of the model to the type that it is served as."""
    refused: set[str] = field(default_factory=set)
    """Linears of which no layer is made, so that their tensors say nothing more."""
    findings: list[Finding] = field(default_factory=list)


def layers_of(sizes: Sizes) -> Iterator[Layer]:
    """The layers of the server, fused where its model classes fuse."""
    children: dict[str, set[str]] = {}
    for name in sizes.linears:
        parent, _, own = name.rpartition(".")
        children.setdefault(parent, set()).add(own)
    done: set[str] = set()
    for name in sizes.linears:
        if name in done or f"{name}.weight" in sizes.ties:
            continue
        parent, _, own = name.rpartition(".")
        group = next(((k, v) for k, v in FUSED.items() if own in v and children[parent].issuperset(v)), None)
        if group is None:
            yield Layer(name, {name: sizes.linears[name]}, head=name == sizes.head)
            continue
        shards = {f"{parent}.{one}": sizes.linears[f"{parent}.{one}"] for one in group[1]}
        done |= shards.keys()
        yield Layer(f"{parent}.{group[0]}", shards)


def served(
    sizes: Sizes, types: Mapping[str, str], group: int, release: Release, dtype: torch.dtype, tp: int
) -> Served:
    """What the server makes of a model whose weights have these types.

    Args:
        sizes: The model.
        types: Name of a weight, as the model has it, to its type string.
        group: The description's ``group_size``.
        release: Of the server.
        dtype: Of the model's floats.
        tp: Ranks.
    """
    found = Served()
    floats = [name for name, kind in types.items() if kind == FLOAT]
    for layer in layers_of(sizes):
        kind = _type_of(layer, types, floats, release, found.findings)
        if kind is None:
            found.refused |= layer.shards.keys()
            continue
        try:
            parameters = {
                name: linear_parameters(
                    kind, one.out, one.width, dtype, bias=one.bias, ranks=tp if layer.row_parallel else 1,
                    group=group, row_parallel=layer.row_parallel,
                )
                for name, one in layer.shards.items()
            }  # fmt: skip
        except ValueError as error:
            found.refused |= layer.shards.keys()
            found.findings.append(Finding("refuses", "A10", layer.name, f"{kind}: {error}"))
            continue
        for name, one in layer.shards.items():
            if one.transposed:
                weight = parameters[name]["weight"]
                parameters[name]["weight"] = replace(weight, shape=weight.shape[::-1])
                if kind != FLOAT:
                    why = f"it is {kind} and the model stores [in, out]: the server turns it when it loads"
                    found.findings.append(Finding("ruins", "A5", f"{name}.weight", why))
        found.layers[layer.name] = (layer, kind)
        found.parameters |= parameters
        found.kinds |= dict.fromkeys(layer.shards, kind)
    for mixture, linears in sizes.experts.items():
        _mixture(mixture, linears, sizes.counts[mixture], types, group, release, dtype, found)
    return found


def _type_of(
    layer: Layer, types: Mapping[str, str], floats: Iterable[str], release: Release, told: list[Finding]
) -> str | None:
    """The type of a layer, found as the server finds it; None where it stops with an error."""
    kinds = {name: types.get(f"{name}.weight") for name in layer.shards}
    missing = [name for name, kind in kinds.items() if kind is None]
    if layer.fused:
        if missing:
            told += [_no_entry(name) for name in missing]
            return None
        given = {str(kind) for kind in kinds.values()}
        if len(given) > 1:
            listed = ", ".join(f"{name.rpartition('.')[2]} is {kind}" for name, kind in kinds.items())
            what = "some of them are float" if FLOAT in given else "they need one type"
            told.append(
                Finding(
                    "refuses", "A4", layer.name, f"the server runs it as one linear, and {listed}: {what}"
                )
            )
            return None
        kind = next(iter(given))
    else:
        own = kinds[layer.name]
        others = [name for name in floats if name.startswith(layer.name)]
        if own == FLOAT or (own is None and others):
            return FLOAT
        if own is None:
            if layer.head and release.float_embedding:
                return FLOAT
            told.append(_no_entry(layer.name))
            return None
        if others:
            told.append(Finding(
                "refuses", "A14", layer.name,
                f"it is {own}, and the server takes it for float, because the name of {others[0]}, which is FLOAT,"
                " begins with its name; then it has no place for its scales",
            ))  # fmt: skip
            return None
        kind = own
    if kind == FLOAT or kind in release.dense:
        return kind
    told.append(_unserved(layer.name, kind, release.dense, release, "linears"))
    return None


def _no_entry(name: str) -> Finding:
    return Finding("refuses", "A3", f"{name}.weight", "the description has no entry for it (KeyError)")


def _unserved(name: str, kind: str, known: Iterable[str], release: Release, what: str) -> Finding:
    why = (
        f"{kind} is for hardware of another generation than A2 and A3"
        if kind in release.elsewhere
        else f"vllm-ascend {release.version} has no {what} of type {kind} (NotImplementedError): it has"
        f" {', '.join(sorted(known))}"
    )
    return Finding("refuses", "A3", name, why)


def _mixture(
    name: str, linears: Mapping[str, LinearShape], count: int, types: Mapping[str, str], group: int,
    release: Release, dtype: torch.dtype, found: Served,
) -> None:  # fmt: skip
    """One mixture: the types of expert 0 stand for all of them."""
    kinds = {one: types.get(f"{name}.0.{one}.weight") for one in linears}
    if all(kind is None for kind in kinds.values()):
        return  # its experts lie in stacks
    missing = [one for one, kind in kinds.items() if kind is None]
    given = {str(kind) for kind in kinds.values()}
    every = [f"{name}.{expert}.{one}" for expert in range(count) for one in linears]
    if missing or len(given) > 1:
        found.refused |= set(every)
        found.findings += [_no_entry(f"{name}.0.{one}") for one in missing]
        if not missing:
            listed = ", ".join(f"{one} is {kind}" for one, kind in kinds.items())
            found.findings.append(
                Finding("refuses", "A4", f"{name}.0", f"experts have one type, and {listed}")
            )
        return
    (kind,) = given
    if kind != FLOAT and (kind not in release.experts or kind == "W4A16"):
        known = release.experts - {"W4A16"}
        found.refused |= set(every)
        found.findings.append(_unserved(name, kind, known, release, "experts (in this layout)"))
        return
    if kind == "W4A8_DYNAMIC" and group and not release.grouped_w4a8:
        found.refused |= set(every)
        found.findings.append(Finding(
            "refuses", "A13", name, f"W4A8 in groups of {group} is no longer supported (ValueError): take one scale"
            " per channel and group_size 0",
        ))  # fmt: skip
        return
    for expert in range(count):
        for one, shape in linears.items():
            own = f"{name}.{expert}.{one}"
            other = types.get(f"{own}.weight")
            if other not in (kind, None):
                found.findings.append(Finding(
                    "ruins", "A4", f"{own}.weight", f"it is {other}, and the server takes it for {kind}, as expert 0 is"
                ))  # fmt: skip
            found.kinds[own] = kind
            found.parameters[own] = expert_parameters(
                kind,
                shape.out,
                shape.width,
                dtype,
                bias=shape.bias,
                group=group,
                row_parallel=one in ROW_PARALLEL,
            )
