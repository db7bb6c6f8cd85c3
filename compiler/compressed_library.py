"""The library compressed-tensors: whether it is there, and what to do where it is not."""

from __future__ import annotations

from importlib.util import find_spec

from .errors import Refused

NAME = "compressed-tensors"
"""On PyPI, and as ``quant_method`` of a ``quantization_config``."""
INSTALL = "pip install 'qc[compressed-tensors]'"


def is_installed() -> bool:
    """Whether it can be imported; nothing is imported."""
    return find_spec(NAME.replace("-", "_")) is not None


def check_installed(where: str = "") -> None:
    """Refuse where it is not installed; ``where`` is what needs it."""
    if not is_installed():
        raise Refused(f"{where}{': ' if where else ''}{NAME} is not installed: {INSTALL}")
