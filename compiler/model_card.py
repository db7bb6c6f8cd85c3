"""Model card: README.md of an output, for people and for the hub. What it says comes from the plan and the journal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .calibration import Calibration
from .certificate import LIMIT
from .command_text import command_text
from .cost import cost_of
from .errors import Refused
from .export import CARD
from .journal import Journal
from .plan import Plan
from .plan_text import title

_BEGIN, _END = "<!-- accuracy: begin -->", "<!-- accuracy: end -->"
_UNKNOWN = "Not measured. `qc eval OUT --reference MODEL --text FILE --card` measures it and writes it here."
_LOAD: Mapping[str, str] = {
    "transformers": """```python
import qc.hf
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("OUT")
```""",
    "compressed-tensors": """```python
from transformers import AutoModelForCausalLM  # with compressed-tensors installed

model = AutoModelForCausalLM.from_pretrained("OUT")
```""",
    "numpy": """```python
import numpy

integers = numpy.load("OUT/quant_weight.npy", allow_pickle=True).item()  # module to array
```

The files are pickles, which can run code when they are read: read those of people whom you trust. The float model is
needed beside them.""",
    "pt2": """```python
import torch
import qc

model = qc.load_program("OUT").module()
ids = torch.ones(1, 8, dtype=torch.int64)
logits = model(ids, torch.ones_like(ids))
```

`qc.load("OUT")` gives the model of transformers from the same directory.""",
    "": """```python
import qc.hf
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("OUT", quantization_config=qc.hf.Config())
```

Without `quantization_config` transformers would take the integers for float weights.""",
}


def model_card(plan: Plan, journal: Journal, data: Calibration | None) -> str:
    """The card as Markdown, with the metadata of the hub in front. Nothing in it varies between two runs."""
    cost = cost_of(plan, peak=False)
    tags = ["qc", "quantized", *sorted({kind.type.lower() for kind in plan.formats.values()})]
    rows = [
        ("base model", _base(plan) or title(plan)),
        *cost.rows()[:3],
        ("scheme", plan.scheme.name),
        ("target", plan.target.spelling),
        ("dtype of floats", str(plan.dtype).removeprefix("torch.")),
    ]
    return "\n".join([
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        *([f"base_model: {_base(plan)}", "base_model_relation: quantized"] if _base(plan) else []),
        f"tags: {json.dumps(tags)}",
        "---",
        "",
        f"# {title(plan)}, quantized by qc",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        "## Recipe",
        "",
        *(f"{step.index + 1}. `{step.what}`" for step in plan.steps),
        "",
        f"`{command_text(plan)}`",
        "",
        _calibration(data),
        *("" for _ in plan.notes[:1]),
        *(f"- {note}" for note in plan.notes),
        "",
        "## Certificates",
        "",
        _certificates(journal),
        "",
        *(f"- {line}" for line in journal.passes(plan.rewrites)),
        "",
        "The proofs stand in `qc_journal.jsonl`, one per rewrite. `qc verify OUT` checks them and the files.",
        "",
        "## Accuracy",
        "",
        _BEGIN,
        _UNKNOWN,
        _END,
        "",
        "## Use",
        "",
        _LOAD.get(plan.target.name, _LOAD[""]),
        "",
    ])  # fmt: skip


def write_accuracy(directory: str | Path, text: str) -> None:
    """Put measured accuracy into the card of a directory, in the place of what it says of it.

    Raises:
        Refused: There is no card, or the marks between which it stands are gone.
    """
    path = Path(directory) / CARD
    if not path.is_file():
        raise Refused(f"{directory}: no {CARD} to write into; qc compile makes one")
    card = path.read_text(encoding="utf-8")
    before, begin, rest = card.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        raise Refused(f"{path}: the lines {_BEGIN} and {_END} are not there; put them where accuracy is told")
    path.write_text(f"{before}{_BEGIN}\n{text}\n{_END}{after}", encoding="utf-8")


def _base(plan: Plan) -> str:
    """The hub id of the float model, where config.json says one."""
    config: Any = plan.program.config
    name = str(getattr(config, "_name_or_path", "") or "")
    return name if name.count("/") == 1 and not name.startswith((".", "/", "~")) and " " not in name else ""


def _calibration(data: Calibration | None) -> str:
    if data is None:
        return "No calibration data was used."
    count, length = data.tokens.shape
    names = [Path(file).name for file in data.files]
    source = ", ".join(names) if names else "the text that ships with qc"
    return f"Calibrated on {count} windows of {length} tokens from {source} (sha256 of the tokens {data.digest[:16]})."


def _certificates(journal: Journal) -> str:
    if not journal.proofs:
        return "No pass of this recipe claims to keep the function, so there is nothing to prove."
    return (
        f"Every rewrite that claims to keep the function was proved on the real weights in float64: {journal.proofs}"
        f" proofs, largest relative error {journal.worst:.1e}, limit {LIMIT:g}."
    )
