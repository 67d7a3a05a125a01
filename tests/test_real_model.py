"""The main path on the real 135M model."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model

from adaptq_peft import AdaptQConfig, profile_activations
from adaptq_peft.demo.model import load_demo_model
from adaptq_peft.demo.texts import load_demo_texts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def texts():
    return load_demo_texts()


def test_magnitude_grows_with_depth_so_the_papers_rule_takes_the_last_blocks(texts):
    model, tokenizer = load_demo_model()
    profile = profile_activations(model, texts.domain_train, tokenizer=tokenizer, samples=50, max_length=64)
    assert all(lower < upper for lower, upper in pairwise(profile.magnitude))
    config = AdaptQConfig(task_type="CAUSAL_LM", profile=profile, selection_strategy="activation")
    get_peft_model(model, config)
    assert config.layers_to_transform == list(range(15, 30))


def test_train_save_and_load_bit_identically(texts, tmp_path, train):
    torch.manual_seed(0)
    model, tokenizer = load_demo_model()
    wrapped = get_peft_model(model, AdaptQConfig(task_type="CAUSAL_LM", layers_to_transform=[20, 29]))
    ids = tokenizer(" ".join(texts.domain_train[:20]), return_tensors="pt").input_ids[:, :128].view(2, 64)
    batch = {"input_ids": ids}
    losses = train(wrapped, batch, steps=4, lr=2e-4)
    assert losses[-1] < losses[0]
    wrapped.save_pretrained(tmp_path)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=model.dtype)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch).logits, wrapped.eval()(**batch).logits)
