"""Targets as they are spelled: ``NAME``, ``NAME==VERSION``, ``NAME[DEVICE]==VERSION``, as pip spells packages."""

from __future__ import annotations

import re
from typing import Any

from .. import registry
from ..errors import Refused
from .target import Target

SPELLING = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(\[(?P<device>[^\]]*)\])?(==(?P<version>.*))?")


def target_named(text: str | Target) -> Any:
    """The target that a text names, or the target itself.

    Raises:
        Refused: No such target, version or device; the message says which there are.
    """
    if not isinstance(text, str):
        return text
    found = SPELLING.fullmatch(text.strip())
    if found is None:
        name = re.split(r"[^A-Za-z0-9._-]", text.strip(), maxsplit=1)[0]
        known = registry.names("targets")
        hint = f" of {name}" if name in known else ""
        raise Refused(
            f"target {text!r}: a version{hint} is spelled NAME==VERSION, a device NAME[DEVICE]==VERSION"
            f" (vllm-ascend[A3]==0.18); there are {', '.join(known)}"
        )
    target = registry.get("targets", found["name"])
    if found["version"] is None and found["device"] is None:
        return target
    return target.variant(found["version"], found["device"])
