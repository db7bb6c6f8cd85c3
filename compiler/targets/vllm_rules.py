"""What vllm-ascend takes of single linears, norms and attentions: sizes, dtypes, rotations, biases, caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ...runtime.kronecker import split as server_split
from ...runtime.w4a8 import SHARES
from ..scheme import W4A8
from .releases import Release
from .served import LinearSite, ModelFacts
from .target import Problem

LONGEST_SIDE = 65_535
"""Largest side of the operands of ``npu_quant_matmul``."""
SAFE_FACTOR = 128
"""Largest side of a Kronecker factor that older releases of CANN take."""


def dtype_problems(sites: Sequence[LinearSite], model: ModelFacts) -> Iterator[Problem]:
    """The server runs bfloat16, and float16 with a reservation."""
    if model.dtype not in (torch.bfloat16, torch.float16):
        yield Problem("dtype", "model", f"the server does not run {model.dtype}", "export in bfloat16")
    elif model.dtype is torch.float16 and any(s.scheme.act is not None for s in sites):
        yield Problem(
            "dtype",
            "model",
            "integer linears in a float16 model pass float16 scales, which the op's documentation does not"
            " list",
            "prefer --dtype bfloat16",
            "warning",
        )


def norm_biases_problems(model: ModelFacts) -> Iterator[Problem]:
    """Every RMS norm gets a bias as soon as one key of the description contains ``norm.bias``."""
    for item in model.norm_biases:
        if item.offset:
            message = "norms of the 1 + w kind have no bias on the server (it would be skipped)"
        elif not item.norm.endswith("norm"):
            message = f"the server looks for keys with 'norm.bias', and '{item.norm}.bias' has none"
        else:
            continue
        told = f"{item.added_by} gives it a bias; {message}"
        yield Problem("norm-bias", item.norm, told, f"make {item.added_by} symmetric")


def sizes_problems(site: LinearSite) -> Iterator[Problem]:
    """Limits of the ops: longest sides, packs of int4, stretches of W4A8."""
    weight = site.scheme.weight
    if weight is None:
        return
    longest = max(site.in_features, site.out_features)
    if longest > LONGEST_SIDE:
        yield Problem(
            "size", site.name, f"{longest} channels; the op takes at most {LONGEST_SIDE}", "keep it float"
        )
    if weight.bits == 4 and site.scheme.act is not None and (site.in_features % 8 or site.out_features % 8):
        yield Problem(
            "size",
            site.name,
            f"int4 goes in packs of 8 channels, and it has {site.in_features} in and {site.out_features} out",
            "give it 8 bits, or keep it float",
        )
    elif site.expert and site.row_parallel and site.in_features % SHARES and site.scheme == W4A8:
        yield Problem(
            "size",
            site.name,
            f"its {site.in_features} input channels are not {SHARES} equal stretches, for each of which W4A8 has a sum",
            "give experts the scheme w8a8",
        )


def grids_problems(model: ModelFacts, release: Release) -> Iterator[Problem]:
    """Caches are read per channel, since 0.23 by scale alone; attention on int8 grids exists over a latent only."""
    for grid in model.grids:
        if grid.stub.kind == "fa":
            yield Problem(
                "attention",
                grid.attention,
                "the server reads q, k and v in int8 only where keys and values are a latent (MLA), and these"
                " stubs stand behind it",
                "take dynamic_cache, or --target modelslim",
            )
        elif not grid.plain:
            yield Problem(
                "cache",
                grid.attention,
                "its keys and values come from more than one linear (a latent), of which the server caches something"
                " else",
                "leave dynamic_cache out",
            )
        elif not grid.stub.symmetric and not release.reads_offsets:
            yield Problem(
                "cache",
                grid.attention,
                "the server adds the offset when it writes a cache and forgets it when it reads",
                "take dynamic_cache{symmetric=true}",
            )
        elif grid.head_dim % 32:
            yield Problem(
                "cache",
                grid.attention,
                f"its heads have {grid.head_dim} channels; a cache of int8 needs a multiple of 32",
                "leave dynamic_cache out",
            )
        elif release.cached and model.architecture not in release.cached:
            yield Problem(
                "cache",
                grid.attention,
                f"vllm-ascend {release.version} loads scales of caches itself for {', '.join(sorted(release.cached))}"
                f" alone; what vLLM does with those of {model.architecture or 'this model'} was not read",
                "try it before you rely on it, or leave dynamic_cache out",
                "warning",
            )


def online_problems(site: LinearSite) -> Iterator[Problem]:
    """Rotations that the reference tool stores beside a linear are tensors that the server does not know."""
    if site.online is not None:
        yield Problem(
            "online",
            site.name,
            f"its online rotation ({site.online.layout}) is stored in tensors that the server refuses to load",
            "take online_rotation, which is served before W4A4 linears, or --target modelslim",
        )


def rotation_problems(site: LinearSite, model: ModelFacts) -> Iterator[Problem]:
    """The server splits the width of a rank by itself; the factors must have those sizes."""
    if not site.rotated:
        return
    ranks = model.tp if site.row_parallel else 1
    width = site.in_features // ranks
    try:
        wanted = server_split(width)
    except ValueError as error:
        yield Problem("split", site.name, str(error), f"exclude it from {site.rotated_by}")
        return
    if site.split != wanted or site.blocks != ranks:
        yield Problem(
            "split",
            site.name,
            f"its rotation is {site.blocks} x {site.split}, the server splits {width} channels of each of"
            f" {ranks} ranks into {wanted}",
            f"let {site.rotated_by} choose the split, for the same --tp",
        )
    elif max(wanted) > SAFE_FACTOR:
        yield Problem(
            "split",
            site.name,
            f"its factors are {wanted}; CANN before 8.5 takes at most {SAFE_FACTOR}",
            "serve it on CANN 8.5 or newer",
            "warning",
        )
