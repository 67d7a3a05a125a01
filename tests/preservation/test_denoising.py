"""Thresholding: signal is kept, noise goes."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from adaptq_peft.preservation import threshold_deltas
from adaptq_peft.preservation.denoising import hard_threshold


@pytest.mark.parametrize("shape", [(60, 60), (40, 120)])
def test_low_rank_signal_is_found_in_noise(shape):
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(shape[0], 3, generator=generator) @ torch.randn(3, shape[1], generator=generator)
    noisy = signal + 0.3 * torch.randn(shape, generator=generator)
    denoised, rank = hard_threshold(noisy)
    assert rank == 3
    assert (denoised - signal).norm() < 0.5 * (noisy - signal).norm()


def test_pure_noise_leaves_nothing():
    noise = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    denoised, rank = hard_threshold(noise)
    assert rank == 0
    assert denoised.shape == (100, 100)
    assert not denoised.any()


def test_matrices_are_thresholded_and_norms_are_not(adapt):
    model = adapt(std=0.1)
    norms = {n: p.clone() for n, p in model.named_parameters() if "adaptq_delta" in n and p.ndim == 1}
    kept = threshold_deltas(model)
    assert len(kept) == 2 * 7
    for name, (rank, size) in kept.items():
        assert torch.linalg.matrix_rank(model.get_parameter(name)) == rank <= size
    assert all(torch.equal(model.get_parameter(name), value) for name, value in norms.items())


def test_other_methods_are_refused(load):
    model = get_peft_model(load(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="adapter 'default' has no delta that is a matrix"):
        threshold_deltas(model)
