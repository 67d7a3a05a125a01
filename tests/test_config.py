from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from adaptq_peft import ActivationProfile, AdaptQConfig, register_selection_strategy
from adaptq_peft.selection import strategies

PROFILE = ActivationProfile(magnitude=[1.0, 2.0], update=[0.5, 0.25], num_samples=50, num_tokens=500)


def test_original_weights_may_name_a_checkpoint(tmp_path):
    assert AdaptQConfig(original_weights=tmp_path).original_weights == str(tmp_path)
    assert AdaptQConfig(original_weights="org/model").original_weights == "org/model"


def test_defaults():
    config = AdaptQConfig()
    assert (config.selection_strategy, config.frozen_rank, config.frozen_scaling) == ("update", 8, 2.0)
    assert config.selection_ratio == 0.5
    assert config.quantization == "nf4"
    assert config.layers_to_transform is None
    assert config.peft_type.value == "ADAPTQ"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"selection_ratio": 0}, r"selection_ratio is 0; allowed: a number above 0 and at most 1"),
        ({"selection_ratio": 1.01}, r"selection_ratio is 1\.01; allowed"),
        ({"selection_ratio": float("nan")}, r"selection_ratio is nan; allowed"),
        ({"num_adapted_blocks": 0}, r"num_adapted_blocks is 0; allowed: None or an integer from 1"),
        ({"num_adapted_blocks": 1.5}, r"num_adapted_blocks is 1\.5; allowed"),
        (
            {"selection_strategy": "best"},
            r"selection_strategy is 'best'; registered are \['activation', 'activation\+",
        ),
        ({"selection_strategy": "contrast"}, r"'contrast' compares domain data with general data; pass general_cal"),
        ({"layers_to_transform": []}, r"layers_to_transform is \[\]; allowed: a list of different block indices"),
        ({"layers_to_transform": [1, 1]}, r"layers_to_transform is \[1, 1\]; allowed"),
        ({"layers_to_transform": [-1]}, r"layers_to_transform is \[-1\]; allowed"),
        ({"layers_to_transform": ["a", 1]}, r"layers_to_transform is \['a', 1\]; allowed"),
        ({"layers_to_transform": True}, r"layers_to_transform is True; allowed"),
        ({"selection_seed": None}, r"selection_seed is None; allowed: an integer"),
        ({"layers_pattern": 5}, r"layers_pattern is 5; allowed: None, a name, or a list of names"),
        ({"target_modules": [5]}, r"target_modules is \{5\}; allowed: None, a name, or a list"),
        ({"exclude_modules": "(("}, r"exclude_modules is '\(\(', which is no regular expression: "),
        ({"init_weights": "gaussian"}, r"init_weights is 'gaussian'; allowed: True \(zero\) or False"),
        ({"calibration_tokenizer": "org/name"}, r"calibration_tokenizer is 'org/name'; allowed: None, or a tokenizer"),
        ({"profile": "nope.json"}, r"profile can't be read: .*No such file or directory: 'nope.json'"),
        ({"profile": "."}, r"profile can't be read: .*Is a directory"),
        ({"profile": __file__}, r"profile can't be read: '.*test_config.py' does not hold an activation profile"),
        ({"profile": {"a": 1}}, r"profile is a dict; pass what profile_activations returned"),
        ({"quantized_base": {"a": 1}}, r"quantized_base is \{'a': 1\}; allowed: None, a folder"),
        (
            {"quantization": {"quant_method": "hqq"}},
            r"quantization is \{'quant_method': 'hqq'\}, which lacks or misspells something \(KeyError",
        ),
        (
            {"quantization": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf5")},
            r"with bnb_4bit_quant_type='nf5'; allowed: \"nf4\" or \"fp4\"",
        ),
        ({"calibration_samples": 0}, r"calibration_samples is 0; allowed: an integer of 1 or more"),
        ({"calibration_max_length": None}, r"calibration_max_length is None; allowed"),
        ({"calibration_batch_size": True}, r"calibration_batch_size is True; allowed"),
        ({"profile": [1.0]}, r"profile is a list; pass what profile_activations returned"),
        ({"quantization": "nf3"}, r"quantization is 'nf3'; allowed: \['nf4', .*'hqq2', 'none', 'auto'\], a tr"),
        ({"delta_scaling": 0}, r"delta_scaling is 0; allowed: a finite number above 0"),
        ({"delta_scaling": float("inf")}, r"delta_scaling is inf; allowed"),
        ({"delta_dtype": "int8"}, r"delta_dtype is 'int8'; allowed: None or one of \['float32', 'bfloat16'"),
        ({"frozen_rank": -1}, r"frozen_rank is -1; allowed: 0 \(no corrections\) or an integer of 1 or more"),
        ({"frozen_rank": 4.0}, r"frozen_rank is 4\.0; allowed"),
        ({"frozen_rank": True}, r"frozen_rank is True; allowed"),
        ({"frozen_rank": 4, "frozen_alpha": 0}, r"frozen_alpha is 0; allowed: None \(2 \* frozen_rank\) or a finite"),
        (
            {"frozen_rank": 0, "frozen_alpha": 8},
            r"frozen_rank is 0, so frozen_alpha and frozen_rank_init do nothing; set frozen_rank",
        ),
        (
            {"frozen_rank": 0, "frozen_rank_init": "svd"},
            r"frozen_rank is 0, so frozen_alpha and frozen_rank_init do nothing",
        ),
        ({"frozen_rank": 4, "frozen_rank_init": "loftq"}, r"frozen_rank_init is 'loftq'; allowed: \['zero', 'svd'\]"),
        (
            {"frozen_rank": 4, "frozen_rank_init": "svd", "quantization": "none"},
            r'"svd" repairs quantization, and quantization is "none"; use "zero"',
        ),
        (
            {"original_weights": "kept"},
            r"original_weights is 'kept'; allowed: \['checkpoint', 'keep', 'dequantized'\], a folder, or a Hub repo",
        ),
        (
            {"frozen_rank": 4, "frozen_rank_init": "svd", "original_weights": "dequantized"},
            r'"svd" needs original weights, and original_weights is "dequantized"; use "zero"',
        ),
        ({"evaluation": {}, "adaptq_version": 2}, r"is not valid:\n- adaptq_version is 2"),
        (
            {"certificate": {"budget": 0.05}},
            r"certificate is \{'budget': 0.05\}; allowed: None or what",
        ),
        ({"evaluation": [1]}, r"evaluation is \[1\]; allowed: None or a dict such as"),
        ({"evaluation": {"general": {}}}, r"evaluation is \{'general': \{\}\}; allowed"),
        (
            {"evaluation": {"general": {"adapted": float("inf")}}},
            r"evaluation is .*inf.*with finite perplexities of 1",
        ),
        ({"evaluation": {"general": {"adapted": 2.0, "note": "x"}}}, r"evaluation is .*'note'.*; allowed"),
        ({"adaptq_version": 2}, r"adaptq_version is 2; this adaptq_peft reads version 1; run `pip install -U"),
    ],
)
def test_a_bad_field_says_what_came_and_what_is_allowed(fields, message):
    with pytest.raises(ValueError, match=message):
        AdaptQConfig(**fields)


