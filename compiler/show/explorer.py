"""A program as JSON that Model Explorer opens: https://github.com/google-ai-edge/model-explorer (graph_builder.py)."""

from __future__ import annotations

import json
from typing import Any

from ..program import Part, Program
from .networks import to_networkx
from .palette import FILLS, fill_of

SHOWN = ("row", "op", "target", "type", "format", "edits", "note")
"""Attributes of a node that the side panel of Model Explorer lists."""


def explorer(program: Program, part: Part | None = None) -> str:
    """A graph collection of one graph, whose groups are the modules: all of a program, or one part of it."""
    graph = to_networkx(program)
    inside = [n for n, held in graph.nodes.items() if part is None or held["part"] == part.name]
    kept = set(inside)
    nodes: list[dict[str, Any]] = []
    for name in inside:
        held = graph.nodes[name]
        holder = held["target"].rpartition(".")[0] or held["part"]
        kind = "inserted" if held["inserted"] else held["op"]
        fill = FILLS[fill_of(kind, held["bits"])]
        nodes.append(
            {
                "id": name,
                "label": held["target"].rpartition(".")[2] or held["op"],
                "namespace": holder.replace(".", "/"),
                "attrs": [{"key": key, "value": held[key]} for key in SHOWN if held[key]],
                "incomingEdges": [
                    {"sourceNodeId": source, "sourceNodeOutputId": "0", "targetNodeInputId": place}
                    for source, _, edge in graph.in_edges(name, data=True)
                    if source in kept
                    for place in edge["operands"].split(",")
                ],
                "outputsMetadata": [{"id": "0", "attrs": [{"key": "tensor_shape", "value": held["type"]}]}],
                "style": {"backgroundColor": fill.area.light, "borderColor": fill.edge.light},
            }
        )
    title = graph.graph["title"] if part is None else part.name
    return json.dumps({"label": title, "graphs": [{"id": title, "nodes": nodes}]}, indent=1) + "\n"
