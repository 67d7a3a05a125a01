"""`torch.compile` of the training step: one graph, with the gradients of the eager step."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from adaptq_peft import AdaptQConfig


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def wrap(model, quantization):
    """Block 1 of 3 has deltas, and they are not zero: a frozen block is below and one above it."""
    config = AdaptQConfig(
        task_type="CAUSAL_LM", layers_to_transform=[1], quantization=quantization, init_weights=False
    )
    torch.manual_seed(0)
    return get_peft_model(model, config).train()


def loss_of(model):
    return lambda input_ids: model(input_ids=input_ids, labels=input_ids).loss


def gradients(model, step, input_ids):
    model.zero_grad()
    loss = step(input_ids)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in found.values())
    return loss.detach(), found


@pytest.mark.parametrize("quantization", ["none", "nf4"])
class TestTrainingStep:
    def test_no_graph_break(self, make_model, batch, quantization):
        explained = torch._dynamo.explain(loss_of(wrap(make_model(num_layers=3), quantization)))(batch["input_ids"])
        assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons

    def test_loss_and_gradients_are_those_of_the_eager_step(self, make_model, batch, quantization):
        model = wrap(make_model(num_layers=3), quantization)
        eager = gradients(model, loss_of(model), batch["input_ids"])
        compiled = torch.compile(loss_of(model), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(gradients(model, compiled, batch["input_ids"]), eager)


def test_the_delta_layer_of_conv1d_has_no_graph_break(make_model):
    """The layers alone: transformers' GPT-2 as a whole breaks the graph by itself, with a logger."""
    block = wrap(make_model("gpt2", num_layers=3), "none").base_model.model.transformer.h[1]
    compiled = torch.compile(block.mlp, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 64, requires_grad=True)
    outputs = [mlp(x) for mlp in (compiled, block.mlp)]
    leaves = [x, *(p for p in block.mlp.parameters() if p.requires_grad)]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad(output.pow(2).sum(), leaves) for output in outputs))
