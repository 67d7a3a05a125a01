"""Forgetting measured and held to a budget on the real 135M model."""

from __future__ import annotations

import pytest
from peft import get_peft_model
from support import randomize

from adaptq_peft import AdaptQConfig, BaseReference, fit_to_budget, measure_forgetting
from adaptq_peft.demo.model import load_demo_model
from adaptq_peft.demo.texts import load_demo_texts


@pytest.mark.slow
def test_a_damaged_model_is_brought_back_into_its_budget():
    texts = load_demo_texts()
    general = [text for text in texts.general_test if len(text) > 200][:24]
    model, tokenizer = load_demo_model()
    options = {"tokenizer": tokenizer, "max_tokens": 48, "batch_size": 8}
    reference = BaseReference.of(model, general, texts.domain_test[:8], **options)
    model = get_peft_model(model, AdaptQConfig(task_type="CAUSAL_LM", layers_to_transform=list(range(2, 30))))
    randomize(model, std=0.02)  # more than half as large as the weights are
    before = measure_forgetting(model, base=reference, budget=0.3)
    assert not before.feasible
    report = fit_to_budget(model, base=reference, budget=0.3)
    after = measure_forgetting(model, base=reference, budget=0.3)
    assert report.feasible
    assert after.degradation < before.degradation
    assert report.upper_bound <= 0.3
