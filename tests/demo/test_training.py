"""Training samples are whole windows of the joined text."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from adaptq_peft.demo.training import training_windows


def test_windows_are_the_stream_cut_in_order(tiny_model_folder, demo_texts):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    stream = tokenizer("\n\n".join(demo_texts.domain_train))["input_ids"]
    samples = training_windows(tokenizer, demo_texts.domain_train, 16)
    assert len(samples) == len(stream) // 16
    assert samples[1]["input_ids"].tolist() == stream[16:32]
    assert samples[1]["labels"].tolist() == stream[16:32]


def test_too_little_text_is_an_error(tiny_model_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    with pytest.raises(ValueError, match="tokens; one sample takes 512"):
        training_windows(tokenizer, ["a few words"], 512)
