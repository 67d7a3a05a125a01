"""Low-rank corrections of frozen linears (`frozen_rank`), from the arithmetic to whole models."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.bnb import Linear4bit
from peft.tuners.tuners_utils import cast_adapter_dtype
from safetensors import safe_open
from support import fail_at_call, logits
from torch import nn
from transformers import LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from adaptq_peft import AdaptQConfig, adaptq_bnb_config
from adaptq_peft.layer import AdaptQLayer, create_layer
from adaptq_peft.low_rank import add_correction, make_factors, rounding_repair
from adaptq_peft.quantization import dequantize_linear, is_quantized, quantize_linear, resolve_quantization

FACTORS = ("adaptq_low_rank_A", "adaptq_low_rank_B")
WEIGHTS = "adapter_model.safetensors"


def config(**fields):
    fields = {"layers_to_transform": [3], "frozen_rank": 4, "original_weights": "keep", **fields}
    return AdaptQConfig(task_type="CAUSAL_LM", **fields)


def randomize(model, name="default", seed=5):
    """Give the deltas and corrections of an adapter random values, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, AdaptQLayer):
            for _, parameter in layer.parameters_of(name):
                parameter.data.normal_(std=0.05, generator=generator)


def corrected(model, name="default"):
    return {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, AdaptQLayer) and layer.is_corrected_by(name)
    }


def make_corrected(base, quantization="nf4", name="default", **fields):
    """A layer around a linear of this quantization, with a random correction."""
    settings = resolve_quantization(quantization)
    linear = base.requires_grad_(False) if settings is None else quantize_linear(base, settings)
    layer = create_layer(linear, name, AdaptQConfig(frozen_rank=4, **fields), corrected=True)
    nn.init.normal_(layer.adaptq_low_rank_B[name].weight, std=0.1)
    return layer


class TestArithmetic:
    def test_the_output_is_that_of_low_rank_adaptation(self):
        x, output = torch.randn(3, 8), torch.randn(3, 6)
        a, b = make_factors(8, 6, 2, torch.device("cpu"), torch.float32)
        nn.init.normal_(b.weight)
        found = add_correction(output, x, a, b, 0.5)
        torch.testing.assert_close(found, output + 0.5 * x @ (b.weight @ a.weight).T)

    def test_new_factors_are_those_of_lora(self):
        a, b = make_factors(8, 6, 2, torch.device("cpu"), torch.bfloat16)
        assert (a.weight.shape, b.weight.shape) == ((2, 8), (6, 2))
        assert a.weight.any()
        assert not b.weight.any()
        assert b.weight.dtype == torch.bfloat16
        nn.init.normal_(b.weight)
        b.reset_parameters()  # FSDP calls it on what it moves from the meta device
        assert not b.weight.any()

    @pytest.mark.parametrize("rank", [1, 3, 6, 10])
    def test_the_repair_is_the_nearest_matrix_of_its_rank(self, rank):
        original, rounded = torch.randn(6, 8), torch.randn(6, 8)
        a, b = rounding_repair(original, rounded, rank)
        left = torch.linalg.matrix_norm(original - rounded - b @ a)
        values = torch.linalg.svdvals(original - rounded)
        torch.testing.assert_close(left, values[rank:].square().sum().sqrt(), atol=1e-5, rtol=1e-4)
        assert len(a) == min(rank, 6)

    def test_the_repair_of_a_bfloat16_weight_is_in_float32(self):
        original = torch.randn(6, 8).bfloat16()
        a, b = rounding_repair(original, torch.zeros_like(original), 6)
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(b @ a, original.float(), atol=1e-5, rtol=1e-4)


