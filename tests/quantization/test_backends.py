from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from adaptq_peft.quantization import is_quantized, load_quantized, resolve_quantization, settings_of
from adaptq_peft.quantization.backends import check_backend


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nf4", "to nf4 with nested absmax needs bitsandbytes, which is not .*Run `pip install bitsandbytes`, or use"),
        ("hqq2", r"to hqq in 2 bits, groups of 64 needs hqq.*Run `pip install \"adaptq_peft\[hqq\]\"`, or use Adapt"),
    ],
)
def test_a_missing_package_says_how_to_install_it(name, message, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ImportError, match=message):
        check_backend(resolve_quantization(name))
    assert not is_quantized(nn.Linear(2, 2))


def test_a_module_that_is_not_quantized():
    assert not is_quantized(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"Linear is no quantized linear; known .* \['bitsandbytes', 'hqq', 'gptq'\]"):
        settings_of(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Embedding is no quantized linear"):
        load_quantized(nn.Embedding(2, 2), {"weight": torch.zeros(2, 2)})
