from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BitsAndBytesConfig,
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from adaptq_peft import AdaptQConfig, adaptq_bnb_config
from adaptq_peft.quantization import is_quantized
from adaptq_peft.selection import find_blocks

VOCABULARY = 96
COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {**COMMON, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}


def t5():
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(**COMMON, **sizes, decoder_start_token_id=0))


def bart():
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in _BART_SIZES.items()}
    return BartForConditionalGeneration(
        BartConfig(**COMMON, **sizes, d_model=64, dropout=0.0, max_position_embeddings=32, decoder_start_token_id=2)
    )


_BART_SIZES = {"layers": 2, "attention_heads": 4, "ffn_dim": 128}


def bert():
    return BertForMaskedLM(BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def gemma3():
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=16, sliding_window=8))


@pytest.fixture
def build(make_model):
    makers = {
        "llama": lambda: make_model("llama"),
        "llama-tied": lambda: make_model("llama", tie_word_embeddings=True),
        "gpt2": lambda: make_model("gpt2"),
        "t5": t5,
        "bart": bart,
        "bert": bert,
        "gemma3": gemma3,
    }

    def run(kind, folder, dtype=torch.bfloat16):
        torch.manual_seed(0)
        model = makers[kind]().to(dtype)
        model.save_pretrained(folder)
        return type(model)

    return run


ALL = ["llama", "llama-tied", "gpt2", "t5", "bart", "bert", "gemma3"]


def load_split(model_class, folder, adapter, dtype=torch.bfloat16):
    return model_class.from_pretrained(
        folder, quantization_config=adaptq_bnb_config(adapter, folder, dtype=dtype), dtype=dtype
    )


def quantized_names(model):
    return {name for name, module in model.named_modules() if is_quantized(module)}


def run(model, batch):
    model.eval()
    with torch.no_grad():
        return model(**batch, labels=batch["input_ids"]).logits


def states(model):
    """Every tensor of a model, with the codes, scales and tables of quantized weights, by name."""
    return {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}


def same_bits(a, b):
    """Codes that are stored as bfloat16 may be NaN, which is not equal to itself."""
    return a.shape == b.shape and torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (a, b)))


def assert_same_model(split, swapped, batch):
    found, expected = states(split), states(swapped)
    assert found.keys() == expected.keys()
    assert any("absmax" in name or name.endswith("SCB") for name in found)
    assert [name for name in found if found[name].dtype != expected[name].dtype] == []
    assert [name for name in found if not same_bits(found[name], expected[name])] == []
    assert torch.equal(run(split, batch), run(swapped, batch))


@pytest.mark.parametrize("kind", ALL)
def test_it_is_the_model_that_the_swap_in_memory_makes(build, batch, tmp_path, kind):
    model_class = build(kind, tmp_path)
    split = load_split(model_class, tmp_path, [1])
    quantized = quantized_names(split)
    split = get_peft_model(split, AdaptQConfig(layers_to_transform=[1], frozen_rank=0))
    swapped = model_class.from_pretrained(tmp_path, dtype=torch.bfloat16)
    swapped = get_peft_model(swapped, AdaptQConfig(layers_to_transform=[1], frozen_rank=0))
    assert quantized == quantized_names(swapped.get_base_model()) == quantized_names(split.get_base_model())
    assert_same_model(split, swapped, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "quantization",
    [
        "nf4",
        "fp4",
        "int8",
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage="bfloat16"),
        BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["mlp.c_fc", "up_proj"]),
    ],
)
def test_every_quantization_and_dtype(build, batch, tmp_path, kind, dtype, quantization):
    """The checkpoint is in float32, so it is cast before it is quantized, as when it is loaded and then swapped."""
    model_class = build(kind, tmp_path, torch.float32)
    config = AdaptQConfig(layers_to_transform=[0, 2], quantization=quantization, frozen_rank=0)
    split = get_peft_model(load_split(model_class, tmp_path, config, dtype), config)
    swapped = get_peft_model(model_class.from_pretrained(tmp_path, dtype=dtype), config)
    assert_same_model(split, swapped, batch)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bart"])
