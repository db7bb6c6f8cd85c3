"""Capture: a model becomes a Program, on the meta device, without a weight being read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import PretrainedConfig, PreTrainedModel

from .blame import blame, blame_node
from .blocks import skips, split
from .canon import canonical, hint
from .capture_attention import NAME, Uncarried
from .capture_attention import register as register_attention
from .capture_experts import register as register_experts
from .capture_model import Subject, constants, subject, ties
from .capture_stretches import stretches_of, traced_in_stretches
from .certify import certified
from .errors import NotEquivalent, Refused
from .expert_weights import checkpoint, split_state
from .export_module import export_graph, quiet
from .fold import fold
from .joins import undo_joins
from .program import Program, WeightSource
from .shards import nothing
from .source import InMemory, ShapesOnly
from .stretch import Stretches
from .templates import expand, marked

ATTENTION = torch.ops.qc.attention.default
EAGER = "eager"
ATTENTIONS = (NAME, "sdpa", EAGER)
"""Implementations of attention, in the order in which they are tried."""
EXAMPLE = (2, 7)
"""Batch and length of the example on which a model is traced; both stay open."""

MIXED = ("same dtype", "scalar type")
"""What torch says of code that mixes dtypes, and so runs in no other than float32."""


def _same_sizes(input_ids: Tensor, attention_mask: Tensor) -> None:
    """Tell the tracer that both inputs have one batch size and one length."""
    torch._check(input_ids.shape[0] == attention_mask.shape[0])
    torch._check(input_ids.shape[1] == attention_mask.shape[1])


class Logits(nn.Module):
    """A language model as a function of (input_ids, attention_mask) to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [b, s, vocabulary] of token ids [b, s] and a mask [b, s] that is 0 on padding."""
        _same_sizes(input_ids, attention_mask)
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


class Result(nn.Module):
    """A module in memory as a function of its inputs to its first result."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The first result of the module on its inputs by name."""
        _same_sizes(input_ids, attention_mask)
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        result = self.model(**{name: given[name] for name in self.names})
        result = getattr(result, "logits", result)
        return result[0] if isinstance(result, list | tuple) else result


def capture(
    model: str | Path | nn.Module | PretrainedConfig,
    *,
    config: Any = None,
    example: Mapping[str, Tensor] | None = None,
    trust_remote_code: bool = False,
    certify: bool = True,
    source: WeightSource | None = None,
) -> Program:
    """Capture a model as one canonical graph on meta, folded to its modules and cut into blocks.

    Args:
        model: A checkpoint directory, a hub id, a transformers config, or a module in memory.
        config: Used in place of the checkpoint's own config.
        example: Inputs of a module that is no transformers model: ``input_ids`` and, where it takes one,
            ``attention_mask``, both [batch, length] int64 with batch and length above 1.
        trust_remote_code: Whether Python code that comes with the checkpoint may run.
        certify: Whether to compare the capture with the model itself on a narrow twin (seconds).
        source: Where weights come from; by default the checkpoint, or the module's own.

    Raises:
        Refused: What was given cannot be captured, and why.
        NotEquivalent: The capture does not compute what the model computes.
    """
    register_attention()
    register_experts()
    what = subject(model, config=config, trust_remote_code=trust_remote_code)

    def captured(what: Subject, attentions: tuple[str, ...] = ATTENTIONS) -> Program:
        program = capture_subject(what, example=example, source=source, attentions=attentions)
        if not certify:
            return program

        def again(what: Subject) -> Program:
            return capture_subject(what, example=example, attentions=attentions)

        try:
            return certified(program, what, example, again)
        except NotEquivalent as error:  # its code may take the mask for another kind than ours
            if program.attention != NAME or EAGER not in attentions:
                raise
            try:
                other = captured(what, (EAGER,))
            except Exception:
                raise error from None
            return replace(other, notes=(f"attention was not captured as {NAME}: {error}", *other.notes))

    try:
        return captured(what)
    except (RuntimeError, Refused) as error:
        if not any(words in str(error) for words in MIXED):
            raise
        try:
            program = captured(replace(what, dtype=torch.float32))
        except Exception:
            raise error from None
        return replace(program, notes=(*program.notes, f"captured in float32: {reason(error)}"))


