"""Models of which accelerate keeps weights on the CPU or on disk, and models on the meta device."""

from __future__ import annotations

import accelerate
import pytest
import torch
from accelerate.utils import has_offloaded_params
from peft import PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from support import logits
from transformers import AutoModelForCausalLM

import adaptq_peft.layer
from adaptq_peft import AdaptQConfig, profile_activations, quantize_base
from adaptq_peft.evaluation import evaluate_perplexity
from adaptq_peft.offloading import input_device
from adaptq_peft.quantization import is_quantized

WHOLE = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}


def device_map(places):
    return {**WHOLE, **{f"model.layers.{index}": place for index, place in enumerate(places)}}


def cpu_offload(folder, offload):
    return accelerate.cpu_offload(AutoModelForCausalLM.from_pretrained(folder), execution_device="cpu")


def disk_offload(folder, offload):
    return accelerate.disk_offload(AutoModelForCausalLM.from_pretrained(folder), offload, execution_device="cpu")


def from_pretrained(folder, offload):
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map=device_map(["disk", "cpu", "cpu", "disk"]), offload_folder=offload
    )


@pytest.fixture
def folder(tmp_path, make_model):
    make_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture(params=[cpu_offload, disk_offload, from_pretrained], ids=lambda load: load.__name__)
def offloaded(request, folder, tmp_path):
    """A Llama of which blocks 0 and 3, or all, are offloaded."""
    return request.param(folder, tmp_path / "offload")


