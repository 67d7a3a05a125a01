from __future__ import annotations

import copy

import pytest
from peft import get_peft_model
from torch import nn

from adaptq_peft import ActivationProfile, AdaptQConfig
from adaptq_peft.plan import make_plan


def test_a_plan_changes_neither_the_model_nor_the_config(llama, samples):
    config = AdaptQConfig(calibration_data=samples)
    before, modules = copy.deepcopy(config.to_dict()), list(llama.modules())
    plan = make_plan(llama, config, {})
    assert config.to_dict() == before
    assert list(llama.modules()) == modules
    assert len(plan.adapted) == 2
    assert [block.index for block in plan.blocks] == [0, 1, 2, 3]
    assert plan.targets
    assert all(any(f".{index}." in name for index in plan.adapted) for name in plan.targets)


def test_explicit_blocks_skip_the_profile(llama):
    plan = make_plan(llama, AdaptQConfig(layers_to_transform=[2, 0]), {})
    assert plan.adapted == [0, 2]
    assert plan.profile is None


def test_the_profile_is_made_as_the_config_says(llama, monkeypatch):
    seen, tokenizer = {}, str.split

    def profile(model, data, **options):
        seen.update(options, data=data)
        return ActivationProfile(magnitude=[1.0] * 4, update=[1.0] * 4, num_samples=50, num_tokens=500)

    monkeypatch.setattr("adaptq_peft.plan.profile_activations", profile)
    config = AdaptQConfig(
        calibration_data=["a"],
        general_calibration_data=["b"],
        calibration_tokenizer=tokenizer,
        calibration_samples=7,
        calibration_max_length=9,
        calibration_batch_size=3,
        layers_pattern="layers",
    )
    make_plan(llama, config, {})
    expected = {"samples": 7, "max_length": 9, "batch_size": 3, "layers_pattern": "layers", "tokenizer": tokenizer}
    assert seen == {"data": ["a"], "general_data": None, **expected}


def test_an_index_out_of_range(llama):
    with pytest.raises(ValueError, match=r"names blocks \[4, 9\], and the model has 4 blocks; allowed are 0 to 3"):
        make_plan(llama, AdaptQConfig(layers_to_transform=[1, 4, 9]), {})


def test_too_many_blocks_is_an_error_before_anything_is_profiled(llama, monkeypatch):
    monkeypatch.setattr("adaptq_peft.plan.profile_activations", None)
    with pytest.raises(ValueError, match="5 blocks are to be adapted, but the model has 4"):
        make_plan(llama, AdaptQConfig(num_adapted_blocks=5), {})


def test_a_model_without_blocks():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    plan = make_plan(model, AdaptQConfig(target_modules=["1"]), {})
    assert (plan.blocks, plan.adapted, plan.targets) == ([], [], ["1"])
    with pytest.raises(ValueError, match="No transformer blocks found"):
        make_plan(model, AdaptQConfig(target_modules=["1"], calibration_data=["text"]), {})


def test_other_adapters_may_differ_in_blocks_and_not_in_codes(llama):
    other = AdaptQConfig(layers_to_transform=[1])
    assert make_plan(llama, AdaptQConfig(layers_to_transform=[2]), {"other": other}).adapted == [2]
    with pytest.raises(ValueError, match="wants its frozen blocks in fp4 with nested absmax, and adapter 'other'"):
        make_plan(llama, AdaptQConfig(layers_to_transform=[1], quantization="fp4"), {"other": other})


def test_targets_that_name_some_blocks_choose_them(llama):
    config = AdaptQConfig(target_modules=["model.layers.2.mlp.up_proj", "layers.0.mlp.up_proj"])
    assert make_plan(llama, config, {}).adapted == [0, 2]
    config = AdaptQConfig(target_modules=["up_proj"], selection_strategy="first", num_adapted_blocks=1)
    assert make_plan(llama, config, {}).targets == ["model.layers.0.mlp.up_proj"]


def test_targets_in_block_10_are_none_in_block_1(make_model):
    model = make_model(num_layers=12, hidden_size=8, intermediate_size=8)
    config = AdaptQConfig(target_modules=["layers.10.mlp.up_proj"], quantization="none")
    assert make_plan(model, config, {}).adapted == [10]


def test_targets_outside_of_the_adapted_blocks_are_an_error(llama, samples):
    config = AdaptQConfig(target_modules=["layers.1.mlp.up_proj"], calibration_data=samples, selection_strategy="last")
    with pytest.raises(
        ValueError,
        match=r"'layers.1.mlp.up_proj'\} names no layer of the adapted blocks \[2, 3\], so nothing .* 1 layers of "
        r"other blocks, the first model.layers.1.mlp.up_proj\. Name layers by",
    ):
        make_plan(llama, config, {})


def test_a_quantized_module_cannot_be_trained_whole(llama):
    get_peft_model(llama, AdaptQConfig(layers_to_transform=[2]))
    config = AdaptQConfig(layers_to_transform=[2], modules_to_save=["layers.1.mlp.up_proj"])
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj is in modules_to_save and is quantized already"):
        make_plan(llama, config, {})
