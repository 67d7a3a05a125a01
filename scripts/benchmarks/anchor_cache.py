"""Size of the anchor's cache against the error that it brings: top-k log probabilities, or hidden states.

    python scripts/benchmarks/anchor_cache.py --texts general.txt --dtype float32

The student is the model with its lower half in NF4. `kl` is KL(base || student) in nats a token from the cache,
beside the exact one; `gradient_error` is norm(g - g_exact) / norm(g_exact) over the gradients of the logits. Hidden
states are those that enter the head; the head then has to run for the teacher in each step, too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import load_model, make_parser, model_name, report
from peft import get_peft_model
from torch import Tensor
from transformers import AutoTokenizer

from adaptq_peft import AdaptQConfig
from adaptq_peft.preservation.top_k_kl import top_k_kl, top_k_log_probs


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="a file of general text")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--top-k", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256])
    return parser.parse_args()


def windows(arguments: argparse.Namespace) -> list[Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(model_name(arguments.model))
    ids = tokenizer(arguments.texts.read_text(), verbose=False)["input_ids"]
    return list(torch.tensor(ids[: arguments.tokens]).split(arguments.length))


def int8_by_row(hidden: Tensor) -> Tensor:
    scale = hidden.abs().amax(-1, keepdim=True) / 127
    return (hidden / scale).round() * scale


def exact(base: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """KL summed over rows, and its gradient with respect to the student's logits."""
    p, q = base.log_softmax(-1), student.log_softmax(-1)
    return (p.exp() * (p - q)).sum(), q.exp() - p.exp()


def from_top_k(base: Tensor, student: Tensor, k: int) -> tuple[Tensor, Tensor]:
    tokens, log_probs = top_k_log_probs(base, k)
    leaf = student.clone().requires_grad_(True)
    loss = top_k_kl(leaf, torch.arange(len(leaf)), tokens, log_probs.half().float())
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def main() -> None:
    arguments = parse()
    base = load_model(arguments).eval()
    texts = windows(arguments)
    head = base.get_output_embeddings()
    with torch.no_grad():
        hidden = [base.model(input_ids=ids[None]).last_hidden_state[0] for ids in texts]
        answers = [head(rows).float() for rows in hidden]
        count = len(base.model.layers)
        config = AdaptQConfig(task_type="CAUSAL_LM", layers_to_transform=list(range(count // 2, count)), frozen_rank=0)
        student = get_peft_model(base, config).eval()
    width, vocabulary = hidden[0].shape[-1], answers[0].shape[-1]
    index_bytes = 2 if vocabulary <= 2**16 else 4
    ways = {f"top {k}": (k * (index_bytes + 2) + 4, lambda b, s, h, k=k: from_top_k(b, s, k)) for k in arguments.top_k}
    stored = {
        "hidden float16": (2 * width, lambda h: h.half()),
        "hidden bfloat16": (2 * width, lambda h: h.bfloat16()),
        "hidden int8": (width + 2, int8_by_row),
    }
    for name, (size, store) in stored.items():
        ways[name] = (size, lambda b, s, h, store=store: exact(head(store(h).to(h.dtype)).float(), s))
    sums = {name: torch.zeros(3) for name in ways}
    true, tokens = 0.0, 0
    for ids, rows, b in zip(texts, hidden, answers, strict=True):
        with torch.no_grad():
            s = student(input_ids=ids[None]).logits[0].float()
            value, gradient = exact(b, s)
        true, tokens = true + value.item(), tokens + len(ids)
        for name, (_, way) in ways.items():
            with torch.set_grad_enabled(name.startswith("top")):
                found, found_gradient = way(b, s, rows)
            error = (found_gradient - gradient).square().sum()
            sums[name] += torch.stack([found.cpu(), error.cpu(), gradient.square().sum().cpu()])
    result = {
        "tokens": tokens,
        "exact_kl": true / tokens,
        "caches": {
            name: {
                "bytes_a_token": ways[name][0],
                "kl": (total[0] / tokens).item(),
                "gradient_error": (total[1] / total[2]).sqrt().item(),
            }
            for name, total in sums.items()
        },
    }
    report(arguments, result)


if __name__ == "__main__":
    main()
