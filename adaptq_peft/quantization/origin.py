"""Plain linears: their weights, what a quantized one was before, and ones that are made from tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Origin:
    """What a quantized linear was before.

    Args:
        linear_class: `nn.Linear` or `Conv1D`.
        dtype: dtype of its weight.
        kept: the layer itself, if it was kept. Not a submodule of the quantized one: it does not move with the model.
        calibrated: whether its codes were chosen by calibration or read from a file, so that rounding it again may
            give others.
        sample: `NUM_SAMPLED_VALUES` of its weight, by `sampled_values`; `None`: it was never seen, or had no values.
    """

    linear_class: type[nn.Module]
    dtype: torch.dtype
    kept: nn.Module | None = None
    calibrated: bool = False
    sample: list[float] | None = None

    def is_sample_of(self, weight: torch.Tensor) -> bool:
        """Whether a weight, as `linear_class` has it, may be the one that was quantized, up to bfloat16's rounding."""
        if self.sample is None:
            return True
        return are_same_samples(self.sample, sampled_values(weight, NUM_SAMPLED_VALUES))


#: Values of a weight that are kept, to know it again.
NUM_SAMPLED_VALUES = 64


def sampled_values(tensor: torch.Tensor, count: int) -> list[float]:
    """At most `count` values of a tensor of any shape and dtype, evenly spaced; all if it has fewer."""
    flat = tensor.detach().flatten()
    count = min(count, len(flat))
    return flat[[(2 * i + 1) * len(flat) // (2 * count) for i in range(count)]].float().tolist() if count else []


def are_same_samples(before: list[float], here: list[float]) -> bool:
    """Whether two results of `sampled_values` are of one tensor, up to bfloat16's rounding."""
    if len(before) != len(here):
        return False
    first, second = torch.tensor(before), torch.tensor(here)
    return bool((second - first).norm() <= 2**-8 * first.norm())


def linear_weight(linear: nn.Module) -> torch.Tensor:
    """The weight of `nn.Linear` or `Conv1D` as [out, in], without autograd; no copy."""
    weight: torch.Tensor = linear.weight.data  # type: ignore[assignment]
    return weight.t() if isinstance(linear, Conv1D) else weight


def linear_from_tensors(linear_class: type[nn.Module], weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    """A frozen `nn.Linear` with this weight [out, in], or `Conv1D` with this weight [in, out]. The bias is copied."""
    with torch.device("meta"):
        linear = linear_class(*weight.shape[::-1])
    # Straight into the dict: with `low_cpu_mem_usage=True`, registering a parameter would send it to the meta device.
    linear._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    copied = None if bias is None else nn.Parameter(bias.detach().to(weight.dtype, copy=True), requires_grad=False)
    linear._parameters["bias"] = copied
    return linear
