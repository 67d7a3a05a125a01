"""Bytes of the states that optimizers keep for the parameters they train."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

#: bitsandbytes keeps smaller tensors in float32 (`min_8bit_size`), and one scale for this many 8-bit states.
MIN_8BIT_SIZE = 4096
STATES_PER_SCALE = 256
#: Two lookup tables of 256 float32 values, which all 8-bit states of an optimizer share.
LOOKUP_TABLES_8BIT = 2 * 256 * 4


@dataclass(frozen=True)
class TrainedParameter:
    """What the size of an optimizer's state depends on.

    Args:
        shape: of the parameter.
        dtype: of the parameter and of its gradient.
        of_embedding: it is the weight of an `nn.Embedding`: transformers' Trainer keeps its states in 32 bits.
        of_linear: it is the weight of an `nn.Linear`: GaLore projects its gradient.
    """

    shape: torch.Size
    dtype: torch.dtype
    of_embedding: bool = False
    of_linear: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the parameter, and of its gradient."""
        return self.shape.numel() * self.dtype.itemsize


def trained_parameters(model: nn.Module) -> list[TrainedParameter]:
    """The parameters of a model that require gradients, each once."""
    found: dict[nn.Parameter, TrainedParameter] = {}
    for module in model.modules():
        kinds = {"of_embedding": isinstance(module, nn.Embedding), "of_linear": isinstance(module, nn.Linear)}
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in found:
                of = kinds if name == "weight" else {}
                found[parameter] = TrainedParameter(parameter.shape, parameter.dtype, **of)
    return list(found.values())


def optimizer_state_bytes(optimizer: str, parameters: Iterable[TrainedParameter], galore_rank: int = 128) -> int:
    """Bytes of an optimizer's states after its first step, as transformers' Trainer sets it up.

    Args:
        optimizer: one of `OPTIMIZERS`, named as in `TrainingArguments(optim=...)`.
        parameters: what is trained.
        galore_rank: rank of "galore_adamw"; 128 is transformers' default.

    Raises:
        ValueError: if the optimizer is unknown.
    """
    check_optimizer(optimizer)
    sizes = OPTIMIZERS[optimizer]
    parameters = list(parameters)
    tables = LOOKUP_TABLES_8BIT if sizes is _adamw_8bit and any(map(_in_8bit, parameters)) else 0
    return tables + sum(sizes(parameter, galore_rank) for parameter in parameters)


def _adamw(parameter: TrainedParameter, rank: int) -> int:
    """Two moments in the parameter's dtype and a float32 step count (torch.optim.AdamW)."""
    return 2 * parameter.nbytes + 4


def _adamw_8bit(parameter: TrainedParameter, rank: int) -> int:
    """Two 8-bit moments with float32 scales, or two float32 ones (bitsandbytes; paged or not)."""
    size = parameter.shape.numel()
    return 2 * (size + 4 * math.ceil(size / STATES_PER_SCALE)) if _in_8bit(parameter) else 8 * size


def _in_8bit(parameter: TrainedParameter) -> bool:
    return parameter.shape.numel() >= MIN_8BIT_SIZE and not parameter.of_embedding


def _adafactor(parameter: TrainedParameter, rank: int) -> int:
    """Row and column means of the second moment, or all of it for vectors, and a scale; float32 (transformers)."""
    size, shape = parameter.shape.numel(), parameter.shape
    return 4 * (size // shape[-1] + size // shape[-2] if len(shape) >= 2 else size) + 4


def _sgd(parameter: TrainedParameter, rank: int) -> int:
    """Nothing: transformers' "sgd" is without momentum."""
    return 0


def _galore_adamw(parameter: TrainedParameter, rank: int) -> int:
    """Two moments of the gradient's projection to `rank` rows or columns, and the projection (galore_torch)."""
    if not (parameter.of_linear and len(parameter.shape) == 2):
        return 2 * parameter.nbytes
    larger, smaller = max(parameter.shape), min(parameter.shape)
    return min(rank, smaller) * (2 * larger + smaller) * parameter.dtype.itemsize


OPTIMIZERS: dict[str, Callable[[TrainedParameter, int], int]] = {
    "adamw_torch": _adamw,
    "adamw_bnb_8bit": _adamw_8bit,
    "paged_adamw_8bit": _adamw_8bit,
    "adafactor": _adafactor,
    "sgd": _sgd,
    "galore_adamw": _galore_adamw,
}


def check_optimizer(name: str) -> None:
    """Raise ValueError if the optimizer is none of `OPTIMIZERS`."""
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer is {name!r}; known are {list(OPTIMIZERS)}")
