"""The tiny checkpoint, and its corpus as the demo's texts."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_checkpoint import DOMAIN, GENERAL, save_tiny_checkpoint

from adaptq_peft.demo.texts import DemoTexts


@pytest.fixture(scope="session")
def demo_texts() -> DemoTexts:
    return DemoTexts(DOMAIN[:50], DOMAIN[50:], GENERAL, ["message-1"], ["message-2"])


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny-model"))
