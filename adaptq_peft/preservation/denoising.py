"""Singular values of deltas below the noise edge set to zero: less forgetting without any text to measure it on.

A full-rank delta is a few directions that the data asked for and many that are noise of training. Noise forgets, too.
The threshold is the optimal one for a matrix in white noise of unknown level: Gavish and Donoho, IEEE Transactions on
Information Theory 60 (2014), arXiv 1305.5870.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layer import AdaptQLayer
from .block_scales import active_adapter


@torch.no_grad()
def threshold_deltas(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Keep of each delta, in place, only the singular values above the noise edge. Norms and biases stay as they are.

    For where there is no general text, which `fit_to_budget` needs; nothing is measured and nothing certified.

    Args:
        model: a `PeftModel` with one active ADAPTQ adapter.

    Returns:
        Dotted name of each delta -> (singular values kept, singular values in all).

    Raises:
        ValueError: if there is no such adapter, or several are active.
    """
    adapter = active_adapter(model)
    kept: dict[str, tuple[int, int]] = {}
    for layer_name, layer in model.named_modules():
        if not isinstance(layer, AdaptQLayer) or adapter not in layer.adaptq_delta:
            continue
        for name, delta in layer.adaptq_delta[adapter].named_parameters():
            if delta.ndim == 2:
                denoised, rank = hard_threshold(delta)
                delta.copy_(denoised)
                kept[f"{layer_name}.adaptq_delta.{adapter}.{name}"] = rank, min(delta.shape)
    if not kept:
        raise ValueError(f"adapter {adapter!r} has no delta that is a matrix; only ADAPTQ adapters have deltas")
    return kept


def hard_threshold(matrix: Tensor) -> tuple[Tensor, int]:
    """A matrix without its singular values up to omega * their median, and how many are left.

    omega = 0.56 b^3 - 0.95 b^2 + 1.82 b + 1.43, b = shorter / longer side: equation 5 of the paper, good to 0.02.

    Args:
        matrix: [rows, columns], any floating dtype.

    Returns:
        [rows, columns] in float32, and the number of singular values.
    """
    left, values, right = torch.linalg.svd(matrix.float(), full_matrices=False)
    ratio = min(matrix.shape) / max(matrix.shape)
    omega = 0.56 * ratio**3 - 0.95 * ratio**2 + 1.82 * ratio + 1.43
    rank = int((values > omega * values.median()).sum())
    return (left[:, :rank] * values[:rank]) @ right[:rank], rank