def capture_subject(
    what: Subject,
    *,
    example: Mapping[str, Tensor] | None = None,
    source: WeightSource | None = None,
    attentions: tuple[str, ...] = ATTENTIONS,
) -> Program:
    """Capture without comparing: see ``capture``; ``attentions`` are tried in order."""
    owner, graph, made, notes, attention, stretches = _export(what, example, attentions)
    lost = sorted(name for name, tensor in made.items() if tensor.device.type == "meta")
    if lost:
        raise Refused(
            f"the model makes {len(lost)} tensors from numbers while it runs; on meta they are lost.\n"
            "qc cannot compile a model whose code holds constants of its own."
        )
    held = constants(owner, what) | made
    for name, tensor in made.items():
        owner.register_buffer(name, tensor, persistent=False)
    leaves, unfolded = fold(graph, owner)
    graph, parts = split(graph, owner, leaves)
    graph.lint()
    names = ties(owner)
    if source is None:
        source, names = _source(what, owner, names)
    return Program(
        graph=graph,
        root=owner,
        leaves=leaves,
        parts=parts,
        source=source,
        dtype=what.dtype,
        ties=names,
        constants=held,
        config=what.config,
        path=None if what.path is None else str(what.path),
        attention=attention,
        stretches=stretches,
        notes=(*notes, *unfolded, *skips(graph, parts)),
    )


def _source(what: Subject, owner: nn.Module, names: dict[str, str]) -> tuple[WeightSource, dict[str, str]]:
    """Where the weights are, and which names share them."""
    if what.module is not None:
        return InMemory(split_state(what.module.state_dict(keep_vars=True), owner)), names
    if what.path is None:
        return ShapesOnly(owner), names
    if not _has_weights(what.path):
        return ShapesOnly(owner, nothing(what.path)), names
    source = checkpoint(what.path, owner)
    return source, dict(source.ties)


def _has_weights(path: Path) -> bool:
    return any(path.glob("*.safetensors*")) or any(path.glob("*.bin*"))


def _export(
    what: Subject, example: Mapping[str, Tensor] | None, attentions: tuple[str, ...]
) -> tuple[nn.Module, fx.Graph, dict[str, Tensor], list[str], str | None, dict[str, Stretches]]:
    """Export with the attention op, or else with the fused attention, or else with the written-out one.

    A model that does not ask the attention interface may not be told of an implementation that it does not know:
    it would build masks for it all the same.
    """
    hosted = what.module is None or isinstance(what.module, PreTrainedModel)
    failures: list[tuple[str, Exception]] = []
    for implementation in attentions if hosted else (None,):
        try:
            owner, graph, made, stretches = _attempt(what, example, implementation)
            if implementation == NAME and not graph.find_nodes(op="call_function", target=ATTENTION):
                raise Uncarried("the model does not use the attention interface")
        except Refused:
            raise
        except Exception as error:  # whatever the model's own code, transformers or the exporter raises
            failures.append((implementation or "as it is", error))
            continue
        notes = [f"attention was not captured as {tried}: {reason(error)}" for tried, error in failures]
        return owner, graph, made, notes, implementation, stretches
    tried = "\n".join(f"  with attention {name}: {reason(error)}" for name, error in failures)
    places = dict.fromkeys(place for _, error in failures if (place := blame(error)))
    where = "".join(f"  at {place}\n" for place in places)
    raise Refused(
        f"the model cannot be traced:\n{tried}\n{where}"
        "A model whose Python code depends on the values of tensors has no graph, unless that code is in a module of"
        " its own, inside the blocks, that gives one tensor: qc then keeps that module as it is. Move the line into"
        " such a module, or rewrite it without looking at values (torch.where instead of if)."
    ) from failures[-1][1]


