from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptq_peft.quantization import quantize_linear
from adaptq_peft.quantization.calibrated.grid import (
    GridWeight,
    expand,
    get_grid,
    largest_absmax,
    pack_linear,
    store_absmax,
)
from adaptq_peft.quantization.settings import QuantizationSettings

CPU = torch.device("cpu")


def settings(quant_type="nf4", nested=True, storage=torch.uint8) -> QuantizationSettings:
    return QuantizationSettings(bits=4, quant_type=quant_type, nested_absmax=nested, storage_dtype=storage)


def on_grid(weight: torch.Tensor, absmax: torch.Tensor, how: QuantizationSettings) -> GridWeight:
    scales = store_absmax(absmax, how.nested_absmax)
    indices = get_grid(how.quant_type, CPU).indices(weight.float() / expand(scales.absmax))
    return GridWeight(indices, scales, weight.dtype)


def read_back(layer: nn.Module) -> torch.Tensor:
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_rounds_to_the_nearest_level(quant_type):
    grid = get_grid(quant_type, CPU)
    values = torch.linspace(-1.3, 1.3, 997)
    nearest = (values[:, None] - grid.levels).abs().amin(dim=1)
    assert torch.equal((grid.round(values) - values).abs(), nearest)


@pytest.mark.parametrize("signs", ["positive", "mixed", "negative"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bitsandbytes_reads_back_exactly_the_values(quant_type, nested, dtype, storage, signs):
    torch.manual_seed(0)
    how = settings(quant_type, nested, storage)
    linear = nn.Linear(192, 70).to(dtype)  # 210 values of absmax: less than one nested group; 70 x 5 below is more
    absmax = largest_absmax(linear.weight.data.float())
    sign = {"positive": 1.0, "negative": -1.0, "mixed": torch.randn(absmax.shape).sign()}[signs]
    weight = on_grid(linear.weight.data, absmax * sign, how)
    layer = pack_linear(weight, linear, how)
    assert torch.equal(read_back(layer), weight.values(how))
    assert read_back(layer).dtype == dtype
    assert (read_back(layer) - linear.weight).norm() < 0.15 * linear.weight.norm()


def test_more_scales_than_one_nested_group():
    how = settings()
    linear = nn.Linear(320, 70, bias=False)
    weight = on_grid(linear.weight.data, -largest_absmax(linear.weight.data), how)
    assert weight.scales.state.absmax.numel() == 2
    assert torch.equal(read_back(pack_linear(weight, linear, how)), weight.values(how))


def test_layer_computes_with_these_values_and_keeps_bias_and_mode():
    how = settings()
    linear = nn.Linear(128, 5).eval()
    weight = on_grid(linear.weight.data, largest_absmax(linear.weight.data), how)
    layer = pack_linear(weight, linear, how)
    inputs = torch.randn(3, 128)
    torch.testing.assert_close(layer(inputs), nn.functional.linear(inputs, weight.values(how), linear.bias))
    assert layer.bias is linear.bias
    assert not layer.training
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_same_layout_as_plain_rounding():
    how = settings()
    linear = nn.Linear(128, 64, bias=False)
    plain = quantize_linear(linear, how)
    packed = pack_linear(on_grid(linear.weight.data, largest_absmax(linear.weight.data), how), linear, how)
    assert type(packed) is type(plain)
    ours, theirs = packed.state_dict(), plain.state_dict()
    assert {name: (t.shape, t.dtype) for name, t in ours.items()} == {
        name: (t.shape, t.dtype) for name, t in theirs.items()
    }


def test_loads_from_its_state_dict():
    how = settings()
    linear, other = nn.Linear(128, 64), nn.Linear(128, 64)
    packed = pack_linear(on_grid(linear.weight.data, -largest_absmax(linear.weight.data), how), linear, how)
    loaded = quantize_linear(other, how)
    loaded.load_state_dict(packed.state_dict())
    assert torch.equal(read_back(loaded), read_back(packed))


def test_conv1d_becomes_a_transposed_linear():
    how = settings()
    layer = Conv1D(24, 64)
    weight = on_grid(layer.weight.data.t().contiguous(), largest_absmax(layer.weight.data.t().contiguous()), how)
    packed = pack_linear(weight, layer, how)
    inputs = torch.randn(2, 64)
    torch.testing.assert_close(packed(inputs), layer(inputs), atol=0.05, rtol=0)
