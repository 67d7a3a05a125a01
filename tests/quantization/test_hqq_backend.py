from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import HqqConfig
from transformers.pytorch_utils import Conv1D

from adaptq_peft.quantization import (
    LeaveReasons,
    dequantize_linear,
    load_quantized,
    quantize_linear,
    quantize_on_meta,
    resolve_quantization,
    settings_of,
)
from adaptq_peft.selection import Block

quantize = pytest.importorskip("hqq.core.quantize", reason='needs `pip install "adaptq_peft[hqq]"`')

#: Largest relative error of Gaussian weights; about 1.1 times what was measured.
WEIGHT_ERROR = {"hqq4": 0.095, "hqq3": 0.2, "hqq2": 0.47}
#: Bits of a weight with the scale and the zero of its group of 64.
BITS = {"hqq4": 4.5, "hqq3": 3.7, "hqq2": 2.5}


def make_linear(in_features=128, out_features=256, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias, dtype=dtype)


def quantized(name="hqq3", **options):
    linear = make_linear(**options)
    nn.init.normal_(linear.weight, std=0.05)
    return linear, quantize_linear(linear, resolve_quantization(name))


@pytest.mark.parametrize("name", BITS)
def test_the_weights_are_those_that_hqq_reads_back(name):
    """Up to scales and zeros in float16, as in hqq's own layers by default."""
    linear, ours = quantized(name)
    config = quantize.BaseQuantizeConfig(nbits=int(name[-1]), group_size=64, axis=1)
    options = {"compute_dtype": torch.float32, "device": "cpu", "del_orig": False}
    theirs = quantize.HQQLinear(linear, config, **options)
    assert torch.equal(ours.weight, theirs.W_q)
    weight = ours.dequantize()
    torch.testing.assert_close(weight, theirs.dequantize(), rtol=0, atol=1e-3)
    error = (weight - linear.weight).norm() / linear.weight.norm()
    assert WEIGHT_ERROR[name] / 2 < error < WEIGHT_ERROR[name]
    assert torch.equal(dequantize_linear(ours).weight, weight)


@pytest.mark.parametrize("name", BITS)
def test_the_bits_of_a_weight(name):
    linear, ours = quantized(name, in_features=320, bias=False)
    tensors = [*ours.parameters(), *ours.buffers()]
    assert sum(tensor.nbytes for tensor in tensors) * 8 / linear.weight.numel() == BITS[name]
    with torch.device("meta"):
        bare = nn.Linear(320, 256, bias=False)
    planned = quantize_on_meta(bare, resolve_quantization(name))
    shapes = [(tensor.shape, tensor.dtype) for tensor in (*planned.parameters(), *planned.buffers())]
    assert shapes == [(tensor.shape, tensor.dtype) for tensor in tensors]


