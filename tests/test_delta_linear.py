from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from adaptq_peft.delta_linear import delta_linear
from adaptq_peft.merged_weight import _scratch


def tensors(dtype=torch.float64, transposed=False, count=1, requires_grad=True):
    torch.manual_seed(0)
    shape = (4, 3) if transposed else (3, 4)
    x = torch.randn(2, 5, 4, dtype=dtype, requires_grad=requires_grad)
    weight = torch.randn(shape, dtype=dtype)
    bias = torch.randn(3, dtype=dtype, requires_grad=requires_grad)
    deltas = [torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for _ in range(count)]
    return x, weight, bias, deltas, [0.25, 2.0][:count]


def plain(x, weight, bias, deltas, scales, transposed):
    merged = weight + sum(scale * delta for scale, delta in zip(scales, deltas, strict=True))
    return F.linear(x, merged.t() if transposed else merged, bias)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_output_and_gradients_are_those_of_plain_autograd(transposed, count):
    x, weight, bias, deltas, scales = tensors(transposed=transposed, count=count)
    expected = plain(x, weight, bias, deltas, scales, transposed)
    found = delta_linear(x, weight, bias, deltas, scales, transposed=transposed)
    torch.testing.assert_close(found, expected)
    grads = [
        torch.autograd.grad((output**2).sum(), [x, bias, *deltas], retain_graph=True) for output in (found, expected)
    ]
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.bfloat16, 0.05)])
def test_gradients_of_each_sample_and_ensembles_by_torch_func(transposed, dtype, tolerance):
    x, weight, bias, (delta,), scales = tensors(transposed=transposed, requires_grad=False)

    def run(delta, x):
        return delta_linear(x.to(dtype), weight.to(dtype), bias.to(dtype), [delta], scales, transposed=transposed)

    def loss(delta, x):
        return run(delta, x).square().sum()

    expected = torch.stack([torch.func.grad(loss)(delta, row) for row in x])
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(delta, x)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    many = torch.stack([delta, 2 * delta])
    with torch.no_grad():
        found, expected = torch.func.vmap(run, (0, None))(many, x), torch.stack([run(d, x) for d in many])
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def nan_in_new_memory():
    torch.use_deterministic_algorithms(True)  # fills what is not initialized
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_each_sample_hold_nothing_that_lay_in_memory(transposed, nan_in_new_memory):
    x, weight, bias, (delta,), scales = tensors(transposed=transposed, requires_grad=False)

    def loss(delta, x):
        return delta_linear(x, weight, bias, [delta], scales, transposed=transposed).square().sum()

    assert torch.func.vmap(torch.func.grad(loss), (None, 0))(delta, x).isfinite().all()


@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck_in_float64(transposed):
    x, weight, bias, (delta,), scales = tensors(transposed=transposed)

    def function(x, bias, delta):
        return delta_linear(x, weight, bias, [delta], scales, transposed=transposed)

    assert torch.autograd.gradcheck(function, (x, bias, delta))
    assert torch.autograd.gradgradcheck(function, (x, bias, delta))


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_output_may_be_changed_in_place(with_bias):
    """As DeBERTa does with the output of its position projections."""
    x, weight, bias, deltas, scales = tensors()
    leaves = [x, bias, *deltas] if with_bias else [x, *deltas]
    gradients = []
    for linear in (delta_linear, plain):
        output = linear(x, weight, bias if with_bias else None, deltas, scales, transposed=False)
        output /= 3.0
        gradients.append(torch.autograd.grad((output**2).sum(), leaves))
    torch.testing.assert_close(*gradients)


def test_only_needed_gradients_are_computed():
    x, weight, _, (delta,), scales = tensors()
    delta_linear(x.detach(), weight, None, [delta], scales).sum().backward()
    assert delta.grad is not None
    assert x.grad is None
    frozen = delta_linear(x, weight, None, [delta.detach()], scales)
    frozen.sum().backward()
    assert x.grad is not None


def test_the_merged_weight_is_not_kept_for_backward():
    x, weight, bias, deltas, scales = tensors()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        delta_linear(x, weight, bias, deltas, scales)
    assert sorted(t.data_ptr() for t in saved) == sorted(t.data_ptr() for t in (x, weight, *deltas))


def test_gradients_come_in_the_dtype_of_the_delta():
    delta = torch.zeros(3, 4, requires_grad=True)
    x = torch.randn(2, 4).bfloat16()
    delta_linear(x, torch.randn(3, 4).bfloat16(), None, [delta], [1.0]).float().sum().backward()
    assert delta.grad.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_gpu(dtype):
    x, weight, bias, deltas, scales = tensors(requires_grad=False)
    on_gpu = [t.to("cuda", dtype) for t in (x, weight, bias)]
    found = delta_linear(*on_gpu, [deltas[0].to("cuda", dtype).requires_grad_()], scales)
    torch.testing.assert_close(
        found.double().cpu(), plain(x, weight, bias, deltas, scales, False), rtol=2e-2, atol=5e-2
    )
    found.float().sum().backward()


def test_layers_of_different_sizes_do_not_disturb_each_other():
    """On a CPU they share a buffer for the merged weight."""
    torch.manual_seed(0)
    sizes = [(6, 4), (3, 6), (8, 3)]
    weights = [torch.randn(size) for size in sizes]
    deltas = [torch.randn(size, requires_grad=True) for size in sizes]
    x = torch.randn(5, 4, requires_grad=True)
    outputs = []
    for linear in (lambda h, w, d: delta_linear(h, w, None, [d], [0.5]), lambda h, w, d: F.linear(h, w + 0.5 * d)):
        hidden = x
        for weight, delta in zip(weights, deltas, strict=True):
            hidden = linear(hidden, weight, delta).tanh()
        outputs.append((hidden, *torch.autograd.grad(hidden.sum(), [x, *deltas])))
    torch.testing.assert_close(outputs[0], outputs[1])


def test_a_first_call_in_inference_mode_does_not_break_training(monkeypatch):
    monkeypatch.setattr(_scratch, "_buffers", {})
    base, delta = torch.randn(3, 4), torch.randn(3, 4, requires_grad=True)
    with torch.inference_mode():
        delta_linear(torch.randn(2, 4), base, None, [delta], [1.0])
    delta_linear(torch.randn(2, 4), base, None, [delta], [1.0]).sum().backward()
    assert delta.grad is not None
