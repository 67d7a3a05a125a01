"""Predicted rises of the loss against measured ones: KL(original || with one linear rounded)."""

from __future__ import annotations

import copy
import math
import statistics

import pytest
import torch
from torch import nn
from transformers import LlamaForSequenceClassification

from adaptq_peft.quantization import quantize_linear
from adaptq_peft.quantization.precision_plan import PRECISIONS
from adaptq_peft.quantization.sensitivity import measure_sensitivity
from adaptq_peft.selection import find_blocks


def candidates_of(model, forms=("nf4", "int8")):
    linears = {name: module for name, module in model.named_modules() if name.endswith(("_proj", "c_fc", "c_attn"))}
    return {
        name: {form: quantize_linear(module, PRECISIONS[form]) for form in forms} for name, module in linears.items()
    }


def sequences(count, length=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 96, (1, length), generator=generator)} for _ in range(count)]


def measured_rise(model, layers, batches):
    """Mean KL in nats a token with these layers in place."""
    model.eval()
    ids = torch.cat([batch["input_ids"] for batch in batches])
    with torch.no_grad():
        before = model(input_ids=ids).logits.double().log_softmax(-1)
        originals = {name: model.get_submodule(name) for name in layers}
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        after = model(input_ids=ids).logits.double().log_softmax(-1)
        for name, original in originals.items():
            model.set_submodule(name, original)
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.fixture(params=["llama", "gpt2"])
def sharp(request, make_model):
    """A model whose predictions are not all alike, as those of a random one are."""
    model = make_model(request.param, num_layers=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(3.0 if "layers" in name or ".h." in name else 6.0)
    return model


def test_a_score_has_no_predictions(make_model):
    model = LlamaForSequenceClassification(make_model(num_labels=1, pad_token_id=0).config)
    message = "LlamaForSequenceClassification gives one logit, a score, so there are no predictions"
    with pytest.raises(ValueError, match=message):
        measure_sensitivity(model, candidates_of(model, forms=("nf4",)), sequences(1))


def test_predictions_are_near_what_is_measured_for_each_linear_and_for_all(sharp):
    candidates, others = candidates_of(sharp, forms=("nf4",)), sequences(40, seed=1)
    predicted = measure_sensitivity(sharp, candidates, sequences(120))
    predicted = {name: rises["nf4"] for name, rises in predicted.items()}
    measured = {name: measured_rise(sharp, {name: layers["nf4"]}, others) for name, layers in candidates.items()}
    ratios = [math.log(predicted[name] / measured[name]) for name in predicted]
    assert abs(statistics.mean(ratios)) < 0.15
    assert statistics.stdev(ratios) < 0.25  # sqrt(2 / 120) = 0.13 is expected
    logs = ([math.log(value) for value in values.values()] for values in (predicted, measured))
    assert statistics.correlation(*logs) > 0.9
    together = measured_rise(sharp, {name: layers["nf4"] for name, layers in candidates.items()}, others)
    assert sum(predicted.values()) == pytest.approx(together, rel=0.15)


def test_eight_bits_cost_far_less_than_four(model):
    predicted = measure_sensitivity(model, candidates_of(model), sequences(20))
    assert all(0 < rises["int8"] < rises["nf4"] for rises in predicted.values())
    assert sum(r["int8"] for r in predicted.values()) < 0.1 * sum(r["nf4"] for r in predicted.values())


def test_the_training_mode_of_the_model_and_the_candidates_does_not_matter(make_model):
    model = make_model("gpt2", resid_pdrop=0.5).eval()
    evaluated = measure_sensitivity(model, candidates_of(model), sequences(2))
    model.train()
    assert measure_sensitivity(model, candidates_of(model), sequences(2)) == evaluated


def test_a_copy_of_the_linear_costs_nothing(llama):
    linears = {name: copy.deepcopy(module) for name, module in llama.named_modules() if name.endswith("_proj")}
    predicted = measure_sensitivity(llama, {name: {"same": linear} for name, linear in linears.items()}, sequences(2))
    assert all(rises == {"same": 0.0} for rises in predicted.values())


def test_padding_does_not_count(llama):
    candidates = candidates_of(llama)
    (short,) = sequences(1, length=8)
    ids = nn.functional.pad(short["input_ids"], (0, 6))
    padded = {"input_ids": ids, "attention_mask": (torch.arange(14) < 8).long()[None]}
    alone = {**short, "attention_mask": torch.ones_like(short["input_ids"])}
    first = measure_sensitivity(llama, candidates, [alone])
    second = measure_sensitivity(llama, candidates, [padded])
    for name in candidates:
        assert second[name]["nf4"] == pytest.approx(first[name]["nf4"], rel=1e-3)


def test_the_model_is_as_before_also_after_an_error(llama):
    llama.train()
    llama.model.embed_tokens.weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in llama.parameters()]
    candidates = candidates_of(llama)
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    measure_sensitivity(llama, candidates, sequences(2))
    with pytest.raises(ValueError, match="specify exactly one of"):
        measure_sensitivity(llama, candidates, [{"input_ids": None}])
    assert all(module.training for module in llama.modules())
    assert [parameter.requires_grad for parameter in llama.parameters()] == flags
    assert all(parameter.grad is None for parameter in llama.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())
    assert not any(module._forward_hooks for module in llama.modules())


def test_a_linear_that_does_not_run_has_none(llama):
    llama.unused = nn.Linear(64, 64)
    found = measure_sensitivity(llama, {"unused": {"nf4": nn.Linear(64, 64)}, **candidates_of(llama)}, sequences(1))
    assert found["unused"] == {"nf4": 0.0}


def test_what_can_not_be_measured(llama):
    candidates = candidates_of(llama)
    with pytest.raises(ValueError, match="sensitivities need calibration batches, and there are none"):
        measure_sensitivity(llama, candidates, [])
    bare = {name.removeprefix("model."): layers for name, layers in candidates.items()}
    with pytest.raises(ValueError, match="the output of LlamaModel has no logits, so there is no loss whose rise"):
        measure_sensitivity(llama.model, bare, sequences(1))
    find_blocks(llama)[2].module.mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the model's predictions on the calibration text are not finite"):
        measure_sensitivity(llama, candidates, sequences(1))
