"""Covariance-weighted shrinkage: the least-squares solution, RegMean, the ends of the path, monotone drift."""

from __future__ import annotations

import pytest
import torch

from adaptq_peft.preservation.shrinkage import ShrinkagePath, damp


def moment(seed: int, tokens: int = 200) -> torch.Tensor:
    """Second moments of inputs whose channels have very different sizes, as in real models."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, 12, generator=generator, dtype=torch.float64) @ mixing * torch.logspace(-1, 1.5, 12)
    return x.t() @ x / tokens


@pytest.fixture
def delta():
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(3))


DOMAIN, GENERAL = moment(1), moment(2)


@pytest.mark.parametrize("strength", [0.01, 1.0, 30.0])
def test_it_is_the_least_squares_solution(delta, strength):
    """Against a solver that sees inputs: columns of square roots of both moments."""
    domain, general = damp(DOMAIN, 0.01), damp(GENERAL, 0.01)
    rows = torch.cat([torch.linalg.cholesky(domain).t(), strength**0.5 * torch.linalg.cholesky(general).t()])
    targets = torch.cat([torch.linalg.cholesky(domain).t() @ delta.double().t(), torch.zeros(12, 5).double()])
    expected = torch.linalg.lstsq(rows, targets).solution.t()
    found = ShrinkagePath.of(DOMAIN, GENERAL).shrink(delta, strength)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_it_is_regmean_of_the_tuned_and_the_base_weight(delta):
    weight, strength = torch.randn(5, 12, dtype=torch.float64), 0.7
    domain, general = damp(DOMAIN, 0.01), strength * damp(GENERAL, 0.01)
    merged = ((weight + delta) @ domain + weight @ general) @ torch.linalg.inv(domain + general)
    found = weight + ShrinkagePath.of(DOMAIN, GENERAL).shrink(delta, strength)
    torch.testing.assert_close(found, merged, rtol=1e-3, atol=1e-4)


def test_the_path_starts_at_the_delta_and_ends_at_zero(delta):
    path = ShrinkagePath.of(DOMAIN, GENERAL)
    assert torch.equal(path.shrink(delta, 0), delta)
    torch.testing.assert_close(path.shrink(delta, 1e-9), delta, rtol=1e-3, atol=1e-4)
    assert path.shrink(delta, 1e12).abs().max() < 1e-5


def test_with_equal_moments_it_is_a_factor(delta):
    found = ShrinkagePath.of(DOMAIN, DOMAIN).shrink(delta, 3.0)
    torch.testing.assert_close(found, delta / 4, rtol=1e-3, atol=1e-4)


def test_drift_on_general_text_falls_and_error_on_the_domain_rises(delta):
    path = ShrinkagePath.of(DOMAIN, GENERAL)
    found = [path.shrink(delta, strength).double() for strength in (0, 0.01, 0.1, 1, 10, 100)]
    drift = [float(((d @ damp(GENERAL, 0.01)) * d).sum()) for d in found]
    error = [float((((d - delta) @ damp(DOMAIN, 0.01)) * (d - delta)).sum()) for d in found]
    assert drift == sorted(drift, reverse=True)
    assert error == sorted(error)


def test_a_direction_of_one_text_only_is_kept_or_dropped():
    domain, general = torch.diag(torch.tensor([1.0, 1.0, 1e-6])), torch.diag(torch.tensor([1.0, 1e-6, 1.0]))
    found = ShrinkagePath.of(domain, general).shrink(torch.ones(1, 3), 1.0)
    torch.testing.assert_close(found, torch.tensor([[0.5, 1.0, 0.0]]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("tokens", [0, 3])
def test_moments_without_full_rank_give_finite_values(delta, tokens):
    few = moment(4, tokens) if tokens else torch.zeros(12, 12)
    for domain, general in ((few, GENERAL), (DOMAIN, few), (few, few)):
        found = ShrinkagePath.of(domain, general).shrink(delta, 0.5)
        assert found.isfinite().all()
        assert found.norm() <= 50 * delta.norm()


def test_shrinking_a_product_is_shrinking_its_second_factor(delta):
    b, path = torch.randn(7, 5), ShrinkagePath.of(DOMAIN, GENERAL)
    torch.testing.assert_close(b @ path.shrink(delta, 0.3), path.shrink(b @ delta, 0.3), rtol=1e-3, atol=1e-3)