def reason(error: Exception) -> str:
    """What an exception says, in one line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    name = "" if isinstance(error, Uncarried) else f"{type(error).__name__}: "
    return f"{name}{text[:400]}"


def _attempt(
    what: Subject, example: Mapping[str, Tensor] | None, implementation: str | None
) -> tuple[nn.Module, fx.Graph, dict[str, Tensor], dict[str, Stretches]]:
    """Trace a model; where that fails and some of its modules ask for the values of tensors, those are opaque."""
    owner = what.on_meta(implementation)
    known = _stretches(owner, example)
    try:
        with traced_in_stretches(owner, known):
            return owner, *_trace(owner, example), known
    except Refused:
        raise
    except Exception:  # whatever the model's own code or the exporter raises
        more = _stretches(owner, example, values=True)
        if more.keys() <= known.keys():
            raise
        owner = what.on_meta(implementation)
        with traced_in_stretches(owner, more):
            return owner, *_trace(owner, example), more


def _stretches(
    owner: nn.Module, example: Mapping[str, Tensor] | None, values: bool = False
) -> dict[str, Stretches]:
    """The modules that have no graph with an open length; none where the model does not run on meta to find out."""
    wrapper = _wrapped(owner, example)

    def run(batch: int, length: int) -> None:
        ids = torch.zeros(batch, length, dtype=torch.int64, device="meta")
        wrapper(ids, torch.ones_like(ids))

    try:
        with quiet():
            return stretches_of(owner, run, values)
    except Exception:  # whatever the model's own code raises on meta, it will raise again when it is traced
        return {}


def _trace(owner: nn.Module, example: Mapping[str, Tensor] | None) -> tuple[fx.Graph, dict[str, Tensor]]:
    """The canonical graph of a model on meta: one layer of each kind traced, or all if they will not be."""
    try:
        with marked(owner) as stack:
            exported = _exported(owner, example)
        graph, made = canonical(exported, "model.", owner)
        undo_joins(graph)
        return (expand(graph, stack, owner) if stack else graph), made
    except Refused:
        raise
    except Exception:  # marks change what runs: whatever stops them, the model by itself decides
        graph, made = canonical(_exported(owner, example), "model.", owner)
        undo_joins(graph)
        return graph, made


def _exported(owner: nn.Module, example: Mapping[str, Tensor] | None) -> fx.GraphModule:
    ids = torch.zeros(EXAMPLE, dtype=torch.int64, device="meta")
    axes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    exported = export_graph(_wrapped(owner, example), (ids, torch.ones_like(ids)), (axes, axes))
    _check_open(exported)
    return exported


def _wrapped(owner: nn.Module, example: Mapping[str, Tensor] | None) -> nn.Module:
    """A model as a function of token ids and their mask to one tensor."""
    if example is not None:
        unknown = set(example) - {"input_ids", "attention_mask"}
        if unknown or "input_ids" not in example:
            raise Refused("example inputs are input_ids and, where the module takes one, attention_mask")
        return Result(owner, tuple(example)).eval()
    if isinstance(owner, PreTrainedModel):
        return Logits(owner).eval()
    raise Refused("a module that is no transformers model needs example inputs: example={'input_ids': ...}")


def _check_open(exported: fx.GraphModule) -> None:
    """Refuse a graph that holds for one batch size or one length only.

    Raises:
        Refused: The batch size or the length is a number in the graph.
        ValueError: A tensor has as many elements as the values of other tensors say.
    """
    ids = next(n for n in exported.graph.nodes if n.op == "placeholder" and n.target == "input_ids")
    for axis, size in zip(("batch size", "length"), ids.meta["val"].shape, strict=True):
        if isinstance(size, int):
            raise Refused(f"the model's code is specialised to one {axis} ({size}) when it is traced.")
    for node in exported.graph.nodes:
        val = node.meta.get("val")
        try:
            for size in val.shape if isinstance(val, Tensor) else ():
                hint(size)
        except ValueError as error:
            raise ValueError(f"{error}, at {blame_node(node)}") from error
