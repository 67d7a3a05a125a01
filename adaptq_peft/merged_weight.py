"""The arithmetic of W0 + scale * delta: how the sum is rounded, and where it is put."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import reduce

import torch
from torch._C._functorch import is_functorch_wrapped_tensor

# Knuth's multiplicative hashing: twice 2^16 over the golden ratio, modulo 2^16, so that equal steps become well spread
# products. Even, so that the sign bit is shifted out: it would make NaN of -0.0.
_HASH_MULTIPLIER = 15470
# Sums are formed in pieces, so that what is wider than the result fits the cache of a CPU or little memory of a GPU.
_PIECE_ON_CPU = 2**16
_PIECE_ELSEWHERE = 2**22


def add_deltas(
    base: torch.Tensor, deltas: Sequence[torch.Tensor], scales: Sequence[float], dtype: torch.dtype
) -> torch.Tensor:
    """base + sum of scale * delta, added in float32 or what is wider among the operands, and rounded once, to `dtype`.

    A sum of a bfloat16 `base` in bfloat16 is dithered: `base` is taken as a float32 number that rounds to it and has a
    hash of it in the bits that bfloat16 does not have. Without, a delta of less than half a last place would change
    nothing, and in a short training most are. With it, one of a third changes a third of the weights. A delta of zero
    leaves `base` as it is, and the sum for a part of a weight is that part of the sum.

    Args:
        base: the frozen tensor, any shape.
        deltas: one or more tensors of the same shape.
        scales: a number for each delta.
        dtype: dtype of the result.

    Returns:
        A new tensor of the shape of `base`. No gradient flows to `base`.
    """
    if _can_write(base, *deltas):
        return _write_sum(torch.empty_like(base, dtype=dtype), base, deltas, scales)
    return _sum(base, deltas, scales, dtype).to(dtype)


def temporary_merged_weight(
    base: torch.Tensor, deltas: Sequence[torch.Tensor], scales: Sequence[float], dtype: torch.dtype
) -> torch.Tensor:
    """`add_deltas`, without gradients, for a result that is not needed any more when the next one is formed."""
    if base.device.type == "cpu" and _can_write(base, *deltas):
        return _write_sum(_scratch.like(base, dtype), base, deltas, scales)
    return add_deltas(base, deltas, scales, dtype)


def _sum(
    base: torch.Tensor, deltas: Sequence[torch.Tensor], scales: Sequence[float], dtype: torch.dtype
) -> torch.Tensor:
    """The sum that is to be rounded to `dtype`, in the dtype in which it is formed."""
    wide = reduce(torch.promote_types, (tensor.dtype for tensor in (base, *deltas)), torch.float32)
    total = _with_lower_bits(base.detach()) if base.dtype == dtype == torch.bfloat16 else base.detach()
    total = total.to(wide)
    for delta, scale in zip(deltas, scales, strict=True):
        total = torch.add(total, delta.to(wide), alpha=scale)  # operands of one dtype: a CPU is slow with two
    return total


def _with_lower_bits(values: torch.Tensor) -> torch.Tensor:
    """bfloat16 values as float32, with a hash of them, less than half of their last place, added in the lower bits."""
    noise = values.view(torch.int16) * _HASH_MULTIPLIER
    return values.float().view(torch.int32).add_(noise).view(torch.float32)


def _write_sum(
    out: torch.Tensor, base: torch.Tensor, deltas: Sequence[torch.Tensor], scales: Sequence[float]
) -> torch.Tensor:
    """Write the sum into `out` and return `out`."""
    if len(deltas) == 1 and out.dtype == base.dtype == deltas[0].dtype == torch.float32:
        return torch.add(base, deltas[0], alpha=scales[0], out=out)
    size = _PIECE_ON_CPU if base.device.type == "cpu" else _PIECE_ELSEWHERE
    rows = max(1, size // max(1, base.shape[1:].numel()))
    for into, part, *others in zip(*(torch.atleast_1d(t).split(rows) for t in (out, base, *deltas)), strict=True):
        into.copy_(_sum(part, others, scales, out.dtype))
    return out


def _can_write(*operands: torch.Tensor) -> bool:
    """Whether a sum may be written into a tensor, which autograd and torch.func can't and torch.compile need not."""
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
