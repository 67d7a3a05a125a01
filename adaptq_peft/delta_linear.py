"""A linear map with W0 + scale * delta that saves no merged weight for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .merged_weight import temporary_merged_weight


class _DeltaLinear(torch.autograd.Function):
    """x (W0 + sum of scale * delta)^T + bias; the merged weight is formed again in backward instead of saved."""

    generate_vmap_rule = True  # for gradients of each sample, by torch.func

    @staticmethod
    def forward(  # type: ignore[override]
        x: torch.Tensor,
        base_weight: torch.Tensor,
        bias: torch.Tensor | None,
        transposed: bool,
        scales: tuple[float, ...],
        *deltas: torch.Tensor,
    ) -> torch.Tensor:
        weight = temporary_merged_weight(base_weight, deltas, scales, x.dtype)
        output = F.linear(x, weight.t() if transposed else weight, bias)
        # F.linear may return a view, and autograd forbids changing a view that was made in here, as DeBERTa does.
        return torch.ops.aten._unsafe_view(output, output.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, base_weight, _, ctx.transposed, ctx.scales, *deltas = inputs
        ctx.save_for_backward(x, base_weight, *deltas)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, base_weight, *deltas = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = temporary_merged_weight(base_weight, deltas, ctx.scales, x.dtype)
            grad_x = grad_output @ (weight.t() if ctx.transposed else weight)
        flat_grad = grad_output.reshape(-1, grad_output.shape[-1])  # flatten(0, -2) takes no vector
        if ctx.needs_input_grad[2]:
            grad_bias = flat_grad.sum(0)
        grad_deltas: list[torch.Tensor | None] = [None] * len(deltas)
        for i in (i for i, needed in enumerate(ctx.needs_input_grad[5:]) if needed):
            flat_x = x.reshape(-1, x.shape[-1])
            left, right = (flat_x.t(), flat_grad) if ctx.transposed else (flat_grad.t(), flat_x)
            # The scale is applied within the matrix product. Zeros: vmap multiplies the first argument by beta=0, too.
            scaled = torch.addmm(left.new_zeros(()), left, right, beta=0, alpha=ctx.scales[i])
            grad_deltas[i] = scaled.to(deltas[i].dtype)
        return grad_x, None, grad_bias, None, None, *grad_deltas


def delta_linear(
    x: torch.Tensor,
    base_weight: torch.Tensor,
    bias: torch.Tensor | None,
    deltas: Sequence[torch.Tensor],
    scales: Sequence[float],
    *,
    transposed: bool = False,
) -> torch.Tensor:
    """A linear map with the weight base_weight + sum of scale * delta, computed in the dtype of `x`.

    Only `x`, `base_weight` and the deltas are kept for the backward pass: it forms the merged weight again.

    Args:
        x: [..., in].
        base_weight: frozen weight, [out, in] or, if `transposed`, [in, out] as in GPT-2's Conv1D. Gets no gradient.
        bias: [out] in the dtype of `x`, or `None`.
        deltas: one or more tensors of the shape of `base_weight`, each in a dtype of its own; gradients come in it.
        scales: a number for each delta.
        transposed: whether weights are [in, out]. Default `False`.

    Returns:
        [..., out] in the dtype of `x`.
    """
    return _DeltaLinear.apply(x, base_weight, bias, transposed, tuple(scales), *deltas)