def test_training_gives_the_same_losses(build, batch, train, tmp_path, kind):
    model_class = build(kind, tmp_path)

    def losses(model):
        torch.manual_seed(0)  # corrections start at random
        return train(get_peft_model(model, AdaptQConfig(layers_to_transform=[1])), batch, lr=0.01)

    split = losses(load_split(model_class, tmp_path, [1], torch.float32))
    assert split == losses(model_class.from_pretrained(tmp_path, dtype=torch.float32))
    assert split[-1] < split[0]


def test_adapted_blocks_and_the_head_stay_plain_linears(build, tmp_path):
    model = load_split(build("llama", tmp_path), tmp_path, [1, 3])
    for block in find_blocks(model):
        linears = [module for module in block.module.modules() if isinstance(module, nn.Linear)]
        kinds = {type(module) for module in linears}
        assert kinds == ({nn.Linear} if block.index in (1, 3) else {bnb.nn.Linear4bit})
        if block.index in (1, 3):
            assert {module.weight.dtype for module in linears} == {torch.bfloat16}
    assert type(model.lm_head) is nn.Linear
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.quant_type == "nf4"
    assert weight.quant_state.nested


def test_conv1d_of_adapted_blocks_stays(build, tmp_path):
    model = load_split(build("gpt2", tmp_path), tmp_path, [1])
    assert isinstance(model.transformer.h[1].attn.c_attn, Conv1D)
    assert isinstance(model.transformer.h[2].attn.c_attn, bnb.nn.Linear4bit)


def test_block_1_is_not_taken_for_block_10(make_model, tmp_path):
    make_model(num_layers=12).save_pretrained(tmp_path)
    model = load_split(LlamaForCausalLM, tmp_path, 1)
    plain = [b.index for b in find_blocks(model) if not any(is_quantized(m) for m in b.module.modules())]
    assert plain == [1]


def test_block_1_is_not_taken_for_block_10_in_a_plan(make_model):
    """Which has 8 bits, as no frozen block may have."""
    model = make_model(num_layers=12)
    names = [name for name, _ in model.named_modules() if name.endswith("_proj")]
    precision = {name: "int8" if ".layers.10." in name else "nf4" for name in names}
    adapted = [index for index in range(12) if index != 1]
    config = AdaptQConfig(layers_to_transform=adapted, quantization="auto", precision=precision)
    assert adaptq_bnb_config(config, model).load_in_4bit


def test_another_head_than_the_checkpoint_names(build, tmp_path):
    build("llama", tmp_path)
    model = load_split(LlamaForSequenceClassification, tmp_path, [1])
    assert type(model.score) is nn.Linear
    assert len(quantized_names(model)) == 3 * 7
    bare = load_split(AutoModel, tmp_path, [1])
    assert len(quantized_names(bare)) == 3 * 7
    assert type(bare.layers[1].mlp.up_proj) is nn.Linear


def test_a_bare_checkpoint_loaded_with_a_head(make_model, tmp_path):
    make_model("gpt2").transformer.save_pretrained(tmp_path)
    model = load_split(type(make_model("gpt2")), tmp_path, [1])
    assert len(quantized_names(model)) == 3 * 4
    assert not is_quantized(model.lm_head)


def test_linears_whose_weight_is_read_directly_stay(tmp_path):
    MambaForCausalLM(MambaConfig(**COMMON, hidden_size=64, num_hidden_layers=2)).save_pretrained(tmp_path)
    model = load_split(MambaForCausalLM, tmp_path, [1])
    assert quantized_names(model) == {"backbone.layers.0.mixer.in_proj"}


def test_linears_that_transformers_does_not_quantize(batch, tmp_path):
    """Falcon has a linear class of its own. It is quantized by get_peft_model, and a warning says so."""
    config = FalconConfig(**SIZES, max_position_embeddings=32)
    FalconForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    message = (
        r"8 linears of frozen blocks, the first is transformer\.h\.0\..*, are of class FalconLinear, which transf"
    )
    with pytest.warns(UserWarning, match=message):
        split = load_split(FalconForCausalLM, tmp_path, [1])
    assert quantized_names(split) == set()
    split = get_peft_model(split, AdaptQConfig(layers_to_transform=[1], frozen_rank=0))
    swapped = FalconForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_same_model(split, get_peft_model(swapped, AdaptQConfig(layers_to_transform=[1], frozen_rank=0)), batch)


