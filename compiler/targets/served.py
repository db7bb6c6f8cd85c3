"""What a server meets: the linears and facts of a plan's final program as plain data, found by dataflow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...runtime.beside import Beside
from ...runtime.outlier_weights import OutlierWeights
from ..attention_sites import attention_sites
from ..capture_experts import STACKS
from ..edit import Verb
from ..laws import is_attention, shape
from ..operand import Branch, Hadamard, Kronecker, Stub
from ..roles import read_together, roles_of
from ..safetensors_io import TensorSpec
from ..scheme import FLOAT, LinearScheme

if TYPE_CHECKING:
    from ..plan import Plan


@dataclass(frozen=True)
class LinearSite:
    """One linear of the rewritten model, as a server is going to meet it."""

    name: str
    in_features: int
    out_features: int
    scheme: LinearScheme
    bias: bool = False
    """Whether it has one in the result."""
    added_bias: str | None = None
    """The pass that gives it a bias, where the input model has none."""
    rotated: bool = False
    """Whether its input is rotated while the model runs."""
    split: tuple[int, int] | None = None
    """Sizes (a, b) of the factors of that rotation; ``in_features`` is a number of blocks of a * b."""
    rotation: Kronecker | None = None
    """The rotation itself, where more than its sizes is known."""
    block: int = 0
    """The block that it is in, counted from 0."""
    online: Kronecker | None = None
    """A rotation of its input that is stored as the reference tool does, beside the linear."""
    divided: bool = False
    """Whether its input is divided channel by channel while the model runs."""
    stored_as: str | None = None
    """The type of a float linear whose weight was made anew; None for an ordinary one."""
    beside: Beside | None = None
    """What of it is computed in float beside its integers."""
    beside_by: str = ""
    """The pass that keeps that in float."""
    reads_with: tuple[str, ...] = ()
    """Other linears that read the same value, found by dataflow."""
    row_parallel: bool = False
    """Whether a tensor-parallel server cuts its input channels and not its outputs."""
    expert: bool = False
    """Whether it belongs to one expert of a mixture."""
    in_stack: bool = False
    """Whether transformers holds its weight in a stack with those of other experts."""
    stored_together: bool = False
    """Whether the input checkpoint stores it so too."""
    transposed: bool = False
    """Whether the input checkpoint stores its weight as [in, out]."""

    @property
    def rotated_by(self) -> str:
        """The pass that rotates its input."""
        return "flatquant" if self.rotation is not None and self.rotation.slots else "online_rotation"

    @property
    def parent(self) -> str:
        """The module that holds it."""
        return self.name.rpartition(".")[0]

    @property
    def fused(self) -> tuple[str, ...]:
        """Linears that a server runs as one with it: they read the same value in the same module."""
        return tuple(name for name in self.reads_with if name.rpartition(".")[0] == self.parent)

    @property
    def blocks(self) -> int:
        """How many times the rotation stands side by side along the input: the ranks that share it."""
        return self.in_features // (self.split[0] * self.split[1]) if self.split else 1


@dataclass(frozen=True)
class NormBias:
    """A bias that a pass gives to a norm which has none in the input model."""

    norm: str
    added_by: str
    offset: float = 0.0
    """What the norm adds to its weight to get the gain: 1.0 for norms of the ``1 + w`` kind."""


@dataclass(frozen=True)
class Heads:
    """The heads of one attention."""

    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class AttentionGrid:
    """q, k or v of an attention on an int8 grid, cached so or read so by the attention."""

    module: str
    """Where its tensors stand: ``<attention>.k_proj`` of a cache, ``<attention>.fa_k`` of an attention."""
    stub: Stub
    heads: int
    head_dim: int
    plain: bool
    """Whether one linear alone writes it, as in every attention but those over a latent."""

    @property
    def attention(self) -> str:
        """The module of the attention."""
        return self.module.rpartition(".")[0]


@dataclass(frozen=True)
class ModelFacts:
    """What rules need to know of the model besides its linears."""

    dtype: torch.dtype
    """Of the float tensors in the export."""
    tp: int = 1
    """Ranks for which the export is made."""
    attentions: tuple[Heads, ...] = ()
    """Each kind once."""
    norm_biases: tuple[NormBias, ...] = ()
    grids: tuple[AttentionGrid, ...] = ()
    global_rotation: bool = False
    """Whether the rotation of the hidden state is written for draft models."""
    float_modules: tuple[str, ...] = ()
    """Modules with a float weight that are not in the list of linears: embeddings, norms, the head."""
    architecture: str = ""
    """Class of the model, ``LlamaForCausalLM``."""


def sites_of(plan: Plan) -> tuple[LinearSite, ...]:
    """The linears of the blocks, in the order of the graph."""
    program, roles, together = plan.final, roles_of(plan.program), read_together(plan.program)
    blocks = {part.index: number for number, part in enumerate(program.blocks)}
    split = {name for name, module in plan.program.root.named_modules() if hasattr(module, STACKS)}
    together_on_disk = {name for names in getattr(plan.program.source, "together", ()) for name in names}
    sites: list[LinearSite] = []
    for node in program.graph.nodes:
        leaf, name = program.leaf(node), str(node.target)
        if leaf is None or leaf.kind != "linear" or node.meta["part"] not in blocks:
            continue
        out, width = leaf.parameters["weight"][:: -1 if leaf.transposed else 1]
        turned: Kronecker | None = node.meta.get("rotated")
        rotation = turned if turned is not None and turned.layout == "flatquant" else None
        added: str | None = node.meta.get("bias_from")
        scheme: LinearScheme = node.meta.get("scheme", FLOAT)
        sites.append(
            LinearSite(
                name,
                width,
                out,
                scheme,
                bias="bias" in leaf.parameters or added is not None,
                added_bias=added,
                rotated=rotation is not None,
                split=(rotation.left, rotation.right) if rotation else None,
                rotation=rotation,
                block=blocks[node.meta["part"]],
                online=turned if rotation is None else None,
                divided=bool(node.meta.get("divided")),
                stored_as=node.meta.get("stored_as"),
                beside=_beside(node.meta.get("branch"), scheme, out * width),
                beside_by=node.meta.get("branch_from") or node.meta.get("swapped_by", ""),
                reads_with=tuple(other for other in together.get(name, ()) if other != name),
                row_parallel=name in roles["row_parallel"],
                expert=name in roles["expert"],
                in_stack=name.rpartition(".")[0].rpartition(".")[0] in split,
                stored_together=name in together_on_disk,
                transposed=leaf.transposed,
            )
        )
    return tuple(dict.fromkeys(sites))


def _beside(branch: Branch | None, scheme: LinearScheme, weights: int) -> Beside | None:
    """The float part of a linear: a branch that a pass put beside it, or single weights of its scheme."""
    if branch is not None:
        return branch.beside
    return OutlierWeights.of_share(scheme.outliers, weights) if scheme.outliers else None


def facts_of(plan: Plan) -> ModelFacts:
    """Attentions, added norm biases and float modules of the final program."""
    program = plan.final
    linears = {site.name for site in sites_of(plan)}
    attentions = dict.fromkeys(
        Heads(shape(q)[1], shape(v)[1], shape(v)[3])
        for q, v in ((node.args[0], node.args[2]) for node in program.graph.nodes if is_attention(node))
    )
    return ModelFacts(
        plan.dtype,
        plan.tp,
        tuple(attentions),
        tuple(NormBias(norm, by, offset) for norm, (by, offset) in _norm_biases(plan).items()),
        _grids(plan),
        global_rotation(plan) is not None,
        tuple(
            name
            for name, leaf in program.leaves.items()
            if "weight" in leaf.parameters and name not in linears
        ),
        architecture=type(program.root).__name__,
    )


def parameters_of(plan: Plan) -> dict[str, TensorSpec]:
    """Float parameters and persistent buffers of the final program as they are exported, in the model's
    order.

    Those that the model holds in its own dtype get the plan's; a parameter that it keeps in another one (a
    router's float32 correction) stays as it is stored. Added biases follow their weights; tied parameters are
    left out.
    """
    source, ties = plan.final.source, plan.final.ties
    held = {name: tensor.dtype for name, tensor in plan.program.root.state_dict().items()}
    added = {site.name: (site.out_features,) for site in sites_of(plan) if site.added_bias}
    added |= {norm: source.shape(f"{norm}.weight") for norm in _norm_biases(plan)}
    result: dict[str, TensorSpec] = {}
    for name in source.names():
        if name in ties:
            continue
        own = held.get(name, plan.program.dtype) == plan.program.dtype
        result[name] = TensorSpec(plan.dtype if own else source.dtype(name), source.shape(name))
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in added:
            result[f"{module}.bias"] = TensorSpec(plan.dtype, added[module])
    return result


def global_rotation(plan: Plan) -> Hadamard | None:
    """The rotation of the hidden state, where a pass wants it written."""
    for step in plan.steps:
        for rewrite in step.answer.rewrites:
            if rewrite.basis is not None and getattr(step.what, "export_extra_info", False):
                return rewrite.basis.rotation
    return None


def _grids(plan: Plan) -> tuple[AttentionGrid, ...]:
    """Every stub that the passes place, in the order of the plan."""
    edits = [e for step in plan.steps for rewrite in step.answer.rewrites for e in rewrite.edits]
    stubs = [(e.site.module, e.operand) for e in edits if isinstance(e.operand, Stub)]
    sites = {site.node: site for site in attention_sites(plan.program)} if stubs else {}
    return tuple(
        AttentionGrid(
            module, stub, *sites[stub.node].sizes(stub.operand),
            plain=len(sites[stub.node].writers[stub.operand]) == 1,
        )
        for module, stub in stubs
    )  # fmt: skip


def _norm_biases(plan: Plan) -> dict[str, tuple[str, float]]:
    """Norms that have no bias in the input and get one, with the pass that gives it and the norm's offset."""
    found: dict[str, tuple[str, float]] = {}
    for step in plan.steps:
        for rewrite in step.answer.rewrites:
            for edit in rewrite.edits:
                if edit.verb is not Verb.SHIFT_OUT:
                    continue
                leaf = plan.final.leaves[edit.site.module]
                if leaf.norm is not None and not leaf.norm.bias:
                    found.setdefault(edit.site.module, (rewrite.pass_name, leaf.norm.offset))
    return found
