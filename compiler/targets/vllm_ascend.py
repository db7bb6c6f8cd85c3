"""vllm-ascend: the rules of the server for Ascend NPUs, checked on the plan.

The rules were read in vllm-ascend 0.23 (quantization/modelslim_config.py, quantization/methods) and in the
loader of vLLM; what the server would do instead of refusing is in each message, because most of it is silent
there.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ...runtime.formats import FORMATS
from ...runtime.linear import IntegerLinear
from ...runtime.w4a8 import SHARES
from ..safetensors_io import TensorSpec
from ..scheme import W4A8, LinearScheme
from . import ascendv1
from .releases import NEWEST_WHEEL, RELEASES, SAFE, SAFE_EXPERTS, Release, device_named, release_named
from .served import LinearSite, ModelFacts
from .target import DiskNames, Finding, Layout, Problem, Target
from .vllm_rules import (
    dtype_problems,
    grids_problems,
    norm_biases_problems,
    online_problems,
    rotation_problems,
    sizes_problems,
)

MOST_RANKS = 64


@dataclass(frozen=True)
class VllmAscend(Target):
    """The vLLM plugin for Ascend NPUs."""

    name: ClassVar[str] = "vllm-ascend"
    summary: ClassVar[str] = "ascendv1 layout, only what the server loads"
    release: Release = RELEASES[NEWEST_WHEEL]
    device: str = "A2"
    spelled: str = "vllm-ascend"

    @property
    def spelling(self) -> str:
        """``vllm-ascend[A3]==0.18``, or the name alone for what it stands for."""
        return self.spelled

    def variant(self, version: str | None, device: str | None) -> VllmAscend:
        """Another release, or another device."""
        release = self.release if version is None else release_named(version)
        named = "" if device is None else f"[{device_named(device)}]"
        spelled = f"{self.name}{named}" + ("" if version is None else f"=={release.version}")
        return VllmAscend(release, self.device if device is None else device_named(device), spelled)

    def judge(
        self, directory: Path, *, tp: int = 1, deep: bool = True, trust_remote_code: bool = False
    ) -> tuple[Finding, ...]:
        """What the server does with a directory: see ``vllm_files``."""
        from .vllm_files import judged

        return judged(self.release, directory, tp=tp, deep=deep, trust_remote_code=trust_remote_code)

    def format_of(self, scheme: LinearScheme, rotated: bool) -> type[IntegerLinear] | None:
        """The served format of a scheme: no groups, no int4 weights beside float, no offsets beside integers."""
        found, weight = ascendv1.format_of(scheme, rotated), scheme.weight
        if found is None or weight is None or weight.group or found.type not in SAFE | SAFE_EXPERTS:
            return None
        return found if weight.symmetric or found.act_bits is None else None

    def check(self, sites: Sequence[LinearSite], model: ModelFacts) -> tuple[Problem, ...]:
        """Errors and warnings of every rule, in the order of the sites."""
        by_name = {site.name: site for site in sites}
        order = {name: place for place, name in enumerate(by_name)}
        labels = {name: self._label(site) for name, site in by_name.items()}
        floats = [name for name, label in labels.items() if label == ascendv1.FLOAT_TYPE]
        floats = sorted((*floats, *model.float_modules))
        found = [*dtype_problems(sites, model), *norm_biases_problems(model)]
        for site in sites:
            found += self._type(site)
            found += _fused(site, by_name, order, labels)
            found += sizes_problems(site)
            found += rotation_problems(site, model)
            found += online_problems(site)
            found += self._bias(site)
            found += _prefix(site, labels, floats)
        found += self._experts(sites)
        found += self._ranks(sites, model)
        found += grids_problems(model, self.release)
        return tuple(found)

    def tp_sizes(self, sites: Sequence[LinearSite], model: ModelFacts) -> tuple[int, ...]:
        """Numbers of ranks up to 64 over which heads and channels can be dealt out."""
        return tuple(n for n in range(1, MOST_RANKS + 1) if _undivided(n, sites, model) is None)

    def layout(
        self,
        parameters: Mapping[str, TensorSpec],
        sites: Sequence[LinearSite],
        model: ModelFacts,
        names: DiskNames,
    ) -> Layout:
        """The tensors of the ascendv1 layout."""
        return ascendv1.layout(parameters, sites, model, names, self.format_of)

    def run_as_one(self, sites: Sequence[LinearSite]) -> Mapping[str, str]:
        """Shards of q, k, v and of gate, up: the server's loader lets the last one overwrite the others."""
        order = {site.name: place for place, site in enumerate(sites)}
        return {
            site.name: min((site.name, *(n for n in site.fused if n in order)), key=order.__getitem__)
            for site in sites
            if site.fused and not site.expert
        }

    def config(self, config: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
        """With the place of the weights, for transformers."""
        return ascendv1.config(config)

    def files(self, layout: Layout) -> Mapping[str, Mapping[str, Any]]:
        """The description file, by which the server recognises the checkpoint."""
        return {ascendv1.DESCRIPTION: ascendv1.description(layout)}

    # -- rules

    def _label(self, site: LinearSite) -> str:
        found = self.format_of(site.scheme, site.rotated)
        return ascendv1.FLOAT_TYPE if found is None else found.type

    def _type(self, site: LinearSite) -> Iterator[Problem]:
        weight = site.scheme.weight
        if site.divided:
            yield Problem(
                "division",
                site.name,
                "its input is divided online, and the server has no such op",
                "leave the type non-fusion out, or --target modelslim",
            )
        if site.beside is not None:
            yield Problem(
                "branch",
                site.name,
                f"the server has no linear with {site.beside} in float beside its integers",
                f"leave {site.beside_by} out, or --target modelslim",
            )
        if weight is None:
            if site.stored_as is not None:
                yield Problem(
                    "type",
                    site.name,
                    f"the server does not know the type {site.stored_as}, in which pruned weights are stored",
                    "quantize it, leave float_sparse out, or --target modelslim",
                )
            if site.rotated:
                yield self._no_format(site)
            return
        if site.transposed:
            yield Problem(
                "transposed",
                site.name,
                "its weight is stored as [in, out], which the server turns when loading, integers included",
                "exclude it from quantization",
            )
        if weight.group:
            yield Problem(
                "group",
                site.name,
                f"{site.scheme} has a scale per group of {weight.group} channels; the server has one per"
                " channel",
                "take a scheme per channel, or --target modelslim",
            )
        elif self.format_of(site.scheme, site.rotated) is None:
            yield self._no_format(site)
        elif site.expert and self._label(site) not in SAFE_EXPERTS:
            yield Problem(
                "expert",
                site.name,
                f"experts are served as {', '.join(sorted(SAFE_EXPERTS))}, not as {self._label(site)}",
                "give experts the scheme w8a8 or w4a8",
            )
        elif not site.expert and self._label(site) not in SAFE:
            yield Problem(
                "dense",
                site.name,
                f"{self._label(site)} is served for experts only",
                "take the scheme experts-w4a8, in which the other linears are w8a8, or --target modelslim",
            )

    def _no_format(self, site: LinearSite) -> Problem:
        if site.rotated and (not site.scheme.quantized or self.format_of(site.scheme, False) is not None):
            return Problem(
                "rotation",
                site.name,
                "an online rotation is served before int4 linears only, and this one "
                + (f"is {site.scheme}" if site.scheme.quantized else "stays float"),
                f"give it the scheme w4a4, or exclude it from {site.rotated_by}",
            )
        known, weight = ascendv1.format_of(site.scheme, site.rotated), site.scheme.weight
        if known is not None and known.type in SAFE and weight is not None and not weight.symmetric:
            return Problem(
                "offset",
                site.name,
                f"{site.scheme} has offsets of its weight, which the server's {known.type} ignores",
                "take weights without -asym, w8a16-asym, or --target modelslim",
            )
        named = f" (type {known.type})" if known else ""
        return Problem(
            "type",
            site.name,
            f"the server has no linear for {site.scheme}{named}: it has {', '.join(sorted(SAFE))}",
            "take one of w8a8, w8a8-static, w8a8-mix, w8a16, w4a4"
            + (", or --target modelslim" if known else ""),
        )

    def _bias(self, site: LinearSite) -> Iterator[Problem]:
        """A bias that the model does not have is skipped by the loader without a word."""
        found = self.format_of(site.scheme, site.rotated)
        static = found is not None and found.act_scope == "tensor"
        if site.added_bias and not static:
            yield Problem(
                "bias",
                site.name,
                f"{site.added_bias} gives it a bias, for which the served model has no place (it would be"
                " skipped)",
                f"make {site.added_bias} symmetric, or take w8a8-static here, which stores it in quant_bias",
            )
        if site.bias and not site.added_bias and found is FORMATS["W8A16"]:
            yield Problem(
                "bias",
                site.name,
                "the op of W8A16 is documented for a float32 bias with bfloat16; the server passes it in"
                " bfloat16",
                "prefer w8a8 here",
                "warning",
            )

    def _experts(self, sites: Sequence[LinearSite]) -> Iterator[Problem]:
        """The server looks at expert 0 alone: all projections of all experts of a layer share a type."""
        groups: dict[str, dict[str, str]] = {}
        for site in sites:
            match = re.fullmatch(r"(.*)\.\d+\.[^.]+", site.name) if site.expert else None
            if match:
                groups.setdefault(match[1], {}).setdefault(self._label(site), site.name)
        for block, types in groups.items():
            if len(types) > 1:
                listed = ", ".join(f"{name} is {label}" for label, name in types.items())
                yield Problem(
                    "experts",
                    block,
                    f"experts of one layer have one type, but {listed}",
                    "give all experts of a layer one scheme",
                )

    def _ranks(self, sites: Sequence[LinearSite], model: ModelFacts) -> Iterator[Problem]:
        why = _undivided(model.tp, sites, model)
        if why is not None:
            sizes = ", ".join(map(str, self.tp_sizes(sites, model))) or "none"
            yield Problem(
                "tp", why[0], f"it does not divide over --tp {model.tp}: {why[1]}", f"sizes that do: {sizes}"
            )


def _fused(
    site: LinearSite, by_name: Mapping[str, LinearSite], order: Mapping[str, int], labels: Mapping[str, str]
) -> Iterator[Problem]:
    """Shards of one fused linear have one scheme and one rotation. Reported once, at the first of them."""
    shards = [by_name[name] for name in (site.name, *site.fused) if name in by_name]
    if site.expert or min(shards, key=lambda shard: order[shard.name]) is not site:
        return
    shown = {"scheme": _scheme_shown(shards, labels), "rotation": _rotation_shown(shards)}
    for what, how in shown.items():
        if len(set(how)) > 1:
            listed = ", ".join(
                f"{s.name.rpartition('.')[2]} is {h}" for s, h in zip(shards, how, strict=True)
            )
            yield Problem(
                "fused",
                site.name,
                f"the server runs it as one linear with those beside it, but {listed}",
                f"give all of them one {what}",
            )
            return


def _scheme_shown(shards: Sequence[LinearSite], labels: Mapping[str, str]) -> list[str]:
    """The type of each, or its whole scheme where the type alone does not tell two apart."""
    types = [labels[site.name] for site in shards]
    if len(set(types)) > 1 or types[0] == ascendv1.FLOAT_TYPE:
        return types
    return [f"{types[0]} ({site.scheme.weight}, {site.scheme.act})" for site in shards]


def _prefix(site: LinearSite, labels: Mapping[str, str], floats: Sequence[str]) -> Iterator[Problem]:
    """The server takes a linear for float if any float weight's name (``floats``, sorted) begins with its name."""
    if labels[site.name] == ascendv1.FLOAT_TYPE or any(name in labels for name in site.fused):
        return
    for other in floats[bisect_left(floats, site.name) :]:
        if not other.startswith(site.name):
            return
        yield Problem(
            "prefix",
            site.name,
            f"{other} is float and its name begins with this one: the server would take both for float",
            "keep this one float too, or quantize both",
        )


def _rotation_shown(shards: Sequence[LinearSite]) -> list[str]:
    """The rotation of each, told apart by its seed where sizes do not."""
    return [
        "not rotated"
        if not site.rotated
        else f"rotated by {site.rotation} of seed {site.rotation.seed}"
        if site.rotation
        else f"rotated by {site.split}"
        for site in shards
    ]


def _undivided(ranks: int, sites: Sequence[LinearSite], model: ModelFacts) -> tuple[str, str] | None:
    """The first thing that cannot be dealt out over so many ranks, and why."""
    for kind in model.attentions:
        if kind.heads % ranks:
            return "attention", f"it has {kind.heads} heads"
        if kind.kv_heads % ranks and ranks % kind.kv_heads:
            return "attention", f"it has {kind.kv_heads} key heads"
    per_key_head = {kind.kv_heads * kind.head_dim for kind in model.attentions}
    for site in sites:
        if site.rotated and site.row_parallel and ranks != site.blocks:
            return site.name, f"its rotation was made for {site.blocks} ranks"
        cut = site.in_features if site.row_parallel else site.out_features
        replicated = not site.row_parallel and cut in per_key_head
        if cut % ranks and not replicated:
            return site.name, f"{cut} channels"
        weight = site.scheme.weight
        packed = 8 if weight is not None and weight.bits == 4 and site.scheme.act is not None else 1
        if site.expert and site.row_parallel and site.scheme == W4A8 and SHARES % ranks:
            return site.name, f"it has sums over {SHARES} stretches of its channels"
        if weight is not None and site.row_parallel and (cut // ranks) % max(packed, weight.group or 1):
            return site.name, f"{cut // ranks} channels per rank"
    return None


VLLM_ASCEND = VllmAscend()
