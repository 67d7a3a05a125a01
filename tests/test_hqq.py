"""Frozen blocks in 2, 3 and 4 bits by HQQ, from `get_peft_model` to the merged model."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from support import logits, randomize
from transformers import HqqConfig

from adaptq_peft import AdaptQConfig, adaptq_bnb_config, hotswap_adapter
from adaptq_peft.evaluation import measure_weight_bytes, plan_memory
from adaptq_peft.quantization import is_quantized
from adaptq_peft.quantization.hqq_backend import HqqLinear
from adaptq_peft.selection import find_blocks

pytest.importorskip("hqq", reason='needs `pip install "adaptq_peft[hqq]"`')

NAMES = ("hqq4", "hqq3", "hqq2")


def config(**fields):
    return AdaptQConfig(
        task_type="CAUSAL_LM", **{"layers_to_transform": [1, 3], "quantization": "hqq2", "frozen_rank": 0, **fields}
    )


def coded_blocks(model):
    blocks = find_blocks(model)
    return [b.index for b in blocks if any(isinstance(module, HqqLinear) for module in b.module.modules())]


@pytest.mark.parametrize("name", NAMES)
def test_the_adapted_blocks_train_and_the_frozen_ones_do_not_move(model, name, batch, train):
    wrapped = get_peft_model(model, config(quantization=name))
    assert coded_blocks(model) == [0, 2]
    codes = {key: value.clone() for key, value in wrapped.state_dict().items() if ".adaptq_delta." not in key}
    losses = train(wrapped, batch, steps=4)
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, codes[key]) for key, value in wrapped.state_dict().items() if key in codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_a_saved_adapter_gives_the_same_bits(model, batch, tmp_path, dtype, low_cpu_mem_usage):
    base = copy.deepcopy(model.to(dtype))
    wrapped = get_peft_model(model, config())
    randomize(wrapped)
    expected = logits(wrapped, batch)
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded, batch), expected)


def test_the_codes_come_from_the_file(llama, batch, tmp_path, monkeypatch):
    """On another device, with another number of threads or version of hqq, rounding again gives others."""
    base = copy.deepcopy(llama)
    wrapped = get_peft_model(llama, config())
    expected = logits(wrapped, batch)
    wrapped.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.up_proj"
    assert {key.removeprefix(f"{name}.") for key in saved if key.startswith(name)} == {
        *("adaptq_frozen.weight", "adaptq_frozen.scale", "adaptq_frozen.zero")
    }
    from hqq.core.quantize import Quantizer

    monkeypatch.setattr(Quantizer, "optimize_weights", lambda tensor, scale, zero, **_: (tensor * 0, scale, zero))
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path), batch), expected)


def test_a_loader_that_leaves_the_codes_out_is_noticed(llama, batch, tmp_path):
    base = copy.deepcopy(llama)
    get_peft_model(llama, config()).save_pretrained(tmp_path)
    base.load_adapter(str(tmp_path))  # transformers' own
    with pytest.raises(RuntimeError, match="The saved quantized weights of this adapter's frozen blocks were not"):
        logits(base, batch)


@pytest.mark.parametrize("name", NAMES)
def test_merged_it_has_the_dequantized_weights(model, name, batch):
    wrapped = get_peft_model(model, config(quantization=name))
    randomize(wrapped)
    expected = logits(wrapped, batch)
    merged = wrapped.merge_and_unload()
    assert not any(is_quantized(module) for module in merged.modules())
    torch.testing.assert_close(logits(merged, batch), expected, rtol=1e-4, atol=1e-5)


def test_unload_gives_the_original_back(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    base = type(model).from_pretrained(tmp_path)
    wrapped = get_peft_model(base, config())
    assert torch.equal(logits(wrapped.unload(), batch), logits(model, batch))


def test_a_second_adapter_gets_original_weights_where_codes_came_from_a_file(model, batch, tmp_path):
    model.save_pretrained(tmp_path / "base")
    get_peft_model(copy.deepcopy(model), config(), adapter_name="first").save_pretrained(tmp_path)
    base = type(model).from_pretrained(tmp_path / "base")
    both = PeftModel.from_pretrained(base, tmp_path / "first", adapter_name="first")
    expected = logits(both, batch)
    both.add_adapter("second", config(layers_to_transform=[0, 1]))
    assert torch.equal(logits(both, batch), expected)
    both.set_adapter("second")
    alone = get_peft_model(copy.deepcopy(model), config(layers_to_transform=[0, 1]))
    assert torch.equal(logits(both, batch), logits(alone, batch))


def test_adapters_that_want_other_codes_are_refused(llama):
    wrapped = get_peft_model(llama, config())
    with pytest.raises(ValueError, match=r"frozen blocks in hqq in 3 bits, groups of 64, and adapter 'default'"):
        wrapped.add_adapter("second", config(quantization="hqq3"))
    with pytest.raises(ValueError, match=r"frozen blocks in nf4 with nested absmax, and adapter 'default' on this"):
        wrapped.add_adapter("second", config(quantization="nf4"))


def test_an_adapter_takes_the_place_of_another_one_with_the_same_codes(model, batch, tmp_path):
    base = copy.deepcopy(model)
    for name, seed in (("first", 1), ("second", 2)):
        wrapped = get_peft_model(copy.deepcopy(model), config())
        randomize(wrapped, seed=seed)
        wrapped.save_pretrained(tmp_path / name)
    loaded = PeftModel.from_pretrained(base, tmp_path / "first")
    hotswap_adapter(loaded, str(tmp_path / "second"))
    assert torch.equal(logits(loaded, batch), logits(wrapped, batch))


def test_with_corrections_that_repair_the_rounding(model, batch, tmp_path):
    base = copy.deepcopy(model)
    original = logits(base, batch)
    plain = get_peft_model(copy.deepcopy(model), config())
    wrapped = get_peft_model(model, config(frozen_rank=8, frozen_rank_init="svd"))
    assert (logits(wrapped, batch) - original).norm() < (logits(plain, batch) - original).norm()
    randomize(wrapped)
    wrapped.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path), batch), logits(wrapped, batch))


def test_the_groups_of_an_hqq_config(llama, batch, tmp_path):
    base = copy.deepcopy(llama)
    wrapped = get_peft_model(llama, config(quantization=HqqConfig(nbits=3, group_size=32)))
    assert {m.group_size for m in wrapped.modules() if isinstance(m, HqqLinear)} == {32}
    wrapped.save_pretrained(tmp_path)
    loaded = AdaptQConfig.from_pretrained(tmp_path)
    assert loaded.quantization == wrapped.peft_config["default"].quantization
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path), batch), logits(wrapped, batch))
    assert "linears by hqq in 3 bits, groups of 32; codes in the adapter file" in (tmp_path / "README.md").read_text()


def test_linears_that_do_not_fit_are_left_and_listed(make_model):
    model = make_model(hidden_size=36, intermediate_size=72, num_attention_heads=2, num_key_value_heads=1)
    with pytest.warns(UserWarning, match=r"14 weights of frozen blocks were not quantized.*are no multiple of 256"):
        wrapped = get_peft_model(model, config())
    assert len(wrapped.base_model.quantization_report.left) == 14
    assert not any(isinstance(module, HqqLinear) for module in wrapped.modules())


@pytest.mark.parametrize("name", ["hqq3", "hqq2"])
def test_planned_and_measured_bytes_are_the_same(make_model, name, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    plan = plan_memory(tmp_path, config(quantization=name), dtype=torch.float32)
    measured = measure_weight_bytes(get_peft_model(model, config(quantization=name)))
    assert plan.methods["ADAPTQ"].weights == measured
    weights = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, HqqLinear))
    packed = {"hqq3": 3.889, "hqq2": 2.5}[name]  # of 3 bits 10 to 32: the last row of a tiny matrix is half empty
    assert measured.quantized_linears * 8 / weights == pytest.approx(packed, abs=1e-3)
    assert plan.peak_presplit is None


def test_it_can_not_be_calibrated_or_loaded_split(tmp_path, llama):
    with pytest.raises(ValueError, match="'gptq' and needs 4 bits by bitsandbytes; quantization is 'hqq4'"):
        config(quantization="hqq4", quantization_calibration="gptq")
    llama.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="only bitsandbytes quantizes while loading, not hqq in 2 bits, groups of 64"):
        adaptq_bnb_config(config(), tmp_path)


def test_an_invalid_hqq_config_is_a_fault_of_the_config():
    with pytest.raises(ValueError, match=r"AdaptQConfig is not valid:\n- quantization is an HqqConfig with nbits=1;"):
        config(quantization=HqqConfig(nbits=1))


def test_adapted_blocks_can_not_be_dequantized_ones():
    """Rounded again on another machine they would be another base."""
    with pytest.raises(ValueError, match=r"at each load, and hqq in 2 bits, groups of 64 depends on the machine; use"):
        config(original_weights="dequantized")
