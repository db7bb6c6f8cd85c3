"""Whether the files of a directory in the ascendv1 layout agree with one another, whoever reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import Refused
from .stored import stored
from .target import Finding


def consistent(
    directory: Path, name: str, describe: Callable[[Path], Mapping[str, Any] | None]
) -> tuple[Finding, ...]:
    """Tensors without a type, types without tensors, and tensors that their type does not have.

    Args:
        directory: The directory.
        name: Of the description, for messages.
        describe: From the directory to the description; None where there is none.

    Raises:
        Refused: See ``stored``.
    """
    from ..verify import modules_of

    files = stored(directory)
    try:
        types = describe(directory)
    except Refused as error:
        return (*files.findings, Finding("refuses", "L1", name, str(error)))
    if types is None:
        return (*files.findings, Finding("refuses", "L1", name, "it is not there, so no type is known"))
    _, wrong = modules_of(files, types, files.dtype, exact=False)
    told = (line.partition(" ") for line in wrong)
    return (*files.findings, *(Finding("refuses", "L2", tensor.rstrip(":"), why) for tensor, _, why in told))
