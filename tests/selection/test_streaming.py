"""A checkpoint on disk is profiled layer by layer, with the numbers of the model in memory."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from support import makers_of_checkpoints
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig

from adaptq_peft import AdaptQConfig, adaptq_bnb_config, profile_activations
from adaptq_peft.selection.streaming import device_map_with_blocks_on_disk, streamed_model


@pytest.fixture
def save(make_model, tmp_path):
    makers = makers_of_checkpoints(make_model)

    def run(kind, dtype=torch.float32, **options):
        torch.manual_seed(0)
        makers[kind]().to(dtype).save_pretrained(tmp_path / "base", **options)
        return tmp_path / "base"

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "t5", "qwen-moe"])
def test_the_profile_is_that_of_the_model_in_memory(save, samples, kind, dtype):
    folder = save(kind, dtype, max_shard_size="60KB")
    load = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    expected = profile_activations(load.from_pretrained(folder), samples, general_data=samples[:50])
    assert profile_activations(str(folder), samples, general_data=samples[:50]) == expected


def test_blocks_are_not_in_memory(save, samples):
    with streamed_model(save("llama")) as model:
        held = {name for name, parameter in model.named_parameters() if not parameter.is_meta}
        assert held == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
        profile_activations(model, samples)
        assert {name for name, parameter in model.named_parameters() if not parameter.is_meta} == held


def test_the_device_map_names_each_block_and_each_part_around_them(make_model):
    assert device_map_with_blocks_on_disk(make_model("gpt2", num_layers=2)) == {
        "transformer.h.0": "disk",
        "transformer.h.1": "disk",
        **dict.fromkeys(["transformer.wte", "transformer.wpe", "transformer.drop", "transformer.ln_f"], "cpu"),
        "lm_head": "cpu",
    }


def test_layers_pattern(save, samples):
    profile = profile_activations(save("t5"), samples, layers_pattern="encoder.block")
    assert len(profile.magnitude) == 2


def test_from_the_checkpoint_to_the_adapter_without_the_whole_model(save, samples):
    folder = save("llama", torch.bfloat16)
    config = AdaptQConfig(profile=profile_activations(folder, samples), selection_strategy="update")
    quantization_config = adaptq_bnb_config(config, folder)
    split = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization_config)
    split = get_peft_model(split, config)
    whole = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        AdaptQConfig(calibration_data=samples, selection_strategy="update"),
    )
    assert split.peft_config["default"].layers_to_transform == whole.peft_config["default"].layers_to_transform
    assert split.peft_config["default"].profile == whole.peft_config["default"].profile
    assert split.base_model.quantization_report.swapped == split.base_model.quantization_report.restored == []


def test_a_model_on_disk_does_not_write_its_own_text(save):
    with pytest.raises(ValueError, match=r"a model on disk would be read once for each token\. Pass calibration data"):
        profile_activations(save("llama"))


def test_a_quantized_checkpoint_is_refused(save, samples, tmp_path):
    quantized = AutoModelForCausalLM.from_pretrained(
        save("llama"), quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    quantized.save_pretrained(tmp_path / "quantized")
    with pytest.raises(ValueError, match=r"quantized' is quantized already.*name the 16-bit"):
        profile_activations(tmp_path / "quantized", samples)
