from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter as peft_hotswap_adapter
from safetensors.torch import load_file, save_file
from support import logits, same

from adaptq_peft import AdaptQConfig, hotswap_adapter
from adaptq_peft.layer import AdaptQLayer

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def deltas(model, adapter="default"):
    return {name: p.detach().clone() for name, p in model.named_parameters() if f".adaptq_delta.{adapter}." in name}


@pytest.fixture
def base(make_model, tmp_path):
    """Loads the base again from disk, as it was before any adapter."""
    model = make_model()
    model.save_pretrained(tmp_path / "base")
    return lambda: type(model).from_pretrained(tmp_path / "base")


@pytest.fixture
def save_adapter(base, tmp_path):
    """Saves an adapter with random deltas and returns its folder."""

    def save(name, seed, **fields):
        fields = {"layers_to_transform": [2, 3], **fields}
        model = get_peft_model(base(), AdaptQConfig(task_type="CAUSAL_LM", **fields))
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.1, generator=generator)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def load(base, folder, **kwargs):
    return PeftModel.from_pretrained(base(), folder, **kwargs)


@pytest.mark.parametrize(
    "fields",
    [{}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 7]}, {"frozen_rank": 4}],
)
def test_the_outputs_are_those_of_the_new_adapter(base, save_adapter, batch, fields):
    first, second = save_adapter("first", 1, **fields), save_adapter("second", 2, **fields)
    model = load(base, first)
    parameters = dict(model.named_parameters())
    before, expected = logits(model, batch), logits(load(base, second), batch)
    hotswap_adapter(model, second)
    assert not torch.equal(before, expected)
    assert torch.equal(logits(model, batch), expected)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}


def test_a_subfolder_and_another_name(base, save_adapter, batch, tmp_path):
    first, second = save_adapter("first", 1), save_adapter("second", 2)
    expected = logits(load(base, second), batch)
    model = load(base, first, adapter_name="mine")
    hotswap_adapter(model, str(tmp_path), adapter_name="mine", subfolder="second")
    assert torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_compiled_model_is_not_compiled_again(base, save_adapter, batch, quantization):
    fields = {"quantization": quantization}
    first, second = save_adapter("first", 1, **fields), save_adapter("second", 2, delta_scaling=1.0, **fields)
    expected = logits(load(base, second), batch)
    torch._dynamo.reset()
    compiled = torch.compile(load(base, first), backend="eager")
    before = [logits(compiled, batch) for _ in range(2)][-1]  # bitsandbytes makes dynamo compile twice
    with torch._dynamo.config.patch(error_on_recompile=True):
        hotswap_adapter(compiled, second)
        after = logits(compiled, batch)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, expected)


@pytest.mark.parametrize(("scaling", "exact"), [(1.0, True), (0.3, False)])
def test_another_scaling_is_folded_into_the_deltas(base, save_adapter, batch, tmp_path, scaling, exact):
    first, second = save_adapter("first", 1), save_adapter("second", 2, delta_scaling=scaling)
    expected = logits(load(base, second), batch)
    model = load(base, first)
    hotswap_adapter(model, second)
    found = logits(model, batch)
    assert torch.equal(found, expected) if exact else torch.allclose(found, expected, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(base, tmp_path / "again"), batch), found)


def test_a_scale_that_was_set_for_the_old_deltas_is_reset(base, save_adapter, batch):
    first, second = save_adapter("first", 1), save_adapter("second", 2)
    expected = logits(load(base, second), batch)
    model = load(base, first)
    for layer in model.modules():
        if isinstance(layer, AdaptQLayer):
            layer.set_scale("default", 0.0)
    hotswap_adapter(model, second)
    assert torch.equal(logits(model, batch), expected)


def test_what_describes_the_deltas_goes_with_them(base, save_adapter, samples):
    chosen = {"layers_to_transform": None, "selection_strategy": "activation", "calibration_data": samples}
    first, second = save_adapter("first", 1), save_adapter("second", 2, **chosen)
    model = load(base, first)
    assert model.peft_config["default"].profile is None
    hotswap_adapter(model, second)
    assert model.peft_config["default"].profile == AdaptQConfig.from_pretrained(second).profile


@pytest.mark.parametrize("field", ["certificate", "evaluation"])
def test_figures_of_the_old_deltas_do_not_stay(base, save_adapter, field):
    first, second = save_adapter("first", 1), save_adapter("second", 2)
    model = load(base, first)
    setattr(model.peft_config["default"], field, {"general": 1.0})
    hotswap_adapter(model, second)
    assert getattr(model.peft_config["default"], field) is None


def test_a_transformers_model_with_the_adapter(base, save_adapter, batch):
    first, second = save_adapter("first", 1), save_adapter("second", 2)
    expected = logits(load(base, second), batch)
    model = base()
    model.load_adapter(str(first))
    hotswap_adapter(model, second)
    assert torch.equal(logits(model, batch), expected)


def test_training_goes_on_with_the_new_deltas(base, save_adapter, batch, train):
    first, second = save_adapter("first", 1), save_adapter("second", 2)
    model = load(base, first, is_trainable=True)
    hotswap_adapter(model, second)
    assert train(model, batch) == train(load(base, second, is_trainable=True), batch)


