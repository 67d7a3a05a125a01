"""Perplexity: equal to the transformers documentation's loop, and to arithmetic done by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from support import tiny_t5
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from adaptq_peft.evaluation import Perplexity, degradation, evaluate_perplexity, perplexity

VOCABULARY = 32
TEXTS = ["the quick brown fox", "jumps over the lazy dog", "and runs away"]


class LetterTokenizer:
    """One token a character, and a BOS token (0) at the start of what is tokenized."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, text: str, **options) -> dict[str, list[int]]:
        self.seen.append(text)
        return {"input_ids": [0] + [1 + ord(letter) % (VOCABULARY - 1) for letter in text]}


class UniformModel(nn.Module):
    """Gives each token of the vocabulary the same probability, and notes what it was run on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.batches: list[torch.Tensor] = []
        self.grad_modes: list[bool] = []

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        self.batches.append(input_ids)
        self.grad_modes.append(torch.is_grad_enabled() or self.training)
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, VOCABULARY) + self.weight)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # far from uniform, so that a shifted target would show
    return model


def test_uniform_model_has_the_vocabulary_as_perplexity():
    result = evaluate_perplexity(UniformModel(), LetterTokenizer(), TEXTS, max_length=8)
    assert result.value == pytest.approx(VOCABULARY)


def test_equals_the_loop_of_the_transformers_documentation(llama):
    stream = torch.tensor([LetterTokenizer()("\n\n".join(TEXTS))["input_ids"]])
    nll, count = 0.0, 0
    for begin in range(0, stream.size(1), 8):
        window = stream[:, begin : begin + 8]
        with torch.no_grad():
            loss = llama(window, labels=window).loss.item()
        nll, count = nll + loss * (window.size(1) - 1), count + window.size(1) - 1
    result = evaluate_perplexity(llama, LetterTokenizer(), TEXTS, max_length=8)
    assert result.num_tokens == count
    assert result.nll == pytest.approx(nll, rel=1e-5)


def test_documents_are_joined_by_blank_lines_and_tokenized_once():
    tokenizer = LetterTokenizer()
    evaluate_perplexity(UniformModel(), tokenizer, ["one", "two"])
    assert tokenizer.seen == ["one\n\ntwo"]


def test_windows_cover_the_stream_without_padding():
    model, tokenizer = UniformModel(), LetterTokenizer()
    result = evaluate_perplexity(model, tokenizer, ["abcdefghij"], max_length=4, batch_size=2)  # 11 tokens
    assert [tuple(batch.shape) for batch in model.batches] == [(2, 4), (1, 3)]
    covered = torch.cat([batch.flatten() for batch in model.batches]).tolist()
    assert covered == tokenizer("abcdefghij")["input_ids"]
    assert result.num_tokens == 3 + 3 + 2


def test_last_window_of_one_token_is_dropped():
    result = evaluate_perplexity(UniformModel(), LetterTokenizer(), ["abcdefgh"], max_length=4)  # 9 tokens
    assert result.num_tokens == 3 + 3


def test_max_tokens_takes_the_start_of_the_stream():
    model = UniformModel()
    result = evaluate_perplexity(model, LetterTokenizer(), ["abcdefgh"], max_length=4, max_tokens=6)
    assert sum(batch.numel() for batch in model.batches) == 6
    assert result.num_tokens == 3 + 1


def test_batch_size_and_chunks_do_not_change_the_result(llama, monkeypatch):
    expected = evaluate_perplexity(llama, LetterTokenizer(), TEXTS, max_length=8, batch_size=1)
    monkeypatch.setattr(perplexity, "LOSS_ROWS", 5)
    result = evaluate_perplexity(llama, LetterTokenizer(), TEXTS, max_length=8, batch_size=4)
    assert result.num_tokens == expected.num_tokens
    assert result.nll == pytest.approx(expected.nll, rel=1e-5)


def test_runs_in_evaluation_mode_without_gradients_and_restores_each_module():
    model = nn.Sequential(UniformModel(), nn.Dropout())
    model.forward = lambda input_ids: model[0](input_ids)
    model.train()
    model[1].eval()
    evaluate_perplexity(model, LetterTokenizer(), TEXTS)
    assert model[0].grad_modes == [False]
    assert [module.training for module in model.modules()] == [True, True, False]


def test_training_mode_is_restored_after_an_error():
    class FailingModel(UniformModel):
        def forward(self, input_ids):
            raise RuntimeError("out of memory")

    model = FailingModel().train()
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate_perplexity(model, LetterTokenizer(), TEXTS)
    assert model.training


def test_progress_counts_tokens():
    calls: list[tuple[int, int]] = []
    evaluate_perplexity(
        UniformModel(), LetterTokenizer(), ["abcdefghij"], max_length=4, batch_size=2,
        progress=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    assert calls == [(8, 11), (11, 11)]


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "texts is empty"),
        (["", " \n"], {}, "all 2 texts are blank"),
        (TEXTS, {"max_length": 1}, "max_length=1 is too small; it must be at least 2"),
        (TEXTS, {"batch_size": 0}, "batch_size=0 is too small; it must be at least 1"),
        (TEXTS, {"max_tokens": 1}, "max_tokens=1 is too small; it must be at least 2"),
    ],
)
def test_bad_input_is_named(texts, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_perplexity(UniformModel(), LetterTokenizer(), texts, **options)


def test_an_encoder_is_refused():
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has an encoder and a decoder; perplexity works"):
        evaluate_perplexity(tiny_t5(), LetterTokenizer(), TEXTS)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForTokenClassification])
def test_a_model_that_does_not_predict_the_next_token_is_refused(kind, adapted):
    config = BertConfig(
        vocab_size=96, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = get_peft_model(kind(config), LoraConfig()) if adapted else kind(config)
    with pytest.raises(
        ValueError, match=f"^{kind.__name__} does not predict the next token of a text; perplexity works"
    ):
        evaluate_perplexity(model, LetterTokenizer(), TEXTS)


def test_prompt_tuning_is_measured(llama):
    model = get_peft_model(llama, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    found = evaluate_perplexity(model, LetterTokenizer(), TEXTS)
    with model.disable_adapter():
        assert evaluate_perplexity(model, LetterTokenizer(), TEXTS).num_tokens == found.num_tokens
    assert found.value > 1


def test_one_string_is_refused():
    with pytest.raises(TypeError, match="pass a list of documents"):
        evaluate_perplexity(UniformModel(), LetterTokenizer(), "a text")


def test_text_without_enough_tokens_is_refused():
    with pytest.raises(ValueError, match=r"the texts yield 1 token\(s\)"):
        evaluate_perplexity(UniformModel(), lambda text, **options: {"input_ids": [3]}, ["a"])


def test_value_is_the_exponential_of_the_mean():
    assert Perplexity(nll=10 * math.log(7), num_tokens=10).value == pytest.approx(7)
    assert Perplexity(nll=1e6, num_tokens=1).value == math.inf


def test_degradation_is_relative_to_the_base():
    base, worse = Perplexity(10 * math.log(20), 10), Perplexity(10 * math.log(21), 10)
    assert degradation(worse, base) == pytest.approx(0.05)
    assert degradation(base, base) == 0


def test_degradation_refuses_different_amounts_of_text():
    with pytest.raises(ValueError, match="perplexities over 9 and 10 tokens cannot be compared"):
        degradation(Perplexity(1.0, 9), Perplexity(1.0, 10))


def test_a_model_without_logits_for_each_token_is_refused():
    class Classifier(UniformModel):
        def forward(self, input_ids):
            return SimpleNamespace(logits=torch.zeros(len(input_ids), 2))

    with pytest.raises(ValueError, match=r"Classifier returns logits of shape \[1, 2\]; needed is a causal language"):
        evaluate_perplexity(Classifier(), LetterTokenizer(), TEXTS[:1])


@pytest.mark.parametrize("chunk", [2, 256], ids=["in chunks", "at once"])
def test_nll_of_each_token(chunk, monkeypatch):
    monkeypatch.setattr(perplexity, "LOSS_ROWS", chunk)
    logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 3
    tokens = torch.tensor([2, 19, 5])
    expected = torch.stack([row.softmax(-1)[token].log() for row, token in zip(logits, tokens, strict=True)])
    assert torch.allclose(-perplexity.token_nll(logits, tokens), expected, atol=1e-6)
    assert perplexity.token_nll(logits[:0], tokens[:0]).shape == (0,)