def test_all_faults_are_reported_together():
    with pytest.raises(ValueError, match="AdaptQConfig is not valid") as error:
        AdaptQConfig(selection_ratio=2, delta_scaling=-1, calibration_samples=0, calibration_batch_size=0)
    assert str(error.value).count("\n- ") == 4


def test_an_unknown_task_type_is_an_error_of_peft():
    with pytest.raises(ValueError, match="Invalid task type"):
        AdaptQConfig(task_type="POETRY")


def test_forms_of_fields_are_brought_to_one():
    assert AdaptQConfig(layers_to_transform=0).layers_to_transform == 0  # as in other PEFT methods
    assert AdaptQConfig(modules_to_save="lm_head").modules_to_save == ["lm_head"]
    assert AdaptQConfig(layers_to_transform=range(4, 2, -1)).layers_to_transform == [3, 4]
    assert AdaptQConfig(target_modules=["v_proj", "q_proj"]).target_modules == {"q_proj", "v_proj"}
    assert AdaptQConfig(delta_dtype=torch.bfloat16).delta_dtype == "bfloat16"


def test_the_scale_of_corrections_is_that_of_lora_with_twice_the_rank_or_what_is_given():
    assert AdaptQConfig(frozen_rank=16).frozen_scaling == 2.0
    assert AdaptQConfig(frozen_rank=16, frozen_alpha=8).frozen_scaling == 0.5


