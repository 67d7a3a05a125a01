"""What several test files do to a model with adapters."""

from __future__ import annotations

import torch

from adaptq_peft.layer import AdaptQLayer


def randomize(model, name="default", std=0.02, seed=5):
    """Give the deltas of an adapter random values, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, AdaptQLayer) and name in layer.adaptq_delta:
            for parameter in layer.adaptq_delta[name].parameters():
                parameter.data.normal_(std=std, generator=generator)


def logits(model, batch):
    model.eval()
    with torch.no_grad():
        return model(**batch).logits
