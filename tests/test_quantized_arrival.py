"""A QLoRA script: the model arrives all in 4 bits, and the adapted blocks get their original weights back."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from support import logits, randomize
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from adaptq_peft import AdaptQConfig
from adaptq_peft.layer import AdaptQLayer
from adaptq_peft.quantization import is_quantized
from adaptq_peft.selection import find_blocks

NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)

INT8 = BitsAndBytesConfig(load_in_8bit=True)


@pytest.fixture
def checkpoint(model, tmp_path):
    model.bfloat16().save_pretrained(tmp_path / "base")
    return type(model), tmp_path / "base"


def load(checkpoint, quantization_config=None):
    model_class, path = checkpoint
    # from_pretrained changes the config that it is given
    return model_class.from_pretrained(
        path, dtype=torch.bfloat16, quantization_config=copy.deepcopy(quantization_config)
    )


def config(**fields):
    return AdaptQConfig(task_type="CAUSAL_LM", **{"layers_to_transform": [1, 3], "frozen_rank": 0, **fields})


def fits(module):
    return isinstance(module, AdaptQLayer) and isinstance(module.base_layer, (nn.Linear, Conv1D))


def forms(model):
    return {
        block.index: [
            is_quantized(m.base_layer if isinstance(m, AdaptQLayer) else m)
            for name, m in block.module.named_modules()
            if "base_layer" not in name
            and "adaptq" not in name
            and isinstance(m.base_layer if isinstance(m, AdaptQLayer) else m, (nn.Linear, Conv1D))
        ]
        for block in find_blocks(model)
    }


def test_adapted_blocks_get_their_original_weights_from_the_checkpoint(checkpoint, batch, train):
    wrapped = get_peft_model(load(checkpoint, NF4), config())
    assert all(any(found) == (index in (0, 2)) for index, found in forms(wrapped.base_model.model).items())
    in_memory = get_peft_model(load(checkpoint), config())
    assert torch.equal(logits(wrapped, batch), logits(in_memory, batch))
    assert wrapped.peft_config["default"].base_fingerprint == in_memory.peft_config["default"].base_fingerprint
    assert train(wrapped, batch) == train(in_memory, batch)


def test_the_adapter_holds_the_settings_of_the_model(checkpoint, batch):
    plain_absmax = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    wrapped = get_peft_model(load(checkpoint, plain_absmax), config())
    assert wrapped.peft_config["default"].quantization["bnb_4bit_quant_type"] == "fp4"
    in_memory = get_peft_model(load(checkpoint), config(quantization=plain_absmax))
    assert torch.equal(logits(wrapped, batch), logits(in_memory, batch))


@pytest.mark.parametrize("saved_on", [None, NF4])
@pytest.mark.parametrize("loaded_on", [None, NF4])
@pytest.mark.parametrize("original_weights", ["checkpoint", "dequantized"])
def test_save_and_load_on_a_base_of_either_form(checkpoint, batch, tmp_path, saved_on, loaded_on, original_weights):
    wrapped = get_peft_model(load(checkpoint, saved_on), config(original_weights=original_weights))
    randomize(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(checkpoint, loaded_on), tmp_path / "adapter")
    assert torch.equal(logits(loaded, batch), logits(wrapped, batch))


def test_dequantized_weights_are_an_explicit_choice(checkpoint, batch, tmp_path):
    model = load(checkpoint, NF4)
    expected = logits(copy.deepcopy(model), batch)
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"can't be read from .*there is no model\.safetensors"):
        get_peft_model(model, config())
    assert not any(isinstance(module, AdaptQLayer) for module in model.modules())
    wrapped = get_peft_model(model, config(original_weights="dequantized"))
    assert all(any(found) == (index in (0, 2)) for index, found in forms(wrapped.base_model.model).items())
    torch.testing.assert_close(logits(wrapped, batch), expected, rtol=0, atol=2e-2)


def test_the_weights_of_another_checkpoint_are_refused(checkpoint):
    model_class, path = checkpoint
    model = load(checkpoint, NF4)
    other = model_class.from_pretrained(path, dtype=torch.bfloat16)
    for name, parameter in other.named_parameters():
        if "mlp" in name and name.endswith("weight"):
            parameter.data *= 1.02
            parameter.data += 0.01 * torch.randn_like(parameter)
    other.save_pretrained(path)
    with pytest.raises(ValueError, match=r"mlp\.\w+\.weight in the checkpoint is not what .* was quantized from"):
        get_peft_model(model, config())


@pytest.mark.parametrize("prepares", [False, True], ids=["as loaded", "prepared"])
@pytest.mark.parametrize("arrived", [NF4, INT8], ids=["nf4", "int8"])
def test_whatever_takes_the_place_of_a_quantized_linear_has_the_models_dtype(checkpoint, batch, arrived, prepares):
    """Norms and embeddings are in float32 once prepared, and plain linears take no other dtype than their own."""

    def adapted():
        base = load(checkpoint, arrived)
        wrapped = get_peft_model(prepare_model_for_kbit_training(base) if prepares else base, config(frozen_rank=2))
        randomize(wrapped)
        return wrapped

    wrapped = adapted()
    expected = logits(wrapped, batch)
    block = find_blocks(wrapped.base_model.model)[3].module
    assert {m.base_layer.weight.dtype for m in block.modules() if fits(m)} == {torch.bfloat16}
    with wrapped.disable_adapter():
        logits(wrapped, batch)
    wrapped.merge_adapter()
    torch.testing.assert_close(logits(wrapped, batch), expected, rtol=0, atol=0.1)
    for form in ("quantized", "dequantized", "original"):
        unloaded = adapted().merge_and_unload(frozen=form)
        torch.testing.assert_close(logits(unloaded, batch), expected.bfloat16(), rtol=0, atol=0.3)
        assert {p.dtype for p in unloaded.parameters()} <= {torch.bfloat16, torch.uint8, torch.int8}
    plain = adapted().unload(frozen="original")
    assert torch.equal(logits(plain, batch), logits(load(checkpoint), batch))


def test_a_script_that_prepares_for_kbit_training(checkpoint, batch, train):
    model = prepare_model_for_kbit_training(load(checkpoint, NF4))
    wrapped = get_peft_model(model, config(delta_dtype="float32"))
    losses = train(wrapped, batch, steps=4, lr=2e-3)
    assert losses[-1] < losses[0]


def test_an_evaluation_before_does_not_cost_gradients(checkpoint, batch):
    """On CPUs with AVX512-BF16 bitsandbytes repacks the weights in an evaluation pass."""
    model = load(checkpoint, NF4)
    logits(model, batch)
    wrapped, fresh = (get_peft_model(base, config()).train() for base in (model, load(checkpoint, NF4)))
    for found in (wrapped, fresh):
        found(**batch, labels=batch["input_ids"]).loss.backward()
    gradients = [[p.grad for p in found.parameters() if p.requires_grad] for found in (wrapped, fresh)]
    for found, expected in zip(*gradients, strict=True):  # the repacking has rounded the scales to bfloat16
        assert (found - expected).norm() <= 0.02 * expected.norm()


def test_merged_it_saves_and_loads(checkpoint, batch, tmp_path):
    wrapped = get_peft_model(load(checkpoint, NF4), config())
    randomize(wrapped)
    expected = logits(wrapped, batch)
    merged = wrapped.merge_and_unload()
    assert any(is_quantized(module) for module in merged.modules())
    torch.testing.assert_close(logits(merged, batch), expected, rtol=0, atol=3e-2)
    merged.save_pretrained(tmp_path / "merged")
    again = checkpoint[0].from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    torch.testing.assert_close(logits(again, batch), logits(merged, batch), rtol=0, atol=3e-2)


@pytest.mark.parametrize("frozen", ["dequantized", "original"])
def test_merged_into_a_plain_model(checkpoint, batch, tmp_path, frozen):
    wrapped = get_peft_model(load(checkpoint, NF4), config())
    randomize(wrapped)
    expected = logits(wrapped, batch)
    merged = wrapped.merge_and_unload(frozen=frozen)
    assert not any(is_quantized(module) for module in merged.modules())
    if frozen == "dequantized":
        torch.testing.assert_close(logits(merged, batch), expected, rtol=0, atol=3e-2)
    merged.save_pretrained(tmp_path / "merged")
    again = checkpoint[0].from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    assert getattr(again.config, "quantization_config", None) is None
    assert torch.equal(logits(again, batch), logits(merged, batch))
    original = load(checkpoint)
    for block, plain in zip(find_blocks(again), find_blocks(original), strict=True):
        same = all(
            torch.equal(*pair) for pair in zip(block.module.parameters(), plain.module.parameters(), strict=True)
        )
        assert same == (frozen == "original" and block.index in (0, 2))


def test_other_quantization_methods_are_refused(llama):
    llama.hf_quantizer = object()
    llama.config.quantization_config = {"quant_method": "awq", "bits": 4}
    with pytest.raises(
        ValueError,
        match=r"arrived quantized by 'awq'; allowed: bitsandbytes, GPTQ .*Load the 16-bit checkpoint that it was",
    ):
        get_peft_model(llama, config())


def test_an_adapter_for_a_gptq_base_names_it_and_what_loads_it(llama, tmp_path):
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    config(quantization=gptq, base_model_name_or_path="org/model-gptq").save_pretrained(tmp_path)
    saved = AdaptQConfig.from_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"is for a base in gptq in 4 bits, groups of 128, and this LlamaForCausalLM did not arrive so\. Load .*"
        r"\[gptq\]\"`",
    ):
        get_peft_model(llama, saved)


def test_kernels_of_gptqmodel_that_lose_gradients_are_refused(llama):
    class TorchAtenLinear(nn.Module):
        __module__ = "gptqmodel.nn_modules.qlinear.torch_aten_kernel"

    llama.hf_quantizer = object()
    llama.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    llama.model.layers[0].mlp.up_proj = TorchAtenLinear()
    with pytest.raises(
        ValueError,
        match=r"layers\.0\.mlp\.up_proj of this GPTQ model is a TorchAtenLinear; .*GPTQConfig\(bits=4, backend=",
    ):
        get_peft_model(llama, config())


def test_the_original_weights_may_be_in_another_checkpoint(checkpoint, batch, tmp_path):
    model = load(checkpoint, NF4)
    moved = (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(
        ValueError, match=r"can't be read from .* a folder or Hub repository names the 16-bit checkpoint"
    ):
        get_peft_model(model, config())
    wrapped = get_peft_model(model, config(original_weights=moved))
    in_memory = get_peft_model(load((checkpoint[0], moved)), config())
    assert torch.equal(logits(wrapped, batch), logits(in_memory, batch))
    unloaded = wrapped.unload(frozen="original")
    assert torch.equal(logits(unloaded, batch), logits(load((checkpoint[0], moved)), batch))


def test_layers_of_another_quantizer_are_not_overlooked(llama):
    class TorchLinear(nn.Module):
        __module__ = "gptqmodel.nn_modules.qlinear.torch"

    llama.model.layers[0].mlp.up_proj = TorchLinear()
    with pytest.raises(
        ValueError, match=r"arrived quantized by 'gptqmodel' \(model\.layers\.0\.mlp\.up_proj is a TorchLinear\); all"
    ):
        get_peft_model(llama, config())


def test_an_adapter_on_other_settings_than_its_own_is_announced(checkpoint, tmp_path):
    get_peft_model(load(checkpoint, NF4), config()).save_pretrained(tmp_path / "adapter")
    other = load(checkpoint, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"))
    with pytest.warns(UserWarning, match="trained with frozen blocks in nf4 with nested absmax, and this model arr"):
        PeftModel.from_pretrained(other, tmp_path / "adapter")
