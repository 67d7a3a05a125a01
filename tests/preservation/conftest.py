"""A tiny model on disk, a tokenizer of letters, and texts that it can be measured on."""

from __future__ import annotations

import random

import pytest
import torch
from peft import get_peft_model
from support import randomize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from adaptq_peft import AdaptQConfig


class LetterTokenizer:
    """One token a character, with a BOS token (1) at the start of each text, in a vocabulary of 96."""

    def __call__(self, text: str, **options) -> dict[str, list[int]]:
        return {"input_ids": [1] + [3 + ord(letter) % 93 for letter in text]}


def make_texts(seed: int, count: int) -> list[str]:
    generator = random.Random(seed)
    return ["".join(generator.choices("abcdefgh ", k=generator.randint(5, 40))) for _ in range(count)]


@pytest.fixture
def tokenizer():
    return LetterTokenizer()


@pytest.fixture
def general(load):
    """24 documents that the base wrote itself, so that any change of it makes it worse on them."""
    torch.manual_seed(0)
    start, special = torch.full((24, 1), 1), [0, 1, 2]
    written = load().generate(start, do_sample=True, max_new_tokens=40, suppress_tokens=special, pad_token_id=0)
    lengths = random.Random(1).choices(range(8, 41), k=24)
    return ["".join(chr(token - 3) for token in row[1:length]) for row, length in zip(written, lengths, strict=True)]


@pytest.fixture
def domain():
    return make_texts(2, count=10)


@pytest.fixture
def checkpoint(make_model, tmp_path):
    """The folder of a tiny Llama whose predictions are far from uniform."""
    model = make_model()
    model.lm_head.weight.data.mul_(20)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def load(checkpoint):
    return lambda: AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.fixture
def adapt(load):
    """Builds a PEFT model with a random adapter on blocks 1 and 3: `adapt(std=0.02, **config fields)`."""

    def build(std: float = 0.02, **fields):
        config = AdaptQConfig(task_type="CAUSAL_LM", layers_to_transform=[1, 3], **{"frozen_rank": 0, **fields})
        model = get_peft_model(load(), config)
        randomize(model, std=std)
        return model

    return build


@pytest.fixture
def general_samples() -> list[dict[str, list[int]]]:
    """20 general texts of different lengths, as tokens of the tiny models."""
    generator = torch.Generator().manual_seed(8)
    return [{"input_ids": torch.randint(3, 40, (6 + i % 5,), generator=generator).tolist()} for i in range(20)]


@pytest.fixture
def byte_tokenizer() -> PreTrainedTokenizerFast:
    names = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
