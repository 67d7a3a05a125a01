"""Moments of inputs: what is masked, and the error for blocks that can't be run by themselves."""

from __future__ import annotations

import pytest
from support import randomize

from adaptq_peft.preservation.delta_shrinkage import DeltaShrinkage
from adaptq_peft.preservation.documents import tokenize_documents
from adaptq_peft.preservation.input_moments import padded_batches


def test_padding_and_the_last_token_are_masked_and_context_is_not(tokenizer):
    documents = tokenize_documents(tokenizer, ["abcdefg", "ab"], max_length=6, stride=4)
    masks = [batch["attention_mask"].tolist() for batch in padded_batches(documents, 4)]
    lengths = sorted((len(window.tokens) for window in documents.windows), reverse=True)
    assert lengths == [6, 4, 3]
    assert masks == [[[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]]]


def test_blocks_that_run_twice_are_refused_with_what_to_do(adapt, general, domain, tokenizer):
    model = adapt(quantization="none")
    randomize(model)
    layers = model.get_base_model().model.layers
    layers[1] = layers[3]
    texts = [tokenize_documents(tokenizer, texts) for texts in (domain, general)]
    with pytest.raises(
        ValueError, match=r'ran 0 times .* shrinkage needs blocks that run once each. Set family="scales"'
    ):
        DeltaShrinkage(model, *texts, batch_size=4)