def change_config(folder, **fields):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def drop_the_last(tensors):
    del tensors[sorted(tensors)[-1]]


def make_not_finite(tensors):
    tensors[sorted(tensors)[-1]].fill_(float("nan"))


def change_shape(tensors):
    tensors["base_model.model.lm_head.weight"] = torch.zeros(3, 3)


@pytest.mark.parametrize(
    ("fields", "change", "message"),
    [
        ({"layers_to_transform": [1, 2]}, None, r"layers_to_transform is \[1, 2\] instead of \[2, 3\]"),
        ({"quantization": "fp4"}, None, r"quantization is 'fp4' instead of 'nf4'"),
        ({"target_modules": ["q_proj"]}, None, r"target_modules is \{'q_proj'\} instead of None"),
        ({}, drop_the_last, r"1 tensors are missing"),
        ({}, make_not_finite, r"1 tensors hold values that are not finite"),
        ({}, change_shape, r"1 tensors have another shape: .*lm_head"),
    ],
)
def test_an_adapter_that_does_not_fit_changes_nothing(base, save_adapter, fields, change, message):
    common = {"modules_to_save": ["lm_head"]}
    first, second = save_adapter("first", 1, **common), save_adapter("second", 2, **common, **fields)
    if change is not None:
        tensors = load_file(second / WEIGHTS)
        change(tensors)
        save_file(tensors, second / WEIGHTS)
    model = load(base, first)
    before, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.peft_config["default"])
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, second)
    assert same(before, model.state_dict())
    assert config == model.peft_config["default"]


def test_an_adapter_of_another_base_is_an_error(base, save_adapter, make_model, tmp_path):
    first = save_adapter("first", 1)
    other = get_peft_model(make_model(seed=1), AdaptQConfig(task_type="CAUSAL_LM", layers_to_transform=[2, 3]))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"sampled tensors differ"):
        hotswap_adapter(load(base, first), tmp_path / "other")


def test_a_truncated_file_is_an_error(base, save_adapter):
    first, second = save_adapter("first", 1), save_adapter("second", 2)
    (second / WEIGHTS).write_bytes((second / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(ValueError, match="it is truncated or damaged"):
        hotswap_adapter(load(base, first), second)


def test_a_merged_adapter_is_an_error(base, save_adapter):
    first, second = save_adapter("first", 1), save_adapter("second", 2)
    model = load(base, first)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"'default' is merged into the base weights; call unmerge_adapter\(\) first"):
        hotswap_adapter(model, second)


def test_other_methods_are_errors(base, save_adapter, make_model, tmp_path):
    first = save_adapter("first", 1)
    lora = get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"holds an adapter of type LORA, and only one of type ADAPTQ"):
        hotswap_adapter(load(base, first), tmp_path / "lora")
    with pytest.raises(ValueError, match=r"'default' can't be swapped: the model has \{'default': 'LORA'\}"):
        hotswap_adapter(lora, first)
    with pytest.raises(ValueError, match=r"'other' can't be swapped: the model has \{'default': 'ADAPTQ'\}"):
        hotswap_adapter(load(base, first), first, adapter_name="other")
    with pytest.raises(ValueError, match=r"the model has no adapters"):
        hotswap_adapter(make_model(), first)


def test_what_peft_and_transformers_say_when_asked_to_swap(base, save_adapter):
    """The reason for a function of our own."""
    first, second = save_adapter("first", 1), save_adapter("second", 2)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but ADAPTQ was passed"):
        peft_hotswap_adapter(load(base, first), second, adapter_name="default")
    model = base()
    model.load_adapter(str(first), adapter_name="default")
    with pytest.raises(ValueError, match="Hotswapping is currently only supported for LoRA"):
        model.load_adapter(str(second), adapter_name="default", hotswap=True)


def test_calibrated_codes_must_be_the_same(base, save_adapter, samples, batch):
    fields = {"quantization_calibration": "gptq"}
    first = save_adapter("first", 1, **fields, calibration_data=samples[:30])
    again = save_adapter("again", 2, **fields, calibration_data=samples[:30])
    other = save_adapter("other", 3, **fields, calibration_data=samples[30:])
    model = load(base, first)
    hotswap_adapter(model, str(again))
    expected = logits(load(base, again), batch)
    assert torch.equal(logits(model, batch), expected)
    with pytest.raises(ValueError, match=r"have other codes: \d+ layers differ, the first is model\.layers"):
        hotswap_adapter(model, str(other))
    assert torch.equal(logits(model, batch), expected)


def test_corrections_of_another_scale_are_folded_in_and_those_of_another_rank_refused(base, save_adapter, batch):
    first, second = save_adapter("first", 1, frozen_rank=4), save_adapter("second", 2, frozen_rank=4, frozen_alpha=16)
    model, expected = load(base, first), logits(load(base, second), batch)
    model.base_model.model.model.layers[0].mlp.up_proj.set_scale("default", 0.5)  # was for the old values
    hotswap_adapter(model, second)
    assert torch.equal(logits(model, batch), expected)
    third = save_adapter("third", 3, frozen_rank=2)
    with pytest.raises(ValueError, match="frozen_rank is 2 instead of 4"):
        hotswap_adapter(model, third)
