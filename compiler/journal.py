"""Journal: what happened to the model, rewrite by rewrite, with certificates. Saved beside the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .contract import Rewrite
from .verify import Certificate

FILE = "qc_journal.jsonl"


@dataclass
class Journal:
    """Entries in the order of work. Nothing in it varies between two runs of the same command."""

    entries: list[dict[str, Any]] = field(default_factory=list)

    def twin(self, outcome: str) -> None:
        """What was proved on the narrow twin before any weight was read."""
        self.entries.append({"part": "twin", "outcome": outcome})

    def proved(self, part: str, rewrite: Rewrite, edits: Sequence[object], certificate: Certificate) -> None:
        """An EXACT rewrite of one part, with its certificate."""
        self._add(part, rewrite, edits, certificate={
            "math": _short(certificate.math), "rows": certificate.rows,
        })  # fmt: skip

    def changed(
        self, part: str, rewrite: Rewrite, edits: Sequence[object], measures: Mapping[str, float]
    ) -> None:
        """A LOSSY rewrite of one part, with what its pass measured; its errors follow in ``measured``."""
        more = {"measures": {name: float(f"{value:.3g}") for name, value in measures.items()}}
        self._add(part, rewrite, edits, **(more if measures else {}))

    def measured(self, part: str, sqnr: dict[str, float]) -> None:
        """Signal to quantization noise of each quantized linear's output, in dB, on the proof's calibration rows."""
        self.entries.append(
            {"part": part, "sqnr_db": {name: round(value, 2) for name, value in sqnr.items()}}
        )

    def idle(self, part: str, experts: Sequence[str], of: int) -> None:
        """Experts of a part that no calibration token was sent to, out of so many; nothing where there are none."""
        if experts:
            self.entries.append({"part": part, "experts_without_tokens": list(experts), "of": of})

    def stored(self, part: str, error: float) -> None:
        """Relative error of a part with all EXACT rewrites, once its tensors are cast to the dtype of export."""
        self.entries.append({"part": part, "stored": _short(error)})

    def _add(self, part: str, rewrite: Rewrite, edits: Sequence[object], **more: Any) -> None:
        self.entries.append({
            "part": part, "pass": rewrite.pass_name, "pattern": rewrite.pattern, "where": rewrite.where,
            "edits": [str(edit) for edit in edits], "claim": rewrite.claim.name, **more,
        })  # fmt: skip

    @property
    def worst(self) -> float:
        """The largest math error of all certificates."""
        return max(
            (entry["certificate"]["math"] for entry in self.entries if "certificate" in entry), default=0.0
        )

    @property
    def proofs(self) -> int:
        """Number of certificates."""
        return sum("certificate" in entry for entry in self.entries)

    @property
    def idle_experts(self) -> list[str]:
        """Experts that no calibration token was sent to."""
        return [name for entry in self.entries for name in entry.get("experts_without_tokens", ())]

    def save(self, directory: Path) -> None:
        """Write it as JSON lines."""
        lines = (json.dumps(entry, ensure_ascii=False) for entry in self.entries)
        (directory / FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _short(value: float) -> float:
    """Two digits: what an error says, and stable where the last bits are not."""
    return float(f"{value:.1e}")
