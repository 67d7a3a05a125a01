from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from support import logits, tiny_qwen_moe, tiny_t5
from torch import nn

from adaptq_peft import AdaptQConfig
from adaptq_peft.layer import AdaptQLayer


@pytest.fixture
def two_adapters(model):
    """Two random adapters on the same blocks of a quantized model."""

    def config():
        return AdaptQConfig(task_type="CAUSAL_LM", layers_to_transform=[1, 3], init_weights=False)

    torch.manual_seed(0)
    wrapped = get_peft_model(model, config())
    wrapped.add_adapter("second", config())
    return wrapped.eval()


def test_each_sample_gets_the_output_of_its_adapter(two_adapters, batch):
    names = ["default", "__base__", "second", "default"]
    with torch.no_grad():
        outputs = {}
        for name in ("default", "second"):
            two_adapters.set_adapter(name)
            outputs[name] = two_adapters(**batch).logits
        with two_adapters.disable_adapter():
            outputs["__base__"] = two_adapters(**batch).logits
        found = two_adapters(**batch, adapter_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(found[row], outputs[name][row], rtol=1e-4, atol=1e-5)
    hooks = [m for m in two_adapters.modules() if isinstance(m, AdaptQLayer) and m._forward_pre_hooks]
    assert hooks == []


@pytest.mark.parametrize("names", [["default"], ["default", "__base__"], ["default"] * 8])
def test_each_sample_needs_a_name(two_adapters, batch, names):
    message = f"should be the same as the number of inputs, but got {len(names)} and 4 respectively"
    with pytest.raises(ValueError, match=message):
        two_adapters(**batch, adapter_names=names)


def test_modules_that_are_saved_whole_are_one_for_each_sample_too(llama, batch):
    def config():
        return AdaptQConfig(task_type="CAUSAL_LM", layers_to_transform=[3], modules_to_save=["lm_head"])

    wrapped, outputs = get_peft_model(llama, config()), {}
    wrapped.add_adapter("second", config())
    for name, factor in (("default", 2), ("second", 3)):
        wrapped.lm_head.modules_to_save[name].weight.data.mul_(factor)
        wrapped.set_adapter(name)
        outputs[name] = logits(wrapped, batch)
    names = ["second", "default", "second", "default"]
    with torch.no_grad():
        found = wrapped(**batch, adapter_names=names).logits
    torch.testing.assert_close(found, torch.stack([outputs[name][row] for row, name in enumerate(names)]))


def test_routers_of_experts_and_their_experts():
    model = get_peft_model(tiny_qwen_moe(), AdaptQConfig(layers_to_transform=[1, 2], init_weights=False)).eval()
    ids = torch.randint(3, 96, (3, 6))
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        found = model(input_ids=ids, adapter_names=["default", "__base__", "default"]).logits
    torch.testing.assert_close(found, torch.stack([adapted[0], base[1], adapted[2]]), rtol=1e-4, atol=1e-5)


def test_embeddings_of_relative_positions_are_one_for_all_samples():
    model = get_peft_model(tiny_t5(), AdaptQConfig(layers_to_transform=[0, 3], init_weights=False)).eval()
    ids = torch.randint(3, 96, (2, 4))
    with pytest.raises(
        ValueError, match=r"on encoder\.block\.0\..*bias, an Embedding in a block, .*one for all samples"
    ):
        model(input_ids=ids, decoder_input_ids=ids, adapter_names=["default", "__base__"])


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.projection = nn.Linear(4, 4)

    def forward(self, x):
        return x @ self.projection.weight


def test_a_weight_that_is_read_cannot_be_one_for_each_sample():
    model = nn.Sequential(Reader()).eval()
    wrapped = get_peft_model(model, AdaptQConfig(target_modules=["projection"], init_weights=False)).eval()
    x = torch.randn(2, 4)
    expected = wrapped(x)
    with pytest.raises(ValueError, match=r"around a Linear reads its weight, which is one for all samples"):
        wrapped(x, adapter_names=["default", "__base__"])
    assert torch.equal(wrapped(x), expected)
    assert not torch.equal(wrapped(x), x @ model[0].projection.base_layer.weight)


def test_errors(two_adapters, batch):
    with pytest.raises(ValueError, match=r"Trying to infer with non-existing adapter\(s\): third"):
        two_adapters(**batch, adapter_names=["default", "third", "second", "second"])
    with pytest.raises(TypeError, match="Got adapter names of type <class 'str'>, expected a list of str"):
        two_adapters(**batch, adapter_names="default")
    with pytest.raises(ValueError, match="when the model is in training mode"):
        two_adapters.train()(**batch, adapter_names=["default"] * 4)
