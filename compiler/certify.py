"""A capture certifies itself on a twin: the graph against the model, and its attention with the model's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from .canon import symbolic
from .capture_attention import NAME, finite_eager_masks
from .capture_experts import use_experts
from .capture_model import Subject, kept_dtypes, weight_dtype
from .errors import NotEquivalent, Refused
from .execute import parameters_of, run
from .narrow import Shrunk, shrunk_configs
from .program import Program
from .roles import mixtures
from .source import InMemory
from .twin import difference, outline, random_like, random_model

SHAPE = (3, 21)
"""Batch and length on which a twin runs: longer than the windows, odd, with left padding in one row."""
PADDED = 6
OWN_ATTENTION = 1e-6
"""Largest relative error, in float64, between the model with ``qc::attention`` and with its own attention."""
ALIGNED = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""Largest error, relative to the largest logit, where products are rounded as the alignment of memory has it: in a
model's own scans, which do not repeat their logits bit for bit themselves, and in experts, whose weights are slices of
one tensor in the model and tensors of their own in the graph."""
HEAVY = 2**30
"""Bytes of random weights above which a twin's size is announced."""

Capturer = Callable[..., Program]


def certified(
    program: Program, what: Subject, example: Mapping[str, Tensor] | None, capture: Capturer
) -> Program:
    """The program with its twin and with notes on how it was certified.

    ``capture`` captures the twin as the program was captured.

    Raises:
        NotEquivalent: The graph does not compute what the model computes.
        Refused: No twin can be built to compare with.
    """
    if not isinstance(what.config, PretrainedConfig) or _unlike_its_config(what):
        return _by_itself(program, what, example)
    failures: list[str] = []
    for shrunk in shrunk_configs(program):
        try:
            module = random_model(shrunk.config, what.module, what.dtype, what.trust_remote_code)
            twin = capture(replace(what, config=shrunk.config, module=module, path=None))
        except Exception as error:  # a config that the model's own code does not accept: try a wider one
            failures.append(str(error).strip().split("\n")[0][:160])
            continue
        where = difference(outline(program, shrunk.layers), outline(twin, shrunk.layers))
        if where:
            failures.append(f"its text differs: {where}")
            continue
        _compare(twin, module, example)
        return replace(program, twin=twin, notes=(*program.notes, *_announce(twin, shrunk)))
    raise Refused(
        "the capture could not be certified: no small model of this config is like it.\n"
        + "\n".join(f"  {failure}" for failure in failures)
        + "\nCapture it without certifying (certify=False) only if you compare the result yourself."
    )


def _unlike_its_config(what: Subject) -> bool:
    """Whether a module in memory cannot be rebuilt from its config by its own class."""
    return what.module is not None and not isinstance(what.module, PreTrainedModel)


def _announce(twin: Program, shrunk: Shrunk) -> list[str]:
    size = sum(4 * _numel(twin.source.shape(name)) for name in twin.source.names())
    if shrunk.narrow and size < HEAVY:
        return []
    return [f"certified on {shrunk.layers} layers at full width with {size / 2**30:.1f} GB of random weights"]


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _by_itself(program: Program, what: Subject, example: Mapping[str, Tensor] | None) -> Program:
    """Certify a module in memory that no config describes: run it, and make its twin of random weights."""
    assert what.module is not None
    _compare(program, what.module, example, own=False)
    generator = torch.Generator().manual_seed(0)
    meta = dict(program.root.state_dict())
    names = dict.fromkeys(n for part in program.parts for n in parameters_of(program, part))
    tensors = {
        name: random_like(torch.ones(meta[name].shape), generator)
        if meta[name].is_floating_point()
        else meta[name]
        for name in names
    }
    return replace(program, twin=replace(program, source=InMemory(tensors)))


def inputs_for(program: Program, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random token ids that the program's embedding has, and a mask with left padding in the first row."""
    ids = torch.randint(vocabulary(program), SHAPE, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :PADDED] = 0
    return ids, mask


def vocabulary(program: Program) -> int:
    """How many token ids there are: rows of the table that ``input_ids`` look up, whatever reshapes them."""
    reached = {n for n in program.graph.nodes if n.op == "placeholder" and n.target == "input_ids"}
    for node in program.nodes(program.parts[0]):
        if not node.args or node.args[0] not in reached or symbolic(node):
            continue
        leaf = program.leaf(node)
        if leaf is not None and leaf.kind == "embedding":
            return leaf.parameters["weight"][0]
        reached.add(node)
    return 2


def in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose parameters of the main dtype are in ``dtype``; buffers stay what the model made them."""
    main, kept = weight_dtype(module), kept_dtypes(module)
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        own = kept.get(id(parameter)) or (dtype if parameter.dtype == main else parameter.dtype)
        own = dtype if dtype == torch.float64 else own
        memo[id(parameter)] = nn.Parameter(parameter.detach().to(own, copy=True), parameter.requires_grad)
    return copy.deepcopy(module, memo).eval()


def _compare(
    twin: Program, module: nn.Module, example: Mapping[str, Tensor] | None, own: bool = True
) -> None:
    ids, mask = inputs_for(twin)
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if example is not None:
        given = {name: given[name] for name in example}
    if isinstance(module, PreTrainedModel):
        given["use_cache"] = False
    backend = twin.attention
    for dtype in (twin.dtype, torch.float32):
        model = in_dtype(module, dtype)
        use_experts(model, NAME)
        if backend and isinstance(model, PreTrainedModel):
            model.set_attn_implementation(backend)
        with torch.no_grad():
            want = _logits(model, given)
            try:
                got = run(twin, ids, mask, dtype=dtype)
            except RuntimeError as error:
                what = " ".join(str(error).split())[:200]
                raise NotEquivalent(
                    f"the captured graph is not the model: it holds for one size of input only. On a batch of "
                    f"{ids.shape[0]} with length {ids.shape[1]} it fails: {what}"
                ) from error
        del model
        limit = ALIGNED[dtype] if twin.stretches or mixtures(twin) else 0.0
        worst = float((want.nan_to_num().double() - got.nan_to_num().double()).abs().max())
        if worst > limit * float(want.nan_to_num().abs().max()):
            raise NotEquivalent(
                f"the captured graph is not the model: on a twin in {dtype} logits differ by {worst:.3g}"
            )
    if own and backend == NAME and isinstance(module, PreTrainedModel):
        _compare_attention(module, given, mask)


def _compare_attention(module: nn.Module, given: Mapping[str, Any], mask: Tensor) -> None:
    results = []
    for implementation in (NAME, "eager"):
        model = in_dtype(module, torch.float64)
        assert isinstance(model, PreTrainedModel)
        model.set_attn_implementation(implementation)
        use_experts(model, implementation)
        with torch.no_grad(), finite_eager_masks():
            results.append(_logits(model, given)[mask.bool()])
        del model  # before the next copy is made
    got, want = results
    error = float((got - want).norm() / want.norm())
    if not error <= OWN_ATTENTION:
        raise NotEquivalent(
            f"the attention that was captured is not the model's own: on a twin in float64 logits differ by "
            f"{error:.3g}, relative (limit {OWN_ATTENTION:g}), on padded inputs longer than the windows"
        )


def _logits(model: nn.Module, given: Mapping[str, Any]) -> Tensor:
    result = model(**given)
    result = getattr(result, "logits", result)
    return result[0] if isinstance(result, list | tuple) else result
