from __future__ import annotations

import pytest
import torch

from adaptq_peft.quantization.calibrated import rounding
from adaptq_peft.quantization.calibrated.grid import expand, get_grid, largest_absmax
from adaptq_peft.quantization.calibrated.rounding import (
    DampedMoment,
    asymmetric_target,
    damped,
    descend_by_coordinates,
    round_to_nearest,
    round_with_error_feedback,
)

GRID = get_grid("nf4", torch.device("cpu"))


def problem(out=6, columns=128, seed=0):
    """A weight, its scales and the second moment of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(400, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    weight = torch.randn(out, columns, generator=generator)
    signs = torch.randn(out, columns // 64, generator=generator).sign()
    return weight, largest_absmax(weight) * signs, damped(inputs.t() @ inputs / len(inputs), 0.01)


def values(indices, absmax):
    return GRID.levels[indices.long()] * expand(absmax)


def error(weight, indices, absmax, moment):
    difference = weight - values(indices, absmax)
    return ((difference @ moment) * difference).sum(dim=1)


def brute_force_gptq(weight, absmax, moment):
    """GPTQ as it is derived: after each column, the free ones solve their least squares problem anew."""
    order = moment.diagonal().argsort(descending=True).tolist()
    scales, chosen = expand(absmax), torch.empty(weight.shape, dtype=torch.uint8)
    current = weight.double().clone()
    moment = moment.double()
    for place, column in enumerate(order):
        chosen[:, column] = GRID.indices((current[:, column] / scales[:, column]).float().contiguous())
        rounded = GRID.levels[chosen[:, column].long()] * scales[:, column]
        later = order[place + 1 :]
        change = (current[:, column] - rounded.double())[:, None]
        current[:, column] = rounded.double()
        if later:
            response = torch.linalg.solve(moment[later][:, later], moment[later][:, [column]])
            current[:, later] += change @ response.t()
    return chosen


def test_error_feedback_equals_the_derivation():
    weight, absmax, moment = problem()
    found = round_with_error_feedback(weight, absmax, DampedMoment(moment, 0), GRID)
    expected = brute_force_gptq(weight, absmax, moment)
    assert (found == expected).float().mean() > 0.995  # float32 against float64: a tie may fall the other way
    torch.testing.assert_close(
        error(weight, found, absmax, moment), error(weight, expected, absmax, moment), rtol=0.02, atol=0
    )


def test_block_of_columns_does_not_matter(monkeypatch):
    weight, absmax, moment = problem()
    first = round_with_error_feedback(weight, absmax, DampedMoment(moment, 0), GRID)
    monkeypatch.setattr(rounding, "COLUMNS_AT_ONCE", 7)
    assert (round_with_error_feedback(weight, absmax, DampedMoment(moment, 0), GRID) == first).float().mean() > 0.995


def test_each_step_lowers_the_error():
    weight, absmax, moment = problem(out=40)
    nearest = round_to_nearest(weight, absmax, GRID)
    feedback = round_with_error_feedback(weight, absmax, DampedMoment(moment, 0), GRID)
    errors = [error(weight, indices, absmax, moment).sum() for indices in (nearest, feedback)]
    for sweeps in (1, 2, 4):
        descended = descend_by_coordinates(weight, feedback, absmax, moment, GRID, sweeps)
        errors.append(error(weight, descended, absmax, moment).sum())
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.97 * errors[1]
    assert errors[2] >= errors[3] >= errors[4]


def test_descent_ends_where_no_single_change_helps():
    weight, absmax, moment = problem(out=2, columns=64)
    start = round_to_nearest(weight, absmax, GRID)
    found = descend_by_coordinates(weight, start, absmax, moment, GRID, sweeps=50)
    least = error(weight, found, absmax, moment)
    for column in range(64):
        for level in range(16):
            other = found.clone()
            other[:, column] = level
            assert (error(weight, other, absmax, moment) >= least * (1 - 1e-5)).all()


def test_descent_leaves_its_start_alone():
    weight, absmax, moment = problem()
    start = round_to_nearest(weight, absmax, GRID)
    kept = start.clone()
    descend_by_coordinates(weight, start, absmax, moment, GRID, sweeps=2)
    assert torch.equal(start, kept)


def test_diagonal_moment_means_round_to_nearest():
    weight, absmax, _ = problem()
    moment = torch.diag(torch.rand(128) + 0.1)
    nearest = round_to_nearest(weight, absmax, GRID)
    assert torch.equal(round_with_error_feedback(weight, absmax, DampedMoment(moment, 0), GRID), nearest)
    assert torch.equal(descend_by_coordinates(weight, nearest, absmax, moment, GRID, 2), nearest)


@pytest.mark.parametrize("moment", [torch.zeros(64, 64), torch.ones(64, 64), torch.diag(torch.eye(64)[3])])
def test_damping_makes_any_moment_positive_definite(moment):
    torch.linalg.cholesky(damped(moment, 0.01))


def test_the_linears_of_a_group_share_the_factorizations(monkeypatch):
    """Factoring is what costs; its results are those of a moment that is used once."""
    weight, absmax, moment = problem()
    calls, original = [], torch.linalg.cholesky
    monkeypatch.setattr(
        torch.linalg, "cholesky", lambda *args, **options: calls.append(1) or original(*args, **options)
    )
    shared = DampedMoment(moment, 0.1)
    for part in weight.split(2):
        scales = absmax[: len(part)]
        alone = DampedMoment(moment, 0.1)
        calls.clear()
        target = asymmetric_target(part, alone, moment)
        found = round_with_error_feedback(target, scales, alone, GRID)
        assert torch.equal(asymmetric_target(part, shared, moment), target)
        assert torch.equal(round_with_error_feedback(target, scales, shared, GRID), found)
        assert torch.equal(shared.uncorrectable, alone.uncorrectable)
    assert len(calls) == 3  # all of them for `alone`


def test_the_asymmetric_target_is_the_ridge_regression_of_the_original_outputs():
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(6, 16, generator=generator, dtype=torch.float64)
    x = torch.randn(200, 16, generator=generator, dtype=torch.float64)
    y = x + 0.3 * torch.randn(200, 16, generator=generator, dtype=torch.float64)
    moment, cross = x.t() @ x / 200, y.t() @ x / 200
    target = asymmetric_target(weight, DampedMoment(moment + 0.1 * torch.eye(16), 0), cross - moment)
    # |W y - T x|^2 / 200 + 0.1 |T - W|^2 as one least squares problem
    root = (0.1 * 200) ** 0.5 * torch.eye(16, dtype=torch.float64)
    inputs, outputs = torch.cat([x, root]), torch.cat([y @ weight.t(), root @ weight.t()])
    torch.testing.assert_close(target, torch.linalg.lstsq(inputs, outputs).solution.t())


def test_equal_inputs_have_the_weight_itself_as_target():
    weight, _, moment = problem()
    assert torch.equal(asymmetric_target(weight, DampedMoment(moment, 0), torch.zeros_like(moment)), weight)
