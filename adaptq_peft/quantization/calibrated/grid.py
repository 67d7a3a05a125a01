"""The values that a 4-bit weight of bitsandbytes can take, and the layer that holds exactly these values.

bitsandbytes stores a weight [out, in] as consecutive groups of 64 codes with one float, absmax, each; a code stands
for `level[code] * absmax`. When `in` is a multiple of 64 a group is 64 neighbouring input columns of one row, which is
what calibrated rounding needs. The levels of NF4 are asymmetric (-1 to 1, 7 below zero and 8 above), so a negative
absmax mirrors them: another grid at no cost. Nested absmax (8 bits, QLoRA's "double quantization") takes either sign.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import empty_quantized
from ..bitsandbytes_backend import NESTED_BLOCK_SIZE
from ..settings import QuantizationSettings

GROUP_SIZE = 64
"""Weights that share an absmax; bitsandbytes' default, and QLoRA's."""


@dataclass(frozen=True)
class Grid:
    """The 16 levels of a 4-bit type, in ascending order.

    Args:
        levels: the levels, float32 [16].
        codes: the code that bitsandbytes stores for each of them, uint8 [16].
        boundaries: the midpoints between neighbours, float32 [15].
    """

    levels: Tensor
    codes: Tensor
    boundaries: Tensor

    def round(self, values: Tensor) -> Tensor:
        """The nearest level of each value, float32 of the same shape."""
        return self.levels[self.indices(values)]

    def indices(self, values: Tensor) -> Tensor:
        """The place in `levels` of the nearest level of each value, int64 of the same shape."""
        return torch.bucketize(values.contiguous(), self.boundaries)


@cache
def get_grid(quant_type: str, device: torch.device) -> Grid:
    """The levels of "nf4" or "fp4", read from bitsandbytes."""
    from bitsandbytes.functional import get_4bit_type

    levels, codes = get_4bit_type(quant_type, device=device).float().sort(stable=True)
    return Grid(levels, codes.to(torch.uint8), (levels[1:] + levels[:-1]) / 2)


def expand(absmax: Tensor) -> Tensor:
    """The scale of each weight: absmax [out, in / 64] to [out, in]."""
    return absmax.repeat_interleave(GROUP_SIZE, dim=1)


def largest_absmax(weight: Tensor) -> Tensor:
    """The largest magnitude of each group, which plain rounding takes as its absmax: [out, in] to [out, in / 64]."""
    return weight.unflatten(1, (-1, GROUP_SIZE)).abs().amax(dim=-1)


@dataclass(frozen=True)
class StoredAbsmax:
    """The scales of a weight the way bitsandbytes keeps them.

    Args:
        absmax: what they are when read back, float32 [out, in / 64].
        codes: what is stored: uint8 [groups] if nested, else the float32 scales themselves.
        offset: the mean that was subtracted before quantizing; `None` if not nested.
        state: bitsandbytes' `QuantState` of the 8-bit codes; `None` if not nested.
    """

    absmax: Tensor
    codes: Tensor
    offset: Tensor | None = None
    state: Any = None


def store_absmax(absmax: Tensor, nested: bool) -> StoredAbsmax:
    """Quantize scales [out, in / 64], of either sign, as bitsandbytes does, so that rounding can reckon with it."""
    import bitsandbytes.functional as bnb

    flat = absmax.float().flatten()
    if not nested:
        return StoredAbsmax(absmax.float(), flat)
    offset = flat.mean()
    codes, state = bnb.quantize_blockwise(flat - offset, blocksize=NESTED_BLOCK_SIZE)
    read_back = bnb.dequantize_blockwise(codes, state) + offset
    return StoredAbsmax(read_back.view_as(absmax), codes, offset, state)


@dataclass(frozen=True)
class GridWeight:
    """A weight on the grid.

    Args:
        indices: place of each weight in `Grid.levels`, int64 or uint8 [out, in].
        scales: its scales.
        dtype: dtype that bitsandbytes gives the weight when it reads it back: that of the original.
    """

    indices: Tensor
    scales: StoredAbsmax
    dtype: torch.dtype

    def values(self, settings: QuantizationSettings) -> Tensor:
        """The weight [out, in] in `dtype`, bit for bit what bitsandbytes reads back."""
        grid = get_grid(settings.quant_type, self.indices.device)
        return (grid.levels[self.indices.long()] * expand(self.scales.absmax)).to(self.dtype)


def pack_linear(weight: GridWeight, linear: nn.Module, settings: QuantizationSettings) -> nn.Module:
    """A frozen `Linear4bit` that holds exactly `weight`, in bitsandbytes' own layout.

    Args:
        weight: values [out, in], `in` a multiple of 64.
        linear: the layer (`nn.Linear` or `Conv1D`) that it replaces, whose bias and training mode it keeps.
        settings: the type and the nesting that `weight` was made with.
    """
    import bitsandbytes.functional as bnb

    codes = get_grid(settings.quant_type, weight.indices.device).codes[weight.indices.long()].flatten()
    packed = (codes[0::2] << 4 | codes[1::2]).view(settings.storage_dtype)
    layer: Any = empty_quantized(linear, settings)
    former = layer.weight.quant_state
    layer.weight.data = packed.view_as(layer.weight.data)
    layer.weight.quant_state = layer.quant_state = bnb.QuantState(
        absmax=weight.scales.codes,
        shape=former.shape,
        code=former.code,
        blocksize=former.blocksize,
        quant_type=former.quant_type,
        dtype=former.dtype,
        offset=weight.scales.offset,
        state2=weight.scales.state,
    )
    return layer
