from __future__ import annotations

from contextlib import suppress

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from adaptq_peft.quantization import (
    bitsandbytes_backend,
    dequantize_linear,
    is_quantized,
    quantize_linear,
    resolve_quantization,
    settings_of,
)

#: Largest relative error of the output of a Gaussian layer; about 1.3 times what was measured.
OUTPUT_ERROR = {"nf4": 0.12, "fp4": 0.16, "int8": 0.02}


def make_linear(bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(128, 192, bias=bias, dtype=dtype)


def make_conv1d(size=64):
    torch.manual_seed(0)
    layer = Conv1D(size, 64)  # 64 -> 64 is square: the shape does not tell in from out
    nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_output_is_close_and_the_original_untouched(name, bias):
    linear = make_linear(bias)
    before = linear.weight.detach().clone()
    quantized = quantize_linear(linear, resolve_quantization(name))
    x = torch.randn(3, 5, 128)
    expected = linear(x)
    assert (quantized(x) - expected).norm() / expected.norm() < OUTPUT_ERROR[name]
    assert torch.equal(linear.weight, before)
    assert not any(parameter.requires_grad for parameter in quantized.parameters())
    assert is_quantized(quantized)
    assert not is_quantized(linear)


def test_the_codes_are_those_of_bitsandbytes_own_layer():
    linear = make_linear()
    own = bnb.nn.Linear4bit(128, 192, quant_type="nf4", compress_statistics=True)
    own.load_state_dict(linear.state_dict())
    own = own.to("cpu")
    quantized = quantize_linear(linear, resolve_quantization("nf4"))
    ours, theirs = quantized.state_dict(), own.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_outlier_threshold_of_int8():
    settings = resolve_quantization(BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=2.5))
    layer = quantize_linear(make_linear(), settings)
    assert layer.state.threshold == settings_of(layer).outlier_threshold == 2.5


def test_the_compute_dtype_of_4_bits():
    settings = resolve_quantization(BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16))
    output = quantize_linear(make_linear(), settings)(torch.randn(4, 128))
    assert output.dtype == torch.float32
    assert torch.equal(output, output.bfloat16().float())


@pytest.mark.parametrize("size", [64, 192])
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_a_conv1d_gives_exactly_what_its_transposed_weight_gives(name, size):
    conv = make_conv1d(size)
    linear = nn.Linear(64, size)
    linear.weight.data, linear.bias.data = conv.weight.data.t().contiguous(), conv.bias.data
    settings = resolve_quantization(name)
    x = torch.randn(4, 64)
    assert torch.equal(quantize_linear(conv, settings)(x), quantize_linear(linear, settings)(x))


@pytest.mark.parametrize("make", [make_linear, make_conv1d])
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_dequantizing_gives_a_plain_layer_of_the_former_class(make, name):
    layer = make()
    quantized = quantize_linear(layer, resolve_quantization(name))
    plain = dequantize_linear(quantized)
    assert type(plain) is type(layer)
    assert plain.state_dict().keys() == layer.state_dict().keys()
    assert [p.shape for p in plain.parameters()] == [p.shape for p in layer.parameters()]
    error = (plain.weight - layer.weight).norm() / layer.weight.norm()
    assert 0 < error < OUTPUT_ERROR[name]
    x = torch.randn(2, 64 if make is make_conv1d else 128)
    torch.testing.assert_close(plain(x), quantized(x), rtol=0, atol=2e-2 if name == "int8" else 1e-5)


def test_gradients_through_a_layer_survive_evaluation_passes():
    """On CPUs with AVX512-BF16 bitsandbytes' own setting loses them in silence; on others this passes either way."""
    torch.manual_seed(0)
    linear = make_linear(dtype=torch.bfloat16)
    quantized = quantize_linear(linear, resolve_quantization("nf4"))
    dense = dequantize_linear(quantized)

    def gradient(layer):
        x = torch.randn(4, 128, generator=torch.Generator().manual_seed(3), dtype=torch.bfloat16, requires_grad=True)
        layer(x).float().pow(2).sum().backward()
        return x.grad

    quantized.eval()
    with torch.no_grad():
        quantized(torch.randn(4, 128, dtype=torch.bfloat16))
    quantized.train()
    found, expected = gradient(quantized), gradient(dense)
    assert found is not None
    assert (found - expected).norm() / expected.norm() < 2e-2


def test_training_and_evaluation_mode_give_the_same_output():
    quantized = quantize_linear(make_linear(dtype=torch.bfloat16), resolve_quantization("nf4"))
    x = torch.randn(4, 128, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(quantized.train()(x), quantized.eval()(x))


def test_weights_that_cannot_be_quantized():
    settings = resolve_quantization("nf4")
    with pytest.raises(ValueError, match="weight is on the meta device and has no values to quantize"):
        quantize_linear(nn.Linear(64, 64, device="meta"), settings)
    quantized = quantize_linear(make_linear(), settings)
    with pytest.raises(ValueError, match=r"weight has dtype torch\.uint8; only floating point weights"):
        quantize_linear(quantized, settings)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_quantized_on_the_gpu(name):
    linear = make_linear(dtype=torch.bfloat16).cuda()
    quantized = quantize_linear(linear, resolve_quantization(name))
    x = torch.randn(8, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    expected = linear(x)
    assert (quantized(x) - expected).norm() / expected.norm() < 1.2 * OUTPUT_ERROR[name]
    quantized(x).float().sum().backward()
    assert x.grad is not None


def test_the_cast_to_float16_is_logged_once_not_at_each_call(monkeypatch, caplog):
    monkeypatch.setattr(bitsandbytes_backend._FIRST_OF_EACH, "_seen", set())
    linear = quantize_linear(make_linear(), resolve_quantization("int8")).eval()
    for _ in range(3):
        linear(torch.randn(2, 128))
    assert [record.getMessage() for record in caplog.records] == [
        "MatMul8bitLt: inputs will be cast from torch.float32 to float16 during quantization"
    ]


def test_the_flag_that_keeps_gradients_is_taken_back_by_a_failure():
    layer = quantize_linear(make_linear(), resolve_quantization("nf4"))
    model = nn.Sequential(layer, nn.ReLU())
    for fails in (True, False):
        layer.support_avx512bf16_for_cpu = True
        with suppress(KeyError), bitsandbytes_backend.gradients_kept_on_cpu(model):
            assert not layer.support_avx512bf16_for_cpu
            if fails:
                raise KeyError
        assert layer.support_avx512bf16_for_cpu == fails
    assert not hasattr(model[1], "support_avx512bf16_for_cpu")
