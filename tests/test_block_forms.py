from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptq_peft import AdaptQConfig, block_forms
from adaptq_peft.block_forms import BlockForms, Wishes
from adaptq_peft.layer import Delta
from adaptq_peft.quantization import is_quantized, resolve_quantization
from adaptq_peft.selection import find_blocks

NF4 = resolve_quantization("nf4")


def make_forms(model, frozen=(0, 1), settings=NF4, is_excluded=lambda name: False, others=(), source="checkpoint"):
    blocks = find_blocks(model)
    adapted = {block.index for block in blocks} - set(frozen)
    return BlockForms(model, blocks, Wishes("new", adapted, settings, source, None, is_excluded), list(others))


def test_only_linears_of_the_given_blocks_are_swapped(model):
    forms = make_forms(model)
    assert not any(is_quantized(module) for module in model.modules())
    forms.apply()
    for block in find_blocks(model):
        linears = [m for m in block.module.modules() if isinstance(m, (nn.Linear, Conv1D)) or is_quantized(m)]
        assert linears
        assert all(is_quantized(m) == (block.index < 2) for m in linears)
    assert not is_quantized(model.get_output_embeddings())
    assert len(forms.report.swapped) == len([m for m in model.modules() if is_quantized(m)])
    assert forms.report.left == {}


def test_no_settings_swaps_nothing(llama):
    forms = make_forms(llama, settings=None)
    forms.apply()
    assert forms.report.swapped == []


def test_deltas_of_another_adapter_are_not_swapped(llama):
    get_peft_model(llama, AdaptQConfig(layers_to_transform=[0], quantization="none"))
    make_forms(llama, others=["default"]).apply()
    assert not any(is_quantized(module) for module in llama.modules() if isinstance(module, Delta))


def test_what_is_left_is_reported(llama):
    llama.model.layers[0].self_attn.k_proj.weight = llama.model.layers[1].self_attn.k_proj.weight
    forms = make_forms(llama, is_excluded=lambda name: name.endswith("o_proj"))
    assert forms.report.left == {
        "model.layers.0.self_attn.k_proj": "its weight is shared with another module",
        "model.layers.0.self_attn.o_proj": "named in exclude_modules or modules_to_save",
        "model.layers.1.self_attn.k_proj": "its weight is shared with another module",
        "model.layers.1.self_attn.o_proj": "named in exclude_modules or modules_to_save",
    }


def test_excluded_linears_are_not_rounded_where_adapted_blocks_are(llama):
    before = copy.deepcopy(llama.model.layers[3].mlp)
    fields = {"original_weights": "dequantized", "exclude_modules": ["up_proj"]}
    get_peft_model(llama, AdaptQConfig(layers_to_transform=[3], **fields))
    mlp = llama.model.layers[3].mlp
    assert torch.equal(mlp.up_proj.weight, before.up_proj.weight)
    assert not torch.equal(mlp.down_proj.weight, before.down_proj.weight)


@pytest.mark.parametrize("normalize", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_linear_whose_weight_is_computed_is_left_and_merging_loses_nothing(llama, normalize, quantization):
    normalize(llama.model.layers[0].mlp.up_proj)
    config = AdaptQConfig(layers_to_transform=[1], quantization=quantization, frozen_rank=4, init_weights=False)
    model = get_peft_model(llama, config).eval()
    assert model.base_model.quantization_report.left == {
        "model.layers.0.mlp.up_proj": "its weight is computed from other parameters, as by weight normalization"
    }
    token_ids = torch.arange(16).unsqueeze(0)
    expected = model(token_ids).logits
    model.merge_adapter()
    torch.testing.assert_close(model(token_ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_failure_in_the_middle_names_the_layer_and_touches_nothing(llama, monkeypatch):
    def fail_late(linear, settings):
        if linear is llama.model.layers[1].mlp.up_proj:
            raise RuntimeError("out of memory")
        return nn.Identity()

    monkeypatch.setattr(block_forms, "quantize_linear", fail_late)
    before = list(llama.modules())
    with pytest.raises(ValueError, match=r"quantizing model\.layers\.1\.mlp\.up_proj failed: out of memory"):
        make_forms(llama)
    assert list(llama.modules()) == before


def test_the_weight_bytes_of_a_half_quantized_model(make_model):
    """16-bit base, K = L/2, nested absmax: (4.127 + 16) / 32 = 0.629 of the original."""
    model = make_model(num_layers=4, hidden_size=256, intermediate_size=512).bfloat16()

    def linear_bytes():
        total = 0
        for block in find_blocks(model):
            for module in block.module.modules():
                if isinstance(module, nn.Linear):
                    state = getattr(module.weight, "quant_state", None)
                    total += module.weight.nbytes
                    if state is not None:
                        total += state.absmax.nbytes + state.state2.absmax.nbytes
        return total

    before = linear_bytes()
    make_forms(model).apply()
    assert linear_bytes() / before <= 0.63
    assert linear_bytes() / before == pytest.approx((4.127 + 16) / 32, abs=2e-3)


def test_multihead_attention_keeps_its_output_projection():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.TransformerEncoderLayer(64, 2, 64, batch_first=True)])
    forms = make_forms(model, frozen=[0])
    assert forms.report.left == {"layers.0.self_attn.out_proj": "nn.MultiheadAttention reads its weight directly"}
    forms.apply()
    model.layers[0].train()
    assert torch.isfinite(model.layers[0](torch.randn(1, 3, 64))).all()


def test_layers_that_transformers_keeps_in_float32_are_left():
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4, vocab_size=20, decoder_start_token_id=0)
    )
    left = make_forms(model, frozen=[0]).report.left
    assert left == {
        "encoder.block.0.layer.1.DenseReluDense.wo": "transformers keeps it in float32, and reads its weight"
    }


class Reader(nn.Module):
    """Reads the weight of one layer, as Mamba's mixer, and only a dtype of another."""

    def __init__(self):
        super().__init__()
        self.read = nn.Linear(64, 64)
        self.called = nn.Linear(64, 64)

    def forward(self, x):
        return self.called(x.to(self.called.weight.dtype)) @ self.read.weight


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.zeros(2, 64, 64, dtype=torch.bfloat16))


class ExpertGLU(nn.Module):
    """Experts one below the other, as DBRX's."""

    def __init__(self):
        super().__init__()
        self.w1 = nn.Parameter(torch.zeros(2 * 32, 64, dtype=torch.bfloat16))
        self.norm = nn.LayerNorm(64)


@pytest.mark.parametrize(
    ("block", "left"),
    [
        (Reader, {"layers.0.read": "Reader reads its weight directly"}),
        (Experts, {"layers.0.experts.up": "fused expert weights, not a linear; 16384 bytes stay as they are"}),
        (ExpertGLU, {"layers.0.w1": "fused expert weights, not a linear; 8192 bytes stay as they are"}),
    ],
)
def test_weights_that_no_layer_can_take_the_place_of_are_left(block, left):
    model = nn.Module()
    model.layers = nn.ModuleList([block()])
    assert make_forms(model, frozen=[0]).report.left == left