class TestLayer:
    @pytest.fixture(params=["linear", "no bias", "conv1d"])
    def base(self, request):
        torch.manual_seed(0)
        return {
            "linear": lambda: nn.Linear(64, 128),
            "no bias": lambda: nn.Linear(64, 128, bias=False),
            "conv1d": lambda: Conv1D(128, 64),
        }[request.param]()

    @pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
    def test_it_starts_at_the_frozen_linear(self, base, quantization):
        settings = resolve_quantization(quantization)
        linear = quantize_linear(base, settings) if settings else base
        x = torch.randn(2, 3, 64)
        expected = linear(x)
        layer = create_layer(linear, "default", AdaptQConfig(frozen_rank=4), corrected=True)
        assert torch.equal(layer(x), expected)

    @pytest.mark.parametrize("quantization", ["nf4", "none"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_merge_is_the_same_map_and_unmerge_restores_every_bit(self, base, quantization, dtype):
        layer = make_corrected(base.to(dtype), quantization)
        x = torch.randn(3, 64, dtype=dtype)
        frozen, weight = layer.base_layer, layer.base_layer.weight.data.clone()
        expected = layer(x)
        assert not torch.equal(expected, layer.base_layer(x))
        layer.merge()
        assert layer.merged
        assert not is_quantized(layer.adaptq_merged or nn.Identity())
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(layer(x), expected, **tolerance)
        layer.unmerge()
        assert layer.base_layer is frozen
        assert torch.equal(layer.base_layer.weight.data, weight)
        assert torch.equal(layer(x), expected)
        assert layer.adaptq_merged is None

    def test_switched_off_or_at_scale_zero_it_is_the_frozen_linear(self, base):
        layer = make_corrected(base)
        x = torch.randn(3, 64)
        layer.set_scale("default", 0.0)
        assert torch.equal(layer(x), layer.base_layer(x))
        layer.set_scale("default", 2.0)
        layer.enable_adapters(False)
        assert torch.equal(layer(x), layer.base_layer(x))

    def test_corrections_of_several_adapters_add_up_and_merge_one_by_one(self, base):
        layer = make_corrected(base)
        layer.add_correction("second", AdaptQConfig(frozen_rank=2, frozen_alpha=1))
        nn.init.normal_(layer.adaptq_low_rank_B["second"].weight, std=0.1)
        assert layer.scaling == {"default": 2.0, "second": 0.5}
        x = torch.randn(3, 64)
        parts = []
        for name in ("default", "second"):
            layer.set_adapter(name)
            parts.append(layer(x) - layer.base_layer(x))
        layer.set_adapter(["default", "second"])
        both = layer(x)
        torch.testing.assert_close(both, layer.base_layer(x) + sum(parts), rtol=1e-4, atol=1e-5)
        layer.merge(adapter_names=["default"])
        with pytest.warns(UserWarning, match="Already following adapters were merged"):
            layer.merge(adapter_names=["second"])
        torch.testing.assert_close(layer(x), both, rtol=1e-4, atol=1e-5)
        layer.unmerge()
        assert torch.equal(layer(x), both)

    @pytest.mark.parametrize("quantization", ["nf4", "none"])
    def test_safe_merge_refuses_values_that_are_not_finite(self, base, quantization):
        layer = make_corrected(base, quantization)
        layer.adaptq_low_rank_B["default"].weight.data[0, 0] = float("inf")
        with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems"):
            layer.merge(safe_merge=True)
        assert not layer.merged
        assert layer.adaptq_merged is None

    def test_the_repair_fills_the_first_rows_and_its_product_is_not_scaled(self):
        layer = make_corrected(nn.Linear(64, 128), frozen_alpha=1)
        a, b = torch.randn(3, 64), torch.randn(128, 3)
        layer.set_correction("default", a, b)
        torch.testing.assert_close(layer.get_delta_weight("default"), b @ a)
        assert layer.adaptq_low_rank_A["default"].weight[3].any()  # so that the rest can be trained, too

    def test_under_autocast(self):
        layer = make_corrected(nn.Linear(64, 128))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = layer(torch.randn(3, 64))
        output.float().sum().backward()
        assert {layer.get_submodule(f"{name}.default").weight.grad.dtype for name in FACTORS} == {torch.float32}

    @pytest.mark.parametrize(("given", "expected"), [(None, torch.bfloat16), ("float32", torch.float32)])
    def test_the_dtype_is_chosen_as_for_deltas(self, given, expected):
        layer = make_corrected(nn.Linear(64, 128, dtype=torch.bfloat16), delta_dtype=given)
        assert {parameter.dtype for _, parameter in layer.parameters_of("default")} == {expected}
        layer._move_adapter_to_device_of_base_layer("default")
        assert {parameter.dtype for _, parameter in layer.parameters_of("default")} == {expected}
        assert layer(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


class TestAgainstLora:
    """PEFT's own LoRA on the same 4-bit linears, beside the same deltas."""

    @staticmethod
    def lora_on(model, own):
        """`own` without its corrections, and PEFT's LoRA with the same A and B in their place."""
        names = [name.removeprefix("base_model.model.") for name in corrected(own)]
        plain = get_peft_model(model, config(frozen_rank=0)).base_model.model
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=names)
        flags = {name: parameter.requires_grad for name, parameter in plain.named_parameters()}
        vars(plain).pop("peft_config", None)  # PEFT warns of a second adapter
        plain.is_loaded_in_4bit = True  # so that PEFT takes its layer for 4-bit linears
        inject_adapter_in_model(lora, plain)
        cast_adapter_dtype(plain, "default")  # what get_peft_model does by itself
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_("lora_" in name or flags.get(name, False))
        for name in names:
            ours, theirs = own.base_model.model.get_submodule(name), plain.get_submodule(name)
            assert isinstance(theirs, Linear4bit)
            theirs.lora_A["default"].load_state_dict(ours.adaptq_low_rank_A["default"].state_dict())
            theirs.lora_B["default"].load_state_dict(ours.adaptq_low_rank_B["default"].state_dict())
        return plain

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_outputs_gradients_and_losses_are_equal(self, model, batch, train, dtype):
        model = model.to(dtype)
        own = get_peft_model(copy.deepcopy(model), config())
        lora = self.lora_on(copy.deepcopy(model), own)
        assert train(own, batch, steps=4) == train(lora, batch, steps=4)
        assert torch.equal(logits(own, batch), logits(lora, batch))
        for name, layer in corrected(own).items():
            theirs = lora.get_submodule(name.removeprefix("base_model.model."))
            assert torch.equal(layer.adaptq_low_rank_A["default"].weight, theirs.lora_A["default"].weight)
            assert torch.equal(layer.adaptq_low_rank_B["default"].weight.grad, theirs.lora_B["default"].weight.grad)


class TestModel:
    @pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
    def test_each_linear_of_the_frozen_blocks_is_corrected_and_starts_at_zero(self, model, batch, quantization):
        plain = get_peft_model(copy.deepcopy(model), config(quantization=quantization, frozen_rank=0))
        wrapped = get_peft_model(model, config(quantization=quantization))
        assert torch.equal(logits(wrapped, batch), logits(plain, batch))
        report = wrapped.base_model.quantization_report
        assert sorted(corrected(wrapped)) == sorted(f"base_model.model.{name}" for name in report.corrected)
        assert len(report.corrected) == 3 * (7 if model.config.model_type == "llama" else 4)
        assert not any(".3." in name for name in report.corrected)

    def test_training_moves_them_and_the_loss_falls(self, model, batch, train):
        wrapped = get_peft_model(model, config())
        losses = train(wrapped, batch, steps=6, lr=0.01)
        assert losses[-1] < losses[0]
        assert all(layer.adaptq_low_rank_B["default"].weight.any() for layer in corrected(wrapped).values())
        with wrapped.disable_adapter():
            off = logits(wrapped, batch)
        randomize(wrapped)
        with wrapped.disable_adapter():
            assert torch.equal(logits(wrapped, batch), off)

    def test_target_and_exclude_modules_narrow_the_choice(self, llama):
        wrapped = get_peft_model(
            llama, config(target_modules=["q_proj", "up_proj"], exclude_modules=["0.mlp.up_proj"])
        )
        found = {name.split("layers.")[1] for name in corrected(wrapped)}
        own = {f"{index}.self_attn.q_proj" for index in range(3)} | {f"{index}.mlp.up_proj" for index in range(3)}
        assert found == own - {"0.mlp.up_proj"}
        assert is_quantized(wrapped.base_model.model.model.layers[0].self_attn.k_proj)

    def test_linears_that_are_left_in_16_bits_are_not_corrected(self, llama):
        wrapped = get_peft_model(llama, config(exclude_modules=["down_proj"]))
        assert not any("down_proj" in name for name in corrected(wrapped))
        assert "model.layers.0.mlp.down_proj" in wrapped.base_model.quantization_report.left

    @pytest.mark.parametrize(
        "fields", [{"layers_to_transform": [0, 1, 2, 3]}, {"target_modules": ["layers.0.mlp.up_proj"]}]
    )
    def test_where_there_is_nothing_to_correct(self, llama, fields):
        wrapped = get_peft_model(llama, config(**{"layers_to_transform": None, **fields}))
        assert not corrected(wrapped)
        assert wrapped.base_model.quantization_report.corrected == []

    def test_a_failure_takes_everything_back(self, model, batch, monkeypatch):
        expected, names = logits(model, batch), list(model.state_dict())
        fail_at_call(monkeypatch, AdaptQLayer, "add_correction", call=4)
        with pytest.raises(MemoryError, match="no memory"):
            get_peft_model(model, config())
        assert list(model.state_dict()) == names
        assert torch.equal(logits(model, batch), expected)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing_changes_no_gradient(self, llama, batch, reentrant):
        wrapped = get_peft_model(llama, config())
        randomize(wrapped)
        trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        expected = torch.autograd.grad(wrapped(**batch, labels=batch["input_ids"]).loss, trained)
        wrapped.gradient_checkpointing_enable({"use_reentrant": reentrant})
        wrapped.enable_input_require_grads()
        wrapped.train()
        wrapped(**batch, labels=batch["input_ids"]).loss.backward()
        for parameter, gradient in zip(trained, expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)

    def test_status_and_counts(self, llama):
        wrapped = get_peft_model(llama, config())
        one = next(layer for layer in wrapped.get_layer_status() if layer.name.endswith("layers.0.self_attn.q_proj"))
        assert (one.available_adapters, one.requires_grad) == (["default"], {"default": True})
        trained = sum(p.numel() for layer in corrected(wrapped).values() for _, p in layer.parameters_of("default"))
        deltas = sum(p.numel() for name, p in wrapped.named_parameters() if ".adaptq_delta." in name)
        assert wrapped.get_nb_trainable_parameters()[0] == trained + deltas


class TestRepair:
    def test_it_brings_the_model_closer_to_the_original(self, model, batch):
        expected = logits(model, batch)
        distances = []
        for fields in (
            {"frozen_rank": 0},
            {"frozen_rank_init": "svd"},
            {"frozen_rank": 16, "frozen_rank_init": "svd"},
        ):
            found = logits(get_peft_model(copy.deepcopy(model), config(**fields)), batch)
            distances.append(float((found - expected).norm()))
        assert distances[2] < distances[1] < distances[0]

    def test_full_rank_repairs_all_of_it(self, llama, batch):
        expected = logits(llama, batch)
        wrapped = get_peft_model(llama, config(frozen_rank=64, frozen_rank_init="svd", frozen_alpha=1))
        torch.testing.assert_close(logits(wrapped, batch), expected, rtol=1e-3, atol=1e-4)

    def test_a_repaired_adapter_is_loaded_without_a_decomposition(self, llama, batch, tmp_path, monkeypatch):
        base = copy.deepcopy(llama)
        wrapped = get_peft_model(llama, config(frozen_rank_init="svd"))
        expected = logits(wrapped, batch)
        wrapped.save_pretrained(tmp_path)
        monkeypatch.setattr(torch.linalg, "svd", None)
        assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path), batch), expected)

    def test_the_same_config_repairs_a_second_model(self, llama, batch):
        once = config(frozen_rank_init="svd")
        first = logits(get_peft_model(copy.deepcopy(llama), once), batch)
        assert torch.equal(logits(get_peft_model(copy.deepcopy(llama), once), batch), first)


