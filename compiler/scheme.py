"""Scheme: which number formats the linears of a model get, as frozen values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from wcmatch import fnmatch
from wcmatch._wcparse import PatternLimitException

from .errors import Refused

Granularity = Literal["tensor", "channel", "token", "group", "mix", "dynamic-tensor"]
GLOB_FLAGS = fnmatch.BRACE | fnmatch.CASE
BRACE_LIMIT = 10_000
"""Most alternatives that one glob may expand to."""


@dataclass(frozen=True)
class Int:
    """A signed integer format; an asymmetric one carries an offset per scale.

    ``per="mix"`` is an activation that a server quantizes per token in prefill and per tensor in decode,
    ``per="dynamic-tensor"`` one whose scale all tokens of a call share, found while the model runs.
    """

    bits: int
    per: Granularity
    group: int = 0
    """Input channels that share one scale, for ``per="group"``."""
    symmetric: bool = True

    @property
    def qmax(self) -> int:
        """Largest integer: 2^(bits-1) - 1."""
        return 2 ** (self.bits - 1) - 1

    @property
    def qmin(self) -> int:
        """Smallest integer: -2^(bits-1)."""
        return -(2 ** (self.bits - 1))

    def __str__(self) -> str:
        per = f"group({self.group})" if self.per == "group" else self.per
        return f"int{self.bits}/{per}" + ("" if self.symmetric else "/asym")


SPELLED = {"tensor": "-static", "mix": "-mix", "dynamic-tensor": "-dynamic-tensor"}
"""Scopes of activations other than the token."""


@dataclass(frozen=True)
class LinearScheme:
    """Formats of one linear: its weight and its input activation; None means float."""

    weight: Int | None = None
    act: Int | None = None
    outliers: float = 0.0
    """Share of the weights that stay in float, one by one, beside the integers."""

    @property
    def quantized(self) -> bool:
        """Whether anything is an integer here."""
        return self.weight is not None

    @property
    def bits(self) -> int:
        """Bits of the weight, 16 where it is float."""
        return 16 if self.weight is None else self.weight.bits

    @property
    def static(self) -> bool:
        """Whether the activation's scale is fixed at calibration."""
        return self.act is not None and self.act.per == "tensor"

    @property
    def ranged(self) -> bool:
        """Whether a range of the activation is needed from calibration."""
        return self.act is not None and self.act.per in ("tensor", "mix")

    @property
    def scope(self) -> str | None:
        """What shares one scale of the activation; None where it is float."""
        return None if self.act is None else self.act.per

    @property
    def spelling(self) -> str:
        """Its name on the command line: ``w8a8``, ``w4a16-g128``, ``float``."""
        if self.weight is None:
            return "float"
        act = f"{self.act.bits if self.act else 16}{SPELLED.get(self.scope or '', '')}"
        if self.static and self.act is not None and self.act.symmetric:
            act += "-symmetric"
        name = f"w{self.weight.bits}a{act}"
        name += f"-g{self.weight.group}" if self.weight.group else ""
        name += "-pt" if self.weight.per == "tensor" else ""
        return name if self.weight.symmetric else f"{name}-asym"

    def __str__(self) -> str:
        weight = f"W{self.weight.bits}" if self.weight else "W16"
        act = f"A{self.act.bits}" if self.act else "A16"
        group = f" g{self.weight.group}" if self.weight and self.weight.group else ""
        one = " weights per tensor" if self.weight and self.weight.per == "tensor" else ""
        one += "" if self.weight is None or self.weight.symmetric else " asymmetric"
        one += f" + {self.outliers:.2%} outliers" if self.outliers else ""
        return weight + act + SPELLED.get(self.scope or "", "").replace("-", " ") + group + one


FLOAT = LinearScheme()
W8A8 = LinearScheme(Int(8, "channel"), Int(8, "token"))
W8A8_STATIC = LinearScheme(Int(8, "channel"), Int(8, "tensor", symmetric=False))
W8A8_STATIC_SYMMETRIC = LinearScheme(Int(8, "channel"), Int(8, "tensor"))
W8A8_DYNAMIC_TENSOR = LinearScheme(Int(8, "channel"), Int(8, "dynamic-tensor"))
W8A8_MIX = LinearScheme(Int(8, "channel"), Int(8, "mix", symmetric=False))
W8A16 = LinearScheme(Int(8, "channel"))
W4A16 = LinearScheme(Int(4, "channel"))
W4A16_G64 = LinearScheme(Int(4, "group", group=64))
W4A8 = LinearScheme(Int(4, "channel"), Int(8, "token"))
W4A4 = LinearScheme(Int(4, "channel"), Int(4, "token"))


