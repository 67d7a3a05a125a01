from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptq_peft.quantization import (
    QuantizationSettings,
    dequantize_linear,
    empty_quantized,
    is_quantized,
    load_quantized,
    origin_of,
    quantize_linear,
    resolve_quantization,
    settings_of,
)
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


@pytest.mark.parametrize("make", [nn.Linear, Conv1D])
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "plain absmax", "in bfloat16", "hqq2", "hqq3", "hqq4"])
def test_an_empty_layer_takes_the_codes_of_another(quantization, make):
    settings = {
        "plain absmax": QuantizationSettings(bits=4, nested_absmax=False),
        "in bfloat16": QuantizationSettings(bits=4, storage_dtype=torch.bfloat16),
    }.get(quantization) or resolve_quantization(quantization)
    linear = make(320, 64).eval().to(torch.bfloat16)
    full, empty = quantize_linear(linear, settings), empty_quantized(linear, settings)
    forms = [{key: (t.shape, t.dtype, t.device) for key, t in layer.state_dict().items()} for layer in (full, empty)]
    assert forms[0].keys() == forms[1].keys()
    assert all(forms[1][key] == form for key, form in forms[0].items() if ".quant_state." not in key)  # JSON
    assert settings_of(empty) == settings_of(full)
    assert (origin_of(empty), empty.training) == (origin_of(full), False)
    assert not any(parameter.requires_grad for parameter in empty.parameters())
    load_quantized(empty, full.state_dict())
    inputs = torch.randn(3, linear.weight.shape[0 if make is Conv1D else 1], dtype=torch.bfloat16)
    assert torch.equal(empty(inputs), full(inputs))
    assert torch.equal(dequantize_linear(empty).weight, dequantize_linear(full).weight)


def test_an_empty_layer_of_a_weight_that_can_not_be_quantized():
    for build in (quantize_linear, empty_quantized):
        with pytest.raises(ValueError, match="its weight is on the meta device and has no values to quantize"):
            build(nn.Linear(64, 64, device="meta"), resolve_quantization("nf4"))
