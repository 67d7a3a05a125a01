from __future__ import annotations

import copy

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from support import tiny_t5
from torch import nn

from adaptq_peft.quantization import quantize_linear
from adaptq_peft.quantization.calibrated import (
    CALIBRATION_METHODS,
    CalibrationMethod,
    calibrate,
    quantize_calibrated,
    resolve_calibration_method,
)
from adaptq_peft.quantization.calibrated.absmax_search import search_absmax
from adaptq_peft.quantization.calibrated.block_stream import BlockStream, linears_by_input
from adaptq_peft.quantization.calibrated.calibrate import input_moments, quantize_weight
from adaptq_peft.quantization.calibrated.rounding import DampedMoment
from adaptq_peft.quantization.settings import QuantizationSettings
from adaptq_peft.selection import find_blocks
from adaptq_peft.selection.calibration import calibration_batches

NF4 = QuantizationSettings(bits=4)
LINEARS = ("Linear", "Conv1D")


def linears_of(blocks):
    return {
        f"{block.name}.{name}": module
        for block in blocks
        for name, module in block.module.named_modules()
        if type(module).__name__ in LINEARS
    }


def batches_for(model, samples, **changes):
    return calibration_batches(model, samples, **{"samples": 60, "max_length": 32, "batch_size": 16, **changes})


def put_in(model, layers):
    changed = copy.deepcopy(model)
    for name, layer in layers.items():
        changed.set_submodule(name, copy.deepcopy(layer))
    return changed.eval()


@torch.no_grad()
def distance(model, other, batches):
    """Mean squared difference of the outputs on real tokens."""
    total = count = 0
    for batch in batches:
        mask = batch["attention_mask"].bool()
        difference = (model(**batch).logits - other(**batch).logits)[mask]
        total, count = total + float(difference.square().sum()), count + difference.numel()
    return total / count