def test_excluded_modules_stay(build, tmp_path):
    model_class = build("llama", tmp_path)
    adapter = AdaptQConfig(layers_to_transform=[1, 2, 3], exclude_modules=["up_proj", "down_proj"])
    model = load_split(model_class, tmp_path, adapter)
    names = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj"}
    assert quantized_names(model) == {f"model.layers.0.{name}" for name in names}


def test_a_saved_adapter_is_served_on_a_split_base(build, batch, train, tmp_path):
    model_class = build("llama", tmp_path / "base")
    config = AdaptQConfig(layers_to_transform=[1], quantization="fp4")
    trained = get_peft_model(model_class.from_pretrained(tmp_path / "base", dtype=torch.bfloat16), config)
    train(trained, batch)
    trained.save_pretrained(tmp_path / "adapter")
    quantization_config = adaptq_bnb_config(tmp_path / "adapter", dtype=torch.bfloat16)
    assert quantization_config.bnb_4bit_quant_type == "fp4"
    base = model_class.from_pretrained(
        tmp_path / "base", quantization_config=quantization_config, dtype=torch.bfloat16
    )
    assert torch.equal(run(PeftModel.from_pretrained(base, tmp_path / "adapter"), batch), run(trained, batch))


def test_the_model_may_be_given_in_each_form(build, make_model, tmp_path):
    build("llama", tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    without_class = type(config)(**{**config.to_dict(), "architectures": None})
    found = [adaptq_bnb_config([1], given).to_dict() for given in (tmp_path, str(tmp_path), config, model)]
    assert found[1:] == found[:-1]
    assert adaptq_bnb_config([1], without_class).llm_int8_skip_modules == found[0]["llm_int8_skip_modules"]


def test_the_compute_dtype(build, tmp_path):
    build("llama", tmp_path)
    assert adaptq_bnb_config([1], tmp_path).bnb_4bit_compute_dtype is torch.bfloat16  # that of the checkpoint
    assert adaptq_bnb_config([1], tmp_path, torch.float16).bnb_4bit_compute_dtype is torch.float16
    own = AdaptQConfig(
        layers_to_transform=1,
        quantization=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
    )
    assert adaptq_bnb_config(own, tmp_path, torch.float16).bnb_4bit_compute_dtype is torch.float32


def test_a_split_model_saves_and_loads(build, batch, tmp_path):
    model_class = build("llama", tmp_path / "base")
    split = load_split(model_class, tmp_path / "base", [1])
    split.save_pretrained(tmp_path / "split")
    again = model_class.from_pretrained(tmp_path / "split")
    assert quantized_names(again) == quantized_names(split)
    assert torch.equal(run(again, batch), run(split, batch))


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ([1, 4, 9], r"layers_to_transform names blocks \[4, 9\], and the model has 4 blocks; allowed are 0 to 3"),
        ([-1], r"layers_to_transform is \[-1\]; allowed: a list of different block indices"),
        (
            [0, 1, 2, 3],
            r"all 4 blocks are adapted, so none is quantized; load the model without a quantization_config",
        ),
        (AdaptQConfig(), r"layers_to_transform of this AdaptQConfig is None, and the blocks have to be known before"),
        (
            AdaptQConfig(layers_to_transform=[1], quantization="none"),
            r'quantization is "none", so no block is quantized; load the model without a quantization_config',
        ),
    ],
)
def test_bad_blocks(build, tmp_path, adapter, message):
    build("llama", tmp_path)
    with pytest.raises(ValueError, match=message):
        adaptq_bnb_config(adapter, tmp_path)


def test_a_base_must_be_known():
    with pytest.raises(ValueError, match="model is None, and the adapter does not name its base; name the checkpoint"):
        adaptq_bnb_config([1])


def test_a_quantized_checkpoint_is_refused(build, tmp_path):
    model_class = build("llama", tmp_path / "base")
    load_split(model_class, tmp_path / "base", [1]).save_pretrained(tmp_path / "split")
    with pytest.raises(
        ValueError, match=r"split' is quantized already, and from_pretrained keeps it so; name the 16-bit"
    ):
        adaptq_bnb_config([1], tmp_path / "split")
