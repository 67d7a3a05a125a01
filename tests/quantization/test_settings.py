from __future__ import annotations

import pytest
import torch
from transformers import BitsAndBytesConfig

from adaptq_peft.quantization import QUANTIZATION_NAMES, resolve_quantization


def test_every_name_resolves():
    assert {name: resolve_quantization(name) is None for name in QUANTIZATION_NAMES} == {
        "nf4": False,
        "fp4": False,
        "int8": False,
        "hqq4": False,
        "hqq3": False,
        "hqq2": False,
        "none": True,
    }
    assert resolve_quantization("nf4").nested_absmax
    assert resolve_quantization("int8").bits == 8
    assert [resolve_quantization(name).bits for name in ("hqq4", "hqq3", "hqq2")] == [4, 3, 2]


def test_which_settings_give_the_same_codes():
    names = [name for name in QUANTIZATION_NAMES if name != "none"]
    for name in names:
        same = [other for other in names if resolve_quantization(name).same_codes(resolve_quantization(other))]
        assert same == [name]


def test_a_bitsandbytes_config_and_its_dict_mean_the_same():
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="fp4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["gate"],
    )
    settings = resolve_quantization(config)
    assert settings == resolve_quantization(config.to_dict())
    assert (settings.bits, settings.quant_type, settings.nested_absmax) == (4, "fp4", False)
    assert settings.compute_dtype == torch.bfloat16
    assert settings.skip_modules == ("gate",)


def test_the_settings_of_a_model_that_arrived_in_gptq():
    arrived = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    settings = resolve_quantization(arrived)
    assert settings.describe() == "gptq in 4 bits, groups of 128"
    assert settings.rounds_alike_everywhere
    assert settings.same_codes(resolve_quantization(arrived | {"desc_act": True}))
    assert not settings.same_codes(resolve_quantization(arrived | {"group_size": -1}))
    assert not settings.same_codes(resolve_quantization("nf4"))
    assert resolve_quantization(arrived | {"group_size": -1}).describe() == "gptq in 4 bits, whole rows"


def test_a_config_that_quantizes_nothing_is_an_error():
    with pytest.raises(ValueError, match=r'load_in_4bit=False and load_in_8bit=False.*use quantization="none"'):
        resolve_quantization(BitsAndBytesConfig())
