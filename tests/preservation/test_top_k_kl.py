"""The KL over k + 1 classes: its value and gradient against brute force."""

from __future__ import annotations

import pytest
import torch

from adaptq_peft.preservation import top_k_kl as module
from adaptq_peft.preservation.top_k_kl import LOG_ZERO, top_k_kl, top_k_log_probs

ROWS, VOCABULARY = 7, 20


@pytest.fixture
def base():
    return torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 3


@pytest.fixture
def model():
    return (torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 3).requires_grad_()


@pytest.fixture(params=[2, 256], ids=["in chunks", "at once"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(module, "LOSS_ROWS", request.param)


def full_kl(base, model):
    p, q = base.log_softmax(-1), model.log_softmax(-1)
    return (p.exp() * (p - q)).sum()


def kl_of_classes(base, model, k):
    """The definition, one position at a time, differentiated by autograd."""
    total = 0
    for p, q in zip(base.softmax(-1), model.softmax(-1), strict=True):
        chosen = p.argsort(descending=True)[:k]
        p = torch.cat([p[chosen], 1 - p[chosen].sum()[None]])
        q = torch.cat([q[chosen], 1 - q[chosen].sum()[None]])
        total = total + (p * (p / q).log()).sum()
    return total


def value_and_gradient(loss, model):
    return loss.detach(), torch.autograd.grad(loss, model)[0]


def test_the_base_in_classes(base, chunk):
    tokens, log_probs = top_k_log_probs(base, 3)
    p = base.softmax(-1)
    assert torch.equal(tokens, p.topk(3).indices)
    assert torch.allclose(log_probs[:, :3].exp(), p.topk(3).values)
    assert torch.allclose(log_probs.exp().sum(-1), torch.ones(ROWS))


@pytest.mark.parametrize("k", [1, 5, VOCABULARY - 1])
def test_value_and_gradient_are_those_of_the_definition(base, model, k, chunk):
    loss = top_k_kl(model, torch.arange(ROWS), *top_k_log_probs(base, k))
    found, expected = (value_and_gradient(each, model) for each in (loss, kl_of_classes(base, model, k)))
    assert found[0] == pytest.approx(expected[0].item(), rel=1e-5)
    assert torch.allclose(found[1], expected[1], atol=1e-5)


def test_all_tokens_give_the_full_kl(base, model, chunk):
    tokens, log_probs = top_k_log_probs(base, VOCABULARY)
    assert (log_probs[:, -1] == LOG_ZERO).all()
    found = value_and_gradient(top_k_kl(model, torch.arange(ROWS), tokens, log_probs), model)
    expected = value_and_gradient(full_kl(base, model), model)
    assert found[0] == pytest.approx(expected[0].item(), rel=1e-5)
    assert torch.allclose(found[1], expected[1], atol=1e-5)


def test_fewer_tokens_never_give_more(base, model):
    values = [top_k_kl(model, torch.arange(ROWS), *top_k_log_probs(base, k)).item() for k in range(1, VOCABULARY + 1)]
    assert values == sorted(values)
    assert values[0] > 0


def test_half_precision_storage_keeps_the_minimum_at_the_base(base):
    tokens, log_probs = top_k_log_probs(base, 5)
    leaf = base.clone().requires_grad_()
    value, gradient = value_and_gradient(top_k_kl(leaf, torch.arange(ROWS), tokens, log_probs.half().float()), leaf)
    assert 0 <= value.item() < 1e-5
    assert gradient.abs().max() < 2e-3


def test_only_the_given_rows_count(base, model):
    rows = torch.tensor([5, 1])
    tokens, log_probs = top_k_log_probs(base[rows], 4)
    value, gradient = value_and_gradient(top_k_kl(model, rows, tokens, log_probs), model)
    assert value.item() == pytest.approx(kl_of_classes(base[rows], model[rows], 4).item(), rel=1e-5)
    assert [row for row in range(ROWS) if gradient[row].any()] == [1, 5]


def test_certain_answers_are_cross_entropy(model):
    tokens = torch.arange(ROWS)[:, None]
    log_probs = torch.tensor([0.0, LOG_ZERO]).expand(ROWS, 2)
    found = value_and_gradient(top_k_kl(model, torch.arange(ROWS), tokens, log_probs), model)
    expected = value_and_gradient(torch.nn.functional.cross_entropy(model, tokens[:, 0], reduction="sum"), model)
    assert found[0] == pytest.approx(expected[0].item(), rel=1e-5)
    assert torch.allclose(found[1], expected[1], atol=1e-6)


def test_probabilities_near_zero_give_finite_gradients(base):
    far = (base * -40).requires_grad_()
    value, gradient = value_and_gradient(top_k_kl(far, torch.arange(ROWS), *top_k_log_probs(base, 2)), far)
    assert value.isfinite()
    assert gradient.isfinite().all()


def test_the_gradient_is_in_the_dtype_of_the_logits_and_scaled(base, model):
    low = model.detach().bfloat16().requires_grad_()
    loss = top_k_kl(low, torch.arange(ROWS), *top_k_log_probs(base, 5))
    (4 * loss).backward()
    exact = torch.autograd.grad(4 * kl_of_classes(base, model, 5), model)[0]
    assert (loss.dtype, low.grad.dtype) == (torch.float32, torch.bfloat16)
    assert torch.allclose(low.grad.float(), exact, atol=0.05)


def test_a_second_gradient_is_refused(base, model):
    loss = top_k_kl(model, torch.arange(ROWS), *top_k_log_probs(base, 5))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be taken once"):
        loss.backward()
