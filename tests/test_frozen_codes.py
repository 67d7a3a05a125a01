"""Adapters whose frozen blocks were rounded by calibration. tests/artifacts/test_quantized_base.py: shared bases."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model
from support import logits, randomize
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from adaptq_peft import AdaptQConfig, adaptq_bnb_config
from adaptq_peft.quantization import is_quantized, quantize_linear
from adaptq_peft.quantization.calibrated import mixed_calibration_batches

METHODS = ["gptq", "descent"]


def config(samples=None, **fields):
    fields = {"layers_to_transform": [1, 3], "quantization_calibration": "gptq", "frozen_rank": 0, **fields}
    return AdaptQConfig(task_type="CAUSAL_LM", calibration_data=samples, **fields)


def error_of(model, base, batch):
    return float((logits(model, batch) - logits(base, batch)).norm())


@pytest.mark.parametrize("method", METHODS)
def test_it_is_nearer_to_the_original_than_plain_rounding(model, samples, batch, method):
    base = copy.deepcopy(model)
    plain = get_peft_model(copy.deepcopy(model), config(quantization_calibration=None))
    wrapped = get_peft_model(model, config(samples, quantization_calibration=method))
    assert error_of(wrapped, base, batch) < error_of(plain, base, batch)
    assert wrapped.base_model.quantization_report.plain == {}


def test_it_is_calibrated_on_the_domain_and_general_text(llama, samples, monkeypatch):
    seen, tokenizer = [], str.split

    def note(model, *data, **options):
        seen.append((data, options["tokenizer"]))
        raise KeyError("noted")

    monkeypatch.setattr("adaptq_peft.frozen_codes.mixed_calibration_batches", note)
    domain, general = samples[:30], samples[30:]
    with pytest.raises(KeyError, match="noted"):
        get_peft_model(llama, config(domain, general_calibration_data=general, calibration_tokenizer=tokenizer))
    assert seen == [((domain, general), tokenizer)]


def test_weights_that_get_other_codes_are_not_rounded_plainly(make_model, samples, batch, tmp_path, monkeypatch):
    """But those that can't be calibrated are: k_proj and the like of this model have 96 inputs."""
    model = make_model(hidden_size=96)
    base, rounded = copy.deepcopy(model), []

    def note(linear, settings):
        rounded.append(linear.weight.shape)
        return quantize_linear(linear, settings)

    monkeypatch.setattr("adaptq_peft.block_forms.quantize_linear", note)
    wrapped = get_peft_model(model, config(samples))
    assert len(rounded) == len(wrapped.base_model.quantization_report.plain) == 12
    assert torch.Size([96, 128]) not in rounded
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(loaded, batch), logits(wrapped, batch))
    assert len(rounded) == 12


@pytest.mark.parametrize("method", METHODS)
def test_save_and_load_give_the_same_codes_without_calibrating(model, samples, batch, tmp_path, monkeypatch, method):
    base = copy.deepcopy(model)
    wrapped = get_peft_model(model, config(samples, quantization_calibration=method))
    randomize(wrapped)
    wrapped.save_pretrained(tmp_path)
    monkeypatch.setattr("adaptq_peft.frozen_codes.quantize_calibrated", None)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(loaded, batch), logits(wrapped, batch))


def test_offloaded_blocks_are_refused_and_the_model_left_as_it_was(llama, samples, batch):
    expected = logits(llama, batch)
    offloaded = cpu_offload(llama, execution_device="cpu")
    with pytest.raises(ValueError, match=r"weights of 14 linears are not in memory, .*: they are offloaded"):
        get_peft_model(offloaded, config(samples))
    assert torch.equal(logits(offloaded, batch), expected)


def test_what_transformers_saves_is_loaded_by_peft(make_model, samples, batch, tmp_path):
    """`model.add_adapter` and the model's own `save_pretrained`, which puts a prefix before each name."""
    model = make_model()
    model.add_adapter(config(samples))
    randomize(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(), tmp_path)
    assert torch.equal(logits(loaded, batch), logits(model, batch))


