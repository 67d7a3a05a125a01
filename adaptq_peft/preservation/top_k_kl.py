"""KL(base || model) from the base's k most likely tokens and the mass of all others: pure tensor arithmetic.

The k tokens and "any other token" are k + 1 classes. The KL divergence over classes is at most that over the whole
vocabulary (data processing inequality), and equal to it if k is the size of the vocabulary. What it misses is how the
model spreads its mass among the other tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOSS_ROWS = 256
"""Positions whose logits are in float32 at one time: 256 x 49k x 4 bytes = 50 MB."""

LOG_ZERO = -1e4
"""Stands for log(0) where infinities would give 0 * inf; a finite float16, and exp of it is 0."""


def top_k_log_probs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most likely tokens at each position, and log probabilities of them and of all others together.

    Args:
        logits: [positions, vocabulary], any floating dtype; computed in float32, `LOSS_ROWS` positions at a time.
        k: number of tokens, at most the vocabulary.

    Returns:
        The tokens [positions, k], int64, and natural log probabilities [positions, k + 1], float32, of which the last
        is that of all other tokens (`LOG_ZERO` if there are none).
    """
    parts = [_top_k_of_rows(rows.float(), k) for rows in logits.split(LOSS_ROWS)]
    return torch.cat([tokens for tokens, _ in parts]), torch.cat([log_probs for _, log_probs in parts])


def _top_k_of_rows(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    tokens = logits.topk(k, dim=-1).indices
    return tokens, _class_log_probs(logits, tokens)[0]


def _class_log_probs(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log probabilities [rows, k + 1] of `tokens` and of the rest, and those of single tokens, -inf at `tokens`."""
    log_probs = logits.log_softmax(-1)
    chosen = log_probs.gather(-1, tokens)
    others = log_probs.scatter_(-1, tokens, -torch.inf)
    return torch.cat([chosen, others.logsumexp(-1, keepdim=True)], -1).clamp(min=LOG_ZERO), others


def top_k_kl(logits: Tensor, rows: Tensor, tokens: Tensor, log_probs: Tensor) -> Tensor:
    """Sum over positions of KL(base || model) over the k + 1 classes, in nats.

    The gradient with respect to `logits` is formed in the forward pass, `LOSS_ROWS` positions at a time, so that
    besides the logits only their gradient is whole in memory, both in the dtype of the logits. It can be taken once.

    Args:
        logits: the model's, [all positions, vocabulary], any floating dtype.
        rows: [n], int64: the positions that count. Others have no influence, and a zero gradient.
        tokens: [n, k], int64: the base's most likely tokens at these positions.
        log_probs: [n, k + 1], float32: the base's log probabilities of them and of all others; normalised here, so
            that rounding them for storage does not move the minimum away from the base.

    Returns:
        A float32 scalar.
    """
    return _TopKKL.apply(logits, rows, tokens, log_probs.log_softmax(-1).clamp(min=LOG_ZERO))  # type: ignore[no-any-return, no-untyped-call]


class _TopKKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Tensor, tokens: Tensor, log_probs: Tensor) -> Tensor:  # type: ignore[override]
        gradient = torch.zeros_like(logits) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        for part, part_tokens, base in zip(
            rows.split(LOSS_ROWS), tokens.split(LOSS_ROWS), log_probs.split(LOSS_ROWS), strict=True
        ):
            model, others = _class_log_probs(logits[part].float(), part_tokens)
            total += (base.exp() * (base - model)).sum()
            if gradient is not None:
                gradient[part] = _gradient(base, model, others, part_tokens).to(gradient.dtype)
        ctx.gradient = gradient
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("the gradient of top_k_kl can be taken once; compute the loss again to take it again")
        return gradient.mul_(grad_output), None, None, None


def _gradient(base: Tensor, model: Tensor, others: Tensor, tokens: Tensor) -> Tensor:
    """d KL / d logits [rows, vocabulary]: q - p at the k tokens, q - p_others * q / q_others at all others."""
    pulled = (others - model[:, -1:] + base[:, -1:]).exp()  # in logs: q_others may be as good as 0
    return others.exp_().sub_(pulled).scatter_(-1, tokens, (model.exp() - base.exp())[:, :-1])
