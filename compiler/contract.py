"""Pass: what an algorithm declares about itself, and the two things it does (rewrite, and solve its unknowns)."""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from .edit import Edit
from .operand import Hadamard, Slot, Statistic
from .pattern import Pattern
from .program import Program
from .scheme import Rule

if TYPE_CHECKING:
    from .scheme import LinearScheme
    from .view import BlockView


class Claim(Enum):
    """What a pass promises about the function of the model."""

    EXACT = "equal in real arithmetic; proved in float64 at every site"
    LOSSY = "changed; the error of every site is measured"


EXACT = Claim.EXACT
"""The function stays equal in real arithmetic; proved in float64 at every site."""
LOSSY = Claim.LOSSY
"""The function changes; the error of every site is measured."""


class Fact(Enum):
    """What is established about a program, and may be required by later passes."""

    NORMS_FUSED = "norm gains are one: they live in the linears that read them"
    RESIDUAL_ROTATED = "the residual stream is rotated"
    HEADS_ROTATED = "values are rotated within each head"
    ONLINE_ROTATED = "some linears read their input through an online rotation"
    SMOOTHED = "outliers were moved from activations into weights"
    PRUNED = "weights of some linears are sparse"
    BRANCHED = "some linears have a low-rank branch beside them"
    QUANTIZED = "linears are quantized"


@dataclass(frozen=True)
class Basis:
    """A rotation of values that cross from part to part: ``x`` becomes ``x Q`` for the values of these names."""

    rotation: Hadamard
    values: frozenset[str]


@dataclass(frozen=True)
class Rewrite:
    """One answer of a pass to one match: edits that are applied together and proved together."""

    pass_name: str
    pattern: str
    where: str
    """The site that names it in messages, e.g. the norm of a norm-linear."""
    edits: tuple[Edit, ...]
    claim: Claim
    basis: Basis | None = None
    """For a rotation of the residual stream: the map of the values between parts."""

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Its unknowns, each once, in order."""
        return tuple(dict.fromkeys(slot for edit in self.edits for slot in edit.slots))

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules it edits, each once, in order."""
        return tuple(dict.fromkeys(edit.site.module for edit in self.edits))


@dataclass(frozen=True)
class Answer:
    """What a pass found: its rewrites, and what a reader of the plan should know."""

    rewrites: tuple[Rewrite, ...]
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    """Why the pass can not do what it was asked, each with the place and what to change."""


@dataclass(frozen=True)
class Setting:
    """What a pass may know besides the program: the parts of the plan that are not its own options."""

    scheme: Any
    roles: Mapping[str, frozenset[str]]
    before: tuple[str, ...] = ()
    """Names of the passes that come before, in order."""
    after: tuple[str, ...] = ()
    tp: int = 1
    seed: int = 0
    dtype: Any = None
    """The dtype in which floats are exported."""
    row_parallel: frozenset[str] = frozenset()
    """Linears whose input a tensor-parallel server splits."""


@dataclass(frozen=True)
class LinearSize:
    """Sizes of one linear, and the scheme that the plan gives it."""

    name: str
    out: int
    width: int
    """Input channels."""
    scheme: LinearScheme | None


@dataclass(frozen=True)
class BlockSize:
    """What a pass may know of a block to say how much memory it needs there."""

    linears: tuple[LinearSize, ...]
    """In graph order."""
    tokens: int
    """Of a microbatch."""
    itemsize: int
    """Bytes of an activation."""
    hidden: int
    """Width of the residual stream."""
    calibration: int = 0
    """Tokens of all microbatches."""
    recompute: bool = False
    """Whether a training makes the weights on their grids again in its backward pass (``BlockView.recompute``)."""

    @property
    def walked(self) -> int:
        """Bytes that a walk keeps between two linears: the residual stream and what is read next, of all tokens."""
        widest = max((one.width for one in self.linears), default=0)
        return self.itemsize * self.calibration * (self.hidden + widest)

    @property
    def activations(self) -> int:
        """Channels per token that live at once while a block runs without gradients."""
        return 4 * max((max(one.out, one.width) for one in self.linears), default=0) + 8 * self.hidden