def wide(make_model, kind):
    """Weights large enough that rounding them matters, inputs correlated enough that the choice does."""
    model = make_model(kind, num_layers=4).eval()
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = torch.randn_like(parameter) * 0.08
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("frozen", [[0, 1], [2, 3], [0, 2]])
def test_each_method_is_closer_to_the_original_than_plain_rounding(make_model, samples, kind, frozen):
    model = wide(make_model, kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    blocks, batches = find_blocks(model), batches_for(model, samples)
    chosen = linears_of([blocks[index] for index in frozen])
    plain = put_in(model, {name: quantize_linear(linear, NF4) for name, linear in chosen.items()})
    limit = distance(model, plain, batches)
    for name, method in CALIBRATION_METHODS.items():
        result = quantize_calibrated(model, blocks, chosen, NF4, batches, method)
        assert set(result.layers) == set(chosen)
        assert not result.plain
        assert all(0 < error < 0.02 for error in result.error.values())
        assert distance(model, put_in(model, result.layers), batches) < {"absmax": 0.92}.get(name, 0.85) * limit, name
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_layers_see_the_inputs_that_the_quantized_ones_before_give(make_model, samples):
    """The second moment of the last layer equals that of the finished model, to the precision of its kernels."""
    model = wide(make_model, "llama")
    blocks, batches = find_blocks(model), batches_for(model, samples)
    chosen = linears_of(blocks[1:3])
    result = quantize_calibrated(model, blocks, chosen, NF4, batches, CALIBRATION_METHODS["gptq"])
    finished = put_in(model, result.layers)
    stream = BlockStream.open(finished, find_blocks(finished)[1:3], batches)
    with torch.no_grad():
        stream.advance(find_blocks(finished)[1])
        block = find_blocks(finished)[2]
        inputs = torch.cat(list(stream.inputs_of(block, block.module, block.module.mlp.down_proj)))
    moment = inputs.t() @ inputs / len(inputs)
    name = f"{block.name}.mlp.down_proj"
    weight, layer = chosen[name].weight.data, result.layers[name]
    error = weight - dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    expected = ((error @ moment) * error).sum() / ((weight @ moment) * weight).sum()
    assert result.error[name] == pytest.approx(float(expected), rel=1e-3)


def test_asymmetric_rounding_makes_up_for_what_was_rounded_before(make_model, samples):
    model = wide(make_model, "llama")
    blocks, batches = find_blocks(model), batches_for(model, samples)
    chosen = linears_of(blocks[:3])
    distances = {}
    for name in ("descent", "asymmetric"):
        result = quantize_calibrated(model, blocks, chosen, NF4, batches, CALIBRATION_METHODS[name])
        distances[name] = distance(model, put_in(model, result.layers), batches)
    assert distances["asymmetric"] < 0.9 * distances["descent"]


def test_layers_before_which_nothing_is_rounded_are_not_asymmetric(make_model, samples):
    model = wide(make_model, "llama")
    blocks, batches = find_blocks(model), batches_for(model, samples)
    chosen = {f"{blocks[1].name}.self_attn.q_proj": blocks[1].module.self_attn.q_proj}
    codes = [
        next(iter(quantize_calibrated(model, blocks, chosen, NF4, batches, CALIBRATION_METHODS[name]).layers.values()))
        for name in ("descent", "asymmetric")
    ]
    assert torch.equal(codes[0].weight.data, codes[1].weight.data)


def test_block_1_is_calibrated_without_block_10(make_model, samples):
    model = make_model(num_layers=12).eval()
    blocks, batches = find_blocks(model), batches_for(model, samples[:8])
    chosen = {f"{blocks[index].name}.mlp.up_proj": blocks[index].module.mlp.up_proj for index in (1, 10)}
    result = quantize_calibrated(model, blocks, chosen, NF4, batches, CALIBRATION_METHODS["absmax"])
    assert result.layers.keys() == chosen.keys()


def test_error_feedback_weighs_columns_by_what_no_other_can_make_up_for(monkeypatch):
    weights = []

    def note(weight, importance, grid):
        weights.append(importance)
        return search_absmax(weight, importance, grid)

    monkeypatch.setattr(calibrate, "search_absmax", note)
    x = torch.randn(100, 64) @ torch.randn(64, 64)
    moment = DampedMoment(x.t() @ x / 100, 0.1)
    for name in ("absmax", "descent"):
        quantize_weight(torch.randn(4, 64), moment, NF4, CALIBRATION_METHODS[name], torch.float32)
    assert torch.equal(weights[0], moment.matrix.diagonal())
    assert torch.equal(weights[1], moment.uncorrectable)


class TestInputMoments:
    def rows(self, *counts):
        generator = torch.Generator().manual_seed(1)
        return [torch.randn(count, 8, generator=generator) for count in counts]

    def test_means_over_all_tokens(self):
        inputs = self.rows(5, 3)
        originals = [batch.square() for batch in inputs]
        moment, cross = input_moments(iter(inputs), iter(originals), [5, 3])
        x, y = torch.cat(inputs), torch.cat(originals)
        torch.testing.assert_close(moment, x.t() @ x / 8)
        torch.testing.assert_close(cross, y.t() @ x / 8)

    def test_without_originals_there_is_one(self):
        assert input_moments(self.rows(5, 3), None, [5, 3])[1] is None

    @pytest.mark.parametrize(("counts", "others"), [((5, 2), (5, 2)), ((5, 3), (5, 2)), ((5, 0), (5, 3))])
    def test_tokens_that_are_routed_are_not_paired(self, counts, others):
        inputs = self.rows(*counts)
        moment, cross = input_moments(inputs, self.rows(*others), [5, 3])
        x = torch.cat(inputs)
        torch.testing.assert_close(moment, x.t() @ x / len(x))
        assert cross is None


def test_padding_is_no_evidence(make_model, samples):
    model = wide(make_model, "llama")
    blocks, chosen = find_blocks(model), linears_of(find_blocks(model)[:1])
    one_by_one = batches_for(model, samples, batch_size=1)
    padded = batches_for(model, samples)
    junk = [
        {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 50)} for batch in padded
    ]
    assert any((batch["attention_mask"] == 0).any() for batch in padded)
    method = CALIBRATION_METHODS["absmax"]
    results = [quantize_calibrated(model, blocks, chosen, NF4, batches, method) for batches in (one_by_one, junk)]
    for name in chosen:
        assert results[0].error[name] == pytest.approx(results[1].error[name], rel=1e-4)


def test_a_decoder_has_padding_of_its_own():
    torch.manual_seed(3)
    model = tiny_t5().eval()
    pairs = [
        {
            "input_ids": torch.randint(2, 90, (3 + i % 4,)).tolist(),
            "labels": torch.randint(2, 90, (9 - i % 5,)).tolist(),
        }
        for i in range(40)
    ]
    blocks = find_blocks(model)
    chosen = linears_of(blocks)
    one_by_one, padded = batches_for(model, pairs, batch_size=1), batches_for(model, pairs)
    assert any((batch["decoder_attention_mask"] == 0).any() for batch in padded)
    results = [
        quantize_calibrated(model, blocks, chosen, NF4, b, CALIBRATION_METHODS["absmax"]) for b in (one_by_one, padded)
    ]
    for name in chosen:
        assert results[0].error[name] == pytest.approx(results[1].error[name], rel=1e-4)


