"""Evaluation mode for a while, and without the autocast of a Trainer."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import LlamaForQuestionAnswering

from adaptq_peft.evaluation_mode import evaluation_mode


def test_each_module_gets_its_own_mode_back_after_an_error_too(llama):
    llama.train()
    llama.model.layers[0].eval()
    before = [module.training for module in llama.modules()]
    with pytest.raises(KeyError), evaluation_mode(llama):  # noqa: PT012
        assert not any(module.training for module in llama.modules())
        raise KeyError
    assert [module.training for module in llama.modules()] == before


@pytest.mark.usefixtures("fresh_accelerate_state")
def test_the_autocast_of_accelerate_is_taken_off_for_the_while(llama, batch):
    with torch.no_grad():
        expected = llama(**batch).logits
        prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(llama.eval())
        rounded = prepared(**batch).logits
        with evaluation_mode(prepared):
            found = prepared(**batch).logits
        assert torch.equal(found, expected)
        assert not torch.equal(rounded, expected)
        assert torch.equal(prepared(**batch).logits, rounded)


@pytest.mark.usefixtures("fresh_accelerate_state")
def test_the_autocast_of_a_model_that_was_wrapped_since_is_taken_off_too(llama, batch):
    with torch.no_grad():
        expected = llama.eval()(**batch).logits
        wrapped = get_peft_model(Accelerator(cpu=True, mixed_precision="bf16").prepare_model(llama), LoraConfig())
        with evaluation_mode(wrapped):
            assert torch.equal(wrapped(**batch).logits, expected)
        assert not torch.equal(wrapped(**batch).logits, expected)


def test_no_cache_is_made_whatever_forward_is_called_with(make_model, batch):
    """`LlamaForQuestionAnswering` has no argument for it, and passes what its config says."""
    model = LlamaForQuestionAnswering(make_model().config)
    caches = []
    model.transformer.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: caches.append(kwargs["past_key_values"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch)
        with evaluation_mode(model):
            model(**batch)
    assert [cache is None for cache in caches] == [False, True]
    assert model.config.use_cache is True
