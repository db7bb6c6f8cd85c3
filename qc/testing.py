"""``qc.testing``: a test suite for passes that are written elsewhere."""

from .compiler.testing import FAMILIES, Finding, Report, check, tiny

__all__ = ["FAMILIES", "Finding", "Report", "check", "tiny"]