DECLARATIONS = ("name", "summary", "patterns", "requires", "provides", "breaks", "before", "after", "claim")


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """An algorithm: a frozen value whose fields are its options.

    Every declaration below is required of a concrete pass; an empty set is a statement.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line: what it does and why."""
    patterns: ClassVar[tuple[Pattern[Any], ...]]
    requires: ClassVar[frozenset[Fact]]
    provides: ClassVar[frozenset[Fact]]
    breaks: ClassVar[frozenset[Fact]]
    before: ClassVar[Mapping[Pattern[Any], Mapping[str, str]]]
    """Per pattern: passes that must not stand earlier in the plan, and why."""
    after: ClassVar[Mapping[Pattern[Any], Mapping[str, str]]]
    """Per pattern: passes that must not stand later in the plan, and why."""
    claim: ClassVar[Claim]
    weight_methods: ClassVar[tuple[str, ...]] = ()
    """The recipe's names of the methods by which it makes integers of weights; a ``qconfig`` must ask for one."""
    act_methods: ClassVar[tuple[str, ...]] = ("minmax",)
    """Those by which it finds the range of a static activation."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if ABC not in cls.__bases__ and (wrong := undeclared(cls)):
            raise TypeError("; ".join(wrong))

    def takes(self, setting: Setting) -> tuple[Pattern[Any], ...]:
        """The patterns that this instance will ask for, standing where it stands."""
        return self.patterns

    def named(self, program: Program, setting: Setting) -> Iterable[str]:
        """The modules among which its globs choose."""
        return program.leaves

    @abstractmethod
    def rewrite(self, program: Program, setting: Setting) -> Answer:
        """Answer the program's matches with edits. Nothing is changed here and no weight is read."""

    def solve(self, rewrite: Rewrite, view: BlockView) -> Mapping[Slot, Any]:
        """Fill the slots of one rewrite; called when the block's weights and statistics are there."""
        if rewrite.slots:
            raise TypeError(f"pass {self.name} has unknowns but no solve")
        return {}

    def surveys(self, rewrite: Rewrite) -> tuple[Statistic, ...]:
        """What ``survey`` wants to see of the float model, in a run of its own before anything is solved."""
        return ()

    def survey(self, rewrite: Rewrite, view: BlockView) -> None:
        """Look at one part of the float model, as it is before all passes; called part by part."""
        raise TypeError(f"pass {self.name} asks for a survey and does not look at it")

    def learn(self, rewrite: Rewrite) -> Mapping[str, float]:
        """Conclude from all parts, and say what came of it: numbers by name, for the journal."""
        return {}

    def working_bytes(self, block: BlockSize) -> int:
        """Bytes that ``solve`` holds at its peak in a block, beside the float32 weights; for the plan's estimate."""
        return 0

    @property
    def needs_training(self) -> bool:
        """Whether ``solve`` runs the block with gradients, on its own inputs and targets."""
        return False

    @property
    def needs_target(self) -> bool:
        """Whether ``solve`` compares with what the float block computes."""
        return self.needs_training

    @property
    def propagates_quantized(self) -> bool:
        """Whether later blocks shall see the outputs of the quantized block instead of the float one."""
        return False

    def options(self) -> dict[str, Any]:
        """Option names and values, as the plan prints them; rules are spelled."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            name: tuple(str(one) if isinstance(one, Rule) else one for one in value)
            if isinstance(value, tuple)
            else str(value)
            if isinstance(value, Rule)
            else value
            for name, value in values.items()
        }

    def __str__(self) -> str:
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        set_options = {k: v for k, v in self.options().items() if v != defaults.get(k)}
        inside = ", ".join(f"{key}={spell(value)}" for key, value in set_options.items())
        return f"{self.name}{{{inside}}}" if inside else self.name


def undeclared(cls: type[Pass]) -> list[str]:
    """What is missing or wrong among the declarations of a class; empty where the contract is complete."""
    missing = [name for name in DECLARATIONS if not hasattr(cls, name)]
    if missing:
        return [
            f"pass {cls.__name__} does not declare {', '.join(missing)}: every declaration is required, and an"
            " empty one is a statement (requires = frozenset(), before = {})"
        ]
    wrong = [f"{one} is no text" for one in ("name", "summary") if not isinstance(getattr(cls, one), str)]
    patterns = cls.patterns if isinstance(cls.patterns, tuple) else (None,)
    if not all(isinstance(one, Pattern) for one in patterns):
        wrong.append("patterns is no tuple of patterns")
    for one in ("requires", "provides", "breaks"):
        facts = getattr(cls, one)
        if not (isinstance(facts, frozenset) and all(isinstance(fact, Fact) for fact in facts)):
            wrong.append(f"{one} is no frozenset of qc.Fact")
    for one in ("before", "after"):
        order = getattr(cls, one)
        if not (isinstance(order, Mapping) and all(_reasons(p, why) for p, why in order.items())):
            wrong.append(f"{one} does not map patterns to {{pass: reason}}")
    if not isinstance(cls.claim, Claim):
        wrong.append("claim is neither qc.EXACT nor qc.LOSSY")
    return [f"pass {cls.__name__}: {one}" for one in wrong]


def _reasons(pattern: Any, why: Any) -> bool:
    return isinstance(pattern, Pattern) and isinstance(why, Mapping) and all(map(str, why.values()))


def faults(cls: type[Pass]) -> list[str]:
    """Everything that keeps a class from being a pass, declarations included; empty where there is nothing."""
    wrong = undeclared(cls)
    abstract = sorted(getattr(cls, "__abstractmethods__", ()))
    if abstract:
        wrong.append(f"pass {cls.__name__} does not define {', '.join(abstract)}")
    own = [name for name, kind in inspect.get_annotations(cls).items() if "ClassVar" not in str(kind)]
    if own and "__dataclass_fields__" not in cls.__dict__:
        wrong.append(
            f"pass {cls.__name__} has options ({', '.join(own)}) but is no dataclass: put"
            " @dataclass(frozen=True, kw_only=True) above it"
        )
    elif bare := [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory]:
        wrong.append(f"pass {cls.__name__}: {', '.join(bare)} has no default: every option needs one")
    return wrong


def spell(value: Any) -> str:
    """An option value as the command line takes it: lists joined by ``+``, lower-case booleans."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Iterable) and not isinstance(value, str):
        return "+".join(spell(item) for item in value)
    return str(value)