def test_a_config_from_before_low_rank_corrections_has_none(tmp_path):
    AdaptQConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    old = {name: value for name, value in json.loads(path.read_text()).items() if not name.startswith("frozen_")}
    path.write_text(json.dumps(old))
    assert AdaptQConfig.from_pretrained(tmp_path).frozen_rank == 0


def test_runtime_fields_never_leave_the_config():
    config = AdaptQConfig(
        calibration_data=["text"],
        general_calibration_data=["other"],
        calibration_tokenizer=lambda text: text,  # can't be pickled
    )
    assert config.calibration_data == ["text"]
    names = {"calibration_data", "general_calibration_data", "calibration_tokenizer"}
    assert not names & set(config.to_dict())
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), copy.copy(config)):
        assert copied.calibration_data is None
        assert copied.calibration_tokenizer is None


def test_save_and_load_give_the_same_config(tmp_path):
    config = AdaptQConfig(
        task_type="CAUSAL_LM", layers_to_transform=[0], profile=PROFILE, quantization="fp4", delta_scaling=0.5
    )
    config.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json"]
    assert AdaptQConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert AdaptQConfig.from_pretrained(tmp_path).profile == PROFILE


def test_a_bitsandbytes_config_is_stored_as_json(tmp_path):
    config = AdaptQConfig(
        quantization=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype="bfloat16"
        )
    )
    config.save_pretrained(tmp_path)
    loaded = AdaptQConfig.from_pretrained(tmp_path)
    assert loaded.quantization == config.quantization
    assert loaded.quantization["bnb_4bit_quant_type"] == "fp4"
    assert loaded.quantization["bnb_4bit_compute_dtype"] == "bfloat16"


def test_a_failed_save_leaves_the_previous_file(tmp_path, monkeypatch):
    AdaptQConfig(delta_scaling=0.5).save_pretrained(tmp_path)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(json, "dumps", fail)
    with pytest.raises(OSError, match="disk full"):
        AdaptQConfig(delta_scaling=0.125).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]
    assert AdaptQConfig.from_pretrained(tmp_path).delta_scaling == 0.5


def test_figures_that_are_filled_in_late_are_checked_before_they_are_saved(tmp_path):
    config = AdaptQConfig()
    config.evaluation = {"general": 26.2}
    with pytest.raises(ValueError, match=r"the config can't be saved: evaluation is \{'general': 26.2\}; allowed"):
        config.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_chosen_by_an_unknown_strategy_still_loads(tmp_path):
    register_selection_strategy("mine", needs="none")(lambda request: [0.0] * request.num_blocks)
    try:
        AdaptQConfig(selection_strategy="mine", layers_to_transform=[1]).save_pretrained(tmp_path)
    finally:
        del strategies._REGISTRY["mine"]
    assert AdaptQConfig.from_pretrained(tmp_path).selection_strategy == "mine"


def test_a_truncated_weights_file_is_found_when_the_config_is_loaded(tmp_path):
    from safetensors.torch import save_file

    AdaptQConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    AdaptQConfig.from_pretrained(tmp_path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"its header describes \d+: it is truncated or damaged\. Copy or save"):
        AdaptQConfig.from_pretrained(tmp_path)


def test_the_file_of_another_method_gives_its_config_as_in_peft(tmp_path):
    LoraConfig(r=3).save_pretrained(tmp_path)
    loaded = AdaptQConfig.from_pretrained(tmp_path)
    assert type(loaded) is LoraConfig
    assert loaded.r == 3
