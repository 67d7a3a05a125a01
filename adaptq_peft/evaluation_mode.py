"""Puts a model into evaluation mode for a while, in its own arithmetic and without caches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()` within the context; afterwards, also after an error, each submodule has the mode that it had.

    The autocast that a Trainer's `bf16` or `fp16` has put around the model's forward, and leaves there, is taken off
    for the while: a base that was measured before training had none, and rounding alone would look like forgetting.

    No cache of keys and values is made, also where `forward` has no argument for it: a block that is run again would
    add to it.
    """
    training = [module for module in model.modules() if module.training]
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    caching = {id(config): config for config in found if getattr(config, "use_cache", False) is True}
    attributes = vars(model)
    autocast_forward = attributes.get("forward") if "_original_forward" in attributes else None
    model.eval()
    for config in caching.values():
        config.use_cache = False
    if autocast_forward is not None:
        model.forward = attributes["_original_forward"]
    try:
        yield
    finally:
        if autocast_forward is not None:
            model.forward = autocast_forward
        for config in caching.values():
            config.use_cache = True
        for module in training:
            module.training = True
