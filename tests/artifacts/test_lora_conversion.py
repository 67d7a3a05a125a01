from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model, set_peft_model_state_dict
from torch import nn

from adaptq_peft import AdaptQConfig, convert_to_lora
from adaptq_peft.layer import AdaptQLayer, AdaptQLinear


def low_rank_adapter(model, rank=4, **fields):
    """An adapter whose linear deltas have the given rank, and whose other deltas are zero."""
    torch.manual_seed(0)
    config = AdaptQConfig(
        task_type="CAUSAL_LM", layers_to_transform=[1, 3], quantization="none", frozen_rank=0, **fields
    )
    wrapped = get_peft_model(model, config).eval()
    for layer in wrapped.modules():
        if isinstance(layer, AdaptQLinear):
            weight = layer.adaptq_delta["default"].weight
            weight.data = torch.randn(weight.shape[0], rank) @ torch.randn(rank, weight.shape[1]) * 0.05
    return wrapped


@pytest.mark.parametrize("rank", [4, 0.99999])
def test_low_rank_deltas_are_reproduced(model, batch, rank):
    base = copy.deepcopy(model)
    wrapped = low_rank_adapter(model)
    config, state_dict = convert_to_lora(wrapped, rank=rank)
    lora = get_peft_model(base, config).eval()
    result = set_peft_model_state_dict(lora, state_dict)
    assert result.unexpected_keys == []
    with torch.no_grad():
        expected = wrapped(**batch).logits
        torch.testing.assert_close(lora(**batch).logits, expected, rtol=1e-3, atol=1e-3)
        with wrapped.disable_adapter():
            assert not torch.allclose(wrapped(**batch).logits, expected, atol=1e-2)


def test_a_lower_rank_is_an_approximation(llama):
    wrapped = low_rank_adapter(llama, rank=16)
    _, state_dict = convert_to_lora(wrapped, rank=2)
    assert {tensor.shape[0] for name, tensor in state_dict.items() if "lora_A" in name} == {2}


def test_the_adapter_that_is_named_is_converted(llama):
    wrapped = low_rank_adapter(llama)
    fields = {"quantization": "none", "frozen_rank": 0, "init_weights": False}
    wrapped.add_adapter("second", AdaptQConfig(layers_to_transform=[1], target_modules=["q_proj"], **fields))
    _, state_dict = convert_to_lora(wrapped, rank=1.0, adapter_name="second")
    name = "base_model.model.model.layers.1.self_attn.q_proj"
    product = state_dict[f"{name}.lora_B.weight"] @ state_dict[f"{name}.lora_A.weight"]
    expected = wrapped.get_submodule(name).get_delta_weight("second")
    torch.testing.assert_close(product, expected, rtol=1e-3, atol=1e-4)


def test_modules_that_are_trained_whole_come_along(llama):
    wrapped = low_rank_adapter(llama, modules_to_save=["lm_head"])
    trained = wrapped.lm_head.modules_to_save["default"].weight
    trained.data.mul_(2)
    config, state_dict = convert_to_lora(wrapped, rank=2)
    assert list(config.modules_to_save) == ["lm_head"]
    (head,) = (tensor for name, tensor in state_dict.items() if "lm_head" in name)
    assert torch.equal(head, trained)


def test_what_lora_cannot_hold_is_said(model):
    wrapped = low_rank_adapter(model)
    norms = [m for m in wrapped.modules() if isinstance(m, AdaptQLayer) and not isinstance(m, AdaptQLinear)]
    for layer in norms[:3]:
        layer.adaptq_delta["default"].weight.data += 0.1
    with pytest.warns(UserWarning, match="LoRA can't hold the deltas of 3 norms and biases; they are left out"):
        convert_to_lora(wrapped, rank=2)


def test_an_adapter_without_linears():
    model = nn.Sequential(nn.LayerNorm(4))
    with pytest.raises(TypeError, match="Could not detect any layer that supports LoRA conversion"):
        convert_to_lora(get_peft_model(model, AdaptQConfig(target_modules=["0"])), rank=1)


@pytest.mark.parametrize("rank", [4, 6])
def test_low_rank_corrections_come_along(model, rank):
    wrapped = get_peft_model(model, AdaptQConfig(task_type="CAUSAL_LM", layers_to_transform=[3], frozen_rank=4))
    layers = {
        name: layer
        for name, layer in wrapped.named_modules()
        if isinstance(layer, AdaptQLayer) and layer.is_corrected_by("default")
    }
    for layer in layers.values():
        nn.init.normal_(layer.adaptq_low_rank_B["default"].weight, std=0.1)
    _, state_dict = convert_to_lora(wrapped, rank=rank)
    for name, layer in layers.items():
        product = state_dict[f"{name}.lora_B.weight"] @ state_dict[f"{name}.lora_A.weight"]
        torch.testing.assert_close(product, layer.correction_of("default"), rtol=1e-4, atol=1e-5)
    assert any(".layers.3." in name or ".h.3." in name for name in state_dict)
