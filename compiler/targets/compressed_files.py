"""What transformers does with a directory in the layout of compressed-tensors: the library's own modules say it."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..capture_experts import stacks_of
from ..capture_sizes import model_on_meta
from ..expert_weights import Piece
from ..load_modules import renaming
from ..shards import STEMS, weights_file
from .stored import Stored, read_by_name, without_block
from .target import Finding
from .vllm_parameters import Parameter
from .vllm_tensors import fits

NAMES = (f"{STEMS[0]}.safetensors", f"{STEMS[0]}.safetensors.index.json")
"""Files by which transformers finds weights, where config.json names no other."""

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationConfig


def judged(directory: Path, trust_remote_code: bool) -> tuple[Finding, ...]:
    """Tensors that the modules of the library want and the files have not, or otherwise; see ``Target.judge``.

    transformers makes up what is missing, at random, and leaves out what it does not know, both with a warning that a
    caller may not see; a shape that differs stops it.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    files = read_by_name(directory)
    found = list(files.findings)
    weights = weights_file(directory)
    if weights is not None and weights.name not in (*NAMES, files.config.get("transformers_weights")):
        why = f"transformers looks for {' or '.join(NAMES)}"
        found.append(Finding("refuses", "C1", weights.name, why))
    block = files.config.get("quantization_config")
    if not isinstance(block, Mapping) or block.get("quant_method") != "compressed-tensors":
        return (*found, without_block(files, "C1", "compressed-tensors"))
    model = model_on_meta(directory, trust_remote_code)
    name_of = renaming(model)
    widths = {n: m.in_features for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    try:
        config = QuantizationConfig.model_validate(dict(block))
        with redirect_stderr(io.StringIO()):  # progress bars of the library
            apply_quantization_config(model, config, run_compressed=False)
            ModelCompressor(quantization_config=config).compress_model(model=model)
    except Exception as error:  # pydantic and the library raise what they like
        reason = " ".join(str(error).split())[:300]
        return (
            *found,
            Finding("refuses", "C1", "config.json", f"the library refuses its quantization_config: {reason}"),
        )
    wanted = {name: Parameter(t.dtype, tuple(t.shape)) for name, t in model.state_dict().items()}
    names = {disk: disk if disk in wanted else name_of(disk) for disk in files.entries}
    own, held = _of_experts(model, config, set(names.values()))
    wanted = {name: parameter for name, parameter in wanted.items() if name not in held} | own
    ties = _ties(model)
    for disk, entry in files.entries.items():
        name = names[disk]
        if name in ties:
            continue
        if name in wanted:
            found += [_renamed(one) for one in fits(files, disk, entry, wanted[name])]
        elif name.removesuffix("weight") + "weight_packed" in own:
            why = "it is of an expert, and transformers loads those from packed integers alone, in one scheme"
            found.append(Finding("refuses", "C5", disk, why))
        else:
            found.append(
                Finding("ruins", "C2", disk, "the model has no such tensor: transformers leaves it out")
            )
    for name in sorted(wanted.keys() - set(names.values()) - ties):
        found.append(Finding("ruins", "C3", name, "it is in no file: transformers makes it up at random"))
    return (*found, *_values(files, names, widths))


def _values(files: Stored, names: Mapping[str, str], widths: Mapping[str, int]) -> Iterator[Finding]:
    """Scales that are no positive numbers, and packed weights of which too few channels are said to be there."""
    for disk, entry in files.entries.items():
        width = widths.get(names[disk].removesuffix(".weight_shape"), 0)
        if names[disk].endswith(".weight_shape") and entry.shape == (2,) and files.read(disk)[1] < width:
            why = f"it says {files.read(disk).tolist()}, and the linear has {width} input channels"
            yield Finding("refuses", "C4", disk, why)
        elif disk.endswith((".weight_scale", ".input_scale")) and entry.dtype.is_floating_point:
            scales = files.read(disk).float()
            bad = int((~(scales > 0) | ~torch.isfinite(scales)).sum())
            if bad:
                why = f"{bad} of {scales.numel()} scales are no positive numbers"
                yield Finding("ruins", "C6", disk, why)


def _of_experts(
    model: nn.Module, config: QuantizationConfig, names: set[str]
) -> tuple[dict[str, Parameter], set[str]]:
    """What the linears of experts have on disk where each has its own, and the stacks that they become in the model.

    transformers makes them floats when it loads them, by the scheme of the first group whose pattern names experts, or
    of the first that names no pattern.
    """
    own: dict[str, Parameter] = {}
    held: set[str] = set()
    groups = list(config.config_groups.values())
    meant = [g for g in groups if any(t.startswith("re:") and "experts" in t for t in g.targets)]
    plain = [g for g in groups if any(not t.startswith("re:") for t in g.targets)]
    scheme = next(iter([*meant, *plain, *groups]), None)
    weights = scheme.weights if scheme is not None else None
    if weights is None:
        return own, held
    for prefix, module in model.named_modules():
        for stack in stacks_of(module):
            whole = f"{prefix}.{stack.name}"
            if stack.leaf != "weight" or whole in names:
                continue
            held.add(whole)
            for expert, (place, linear) in product(range(stack.experts), enumerate(stack.linears)):
                out, width = Piece(whole, stack, expert, place).shape
                leaves = {
                    "packed": (torch.int32, (out, -(-width * weights.num_bits // 32))),
                    "scale": (
                        module.get_parameter(stack.name).dtype,
                        (out, width // (weights.group_size or width)),
                    ),
                    "shape": (torch.int64, (2,)),
                }
                for leaf, spec in leaves.items():
                    own[f"{prefix}.{expert}.{linear}.weight_{leaf}"] = Parameter(*spec)
    return own, held


def _ties(model: object) -> set[str]:
    """Names of tensors that are others."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)  # pyright: ignore[reportAttributeAccessIssue]
    return {name for name, one in named if first.setdefault(id(one), name) != name}


def _renamed(finding: Finding) -> Finding:
    """A finding of a server's rule, told of transformers."""
    message = finding.message.replace("the server has", "the model has")
    return Finding(finding.outcome, "C4", finding.tensor, message)
