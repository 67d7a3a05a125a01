from __future__ import annotations

import torch

from adaptq_peft.quantization.calibrated.absmax_search import search_absmax
from adaptq_peft.quantization.calibrated.grid import expand, get_grid, largest_absmax

GRID = get_grid("nf4", torch.device("cpu"))


def group_errors(weight, absmax, importance):
    """Weighted squared error of each group, by the definition."""
    error = (GRID.round(weight / expand(absmax)) * expand(absmax) - weight) ** 2 * importance
    return error.unflatten(1, (-1, 64)).sum(dim=-1)


def brute_force(weight, importance):
    """The least error of each group over a fine grid of scales of both signs."""
    ratios = torch.linspace(0.5, 1.2, 141)
    candidates = [largest_absmax(weight) * ratio * sign for ratio in ratios for sign in (1, -1)]
    return torch.stack([group_errors(weight, absmax, importance) for absmax in candidates]).amin(dim=0)


def test_close_to_the_best_of_all_scales():
    torch.manual_seed(0)
    weight, importance = torch.randn(100, 128), torch.rand(128) ** 3
    found = group_errors(weight, search_absmax(weight, importance, GRID), importance)
    best = brute_force(weight, importance)
    plain = group_errors(weight, largest_absmax(weight), importance)
    assert (found <= plain).all()
    assert found.sum() < 1.05 * best.sum()
    assert best.sum() < 0.85 * plain.sum()


def test_exact_where_the_weight_is_on_a_mirrored_grid():
    torch.manual_seed(0)
    scales = torch.rand(8, 2) + 0.5
    levels = GRID.levels[torch.randint(16, (8, 128))]
    levels[:, ::64] = 1.0  # the end of the longer side of the grid
    weight = -levels * expand(scales)
    found = search_absmax(weight, torch.ones(128), GRID)
    torch.testing.assert_close(found, -scales)


def test_zeros_and_ignored_columns_give_finite_scales_that_are_not_zero():
    weight = torch.zeros(3, 128)
    weight[1] = torch.randn(128)
    for importance in (torch.zeros(128), torch.ones(128)):
        found = search_absmax(weight, importance, GRID)
        assert torch.isfinite(found).all()
        assert (found != 0).all()
