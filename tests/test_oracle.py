"""Training with deltas against other ways to train the same weights."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig

from adaptq_peft import AdaptQConfig
from adaptq_peft.quantization import is_quantized
from adaptq_peft.selection import find_blocks

STEPS = 20
BLOCKS = [1, 3]


def batches(vocabulary=96):
    """Sequences that count upwards from a random start: something that a tiny model learns in 20 steps."""
    generator = torch.Generator().manual_seed(11)
    starts = [torch.randint(3, vocabulary // 2, (8, 1), generator=generator) for _ in range(STEPS)]
    return [start + torch.arange(16) for start in starts]


def loss_curve(model, lr, optimizer=torch.optim.SGD):
    model.train()
    optim = optimizer([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for input_ids in batches():
        loss = model(input_ids=input_ids, labels=input_ids).loss
        optim.zero_grad()
        loss.backward()
        optim.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def wrap(model, **fields):
    return get_peft_model(
        model, AdaptQConfig(task_type="CAUSAL_LM", layers_to_transform=BLOCKS, frozen_rank=0, **fields)
    )


@pytest.mark.parametrize(("optimizer", "lr"), [(torch.optim.SGD, 0.5), (torch.optim.Adam, 1e-3)])
def test_without_quantization_it_is_unfreezing_the_same_blocks(model, optimizer, lr):
    unfrozen = copy.deepcopy(model).requires_grad_(False)
    for block in find_blocks(unfrozen):
        block.module.requires_grad_(block.index in BLOCKS)
    expected = loss_curve(unfrozen, lr, optimizer)
    found = loss_curve(wrap(model, quantization="none", delta_scaling=1.0), lr, optimizer)
    assert expected[-1] < expected[0] - 0.05
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_with_quantization_it_is_a_skip_list_base_with_modules_to_save(llama, tmp_path):
    """Plain PEFT can train whole blocks above a 4-bit base; the loss curves are the same."""
    llama.save_pretrained(tmp_path)
    skip_list = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=[f"model.layers.{i}" for i in BLOCKS] + ["lm_head"],
    )
    split = type(llama).from_pretrained(tmp_path, quantization_config=skip_list, dtype=torch.float32, device_map="cpu")
    for module in split.modules():  # bitsandbytes 0.50.2 loses gradients on some CPUs without this
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    assert [is_quantized(layer.mlp.up_proj) for layer in split.model.layers] == [True, False, True, False]
    trick = LoraConfig(
        r=1, target_modules=["model.layers.0.self_attn.q_proj"], modules_to_save=[f"layers.{i}" for i in BLOCKS]
    )
    saved = get_peft_model(split, trick)
    for name, parameter in saved.named_parameters():
        parameter.requires_grad_("modules_to_save" in name)  # not the LoRA target that the trick needs
    expected = loss_curve(saved, lr=0.5)
    found = loss_curve(wrap(llama, quantization="nf4", delta_scaling=1.0), lr=0.5)
    assert expected[-1] < expected[0] - 0.05
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_scaling_multiplies_the_step_of_adam(model):
    """W = W0 + s * delta moves by rate x s: rate 4e-3 with s = 1/4 is rate 1e-3 with s = 1."""
    expected = loss_curve(wrap(copy.deepcopy(model), quantization="none", delta_scaling=1.0), 1e-3, torch.optim.Adam)
    found = loss_curve(wrap(model, quantization="none", delta_scaling=0.25), 4e-3, torch.optim.Adam)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
