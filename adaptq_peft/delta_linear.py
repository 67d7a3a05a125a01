"""The arithmetic of W0 + scale * delta, and a linear map with it that saves no merged weight for the backward pass."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch._C._functorch import is_functorch_wrapped_tensor


def add_deltas(
    base: torch.Tensor, deltas: Sequence[torch.Tensor], scales: Sequence[float], dtype: torch.dtype
) -> torch.Tensor:
    """base + sum of scale * delta, added in the widest dtype of the operands and rounded once, to `dtype`.

    Args:
        base: the frozen tensor, any shape.
        deltas: one or more tensors of the same shape.
        scales: a number for each delta.
        dtype: dtype of the result.

    Returns:
        A new tensor of the shape of `base`.
    """
    total = base
    for delta, scale in zip(deltas[:-1], scales[:-1], strict=True):
        total = torch.add(total, delta, alpha=scale)
    if dtype == torch.promote_types(total.dtype, deltas[-1].dtype) or not _can_write_into(total, deltas[-1]):
        return torch.add(total, deltas[-1], alpha=scales[-1]).to(dtype)
    # Rounded while it is written: no temporary of the wider dtype.
    return torch.add(total, deltas[-1], alpha=scales[-1], out=torch.empty_like(total, dtype=dtype))


def _can_write_into(*operands: torch.Tensor) -> bool:
    """Whether a sum may be written with `out=`, which autograd and torch.func can't and torch.compile need not."""
    plainly = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return not (plainly or any(map(is_functorch_wrapped_tensor, operands)))


class _Scratch(threading.local):
    """One buffer a dtype and thread, as large as the largest weight so far, for one merged weight at a time.

    On a CPU a fresh tensor for each layer costs more in page faults and cache misses than the addition itself. A GPU's
    caching allocator makes this superfluous.
    """

    def __init__(self) -> None:
        self._buffers: dict[torch.dtype, torch.Tensor] = {}

    def like(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        buffer = self._buffers.get(dtype)
        if buffer is None or buffer.numel() < tensor.numel():
            with torch.inference_mode(False):  # a buffer made in inference mode could not be written to outside of it
                buffer = self._buffers[dtype] = torch.empty(tensor.numel(), dtype=dtype)
        return buffer[: tensor.numel()].view(tensor.shape)


_scratch = _Scratch()


def _merged_weight(
    base: torch.Tensor, deltas: Sequence[torch.Tensor], scales: Sequence[float], dtype: torch.dtype
) -> torch.Tensor:
    """`add_deltas` for a result that is not kept."""
    if base.device.type != "cpu" or len(deltas) != 1 or not _can_write_into(base, deltas[0]):
        return add_deltas(base, deltas, scales, dtype)
    return torch.add(base, deltas[0], alpha=scales[0], out=_scratch.like(base, dtype))


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
        weight = _merged_weight(base_weight, deltas, scales, x.dtype)
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
            weight = _merged_weight(base_weight, deltas, ctx.scales, x.dtype)
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
