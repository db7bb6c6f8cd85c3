"""Target: who will load the result, and what that allows. Rules see plain data, before any weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from ...runtime.linear import IntegerLinear
from ..errors import Refused
from ..safetensors_io import TensorSpec
from ..scheme import LinearScheme
from .served import LinearSite, ModelFacts, facts_of, parameters_of, sites_of

if TYPE_CHECKING:
    from ..plan import Plan


@dataclass(frozen=True)
class Problem:
    """Why a target cannot serve a plan: what, where, and what to change."""

    rule: str
    site: str
    message: str
    fix: str
    severity: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        return f"{self.site}: {self.message}; {self.fix}"


Outcome = Literal["refuses", "ruins", "warns"]
"""What a consumer does: stops with an error; goes on and computes something else; goes on, with a reservation."""


@dataclass(frozen=True)
class Finding:
    """One thing about a directory that its consumer does not take as it was meant."""

    outcome: Outcome
    rule: str
    tensor: str
    """Name on disk of the tensor, or of the module or file."""
    message: str
    """What it is, and what the consumer does about it."""

    def __str__(self) -> str:
        return f"{self.outcome:8}{self.rule:5}{self.tensor}: {self.message}"


@dataclass(frozen=True)
class Layout:
    """Every tensor of an export, known before any weight is read."""

    specs: Mapping[str, TensorSpec]
    """Name on disk to dtype and shape, in the order of writing."""
    types: Mapping[str, str]
    """Name on disk to the type string of the layout."""
    prefixes: Mapping[str, str]
    """Quantized linear to the name in front of its tensors: a tensor is written as ``<prefix>.<leaf>``."""
    group_size: int = 0
    """Input channels per scale, where there are groups."""
    stubs: Mapping[str, str] = field(default_factory=dict)
    """Stored tensors of attention grids: own name to name on disk."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of the description."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The description's ``metadata``."""
    optional: Mapping[str, Any] = field(default_factory=dict)
    """The description's ``optional``: files that stand in a folder of that name."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.specs.values())


class DiskNames(Protocol):
    """From names of parameters to names on disk, for an export (``Checkpoint`` is one)."""

    def disk_name(self, name: str) -> str:
        """The name under which a tensor is written, whether or not it is in the input."""
        ...

    def disk_tensors(self, name: str, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The tensors that a float parameter becomes: itself, or the experts of a stack."""
        ...

    def separable(self, name: str) -> bool:
        """Whether other tensors can be written in the place of a parameter, and of nothing else."""
        ...


class SameNames:
    """The names of a model that comes from no checkpoint: those of its parameters."""

    def disk_name(self, name: str) -> str:
        """The name itself."""
        return name

    def disk_tensors(self, name: str, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The tensor itself."""
        return {name: spec}

    def separable(self, name: str) -> bool:
        """Every tensor has its own place."""
        return True


@dataclass(frozen=True)
class Target(ABC):
    """A consumer of checkpoints: formats, rules and files. A frozen value without state."""

    name: ClassVar[str]
    summary: ClassVar[str]

    @property
    def spelling(self) -> str:
        """What ``--target`` takes for it."""
        return self.name

    def variant(self, version: str | None, device: str | None) -> Target:
        """The same for another version or device; Refused where there is one alone."""
        what = f"=={version}" if version is not None else f"[{device}]"
        raise Refused(
            f"target {self.name}{what}: {self.name} has no versions and no devices; write {self.name}"
        )

    @abstractmethod
    def format_of(self, scheme: LinearScheme, rotated: bool) -> type[IntegerLinear] | None:
        """The format in which it loads a linear of a scheme; None where there is none, and for float."""

    @abstractmethod
    def check(self, sites: Sequence[LinearSite], model: ModelFacts) -> tuple[Problem, ...]:
        """Everything that keeps it from serving these linears, all at once."""

    @abstractmethod
    def tp_sizes(self, sites: Sequence[LinearSite], model: ModelFacts) -> tuple[int, ...]:
        """The numbers of tensor-parallel ranks for which the result loads; empty where nobody says."""

    @abstractmethod
    def layout(
        self,
        parameters: Mapping[str, TensorSpec],
        sites: Sequence[LinearSite],
        model: ModelFacts,
        names: DiskNames,
    ) -> Layout:
        """The tensors of the export.

        Args:
            parameters: Float parameters of the rewritten model by parameter name, in the order of writing,
                with the dtype in which they are exported; added biases and untied weights are there, tied
                ones not.
            sites: The linears; of those that are quantized the format's tensors replace the parameters.
            model: Facts of the model.
            names: Where the names on disk come from.

        Raises:
            Refused: A quantized linear has no tensor of its own on disk.
        """

    def run_as_one(self, sites: Sequence[LinearSite]) -> Mapping[str, str]:
        """Linears that the consumer runs as one with others, each with the first of them.

        Of tensors without an axis of outputs it keeps one for all: they must be equal in the export.
        """
        return {}

    @abstractmethod
    def files(self, layout: Layout) -> Mapping[str, Mapping[str, Any]]:
        """JSON files that stand beside the weights, by file name."""

    def stem(self, layout: Layout) -> str:
        """How the files of weights begin."""
        return "quant_model_weights"

    def config(self, config: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
        """``config.json`` of the export, from that of a float model."""
        return dict(config)

    def finish(self, directory: Path, layout: Layout) -> None:
        """Turn the safetensors that were written, and checked, into the files of the target, where it has others."""
        return

    def judge(
        self, directory: Path, *, tp: int = 1, deep: bool = True, trust_remote_code: bool = False
    ) -> tuple[Finding, ...] | None:
        """What the consumer does with a directory of checkpoint files, ours or another tool's; None where nobody says.

        Args:
            directory: The directory; nothing is changed there.
            tp: Tensor-parallel ranks of the server.
            deep: Read the integers of weights too, and not only what stands beside them.
            trust_remote_code: Whether Python code in the directory may say what the model looks like.

        Raises:
            Refused: It is no checkpoint, or one that cannot be read.
        """
        return None

    def add(self, directory: Path) -> None:
        """Write further files that are made from the whole checkpoint, when all else but the manifest is there."""
        return

    def problems(self, plan: Plan) -> tuple[str, ...]:
        """The errors of ``check`` for a plan; what is wrong alike at many sites is told once."""
        return told(p for p in self.check(sites_of(plan), facts_of(plan)) if p.severity == "error")

    def notes(self, plan: Plan) -> tuple[str, ...]:
        """The warnings of ``check``."""
        return told(p for p in self.check(sites_of(plan), facts_of(plan)) if p.severity == "warning")

    def tp_sizes_of(self, plan: Plan) -> tuple[int, ...]:
        """``tp_sizes`` of what a plan makes."""
        return self.tp_sizes(sites_of(plan), facts_of(plan))

    def layout_of(self, plan: Plan) -> Layout:
        """The tensors of the export of a plan; names on disk are those of its checkpoint, if it has one."""
        source: Any = plan.program.source
        names: DiskNames = source if hasattr(source, "disk_tensors") else SameNames()
        return self.layout(parameters_of(plan), sites_of(plan), facts_of(plan), names)


def told(problems: Iterable[Problem]) -> tuple[str, ...]:
    """One line per kind of problem, with the first site and the number of others alike."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for problem in problems:
        alike.setdefault((problem.rule, problem.message, problem.fix), []).append(problem.site)
    return tuple(
        f"{sites[0]}{f' and {len(sites) - 1} more alike' if sites[1:] else ''}: {message}; {fix}"
        for (_, message, fix), sites in alike.items()
    )
