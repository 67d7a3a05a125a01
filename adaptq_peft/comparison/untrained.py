"""What trainings that differ in the learning rate have in common: the adapter as it is before the first step."""

from __future__ import annotations

import tempfile
import time

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from .methods import Inputs
from .records import Run


class UntrainedAdapters:
    """Prepares models, and keeps the untrained ADAPTQ adapter that was made last.

    A profile, sensitivities and calibrated codes take longer than many a training, and do not depend on the learning
    rate or the anchor. The adapter is saved and loaded, which gives every bit back. It is one at a time, because its
    file is as large as the deltas, in a folder that goes with this object.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="adaptq-compare-")
        self._made_for: tuple[str, int, int] | None = None
        self._seconds = 0.0

    def prepare(self, run: Run, base: PreTrainedModel, inputs: Inputs) -> tuple[nn.Module, float]:
        """The model that a run trains, and the seconds that making it took, whenever that was.

        Args:
            run: which.
            base: the 16-bit base; it is changed.
            inputs: what the method may look at; the same for all runs with this size and seed.
        """
        if run.untrained is not None and run.untrained == self._made_for:
            return PeftModel.from_pretrained(base, self._folder.name, is_trainable=True), self._seconds
        start = time.perf_counter()
        model = run.method.build(base, inputs, **run.method.options)
        seconds = time.perf_counter() - start
        if run.untrained is not None:
            assert isinstance(model, PeftModel)
            self._made_for = None  # what lies there while it is written is nobody's
            model.save_pretrained(self._folder.name)
            self._made_for, self._seconds = run.untrained, seconds
        return model, seconds