class TestArrivedQuantized:
    """A model that transformers has loaded in 4 bits; what rounding took away is found in its checkpoint."""

    @pytest.fixture
    def folder(self, llama, tmp_path):
        llama.save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    @staticmethod
    def arrive(folder):
        quantization_config = adaptq_bnb_config([3], str(folder), dtype=torch.float32)
        return LlamaForCausalLM.from_pretrained(folder, quantization_config=quantization_config, dtype=torch.float32)

    @pytest.mark.parametrize("init", ["zero", "svd"])
    def test_it_starts_as_the_one_that_was_quantized_in_memory(self, folder, batch, init):
        fields = {"frozen_rank_init": init, "original_weights": "checkpoint"}
        arrived = get_peft_model(self.arrive(folder), config(**fields))
        swapped = get_peft_model(LlamaForCausalLM.from_pretrained(folder), config(**fields))
        assert len(corrected(arrived)) == 21
        torch.testing.assert_close(logits(arrived, batch), logits(swapped, batch), rtol=1e-4, atol=1e-5)

    def test_it_is_merged_into_4_bits_with_a_warning(self, folder):
        wrapped = get_peft_model(self.arrive(folder), config(original_weights="checkpoint"))
        randomize(wrapped)
        with pytest.warns(UserWarning, match="rounds them off"):
            merged = wrapped.merge_and_unload()
        assert sum(is_quantized(module) for module in merged.modules()) == 21