def test_rounding_again_gives_the_same_codes():
    (_, once), (_, again) = quantized(), quantized()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in once.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_products_and_gradients_are_those_of_the_dequantized_layer(dtype, bias):
    _, ours = quantized(bias=bias, dtype=dtype)
    plain = dequantize_linear(ours)
    assert plain.weight.dtype == dtype

    def run(layer):
        x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        y = layer(x)
        y.float().pow(2).sum().backward()
        return y, x.grad

    for found, expected in zip(run(ours), run(plain), strict=True):
        assert torch.equal(found, expected)
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_autocast_computes_in_its_dtype():
    """hqq's own layer fails in backward here: `expected m1 and m2 to have the same dtype`."""
    _, ours = quantized()
    plain = dequantize_linear(ours)
    x = torch.randn(4, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = ours(x), plain(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    (ours_grad,) = torch.autograd.grad(found.float().sum(), x)
    (plain_grad,) = torch.autograd.grad(expected.float().sum(), x)
    torch.testing.assert_close(ours_grad, plain_grad, rtol=2e-2, atol=2e-2)


def test_only_the_codes_are_kept_for_backward():
    _, ours = quantized()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        ours(torch.randn(64, 128, requires_grad=True))
    assert sum(tensor.nbytes for tensor in kept) == ours.weight.nbytes + ours.scale.nbytes + ours.zero.nbytes


def test_a_conv1d_gives_exactly_what_its_transposed_weight_gives():
    torch.manual_seed(0)
    conv = Conv1D(192, 64)
    linear = nn.Linear(64, 192)
    linear.weight.data, linear.bias.data = conv.weight.data.t().contiguous(), conv.bias.data
    settings, x = resolve_quantization("hqq4"), torch.randn(4, 64)
    ours = quantize_linear(conv, settings)
    assert torch.equal(ours(x), quantize_linear(linear, settings)(x))
    plain = dequantize_linear(ours)
    assert isinstance(plain, Conv1D)
    assert plain.weight.shape == (64, 192)


def test_scales_follow_the_model_but_not_its_dtype():
    """hqq's own layer keeps its scales in a plain dict, which no module method sees."""
    _, ours = quantized()
    before = ours.dequantize()
    copied = copy.deepcopy(nn.Sequential(ours)).half().bfloat16()[0]
    assert torch.equal(copied.dequantize(), before)
    assert {tensor.device.type for tensor in copied.to("meta").state_dict().values()} == {"meta"}


def test_the_state_dict_holds_all_of_it():
    (_, ours), (_, other) = quantized(), quantized()
    other.weight.data.zero_()
    other.scale.zero_()
    load_quantized(other, ours.state_dict())
    x = torch.randn(2, 128)
    assert torch.equal(other(x), ours(x))


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("hqq2", (65, 64), "its 65 x 64 weights are no multiple of 256, as hqq in 2 bits, groups of 64 needs"),
        ("hqq3", (65, 64), None),
        ("hqq3", (33, 30), "its 33 x 30 weights are no multiple of 64, as hqq in 3 bits, groups of 64 needs"),
        ("hqq4", (65, 64), "its 65 x 64 weights are no multiple of 128, as hqq in 4 bits, groups of 64 needs"),
    ],
)
def test_shapes_that_do_not_fit_are_left_with_a_reason(name, size, reason):
    model = nn.Module()
    model.block = nn.Sequential(nn.Linear(size[1], size[0]))
    reasons = LeaveReasons(model, resolve_quantization(name), lambda name: False)
    reasons.look_into(Block(0, "block", model.block))
    assert reasons.of("block.0", model.block[0]) == reason
    if reason is None:
        ours = quantize_linear(model.block[0], resolve_quantization(name))
        assert reasons.of("block.0", ours) is None
        assert ours(torch.randn(2, size[1])).shape == (2, size[0])


def test_scales_that_float16_cannot_hold():
    linear = make_linear()
    linear.weight.data.fill_(1e6)
    with pytest.raises(ValueError, match="a group of its weights has a scale or zero that float16 can't hold"):
        quantize_linear(linear, resolve_quantization("hqq2"))


def test_settings_of_an_hqq_config():
    settings = resolve_quantization(HqqConfig(nbits=2, group_size=32, skip_modules=["gate"]))
    assert (settings.bits, settings.backend, settings.group_size) == (2, "hqq", 32)
    assert settings.skip_modules == ("gate",)
    assert settings.describe() == "hqq in 2 bits, groups of 32"
    assert not settings.same_codes(resolve_quantization("hqq2"))
    ours = quantize_linear(make_linear(), settings)
    assert settings_of(ours).same_codes(settings)
    model = nn.Module()
    model.gate = make_linear()
    assert LeaveReasons(model, settings, lambda name: False).of("gate", model.gate) == "named in skip_modules"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nbits": 1}, r"HqqConfig with nbits=1; allowed: \[2, 3, 4, 8\]"),
        ({"nbits": 2, "axis": 0}, "HqqConfig with axis=0 and group_size=64; allowed: axis=1 and a group size"),
        ({"dynamic_config": {"mlp.up_proj": {"nbits": 2}}}, "HqqConfig with a dynamic_config; allowed: one nbits"),
    ],
)
def test_an_hqq_config_that_is_not_supported(options, message):
    with pytest.raises(ValueError, match=message):
        resolve_quantization(HqqConfig(**options))


@pytest.mark.gpu
@pytest.mark.parametrize("name", BITS)
def test_on_the_gpu(name):
    linear, on_cpu = quantized(name, dtype=torch.bfloat16)
    on_gpu = quantize_linear(linear.cuda(), resolve_quantization(name))
    error = (on_gpu.dequantize().cpu() - on_cpu.dequantize()).norm() / on_cpu.dequantize().norm()
    assert error < 0.2 * WEIGHT_ERROR[name]  # hqq computes in float16 there
    x = torch.randn(8, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    torch.testing.assert_close(on_gpu(x), dequantize_linear(on_gpu)(x))
    on_gpu(x).float().sum().backward()
    assert x.grad is not None
    moved = on_cpu.cuda()
    assert torch.isfinite(moved(x)).all()
