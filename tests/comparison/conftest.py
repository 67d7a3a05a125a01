"""The tiny checkpoint, its corpus split for a study, and settings under which a run takes a second."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_checkpoint import DOMAIN, GENERAL, save_tiny_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from adaptq_peft.comparison import StudySettings, StudyTexts
from adaptq_peft.comparison import study as study_module
from adaptq_peft.comparison.measure import Measurements
from adaptq_peft.comparison.untrained import UntrainedAdapters
from adaptq_peft.demo.training import training_windows

TINY = {
    "samples": (8,),
    "rates": (1e-3, 2e-3),
    "epochs": 1,
    "batch_size": 4,
    "length": 16,
    "evaluation_tokens": 240,
    "validation_tokens": 240,
    "max_length": 32,
    "anchor_samples": 8,
}


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """No timing of dtypes: what a tiny model gives is the same on each machine."""
    monkeypatch.setattr(study_module, "faster_dtype", lambda: torch.float32)


@pytest.fixture
def settings(tmp_path):
    """`settings(**changes)`: tiny ones."""
    return lambda **changes: StudySettings(output_dir=tmp_path, **(TINY | changes))


@pytest.fixture(scope="session")
def texts() -> StudyTexts:
    return StudyTexts(DOMAIN[:40], DOMAIN[40:50], DOMAIN[50:], GENERAL[:12], GENERAL[12:30], GENERAL[30:])


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def load(checkpoint):
    return lambda: AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def measurements(load, tokenizer, texts):
    """One for all tests: the base is asked once."""
    return Measurements(load, tokenizer, texts, StudySettings(**TINY))


@pytest.fixture
def untrained():
    return UntrainedAdapters()


@pytest.fixture(scope="session")
def windows(tokenizer, texts):
    return training_windows(tokenizer, texts.domain_train, TINY["length"])


@pytest.fixture
def console():
    """Prints to a string: `console.file.getvalue()`."""
    return Console(file=StringIO(), width=160)
