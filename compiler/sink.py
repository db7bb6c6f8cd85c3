"""Where finished tensors go: under the names that they have on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..runtime.divided import INNER, LEAF, owner_of
from .export import RunAsOne
from .plan import Plan
from .safetensors_io import ShardWriter
from .targets.served import sites_of
from .weights import Checkpoint


def sink_for(planned: Plan, layout: Any, writer: ShardWriter) -> Callable[[str, Tensor], None]:
    """Where finished tensors go: under their names on disk."""
    source = planned.program.source
    shards = RunAsOne(planned.target.run_as_one(sites_of(planned)))

    def sink(name: str, tensor: Tensor) -> None:
        module, leaf = owner_of(name)
        if leaf == LEAF:
            writer.write(layout.prefixes[module].removesuffix(INNER) + LEAF, tensor)
        elif module in layout.prefixes:
            shards.check(module, leaf, tensor)
            writer.write(f"{layout.prefixes[module]}.{leaf}", tensor)
        elif isinstance(source, Checkpoint):
            for disk, piece in source.to_disk({name: tensor}).items():
                writer.write(disk, piece)
        else:
            writer.write(name, tensor)

    return sink