class TestSaved:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("quantization", ["nf4", "none"])
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_loading_gives_bit_identical_logits(self, model, batch, tmp_path, dtype, quantization, low_cpu_mem_usage):
        base = copy.deepcopy(model.to(dtype))
        wrapped = get_peft_model(model, config(quantization=quantization))
        randomize(wrapped)
        wrapped.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded, batch), logits(wrapped, batch))

    def test_the_file_holds_deltas_and_factors_and_nothing_else(self, llama, tmp_path):
        wrapped = get_peft_model(llama, config())
        wrapped.save_pretrained(tmp_path)
        trainable = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
        with safe_open(tmp_path / WEIGHTS, "pt") as file:
            names = set(file.keys())
            a = file.get_slice("base_model.model.model.layers.0.mlp.up_proj.adaptq_low_rank_A.weight").get_shape()
            b = file.get_slice("base_model.model.model.layers.0.mlp.up_proj.adaptq_low_rank_B.weight").get_shape()
        assert names == {name.replace(".default.", ".") for name in trainable}
        assert (a, b) == ([4, 64], [128, 4])

    def test_what_is_saved_while_merged_is_the_same(self, llama, tmp_path):
        wrapped = get_peft_model(llama, config())
        randomize(wrapped)
        wrapped.save_pretrained(tmp_path / "before")
        wrapped.merge_adapter()
        wrapped.save_pretrained(tmp_path / "merged")
        assert (tmp_path / "before" / WEIGHTS).read_bytes() == (tmp_path / "merged" / WEIGHTS).read_bytes()

    @pytest.mark.parametrize(
        ("rank", "message"),
        [(2, r"tensors have another shape: .*low_rank_A\.weight is \(4, 64\) instead of \(2, 64\)"),
         (0, r"42 tensors are not part of this adapter: .*low_rank")],
    )  # fmt: skip
    def test_another_rank_in_the_config_is_an_error(self, llama, tmp_path, rank, message):
        base = copy.deepcopy(llama)
        get_peft_model(llama, config()).save_pretrained(tmp_path)
        loaded = AdaptQConfig.from_pretrained(tmp_path)
        loaded.frozen_rank = rank
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(base, tmp_path, config=loaded)

    def test_a_missing_factor_is_an_error(self, llama, tmp_path):
        base = copy.deepcopy(llama)
        get_peft_model(llama, config(frozen_rank=0)).save_pretrained(tmp_path)
        loaded = AdaptQConfig.from_pretrained(tmp_path)
        loaded.frozen_rank = 4
        with pytest.raises(ValueError, match=r"42 tensors are missing: .*adaptq_low_rank_A\.weight"):
            PeftModel.from_pretrained(base, tmp_path, config=loaded)


