"""One file per command: ``add`` declares its options, ``run`` does it and returns the exit status (None is 0)."""

from __future__ import annotations

NAMES = (
    "compile",
    "plan",
    "show",
    "diff",
    "why",
    "eval",
    "verify",
    "analyze",
    "bisect",
    "calib",
    "passes",
    "recipes",
    "new_pass",
    "generate",
    "reproduce",
)
"""The commands in the order in which ``qc --help`` lists them; each is a module here, ``_`` for ``-``."""
