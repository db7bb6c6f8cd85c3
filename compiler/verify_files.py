"""The files of an output and of its input against the digests of the manifest: two of the checks of ``qc verify``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cost import size
from .errors import Refused
from .export import MANIFEST, UNHASHED, digests

SHOWN = 20
"""Findings that are printed of one check."""


@dataclass(frozen=True)
class Check:
    """One kind of check: what was looked at, and everything found wrong."""

    name: str
    looked_at: str
    wrong: tuple[str, ...]

    def __str__(self) -> str:
        if not self.wrong:
            return f"{self.name}: {self.looked_at}"
        rest = [f"  and {len(self.wrong) - SHOWN} more"] if len(self.wrong) > SHOWN else []
        return "\n".join(
            [f"{self.name}: {len(self.wrong)} wrong", *(f"  {w}" for w in self.wrong[:SHOWN]), *rest]
        )


def files_as_written(path: Path, manifest: Mapping[str, Any]) -> Check:
    """Every file that the manifest names is there as it was written, and no other is."""
    named = _digests_of(manifest, "outputs")
    there = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    wrong = [f"{name} is missing" for name in named if name not in there]
    wrong += [f"{name} is in no manifest" for name in sorted(there.keys() - named.keys() - set(UNHASHED))]
    wrong += _differing(named, there)
    held = size(sum(file.stat().st_size for file in there.values()))
    return Check("files", f"{len(named)} with {held}, as they were written", tuple(wrong))


def inputs_as_read(model: Path, manifest: Mapping[str, Any]) -> Check:
    """The checkpoint is the one from which the output was made."""
    prefix = "model/"
    named = {
        name.removeprefix(prefix): digest
        for name, digest in _digests_of(manifest, "inputs").items()
        if name.startswith(prefix)
    }
    there = {name: model / name for name in named if (model / name).is_file()}
    wrong = [f"{model / name} is missing" for name in named if name not in there]
    if not named:
        wrong = ["the manifest names no file of a checkpoint: the model was compiled from memory"]
    return Check("inputs", f"{len(named)} files of {model}", (*wrong, *_differing(named, there)))


def _digests_of(manifest: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = manifest.get(key)
    if not isinstance(found, dict):
        raise Refused(f"{MANIFEST} has no {key}: it was not written by qc compile, or was changed")
    return found


def _differing(named: Mapping[str, Any], there: Mapping[str, Path]) -> list[str]:
    found = digests({name: there[name] for name in named if name in there})
    return [
        f"{name} has changed: {_short(digest)}, the manifest says {_short(named[name])}"
        for name, digest in found.items()
        if digest != named[name]
    ]


def _short(digest: Any) -> str:
    known = isinstance(digest, dict) and {"bytes", "sha256"} <= digest.keys()
    return f"{digest['bytes']} bytes, sha256 {str(digest['sha256'])[:12]}" if known else str(digest)
