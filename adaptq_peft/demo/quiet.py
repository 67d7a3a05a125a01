"""Silences, for the length of the demo, library messages that say nothing about it; errors still come through."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

NOISY_LOGGERS = ("transformers", "bitsandbytes")
PEFT_READS_OLD_NAME = "`is_gradient_checkpointing` is deprecated"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide warnings and progress bars of transformers and bitsandbytes; everything is as before afterwards."""
    loggers = [logging.getLogger(name) for name in NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    bars = transformers_logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=PEFT_READS_OLD_NAME, category=FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
