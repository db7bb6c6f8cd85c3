"""Journal: what happened to the model, rewrite by rewrite, with certificates. Saved beside the weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .certificate import Certificate
from .contract import Rewrite
from .edit import Verb
from .errors import Refused
from .measured import Noise, Spreads

FILE = "qc_journal.jsonl"


@dataclass(frozen=True)
class Told:
    """What a pass found out while it solved one rewrite, see ``BlockView.measures`` and ``BlockView.curves``."""

    measures: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)

    def numbers(self) -> dict[str, Any]:
        """The keys of a journal entry, three digits of each number; none where nothing was told."""
        found: dict[str, Any] = {}
        if self.measures:
            found["measures"] = {name: _three(value) for name, value in self.measures.items()}
        if self.curves:
            found["curves"] = {
                name: [[step, _three(value)] for step, value in curve] for name, curve in self.curves.items()
            }
        return found


@dataclass
class Journal:
    """Entries in the order of work. Nothing in it varies between two runs of the same command."""

    entries: list[dict[str, Any]] = field(default_factory=list)

    def twin(self, outcome: str) -> None:
        """What was proved on the narrow twin before any weight was read."""
        self.entries.append({"part": "twin", "outcome": outcome})

    def proved(
        self, part: str, rewrite: Rewrite, edits: Sequence[object], certificate: Certificate, told: Told
    ) -> None:
        """An EXACT rewrite of one part, with its certificate and what its pass told of it."""
        self._add(part, rewrite, edits, certificate={
            "math": _short(certificate.math), "stored": _short(certificate.stored), "rows": certificate.rows,
        }, **told.numbers())  # fmt: skip

    def learned(self, name: str, where: str, measures: Mapping[str, float]) -> None:
        """What a pass concluded from the whole float model, before anything was solved."""
        self.entries.append({"survey": name, "where": where, "measures": {}, **Told(measures).numbers()})

    def changed(self, part: str, rewrite: Rewrite, edits: Sequence[object], told: Told) -> None:
        """A LOSSY rewrite of one part, with what its pass told of it; its errors follow in ``measured``."""
        self._add(part, rewrite, edits, **told.numbers())

    def measured(self, part: str, before: Spreads, after: Noise) -> None:
        """What the linears of a part read and hold before and after all rewrites, and in dB the noise of integers.

        ``sqnr_db`` is that of outputs on the proof's calibration row, ``weight_sqnr_db`` that of weights alone.
        """
        found = {"before": before.numbers(), "after": after.numbers()}
        spread = {name: {when: found[when].get(name, {}) for when in found} for name in found["after"]}
        noise = {"sqnr_db": after.output_db, "weight_sqnr_db": after.weight_db} if after.quantized else {}
        self.entries.append(
            {"part": part}
            | {key: {name: round(value, 2) for name, value in of.items()} for key, of in noise.items()}
            | {"spread": spread}
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

    def passes(self, order: Iterable[str]) -> list[str]:
        """One line per pass, in this order: its rewrites, what was proved of them, how loud their noise is."""
        found = self._by_pass()
        return [_line(name, found[name], self._noise(found[name])) for name in order if name in found]

    def _by_pass(self) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        for entry in self.entries:
            if "pass" in entry:
                found.setdefault(entry["pass"], []).append(entry)
        return found

    def _noise(self, own: Sequence[Mapping[str, Any]]) -> list[float]:
        """Signal to noise, dB, of the linears that these entries quantized."""
        sites = {name for entry in own for name in quantized(entry)}
        return sorted(
            value
            for entry in self.entries
            for name, value in entry.get("sqnr_db", {}).items()
            if name in sites
        )

    @property
    def idle_experts(self) -> list[str]:
        """Experts that no calibration token was sent to."""
        return [name for entry in self.entries for name in entry.get("experts_without_tokens", ())]

    def save(self, directory: Path) -> None:
        """Write it as JSON lines."""
        lines = (json.dumps(entry, ensure_ascii=False) for entry in self.entries)
        (directory / FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def entries_of(directory: Path) -> list[dict[str, Any]]:
    """The entries that a finished compile left in its output.

    Raises:
        Refused: The directory has no journal, or one that cannot be read.
    """
    file = directory / FILE
    if not file.is_file():
        raise Refused(f"{directory} has no {FILE}: it is not the output of qc compile")
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise Refused(f"{file}: not readable as lines of JSON ({error}); compile again") from None


def quantized(entry: Mapping[str, Any]) -> list[str]:
    """The linears that the rewrite of an entry replaces by quantized ones."""
    verb = f"{Verb.SWAP.name.lower()} "
    return [edit.split()[1] for edit in entry.get("edits", ()) if edit.startswith(verb)]


def _line(name: str, own: Sequence[Mapping[str, Any]], noise: Sequence[float]) -> str:
    sites = len({entry["where"] for entry in own})
    linears = sum(len(quantized(entry)) for entry in own)
    text = f"{name}: {sites} {'rewrite' if sites == 1 else 'rewrites'}"
    proofs = [entry["certificate"] for entry in own if "certificate" in entry]
    if proofs:
        math, stored = (max(proof[kind] for proof in proofs) for kind in ("math", "stored"))
        text += f", proved in {len(proofs)} blocks" if len(proofs) > sites else ", proved"
        text += f", largest error {math:.1e} (float64), {stored:.1e} as stored"
    if linears:
        text += f", {linears} {'linear' if linears == 1 else 'linears'} quantized"
    if noise:
        text += f", signal to noise {noise[0]:.1f} to {noise[-1]:.1f} dB, median {noise[len(noise) // 2]:.1f}"
    return text


def _three(value: float) -> float:
    return float(f"{value:.3g}")


def _short(value: float) -> float:
    """Two digits: what an error says, and stable where the last bits are not."""
    return float(f"{value:.1e}")
