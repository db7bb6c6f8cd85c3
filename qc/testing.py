"""``qc.testing``: a test suite for passes that are written elsewhere."""

from .compiler.testing import Finding, Report, check
from .compiler.testing_models import FAMILIES, tiny

__all__ = ["FAMILIES", "Finding", "Report", "check", "tiny"]