class TestMerged:
    def test_merge_and_unmerge_on_the_model(self, model, batch):
        wrapped = get_peft_model(model, config())
        randomize(wrapped)
        expected = logits(wrapped, batch)
        wrapped.merge_adapter()
        torch.testing.assert_close(logits(wrapped, batch), expected, rtol=1e-3, atol=1e-4)
        wrapped.unmerge_adapter()
        assert torch.equal(logits(wrapped, batch), expected)

    @pytest.mark.parametrize("merged_before", [False, True])
    def test_unloaded_with_dequantized_weights_it_is_the_same_map(self, model, batch, merged_before):
        wrapped = get_peft_model(model, config())
        randomize(wrapped)
        expected = logits(wrapped, batch)
        if merged_before:
            wrapped.merge_adapter()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="All adapters are already merged")
            plain = wrapped.merge_and_unload()
        assert not any(is_quantized(module) or isinstance(module, AdaptQLayer) for module in plain.modules())
        torch.testing.assert_close(logits(plain, batch), expected, rtol=1e-3, atol=1e-4)

    def test_unloaded_onto_the_original_weights(self, model, batch):
        unquantized = get_peft_model(copy.deepcopy(model), config(quantization="none"))
        wrapped = get_peft_model(model, config())
        for found in (unquantized, wrapped):
            randomize(found)
        plain = wrapped.merge_and_unload(frozen="original")
        torch.testing.assert_close(logits(plain, batch), logits(unquantized, batch), rtol=1e-3, atol=1e-4)

    def test_unloaded_quantized_the_corrections_are_rounded_with_a_warning(self, model, batch):
        wrapped = get_peft_model(model, config())
        randomize(wrapped)
        layers = corrected(wrapped)
        expected = {
            name.removeprefix("base_model.model."): layer.corrected(dequantize_linear(layer.base_layer), ["default"])
            for name, layer in layers.items()
        }
        with pytest.warns(UserWarning, match=rf"corrections of {len(layers)} linears were merged into their weights"):
            merged = wrapped.merge_and_unload(frozen="quantized")
        for name, linear in expected.items():
            again = quantize_linear(linear, resolve_quantization("nf4"))
            assert torch.equal(merged.get_submodule(name).weight.data, again.weight.data)

    def test_unload_drops_them(self, model, batch):
        expected = logits(model, batch)
        wrapped = get_peft_model(model, config())
        randomize(wrapped)
        assert torch.equal(logits(wrapped.unload(), batch), expected)
