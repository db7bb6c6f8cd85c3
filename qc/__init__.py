"""qc: a quantization compiler for large language models.

>>> import qc
>>> program = qc.capture("path/to/checkpoint")  # doctest: +SKIP
>>> print(qc.plan(program, "iter_smooth,quarot,autoround"))  # doctest: +SKIP
>>> qc.compile("path/to/checkpoint", passes="iter_smooth,quarot,autoround", out="out")  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import testing as testing
    from .api import analyze as analyze
    from .api import bisect as bisect
    from .api import calib_mix as calib_mix
    from .api import calib_refine as calib_refine
    from .api import capture as capture
    from .api import compile as compile
    from .api import evaluate as evaluate
    from .api import generate as generate
    from .api import load as load
    from .api import load_program as load_program
    from .api import plan as plan
    from .api import set_phase as set_phase
    from .api import show as show
    from .api import verdict as verdict
    from .api import verify as verify
    from .compiler.calib_readers.question import Question as Question
    from .compiler.calib_readers.question import Reader as Reader
    from .compiler.contract import EXACT as EXACT
    from .compiler.contract import LOSSY as LOSSY
    from .compiler.contract import Answer as Answer
    from .compiler.contract import Fact as Fact
    from .compiler.contract import Pass as Pass
    from .compiler.contract import Rewrite as Rewrite
    from .compiler.contract import Setting as Setting
    from .compiler.edit import Edit as Edit
    from .compiler.edit import Verb as Verb
    from .compiler.errors import Failed as Failed
    from .compiler.errors import NotEquivalent as NotEquivalent
    from .compiler.errors import Refused as Refused
    from .compiler.operand import Hadamard as Hadamard
    from .compiler.operand import LowRank as LowRank
    from .compiler.operand import Permutation as Permutation
    from .compiler.operand import Quantize as Quantize
    from .compiler.operand import Slot as Slot
    from .compiler.operand import Statistic as Statistic
    from .compiler.operand import Vector as Vector
    from .compiler.pattern import Site as Site
    from .compiler.pattern import pattern as pattern
    from .compiler.program import Program as Program
    from .compiler.scheme import Int as Int
    from .compiler.scheme import LinearScheme as LinearScheme
    from .compiler.scheme import Rule as Rule
    from .compiler.scheme import Scheme as Scheme

_HOMES = {
    ".api": (
        "analyze", "bisect", "calib_mix", "calib_refine", "capture", "compile", "evaluate", "generate", "load",
        "load_program", "plan", "set_phase", "show", "verdict", "verify",
    ),
    ".compiler.calib_readers.question": ("Question", "Reader"),
    ".compiler.contract": ("EXACT", "LOSSY", "Answer", "Fact", "Pass", "Rewrite", "Setting"),
    ".compiler.edit": ("Edit", "Verb"),
    ".compiler.errors": ("Failed", "NotEquivalent", "Refused"),
    ".compiler.operand": ("Hadamard", "LowRank", "Permutation", "Quantize", "Slot", "Statistic", "Vector"),
    ".compiler.pattern": ("Site", "pattern"),
    ".compiler.program": ("Program",),
    ".compiler.scheme": ("Int", "LinearScheme", "Rule", "Scheme"),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted([*_HOME_OF, "testing"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: ``import qc`` itself loads nothing heavy."""
    if name == "testing":
        return import_module(".testing", __name__)
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'qc' has no attribute {name!r}")
    return getattr(import_module(home, __name__), name)


def __dir__() -> list[str]:
    return __all__