def matches(name: str, globs: Iterable[str]) -> bool:
    """Whether a module name equals or globs one of the patterns: ``*`` spans dots, braces expand."""
    for glob in globs:
        try:
            if name == glob or fnmatch.fnmatch(name, glob, flags=GLOB_FLAGS, limit=BRACE_LIMIT):
                return True
        except PatternLimitException:
            raise Refused(
                f"the glob {glob[:60]!r} stands for more than {BRACE_LIMIT} globs: write fewer"
            ) from None
    return False


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A scheme for the linears whose names match ``include``, not ``exclude``, and whose role is ``role``."""

    # what it matches
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    role: str | None = None
    """A role that patterns give to linears by dataflow: ``gated`` (writer of a gated product), ``expert``."""
    # what it does
    scheme: LinearScheme
    weight_method: str | None = None
    """How a pass that knows several makes its integers; None leaves it to the pass."""
    act_method: str | None = None
    """How the range of a static activation is found; None leaves it to the pass."""

    def applies(self, name: str, roles: Mapping[str, frozenset[str]]) -> bool:
        """Whether this rule takes the linear ``name``, given the linears that have each role."""
        if self.role is not None and name not in roles.get(self.role, frozenset()):
            return False
        return matches(name, self.include) and not matches(name, self.exclude)

    def __str__(self) -> str:
        """As a strategy is spelled on the command line: ``w4a4:*.up_proj|!*.0.*``."""
        globs = "|".join((*self.include, *(f"!{glob}" for glob in self.exclude)))
        named = self.scheme.spelling + (f" of {self.role}" if self.role else "")
        named += "".join(f"@{one}" for one in (self.weight_method, self.act_method) if one)
        return named if globs == "*" else f"{named}:{globs}"


@dataclass(frozen=True)
class Scheme:
    """A named, ordered list of rules. The first rule that matches a linear wins; none means float."""

    name: str
    rules: tuple[Rule, ...] = field(default_factory=tuple)

    def rule(self, name: str, roles: Mapping[str, frozenset[str]]) -> Rule | None:
        """The rule that takes the linear ``name``."""
        return next((rule for rule in self.rules if rule.applies(name, roles)), None)

    def of(self, name: str, roles: Mapping[str, frozenset[str]]) -> LinearScheme:
        """The formats of the linear ``name``."""
        rule = self.rule(name, roles)
        return FLOAT if rule is None else rule.scheme


AUTO = Scheme("auto", (Rule(role="expert", scheme=W8A8), Rule(role="gated", scheme=W4A4), Rule(scheme=W8A8)))
"""W4A4 on the writers of every gated product, W8A8 on the other linears and on experts."""
ALL_W8A8 = Scheme("w8a8", (Rule(scheme=W8A8),))
ALL_W8A8_STATIC = Scheme("w8a8-static", (Rule(scheme=W8A8_STATIC),))
ALL_W8A8_STATIC_SYMMETRIC = Scheme("w8a8-static-symmetric", (Rule(scheme=W8A8_STATIC_SYMMETRIC),))
ALL_W8A8_DYNAMIC_TENSOR = Scheme("w8a8-dynamic-tensor", (Rule(scheme=W8A8_DYNAMIC_TENSOR),))
ALL_W8A8_MIX = Scheme("w8a8-mix", (Rule(scheme=W8A8_MIX),))
ALL_W8A16 = Scheme("w8a16", (Rule(scheme=W8A16),))
ALL_W4A16 = Scheme("w4a16", (Rule(scheme=W4A16),))
ALL_W4A16_G64 = Scheme("w4a16-g64", (Rule(scheme=W4A16_G64),))
ALL_W4A8 = Scheme("w4a8", (Rule(scheme=W4A8),))
EXPERTS_W4A8 = Scheme("experts-w4a8", (Rule(role="expert", scheme=W4A8), Rule(scheme=W8A8)))
"""W4A8 on experts, W8A8 on the other linears: what servers load of four-bit mixtures."""
ALL_W4A4 = Scheme("w4a4", (Rule(scheme=W4A4),))
KEEP_FLOAT = Scheme("float")
