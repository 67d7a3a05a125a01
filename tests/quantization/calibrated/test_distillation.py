from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import nn

from adaptq_peft.quantization import quantize_linear
from adaptq_peft.quantization.calibrated.distillation import DistillationSettings, distill
from adaptq_peft.quantization.calibrated.grid import rescale_rows
from adaptq_peft.quantization.settings import QuantizationSettings
from adaptq_peft.selection import find_blocks
from adaptq_peft.selection.calibration import calibration_batches

NF4 = QuantizationSettings(bits=4)


def read_back(layer):
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


@pytest.mark.parametrize("nested", [True, False])
def test_rescaled_rows(nested):
    how = QuantizationSettings(bits=4, nested_absmax=nested)
    linear = nn.Linear(128, 96)
    layer = quantize_linear(linear, how)
    before, codes, bias = read_back(layer), layer.weight.data.clone(), linear.bias.data.clone()
    factors = torch.linspace(0.9, 1.1, 96)
    rescale_rows(layer, factors)
    tolerance = {"rtol": 0, "atol": 2e-3 if nested else 1e-7}
    torch.testing.assert_close(read_back(layer), before * factors[:, None], **tolerance)
    torch.testing.assert_close(layer.bias.data, bias * factors)
    assert torch.equal(linear.bias.data, bias)
    assert torch.equal(layer.weight.data, codes)
    assert torch.equal(layer.weight.quant_state.absmax, layer.quant_state.absmax)


def prepared(make_model, samples, kind="llama"):
    model = make_model(kind, num_layers=3).eval()
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = torch.randn_like(parameter) * 0.08
    block = find_blocks(model)[1]
    layers = {
        f"{block.name}.{name}": quantize_linear(module, NF4)
        for name, module in block.module.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
    }
    vectors = [f"{block.name}.{name}" for name, p in block.module.named_parameters() if p.ndim == 1]
    batches = calibration_batches(model, samples, samples=60, max_length=32, batch_size=16)
    return model, layers, [name for name in vectors if "norm" in name or "ln_" in name], batches


@torch.no_grad()
def divergence(model, layers, vectors, batches):
    """Mean KL between the model and the model with these layers and vectors."""
    expected = [model(**batch).logits.log_softmax(-1) for batch in batches]
    former = {name: model.get_submodule(name) for name in layers}
    kept = {name: model.get_parameter(name).data for name in vectors}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    for name, values in vectors.items():
        model.get_parameter(name).data = values
    found = [model(**batch).logits.log_softmax(-1) for batch in batches]
    for name, layer in former.items():
        model.set_submodule(name, layer)
    for name, values in kept.items():
        model.get_parameter(name).data = values
    total = count = 0.0
    for batch, p, q in zip(batches, expected, found, strict=True):
        mask = batch["attention_mask"]
        total += float(((p.exp() * (p - q)).sum(-1) * mask).sum())
        count += float(mask.sum())
    return total / count


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_predictions_come_closer_and_the_model_is_as_before(make_model, samples, kind):
    model, layers, norms, batches = prepared(make_model, samples, kind)
    assert norms
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    model.get_parameter(norms[0]).requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    codes = {name: layer.weight.data.clone() for name, layer in layers.items()}
    start = divergence(model, layers, {}, batches)
    settings = DistillationSettings(learning_rate=0.02, epochs=15)
    vectors = distill(model, layers, norms, batches, settings)
    assert divergence(model, layers, vectors, batches) < 0.8 * start
    assert set(vectors) == set(norms)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert dict(model.named_modules()) == modules
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(torch.equal(codes[name], layer.weight.data) for name, layer in layers.items())
    assert not any(module._forward_hooks for module in [*model.modules(), *layers.values()])


def test_a_model_that_predicts_no_tokens_is_refused(make_model, samples):
    model, _, _, batches = prepared(make_model, samples)
    with pytest.raises(ValueError, match="LlamaModel is not a causal language model; use quantization_calibration="):
        distill(model.model, {}, [], batches, DistillationSettings())
