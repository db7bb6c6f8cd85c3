"""A model whose Python code comes with its checkpoint: it runs only when that is asked for, and the output says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

import qc
from benchmarks.random_llama import character_tokenizer
from qc.compiler.cli import main
from tests.families import GQA, build
from tests.homes import TEXT

pytestmark = pytest.mark.broad

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class HouseConfig(LlamaConfig):
    model_type = "house"


class HouseForCausalLM(LlamaForCausalLM):
    config_class = HouseConfig

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits * 2
        return found
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model type that no library knows."""
    path = tmp_path_factory.mktemp("remote") / "house"
    build(LlamaConfig(**GQA)).save_pretrained(path)
    character_tokenizer().save_pretrained(path)
    (path / "house.py").write_text(CODE)
    config = json.loads((path / "config.json").read_text())
    config |= {
        "model_type": "house", "architectures": ["HouseForCausalLM"],
        "auto_map": {"AutoConfig": "house.HouseConfig", "AutoModelForCausalLM": "house.HouseForCausalLM"},
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_it_is_refused_unless_it_is_trusted(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "compile",
        str(house),
        "--passes",
        "linear_quant",
        "--scheme",
        "w8a8",
        "--out",
        str(house.parent / "no"),
    ]
    assert main(command) == 2
    assert "--trust-remote-code" in capsys.readouterr().err


def test_trusted_code_is_captured_compiled_and_recorded(house: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 30)
    out = tmp_path / "out"
    qc.compile(
        house, "iter_smooth,linear_quant", out=out, scheme="w8a8", target="modelslim", calib=[text], samples=4,
        length=24, trust_remote_code=True,
    )  # fmt: skip
    manifest = json.loads((out / "qc_manifest.json").read_text())
    assert manifest["remote_code"] == ["house.py"]
    assert "house.py" in manifest["outputs"]
    assert "auto_map" in json.loads((out / "config.json").read_text())
    assert not any(check.wrong for check in qc.verify(out, house))
