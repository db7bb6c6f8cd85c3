"""What transformers calls to load a checkpoint of qc: a quantization config and its quantizer.

``import qc.hf`` registers both. The modules are put in place by the code that ``qc.load`` uses; reading, devices and
saving are those of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, WeightTransform, apply_renamings
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from .capture_experts import STACKS
from .capture_experts import register as register_experts
from .capture_grids import check_grids_run
from .config_dtype import config_dtype
from .description import DESCRIPTION, METHOD, block_of, described, description_of
from .errors import Refused
from .export import CARD
from .load import stored_dtype
from .load_modules import QuantizedCheckpoint, check_exact, install
from .shards import STEMS, find_shards, weights_file


class Config(QuantizationConfigMixin):
    """The ``quantization_config`` of a checkpoint that qc wrote.

    Without arguments it takes everything from the files: give ``qc.hf.Config()`` to ``from_pretrained`` for a
    directory in the ascendv1 layout, whose config.json has no such block. ``import qc.hf`` is enough for one that
    has it.

    Args:
        modules: Type to names of the linears of that type; numbers may be folded, ``layers.{0..29}.q_proj``.
        tensors: The same for tensors of quantized caches and attentions.
        dtype: The dtype of the model that the integer linears were made for.
    """

    def __init__(
        self,
        modules: Mapping[str, Sequence[str]] | None = None,
        tensors: Mapping[str, Sequence[str]] | None = None,
        dtype: str | None = None,
        quant_method: str = METHOD,
    ) -> None:
        self.quant_method: Any = quant_method
        self.dtype = dtype
        self.modules = None if modules is None else {kind: list(names) for kind, names in modules.items()}
        self.tensors = {kind: list(names) for kind, names in (tensors or {}).items()}

    def fill(self, description: Mapping[str, Any], dtype: torch.dtype) -> None:
        """Take the types from a description, so that a saved config has them."""
        block = block_of(description, str(dtype).removeprefix("torch."))
        self.modules, self.tensors, self.dtype = block["modules"], block["tensors"], block["dtype"]


class Quantizer(HfQuantizer):
    """Puts qc's integer linears, attentions on grids and split experts into a model before its weights are read."""

    quantization_config: Config

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = True
        self._names: dict[str, str] = {}
        self._grids = frozenset[str]()
        self._path = Path()
        self._card = ""

    def update_attn_implementation(self, config: Any) -> Any:
        """Find the weights of an ascendv1 directory whose config.json does not name them: other tools' do not."""
        path = Path(getattr(config, "name_or_path", "") or "")
        if getattr(config, "transformers_weights", None) is None and path.is_dir():
            found = weights_file(path)
            if found is not None and not found.name.startswith(f"{STEMS[0]}."):
                config.transformers_weights = found.name
        return config

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: Sequence[str] | None = None,
        dtype: Any = None,
        **_: Any,
    ) -> None:
        if not checkpoint_files:
            raise Refused(
                "a quantized model is made from its files: call from_pretrained with the directory that qc compile"
                " wrote, and without state_dict"
            )
        path = self._path = Path(checkpoint_files[0]).parent
        description = self._description(model, path)
        stored = stored_dtype(path)
        if self.quantization_config.dtype is not None:
            named = config_dtype({"dtype": self.quantization_config.dtype})
            if named is None:
                raise Refused(
                    f"{path}: its quantization_config says the dtype {self.quantization_config.dtype!r}, and torch has"
                    " none of that name"
                )
            stored = named
        self.quantization_config.fill(description, stored)
        name_of, self._grids = install(model, path, description, stored, dtype or stored)
        for (
            tied,
            owner,
        ) in model.all_tied_weights_keys.items():  # transformers ties at the end; the check is before
            module, _, leaf = tied.rpartition(".")
            setattr(model.get_submodule(module), leaf, model.get_parameter(owner))
        source = QuantizedCheckpoint(path, model, name_of)
        check_exact(model, source)
        for (
            module
        ) in model.modules():  # what is not in the files is initialized, by code that looks for stacks
            if hasattr(module, STACKS):
                module._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
        expected = model.state_dict()
        named = ((disk, name_of(disk)) for disk in source.shards.entries)
        self._names = {disk: name for disk, name in named if name in expected}
        if (path / CARD).is_file():
            self._card = (path / CARD).read_text(encoding="utf-8")

    def _description(self, model: PreTrainedModel, path: Path) -> Mapping[str, Any]:
        """The types, from the config that was given, else from what stands beside the weights."""
        given = self.quantization_config
        if given.modules is not None:
            return described(given.to_dict(), find_shards(path).entries)
        origin = str(model.config.name_or_path or "")
        if origin and not Path(origin).exists() and not (path / DESCRIPTION).is_file():
            revision = getattr(model.config, "_commit_hash", None)
            cached_file(origin, DESCRIPTION, revision=revision, _raise_exceptions_for_missing_entries=False)
        found = description_of(path)
        if found is None:
            raise Refused(
                f"{path}: not a checkpoint that qc wrote: no {DESCRIPTION}, and no quantization_config of qc in"
                " config.json. Leave quantization_config out for a float model, or make one with qc compile"
            )
        return found

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel
    ) -> list[WeightTransform]:
        """Names on disk as qc reads them; conversions of transformers stay for tensors that are none of those."""
        renamings = [one for one in weight_conversions if isinstance(one, WeightRenaming)]
        renamed = {apply_renamings(disk, renamings) for disk in self._names}
        converters = [
            one
            for one in weight_conversions
            if isinstance(one, WeightConverter) and not any(one.compiled_sources.search(n) for n in renamed)
        ]
        return [Names(self._names, renamings), *converters]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        model.requires_grad_(False)
        if self._grids:
            check_grids_run(model, self._grids, str(self._path))
        model.add_model_tags("qc")
        if self._card:
            setattr(model, KEPT_CARD, self._card)
            model.save_pretrained = MethodType(save_pretrained, model)
        return model

    def is_serializable(self) -> bool:
        """``save_pretrained`` writes the tensors as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Integers have no gradients."""
        return False


class Names(WeightRenaming):
    """Names on disk to names in the model, one by one; what is not among them goes through other renamings."""

    def __init__(self, names: Mapping[str, str], others: Sequence[WeightTransform]) -> None:
        super().__init__(source_patterns="(?!)", target_patterns="")
        self._names, self._others = dict(names), list(others)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The name in the model, and what was found."""
        self._was_used = True
        if source_key in self._names:
            return self._names[source_key], source_key
        return apply_renamings(source_key, self._others), None  # pyright: ignore[reportArgumentType]

    def reverse_transform(self) -> Names:
        """Names in the model to names on disk."""
        back = [other.reverse_transform() for other in reversed(self._others) if other.was_used()]
        return Names({name: disk for disk, name in self._names.items()}, back)


KEPT_CARD = "qc_model_card"
"""Attribute of a loaded model: the model card that stood beside its weights."""


def save_pretrained(model: Any, save_directory: Any, *args: Any, **options: Any) -> None:
    """``save_pretrained`` of the model's class, and the model card beside it where there is none."""
    type(model).save_pretrained(model, save_directory, *args, **options)
    card = Path(save_directory) / CARD
    if card.parent.is_dir() and not card.exists():
        card.write_text(getattr(model, KEPT_CARD), encoding="utf-8")


def register() -> None:
    """Make ``quant_method: qc`` known to transformers; a second call changes nothing."""
    register_experts()
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(Config)
        register_quantizer(METHOD)(Quantizer)