@pytest.mark.parametrize("copied", [False, True])
def test_a_config_that_made_an_adapter_makes_another_one(make_model, samples, batch, tmp_path, copied):
    used = config(samples)
    first = get_peft_model(make_model(), used)
    again = copy.deepcopy(used) if copied else used
    second = get_peft_model(make_model(), again)
    if not copied:  # a copy has no calibration data, so the model writes its own
        assert torch.equal(logits(second, batch), logits(first, batch))
    randomize(second)
    second.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(), tmp_path)
    assert torch.equal(logits(loaded, batch), logits(second, batch))


def test_a_loader_that_leaves_the_codes_out_is_noticed(llama, samples, batch, tmp_path):
    base = copy.deepcopy(llama)
    get_peft_model(llama, config(samples)).save_pretrained(tmp_path)
    base.load_adapter(str(tmp_path))  # transformers' own
    with pytest.raises(RuntimeError, match="The saved quantized weights of this adapter's frozen blocks were not"):
        logits(base, batch)


def test_unload_gives_the_original_back(model, samples, batch, tmp_path):
    model.save_pretrained(tmp_path)
    base = type(model).from_pretrained(tmp_path)
    wrapped = get_peft_model(base, config(samples, quantization_calibration="descent"))
    assert torch.equal(logits(wrapped.unload(), batch), logits(model, batch))


def test_weights_that_were_changed_before_do_not_come_back_from_the_checkpoint(llama, samples, batch, tmp_path):
    llama.save_pretrained(tmp_path)
    base = type(llama).from_pretrained(tmp_path)
    with torch.no_grad():  # 1%, as a merged LoRA
        base.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    wrapped = get_peft_model(base, config(samples))
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj.weight in the checkpoint is not what .* was quant"):
        wrapped.unload(frozen="original")
    with pytest.warns(UserWarning, match="original weights of 1 quantized linears can't be had"):
        wrapped.unload()


def test_merged_it_has_the_calibrated_weights(model, samples, batch):
    wrapped = get_peft_model(model, config(samples))
    randomize(wrapped)
    expected = logits(wrapped, batch)
    merged = wrapped.merge_and_unload()
    assert not any(is_quantized(module) for module in merged.modules())
    torch.testing.assert_close(logits(merged, batch), expected, rtol=1e-4, atol=1e-5)


def test_another_adapter_with_other_codes_is_refused(model, samples, batch, tmp_path):
    base = copy.deepcopy(model)
    for name, seed in (("first", 0), ("second", 30)):
        made = get_peft_model(copy.deepcopy(base), config(samples[seed : seed + 30]), adapter_name=name)
        made.save_pretrained(tmp_path)
    both = PeftModel.from_pretrained(base, tmp_path / "first", adapter_name="first")
    expected = logits(both, batch)
    with pytest.raises(
        ValueError, match=r"Another adapter on this model sees \d+ of the quantized layers with other weights, the"
    ):
        both.load_adapter(tmp_path / "second", adapter_name="second")
    assert torch.equal(logits(both, batch), expected)


def test_a_second_adapter_on_the_same_blocks_shares_the_codes(model, samples, batch, tmp_path):
    base = copy.deepcopy(model)
    wrapped = get_peft_model(model, config(samples), adapter_name="first")
    wrapped.add_adapter("second", config(samples))
    wrapped.set_adapter("second")
    randomize(wrapped, "second")
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path / "second", adapter_name="second")
    assert torch.equal(logits(loaded, batch), logits(wrapped, batch))
    loaded.load_adapter(tmp_path / "first", adapter_name="first")


def test_beside_an_adapter_with_other_codes_or_on_other_blocks(llama, samples, batch):
    wrapped = get_peft_model(llama, config(samples, original_weights="keep"), adapter_name="first")
    expected = logits(wrapped, batch)
    with pytest.raises(
        ValueError, match=r"codes from plain rounding, and adapter 'first' on this model from calibrati"
    ):
        wrapped.add_adapter("second", config(quantization_calibration=None))
    with pytest.raises(ValueError, match=r"freezes blocks that adapters \['first'\] on this model do not freeze, and"):
        wrapped.add_adapter("second", config(samples, layers_to_transform=[0]))
    assert torch.equal(logits(wrapped, batch), expected)


