from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from adaptq_peft import AdaptQConfig
from adaptq_peft.quantization import dequantize_linear, is_quantized
from adaptq_peft.selection import find_blocks


def wrap(model, blocks, **fields):
    return get_peft_model(
        model, AdaptQConfig(task_type="CAUSAL_LM", layers_to_transform=blocks, frozen_rank=0, **fields)
    ).train()


def run(model, batch):
    """One backward pass; returns for each block whether its output was differentiated, and the gradients."""
    recorded = {}
    handles = [
        block.module.register_forward_hook(
            lambda module, args, output, index=block.index: recorded.__setitem__(
                index, (output if torch.is_tensor(output) else output[0]).requires_grad
            )
        )
        for block in find_blocks(model)
    ]
    model.zero_grad()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    for handle in handles:
        handle.remove()
    return [recorded[i] for i in sorted(recorded)], {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None
    }


SITUATIONS = {
    "plain": lambda model: None,
    "input grads": lambda model: model.enable_input_require_grads(),
    "input grads on the base": lambda model: model.get_base_model().enable_input_require_grads(),
    "non-reentrant checkpointing": lambda model: model.activation_checkpointing_enable({"use_reentrant": False}),
    "reentrant checkpointing": lambda model: model.activation_checkpointing_enable({"use_reentrant": True}),
    "older name": lambda model: model.gradient_checkpointing_enable({"use_reentrant": True}),
    "both": lambda model: (
        model.activation_checkpointing_enable({"use_reentrant": True}),
        model.enable_input_require_grads(),
    ),
}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("blocks", [[2, 3], [1], [0, 2]])
def test_nothing_below_the_lowest_adapted_block_is_differentiated(model, batch, situation, blocks):
    wrapped = wrap(model, blocks)
    _, expected = run(wrapped, batch)
    SITUATIONS[situation](wrapped)
    differentiated, gradients = run(wrapped, batch)
    assert differentiated == [index >= blocks[0] for index in range(4)]
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name])
    assert {name.split(".adaptq_delta")[0] for name in gradients}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_checkpointing_before_the_adapter_is_made(model, batch):
    """PEFT then calls enable_input_require_grads on the base model itself."""
    model.gradient_checkpointing_enable({"use_reentrant": True})
    wrapped = wrap(model, [2, 3])
    differentiated, gradients = run(wrapped, batch)
    assert differentiated == [False, False, True, True]
    assert len(gradients) == len([p for p in wrapped.parameters() if p.requires_grad])
    assert [block.module.gradient_checkpointing for block in find_blocks(model)] == [False, False, True, True]


def test_the_checkpoint_of_the_lowest_trained_block_is_given_an_input_that_requires_gradients(model, batch):
    """Before 5.23 transformers ran the hook that sees to it within the checkpoint, too late for a reentrant one."""
    wrapped = wrap(model, [2, 3])
    wrapped.activation_checkpointing_enable({"use_reentrant": True})
    for block in find_blocks(model):
        block.module._forward_pre_hooks.clear()
    differentiated, gradients = run(wrapped, batch)
    assert differentiated == [False, False, True, True]
    assert len(gradients) == len([p for p in wrapped.parameters() if p.requires_grad])


def test_blocks_below_are_not_checkpointed_and_those_above_are(model):
    wrapped = wrap(model, [2])
    wrapped.activation_checkpointing_enable()
    assert [block.module.gradient_checkpointing for block in find_blocks(model)] == [False, False, True, True]


def test_the_input_hook_follows_the_active_adapter_and_can_be_taken_off(llama, batch):
    wrapped = wrap(llama, [2], quantization="none")
    wrapped.add_adapter("low", AdaptQConfig(layers_to_transform=[1], quantization="none", frozen_rank=0))
    wrapped.enable_input_require_grads()
    assert run(wrapped, batch)[0] == [False, False, True, True]
    wrapped.set_adapter("low")
    assert run(wrapped, batch)[0] == [False, True, True, True]
    wrapped.disable_input_require_grads()
    assert not any(block.module._forward_pre_hooks for block in find_blocks(llama))


def test_checkpointing_follows_the_active_adapter(llama):
    def checkpointed():
        return [block.module.gradient_checkpointing for block in find_blocks(llama)]

    wrapped = wrap(llama, [3], quantization="none")
    wrapped.add_adapter("low", AdaptQConfig(layers_to_transform=[1], quantization="none", frozen_rank=0))
    wrapped.set_adapter("low")
    assert checkpointed() == [False] * 4
    wrapped.set_adapter("default")
    wrapped.activation_checkpointing_enable()
    assert checkpointed() == [False, False, False, True]
    wrapped.set_adapter("low")
    assert checkpointed() == [False, True, True, True]
    wrapped.delete_adapter("low")
    assert checkpointed() == [False, False, False, True]


