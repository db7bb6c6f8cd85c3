"""Calibration files that are written: whole or not at all, and never over what was read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import Refused

SUFFIXES = (".jsonl", ".json")


def write_samples(
    out: str | Path, samples: Sequence[Mapping[str, Any]] | None, *, force: bool = False,
    inputs: Iterable[Path] = (),
) -> Path:  # fmt: skip
    """Write samples, one JSON value per line, or as one list where the name ends in ``.json``.

    None checks only whether they could be written. Two calls with the same samples write the same bytes.

    Raises:
        Refused: Another suffix; the file exists and ``force`` is not given; it is an input; its directory is not there.
    """
    out = Path(out)
    if out.suffix not in SUFFIXES:
        raise Refused(f"--out {out}: samples are written as {' or '.join(SUFFIXES)}")
    if not out.parent.is_dir():
        raise Refused(f"--out {out}: there is no directory {out.parent}; make it first")
    here = out.resolve()
    if out.exists() and any(here.is_relative_to(path.resolve()) for path in inputs):
        raise Refused(f"--out {out}: this is an input; choose another name")
    if out.is_dir():
        raise Refused(f"--out {out}: this is a directory")
    if out.exists() and not force:
        raise Refused(f"--out {out}: it exists; pass --force to replace it")
    if samples is None:
        return out
    if out.suffix == ".json":
        text = json.dumps(list(samples), ensure_ascii=False, indent=1) + "\n"
    else:
        text = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8", newline="\n")
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)
    return out
