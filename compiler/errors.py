"""What goes wrong, told apart by who can mend it."""

from __future__ import annotations


class Refused(Exception):
    """The plan or the input is not acceptable; nothing was written. Says what, where, why and what to do."""


class Failed(Exception):
    """Something broke while working on an accepted plan. Nothing is left at the output path."""


class NotEquivalent(Failed):
    """A rewrite that claims to keep the function does not, or a capture does not compute what the model computes."""

    evidence: object = None
    """What a proof ran on when it failed (``compiler.proof.Evidence``)."""
