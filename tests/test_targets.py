from __future__ import annotations

import pytest
import torch
from torch import nn

from adaptq_peft import AdaptQConfig
from adaptq_peft.quantization import QuantizedSwap, resolve_quantization
from adaptq_peft.selection import find_blocks
from adaptq_peft.targets import find_targets


def targets(model, index=2, **fields):
    return find_targets(model, [find_blocks(model)[index]], AdaptQConfig(**fields))


def test_every_layer_with_parameters_in_the_adapted_block(llama):
    assert targets(llama) == [
        f"model.layers.2.{name}"
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
            "input_layernorm",
            "post_attention_layernorm",
        )
    ]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, {"self_attn.q_proj", "self_attn.v_proj"}),
        ({"target_modules": r".*\.mlp\.(up|down)_proj"}, {"mlp.up_proj", "mlp.down_proj"}),
        ({"target_modules": ["model.layers.2.mlp.up_proj", "model.layers.0.mlp.up_proj"]}, {"mlp.up_proj"}),
        ({"target_modules": ["mlp.up_proj"], "modules_to_save": ["up_proj"]}, set()),
        ({"target_modules": ["lm_head"]}, set()),
    ],
)
def test_target_modules_narrow_the_choice_within_the_block(llama, fields, expected):
    assert {name.removeprefix("model.layers.2.") for name in targets(llama, **fields)} == expected


def test_all_linear_leaves_the_norms(model):
    names = targets(model, target_modules="all-linear")
    assert names
    assert not any("ln_" in name or "norm" in name for name in names)


def test_excluded_layers(llama):
    assert len(targets(llama, exclude_modules=["q_proj", "input_layernorm"])) == 7
    assert targets(llama, exclude_modules=".*") == []


def test_without_blocks_the_whole_model_is_searched():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert find_targets(model, None, AdaptQConfig(target_modules=["2"])) == ["2"]


def test_a_quantized_layer_cannot_be_adapted(llama):
    block = find_blocks(llama)[2]
    QuantizedSwap(llama, [block], resolve_quantization("nf4"), lambda name: False).commit()
    with pytest.raises(
        ValueError, match=r"model\.layers\.2\.self_attn\.q_proj is quantized already.*llm_int8_skip_modu"
    ):
        targets(llama)


def test_a_module_with_both_parameters_and_layers_is_an_error():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.decay = nn.Parameter(torch.zeros(4))
            self.projection = nn.Linear(4, 4)

    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"mixer": Mixer()})])
    with pytest.raises(
        ValueError, match=r"layers\.0\.mixer \(Mixer\) holds both parameters of its own and other layers"
    ):
        targets(model, index=0)
