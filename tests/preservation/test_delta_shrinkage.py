"""Shrinkage of whole adapters: inputs that are gathered, exactness for products, what is scaled, exact undoing."""

from __future__ import annotations

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from support import logits, randomize, randomize_trained, tiny_qwen_moe
from transformers import GPT2Config, GPT2LMHeadModel

from adaptq_peft import AdaptQConfig
from adaptq_peft.preservation.delta_shrinkage import DeltaShrinkage
from adaptq_peft.preservation.documents import tokenize_documents
from adaptq_peft.preservation.shrinkage import ShrinkagePath


@pytest.fixture
def texts(general, domain, tokenizer):
    """Domain and general documents of different lengths."""
    return tokenize_documents(tokenizer, domain), tokenize_documents(tokenizer, general)


def wrap(kind: str, load):
    if kind == "lora":
        targets = ["q_proj", "k_proj", "down_proj"]
        return get_peft_model(load(), LoraConfig(target_modules=targets, init_lora_weights=False))
    frozen_rank = 4 if kind == "mixed" else 0
    config = AdaptQConfig(layers_to_transform=[1, 3], quantization="none", frozen_rank=frozen_rank)
    model = get_peft_model(load(), config)
    randomize(model, std=0.05)
    return model


@pytest.fixture(params=["adaptq", "mixed", "lora"])
def model(request, load):
    return wrap(request.param, load)


def trained(model):
    return {
        name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def moment_of(model, layer, documents):
    """Mean of x x^T of what a layer reads, window by window: no padding."""
    inputs = []
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for window in documents.windows:
            model(input_ids=window.tokens[None, :-1])
    handle.remove()
    x = torch.cat(inputs).double()
    return x.t() @ x / len(x)


@pytest.mark.parametrize("name", ["self_attn.k_proj", "mlp.down_proj"])
def test_a_delta_is_shrunk_by_what_its_linear_reads(load, texts, name):
    model = wrap("adaptq", load).eval()
    layer = model.get_base_model().get_submodule(f"model.layers.3.{name}")
    domain = moment_of(model, layer, texts[0])
    with model.disable_adapter():
        general = moment_of(model, layer, texts[1])
    delta = layer.adaptq_delta["default"].weight
    expected = ShrinkagePath.of(domain, general).shrink(delta.detach().clone(), 0.5)
    DeltaShrinkage(model, *texts, batch_size=4).set(0.5)
    torch.testing.assert_close(delta.detach(), expected, rtol=1e-2, atol=1e-4)


def test_a_delta_of_a_conv1d_is_shrunk_on_its_first_axis(texts):
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=64, n_embd=16, n_layer=2, n_head=2))
    model = get_peft_model(base, AdaptQConfig(layers_to_transform=[1], quantization="none")).eval()
    randomize(model, std=0.05)
    layer = model.get_base_model().get_submodule("transformer.h.1.mlp.c_fc")
    domain = moment_of(model, layer, texts[0])
    with model.disable_adapter():
        general = moment_of(model, layer, texts[1])
    delta = layer.adaptq_delta["default"].weight
    expected = ShrinkagePath.of(domain, general).shrink(delta.detach().t(), 0.5).t()
    assert delta.shape == (16, 64)
    DeltaShrinkage(model, *texts, batch_size=4).set(0.5)
    torch.testing.assert_close(delta.detach(), expected, rtol=1e-2, atol=1e-4)


def test_an_adapter_without_anything_in_the_blocks_is_refused(load, texts):
    model = get_peft_model(load(), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="adapter 'default' adds nothing to any block, so there is nothing to shrink"):
        DeltaShrinkage(model, *texts, batch_size=4)


@pytest.mark.parametrize(("kind", "options"), [(LoraConfig, {}), (AdaLoraConfig, {"total_step": 10})])
def test_a_product_is_shrunk_as_the_delta_that_it_makes(kind, options, load, texts):
    """Two adapters of one effect, as a full delta and as B A or B E A, are left with one effect."""
    lora = get_peft_model(load(), kind(target_modules=["q_proj"], layers_to_transform=[1], **options))
    randomize_trained(lora, std=0.3)
    config = AdaptQConfig(layers_to_transform=[1], target_modules=["q_proj"], quantization="none", delta_scaling=1.0)
    full = get_peft_model(load(), config)
    path = "model.layers.1.self_attn.q_proj"
    product, delta = lora.get_base_model().get_submodule(path), full.get_base_model().get_submodule(path)
    delta.adaptq_delta["default"].weight.data.copy_(product.get_delta_weight("default"))
    before = trained(lora)
    for model in (lora, full):
        DeltaShrinkage(model, *texts, batch_size=4).set(0.5)
    torch.testing.assert_close(
        product.get_delta_weight("default"), delta.get_delta_weight("default"), rtol=1e-3, atol=1e-5
    )
    changed = {name for name, value in trained(lora).items() if not torch.equal(value, before[name])}
    assert len(changed) == 1
    assert all("lora_A" in name for name in changed)


def test_other_parameters_are_scaled_and_the_factors_b_left(model, texts):
    before = trained(model)
    DeltaShrinkage(model, *texts, batch_size=4).set(3.0)
    for name, value in trained(model).items():
        if "_B." in name:
            assert torch.equal(value, before[name])
        elif value.ndim == 1:
            assert torch.equal(value, before[name] / 4)
        else:
            assert not torch.allclose(value, before[name] / 4)


def test_at_infinity_nothing_is_left_and_at_zero_all_is_exactly_as_before(model, texts, batch):
    before, expected = trained(model), logits(model, batch)
    with model.disable_adapter():
        base = logits(model, batch)
    shrinkage = DeltaShrinkage(model, *texts, batch_size=4)
    assert torch.equal(logits(model, batch), expected)
    shrinkage.set(1e12)
    assert torch.allclose(logits(model, batch), base, atol=1e-4)
    shrinkage.set(0.3)
    assert not torch.allclose(logits(model, batch), expected, atol=1e-3)
    shrinkage.set(0)
    assert torch.equal(logits(model, batch), expected)
    assert all(torch.equal(value, before[name]) for name, value in trained(model).items())


def test_what_is_left_is_saved_loaded_and_merged(model, load, texts, batch, tmp_path):
    DeltaShrinkage(model, *texts, batch_size=4).set(0.3)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(), tmp_path)
    assert torch.equal(logits(loaded, batch), expected)
    assert torch.allclose(logits(loaded.merge_and_unload(), batch), expected, atol=1e-4)


def test_the_size_of_batches_makes_no_difference(load, texts):
    found = []
    for size in (1, 8):
        model = wrap("adaptq", load)
        DeltaShrinkage(model, *texts, batch_size=size).set(1.0)
        found.append(trained(model))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-2, atol=1e-4)


def test_what_lora_adds_to_fused_experts_is_scaled(texts):
    """An expert reads a part of what its module reads."""
    model = tiny_qwen_moe().eval()
    experts = next(name for name, parameter in model.named_parameters() if parameter.ndim == 3)
    config = LoraConfig(target_modules=["q_proj"], target_parameters=[experts.rpartition("layers.0.")[2]])
    model = get_peft_model(model, config)
    randomize_trained(model, std=0.1)
    before = {
        name: p.detach().clone() for name, p in model.named_parameters() if "experts" in name and "lora_B" in name
    }
    DeltaShrinkage(model, *texts, batch_size=4).set(1.0)
    after = dict(model.named_parameters())
    assert before
    assert all(torch.allclose(after[name], value / 2) for name, value in before.items())
