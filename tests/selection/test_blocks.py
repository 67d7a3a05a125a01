from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from adaptq_peft.selection import find_blocks


def test_blocks_of_llama_and_gpt2(make_model):
    assert [b.name for b in find_blocks(make_model("llama", num_layers=3))] == [f"model.layers.{i}" for i in range(3)]
    blocks = find_blocks(make_model("gpt2", num_layers=2))
    assert [(b.index, b.name, type(b.module).__name__) for b in blocks] == [
        (0, "transformer.h.0", "GPT2Block"),
        (1, "transformer.h.1", "GPT2Block"),
    ]


def test_a_single_block_is_found(make_model):
    assert len(find_blocks(make_model("llama", num_layers=1))) == 1


def test_blocks_of_an_encoder_decoder_come_in_the_order_they_run():
    model = T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=2, vocab_size=20, decoder_start_token_id=0)
    )
    assert [b.name for b in find_blocks(model)] == [
        "encoder.block.0",
        "encoder.block.1",
        "decoder.block.0",
        "decoder.block.1",
    ]
    assert [b.in_decoder for b in find_blocks(model)] == [False, False, True, True]


def test_blocks_are_found_through_a_peft_wrapper(llama):
    wrapped = get_peft_model(llama, LoraConfig(target_modules=["q_proj"]))
    assert find_blocks(wrapped)[0].name == "base_model.model.model.layers.0"


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        self.vision = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(3)])
        self.text = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(2)])
        self.linears = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])
        self.activations = nn.ModuleList([nn.ReLU(), nn.ReLU()])


def test_the_largest_of_several_lists_is_chosen_and_a_pattern_chooses_another():
    assert [b.name for b in find_blocks(TwoTowers())] == ["text.0", "text.1"]
    assert len(find_blocks(TwoTowers(), "vision")) == 3


def test_a_pattern_may_be_the_end_of_a_name_or_one_of_a_list(llama):
    assert len(find_blocks(llama, "layers")) == 4
    assert len(find_blocks(llama, ["h", "layers"])) == 4


class Attention(nn.Sequential):
    pass


class Recurrence(nn.Sequential):
    pass


def test_blocks_of_several_classes():
    model = TwoTowers()
    model.hybrid = nn.ModuleList([Attention(nn.Linear(4, 4)), Recurrence(nn.Linear(4, 4))])
    assert [b.name for b in find_blocks(model)] == ["text.0", "text.1"]
    assert [b.name for b in find_blocks(model, "hybrid")] == ["hybrid.0", "hybrid.1"]
    model._no_split_modules = ["Attention", "Recurrence"]
    assert [b.name for b in find_blocks(model)] == ["hybrid.0", "hybrid.1"]


def test_lists_inside_blocks_are_not_blocks():
    blocks = nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4)] * 8)}) for _ in range(2)])
    model = nn.Module()
    model.layers = blocks
    assert [b.name for b in find_blocks(model)] == ["layers.0", "layers.1"]


def test_no_blocks_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match=r"No transformer blocks found in Sequential.*Set layers_pattern"):
        find_blocks(nn.Sequential(nn.Linear(2, 2)))


def test_a_pattern_that_matches_nothing_lists_what_there_is():
    with pytest.raises(
        ValueError, match=r"layers_pattern 'h' matches no list.*vision \(3 x Sequential\), text \(2 x Seq"
    ):
        find_blocks(TwoTowers(), "h")
