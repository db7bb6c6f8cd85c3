"""A plan as a recipe file: what ``qc plan --yaml`` prints, and ``--config`` reads back to the same plan."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from .contract import Fact, Pass
from .edit import Verb
from .operand import Quantize
from .plan import Plan, Step
from .scheme import Int, LinearScheme, Rule

SCOPES: Mapping[str, str] = {
    "channel": "per_channel", "group": "per_group", "token": "per_token", "tensor": "per_tensor", "mix": "pd_mix",
    "dynamic-tensor": "per_tensor_dynamic",
}  # fmt: skip
SAVERS = {
    "modelslim": "ascendv1_saver",
    "mindie": "mindie_format_saver",
    "compressed-tensors": "compressed_tensors",
}
"""Targets that a recipe can ask for, and the savers that mean them."""
ALIASES = {"autoround": "autoround_quant"}
"""Names that the reference tool knows."""
GRID = {"dtype": "int8", "symmetric": True, "method": "minmax"}


def recipe_yaml(plan: Plan) -> str:
    """The plan in the recipe language ``modelslim_v1``, formats written out linear by linear.

    Passes and options that only qc knows are there under qc's names; what no recipe can say (``--tp``, ``--seed``, a
    target other than modelslim) is told in comments. Every option is written: the reference tool has other defaults.
    """
    process = [item for step in plan.steps for item in _items(step)]
    spec: dict[str, Any] = {
        "process": _with_quarot(process),
        "save": [{"type": SAVERS.get(plan.target.name, "ascendv1_saver"), "part_file_size": 4}],
    }
    calib = plan.run.calib if plan.run is not None else ()
    if len(calib) == 1:
        spec["dataset"] = calib[0]
    told = [f"qc plan --yaml: {type(plan.program.root).__name__}, {len(plan.program.blocks)} blocks"]
    if plan.target.name not in SAVERS:
        told.append(
            f"the saver means --target modelslim; this plan was made with --target {plan.target.spelling}"
        )
    told += [f"--calib {' '.join(calib)}"] if len(calib) > 1 else []
    if plan.run is not None and plan.needs_data:
        told.append(f"--samples {plan.run.samples} --length {plan.run.length}")
    told += [f"--tp {plan.tp}"] if plan.tp != 1 else []
    told += [f"--seed {plan.seed}"] if plan.seed else []
    text = yaml.dump(
        {"apiversion": "modelslim_v1", "spec": spec}, Dumper=_Dumper, sort_keys=False, width=1000
    )
    return "".join(f"# {line}\n" for line in told) + text


class _Dumper(yaml.SafeDumper):
    """Writes every mapping out where it stands, and short lists on one line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _flow(dumper: yaml.SafeDumper, data: Any) -> yaml.Node:
    """Lists of plain values and the two sides of a ``qconfig`` on one line."""
    if isinstance(data, list):
        plain = all(not isinstance(one, list | dict) for one in data)
        return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=plain)
    return dumper.represent_mapping("tag:yaml.org,2002:map", data, flow_style="dtype" in data)


_Dumper.add_representer(list, _flow)
_Dumper.add_representer(dict, _flow)


def _items(step: Step) -> list[dict[str, Any]]:
    """One pass as items of ``process``."""
    what = step.what
    item: dict[str, Any] = {"type": ALIASES.get(what.name, what.name)}
    for name, value in _options(step).items():
        item[name] = _value(name, value, what)
    if (
        what.name == "flatquant"
    ):  # takes what the scheme of the plan gives four bits, and a recipe has no scheme
        made = _made(step, Verb.WRAP)
        item |= {"include": globs(made, _linears(step))} if made else {}
        item.pop("exclude", None)
    if what.name == "dynamic_cache":
        item["qconfig"] = {**GRID, "scope": "per_channel", "symmetric": item.pop("symmetric", True)}
    if what.name == "fa3_quant":
        scopes = {name: getattr(what, name) for name in ("fa_q", "fa_k", "fa_v")}
        for name in scopes:
            item.pop(name, None)
        item["details"] = {
            name: {**GRID, "scope": scope} for name, scope in scopes.items() if scope != "float"
        }
    if Fact.QUANTIZED in what.provides and hasattr(what, "strategies"):
        for name in ("weight_method", "act_method", "strategies", "include", "exclude"):
            item.pop(name, None)
        item["strategies"] = _strategies(step)
    return [item]


