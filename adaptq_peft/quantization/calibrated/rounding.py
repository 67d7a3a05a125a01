"""Rounds a weight to the grid so that the layer's output on calibration inputs changes least.

All of it minimises tr(E H E^T), E = W - Q, with H the mean of x x^T over calibration inputs x: the mean squared error
of the layer's output. `round_with_error_feedback` is GPTQ (Frantar et al. 2022, arXiv:2210.17323);
`descend_by_coordinates` starts where GPTQ ends and visits each column again, given all others (QuantEase, Behdin et
al. 2023, arXiv:2309.01885). The scales are fixed before ("static groups"), already quantized if they are nested: the
rounding makes up for that.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from .grid import GROUP_SIZE, Grid, expand

COLUMNS_AT_ONCE = 64
"""Columns between two updates of all later columns; the result does not depend on it."""


def damped(second_moment: Tensor, damping: float) -> Tensor:
    """H + damping * mean(diag(H)) * I, [in, in]; the identity where no input was ever different from zero."""
    mean = second_moment.diagonal().mean()
    if mean == 0:
        return torch.eye(len(second_moment), dtype=second_moment.dtype, device=second_moment.device)
    return second_moment + torch.diag(torch.full_like(second_moment.diagonal(), float(damping * mean)))


class DampedMoment:
    """The damped H of a group of linears with the same inputs (q, k, v), and its factorizations, each made once.

    Args:
        second_moment: H, [in, in], float32; not changed.
        damping: as for `damped`.

    Attributes:
        matrix: H, damped, [in, in], positive definite.
    """

    def __init__(self, second_moment: Tensor, damping: float) -> None:
        self.matrix = damped(second_moment, damping)

    @cached_property
    def cholesky(self) -> Tensor:
        """L with L L^T = H, [in, in]."""
        return torch.linalg.cholesky(self.matrix)

    @cached_property
    def uncorrectable(self) -> Tensor:
        """1 / diag(H^-1), [in]: what a unit error in a column costs once all other columns have made up for it.

        The saliency of Optimal Brain Surgeon (Hassibi and Stork 1993), which weighs columns for error feedback.
        """
        return 1 / torch.cholesky_inverse(self.cholesky).diagonal()

    @cached_property
    def order(self) -> Tensor:
        """Columns with the largest inputs first, int64 [in]."""
        return self.matrix.diagonal().argsort(descending=True)

    @cached_property
    def feedback(self) -> Tensor:
        """U, upper triangular, with U^T U = H^-1, rows and columns in `order`: GPTQ's factor."""
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.matrix[self.order][:, self.order]))
        return torch.linalg.cholesky(inverse, upper=True)


def asymmetric_target(weight: Tensor, second_moment: DampedMoment, difference: Tensor) -> Tensor:
    """The weight that, on the inputs x of the quantized model, comes closest to what W gives on the original ones y.

    W + W (C - H) H^-1 with C the mean of y x^T: least squares for |W y - Q x|^2, by the damping drawn towards W. To
    round it under H is to minimise that distance, since |W y - Q x|^2 = |(target - Q) x|^2 + what no Q changes. The
    objective of GPTAQ (Li et al. 2025, arXiv:2504.02692), solved before rounding instead of within.

    Args:
        weight: W, [out, in], float32.
        second_moment: H.
        difference: C - H of the undamped H, [in, in].
    """
    correction = torch.cholesky_solve((weight @ difference).t(), second_moment.cholesky)
    return weight + correction.t()


def round_to_nearest(weight: Tensor, absmax: Tensor, grid: Grid) -> Tensor:
    """The place in `grid.levels` of the nearest value of each weight: uint8 [out, in].

    Args:
        weight: [out, in].
        absmax: scales [out, in / 64], of either sign, not zero.
        grid: the levels.
    """
    return grid.indices(weight / expand(absmax)).to(torch.uint8)


def round_with_error_feedback(weight: Tensor, absmax: Tensor, second_moment: DampedMoment, grid: Grid) -> Tensor:
    """GPTQ: round column by column, the largest inputs first, and let later columns make up for the error so far.

    Args:
        weight: [out, in], float32.
        absmax: scales [out, in / 64] as they will be read back, not zero.
        second_moment: H.
        grid: the levels.

    Returns:
        The place in `grid.levels` of each weight: uint8 [out, in].
    """
    order, factor = second_moment.order, second_moment.feedback
    left = weight[:, order].t().contiguous()  # [in, out]: a column of the weight is a row here, contiguous
    scales = expand(absmax)[:, order].t().contiguous()
    indices = torch.empty_like(left, dtype=torch.uint8)
    for start in range(0, len(left), COLUMNS_AT_ONCE):
        stop = min(start + COLUMNS_AT_ONCE, len(left))
        errors = _feed_back(
            left[start:stop], scales[start:stop], factor[start:stop, start:stop], indices[start:stop], grid
        )
        left[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    restored = torch.empty_like(indices)
    restored[order] = indices
    return restored.t().contiguous()


def _feed_back(left: Tensor, scales: Tensor, factor: Tensor, indices: Tensor, grid: Grid) -> Tensor:
    """Round the rows of `left` [columns, out] in order, into `indices`; returns the scaled errors [columns, out]."""
    errors = torch.empty_like(left)
    for row in range(len(left)):
        chosen = grid.indices(left[row] / scales[row])
        indices[row] = chosen
        errors[row] = (left[row] - grid.levels[chosen] * scales[row]) / factor[row, row]
        left[row + 1 :].addr_(factor[row, row + 1 :], errors[row], alpha=-1)
    return errors


def descend_by_coordinates(
    weight: Tensor, indices: Tensor, absmax: Tensor, second_moment: Tensor, grid: Grid, sweeps: int
) -> Tensor:
    """Give each column in turn the best levels, given those of all others. No sweep makes the error larger.

    Args:
        weight: [out, in], float32.
        indices: where to start: place in `grid.levels` of each weight, [out, in].
        absmax: scales [out, in / 64] as they will be read back, not zero.
        second_moment: H, damped, [in, in], float32, positive definite.
        grid: the levels.
        sweeps: how often each column is visited.

    Returns:
        uint8 [out, in].
    """
    scales = expand(absmax).t().contiguous()
    chosen = indices.t().contiguous()
    values = grid.levels[chosen.long()] * scales
    for _ in range(sweeps):
        residual = second_moment @ (weight.t() - values)  # [in, out], kept up to date block by block
        for start in range(0, len(values), GROUP_SIZE):
            block = slice(start, start + GROUP_SIZE)
            before = values[block].clone()
            inner = second_moment[block, block]
            _descend_block(values[block], chosen[block], scales[block], residual[block].clone(), inner, grid)
            residual.addmm_(second_moment[:, block], values[block] - before, alpha=-1)
    return chosen.t().contiguous()


def _descend_block(
    values: Tensor, chosen: Tensor, scales: Tensor, residual: Tensor, second_moment: Tensor, grid: Grid
) -> None:
    """One visit to each of the rows of `values` [columns, out], in place."""
    for row in range(len(values)):
        best = grid.indices((values[row] + residual[row] / second_moment[row, row]) / scales[row])
        change = grid.levels[best] * scales[row] - values[row]
        chosen[row] = best
        values[row] += change
        residual.addr_(second_moment[:, row], change, alpha=-1)
