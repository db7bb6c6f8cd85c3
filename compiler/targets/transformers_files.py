"""What ``from_pretrained`` does with a directory after ``import qc.hf``: the same code puts the modules in place."""

from __future__ import annotations

from pathlib import Path

from ..capture_sizes import model_on_meta
from ..description import METHOD, described, own_block
from ..errors import Refused
from ..load import stored_dtype
from ..load_modules import QuantizedCheckpoint, check_exact, install
from .ascendv1_files import consistent
from .stored import read_by_name, without_block
from .target import Finding

CONFIG = "config.json"


def judged(directory: Path, trust_remote_code: bool) -> tuple[Finding, ...]:
    """Whether block, tensors and model agree; see ``Target.judge``. No weight is read but tied ones."""
    files, block = read_by_name(directory), own_block(directory)
    if block is None:
        return (*files.findings, without_block(files, "L1", METHOD))
    told = consistent(files, CONFIG, lambda: described(block, files.entries), exact=True)
    if any(finding.outcome == "refuses" for finding in told):
        return told
    model, dtype = model_on_meta(directory, trust_remote_code), stored_dtype(directory)
    try:
        types = described(block, files.entries)
        name_of, _ = install(model, directory, types, dtype, dtype)  # pyright: ignore[reportArgumentType]
        check_exact(model, QuantizedCheckpoint(directory, model, name_of))
    except Refused as error:
        return (*told, Finding("refuses", "L3", CONFIG, str(error).removeprefix(f"{directory}: ")))
    return told
