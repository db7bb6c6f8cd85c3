"""Program: one canonical FX graph per model, on meta, beside a lazy source of weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import fx, nn

from .canon import cast_dtype
from .stretch import Stretches

if TYPE_CHECKING:
    import networkx

Kind = Literal["linear", "embedding", "norm", "opaque"]


@dataclass(frozen=True)
class Norm:
    """What a norm computes, found by probing it on random input, never by its class name.

    ``y = (x - mean?) / sqrt(mean((x - mean?)²) + eps) * gain + bias?`` with ``gain = weight + offset``.
    """

    mean_subtracting: bool
    offset: float
    """What is added to the weight to get the gain: 1.0 for ``1 + w`` norms, 0.0 otherwise."""
    bias: bool
    weight: bool
    eps: float
    width: int
    """Number of channels over which it normalises (head_dim for a q/k norm)."""


@dataclass(frozen=True)
class Leaf:
    """A module of the model that is folded to one ``call_module`` node.

    ``graph`` holds the leaf's own aten ops: one placeholder per input and a ``get_attr`` per parameter or
    buffer, with names local to the leaf. It is what runs where the real module would cast (float64 proofs).
    """

    kind: Kind
    graph: fx.Graph
    parameters: Mapping[str, tuple[int, ...]]
    """Local parameter name to shape, e.g. ``{"weight": (out, in), "bias": (out,)}``."""
    norm: Norm | None = None
    transposed: bool = False
    """A linear that stores its weight as [in, out] (GPT-2's Conv1D)."""
    partial: bool = False
    """Whether its module does more than this (a router of experts), so that no other can take its place."""

    @cached_property
    def written_out(self) -> bool:
        """Whether a linear rounds otherwise than ``F.linear``: it casts its parameters before it computes (a router of
        experts, to float32), or writes a product and a sum (Falcon)."""
        return any(
            cast_dtype(node) is not None or node.target is torch.ops.aten.matmul.default
            for node in self.graph.nodes
        )


@dataclass(frozen=True)
class Part:
    """A stretch of the graph that is executed with its own weights: the prologue, a block, or the epilogue.

    Nodes say to which part they belong in ``node.meta["part"]``, so that inserted nodes join one too.
    """

    name: str
    """Common module prefix of a block (``model.layers.0``); ``"prologue"`` and ``"epilogue"`` otherwise."""
    index: int
    kind: int
    """Blocks with the same canonical text have the same kind; -1 for prologue and epilogue."""


class WeightSource(Protocol):
    """Where tensors come from. Names are qualified parameter (or persistent buffer) names of the model."""

    def names(self) -> Iterable[str]:
        """All names that can be asked for."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape, without reading the data."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Storage dtype, without reading the data."""
        ...

    def load(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Read tensors on CPU, in their storage dtype. Files are opened for this call and closed after it."""
        ...

    def check_finite(self, name: str, tensor: torch.Tensor) -> None:
        """Refuse a tensor that holds NaN or infinity, naming it and where it came from."""
        ...


@dataclass(frozen=True)
class Program:
    """The graph of a model and what is known about it. Passes rewrite a fork, never the original."""

    graph: fx.Graph
    """Placeholders ``input_ids`` and ``attention_mask`` [batch, seq] int64; output logits."""
    root: nn.Module
    """The module tree on meta; every ``call_module`` target is one of its qualified names."""
    leaves: Mapping[str, Leaf]
    parts: tuple[Part, ...]
    """Prologue, blocks in order, epilogue."""
    source: WeightSource
    dtype: torch.dtype
    """The dtype in which the model was captured: baked casts to it follow the dtype of execution."""
    ties: Mapping[str, str] = field(default_factory=dict)
    """Parameter name to the name that owns its storage (``lm_head.weight -> model.embed_tokens.weight``)."""
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Non-persistent buffers, rebuilt on CPU, by qualified name."""
    config: Any = None
    """The transformers config, where there is one."""
    path: str | None = None
    """Checkpoint directory, where there is one."""
    stretches: Mapping[str, Stretches] = field(default_factory=dict)
    """Modules whose own code runs between their linears (``qc::stretch``), by qualified name."""
    attention: str | None = None
    """The implementation of attention that a transformers model was captured with."""
    notes: tuple[str, ...] = ()
    """What a reader should know of the capture: backend used, leaves left unfolded and why."""
    twin: Program | None = None
    """A narrow copy of the same architecture with random weights in memory, on which laws are proved."""
    facts: frozenset[str] = frozenset()

    @cached_property
    def memory(self) -> dict[str, Any]:
        """What was found out about this very graph, by whom it concerns; a fork starts with none."""
        return {}

    @property
    def architecture(self) -> str:
        """``LlamaForCausalLM``, as the config says it, or the class of a model without one."""
        names = getattr(self.config, "architectures", None) or [type(self.root).__name__]
        return str(names[0])

    @property
    def title(self) -> str:
        """Architecture and number of blocks: ``LlamaForCausalLM, 30 blocks``."""
        return f"{self.architecture}, {len(self.blocks)} blocks"

    @property
    def blocks(self) -> tuple[Part, ...]:
        """The repeated stretches of the graph, without prologue and epilogue."""
        return tuple(part for part in self.parts if part.kind >= 0)

    def nodes(self, part: Part) -> Iterator[fx.Node]:
        """Nodes of one part, in graph order."""
        return (node for node in self.graph.nodes if node.meta.get("part") == part.index)

    def leaf(self, node: fx.Node) -> Leaf | None:
        """The leaf that a ``call_module`` node runs, or None for any other node."""
        return self.leaves.get(str(node.target)) if node.op == "call_module" else None

    def parameter(self, name: str) -> str:
        """The name under which the source stores a parameter: itself, or its owner when it is tied."""
        return self.ties.get(name, name)

    def to_networkx(self) -> networkx.DiGraph:
        """The values as nodes of a networkx graph, with what is known of each: see ``show.networks.to_networkx``."""
        from .show.networks import to_networkx

        return to_networkx(self)

    def fork(self) -> Program:
        """A copy whose graph may be edited; modules, leaves and weights are shared."""
        graph = fx.Graph(owning_module=self.graph.owning_module)
        mapping: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(self.graph, mapping))
        for old, new in mapping.items():
            new.meta = dict(old.meta)
        (old_output,) = (n for n in self.graph.nodes if n.op == "output")
        (new_output,) = (n for n in graph.nodes if n.op == "output")
        new_output.meta = dict(old_output.meta)
        return replace(self, graph=graph)