def test_checkpointing_that_was_switched_off_stays_off(llama):
    wrapped = wrap(llama, [3], quantization="none")
    wrapped.add_adapter("low", AdaptQConfig(layers_to_transform=[1], quantization="none", frozen_rank=0))
    wrapped.activation_checkpointing_enable()
    llama.gradient_checkpointing_disable()
    wrapped.set_adapter("low")
    assert not any(block.module.gradient_checkpointing for block in find_blocks(llama))


def test_the_input_hook_stays_one_when_an_adapter_is_added(llama, batch):
    wrapped = wrap(llama, [2])
    wrapped.enable_input_require_grads()
    wrapped.add_adapter("second", AdaptQConfig(layers_to_transform=[2], frozen_rank=0))
    assert [len(block.module._forward_pre_hooks) for block in find_blocks(llama)] == [0, 0, 1, 0]
    wrapped.disable_input_require_grads()
    assert not any(block.module._forward_pre_hooks for block in find_blocks(llama))


def test_unloading_takes_the_hook_off(llama):
    wrapped = wrap(llama, [2], quantization="none")
    wrapped.activation_checkpointing_enable()
    wrapped.enable_input_require_grads()
    wrapped.unload()
    assert all(block.module.gradient_checkpointing for block in find_blocks(llama))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in llama.modules())
    functions = {block.module._gradient_checkpointing_func for block in find_blocks(llama)}
    assert len(functions) == 1  # transformers' own, on each block


def test_trainable_embeddings_still_get_their_gradient(llama, batch):
    wrapped = wrap(llama, [2], modules_to_save=["embed_tokens"])
    differentiated, gradients = run(wrapped, batch)
    assert differentiated == [True] * 4
    assert any("embed_tokens.modules_to_save" in name for name in gradients)
    wrapped.gradient_checkpointing_enable()
    assert [block.module.gradient_checkpointing for block in find_blocks(llama)] == [True] * 4


def test_blocks_above_trained_position_embeddings_are_checkpointed(gpt2):
    wrapped = wrap(gpt2, [3], modules_to_save=["wpe"])
    wrapped.activation_checkpointing_enable()
    assert all(block.module.gradient_checkpointing for block in find_blocks(gpt2))


class OtherName(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x)


def test_blocks_that_take_their_input_by_another_name():
    model = nn.Module()
    model.layers = nn.ModuleList([OtherName(), OtherName()])
    model.forward = lambda x: model.layers[1](x=model.layers[0](x=x))
    wrapped = get_peft_model(model, AdaptQConfig(layers_to_transform=[1], quantization="none", frozen_rank=0))
    wrapped.enable_input_require_grads()
    model.forward(torch.ones(2, 4)).sum().backward()


def test_a_model_without_blocks_uses_its_own_method():
    class WithMethod(nn.Sequential):
        called = False

        def enable_input_require_grads(self):
            self.called = True

    model = WithMethod(nn.Linear(4, 4))
    get_peft_model(model, AdaptQConfig(target_modules=["0"])).enable_input_require_grads()
    assert model.called


def dequantized_twin(wrapped):
    """The same model with plain linears that hold the dequantized weights in place of the 4-bit ones."""
    twin = copy.deepcopy(wrapped)
    for name, module in list(twin.named_modules()):
        if is_quantized(module):
            twin.set_submodule(name, dequantize_linear(module))
    return twin


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_through_4_bit_blocks_above_are_right_also_after_evaluation(model, batch, quantization, dtype):
    wrapped = wrap(model.to(dtype), [0, 1], quantization=quantization)
    assert is_quantized(next(m for m in find_blocks(model)[3].module.modules() if is_quantized(m)))
    _, expected = run(dequantized_twin(wrapped), batch)
    for evaluations in range(2):
        _, found = run(wrapped, batch)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            error = (gradient - expected[name]).norm() / expected[name].norm().clamp_min(1e-12)
            assert error < (5e-2 if dtype == torch.bfloat16 else 1e-4), (name, evaluations)
        wrapped.eval()
        with torch.no_grad():
            wrapped(**batch)
        wrapped.train()
