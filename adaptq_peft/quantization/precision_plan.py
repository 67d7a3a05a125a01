"""Which linear gets how many bits: the plan whose predicted rise of the loss is least within a budget of bytes.

The model of the rise is additive: that of a plan is the sum of its linears' (`measure_sensitivity`). So this is a
multiple-choice knapsack problem. All linears begin with their smallest form; then steps are taken in the order of what
they save per byte, along the lower convex hull of each linear's (bytes, rise), as far as they fit. That is the optimum
of the problem with fractions (Sinha and Zoltners 1979), so the plan is above the true optimum by less than the first
step that did not fit saves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from accelerate.utils import convert_file_size_to_int

from .bitsandbytes_backend import NESTED_BLOCK_SIZE
from .calibrated.grid import GROUP_SIZE
from .sensitivity import Sensitivity
from .settings import QuantizationSettings, resolve_quantization

#: What a plan chooses from, by the names that `AdaptQConfig.quantization` has for them; "none": as in the model.
PRECISIONS: dict[str, QuantizationSettings | None] = {
    name: resolve_quantization(name) for name in ("nf4", "int8", "none")
}

_BITS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*bits?\s*")


class LinearSize(NamedTuple):
    """What counts for the bytes of a linear's weight: outputs, inputs, and bytes a weight as it is."""

    out_features: int
    in_features: int
    bytes_a_weight: int

    @property
    def num_weights(self) -> int:
        return self.out_features * self.in_features

    def stored_bytes(self, settings: QuantizationSettings | None) -> int:
        """Bytes of codes and scales, lookup tables and the bias apart; `None`: of the weight as it is."""
        if settings is None:
            return self.num_weights * self.bytes_a_weight
        if settings.bits == 8:
            return self.num_weights + 4 * self.out_features
        groups = math.ceil(self.num_weights / GROUP_SIZE)
        scales = groups + 4 * math.ceil(groups / NESTED_BLOCK_SIZE) + 4 if settings.nested_absmax else 4 * groups
        return math.ceil(self.num_weights / 2) + scales


@dataclass(frozen=True)
class PrecisionPlan:
    """A precision for each linear.

    Args:
        precision: dotted name -> a key of `PRECISIONS`.
        stored_bytes: bytes of these weights, as `LinearSize.stored_bytes` counts them.
        num_weights: number of weights.
        predicted_rise: sum of the predicted rises of the loss, in nats a token; `None` if it was not predicted.
    """

    precision: dict[str, str]
    stored_bytes: int
    num_weights: int
    predicted_rise: float | None = None

    @property
    def bits_a_weight(self) -> float:
        """Mean over all weights, scales included."""
        return 8 * self.stored_bytes / max(self.num_weights, 1)

    def __str__(self) -> str:
        counts = [f"{list(self.precision.values()).count(name)} {name}" for name in PRECISIONS]
        rise = "" if self.predicted_rise is None else f", predicted rise of the loss {self.predicted_rise:.4g} nats"
        return f"{', '.join(counts)}: {self.bits_a_weight:.3f} bits a weight{rise}"


def memory_bytes(size: int | str) -> int:
    """Bytes of a size that may have a unit, "1.5GiB" or "700MB", in capitals or not.

    Raises:
        ValueError: if it has another form, or is not finite.
    """
    try:  # a small b would be bits
        return convert_file_size_to_int(size.upper() if isinstance(size, str) else size)
    except OverflowError as error:
        raise ValueError(
            f"size is {size!r}; allowed: bytes as an integer, or a text such as 1.5GiB or 700MB"
        ) from error


