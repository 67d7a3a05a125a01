"""Searches the absmax of each group, so that the weighted rounding error is least, instead of taking the maximum.

A smaller absmax clips the largest weight of a group and rounds all others on a finer grid (AWQ's clipping search, Lin
et al. 2023, arXiv:2306.00978). A negative absmax mirrors the asymmetric NF4 grid (the signed normalisation of BOF4-S,
arXiv:2505.06653).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .grid import GROUP_SIZE, Grid, largest_absmax

RATIOS = (0.8, 0.86, 0.92, 1.0)
"""Candidates relative to the largest magnitude of the group. More of them gained nothing after the refinement."""

REFINEMENTS = 2
"""Rounds of least squares for absmax given the codes, then codes given absmax."""

ROWS_AT_ONCE = 64
"""Rows searched together: the temporary tensors of 64 x 1536 weights stay in a CPU's cache."""


def search_absmax(weight: Tensor, importance: Tensor, grid: Grid) -> Tensor:
    """The absmax of each group that makes sum_j importance_j (w_j - q_j)^2 least, among candidates of both signs.

    Args:
        weight: [out, in], `in` a multiple of 64.
        importance: weight of each input column's error, [in], non-negative.
        grid: the levels.

    Returns:
        Scales [out, in / 64], float32, never zero; where the search finds nothing better, the largest magnitude.
    """
    parts = [_search_rows(rows, importance, grid) for rows in weight.float().split(ROWS_AT_ONCE)]
    return torch.cat(parts)


def _search_rows(weight: Tensor, importance: Tensor, grid: Grid) -> Tensor:
    groups = weight.unflatten(1, (-1, GROUP_SIZE))
    column_weights = importance.float().unflatten(0, (-1, GROUP_SIZE))
    best = largest_absmax(weight).clamp_min(torch.finfo(torch.float32).tiny)
    largest, least = best, torch.full_like(best, torch.inf)
    for ratio in RATIOS:
        for sign in (1.0, -1.0):
            best, least = _keep_better(largest * (sign * ratio), best, least, groups, column_weights, grid)
    for _ in range(REFINEMENTS):
        refined = _least_squares_absmax(best, groups, column_weights, grid)
        best, least = _keep_better(refined, best, least, groups, column_weights, grid)
    return best


def _keep_better(
    candidate: Tensor, best: Tensor, least: Tensor, groups: Tensor, column_weights: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    scale = candidate.unsqueeze(-1)
    error = grid.round(groups / scale).mul_(scale).sub_(groups).square_().mul_(column_weights).sum(dim=-1)
    better = (error < least) & (candidate != 0)
    return torch.where(better, candidate, best), torch.where(better, error, least)


def _least_squares_absmax(absmax: Tensor, groups: Tensor, column_weights: Tensor, grid: Grid) -> Tensor:
    levels = grid.round(groups / absmax.unsqueeze(-1))
    weighted = levels * column_weights
    power = (weighted * levels).sum(dim=-1)
    return torch.where(power > 0, (weighted * groups).sum(dim=-1) / power.clamp_min(1e-30), absmax)
