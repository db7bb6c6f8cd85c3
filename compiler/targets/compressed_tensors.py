"""compressed-tensors: what ``from_pretrained`` of transformers, and vLLM, load through the library of that name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from ...runtime.linear import IntegerLinear
from ..compressed_library import INSTALL, NAME, check_installed, is_installed
from ..safetensors_io import TensorSpec
from ..scheme import Int, LinearScheme
from . import ascendv1
from .compressed_formats import (
    CompressedStatic,
    CompressedStaticAsymmetric,
    CompressedW4A8,
    CompressedW8A8,
    PackedW4A16,
    PackedW8A16,
)
from .served import LinearSite, ModelFacts
from .target import DiskNames, Finding, Layout, Problem, Target

EXPERTS = r"re:.*\.experts\.\d+\..*"
"""The target that means every linear of every expert."""


@dataclass(frozen=True)
class CompressedTensors(Target):
    """Float and integer linears under the names of transformers, with a ``quantization_config`` of the library."""

    name: ClassVar[str] = "compressed-tensors"
    summary: ClassVar[str] = "the library of that name: transformers and vLLM load it"

    def format_of(self, scheme: LinearScheme, rotated: bool) -> type[IntegerLinear] | None:
        """The format of a scheme: W8A8, W4A8, W8A16, W4A16."""
        weight, act = scheme.weight, scheme.act
        if weight is None or rotated or not weight.symmetric or weight.bits not in (4, 8):
            return None
        if act is None:
            return PackedW4A16 if weight.bits == 4 else PackedW8A16
        if act.bits != 8:
            return None
        if act.per == "token":
            return CompressedW4A8 if weight.bits == 4 else CompressedW8A8
        if act.per == "tensor" and weight.bits == 8 and not weight.group:
            return CompressedStatic if act.symmetric else CompressedStaticAsymmetric
        return None

    def check(self, sites: Sequence[LinearSite], model: ModelFacts) -> tuple[Problem, ...]:
        """Schemes that it does not write, experts that transformers does not load, what has no place in its code."""
        found: list[Problem] = []
        if not is_installed():
            found.append(Problem("library", "target", f"{NAME} is not installed", INSTALL))
        for site in sites:
            weight = site.scheme.weight
            if site.rotated or site.online is not None or site.beside or site.divided:
                what = (
                    "what stands in float beside its integers"
                    if site.beside
                    else "an online transform of its input"
                )
                found.append(Problem(
                    "place", site.name, f"{what} has no place in a model of transformers",
                    "leave out the pass that puts it there",
                ))  # fmt: skip
            if site.added_bias:
                found.append(Problem(
                    "bias", site.name, f"{site.added_bias} gives it a bias, for which the model has no place",
                    f"make {site.added_bias} symmetric",
                ))  # fmt: skip
            if weight is None:
                continue
            if self.format_of(site.scheme, False) is None:
                found.append(Problem(
                    "type", site.name, f"{site.scheme} is not among what is written: W8A8, W4A8, W8A16, W4A16,"
                    " symmetric weights", "take w8a8, w8a8-static, w4a8, w8a16 or w4a16",
                ))  # fmt: skip
            if weight.group and site.in_features % weight.group:
                found.append(Problem(
                    "group", site.name, f"groups of {weight.group} do not divide its {site.in_features} channels",
                    "take a group size that does, or exclude it",
                ))  # fmt: skip
            if site.transposed:
                found.append(Problem(
                    "module", site.name, "its weight is stored as [in, out]", "exclude it from quantization"
                ))  # fmt: skip
        found += expert_problems(sites)
        for norm in model.norm_biases:
            found.append(Problem(
                "norm-bias", norm.norm, f"{norm.added_by} gives it a bias, for which the model has no place",
                f"make {norm.added_by} symmetric",
            ))  # fmt: skip
        for grid in model.grids:
            found.append(Problem(
                "grid", grid.attention, "int8 caches and attentions are not written for this target",
                "leave out the pass that makes them, or --target modelslim",
            ))  # fmt: skip
        return tuple(found)

    def tp_sizes(self, sites: Sequence[LinearSite], model: ModelFacts) -> tuple[int, ...]:
        """Nobody says."""
        return ()

    def layout(
        self,
        parameters: Mapping[str, TensorSpec],
        sites: Sequence[LinearSite],
        model: ModelFacts,
        names: DiskNames,
    ) -> Layout:
        """The tensors of the library's formats, under the names of the checkpoint."""
        made = ascendv1.layout(parameters, sites, model, names, self.format_of)
        schemes = {site.name: site.scheme for site in sites if site.name in made.prefixes}
        in_stack = frozenset(site.name for site in sites if site.in_stack)
        return replace(made, metadata={"schemes": schemes, "in_stack": in_stack})

    def stem(self, layout: Layout) -> str:
        """Where transformers looks for weights."""
        return "model"

    def config(self, config: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
        """With the ``quantization_config`` that the library makes of the schemes."""
        return {**config, "quantization_config": quantization_config(**layout.metadata)}

    def files(self, layout: Layout) -> Mapping[str, Mapping[str, Any]]:
        """None: config.json says it all."""
        return {}

    def judge(
        self, directory: Path, *, tp: int = 1, deep: bool = True, trust_remote_code: bool = False
    ) -> tuple[Finding, ...] | None:
        """What transformers does with a directory: the library's own modules say which tensors they want."""
        check_installed()
        from .compressed_files import judged

        return judged(directory, trust_remote_code)


def expert_problems(sites: Sequence[LinearSite]) -> Iterator[Problem]:
    """Experts that transformers holds in stacks: it makes their weights floats when it loads them, all in one way.

    From 5.23 on it does so with packed weights beside float activations. It expects that of every expert of the model.
    """
    if not any(site.scheme.quantized for site in sites):
        return
    fix = "take w4a16 or w8a16 for all experts (quantize the other linears as you like), or --target transformers"
    experts = [site for site in sites if site.in_stack]
    first = next((site.scheme for site in experts if site.scheme.quantized), None)
    for site in experts:
        if site.stored_together:
            if site.scheme.quantized:
                yield Problem(
                    "experts", site.name, "it lies in a stack with other experts on disk, and transformers has no"
                    " name for one of them", "exclude the experts from quantization, or --target transformers",
                )  # fmt: skip
        elif not site.scheme.quantized:
            yield Problem(
                "experts", site.name, "transformers does not load float experts beside quantized linears"
                " (CompressedTensorsDequantize)", fix,
            )  # fmt: skip
        elif site.scheme.act is not None:
            yield Problem(
                "experts", site.name, f"{site.scheme}: transformers loads experts with float activations alone, and"
                " makes their weights floats", fix,
            )  # fmt: skip
        elif site.scheme != first:
            yield Problem(
                "experts", site.name, f"{site.scheme} beside experts of {first}: transformers loads all of them in"
                " one scheme", fix,
            )  # fmt: skip


def quantization_config(
    schemes: Mapping[str, LinearScheme], in_stack: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """The block of config.json for linears of these schemes, made and checked by the library.

    Those of experts ``in_stack`` are meant by one pattern, by which transformers knows their group.
    """
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus

    groups: dict[LinearScheme, dict[str, None]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(scheme, {})[EXPERTS if name in in_stack else name] = None
    formats = {one: "pack-quantized" if one.act is None else "int-quantized" for one in groups}
    made = {
        f"group_{number}": QuantizationScheme(
            targets=list(names),
            weights=_args(scheme.weight, "channel"),
            input_activations=_args(scheme.act, "tensor"),
            format=formats[scheme],  # pyright: ignore[reportArgumentType]
        )
        for number, (scheme, names) in enumerate(groups.items())
    }
    whole = set(formats.values())
    config = QuantizationConfig(
        config_groups=made,  # pyright: ignore[reportArgumentType]
        quantization_status=QuantizationStatus.COMPRESSED,
        format=next(iter(whole)) if len(whole) == 1 else "mixed-precision" if whole else "dense",
        ignore=["lm_head"],
    )
    return config.model_dump(mode="json", exclude_none=True)


def _args(format: Int | None, whole: str) -> Any:
    """One side of a linear in the library's words; None for float. ``whole`` is the strategy of a scale per tensor."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType

    if format is None:
        return None
    return QuantizationArgs(
        num_bits=format.bits,
        type=QuantizationType.INT,
        symmetric=format.symmetric,
        strategy=QuantizationStrategy(whole if format.per == "tensor" else format.per),
        group_size=format.group or None,
        dynamic=format.per == "token",
    )


COMPRESSED_TENSORS = CompressedTensors()
