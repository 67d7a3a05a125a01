"""Samples of deltas: what is in them, what is told apart, and what saving, loading and swapping do with it."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from support import randomize_trained

from adaptq_peft import AdaptQConfig, hotswap_adapter
from adaptq_peft.artifacts.certified_deltas import VALUES_PER_TENSOR, are_certified, sample_deltas
from adaptq_peft.artifacts.model_card import CERTIFIED
from adaptq_peft.fingerprint import MAX_TENSORS


def tensors_of(count, **changes):
    """What an adapter might save: deltas, a correction, codes."""
    torch.manual_seed(0)
    prefix = "base_model.model.layers"
    return {
        **{f"{prefix}.{i:03}.linear.adaptq_delta.weight": torch.randn(4, 6) for i in range(count)},
        f"{prefix}.900.linear.adaptq_low_rank_A.weight": torch.randn(2, 6),
        f"{prefix}.900.linear.adaptq_low_rank_B.weight": torch.randn(4, 2),
        f"{prefix}.900.linear.adaptq_frozen.weight": torch.zeros(12, 1, dtype=torch.uint8),
        **changes,
    }


def write(tensors, path):
    save_file(tensors, path / "adapter_model.safetensors")
    return path / "adapter_model.safetensors"


def test_deltas_and_b_of_corrections_are_sampled():
    sample = sample_deltas(tensors_of(2))
    assert [name.split(".")[1:4] for name in sample] == [
        ["000", "linear", "adaptq_delta"],
        ["001", "linear", "adaptq_delta"],
        ["900", "linear", "adaptq_low_rank_B"],
    ]
    assert {len(values) for values in sample.values()} == {VALUES_PER_TENSOR}


def test_of_many_tensors_some_are_sampled():
    assert len(sample_deltas(tensors_of(2 * MAX_TENSORS))) == MAX_TENSORS


def test_without_values_there_is_no_sample():
    assert sample_deltas({"layers.0.adaptq_delta.weight": torch.empty(2, 2, device="meta")}) is None


def test_deltas_are_known_again_also_rounded_and_under_names_without_prefix(tmp_path):
    tensors = tensors_of(3)
    plain = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    rounded = {name: t.bfloat16() if t.is_floating_point() else t for name, t in tensors.items()}
    for certified in (tensors, plain):
        for saved in (tensors, rounded):
            assert are_certified({"certificate": {"sample": sample_deltas(certified)}}, write(saved, tmp_path))


@pytest.mark.parametrize("kind", ["adaptq_delta", "adaptq_low_rank_B"])
def test_a_change_of_one_percent_is_noticed(kind, tmp_path):
    tensors = tensors_of(1)
    changed = {name: t * 1.01 if kind in name else t for name, t in tensors.items()}
    assert not are_certified({"certificate": {"sample": sample_deltas(tensors)}}, write(changed, tmp_path))


def test_deltas_of_zero_are_told_from_any_other(tmp_path):
    name = "layers.0.adaptq_delta.weight"
    config = {"certificate": {"sample": sample_deltas({name: torch.zeros(3, 3)})}}
    assert are_certified(config, write({name: torch.zeros(3, 3)}, tmp_path))
    assert not are_certified(config, write({name: torch.full((3, 3), 1e-9)}, tmp_path))


def test_other_tensors_or_shapes_are_others(tmp_path):
    config = {"certificate": {"sample": sample_deltas(tensors_of(2))}}
    assert not are_certified(config, write(tensors_of(3), tmp_path))
    smaller = {"base_model.model.layers.000.linear.adaptq_delta.weight": torch.zeros(2, 2)}
    assert not are_certified(config, write(tensors_of(2, **smaller), tmp_path))


def test_what_cannot_be_compared_is_taken_as_certified(tmp_path):
    assert are_certified({"certificate": {"budget": 0.05}}, write(tensors_of(1), tmp_path))
    assert are_certified({"certificate": {"sample": sample_deltas(tensors_of(1))}}, tmp_path / "none.safetensors")


@pytest.fixture
def certified(make_model, samples, tmp_path):
    """Builds an adapter with a certificate of its deltas, on a base that was loaded from `tmp_path/base`."""
    make_model().save_pretrained(tmp_path / "base")

    def build(**fields):
        base = type(make_model()).from_pretrained(tmp_path / "base")
        model = get_peft_model(base, AdaptQConfig(task_type="CAUSAL_LM", calibration_data=samples, **fields))
        randomize_trained(model, std=0.1)
        config = model.peft_config["default"]
        config.certificate = {
            **dict.fromkeys(CERTIFIED, 0.05),
            "sample": sample_deltas(get_peft_model_state_dict(model)),
        }
        return model

    return build


def load(make_model, tmp_path, folder):
    return PeftModel.from_pretrained(type(make_model()).from_pretrained(tmp_path / "base"), tmp_path / folder)


def test_after_further_training_the_card_does_not_certify_and_loading_drops_the_certificate(
    certified, make_model, tmp_path
):
    model = certified()
    model.save_pretrained(tmp_path / "first")
    assert "### Forgetting, certified" in (tmp_path / "first" / "README.md").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert load(make_model, tmp_path, "first").peft_config["default"].certificate["budget"] == 0.05

    randomize_trained(model, std=0.1, seed=6)
    model.save_pretrained(tmp_path / "second")
    card = (tmp_path / "second" / "README.md").read_text()
    assert "### Forgetting, certified" not in card
    assert "not those that `fit_to_budget` certified (they or their scale were changed since" in card
    with pytest.warns(UserWarning, match=r"deltas in .*second.* are not those that fit_to_budget certified.*again"):
        assert load(make_model, tmp_path, "second").peft_config["default"].certificate is None


def test_pickled_deltas_are_not_certified(certified, make_model, tmp_path):
    certified().save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert "or they are pickled and not compared)." in (tmp_path / "pickled" / "README.md").read_text()
    with pytest.warns(UserWarning, match="or they are pickled and not compared. Their certificate is dropped"):
        assert load(make_model, tmp_path, "pickled").peft_config["default"].certificate is None


def test_pickled_deltas_beside_older_safetensors_give_a_warning(certified, tmp_path):
    model = certified()
    model.save_pretrained(tmp_path / "both")
    with pytest.warns(UserWarning, match="PEFT will load the older adapter_model.safetensors beside it. Remove that"):
        model.save_pretrained(tmp_path / "both", safe_serialization=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path / "both")


def test_a_swapped_adapter_keeps_its_certificate_where_its_deltas_are_rescaled(certified, make_model, tmp_path):
    certified(delta_scaling=0.3, frozen_alpha=4).save_pretrained(tmp_path / "new")
    certified().save_pretrained(tmp_path / "old")
    model = load(make_model, tmp_path, "old")
    hotswap_adapter(model, tmp_path / "new")
    model.save_pretrained(tmp_path / "swapped")
    assert load(make_model, tmp_path, "swapped").peft_config["default"].certificate["budget"] == 0.05
