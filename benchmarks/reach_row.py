"""One row of the reach benchmark: a model type from its config to a quantized checkpoint that is read back.

As a program it is a worker: it reads model types from stdin, one a line, and answers each with one line of JSON.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .reach_configs import DECODERS, small_config

PATTERNS = ("norm_linear", "ov", "up_down", "linear_linear")
STAGES = ("build", "capture", "plan", "compile", "load")
TOKENS = (2, 17)
TEXT = 500
"""Characters of a reason that are kept."""


@dataclass
class Row:
    """What became of one type; ``failed`` names the stage that it did not pass, empty when it passed all."""

    type: str
    architecture: str = ""
    parameters: int = 0
    captured: bool = False
    blocks: int = 0
    experts: int = 0
    scans: int = 0
    """Stretches of a module's own code (``qc::stretch``)."""
    notes: list[str] = field(default_factory=list)
    sites: dict[str, int] = field(default_factory=dict)
    prenorm: bool = False
    """Whether nothing but linears reads the norms of the hidden state."""
    rotated: str = ""
    """``plain``, ``centred``, or empty."""
    rotation: str = ""
    """Why the hidden state is not rotated."""
    heads: int = 0
    """Attentions whose values are rotated."""
    linears: int = 0
    """Linears that are quantized."""
    proofs: int = 0
    worst: float = 0.0
    """Largest error of a certificate."""
    divergence: float | None = None
    """Relative error of the logits of what was read back, against the float model."""
    failed: str = ""
    reason: str = ""
    place: str = ""
    seconds: float = 0.0


def row_of(model_type: str) -> Row:
    """Take a type through all stages; whatever stops it is written down with its place."""
    row, started = Row(model_type), time.monotonic()
    stages = {
        "build": _build, "capture": _capture, "plan": _plan, "compile": _compile, "load": _load,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        state: dict[str, Any] = {"folder": Path(folder)}
        for name, stage in stages.items():
            try:
                with warnings.catch_warnings(), torch.random.fork_rng():
                    warnings.simplefilter("ignore")
                    stage(row, state)
            except Exception as error:  # any exception of transformers, of torch or of ours is a result here
                row.failed, row.place = name, _place(error)
                row.reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:TEXT]
                break
    row.seconds = round(time.monotonic() - started, 1)
    return row


def _place(error: BaseException) -> str:
    """The line of a model's code where an exception came from, else the last line of all."""
    from qc.compiler.blame import blame

    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    frames = traceback.extract_tb(cause.__traceback__)
    last = f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
    return (blame(cause) or last)[:TEXT]


def _build(row: Row, state: dict[str, Any]) -> None:
    import transformers

    torch.manual_seed(0)
    cls = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[row.type])
    make = cls._from_config if row.type in DECODERS else transformers.AutoModelForCausalLM.from_config
    model = make(small_config(row.type)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.ndim > 1:
                parameter.copy_(0.5 * noise * parameter.shape[-1] ** -0.5)
            elif parameter.dtype.is_floating_point:
                parameter.add_(0.1 * noise)
    row.architecture = type(model).__name__
    row.parameters = sum(parameter.numel() for parameter in model.parameters())
    state["float"] = state["model"] = model
    path = state["folder"] / "model"
    try:
        model.save_pretrained(path)
    except Exception as error:  # transformers can not save every model that it builds
        row.notes.append(f"compiled from memory: transformers does not save it ({type(error).__name__})")
        return
    state["model"] = path


def _capture(row: Row, state: dict[str, Any]) -> None:
    from qc.compiler import registry
    from qc.compiler.capture import capture
    from qc.compiler.roles import mixtures
    from qc.compiler.stretch import STRETCH

    program = state["program"] = capture(state["model"])
    row.captured, row.blocks = True, len(program.blocks)
    row.experts = sum(len(mixture) for mixture in mixtures(program))
    row.scans = sum(node.target is STRETCH for node in program.graph.nodes)
    row.notes += program.notes
    row.sites = {name: len(registry.get("patterns", name).find(program)) for name in PATTERNS}


def _plan(row: Row, state: dict[str, Any]) -> None:
    from qc.compiler.plan import make_plan

    planned = partial(make_plan, state["program"], scheme="w8a8", target="modelslim")
    turned = planned("fuse_norms,rotate_residual")
    (rewrite,) = turned.steps[1].answer.rewrites or (None,)
    if rewrite is None or rewrite.basis is None:
        row.rotation = " ".join(turned.steps[1].answer.problems)[:TEXT]
    else:
        row.rotated = "centred" if rewrite.basis.rotation.keeps_ones else "plain"
    row.prenorm = rewrite is not None or _all_fused(turned)
    passes = (
        "fuse_norms,rotate_residual,rotate_heads,linear_quant" if rewrite else "rotate_heads,linear_quant"
    )
    plan = planned(passes)
    row.heads = len(plan.steps[-2].answer.rewrites)
    row.linears = sum("scheme" in node.meta for node in plan.final.graph.nodes)
    state["passes"] = passes
    plan.require()


def _all_fused(plan: Any) -> bool:
    """Whether every norm of the hidden state has given its gain away: the form that a rotation asks for."""
    program = plan.steps[1].program
    width = max(leaf.norm.width for leaf in program.leaves.values() if leaf.norm) if program.leaves else 0
    return all(
        node.meta.get("unit")
        for node in program.graph.nodes
        if (leaf := program.leaf(node)) and leaf.norm and leaf.norm.weight and leaf.norm.width == width
    )


def _compile(row: Row, state: dict[str, Any]) -> None:
    from qc.compiler.compile import Options, compile

    if not row.linears:
        raise ValueError("no linear of a block is quantized")
    out = state["folder"] / "out"
    result = compile(state["program"], state["passes"], out, Options(scheme="w8a8", target="modelslim"))
    row.proofs, row.worst = result.journal.proofs, result.journal.worst
    state["out"] = out


def _load(row: Row, state: dict[str, Any]) -> None:
    from qc.compiler.load import load

    quantized, model = load(state["out"], dtype=torch.float32), state["float"].float()
    ids = torch.randint(3, 90, TOKENS, generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with torch.no_grad():
        want, got = (one(**given).logits.float() for one in (model, quantized))
    if not bool(torch.isfinite(got).all()):
        raise ValueError("the logits of what was read back are not finite")
    row.divergence = round(float((got - want).norm() / want.norm()), 4)


def main() -> None:
    """Answer the types on stdin; nothing but rows goes to stdout."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        with contextlib.redirect_stderr(io.StringIO()):
            row = row_of(line.strip())
        answers.write(json.dumps(asdict(row)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
