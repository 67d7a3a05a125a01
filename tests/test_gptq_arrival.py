"""A model that was loaded from a checkpoint in GPTQ: its frozen blocks stay so, and the adapted ones get originals."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from gptq_checkpoint import GROUP, write_gptq
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support import logits, randomize
from torch import nn
from transformers import AutoModelForCausalLM, GPTQConfig, Qwen2Config, Qwen2ForCausalLM

from adaptq_peft import AdaptQConfig
from adaptq_peft.evaluation import measure_weight_bytes
from adaptq_peft.layer import AdaptQLayer
from adaptq_peft.preservation.original_model import original_model
from adaptq_peft.quantization import dequantize_linear, is_quantized, settings_of
from adaptq_peft.selection import find_blocks

pytest.importorskip("gptqmodel")
pytest.importorskip("optimum")

SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
)


@pytest.fixture(autouse=True)
def _without_compiler():
    """GPTQModel compiles each layer's reading of its codes, which takes longer than all of these tests."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.fixture(params=["llama", "qwen2"])
def model(request, llama):
    """Without biases, and with some."""
    if request.param == "llama":
        return llama
    torch.manual_seed(0)
    shape = {key: value for key, value in llama.config.to_dict().items() if key in SHAPE}
    return Qwen2ForCausalLM(Qwen2Config(**shape))


@pytest.fixture
def folders(model, tmp_path):
    """The 16-bit checkpoint, and the one in GPTQ that was made from it."""
    model.bfloat16()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(tmp_path / "base")
    write_gptq(model, tmp_path / "gptq")
    return tmp_path / "base", tmp_path / "gptq"


def load(folder, backend="gptq_torch", **changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers', that the checkpoint's own settings are taken
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=GPTQConfig(bits=4, backend=backend), **changes
        )


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def config(base, **fields):
    fields = {"layers_to_transform": [1, 3], "original_weights": str(base), **fields}
    return AdaptQConfig(task_type="CAUSAL_LM", **fields)


def linears(block):
    layers = [m.base_layer if isinstance(m, AdaptQLayer) else m for m in block.module.modules()]
    return [layer for layer in layers if is_quantized(layer) or isinstance(layer, nn.Linear)]


def test_adapted_blocks_get_the_weights_of_the_named_checkpoint(folders):
    base, gptq = folders
    wrapped = get_peft_model(load(gptq), config(base))
    original = plain(base)
    for block, before in zip(find_blocks(wrapped.base_model.model), find_blocks(original), strict=True):
        frozen = block.index in (0, 2)
        assert {is_quantized(layer) for layer in linears(block)} == {frozen}
        if not frozen:
            kept = {n.replace("base_layer.", ""): p for n, p in block.module.named_parameters() if "adaptq_" not in n}
            expected = dict(before.module.named_parameters())
            assert kept.keys() == expected.keys()
            assert all(torch.equal(kept[name], expected[name]) for name in expected)
            assert all(p.dtype == torch.bfloat16 for p in kept.values())
    saved = wrapped.peft_config["default"]
    assert saved.quantization == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "sym": True,
    }
    whole = get_peft_model(original, config("checkpoint", quantization="none"))
    assert saved.base_fingerprint["samples"] == whole.peft_config["default"].base_fingerprint["samples"]


def test_it_computes_with_the_rounded_weights_of_the_frozen_blocks(folders, batch):
    base, gptq = folders
    wrapped = get_peft_model(load(gptq), config(base))
    expected = plain(base)
    for block in find_blocks(expected):
        if block.index in (0, 2):
            for linear in (m for m in block.module.modules() if isinstance(m, nn.Linear)):
                groups = linear.weight.data.float().unflatten(1, (-1, GROUP))
                scales = (groups.abs().amax(-1, keepdim=True) / 7).half().float()
                linear.weight.data = ((groups / scales).round().clamp(-8, 7) * scales).flatten(1).bfloat16()
    torch.testing.assert_close(logits(wrapped, batch), logits(expected, batch), rtol=0, atol=2e-2)
    embeddings = wrapped.get_input_embeddings()(batch["input_ids"]).detach()
    gradients = []
    for found in (wrapped, expected):
        inputs = embeddings.clone().requires_grad_()
        found(inputs_embeds=inputs, labels=batch["input_ids"]).loss.backward()
        gradients.append(inputs.grad)
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[1].norm()


@pytest.mark.parametrize(("bits", "desc_act", "error"), [(4, True, 0.15), (8, False, 0.01)])
def test_other_bits_and_inputs_in_another_order(llama, batch, tmp_path, bits, desc_act, error):
    llama.bfloat16().save_pretrained(tmp_path / "base")
    write_gptq(llama, tmp_path / "gptq", bits, desc_act)
    wrapped = get_peft_model(load(tmp_path / "gptq"), config(tmp_path / "base", layers_to_transform=[3]))
    layers = {name: layer for name, layer in wrapped.base_model.model.named_modules() if is_quantized(layer)}
    assert len(layers) == 3 * 7
    for name, layer in layers.items():
        original = llama.get_submodule(name).weight.float()
        assert (dequantize_linear(layer).weight.float() - original).norm() < error * original.norm()
        assert settings_of(layer).describe() == f"gptq in {bits} bits, groups of {GROUP}"
    assert torch.isfinite(logits(wrapped, batch)).all()


