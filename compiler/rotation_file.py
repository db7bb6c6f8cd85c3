"""The rotation of the hidden state in a file of its own, for draft models that share it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from .plan import Plan
from .targets.ascendv1 import ROTATION_FILE
from .targets.served import global_rotation


def write_rotation(planned: Plan, path: Path) -> None:
    """The rotation of the hidden state, ``x -> x Q``, float32 [hidden, hidden], where no server looks for weights."""
    rotation = global_rotation(planned)
    if rotation is None or not planned.layout.optional:
        return
    file = path / ROTATION_FILE
    file.parent.mkdir(exist_ok=True)
    matrix = rotation.times(torch.eye(rotation.width, dtype=torch.float64)).float().contiguous()
    save_file({"global_rotation": matrix}, file)
