from __future__ import annotations

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from torch import nn

from adaptq_peft import AdaptQConfig
from adaptq_peft.block_forms import quantize_blocks
from adaptq_peft.quantization import resolve_quantization
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


def test_block_1_is_not_taken_for_block_10(make_model):
    found = targets(make_model(num_layers=12, hidden_size=8, intermediate_size=8), index=1)
    assert {name.split(".")[2] for name in found} == {"1"}


def test_all_linear_leaves_the_norms(model):
    names = targets(model, target_modules="all-linear")
    assert names
    assert not any("ln_" in name or "norm" in name for name in names)


def test_excluded_layers(llama):
    assert len(targets(llama, exclude_modules=["q_proj", "input_layernorm"])) == 7
    assert targets(llama, exclude_modules=".*") == []


def test_what_peft_saves_whole_gets_no_delta(llama, batch):
    """PEFT takes any module whose name ends in the entry."""
    assert [name for name in targets(llama, modules_to_save=["norm"]) if "norm" in name] == []
    assert len(targets(llama, modules_to_save=["mlp"])) == 6
    model = get_peft_model(llama, AdaptQConfig(layers_to_transform=[2], modules_to_save=["norm"]))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "norm" in name}
    assert len(trained) == 9
    model(**batch, labels=batch["input_ids"]).loss.backward()


def test_without_blocks_the_whole_model_is_searched():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert find_targets(model, None, AdaptQConfig(target_modules=["2"])) == ["2"]


def test_a_quantized_layer_outside_blocks_cannot_be_adapted(llama):
    quantize_blocks(llama, find_blocks(llama), resolve_quantization("nf4"))
    with pytest.raises(
        ValueError, match=r"model\.layers\.0\.self_attn\.q_proj is quantized, and only layers in transformer blocks"
    ):
        find_targets(llama, None, AdaptQConfig(target_modules=["q_proj"]))


class Mixer(nn.Module):
    """Parameters of its own and a layer, as in Mamba and DeBERTa."""

    def __init__(self):
        super().__init__()
        self.decay = nn.Parameter(torch.ones(4))
        self.projection = nn.Linear(4, 4)

    def forward(self, x):
        return self.projection(x) * self.decay


def mixers():
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"mixer": Mixer()})])
    model.forward = lambda x: model.layers[0]["mixer"](x)
    return model


def test_a_layer_with_parameters_and_layers_of_its_own():
    assert targets(mixers(), index=0) == ["layers.0.mixer", "layers.0.mixer.projection"]


def test_layers_inside_wrapped_layers_are_trained_saved_and_unloaded():
    model, x = mixers(), torch.randn(2, 4)
    expected = model.forward(x)
    config = AdaptQConfig(layers_to_transform=[0])
    wrapped = get_peft_model(model, config)
    wrapped.add_adapter("second", AdaptQConfig(layers_to_transform=[0], init_weights=False))
    assert torch.equal(model.forward(x), expected)
    names = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert len(names) == 3
    assert len(get_peft_model_state_dict(wrapped, adapter_name="second")) == 3
    wrapped.set_adapter("second")
    changed = model.forward(x)
    assert not torch.allclose(changed, expected)
    wrapped.merge_adapter()
    torch.testing.assert_close(model.forward(x), changed)
    wrapped.unmerge_adapter()
    unloaded = wrapped.unload()
    assert torch.equal(unloaded.forward(x), expected)
    assert [type(module).__name__ for module in unloaded.layers.modules()][2:] == ["Mixer", "Linear"]


def test_multihead_attention_cannot_be_adapted():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 8)])
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn is an nn\.MultiheadAttention.*with exclude_modules"):
        targets(model, index=0)
