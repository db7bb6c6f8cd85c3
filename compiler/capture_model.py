"""Build the model to be captured on the meta device, from a checkpoint, a config or a module in memory."""

from __future__ import annotations

import copy
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from .capture_attention import NAME
from .capture_class import build, is_causal
from .capture_experts import use_experts
from .capture_lists import registered
from .compressed_library import NAME as COMPRESSED_TENSORS
from .description import METHOD, block_by
from .errors import Refused

HALF = (torch.bfloat16, torch.float16)
LOADED = (METHOD, COMPRESSED_TENSORS)
"""Every ``quant_method`` that ``load`` knows."""


@dataclass(frozen=True)
class Subject:
    """What is to be captured: a config to build from, or a module that is there already."""

    config: Any
    module: nn.Module | None
    path: Path | None
    dtype: torch.dtype
    """The dtype of capture: that of the weights, or bfloat16 where they are float32, so that a cast that the
    model makes to float32 can be told from one that it makes to its own dtype."""
    trust_remote_code: bool = False
    stored: torch.dtype | None = None
    """The dtype of the weights where a config says so and it is not the dtype of capture."""

    def on_meta(self, attention: str | None, experts: str | None = NAME) -> nn.Module:
        """The model on meta in evaluation mode, with the implementations of attention and experts asked for."""
        if self.module is not None:
            model = _copy_on_meta(self.module, self.dtype)
            if isinstance(model, PreTrainedModel) and attention is not None:
                model.set_attn_implementation(attention)
                if model.config._attn_implementation != attention:
                    raise ValueError(f"the model keeps its own attention instead of {attention}")
        else:
            model = self._built_on_meta(attention)
        if experts is not None:
            use_experts(model, experts)
        return model.eval()

    def _built_on_meta(self, attention: str | None) -> Any:
        """A new model. Refused where transformers makes none of config.json, and no ``attention`` can be why."""
        try:
            with torch.device("meta"):
                return build(
                    self.config, self.dtype, attention=attention, trust_remote_code=self.trust_remote_code
                )
        except Exception as error:  # the model's own code raises what it likes
            if self.path is None or attention is not None:
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise Refused(
                f"{self.path / 'config.json'} describes a model that transformers cannot make ({reason}); copy that of"
                " the float model there"
            ) from error


