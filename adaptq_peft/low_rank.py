"""The arithmetic of a low-rank correction: s * B A beside the output of a frozen linear, as in LoRA."""

from __future__ import annotations

import torch
from torch import nn


class LowRankB(nn.Linear):
    """The factor B [out, r]. It starts at zero, so a new correction does not change the output."""

    def reset_parameters(self) -> None:
        """Set B to zero."""
        nn.init.zeros_(self.weight)


def make_factors(
    in_features: int, out_features: int, rank: int, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Linear, LowRankB]:
    """A new A [r, in], drawn as LoRA's (Kaiming uniform, a = sqrt(5): the default of `nn.Linear`), and a zero B."""
    return (
        nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype),
        LowRankB(rank, out_features, bias=False, device=device, dtype=dtype),
    )


def add_correction(output: torch.Tensor, x: torch.Tensor, a: nn.Module, b: nn.Module, scale: float) -> torch.Tensor:
    """output + scale * (x A^T) B^T, in the order of operations and dtypes of PEFT's LoRA on a 4-bit linear.

    Args:
        output: what the linear gives for `x`, [..., out].
        x: [..., in]. It is brought to the dtype of A, unless autocast chooses one.
        a: linear map with A [r, in].
        b: linear map with B [out, r].
        scale: a number.

    Returns:
        A new tensor in the shape and dtype of `output`.
    """
    weight: torch.Tensor = a.weight  # type: ignore[assignment]
    autocast = torch.is_autocast_enabled(weight.device.type)
    x = x.to(weight.device, x.dtype if autocast else weight.dtype)
    return output + (b(a(x)) * scale).to(output.device, output.dtype)


def rounding_repair(original: torch.Tensor, rounded: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The B A of a rank that is nearest to what rounding took away, in the Frobenius norm.

    The truncated singular value decomposition U S V^T of original - rounded, split evenly: A = sqrt(S) V^T and
    B = U sqrt(S). The first step of LoftQ (Li et al. 2023, arXiv:2310.08659).

    Args:
        original: weight [out, in].
        rounded: the same weight, quantized and dequantized.
        rank: of the result, cut to the smaller side of the weight.

    Returns:
        A [r, in] and B [out, r] in float32.
    """
    u, s, vh = torch.linalg.svd(original.float() - rounded.float(), full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root
