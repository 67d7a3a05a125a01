from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from peft.utils.peft_types import PeftType
from support import fail_at_call, logits, randomize
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptq_peft import AdaptQConfig, AdaptQTuner
from adaptq_peft import tuner as tuner_module
from adaptq_peft.layer import AdaptQLayer, LinearDelta
from adaptq_peft.quantization import is_quantized
from adaptq_peft.selection import find_blocks


def wrap(model, samples, **fields):
    return get_peft_model(
        model, AdaptQConfig(task_type="CAUSAL_LM", calibration_data=samples, **{"frozen_rank": 0, **fields})
    )


def snapshot(model):
    return (
        {name: (id(value), value.clone()) for name, value in model.state_dict(keep_vars=True).items()},
        [(name, id(module), module.training) for name, module in model.named_modules()],
        [parameter.requires_grad for parameter in model.parameters()],
    )


def assert_unchanged(model, before):
    tensors, modules, flags = snapshot(model)
    assert tensors.keys() == before[0].keys()
    assert all(same == before[0][name][0] for name, (same, _) in tensors.items())
    assert all(torch.equal(value, before[0][name][1]) for name, (_, value) in tensors.items())
    assert modules == before[1]
    assert flags == before[2]


class TestMaking:
    def test_parameters_of_the_block_itself_are_named_because_they_get_no_delta(self, llama, samples):
        for block in find_blocks(llama):
            block.module.layer_scale = nn.Parameter(torch.ones(64))
        with pytest.warns(
            UserWarning, match=r"1 parameters belong to adapted blocks themselves, .*layers.2.layer_sca"
        ):
            wrap(llama, samples, layers_to_transform=[2])

    def test_another_adapter_of_its_name_that_is_left_on_the_model_is_named(self, llama, samples, batch, tmp_path):
        llama.save_pretrained(tmp_path)
        base = type(llama).from_pretrained(tmp_path)
        first = wrap(base, samples, layers_to_transform=[1, 2])
        randomize(first)
        expected = logits(first, batch)
        for blocks in ([0, 1], [1]):
            with pytest.raises(
                ValueError, match=r"has an adapter 'default'.* on 18 layers; 9 of them.*Call unload\(\)"
            ):
                wrap(base, samples, layers_to_transform=blocks)
        assert torch.equal(logits(first, batch), expected)
        wrap(base, samples, layers_to_transform=[1, 2])
        second = wrap(first.unload(), samples, layers_to_transform=[0, 1])
        assert second.peft_config["default"].layers_to_transform == [0, 1]

    def test_adapted_blocks_get_deltas_and_the_others_4_bit_linears(self, model, samples):
        wrapped = wrap(model, samples)
        config = wrapped.peft_config["default"]
        assert len(config.layers_to_transform) == 2
        for block in find_blocks(model):
            adapted = block.index in config.layers_to_transform
            layers = [m for m in block.module.modules() if isinstance(m, AdaptQLayer)]
            bases = {id(layer.base_layer) for layer in layers}
            linears = [
                m for m in block.module.modules() if isinstance(m, (nn.Linear, Conv1D)) and type(m) is not LinearDelta
            ]
            assert bool(layers) == adapted
            assert all(is_quantized(m) != adapted for m in linears)
            assert all((id(m) in bases) == adapted for m in linears)
        trainable = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
        assert trainable
        assert all(".adaptq_delta.default." in name for name in trainable)
        assert isinstance(wrapped.base_model, AdaptQTuner)

    def test_every_parameter_of_an_adapted_block_has_a_delta_of_its_shape(self, model, samples):
        shapes = {name: p.shape for name, p in find_blocks(model)[3].module.named_parameters()}
        wrapped = wrap(model, samples, layers_to_transform=[3])
        found = {
            name.split(".3.")[1].replace(".adaptq_delta.default", ""): parameter.shape
            for name, parameter in wrapped.named_parameters()
            if parameter.requires_grad
        }
        assert found == shapes

    @pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none"])
    def test_it_starts_at_the_quantized_base(self, model, samples, batch, quantization):
        expected = logits(model, batch)
        wrapped = wrap(model, samples, quantization=quantization)
        found = logits(wrapped, batch)
        with wrapped.disable_adapter():
            assert torch.equal(logits(wrapped, batch), found)
        if quantization == "none":
            assert torch.equal(found, expected)
        else:
            assert 0 < (found - expected).norm() / expected.norm() < 0.25

    def test_the_config_holds_what_was_resolved(self, llama, samples):
        config = wrap(llama, samples, num_adapted_blocks=1).peft_config["default"]
        assert config.peft_type is PeftType.ADAPTQ
        assert len(config.layers_to_transform) == 1
        assert len(config.profile.magnitude) == 4
        assert config.base_fingerprint["num_blocks"] == 4

    @pytest.mark.parametrize(("ratio", "count"), [(1.0, 4), (0.5, 2), (0.49, 1), (0.1, 1), (0.75, 3)])
    def test_k_is_the_floor_of_alpha_times_l_and_at_least_1(self, llama, ratio, count):
        wrapped = get_peft_model(llama, AdaptQConfig(selection_ratio=ratio, selection_strategy="last"))
        assert wrapped.peft_config["default"].layers_to_transform == list(range(4))[-count:]

    @pytest.mark.parametrize("block", [0, 2])
    def test_one_block_by_its_index(self, llama, block):
        wrapped = get_peft_model(llama, AdaptQConfig(layers_to_transform=block))
        assert wrapped.peft_config["default"].layers_to_transform == [block]

    def test_the_floor_is_not_spoiled_by_rounding(self, make_model):
        model = make_model(num_layers=100, hidden_size=8, intermediate_size=8)
        config = AdaptQConfig(selection_ratio=0.29, selection_strategy="first", quantization="none")
        assert len(get_peft_model(model, config).peft_config["default"].layers_to_transform) == 29

    def test_strategies_that_need_no_profile_profile_nothing(self, llama, monkeypatch):
        monkeypatch.setattr("adaptq_peft.plan.profile_activations", None)
        for strategy in ("first", "last", "random"):
            get_peft_model(copy.deepcopy(llama), AdaptQConfig(selection_strategy=strategy))

    def test_a_profile_is_reused(self, llama, samples, monkeypatch):
        from adaptq_peft import profile_activations

        profile = profile_activations(llama, samples)
        monkeypatch.setattr("adaptq_peft.plan.profile_activations", None)
        config = AdaptQConfig(profile=profile, selection_strategy="update", num_adapted_blocks=1)
        get_peft_model(llama, config)
        assert config.layers_to_transform == [max(range(4), key=lambda i: profile.update[i])]
        assert config.profile is profile

    def test_contrast_uses_both_kinds_of_data(self, llama, samples):
        wrapped = wrap(
            llama,
            samples[:50],
            selection_strategy="contrast",
            general_calibration_data=samples[10:],
            quantization="none",
        )
        assert wrapped.peft_config["default"].profile.general_magnitude

    def test_without_calibration_data_the_model_writes_its_own(self, llama, batch):
        with pytest.warns(UserWarning, match="the model writes its own text"):
            wrapped = get_peft_model(llama, AdaptQConfig(calibration_samples=50, calibration_max_length=8))
        assert len(wrapped.peft_config["default"].layers_to_transform) == 2

    def test_a_model_without_blocks_needs_only_target_modules(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        wrapped = get_peft_model(model, AdaptQConfig(target_modules=["0"]))
        assert [name for name, p in wrapped.named_parameters() if p.requires_grad] == [
            "base_model.model.0.adaptq_delta.default.weight",
            "base_model.model.0.adaptq_delta.default.bias",
        ]
        assert wrapped.peft_config["default"].layers_to_transform is None

    def test_target_modules_within_blocks(self, llama, samples):
        wrapped = wrap(llama, samples, target_modules=["q_proj"], layers_to_transform=[1])
        assert [n for n, p in wrapped.named_parameters() if p.requires_grad] == [
            "base_model.model.model.layers.1.self_attn.q_proj.adaptq_delta.default.weight"
        ]
        assert not is_quantized(llama.model.layers[1].mlp.up_proj)

    def test_the_delta_dtype(self, make_model, samples):
        def dtypes(autocast=True, **fields):
            config = AdaptQConfig(layers_to_transform=[0], **fields)
            wrapped = get_peft_model(make_model().bfloat16(), config, autocast_adapter_dtype=autocast)
            return {p.dtype for p in wrapped.parameters() if p.requires_grad}

        assert dtypes() == {torch.float32}
        assert dtypes(autocast=False) == {torch.bfloat16}
        assert dtypes(delta_dtype="bfloat16") == {torch.bfloat16}
        assert dtypes(autocast=False, delta_dtype="float32") == {torch.float32}

    def test_what_could_not_be_quantized_is_said(self, llama):
        llama.model.layers[0].self_attn.k_proj.weight = llama.model.layers[1].self_attn.k_proj.weight
        with pytest.warns(
            UserWarning, match=r"2 weights of frozen blocks were not quantized\. model\.layers\.0\.self_at"
        ):
            wrapped = get_peft_model(llama, AdaptQConfig(layers_to_transform=[3]))
        assert len(wrapped.base_model.quantization_report.left) == 2

    def test_modules_to_save_and_excluded_modules(self, llama, batch, train):
        config = AdaptQConfig(
            task_type="CAUSAL_LM",
            layers_to_transform=[3],
            modules_to_save=["lm_head"],
            exclude_modules=["gate_proj"],
        )
        wrapped = get_peft_model(llama, config)
        assert not is_quantized(llama.model.layers[0].mlp.gate_proj)
        assert type(llama.model.layers[3].mlp.gate_proj) is nn.Linear
        before = wrapped.lm_head.modules_to_save["default"].weight.clone()
        train(wrapped, batch)
        assert not torch.equal(wrapped.lm_head.modules_to_save["default"].weight, before)
        assert torch.equal(wrapped.lm_head.original_module.weight, before)


class TestFailing:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (
                {"layers_to_transform": [1, 4]},
                r"layers_to_transform names blocks \[4\], and the model has 4 blocks; all",
            ),
            ({"num_adapted_blocks": 5}, r"5 blocks are to be adapted, but the model has 4; allowed: 1 to 4"),
            ({"layers_pattern": "h"}, r"layers_pattern 'h' matches no list of blocks in LlamaForCausalLM"),
            ({"calibration_data": []}, r"The calibration data \(list\) holds no samples"),
            ({"calibration_data": [{"input_ids": []}]}, r"calibration sample 0 has no tokens"),
            ({"target_modules": ["no_such"], "layers_to_transform": [0]}, r"Target modules {'no_such'} not found"),
            ({"trainable_token_indices": {"no_such": [1]}, "layers_to_transform": [0]}, r"no_such"),
        ],
    )
    def test_bad_input_leaves_the_model_as_it_was(self, llama, fields, message):
        llama.train()
        before = snapshot(llama)
        with pytest.raises(Exception, match=message):
            get_peft_model(llama, AdaptQConfig(**fields))
        assert_unchanged(llama, before)
        assert not hasattr(llama, "peft_config")

    def test_activations_that_are_not_finite(self, llama, samples):
        llama.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"block 1 \(model\.layers\.1\) has activations that are not finite"):
            wrap(llama, samples)

    def test_no_blocks(self):
        with pytest.raises(ValueError, match="No transformer blocks found in Sequential"):
            get_peft_model(nn.Sequential(nn.Linear(2, 2)), AdaptQConfig())

    def test_a_profile_of_another_model(self, make_model, samples):
        from adaptq_peft import profile_activations

        profile = profile_activations(make_model(num_layers=3), samples)
        with pytest.raises(ValueError, match="the profile is of a model with 3 blocks, and LlamaForCausalLM has 4"):
            get_peft_model(make_model(), AdaptQConfig(profile=profile))

    @pytest.mark.parametrize("where", ["quantize", "inject", "interrupt"])
    def test_an_error_in_the_middle_leaves_the_model_as_it_was(self, llama, samples, monkeypatch, where):
        error = KeyboardInterrupt if where == "interrupt" else MemoryError
        calls = []

        def fail_at_the_fifth(original):
            def run(*args, **kwargs):
                calls.append(1)
                if len(calls) == 5:
                    raise error("no memory")
                return original(*args, **kwargs)

            return run

        name = "adaptq_peft.block_forms.quantize_linear" if where == "quantize" else None
        if name:
            from adaptq_peft.quantization import quantize_linear

            monkeypatch.setattr(name, fail_at_the_fifth(quantize_linear))
        else:
            monkeypatch.setattr(tuner_module, "create_layer", fail_at_the_fifth(tuner_module.create_layer))
        before = snapshot(llama)
        config = AdaptQConfig(task_type="CAUSAL_LM", calibration_data=samples)
        with pytest.raises((error, ValueError), match="no memory"):
            get_peft_model(llama, config)
        assert_unchanged(llama, before)
        assert config.layers_to_transform is None
        monkeypatch.undo()
        assert len(get_peft_model(llama, config).peft_config["default"].layers_to_transform) == 2

    def test_a_missing_bitsandbytes(self, llama, samples, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ImportError, match="Run `pip install bitsandbytes`"):
            wrap(llama, samples)

    def test_a_resolved_config_on_another_base(self, make_model, samples):
        config = AdaptQConfig(calibration_data=samples)
        get_peft_model(make_model(seed=0), config)
        with pytest.raises(ValueError, match="For a new adapter on this model make a new AdaptQConfig"):
            get_peft_model(make_model(seed=1), config)
        get_peft_model(make_model(seed=0), config)