def _copy_on_meta(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a module whose parameters and buffers are on meta; no weight is copied. Ties stay ties."""
    main, kept_ones = weight_dtype(module), kept_dtypes(module)
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        kept = kept_ones.get(id(parameter)) or (dtype if parameter.dtype == main else parameter.dtype)
        memo[id(parameter)] = nn.Parameter(
            torch.empty(parameter.shape, dtype=kept, device="meta"),
            requires_grad=parameter.requires_grad,
        )
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, memo)


KEPT = "qc_kept_dtypes"
"""Attribute of a model with random float32 weights: parameters that it would hold in another dtype than most."""


def kept_dtypes(module: nn.Module) -> dict[int, torch.dtype]:
    """Parameters, by identity, that a model holds in a dtype of their own whatever that of the others is."""
    named: dict[str, torch.dtype] = getattr(module, KEPT, {})
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {id(parameters[name]): dtype for name, dtype in named.items() if name in parameters}


def weight_dtype(module: nn.Module) -> torch.dtype:
    """The floating dtype in which most parameters are stored; bfloat16 where there are none."""
    counts: Counter[torch.dtype] = Counter()
    for parameter in module.parameters():
        if parameter.dtype.is_floating_point:
            counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0] if counts else torch.bfloat16


def subject(
    model: str | Path | nn.Module | PretrainedConfig,
    *,
    config: Any,
    trust_remote_code: bool,
    ours: bool = False,
) -> Subject:
    """Find out what is to be captured. Reads config.json at most; downloads a hub id's snapshot.

    ``ours``: take a checkpoint that is quantized in a way that ``load`` knows, with the config of the float model.

    Raises:
        Refused: No config, one that cannot be read, remote code that is not trusted, an encoder-decoder, a
            quantized checkpoint.
    """
    if isinstance(model, nn.Module):
        main = weight_dtype(model)
        given = config if config is not None else getattr(model, "config", None)
        _check_config(given, type(model).__name__)
        return Subject(given, registered(model), None, main if main in HALF else torch.bfloat16)
    if isinstance(model, PretrainedConfig):
        _check_config(model, type(model).__name__)
        return _to_build(model, None, trust_remote_code)
    path = _directory(str(model))
    if config is None:
        config = _read_config(path, trust_remote_code, ours)
    _check_config(config, str(path))
    _check_causal(config, str(path), trust_remote_code)
    return _to_build(config, path, trust_remote_code)


def _to_build(config: Any, path: Path | None, trust_remote_code: bool) -> Subject:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None)
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    captured = dtype if dtype in HALF else torch.bfloat16
    return Subject(config, None, path, captured, trust_remote_code, dtype)


def is_hub_id(model: str) -> bool:
    """Whether the hub may be asked for it: ``org/name``, and not the path of a directory that is not there."""
    return model.count("/") == 1 and not model.startswith((".", "/", "~"))


def _directory(model: str) -> Path:
    """The checkpoint directory: the one named, or the snapshot of a hub id."""
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise Refused(
                f"{model}: no config.json in this directory.\nGive a checkpoint as transformers saves it."
            )
        return path
    if path.exists():
        kind = "a GGUF file, which qc does not read" if path.suffix == ".gguf" else "a file"
        raise Refused(f"{model} is {kind}.\nGive the checkpoint directory that holds config.json.")
    if not is_hub_id(model):
        raise Refused(
            f"{model}: no such directory.\nGive a checkpoint directory, or a hub id such as org/name."
        )
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:  # huggingface_hub raises whatever its transport raises
        reason = str(error).strip().split("\n")[0]
        raise Refused(
            f"{model}: no such directory, and the hub gave none ({type(error).__name__}: {reason}).\n"
            "Check the name and the network, or give a local checkpoint directory."
        ) from error


def _read_config(path: Path, trust_remote_code: bool, ours: bool = False) -> Any:
    file = path / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Refused(f"{file} is not valid JSON: {error}.\nDownload the checkpoint again.") from error
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise Refused(f"{file} has no model_type, so transformers cannot tell what model it is.")
    own = ours and any(block_by(method, path) for method in LOADED)
    if raw.get("quantization_config") and not own:
        block = raw["quantization_config"]
        method = block.get("quant_method", "unknown") if isinstance(block, dict) else block
        raise Refused(
            f"{path} is quantized already (quant_method {method}"
            + (f"; qc loads {' and '.join(LOADED)}).\n" if ours else ").\n")
            + "Give the float checkpoint from which it was made."
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        if own:
            del config.quantization_config
        return config
    except (
        Exception
    ) as error:  # transformers raises ValueError, KeyError, ImportError, StrictDataclassError...
        if raw.get("auto_map") and not trust_remote_code:
            raise Refused(
                f"{path} needs Python code that comes with the checkpoint (model_type {raw['model_type']}).\n"
                "It runs only when you say --trust-remote-code; read that code first."
            ) from error
        reason = " ".join(str(error).split())[:300]
        raise Refused(f"{file} cannot be read by transformers: {type(error).__name__}: {reason}") from error


def _check_config(config: Any, where: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise Refused(f"{where} is an encoder-decoder; qc compiles decoder-only language models.")
    if getattr(config, "quantization_config", None):
        raise Refused(f"{where} is quantized already.\nGive the float model from which it was made.")


def _check_causal(config: Any, where: str, trust_remote_code: bool) -> None:
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if is_causal(config) or (remote and trust_remote_code):
        return
    if remote:
        raise Refused(
            f"{where} needs Python code that comes with the checkpoint.\n"
            "It runs only when you say --trust-remote-code; read that code first."
        )
    raise Refused(f"{where}: model_type {config.model_type} has no causal language model in transformers.")


def constants(model: nn.Module, what: Subject) -> dict[str, Tensor]:
    """Non-persistent buffers on CPU by qualified name; no checkpoint has them.

    They come from the module in memory, or are made by the model's own ``_init_weights``, run twice over
    different garbage: what still differs was not made there. Such a buffer is made by the model's constructor,
    which then runs again with its parameters on meta and its buffers in memory.

    Raises:
        Refused: A buffer that the model does not make itself.
    """
    found: dict[str, Tensor] = {}
    built: dict[str, Tensor] | None = None
    for name, module in model.named_modules():
        local = sorted(
            module._non_persistent_buffers_set & {n for n, b in module._buffers.items() if b is not None}
        )
        if not local:
            continue
        if what.module is not None:
            source = what.module.get_submodule(name)
            found |= {_join(name, n): source.get_buffer(n).detach().cpu().clone() for n in local}
            continue
        first, second = (_initialised(_model_of(model, name), module, local, fill, what) for fill in (0, 1))
        for n in local:
            if torch.equal(first[n], second[n]):
                found[_join(name, n)] = first[n]
                continue
            built = _constructed(what) if built is None else built
            if _join(name, n) not in built:
                raise Refused(
                    f"the buffer {_join(name, n)} is in no checkpoint and the model does not make it.\n"
                    "Load the model with transformers and hand the module to qc.compile instead of its path."
                )
            found[_join(name, n)] = built[_join(name, n)]
    return found


def _constructed(what: Subject) -> dict[str, Tensor]:
    """The buffers that the constructor of a model makes, on CPU; its parameters go to meta as they are made."""
    own = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        own(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    nn.Module.register_parameter = register
    try:
        with torch.random.fork_rng(devices=[]):
            model = build(what.config, what.stored or what.dtype, trust_remote_code=what.trust_remote_code)
    finally:
        nn.Module.register_parameter = own
    return {n: b for n, b in model.named_buffers(remove_duplicate=False) if b.device.type == "cpu"}


def _join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def _model_of(model: nn.Module, name: str) -> nn.Module:
    """The innermost model that holds a module: its ``_init_weights`` is the one that transformers calls for it."""
    within = [other for n, other in model.named_modules() if f"{name}.".startswith(f"{n}." if n else "")]
    return [other for other in within if isinstance(other, PreTrainedModel) or other is model][-1]


def _initialised(
    model: nn.Module, module: nn.Module, names: list[str], fill: int, what: Subject
) -> dict[str, Tensor]:
    memo: dict[int, Any] = {id(p): p for p in module.parameters()}
    for n in names:
        buffer = module.get_buffer(n)
        dtype = what.stored if what.stored is not None and buffer.dtype == what.dtype else buffer.dtype
        memo[id(buffer)] = torch.full_like(buffer, fill, device="cpu", dtype=dtype)
    memo |= {id(child): child for child in module.children()}
    module = copy.deepcopy(module, memo)
    if isinstance(model, PreTrainedModel):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            model._init_weights(module)
    return {n: module.get_buffer(n) for n in names}


def ties(model: nn.Module) -> dict[str, str]:
    """Parameters that share storage with an earlier one, by the name of that one."""
    owner: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = owner.setdefault(id(parameter), name)
        if first != name:
            found[name] = first
    return found
