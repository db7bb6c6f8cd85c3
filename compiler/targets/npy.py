"""numpy: dictionaries in ``.npy`` files, one per kind of tensor, as the reference tool's older interface saves them.

They are written and never read: a ``.npy`` of a dictionary is a pickle, which can run code when it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from ..edit import Verb
from ..safetensors_io import read_header, read_tensors
from .modelslim import ModelSlim
from .served import LinearSite, ModelFacts
from .target import Finding, Layout, Problem

if TYPE_CHECKING:
    from ..plan import Plan

NAMES = {"weight": "quant_weight"}
"""Files that are not called after their tensors."""
NORMS = "anti_fp_norm"
"""The file of norms, which take up what smoothing moves."""
ON_BIAS = (Verb.SCALE_OUT, Verb.SHIFT_IN, Verb.ROTATE_OUT)
"""What an edit does that changes the bias of a linear."""
GRIDS = {"fa_q": "fa_quant_", "fa_k": "fa_quant_", "fa_v": "fa_quant_"}
"""Modules of quantized attentions, and how their files begin."""


@dataclass(frozen=True)
class Numpy(ModelSlim):
    """``quant_weight.npy``, ``deq_scale.npy`` and so on: names of linears to arrays. What stays float is not there."""

    name: ClassVar[str] = "numpy"
    summary: ClassVar[str] = (
        "dictionaries in .npy files, for readers of the older interface; written, never read"
    )

    def check(self, sites: Sequence[LinearSite], model: ModelFacts) -> tuple[Problem, ...]:
        """What the layout has no type for, and what stands in float before or beside integers: it has no dictionary."""
        found = list(super().check(sites, model))
        for site in sites:
            kept = (
                ("an online rotation of its input", site.online, "the pass that rotates it"),
                ("a division of its input", site.divided, "the type non-fusion"),
                (f"{site.beside} in float beside its integers", site.beside, site.beside_by),
            )
            found += [
                Problem("place", site.name, f"it has {what}, for which there is no dictionary",
                        f"leave {by} out, or --target modelslim")
                for what, there, by in kept if there
            ]  # fmt: skip
        return tuple(found)

    def problems(self, plan: Plan) -> tuple[str, ...]:
        """Also float tensors that a pass rewrites, biases of integer linears among them: there is no place for them."""
        return (*super().problems(plan), *_lost(plan), *_lost_biases(plan))

    def config(self, config: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
        """As it is."""
        return dict(config)

    def files(self, layout: Layout) -> Mapping[str, Mapping[str, Any]]:
        """None beside the dictionaries."""
        return {}

    def finish(self, directory: Path, layout: Layout) -> None:
        """Read the safetensors back kind by kind, write the dictionaries, remove the safetensors."""
        shards = sorted(directory.glob("*.safetensors"))
        entries = {name: (file, entry) for file in shards for name, entry in read_header(file).items()}
        kinds: dict[str, list[tuple[str, str]]] = {}
        for name in entries:
            found = place(name, layout.types.get(name, ""))
            if found is not None:
                kinds.setdefault(found[0], []).append((found[1], name))
        for kind, keys in kinds.items():
            arrays = {
                key: array(read_tensors(entries[name][0], {name: entries[name][1]})[name])
                for key, name in keys
            }
            np.save(directory / f"{kind}.npy", np.array(arrays, dtype=object), allow_pickle=True)
        for file in (*shards, *directory.glob("*.safetensors.index.json")):
            file.unlink()

    def judge(
        self, directory: Path, *, tp: int = 1, deep: bool = True, trust_remote_code: bool = False
    ) -> tuple[Finding, ...] | None:
        """Nobody says: the files are not read."""
        return None


def place(name: str, kind: str) -> tuple[str, str] | None:
    """The file and the key of a tensor; None for one that stays what it is in the float model."""
    module, _, leaf = name.rpartition(".")
    own = module.rpartition(".")[2]
    if own in GRIDS:
        return GRIDS[own] + leaf, module
    if kind not in ("FLOAT", ""):
        return NAMES.get(leaf, leaf), module
    return (NORMS, name) if "norm" in own.lower() or own.startswith("ln_") else None


def array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A tensor as an array of its own; numpy has no bfloat16, so those become float32, and int8 offsets too."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _lost(plan: Plan) -> Iterator[str]:
    """Modules that stay float, are no norms, and that a pass rewrites."""
    quantized = {str(node.target) for node in plan.final.graph.nodes if node.meta.get("scheme") is not None}
    told: dict[str, list[str]] = {}
    for step in plan.steps:
        for rewrite in step.answer.rewrites:
            for module in rewrite.modules:
                leaf = plan.program.leaves.get(module)
                if leaf is not None and leaf.norm is None and leaf.kind != "norm" and module not in quantized:
                    told.setdefault(rewrite.pass_name, []).append(module)
    for name, modules in told.items():
        more = f" and {len(set(modules)) - 1} more alike" if len(set(modules)) > 1 else ""
        yield (
            f"{modules[0]}{more}: {name} rewrites it and it stays float, for which the dictionaries have no place;"
            f" leave {name} out, quantize it, or --target modelslim"
        )


NUMPY = Numpy()


def _lost_biases(plan: Plan) -> Iterator[str]:
    """Integer linears whose bias a pass changes and whose format does not hold it in integers."""
    nodes = {str(node.target): node for node in plan.final.graph.nodes if node.meta.get("scheme") is not None}
    told: dict[str, list[str]] = {}
    for step in plan.steps:
        for rewrite in step.answer.rewrites:
            for edit in rewrite.edits:
                node = nodes.get(edit.site.module)
                if node is None or edit.verb not in ON_BIAS or node.meta["scheme"].scope == "tensor":
                    continue
                if "bias" in plan.final.leaves[edit.site.module].parameters or node.meta.get("bias_from"):
                    told.setdefault(rewrite.pass_name, []).append(edit.site.module)
    for name, modules in told.items():
        more = f" and {len(set(modules)) - 1} more alike" if len(set(modules)) > 1 else ""
        yield (
            f"{modules[0]}{more}: {name} changes its bias, for which the dictionaries have a place with w8a8-static"
            f" alone; take that, leave {name} out, or --target modelslim"
        )