def test_it_trains_and_the_frozen_blocks_stay(folders, batch, train):
    base, gptq = folders
    wrapped = get_peft_model(load(gptq), config(base, frozen_rank=2))
    before = {name: tensor.clone() for name, tensor in wrapped.named_buffers()}
    losses = train(wrapped, batch, steps=5, lr=5e-3)
    assert losses[-1] < losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in wrapped.named_buffers())
    assert len(wrapped.base_model.quantization_report.corrected) == 2 * 7
    trained = [p for name, p in wrapped.named_parameters() if "adaptq_low_rank_B" in name]
    assert trained
    assert all(parameter.any() for parameter in trained)


@pytest.mark.parametrize("fields", [{}, {"frozen_rank": 2, "frozen_rank_init": "svd"}, {"frozen_rank": 2}])
def test_save_and_load(folders, batch, tmp_path, fields):
    base, gptq = folders
    wrapped = get_peft_model(load(gptq), config(base, **fields))
    randomize(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(gptq), tmp_path / "adapter")
    assert torch.equal(logits(loaded, batch), logits(wrapped, batch))
    with loaded.disable_adapter(), wrapped.disable_adapter():
        off = logits(loaded, batch)
        assert torch.equal(off, logits(wrapped, batch))
    assert not torch.equal(off, logits(loaded, batch))


def test_without_its_adapter_it_is_the_model_of_both_checkpoints(folders, batch):
    base, gptq = folders
    wrapped = get_peft_model(load(gptq), config(base, layers_to_transform=[0, 1, 2, 3]))
    randomize(wrapped)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped, batch), logits(plain(base), batch))
    few = get_peft_model(load(gptq), config(base, layers_to_transform=[3], original_weights="dequantized"))
    randomize(few)
    with few.disable_adapter():
        torch.testing.assert_close(logits(few, batch), logits(load(gptq), batch), rtol=0, atol=2e-2)


def test_dequantized_weights_are_an_explicit_choice(folders, batch, tmp_path):
    _, gptq = folders
    with pytest.raises(
        ValueError, match=r"is quantized itself \(gptq\).* a folder or Hub repository names the 16-bit"
    ):
        get_peft_model(load(gptq), config("checkpoint"))
    wrapped = get_peft_model(load(gptq), config("dequantized"))
    torch.testing.assert_close(logits(wrapped, batch), logits(load(gptq), batch), rtol=0, atol=2e-2)
    randomize(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(gptq), tmp_path / "adapter")
    assert torch.equal(logits(loaded, batch), logits(wrapped, batch))


def test_the_checkpoint_of_another_model_is_refused(folders, tmp_path):
    base, gptq = folders
    other = plain(base)
    for name, parameter in other.named_parameters():
        if "mlp" in name and name.endswith("weight"):
            parameter.data = parameter.data.flip(0) + 0.01
    other.save_pretrained(tmp_path / "other")
    model = load(gptq)
    with pytest.raises(ValueError, match=r"mlp\.\w+\.weight in the checkpoint is not what .* was quantized from"):
        get_peft_model(model, config(tmp_path / "other"))
    assert not any(isinstance(module, AdaptQLayer) for module in model.modules())


@pytest.mark.parametrize("frozen", [None, "dequantized", "original"])
def test_merged_into_a_plain_model(folders, batch, tmp_path, frozen):
    base, gptq = folders
    wrapped = get_peft_model(load(gptq), config(base, frozen_rank=2))
    randomize(wrapped)
    expected = logits(wrapped, batch)
    merged = wrapped.merge_and_unload(frozen=frozen)
    assert not any(is_quantized(module) for module in merged.modules())
    if frozen != "original":
        torch.testing.assert_close(logits(merged, batch), expected, rtol=0, atol=5e-2)
    merged.save_pretrained(tmp_path / "merged")
    again = plain(tmp_path / "merged")
    assert getattr(again.config, "quantization_config", None) is None
    assert torch.equal(logits(again, batch), logits(merged, batch))


def test_unloaded_it_is_the_original_model(folders, batch):
    base, gptq = folders
    unloaded = get_peft_model(load(gptq), config(base)).unload()
    assert torch.equal(logits(unloaded, batch), logits(plain(base), batch))


def test_it_is_not_merged_into_gptq(folders):
    base, gptq = folders
    wrapped = get_peft_model(load(gptq), config(base))
    with pytest.raises(ValueError, match=r'frozen is "quantized", and this model arrived in GPTQ: .* Use frozen="deq'):
        wrapped.merge_and_unload(frozen="quantized")


def test_kernels_that_lose_gradients_are_refused(folders):
    base, gptq = folders
    model = load(gptq, backend="gptq_torch_aten")
    with pytest.raises(
        ValueError,
        match=r"of this GPTQ model is a TorchAtenLinear; allowed: TorchLinear, .*GPTQConfig\(bits=4, back",
    ):
        get_peft_model(model, config(base))