def weight_budget_bytes(budget: int | str, num_weights: int) -> int:
    """A budget in bytes.

    Args:
        budget: bytes; or a text: bytes with a unit, "1.5GiB" or "700MB", or the mean of each weight, "5.0 bits".
        num_weights: how many weights there are.

    Raises:
        ValueError: if it has another form, or is not above zero.
    """
    faulty = ValueError(
        f'weight_budget is {budget!r}; allowed: bytes as an integer above 0, "1.5GiB" or "700MB", or the bits of a '
        'weight on average, "5.0 bits"'
    )
    if isinstance(budget, bool) or not isinstance(budget, (int, str)):
        raise faulty
    bits = _BITS.fullmatch(budget) if isinstance(budget, str) else None
    try:
        found = float(bits[1]) * num_weights / 8 if bits else memory_bytes(budget)
    except ValueError as error:
        raise faulty from error
    if (float(bits[1]) if bits else found) <= 0:
        raise faulty
    return math.floor(found)


def allocate_precision(
    sensitivity: Sensitivity, sizes: Mapping[str, LinearSize], weight_budget: int | str
) -> PrecisionPlan:
    """The plan within a budget whose predicted rise of the loss is least, as far as the module's text says.

    Args:
        sensitivity: for each linear the rise with "nf4" and "int8"; that of "none" is zero.
        sizes: of each linear.
        weight_budget: as for `weight_budget_bytes`; it is about the weights of these linears and nothing else.

    Raises:
        ValueError: if not even the smallest forms fit, with what they take, or the budget has another form.
    """
    num_weights = sum(sizes[name].num_weights for name in sensitivity)
    hulls = {name: _hull(rises, sizes[name]) for name, rises in sensitivity.items()}
    limit = weight_budget_bytes(weight_budget, num_weights)
    least = sum(hull[0].size for hull in hulls.values())
    if least > limit:
        raise ValueError(
            f"weight_budget is {weight_budget!r}, {limit:,} bytes for the {num_weights:,} weights of {len(sizes)} "
            f"linears; the least that they take is {least:,} bytes ({8 * least / num_weights:.3f} bits a weight). "
            "Raise it, or adapt more blocks."
        )
    chosen = _fill(hulls, limit - least)
    return PrecisionPlan(
        precision={name: form.precision for name, form in chosen.items()},
        stored_bytes=sum(form.size for form in chosen.values()),
        num_weights=num_weights,
        predicted_rise=math.fsum(form.rise for form in chosen.values()),
    )


class _Form(NamedTuple):
    """A precision of one linear: its bytes, and the predicted rise of the loss."""

    size: int
    rise: float
    precision: str


class _Step(NamedTuple):
    """From one form of a linear to the next larger one on its hull."""

    saved: float
    size: int
    name: str
    to: int

    @property
    def saved_per_byte(self) -> float:
        return self.saved / self.size


def _hull(rises: Mapping[str, float], size: LinearSize) -> list[_Form]:
    """The forms on the lower convex hull of (bytes, rise), in the order of bytes: each saves less per byte."""
    forms = sorted(
        _Form(size.stored_bytes(settings), 0.0 if settings is None else rises[name], name)
        for name, settings in PRECISIONS.items()
    )
    hull: list[_Form] = []
    for form in forms:
        if hull and form.rise >= hull[-1].rise:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], form):
            hull.pop()
        hull.append(form)
    return hull


def _slope(before: _Form, after: _Form) -> float:
    """What the step saves per byte."""
    return (before.rise - after.rise) / (after.size - before.size)


def _fill(hulls: Mapping[str, list[_Form]], free: int) -> dict[str, _Form]:
    """Take steps, the best ones per byte first, as far as they fit; after one that does not, smaller ones."""
    steps = [
        _Step(before.rise - after.rise, after.size - before.size, name, index + 1)
        for name, hull in hulls.items()
        for index, (before, after) in enumerate(pairwise(hull))
    ]
    reached = dict.fromkeys(hulls, 0)
    for step in sorted(steps, key=lambda step: step.saved_per_byte, reverse=True):
        if step.size <= free and reached[step.name] == step.to - 1:
            reached[step.name], free = step.to, free - step.size
    return {name: hulls[name][index] for name, index in reached.items()}