class TestUsing:
    def test_training_moves_deltas_and_nothing_else(self, model, samples, batch, train):
        wrapped = wrap(model, samples)
        frozen = {name: p.clone() for name, p in wrapped.named_parameters() if not p.requires_grad}
        losses = train(wrapped, batch, steps=8)
        assert losses[-1] < losses[0]
        for name, parameter in wrapped.named_parameters():
            assert torch.equal(parameter, frozen[name]) if name in frozen else parameter.abs().sum() > 0

    def test_disabling_gives_the_base_as_it_was_quantized(self, model, samples, batch):
        wrapped = wrap(model, samples)
        start = logits(wrapped, batch)
        randomize(wrapped)
        assert not torch.equal(logits(wrapped, batch), start)
        with wrapped.disable_adapter():
            assert torch.equal(logits(wrapped, batch), start)

    def test_merge_and_unmerge(self, model, samples, batch):
        wrapped = wrap(model, samples)
        randomize(wrapped)
        expected = logits(wrapped, batch)
        before = {name: value.clone() for name, value in wrapped.state_dict().items()}
        wrapped.merge_adapter()
        assert torch.equal(logits(wrapped, batch), expected)
        wrapped.unmerge_adapter()
        after = wrapped.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert torch.equal(logits(wrapped, batch), expected)

    def test_switched_off_while_merged(self, model, samples, batch):
        wrapped = wrap(model, samples, frozen_rank=4, init_weights=False)
        with wrapped.disable_adapter():
            off = logits(wrapped, batch)
        wrapped.merge_adapter()
        assert not torch.equal(logits(wrapped, batch), off)
        with wrapped.disable_adapter():
            assert torch.equal(logits(wrapped, batch), off)

    @pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
    def test_merge_and_unload_gives_a_plain_model_that_saves_and_loads(
        self, model, samples, batch, quantization, tmp_path
    ):
        wrapped = wrap(model, samples, quantization=quantization)
        randomize(wrapped)
        expected = logits(wrapped, batch)
        merged = wrapped.merge_and_unload()
        assert merged is model
        assert not any(isinstance(m, AdaptQLayer) or is_quantized(m) for m in merged.modules())
        tolerance = 0.05 if quantization == "int8" else 1e-4
        assert (logits(merged, batch) - expected).norm() / expected.norm() < tolerance
        merged.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        torch.testing.assert_close(logits(loaded, batch), logits(merged, batch))

    def test_unload_gives_the_base(self, model, samples, batch):
        wrapped = wrap(model, samples)
        start = logits(wrapped, batch)
        randomize(wrapped)
        with pytest.warns(UserWarning, match="The original weights of .* quantized linears can't be had"):
            unloaded = wrapped.unload()
        assert not any(isinstance(m, AdaptQLayer) or is_quantized(m) for m in unloaded.modules())
        torch.testing.assert_close(logits(unloaded, batch), start, rtol=1e-4, atol=1e-5)

    def test_unload_without_quantization_is_exact_and_silent(self, model, samples, batch, recwarn):
        expected = logits(model, batch)
        wrapped = wrap(model, samples, quantization="none")
        randomize(wrapped)
        recwarn.clear()
        assert torch.equal(logits(wrapped.unload(), batch), expected)
        assert not recwarn.list

    def test_a_second_adapter_on_the_same_blocks(self, model, samples, batch):
        wrapped = wrap(model, samples)
        blocks = wrapped.peft_config["default"].layers_to_transform
        start = logits(wrapped, batch)
        randomize(wrapped)
        first = logits(wrapped, batch)
        wrapped.add_adapter("second", AdaptQConfig(task_type="CAUSAL_LM", layers_to_transform=blocks))
        assert torch.equal(logits(wrapped, batch), first)
        wrapped.set_adapter("second")
        assert torch.equal(logits(wrapped, batch), start)
        assert all(".second." in name for name, p in wrapped.named_parameters() if p.requires_grad)
        randomize(wrapped, "second", std=0.1)
        second = logits(wrapped, batch)
        wrapped.set_adapter("default")
        assert torch.equal(logits(wrapped, batch), first)
        wrapped.delete_adapter("default")
        wrapped.set_adapter("second")
        assert torch.equal(logits(wrapped, batch), second)

    def test_without_quantization_adapters_may_adapt_different_blocks(self, llama, batch):
        def config(*blocks):
            return AdaptQConfig(task_type="CAUSAL_LM", layers_to_transform=blocks, quantization="none")

        wrapped = get_peft_model(llama, config(0))
        randomize(wrapped)
        first = logits(wrapped, batch)
        wrapped.add_adapter("second", config(0, 2))
        randomize(wrapped, "second")
        wrapped.set_adapter("second")
        assert not torch.equal(logits(wrapped, batch), first)
        wrapped.set_adapter("default")
        assert torch.equal(logits(wrapped, batch), first)

    def test_a_failed_second_adapter_leaves_the_first(self, llama, batch, monkeypatch):
        wrapped = get_peft_model(llama, AdaptQConfig(task_type="CAUSAL_LM", layers_to_transform=[2, 3]))
        randomize(wrapped)
        expected, names = logits(wrapped, batch), set(wrapped.state_dict())
        fail_at_call(monkeypatch, AdaptQLayer, "update_layer", call=4)
        with pytest.raises(MemoryError, match="no memory"):
            wrapped.add_adapter("second", AdaptQConfig(task_type="CAUSAL_LM", layers_to_transform=[2, 3]))
        assert set(wrapped.state_dict()) == names
        assert torch.equal(logits(wrapped, batch), expected)

    def test_a_failed_replacement_leaves_the_adapter(self, llama, batch, monkeypatch):
        def config():
            return AdaptQConfig(task_type="CAUSAL_LM", layers_to_transform=[3], quantization="none", frozen_rank=0)

        first = get_peft_model(llama, config())
        randomize(first)
        expected = logits(first, batch)
        fail_at_call(monkeypatch, AdaptQLayer, "update_layer", call=4)
        with pytest.raises(MemoryError, match="no memory"):
            get_peft_model(llama, config())
        assert torch.equal(logits(first, batch), expected)

    def test_reports_of_peft_know_the_layers(self, model, samples, capsys):
        wrapped = wrap(model, samples)
        wrapped.print_trainable_parameters()
        assert "trainable params" in capsys.readouterr().out
        status = wrapped.get_model_status()
        assert status.peft_types == {"default": "ADAPTQ"}
        assert status.active_adapters == ["default"]
        assert all(layer.module_type.startswith("adaptq.") for layer in wrapped.get_layer_status())

    def test_a_copy_is_independent(self, llama, samples, batch):
        wrapped = wrap(llama, samples)
        randomize(wrapped)
        expected = logits(wrapped, batch)
        copied = copy.deepcopy(wrapped)
        randomize(copied, std=0.5)
        assert torch.equal(logits(wrapped, batch), expected)
        assert not torch.equal(logits(copied, batch), expected)

    def test_generation(self, model, samples):
        wrapped = wrap(model, samples)
        generated = wrapped.generate(input_ids=torch.tensor([[3, 4, 5]]), max_new_tokens=4, do_sample=False)
        assert generated.shape[1] > 3
