"""Puts a model into evaluation mode, and its own arithmetic, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()` within the context; afterwards, also after an error, each submodule has the mode that it had.

    The autocast that a Trainer's `bf16` or `fp16` has put around the model's forward, and leaves there, is taken off
    for the while: a base that was measured before training had none, and rounding alone would look like forgetting.
    """
    training = [module for module in model.modules() if module.training]
    attributes = vars(model)
    autocast_forward = attributes.get("forward") if "_original_forward" in attributes else None
    model.eval()
    if autocast_forward is not None:
        model.forward = attributes["_original_forward"]
    try:
        yield
    finally:
        if autocast_forward is not None:
            model.forward = autocast_forward
        for module in training:
            module.training = True
