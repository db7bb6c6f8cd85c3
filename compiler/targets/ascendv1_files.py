"""Whether the files of a directory in the ascendv1 layout agree with one another, whoever reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import Refused
from .stored import Stored
from .target import Finding


def consistent(
    files: Stored, name: str, describe: Callable[[], Mapping[str, Any] | None], *, exact: bool = False
) -> tuple[Finding, ...]:
    """Tensors without a type, types without tensors, and tensors that their type does not have.

    Args:
        files: The directory.
        name: Of the description, for messages.
        describe: Reads the description; None where there is none.
        exact: Whether scales, offsets and biases have to have the dtypes that qc writes.
    """
    from ..verify import modules_of

    try:
        types = describe()
    except Refused as error:
        return (*files.findings, Finding("refuses", "L1", name, str(error)))
    if types is None:
        return (*files.findings, Finding("refuses", "L1", name, "it is not there, so no type is known"))
    _, wrong = modules_of(files, types, files.dtype, exact=exact)
    told = (line.partition(" ") for line in wrong)
    return (*files.findings, *(Finding("refuses", "L2", tensor.rstrip(":"), why) for tensor, _, why in told))