def test_a_second_adapter(folders, batch, tmp_path):
    base, gptq = folders
    wrapped = get_peft_model(load(gptq), config(base, layers_to_transform=[3]), adapter_name="first")
    randomize(wrapped, "first")
    alone = logits(wrapped, batch)
    wrapped.add_adapter("second", config(base, layers_to_transform=[1, 3]))
    assert torch.equal(logits(wrapped, batch), alone)
    wrapped.set_adapter("second")
    randomize(wrapped, "second")
    wrapped.save_pretrained(tmp_path, selected_adapters=["second"])
    loaded = PeftModel.from_pretrained(load(gptq), tmp_path / "second")
    assert torch.equal(logits(loaded, batch), logits(wrapped, batch))
    with pytest.raises(ValueError, match=r"freezes blocks \[1\], which other adapters .* in gptq in 4 bits, groups"):
        wrapped.add_adapter("third", config(base, layers_to_transform=[3]))


def test_an_adapter_needs_the_kind_of_base_that_it_was_made_on(folders, tmp_path):
    base, gptq = folders
    get_peft_model(load(gptq), config(base)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"for a base in gptq in 4 bits, groups of 32, and this \w+ did not arrive"):
        PeftModel.from_pretrained(plain(base), tmp_path / "adapter")
    get_peft_model(plain(base), config("checkpoint")).save_pretrained(tmp_path / "nf4")
    saved = json.loads((tmp_path / "nf4" / "adapter_config.json").read_text())
    (tmp_path / "nf4" / "adapter_config.json").write_text(json.dumps(saved | {"original_weights": str(base)}))
    with pytest.warns(UserWarning, match="in nf4 with nested absmax, and this model arrived in gptq in 4 bits"):
        PeftModel.from_pretrained(load(gptq), tmp_path / "nf4")


def test_other_codes_of_the_same_base_are_refused(folders, tmp_path):
    base, gptq = folders
    get_peft_model(load(gptq), config(base)).save_pretrained(tmp_path / "adapter")
    tensors = load_file(gptq / "model.safetensors")
    codes = {k: tensor ^ 0x11111111 for k, tensor in tensors.items() if k.endswith("qweight") and ".2." in k}
    save_file(tensors | codes, gptq / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"sampled tensors of codes differ, the first is"):
        PeftModel.from_pretrained(load(gptq), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"quantization_calibration": "gptq"},
            "quantization_calibration is 'gptq', and this model arrived in gptq",
        ),
        ({"quantization": "auto", "weight_budget": "5 bits"}, "has quantized linears already"),
    ],
)
def test_what_needs_other_codes_is_refused(folders, fields, message):
    base, gptq = folders
    with pytest.raises(ValueError, match=message):
        get_peft_model(load(gptq), config(base, **fields))


def test_linears_that_the_checkpoint_has_in_16_bits_are_left(model, batch, tmp_path):
    model.bfloat16().save_pretrained(tmp_path / "base")
    write_gptq(model, tmp_path / "gptq")
    tensors = load_file(tmp_path / "gptq" / "model.safetensors")
    original = load_file(tmp_path / "base" / "model.safetensors")
    packed = {key.rpartition(".")[0] for key in tensors if key.endswith("qweight")}
    last = sorted({name.partition("mlp.")[2] for name in packed if "mlp." in name})[-1]
    for name in packed:
        if name.endswith(f"mlp.{last}"):
            tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{name}.")}
            tensors |= {key: tensor for key, tensor in original.items() if key.startswith(f"{name}.")}
    save_file(tensors, tmp_path / "gptq" / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((tmp_path / "gptq" / "config.json").read_text())
    inside = sorted({".".join(name.split(".")[-2:]) for name in packed} - {f"mlp.{last}"})
    written["quantization_config"]["modules_in_block_to_quantize"] = [inside]
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(written))
    with pytest.warns(UserWarning, match="2 weights of frozen blocks were not quantized.* has it in 16 bits"):
        wrapped = get_peft_model(load(tmp_path / "gptq"), config(tmp_path / "base"))
    left = wrapped.base_model.quantization_report.left
    assert {name.partition("mlp.")[2] for name in left} == {last}
    assert torch.isfinite(logits(wrapped, batch)).all()


def test_its_bytes_are_counted(folders):
    base, gptq = folders
    found = measure_weight_bytes(get_peft_model(load(gptq), config(base)))
    weights = sum(
        layer.in_features * layer.out_features
        for block in find_blocks(load(gptq))
        if block.index in (0, 2)
        for layer in linears(block)
    )
    assert 0.5 * weights < found.quantized_linears < 0.75 * weights


def test_a_forgetting_report_of_it_takes_the_named_checkpoint(folders, batch):
    base, gptq = folders
    wrapped = get_peft_model(load(gptq), config(base))
    randomize(wrapped)
    expected = logits(wrapped, batch)
    with original_model(wrapped):
        assert torch.equal(logits(wrapped, batch), logits(plain(base), batch))
    assert torch.equal(logits(wrapped, batch), expected)