def _options(step: Step) -> dict[str, Any]:
    """All options that have a value; subgraph types that were left open are those that the plan takes here."""
    found = {name: getattr(step.what, name) for name in step.what.options()}
    if "enable_subgraph_type" in found and not found["enable_subgraph_type"]:
        found["enable_subgraph_type"] = tuple(dict.fromkeys(one.pattern for one in step.answer.rewrites))
    return {name: value for name, value in found.items() if value is not None and value != ()}


def _value(name: str, value: Any, what: Pass) -> Any:
    if isinstance(value, Rule):
        weight, act = what.weight_methods, what.act_methods
        if name == "weight_qconfig":
            assert value.scheme.weight is not None
            return _side(value.scheme.weight, value.weight_method or weight[0])
        return _qconfig(value.scheme, value.weight_method or weight[0], value.act_method or act[0])
    return list(value) if isinstance(value, tuple) else value


def _strategies(step: Step) -> list[dict[str, Any]]:
    """Formats of the linears that a pass takes, with globs that choose exactly them among those that are left."""
    taken: dict[str, Quantize] = _made(step, Verb.SWAP)
    left = _linears(step)
    groups: dict[tuple[LinearScheme, str, str], list[str]] = {}
    default = step.what.weight_methods[0]
    for name, operand in taken.items():
        method = operand.weight_method if operand.weight_method in step.what.weight_methods else default
        groups.setdefault((operand.scheme, method, operand.act_method), []).append(name)
    return [
        {"qconfig": _qconfig(scheme, weight, act), "include": globs(names, left)}
        for (scheme, weight, act), names in groups.items()
    ]


def _made(step: Step, verb: Verb) -> dict[str, Any]:
    """What a pass makes of linears with one verb, by name."""
    edits = (edit for rewrite in step.answer.rewrites for edit in rewrite.edits)
    return {edit.site.module: edit.operand for edit in edits if edit.verb is verb}


def _linears(step: Step) -> set[str]:
    leaves = ((str(node.target), step.program.leaf(node)) for node in step.program.graph.nodes)
    return {name for name, leaf in leaves if leaf is not None and leaf.kind == "linear"}


def globs(names: Iterable[str], among: Iterable[str]) -> list[str]:
    """Globs that match these names and no other of ``among``: layer numbers become ``*``, or the list of them."""
    names, among = list(names), set(among)
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name, count=1), []).append(name)
    found: list[str] = []
    for glob, members in alike.items():
        same = {one for one in among if re.sub(r"(?<=\.)\d+(?=\.)", "*", one, count=1) == glob}
        if "*" not in glob or len(members) == 1:
            found += members
        elif same == set(members):
            found.append(glob)
        else:
            head, _, tail = glob.partition("*")
            numbers = ",".join(one[len(head) :].partition(".")[0] for one in members)
            found.append(f"{head}{{{numbers}}}{tail}")
    return found


def _qconfig(scheme: LinearScheme, weight_method: str, act_method: str) -> dict[str, Any]:
    assert scheme.weight is not None
    found = {"weight": _side(scheme.weight, weight_method)}
    if scheme.act is not None:
        found["act"] = _side(scheme.act, act_method if scheme.ranged else "minmax")
    return found


def _side(format: Int, method: str) -> dict[str, Any]:
    found = {
        "scope": SCOPES[format.per], "dtype": f"int{format.bits}", "symmetric": format.symmetric, "method": method,
    }  # fmt: skip
    return {**found, "ext": {"group_size": format.group}} if format.group else found


QUAROT = ("fuse_norms", "rotate_residual", "rotate_heads")


def _with_quarot(process: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The three passes of ``quarot``, with ``quarot_online`` behind them, under its name."""
    found: list[dict[str, Any]] = []
    at = 0
    while at < len(process):
        three = process[at : at + 3]
        names = tuple(one["type"] for one in three)
        sizes = [one.get("block_size", -1) for one in three[1:]]
        if names != QUAROT or len(set(sizes)) != 1:
            found.append(process[at])
            at += 1
            continue
        item: dict[str, Any] = {"type": "quarot"}
        at += 3
        online = process[at] if at < len(process) and process[at]["type"] == "quarot_online" else None
        if online is not None:
            item |= {"online": True, **{key: value for key, value in online.items() if key != "type"}}
            at += 1
        item |= {"block_size": sizes[0]} if sizes[0] != -1 else {}
        item |= {"export_extra_info": False} if three[1].get("export_extra_info") is False else {}
        found.append(item)
    return found
