from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from peft.utils import merge_utils

from adaptq_peft import AdaptQConfig
from adaptq_peft.layer import AdaptQLayer


def config(blocks, **fields):
    return AdaptQConfig(
        task_type="CAUSAL_LM", layers_to_transform=blocks, init_weights=False, **{"frozen_rank": 0, **fields}
    )


@pytest.fixture
def wrapped(model):
    torch.manual_seed(0)
    wrapped = get_peft_model(model, config([1, 3], delta_scaling=0.5))
    wrapped.add_adapter("second", config([1, 3], delta_scaling=2.0))
    return wrapped.eval()


def changes(wrapped, adapter):
    return [
        layer.scaling[adapter] * parameter.detach()
        for layer in wrapped.modules()
        if isinstance(layer, AdaptQLayer)
        for parameter in layer.adaptq_delta[adapter].parameters()
    ]


def test_linear_is_the_weighted_sum_of_the_changes(wrapped, batch):
    wrapped.add_weighted_adapter(["default", "second"], [0.7, -0.3], "sum")
    for total, first, second in zip(*(changes(wrapped, name) for name in ("sum", "default", "second")), strict=True):
        torch.testing.assert_close(total, 0.7 * first - 0.3 * second)
    assert wrapped.active_adapters == ["default"]
    wrapped.set_adapter("sum")
    with torch.no_grad():
        assert torch.isfinite(wrapped(**batch).logits).all()


@pytest.mark.parametrize("density", [0.3, 0.8])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ties", {"majority_sign_method": "total"}),
        ("ties", {"majority_sign_method": "frequency"}),
        ("dare_ties", {"majority_sign_method": "total"}),
        ("dare_ties", {"majority_sign_method": "frequency"}),
        ("dare_linear", {}),
        ("magnitude_prune", {}),
    ],
)
def test_the_other_kinds_are_those_of_peft(wrapped, kind, options, density, monkeypatch):
    weights, options, combine = [1.0, 0.5], {"density": density, **options}, getattr(merge_utils, kind)

    def seeded(*arguments, **given):
        torch.manual_seed(1)  # DARE drops values by chance
        return combine(*arguments, **given)

    monkeypatch.setattr(merge_utils, kind, seeded)
    wrapped.add_weighted_adapter(["default", "second"], weights, "new", combination_type=kind, **options)
    for found, *parts in zip(*(changes(wrapped, name) for name in ("new", "default", "second")), strict=True):
        torch.testing.assert_close(found, seeded(parts, torch.tensor(weights), **options))


def test_figures_of_one_adapter_are_not_those_of_all(wrapped):
    wrapped.peft_config["default"].evaluation = {"general": {"adapted": 2.0}}
    wrapped.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both")
    assert wrapped.peft_config["both"].evaluation is None


def test_one_adapter_of_weight_one_is_a_copy(wrapped, batch):
    with torch.no_grad():
        expected = wrapped(**batch).logits
        wrapped.add_weighted_adapter(["default"], [1.0], "copy")
        wrapped.set_adapter("copy")
        torch.testing.assert_close(wrapped(**batch).logits, expected)


def test_different_blocks_on_a_model_that_is_not_quantized(llama):
    wrapped = get_peft_model(llama, config([0], quantization="none"))
    wrapped.add_adapter("second", config([2], quantization="none"))
    wrapped.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both")
    assert wrapped.peft_config["both"].layers_to_transform == [0, 2]
    delta = llama.model.layers[2].mlp.up_proj.adaptq_delta
    torch.testing.assert_close(delta["both"].weight, delta["second"].weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["third"], [1.0], "new"), r"can't combine adapters \['third'\].*the model has \['default', 'second'\]"),
        ((["default"], [1.0, 2.0], "new"), r"give known adapters, a weight for each, and a new name"),
        ((["default"], [1.0], "second"), r"into 'second'"),
        ((["default"], [1.0], "new", "cat"), r"combination_type is 'cat'; allowed: 'linear', 'ties', 'dare_ties'"),
        ((["default"], [1.0], "new", "ties"), r"'ties' needs a density above 0 and at most 1, got None"),
    ],
)
def test_errors(wrapped, arguments, message):
    with pytest.raises(ValueError, match=message):
        wrapped.add_weighted_adapter(*arguments)
    assert list(wrapped.peft_config) == ["default", "second"]


def test_adapters_of_different_layers_cannot_be_combined(llama):
    wrapped = get_peft_model(llama, config([1], target_modules=["q_proj"], quantization="none"))
    wrapped.add_adapter("second", config([1], target_modules=["v_proj"], quantization="none"))
    with pytest.raises(ValueError, match="the adapters to combine have different target_modules"):
        wrapped.add_weighted_adapter(["default", "second"], [1.0, 1.0], "new")


def test_modules_that_one_adapter_trains_whole_come_along_and_shared_ones_are_refused(llama):
    wrapped = get_peft_model(llama, config([1], modules_to_save=["lm_head"]))
    wrapped.add_adapter("second", config([1]))
    wrapped.lm_head.modules_to_save["default"].weight.data.mul_(2)
    wrapped.add_weighted_adapter(["default", "second"], [1.0, 1.0], "new")
    saved = wrapped.lm_head.modules_to_save
    assert torch.equal(saved["new"].weight, saved["default"].weight)
    with pytest.raises(ValueError, match="if they target the same module with modules_to_save, but found 1 such"):
        wrapped.add_weighted_adapter(["default", "new"], [1.0, 1.0], "another")


def test_trained_rows_of_embeddings_are_refused(llama):
    wrapped = get_peft_model(llama, config([1], trainable_token_indices=[3]))
    wrapped.add_adapter("second", config([1], trainable_token_indices=[3]))
    with pytest.raises(ValueError, match=r"train rows of embeddings, .*\(trainable_token_indices=\[3\]\); combine"):
        wrapped.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both")
    assert "both" not in wrapped.peft_config


def test_no_rule_is_said_to_have_chosen_the_blocks_of_all(llama, samples, tmp_path):
    fields = {"task_type": "CAUSAL_LM", "num_adapted_blocks": 1, "quantization": "none"}
    wrapped = get_peft_model(llama, AdaptQConfig(**fields, selection_strategy="activation", calibration_data=samples))
    wrapped.add_adapter("second", AdaptQConfig(**fields, selection_strategy="first"))
    wrapped.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both")
    wrapped.save_pretrained(tmp_path, selected_adapters=["both"])
    (line,) = [each for each in (tmp_path / "both" / "README.md").read_text().splitlines() if "adapted blocks" in each]
    assert "given by index" in line
