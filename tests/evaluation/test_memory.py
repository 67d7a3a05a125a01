"""Bytes measured from tensors: equal to what the shapes say, each tensor once, whatever wraps it."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from adaptq_peft import AdaptQConfig
from adaptq_peft.evaluation import WeightBytes, measure_weight_bytes, paper_weight_ratio

BLOCKS, WIDTH, INNER, VOCABULARY = 4, 64, 128, 96
LINEAR_SIZES = [WIDTH * WIDTH] * 4 + [WIDTH * INNER] * 3
NORMS_IN_BLOCK = 2 * WIDTH
TABLES = 16 * 4 + 256 * 4
"""Bytes of a layer's two lookup tables, which layers may or may not share."""


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def adapted_llama(quantization: str = "nf4", frozen_rank: int = 0):
    config = AdaptQConfig(layers_to_transform=[2, 3], quantization=quantization, frozen_rank=frozen_rank)
    return get_peft_model(tiny_llama(), config)


def nested_4bit_bytes(size: int) -> int:
    """Codes, 8-bit scales, float32 scales of the scales and their offset; without lookup tables."""
    scales = -(-size // 64)
    return size // 2 + scales + 4 * -(-scales // 256) + 4


def test_plain_model_is_counted_once_per_tensor():
    model = tiny_llama()
    measured = measure_weight_bytes(model)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    assert measured.dense_linears == measured.block_linears == BLOCKS * sum(LINEAR_SIZES) * 2
    assert measured.quantized_linears == measured.adapters == 0
    assert measured.other == (VOCABULARY * WIDTH + WIDTH + BLOCKS * NORMS_IN_BLOCK) * 2 + buffers
    assert measured.base == measured.total == sum(p.numel() for p in model.parameters()) * 2 + buffers


def test_gpt2_counts_conv1d_as_linears():
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=2)
    assert measure_weight_bytes(GPT2LMHeadModel(config)).dense_linears == 2 * 12 * WIDTH * WIDTH * 4


def test_4bit_counts_codes_scales_and_nested_scales():
    before, after = measure_weight_bytes(tiny_llama()), measure_weight_bytes(adapted_llama())
    least = 2 * sum(nested_4bit_bytes(size) for size in LINEAR_SIZES)
    assert least < after.quantized_linears <= least + 2 * len(LINEAR_SIZES) * TABLES
    assert after.dense_linears == before.dense_linears // 2
    assert after.other == before.other


def test_int8_counts_codes_and_row_scales():
    measured = measure_weight_bytes(adapted_llama("int8"))
    rows = 4 * WIDTH + 2 * INNER + WIDTH
    assert measured.quantized_linears == 2 * (sum(LINEAR_SIZES) + 4 * rows)


@pytest.mark.parametrize("rank", [0, 2])
def test_what_is_trained_is_counted_apart(rank):
    model = adapted_llama("none", rank)
    measured, plain = measure_weight_bytes(model), measure_weight_bytes(tiny_llama())
    corrections = rank * (4 * 2 * WIDTH + 3 * (WIDTH + INNER))
    assert measured.adapters == 2 * (sum(LINEAR_SIZES) + NORMS_IN_BLOCK + corrections) * 4
    assert measured.base == plain.base
    assert measured.total == plain.total + measured.adapters


def test_lora_parameters_count_as_adapters():
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    measured = measure_weight_bytes(model)
    assert measured.adapters == BLOCKS * 2 * 2 * WIDTH * 4
    assert measured.base == measure_weight_bytes(tiny_llama()).base


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_forward_passes_do_not_change_the_figures(quantization):
    model = adapted_llama(quantization).eval()
    before = measure_weight_bytes(model)
    with torch.no_grad():
        model(torch.arange(8)[None])
    assert measure_weight_bytes(model) == before


def test_weights_on_the_meta_device_are_counted():
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_llama().config).to(torch.bfloat16)
    assert measure_weight_bytes(model).dense_linears == BLOCKS * sum(LINEAR_SIZES) * 2


def test_model_without_blocks_is_an_error():
    with pytest.raises(ValueError, match="No transformer blocks found in Linear"):
        measure_weight_bytes(nn.Linear(4, 4))


def test_sums_of_the_parts():
    parts = WeightBytes(quantized_linears=1, dense_linears=20, adapters=300, other=4000)
    assert (parts.block_linears, parts.base, parts.total) == (21, 4021, 4321)


def test_paper_ratio():
    assert paper_weight_ratio(30, 15) == 0.625
    assert paper_weight_ratio(32, 32) == 1
    assert paper_weight_ratio(32, 0) == 0.25


@pytest.mark.parametrize(
    ("blocks", "adapted", "message"),
    [(0, 0, "num_blocks=0; a model has at least 1 block"), (4, 5, "num_adapted=5; it must be from 0 to num_blocks=4")],
)
def test_paper_ratio_refuses_impossible_numbers(blocks, adapted, message):
    with pytest.raises(ValueError, match=message):
        paper_weight_ratio(blocks, adapted)