def test_tokens_of_a_decoder_are_paired_with_those_of_the_original():
    model = tiny_t5().eval()
    pairs = [{"input_ids": [5, 6, 7], "labels": [8, 9]}, {"input_ids": [5], "labels": [8, 9, 10, 11]}]
    decoder = [block for block in find_blocks(model) if block.in_decoder]
    stream = BlockStream.open(model, decoder, batches_for(model, pairs))
    (inputs,) = stream.inputs_of(decoder[0], decoder[0].module, decoder[0].module.layer[0].SelfAttention.q)
    assert stream.token_counts() == [len(inputs)] == [6]


def test_shapes_that_cross_rows_are_named_and_left(make_model, samples):
    model = make_model("llama", intermediate_size=96).eval()
    blocks = find_blocks(model)
    chosen = linears_of(blocks[:2])
    result = quantize_calibrated(model, blocks, chosen, NF4, batches_for(model, samples), CalibrationMethod())
    down = {name for name in chosen if name.endswith("down_proj")}
    assert result.plain == dict.fromkeys(down, "in_features 96 is no multiple of 64: groups cross rows")
    assert set(result.layers) == set(chosen) - down


def test_layers_that_do_not_run_are_named(make_model, samples):
    model = make_model("llama").eval()
    blocks = find_blocks(model)
    blocks[0].module.spare = nn.Linear(64, 64)
    result = quantize_calibrated(
        model, blocks, linears_of(blocks[:1]), NF4, batches_for(model, samples), CalibrationMethod()
    )
    assert result.plain == {f"{blocks[0].name}.spare": "it did not run on the calibration text"}


def test_bfloat16_and_training_mode_stay(make_model, samples):
    model = make_model("llama").to(torch.bfloat16).train()
    blocks = find_blocks(model)
    chosen = linears_of(blocks[:1])
    result = quantize_calibrated(model, blocks, chosen, NF4, batches_for(model, samples), CalibrationMethod())
    assert all(module.training for module in model.modules())
    assert all(layer.training for layer in result.layers.values())
    assert {layer.weight.quant_state.dtype for layer in result.layers.values()} == {torch.bfloat16}


def test_dropout_is_off(make_model, samples):
    model = make_model("gpt2", num_layers=2, resid_pdrop=0.5)
    blocks, batches = find_blocks(model), batches_for(model, samples)
    method, chosen = CALIBRATION_METHODS["absmax"], linears_of(blocks)
    errors = [
        quantize_calibrated(model.train(mode), blocks, chosen, NF4, batches, method).error for mode in (True, False)
    ]
    assert errors[0] == errors[1]


def test_the_same_input_is_found(make_model, samples):
    model = make_model("llama").eval()
    block = find_blocks(model)[0]
    stream = BlockStream.open(model, [block], batches_for(model, samples))
    names = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", *(f"self_attn.{x}_proj" for x in "oqkv")]
    groups = linears_by_input(stream, block, block.module, names)
    assert [sorted(group) for group in groups] == [
        ["self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]


def test_bad_input_is_named(make_model, samples):
    model = make_model("llama").eval()
    blocks, batches = find_blocks(model), batches_for(model, samples)
    chosen = linears_of(blocks[:1])
    with pytest.raises(ValueError, match="writes 4-bit layers of bitsandbytes, and the settings ask for int8"):
        quantize_calibrated(model, blocks, chosen, QuantizationSettings(bits=8), batches, CalibrationMethod())
    with pytest.raises(ValueError, match="needs calibration batches, and there are none"):
        quantize_calibrated(model, blocks, chosen, NF4, [], CalibrationMethod())
    with pytest.raises(ValueError, match=r"quantization_calibration is 'awq'; allowed: None .* or one of \['absmax'"):
        resolve_calibration_method("awq")


def test_auto_is_the_best_method():
    assert resolve_calibration_method("auto") is CALIBRATION_METHODS["asymmetric"]
    assert resolve_calibration_method("gptq") is CALIBRATION_METHODS["gptq"]
