"""Losses of documents: equal to the transformers documentation's loop on each document."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from adaptq_peft.preservation.documents import DocumentLosses, check_finite, measure_documents, tokenize_documents

LONG = ["abcdefgh" * 6, "x", "hello world", "the quick brown fox jumps"]


def documentation_loop(model, tokenizer, text, max_length, stride):
    """The loop of "Perplexity of fixed-length models", which masks the context of each window by -100."""
    input_ids = torch.tensor([tokenizer(text)["input_ids"]])
    nll, count, previous = 0.0, 0, 0
    for begin in range(0, input_ids.size(1), stride):
        end = min(begin + max_length, input_ids.size(1))
        window = input_ids[:, begin:end]
        targets = window.clone()
        targets[:, : -(end - previous)] = -100
        valid = (targets[:, 1:] != -100).sum().item()
        if valid:
            with torch.no_grad():
                nll += model(window, labels=targets).loss.item() * valid
        count, previous = count + valid, end
        if end == input_ids.size(1):
            break
    return nll, count


@pytest.mark.parametrize("stride", [8, 3])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_equals_the_loop_of_the_transformers_documentation(load, tokenizer, stride, batch_size):
    model = load().eval()
    documents = tokenize_documents(tokenizer, LONG, max_length=8, stride=stride)
    losses = measure_documents(model, documents, batch_size=batch_size)
    expected = [documentation_loop(model, tokenizer, text, 8, stride) for text in LONG]
    assert losses.num_tokens.tolist() == [count for _, count in expected]
    assert losses.nll == pytest.approx([nll for nll, _ in expected], rel=1e-5)


def test_with_a_stride_each_token_but_the_first_is_predicted_once(tokenizer):
    documents = tokenize_documents(tokenizer, LONG, max_length=8, stride=3)
    predicted = sum(len(window.tokens) - window.num_context for window in documents.windows)
    assert predicted == sum(len(text) for text in LONG)


def test_total_is_weighted_by_tokens():
    losses = DocumentLosses(np.array([1.0, 6.0]), np.array([1, 3]))
    assert losses.total.value == pytest.approx(np.exp(7 / 4))
    assert losses.subset([1]).total.value == pytest.approx(np.exp(2))


def test_subset_measures_the_same_as_part_of_all(load, tokenizer):
    model = load()
    documents = tokenize_documents(tokenizer, LONG, max_length=8)
    whole = measure_documents(model, documents)
    part = measure_documents(model, documents.subset([3, 0]))
    assert part.num_tokens.tolist() == whole.num_tokens[[3, 0]].tolist()
    assert part.nll == pytest.approx(whole.nll[[3, 0]], rel=1e-5)


def test_texts_without_a_token_to_predict_are_left_out_and_counted(tokenizer):
    documents = tokenize_documents(tokenizer, ["", "ab", ""])
    assert (documents.num_documents, documents.num_skipped) == (1, 2)


def test_max_tokens_cuts_each_document(tokenizer):
    documents = tokenize_documents(tokenizer, LONG, max_tokens=5)
    assert [len(window.tokens) for window in documents.windows] == [5, 2, 5, 5]


def test_mode_is_restored(load, tokenizer):
    model = load().train()
    measure_documents(model, tokenize_documents(tokenizer, ["ab"]))
    assert model.training


def test_short_windows_fill_a_batch_to_the_size_of_full_ones(tokenizer):
    documents = tokenize_documents(tokenizer, ["a" * 7, "bbb", "ccc", "dd", "e"], max_length=8)
    batches = documents.batches(1)
    assert [batch.input_ids.shape for batch in batches] == [(1, 8), (2, 4), (2, 3)]
    assert [batch.document.unique().tolist() for batch in batches] == [[0], [1, 2], [3, 4]]


def test_progress_counts_batches(load, tokenizer):
    calls = []
    documents = tokenize_documents(tokenizer, LONG, max_length=40)
    measure_documents(load(), documents, batch_size=1, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        ("text", {}, TypeError, "pass a list of documents"),
        ([], {}, ValueError, "texts is empty"),
        (["ab", None], {}, TypeError, "text 1 is a NoneType; allowed: a str, or a dict"),
        ([{"body": "ab"}], {}, TypeError, "text 0 is a NoneType; allowed"),
        (["", ""], {}, ValueError, "none of the 2 texts has 2 tokens"),
        (["ab"], {"max_length": 1}, ValueError, "max_length=1 is out of range; it must be at least 2"),
        (["ab"], {"max_length": 8, "stride": 9}, ValueError, "stride=9 is out of range; it must be from 1 to max_len"),
        (["ab"], {"stride": 0}, ValueError, "stride=0 is out of range"),
        (["ab"], {"max_tokens": 1}, ValueError, "max_tokens=1 is out of range; it must be at least 2"),
    ],
)
def test_bad_input_is_named(tokenizer, texts, options, error, message):
    with pytest.raises(error, match=message):
        tokenize_documents(tokenizer, texts, **options)


def test_a_loss_that_is_not_finite_is_named(load, tokenizer):
    model = load()
    nn.init.constant_(model.lm_head.weight, float("nan"))
    losses = measure_documents(model, tokenize_documents(tokenizer, ["ab", "cd"]))
    with pytest.raises(ValueError, match=r"the loss of the base is nan on document 0 \(2 of 2 documents"):
        check_finite(losses, "base")
