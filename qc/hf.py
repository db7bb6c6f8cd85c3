"""Hugging Face: ``import qc.hf`` lets ``from_pretrained`` of transformers load what qc wrote.

>>> import qc.hf
>>> from transformers import AutoModelForCausalLM
>>> AutoModelForCausalLM.from_pretrained("out")  # doctest: +SKIP
>>> AutoModelForCausalLM.from_pretrained("out-for-vllm", quantization_config=qc.hf.Config())  # doctest: +SKIP
"""

from __future__ import annotations

from .compiler.load_hf import Config, Quantizer, register

__all__ = ["Config", "Quantizer"]

register()