def test_codes_of_a_quantized_base(offloaded, folder, batch, samples, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(folder)
    options = {"data": samples, "calibration": "absmax", "tokens": 200}
    quantize_base(whole, tmp_path / "quantized", **options)
    fields = {"layers_to_transform": [1, 3], "quantized_base": tmp_path / "quantized"}
    with pytest.raises(ValueError, match="is not in memory: it is offloaded"):
        quantize_base(offloaded, tmp_path / "again", **options)
    assert torch.equal(logits(wrap(offloaded, **fields), batch), logits(wrap(whole, **fields), batch))


def wrap(model, **fields):
    torch.manual_seed(0)  # corrections start at random
    return get_peft_model(model, AdaptQConfig(task_type="CAUSAL_LM", **fields))


def offloaded_names(model):
    return {name for name, module in model.named_modules() if has_offloaded_params(module)}


class TestOffloaded:
    def test_the_profile_is_that_of_the_model_in_memory(self, offloaded, folder, samples):
        expected = profile_activations(AutoModelForCausalLM.from_pretrained(folder), samples)
        assert profile_activations(offloaded, samples) == expected

    @pytest.mark.filterwarnings("ignore:No calibration data")
    def test_it_writes_its_own_calibration_text(self, offloaded, folder):
        expected = profile_activations(AutoModelForCausalLM.from_pretrained(folder), samples=50, max_length=4)
        assert profile_activations(offloaded, samples=50, max_length=4) == expected

    @pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
    def test_it_trains_as_the_model_in_memory(self, offloaded, folder, samples, batch, train, quantization):
        fields = {"calibration_data": samples, "selection_strategy": "update", "quantization": quantization}
        plain = wrap(AutoModelForCausalLM.from_pretrained(folder), **fields)
        wrapped = wrap(offloaded, **fields)
        assert wrapped.peft_config["default"] == plain.peft_config["default"]
        assert torch.equal(logits(wrapped, batch), logits(plain, batch))
        assert train(wrapped, batch) == train(plain, batch)
        assert torch.equal(logits(wrapped, batch), logits(plain, batch))

    def test_adapted_layers_and_quantized_ones_are_on_the_device(self, offloaded, batch):
        before = offloaded_names(offloaded)
        wrapped = wrap(offloaded, layers_to_transform=[3])
        assert any(name.startswith("model.layers.3") for name in before)
        assert not any(parameter.is_meta for parameter in wrapped.get_submodule("model.model.layers.3").parameters())
        frozen = wrapped.get_submodule("model.model.layers.0")
        quantized = [module for module in frozen.modules() if is_quantized(module)]
        assert len(quantized) == 7
        assert all(module.weight.device.type == "cpu" for module in quantized)
        assert "model.layers.0.input_layernorm" in offloaded_names(offloaded)  # what is not quantized stays offloaded

    def test_a_failure_offloads_again(self, offloaded, batch, monkeypatch):
        expected, before = logits(offloaded, batch), offloaded_names(offloaded)

        def fail(*args, **kwargs):
            raise RuntimeError("out of memory")

        monkeypatch.setattr("adaptq_peft.tuner.AdaptQTuner._update_nested_layers", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            wrap(offloaded, layers_to_transform=[0, 3])
        assert offloaded_names(offloaded) == before
        assert all(p.is_meta for name in before for p in offloaded.get_submodule(name).parameters(recurse=False))
        assert torch.equal(logits(offloaded, batch), expected)

    def test_it_saves_and_merges(self, offloaded, folder, batch, train, tmp_path):
        wrapped = wrap(offloaded, layers_to_transform=[1, 3])
        train(wrapped, batch)
        expected = logits(wrapped, batch)
        wrapped.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
        assert torch.equal(logits(loaded, batch), expected)
        torch.testing.assert_close(logits(wrapped.merge_and_unload(), batch), expected, rtol=1e-4, atol=1e-4)

    def test_inputs_go_to_the_device_that_it_runs_on(self, offloaded):
        assert input_device(offloaded) == torch.device("cpu")

    def test_perplexity(self, offloaded, folder):
        def tokenizer(text, verbose):
            return {"input_ids": list(range(3, 40))}

        plain = AutoModelForCausalLM.from_pretrained(folder)
        assert evaluate_perplexity(offloaded, tokenizer, ["a"]) == evaluate_perplexity(plain, tokenizer, ["a"])


class TestLoadingOntoAnOffloadedModel:
    @pytest.fixture
    def adapter(self, folder, batch, tmp_path):
        base = AutoModelForCausalLM.from_pretrained(folder)
        wrapped = wrap(base, layers_to_transform=[0, 2], init_weights=False)
        wrapped.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", logits(wrapped, batch)

    @pytest.mark.parametrize("load", [cpu_offload, disk_offload])
    def test_offloaded_by_accelerate_itself(self, adapter, load, folder, batch, tmp_path):
        path, expected = adapter
        loaded = PeftModel.from_pretrained(load(folder, tmp_path / "offload"), path)
        assert torch.equal(logits(loaded, batch), expected)

    def test_a_device_map_with_disk_is_refused_and_the_way_that_the_error_names_works(
        self, adapter, folder, batch, tmp_path
    ):
        path, expected = adapter
        with pytest.raises(ValueError, match="offloaded to disk, and PEFT has taken off the hooks") as caught:
            PeftModel.from_pretrained(from_pretrained(folder, tmp_path / "offload"), path)
        assert "get_peft_model(base, AdaptQConfig.from_pretrained(folder))" in str(caught.value)
        model = get_peft_model(from_pretrained(folder, tmp_path / "again"), AdaptQConfig.from_pretrained(path))
        set_peft_model_state_dict(model, load_peft_weights(path))
        assert torch.equal(logits(model, batch), expected)


def test_hooks_that_only_move_the_input_leave_the_fused_path(folder, batch, monkeypatch, tmp_path):
    model = from_pretrained(folder, tmp_path / "offload")
    wrapped = wrap(model, layers_to_transform=[1], quantization="none")
    assert hasattr(wrapped.get_submodule("model.model.layers.1.mlp.up_proj").base_layer, "_hf_hook")
    calls, fused = [], adaptq_peft.layer.delta_linear
    monkeypatch.setattr(adaptq_peft.layer, "delta_linear", lambda *a, **k: (calls.append(a), fused(*a, **k))[1])
    logits(wrapped, batch)
    assert len(calls) == 7


class TestMetaDevice:
    @pytest.fixture
    def meta_model(self, make_model):
        with torch.device("meta"):
            return make_model()

    def test_deltas_are_on_it_too_and_weights_can_be_assigned(self, meta_model, make_model, batch):
        fields = {"layers_to_transform": [2, 3], "quantization": "none"}
        wrapped = wrap(meta_model, **fields)
        assert {parameter.device.type for parameter in wrapped.parameters()} == {"meta"}
        plain = wrap(make_model(), **fields, init_weights=False)
        assert wrapped.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters()
        wrapped.load_state_dict(plain.state_dict(), assign=True)
        wrapped.get_submodule("model.model").rotary_emb = plain.get_submodule("model.model").rotary_emb
        assert torch.equal(logits(wrapped, batch), logits(plain, batch))
        assert [p.requires_grad for p in wrapped.parameters()] == [p.requires_grad for p in plain.parameters()]

    def test_there_is_no_fingerprint_to_check(self, meta_model, make_model, batch, tmp_path):
        fields = {"layers_to_transform": [2, 3], "quantization": "none", "init_weights": False}
        assert wrap(meta_model, **fields).peft_config["default"].base_fingerprint is None
        plain = wrap(make_model(), **fields)
        plain.save_pretrained(tmp_path)
        with torch.device("meta"):
            other = make_model(seed=1)
        loaded = PeftModel.from_pretrained(other, tmp_path, low_cpu_mem_usage=True)
        assert loaded.peft_config["default"].base_fingerprint == plain.peft_config["default"].base_fingerprint

    def test_it_has_nothing_to_quantize(self, meta_model):
        message = r'layers.0.self_attn.q_proj.*on the meta device.*Load the weights first, or use quantization="none"'
        with pytest.raises(ValueError, match=message):
            wrap(meta_model, layers_to_transform=[2, 3])

    @pytest.mark.parametrize("data", [None, [{"input_ids": [1, 2, 3]}]])
    def test_it_has_nothing_to_profile(self, meta_model, data):
        with pytest.raises(ValueError, match="LlamaForCausalLM is on the meta device and has no weights to profile"):
            wrap(meta_model, calibration_data=data)


@pytest.mark.gpu
def test_a_gpu_and_the_cpu(folder, samples, batch, train, tmp_path):
    """What device_map="auto" does where the GPU is too small: the last blocks are on the CPU."""
    places = {name: 0 if place == "cpu" else place for name, place in device_map(["cpu"] * 4).items()}
    places |= {"model.layers.2": "cpu", "model.layers.3": "cpu", "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places)
    assert "model.layers.3.mlp.up_proj" in offloaded_names(model)
    wrapped = wrap(model, calibration_data=samples, selection_strategy="activation")
    assert wrapped.peft_config["default"].layers_to_transform == [2, 3]
    trainable = {name: parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert {parameter.device.type for parameter in trainable.values()} == {"cuda"}
    assert all(m.weight.device.type == "cuda" for m in wrapped.modules() if is_quantized(m))
    losses = train(wrapped, {name: tensor.to(0) for name, tensor in batch.items()})
    assert losses[-1] < losses[0]
    expected = logits(wrapped, batch)
    wrapped.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder, device_map=0)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=1e-3, atol=1e-3)
