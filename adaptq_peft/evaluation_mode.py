"""Puts a model into evaluation mode for a while, in its own arithmetic and without caches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()` within the context; afterwards, also after an error, each submodule has the mode that it had.

    The autocast that a Trainer's `bf16` or `fp16` has put around the model's forward, or around that of a model which
    was wrapped since, and leaves there, is taken off for the while: a base that was measured before training had none,
    and rounding alone would look like forgetting.

    No cache of keys and values is made, also where `forward` has no argument for it: a block that is run again would
    add to it.
    """
    training = [module for module in model.modules() if module.training]
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    caching = {id(config): config for config in found if getattr(config, "use_cache", False) is True}
    autocast_forwards = [
        (module, vars(module)["forward"])
        for module in model.modules()
        if {"forward", "_original_forward"} <= vars(module).keys()
    ]
    model.eval()
    for config in caching.values():
        config.use_cache = False
    for module, _ in autocast_forwards:
        module.forward = vars(module)["_original_forward"]
    try:
        yield
    finally:
        for module, forward in autocast_forwards:
            module.forward = forward
        for config in caching.values():
            config.use_cache = True
        for module in training:
            module.training = True
