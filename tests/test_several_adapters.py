"""Adapters on different blocks of one quantized model: each sees the base as it was trained."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from support import fail_at_call, logits, randomize

from adaptq_peft import AdaptQConfig
from adaptq_peft.layer import AdaptQLayer
from adaptq_peft.quantization import is_quantized, origin_of

BLOCKS = {"first": [0, 1], "second": [1, 2], "third": [3]}
RANKS = {"first": 2, "second": 4, "third": 0}  # of corrections, in TestMixedRank


def config(name, **fields):
    fields = {"layers_to_transform": BLOCKS[name], "original_weights": "keep", **fields}
    return AdaptQConfig(task_type="CAUSAL_LM", **{"frozen_rank": 0, **fields})


def alone(base, name, **fields):
    model = get_peft_model(copy.deepcopy(base), config(name, **fields), adapter_name=name)
    randomize(model, name, seed=len(name))
    return model


@pytest.fixture
def base(model, tmp_path):
    """A base with a checkpoint on disk, from which original weights can be read."""
    model.save_pretrained(tmp_path / "base")
    return type(model).from_pretrained(tmp_path / "base")


@pytest.fixture
def saved(base, tmp_path):
    """A folder with each of the adapters, trained alone."""
    for name in BLOCKS:
        alone(base, name, original_weights="checkpoint").save_pretrained(tmp_path)
    return tmp_path


def together(base, names, **fields):
    model = get_peft_model(copy.deepcopy(base), config(names[0], **fields), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config(name, **fields))
    for name in names:
        randomize(model, name, seed=len(name))
    return model


def outputs(model, name, batch):
    """Logits with an adapter, and with that adapter switched off."""
    model.set_adapter(name)
    with model.disable_adapter():
        off = logits(model, batch)
    return logits(model, batch), off


def assert_as_alone(model, base, names, batch):
    for name in names:
        for found, expected in zip(outputs(model, name, batch), outputs(alone(base, name), name, batch), strict=True):
            assert torch.equal(found, expected), name


@pytest.mark.parametrize("source", ["keep", "checkpoint"])
def test_each_adapter_is_as_it_is_alone_in_any_order(base, batch, source):
    model = together(base, ["first", "second", "third"], original_weights=source)
    assert_as_alone(model, base, ["first", "third", "second", "third", "first"], batch)


def test_loaded_from_disk_and_reloaded(base, saved, batch):
    model = PeftModel.from_pretrained(copy.deepcopy(base), saved / "first", adapter_name="first")
    model.load_adapter(saved / "third", adapter_name="third")
    model.load_adapter(saved / "second", adapter_name="second")
    assert_as_alone(model, base, BLOCKS, batch)
    model.delete_adapter("second")
    model.load_adapter(saved / "second", adapter_name="second")
    assert_as_alone(model, base, BLOCKS, batch)


def test_an_adapter_whose_file_does_not_fit_is_taken_off_again(base, saved, batch):
    model = PeftModel.from_pretrained(base, saved / "first", adapter_name="first")
    expected = logits(model, batch)
    file = saved / "second" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(min(tensors))
    save_file(tensors, file)
    with pytest.raises(ValueError, match="1 tensors are missing"):
        model.load_adapter(saved / "second", "second")
    assert list(model.peft_config) == ["first"]
    assert torch.equal(logits(model, batch), expected)
    with pytest.raises(ValueError, match="tensors are missing"):  # what is loaded stays
        set_peft_model_state_dict(model, tensors, adapter_name="first")
    assert list(model.peft_config) == ["first"]
    model.load_adapter(saved / "third", "third")
    with pytest.raises(ValueError, match="tensors are missing"):
        set_peft_model_state_dict(model, tensors, adapter_name="third")
    assert list(model.peft_config) == ["first", "third"]


def test_what_is_saved_is_the_deltas_alone(base, saved, tmp_path, batch):
    model = together(base, ["first", "second", "third"])
    model.save_pretrained(tmp_path / "again")
    for name in BLOCKS:
        again, before = tmp_path / "again" / name, saved / name
        file = "adapter_model.safetensors"
        assert (again / file).read_bytes() == (before / file).read_bytes()


def test_deleting_drops_what_only_the_deleted_adapter_needed(base, batch):
    model = together(base, ["first", "second", "third"])
    model.delete_adapter("second")
    assert_as_alone(model, base, ["first", "third"], batch)
    block = (base.config.model_type == "llama" and "model.layers.2") or "transformer.h.2"
    linears = [m for m in model.base_model.model.get_submodule(block).modules() if is_quantized(m)]
    assert linears
    wrapped = [m for m in model.base_model.model.get_submodule(block).modules() if isinstance(m, AdaptQLayer)]
    assert not any(layer.adaptq_frozen is not None for layer in wrapped)
    model.delete_adapter("third")
    assert_as_alone(model, base, ["first"], batch)


def test_deleting_the_active_adapter_activates_another_one_everywhere(base, batch):
    model = together(base, ["first", "third"])
    model.set_adapter("first")
    model.delete_adapter("first")
    assert model.active_adapters == ["third"]
    assert torch.equal(logits(model, batch), outputs(alone(base, "third"), "third", batch)[0])


def test_an_additional_adapter_is_not_trainable_by_itself(base):
    model = together(base, ["first", "second"], frozen_rank=2)
    assert all(".first." in name for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_an_adapter_that_is_added_while_adapters_are_off(base, batch):
    model = together(base, ["first"], frozen_rank=2, init_weights=False)
    with model.disable_adapter():
        off = logits(model, batch)
        model.add_adapter("third", config("third"))  # adapts what the first one corrects
        assert torch.equal(logits(model, batch), off)


def test_a_second_adapter_on_rounded_weights_leaves_the_first_as_it_was(base, batch):
    model = together(base, ["first"], original_weights="dequantized")
    expected = logits(model, batch)
    model.add_adapter("second", config("first", original_weights="dequantized"))
    assert torch.equal(logits(model, batch), expected)


def test_training_one_adapter_gives_the_same_losses_as_alone(base, batch, train):
    model = together(base, ["first", "second"])
    model.set_adapter("second")
    assert train(model, batch) == train(alone(base, "second"), batch)
    assert torch.equal(outputs(model, "first", batch)[0], outputs(alone(base, "first"), "first", batch)[0])


def test_an_adapter_without_quantization_beside_one_with(base, batch):
    model = get_peft_model(copy.deepcopy(base), config("first"), adapter_name="first")
    model.add_adapter("plain", AdaptQConfig(layers_to_transform=[2], quantization="none"))
    model.set_adapter("plain")
    assert torch.equal(logits(model, batch), logits(base, batch))
    model.set_adapter("first")
    untrained = get_peft_model(copy.deepcopy(base), config("first"), adapter_name="first")
    assert torch.equal(logits(model, batch), logits(untrained, batch))


def test_only_some_layers_of_a_block_adapted(base, batch):
    """The other linears of the block are plain for one adapter and quantized for the other."""
    target = "o_proj" if base.config.model_type == "llama" else "c_fc"
    model = together(base, ["first", "third"], target_modules=[target])
    for name in ("first", "third", "first"):
        found, expected = outputs(model, name, batch), outputs(alone(base, name, target_modules=[target]), name, batch)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_batch_with_an_adapter_for_each_sample(base, batch):
    model = together(base, ["first", "third"]).eval()
    expected = {name: outputs(alone(base, name), name, batch)[0] for name in ("first", "third")}
    model.set_adapter("first")
    with torch.no_grad():
        found = model(**batch, adapter_names=["first", "third", "third", "first"]).logits
    rows = torch.stack([expected[name][i] for i, name in enumerate(["first", "third", "third", "first"])])
    torch.testing.assert_close(found, rows, rtol=1e-4, atol=1e-5)


def test_merging_one_of_several(base, batch):
    for name in ("first", "third"):
        model = together(base, ["first", "third"])
        model.set_adapter(name)
        expected = outputs(alone(base, name), name, batch)[0]
        model.merge_adapter()
        torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        assert torch.equal(logits(model, batch), expected)
        merged = model.merge_and_unload()
        assert not any(is_quantized(m) or isinstance(m, AdaptQLayer) for m in merged.modules())
        torch.testing.assert_close(logits(merged, batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 2])
def test_adapters_that_are_merged_one_after_the_other_are_those_that_are_active_together(base, batch, rank):
    model = together(base, ["first", "third"], frozen_rank=rank, init_weights=False)
    model.base_model.set_adapter(["first", "third"])
    expected = logits(model, batch)
    model.merge_adapter(["first"])
    model.merge_adapter(["third"])
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_that_is_merged_while_another_is_active(llama):
    model = together(llama, ["first", "third"])
    layer, x = model.base_model.model.model.layers[0].mlp.up_proj, torch.randn(2, 64)
    model.set_adapter("first")
    expected = layer(x)
    model.set_adapter("third")
    assert not torch.allclose(layer(x), expected, rtol=1e-3)
    model.merge_adapter(["first"])
    torch.testing.assert_close(layer(x), expected)


def test_a_combination_covers_the_blocks_of_both(base, batch):
    model = together(base, ["first", "third"])
    model.add_weighted_adapter(["first", "third"], [1.0, 1.0], "both")
    assert model.peft_config["both"].layers_to_transform == [0, 1, 3]
    model.set_adapter("both")
    both = logits(model, batch)
    expected = get_peft_model(copy.deepcopy(base), config("first", layers_to_transform=[0, 1, 3]), adapter_name="both")
    for layer, own in zip(expected.modules(), _layers_in_order(model, expected), strict=True):
        if isinstance(layer, AdaptQLayer):
            layer.adaptq_delta["both"].load_state_dict(own.adaptq_delta["both"].state_dict())
    assert torch.equal(both, logits(expected, batch))
    assert_as_alone(model, base, ["first", "third"], batch)


def _layers_in_order(model, expected):
    return [
        model.get_submodule(name) if isinstance(module, AdaptQLayer) else None
        for name, module in expected.named_modules()
    ]


def test_without_originals_at_hand_it_is_refused_and_nothing_changes(model, batch):
    wrapped = get_peft_model(model, AdaptQConfig(task_type="CAUSAL_LM", layers_to_transform=[2, 3]))
    randomize(wrapped)
    expected, names = logits(wrapped, batch), list(wrapped.state_dict())
    with pytest.raises(ValueError, match=r"can't be read from a checkpoint: it was built in memory"):
        wrapped.add_adapter("second", AdaptQConfig(task_type="CAUSAL_LM", layers_to_transform=[1]))
    assert list(wrapped.peft_config) == ["default"]
    assert list(wrapped.state_dict()) == names
    assert torch.equal(logits(wrapped, batch), expected)


def test_a_failure_in_the_middle_takes_both_forms_back(base, batch, monkeypatch):
    model = together(base, ["first", "third"])
    expected = {name: outputs(model, name, batch)[0] for name in ("first", "third")}
    names, modules = list(model.state_dict()), [type(module) for module in model.modules()]
    fail_at_call(monkeypatch, AdaptQLayer, "update_layer", call=4)
    with pytest.raises(MemoryError, match="no memory"):
        model.add_adapter("second", config("second"))
    assert list(model.state_dict()) == names
    assert [type(module) for module in model.modules()] == modules
    for name, output in expected.items():
        assert torch.equal(outputs(model, name, batch)[0], output)


def test_other_settings_are_refused(base):
    model = together(base, ["first"])
    with pytest.raises(ValueError, match="wants its frozen blocks in fp4 with nested absmax, and adapter 'first' on"):
        model.add_adapter("second", config("second", quantization="fp4"))
    with pytest.raises(ValueError, match="has original_weights='dequantized', and adapter 'first' on this model has"):
        model.add_adapter("second", config("second", original_weights="dequantized"))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"Adapters are merged into \d+ layers of this model, so a new one would"):
        model.add_adapter("second", config("second"))


def test_other_settings_than_a_deleted_adapter_had_are_refused(base):
    model = together(base, ["first"])
    model.delete_adapter("first")
    with pytest.raises(ValueError, match=r"linears quantized otherwise than the new adapter wants them: .* in"):
        model.add_adapter("second", config("first", quantization="int8"))


def test_targets_of_blocks_that_another_adapter_quantized(llama, batch):
    wrapped = get_peft_model(
        llama, AdaptQConfig(target_modules=["layers.0.mlp.up_proj"], original_weights="keep"), adapter_name="first"
    )
    wrapped.add_adapter("second", AdaptQConfig(target_modules=["layers.2.mlp.up_proj"]))
    assert wrapped.peft_config["second"].layers_to_transform == [2]
    wrapped.set_adapter("second")
    assert [name for name, p in wrapped.named_parameters() if p.requires_grad] == [
        "base_model.model.model.layers.2.mlp.up_proj.adaptq_delta.second.weight"
    ]


class TestMixedRank:
    """Adapters with low-rank corrections: a linear may be adapted by one and corrected by another."""

    def config(self, name, **fields):
        return config(name, frozen_rank=RANKS[name], **fields)

    def alone(self, base, name, **fields):
        model = get_peft_model(copy.deepcopy(base), self.config(name, **fields), adapter_name=name)
        self.train(model, name)
        return model

    def together(self, base, names, **fields):
        model = get_peft_model(copy.deepcopy(base), self.config(names[0], **fields), adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, self.config(name, **fields))
        for name in names:
            self.train(model, name)
        return model

    @staticmethod
    def train(model, name):
        generator = torch.Generator().manual_seed(len(name))
        for layer in model.modules():
            if isinstance(layer, AdaptQLayer):
                for _, parameter in layer.parameters_of(name):
                    parameter.data.normal_(std=0.05, generator=generator)

    def assert_as_alone(self, model, base, names, batch):
        for name in names:
            expected = outputs(self.alone(base, name), name, batch)
            for found, wanted in zip(outputs(model, name, batch), expected, strict=True):
                assert torch.equal(found, wanted), name

    def test_each_adapter_is_as_it_is_alone_in_any_order(self, base, batch):
        for order in (["first", "second", "third"], ["third", "first", "second"]):
            self.assert_as_alone(self.together(base, order), base, [*order, order[0]], batch)

    def test_saved_loaded_and_deleted(self, base, batch, tmp_path):
        self.together(base, ["first", "second"], original_weights="checkpoint").save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "second", adapter_name="second")
        model.load_adapter(tmp_path / "first", adapter_name="first")
        self.assert_as_alone(model, base, ["first", "second"], batch)
        model.delete_adapter("second")
        self.assert_as_alone(model, base, ["first"], batch)
        both = [m for m in model.modules() if isinstance(m, AdaptQLayer) and m.adaptq_frozen is not None]
        assert not both
        model.load_adapter(tmp_path / "second", adapter_name="second")
        self.assert_as_alone(model, base, ["second", "first"], batch)

    def test_deleting_the_only_one_with_corrections_leaves_bare_quantized_linears(self, base, batch):
        model = self.together(base, ["first", "third"])
        model.delete_adapter("first")
        self.assert_as_alone(model, base, ["third"], batch)
        assert not any(isinstance(m, AdaptQLayer) and is_quantized(m.base_layer) for m in model.modules())

    def test_a_failure_in_the_middle_takes_both_forms_back(self, base, batch, monkeypatch):
        model = self.together(base, ["first", "third"])
        expected = {name: outputs(model, name, batch)[0] for name in ("first", "third")}
        names, modules = list(model.state_dict()), [type(module) for module in model.modules()]
        fail_at_call(monkeypatch, AdaptQLayer, "add_correction", call=3)
        with pytest.raises(MemoryError, match="no memory"):
            model.add_adapter("second", self.config("second"))
        assert list(model.state_dict()) == names
        assert [type(module) for module in model.modules()] == modules
        for name, output in expected.items():
            assert torch.equal(outputs(model, name, batch)[0], output)

    def test_training_one_gives_the_same_losses_as_alone(self, base, batch, train):
        model = self.together(base, ["first", "second"])
        model.set_adapter("second")
        assert train(model, batch) == train(self.alone(base, "second"), batch)
        assert torch.equal(outputs(model, "first", batch)[0], outputs(self.alone(base, "first"), "first", batch)[0])

    def test_a_batch_with_an_adapter_for_each_sample(self, base, batch):
        model = self.together(base, ["first", "second"]).eval()
        expected = {name: outputs(self.alone(base, name), name, batch) for name in ("first", "second")}
        model.set_adapter("first")
        names = ["first", "second", "__base__", "second"]
        with torch.no_grad():
            found = model(**batch, adapter_names=names).logits
        chosen = [expected["first"][1] if name == "__base__" else expected[name][0] for name in names]
        rows = torch.stack([output[i] for i, output in enumerate(chosen)])
        torch.testing.assert_close(found, rows, rtol=1e-3, atol=1e-4)

    def test_merging_one_of_several(self, base, batch):
        for frozen in ("dequantized", "original"):
            model = self.together(base, ["first", "second"])
            model.set_adapter("first")
            expected = outputs(self.alone(base, "first"), "first", batch)[0]
            model.merge_adapter()
            torch.testing.assert_close(logits(model, batch), expected, rtol=1e-3, atol=1e-4)
            model.unmerge_adapter()
            assert torch.equal(logits(model, batch), expected)
            alone = self.alone(base, "first").merge_and_unload(frozen=frozen)
            merged = model.merge_and_unload(frozen=frozen)
            assert not any(is_quantized(m) or isinstance(m, AdaptQLayer) for m in merged.modules())
            torch.testing.assert_close(logits(merged, batch), logits(alone, batch), rtol=1e-3, atol=1e-4)

    def test_a_linear_combination_is_the_sum_on_each_linear(self, base, batch):
        model = self.together(base, ["first", "second"])
        model.add_weighted_adapter(["first", "second"], [0.5, 2.0], "both")
        assert (model.peft_config["both"].frozen_rank, model.peft_config["both"].layers_to_transform) == (6, [0, 1, 2])
        for layer in model.modules():
            if isinstance(layer, AdaptQLayer) and layer.is_corrected_by("both"):
                wanted = 0.5 * layer.correction_of("first") + 2.0 * layer.correction_of("second")
                torch.testing.assert_close(layer.correction_of("both"), wanted)
            elif isinstance(layer, AdaptQLayer) and layer.is_corrected_by("second"):  # block 0: the first's deltas
                delta = layer.get_delta_weight("first")
                wanted = 0.5 * delta + 2.0 * layer.correction_of("second")
                torch.testing.assert_close(layer.get_delta_weight("both"), wanted)
        self.assert_as_alone(model, base, ["first", "second"], batch)

    def test_other_combinations_are_refused(self, base):
        model = self.together(base, ["first", "second"])
        with pytest.raises(ValueError, match=r"is 'ties', and the adapters have low-rank corrections .*\[2, 4\]"):
            model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "both", combination_type="ties", density=0.5)
        assert list(model.peft_config) == ["first", "second"]


def test_originals_that_only_a_deleted_adapter_kept_are_freed(model, tmp_path):
    model.save_pretrained(tmp_path)
    wrapped = get_peft_model(type(model).from_pretrained(tmp_path), config("first"), adapter_name="first")
    wrapped.add_adapter("second", config("first", original_weights="checkpoint"))
    quantized = [module for module in wrapped.modules() if is_quantized(module)]
    assert all(origin_of(module).kept is not None for module in quantized)
    wrapped.delete_adapter("first")
    assert all(origin_of(module).kept is None for module in quantized)
