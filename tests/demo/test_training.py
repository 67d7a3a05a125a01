"""Training samples are whole windows of the joined text."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adaptq_peft.demo.training import train, training_windows


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


@pytest.mark.parametrize(("autocast", "expected"), [(None, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_float32_weights_are_trained_in_the_dtype_asked_for(tiny_model_folder, demo_texts, autocast, expected):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    computed = []
    linear = next(module for module in model.modules() if isinstance(module, torch.nn.Linear))
    linear.register_forward_hook(lambda module, args, output: computed.append(output.dtype))
    before = linear.weight.detach().clone()
    samples = training_windows(tokenizer, demo_texts.domain_train, 16)
    options = {"steps": 2, "learning_rate": 1e-3, "batch_size": 2, "seed": 0, "on_step": lambda step, loss: None}
    train(model, samples, autocast=autocast, **options)
    assert set(computed) == {expected}
    assert linear.weight.dtype == torch.float32
    assert not torch.equal(linear.weight, before)