def test_beside_an_adapter_without_quantization(llama, samples, monkeypatch):
    def few(*args, **options):
        return mixed_calibration_batches(*args, tokens=512, **options)

    monkeypatch.setattr("adaptq_peft.frozen_codes.mixed_calibration_batches", few)
    wrapped = get_peft_model(llama, config(samples, original_weights="keep"), adapter_name="first")
    wrapped.add_adapter("plain", config(quantization_calibration=None, quantization="none", original_weights="keep"))
    wrapped.add_adapter("second", config(samples, original_weights="keep"))
    assert list(wrapped.peft_config) == ["first", "plain", "second"]


def test_codes_that_a_deleted_adapter_left_are_not_taken_for_plain_rounding(llama, samples, batch, tmp_path):
    plain = get_peft_model(copy.deepcopy(llama), config(quantization_calibration=None))
    randomize(plain)
    plain.save_pretrained(tmp_path)
    wrapped = get_peft_model(llama, config(samples, original_weights="keep"), adapter_name="first")
    wrapped.delete_adapter("first")
    found = r"14 linears of this model, the first is model\.layers\.0\.self_attn\.q_proj, have calibrated codes of"
    with pytest.raises(ValueError, match=found):
        wrapped.add_adapter("second", config(quantization_calibration=None))
    with pytest.raises(ValueError, match=found):
        wrapped.load_adapter(tmp_path, adapter_name="second")
    dequantized = {"layers_to_transform": [0, 1, 3], "original_weights": "dequantized"}
    with pytest.raises(ValueError, match="7 linears of this model, the first is"):
        wrapped.add_adapter("second", config(samples, **dequantized))
    assert list(wrapped.peft_config) == []
    loaded = PeftModel.from_pretrained(wrapped.unload(), tmp_path)
    assert torch.equal(logits(loaded, batch), logits(plain, batch))


@pytest.mark.parametrize("how", ["a deleted adapter", "all in 4 bits", "split"])
def test_codes_that_are_there_already_can_not_be_calibrated(how, llama, samples, tmp_path):
    if how == "a deleted adapter":
        wrapped = get_peft_model(llama, config(quantization_calibration=None), adapter_name="first")
        wrapped.delete_adapter("first")
        model = wrapped.base_model.model
    else:
        llama.save_pretrained(tmp_path)
        blocks = config().layers_to_transform
        split = how == "split"
        bits = adaptq_bnb_config(blocks, tmp_path) if split else BitsAndBytesConfig(load_in_4bit=True)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=bits)
    found = r"quantization_calibration is 'auto', and 14 linears of this model, .* plainly rounded codes already"
    with pytest.raises(ValueError, match=found):
        get_peft_model(model, config(samples, quantization_calibration="auto"))


def test_another_calibrated_adapter_shares_the_codes_of_the_first(llama, samples, batch, tmp_path):
    base = copy.deepcopy(llama)
    wrapped = get_peft_model(llama, config(samples), adapter_name="first")
    wrapped.add_adapter("second", config(samples))
    wrapped.set_adapter("second")
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path / "second")
    assert torch.equal(logits(loaded, batch), logits(wrapped, batch))


def test_a_missing_layer_in_the_file(llama, samples, tmp_path):
    from safetensors.torch import load_file, save_file

    base = copy.deepcopy(llama)
    get_peft_model(llama, config(samples)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if "layers.0.mlp.up_proj.adaptq" not in name}
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"has 13 quantized layers, and the model 14 of them: missing \['model"):
        PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize("fields", [{"quantization_calibration": "best"}, {"quantization": "int8"}])
def test_invalid_configs(fields):
    with pytest.raises(
        ValueError, match=r"quantization_calibration is .*(allowed: None or one of \['auto'|needs 4 bits)"
    ):
        config(**fields)


def test_with_corrections_that_repair_what_calibration_left(model, samples, batch, tmp_path):
    base = copy.deepcopy(model)
    plain = get_peft_model(copy.deepcopy(model), config(samples))
    wrapped = get_peft_model(model, config(samples, frozen_rank=8, frozen_rank_init="svd"))
    assert error_of(wrapped, base, batch) < error_of(plain, base, batch)
    randomize(wrapped)
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(loaded, batch), logits(wrapped, batch))
