"""What transformers does with a directory in the layout of compressed-tensors: the library's own modules say it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stderr
from pathlib import Path

from ..capture_sizes import model_on_meta
from ..shards import find_shards
from .stored import stored
from .target import Finding
from .vllm_parameters import Parameter
from .vllm_tensors import fits


def judged(directory: Path, trust_remote_code: bool) -> tuple[Finding, ...]:
    """Tensors that the modules of the library want and the files have not, or otherwise; see ``Target.judge``.

    transformers makes up what is missing, at random, and leaves out what it does not know, both with a warning that a
    caller may not see; a shape that differs stops it.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    files = stored(directory)
    found = list(files.findings)
    block = files.config.get("quantization_config")
    if not isinstance(block, Mapping) or block.get("quant_method") != "compressed-tensors":
        why = "it has no quantization_config of compressed-tensors: transformers takes the model for float"
        return (*found, Finding("refuses", "C1", "config.json", why))
    model = model_on_meta(directory, trust_remote_code)
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
    find_shards(directory)  # transformers reads by the same names
    wanted = {name: (t.dtype, tuple(t.shape)) for name, t in model.state_dict().items()}
    ties = _ties(model)
    for name, entry in files.entries.items():
        if name in ties:
            continue
        if name not in wanted:
            found.append(
                Finding("ruins", "C2", name, "the model has no such tensor: transformers leaves it out")
            )
        else:
            found += [_renamed(one) for one in fits(files, name, entry, Parameter(*wanted[name]))]
    for name in wanted:
        if name not in files.entries and name not in ties and not name.endswith("_zero_point"):
            found.append(Finding("ruins", "C3", name, "it is in no file: transformers makes it up at random"))
    return tuple(found)


def _ties(model: object) -> set[str]:
    """Names of tensors that are others."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)  # pyright: ignore[reportAttributeAccessIssue]
    return {name for name, one in named if first.setdefault(id(one), name) != name}


def _renamed(finding: Finding) -> Finding:
    """A finding of a server's rule, told of transformers."""
    message = finding.message.replace("the server has", "the model has")
    return Finding(finding.outcome, "C4", finding.tensor, message)
