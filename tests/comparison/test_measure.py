"""What a study measures: on which texts, and on how much of them."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from adaptq_peft.comparison.measure import Measurements, training_memory
from adaptq_peft.demo.training import training_windows
from adaptq_peft.preservation.documents import measure_documents


def test_each_text_is_used_for_what_it_is_for(load, tokenizer, texts, settings):
    found = Measurements(load, tokenizer, texts, settings(evaluation_tokens=10_000, validation_tokens=10_000))
    for part in ("valid", "test"):
        for name in ("domain", "general"):
            documents = getattr(getattr(found, part), name)
            expected = [tokenizer(text)["input_ids"] for text in getattr(texts, f"{name}_{part}")]
            assert [window.tokens.tolist() for window in documents.windows] == expected
    windows = training_windows(tokenizer, texts.general_train, 16)
    assert [sample["input_ids"] for sample in found.general_samples] == [w["input_ids"].tolist() for w in windows]


def test_validation_and_test_have_sizes_of_their_own(load, tokenizer, texts, settings):
    found = Measurements(load, tokenizer, texts, settings(evaluation_tokens=240, validation_tokens=60))
    valid, test = (part.general_losses.num_tokens.sum() for part in (found.valid, found.test))
    assert valid <= 60 < 120 < test


def test_what_rates_are_chosen_by_is_of_the_validation_texts(measurements, load):
    model = load()
    found = measurements.validation(model)
    for name in ("domain", "general"):
        losses = measure_documents(model, getattr(measurements.valid, name))
        assert found[name] == pytest.approx(losses.total.value)
        assert found[name] != pytest.approx(getattr(measurements.test, f"{name}_losses").total.value)


def test_memory_of_a_base_in_32_bits_is_that_of_one_in_16(checkpoint):
    lora = LoraConfig(target_modules=["q_proj"])
    wide, narrow = (
        training_memory(get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype), lora))
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert wide == narrow
    assert wide["total"] == wide["weights"] + wide["gradients"] + wide["optimizer_states"]
