from __future__ import annotations

import copy
import json

import pytest
import torch

from adaptq_peft.block_forms import quantize_blocks
from adaptq_peft.fingerprint import MAX_TENSORS, check_base, fingerprint_base, spread
from adaptq_peft.quantization import resolve_quantization
from adaptq_peft.quantization.origin import sampled_values
from adaptq_peft.selection import find_blocks


def fingerprint(model, adapted=(2, 3)):
    return fingerprint_base(model, find_blocks(model), adapted)


def test_it_is_json_and_small(llama):
    found = fingerprint(llama)
    assert json.loads(json.dumps(found)) == found
    assert len(json.dumps(found)) < 10_000
    assert (found["model_type"], found["num_blocks"], found["dtype"]) == ("llama", 4, "float32")


def test_the_same_weights_pass_whether_quantized_or_not(model):
    before = fingerprint(model)
    check_base(before, fingerprint(copy.deepcopy(model)))
    blocks = find_blocks(model)
    quantize_blocks(model, blocks[:2], resolve_quantization("nf4"))
    check_base(before, fingerprint(model))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_same_weights_in_another_dtype_pass(llama, dtype):
    before = fingerprint(llama)
    llama.to(getattr(torch, dtype))
    check_base(before, fingerprint(llama))


def test_another_base_in_another_dtype_is_another_base(make_model):
    with pytest.raises(ValueError, match="sampled tensors differ"):
        check_base(fingerprint(make_model(seed=0)), fingerprint(make_model(seed=1).bfloat16()))


def test_equal_shapes_with_other_values_are_another_base(make_model):
    message = (
        r"made for the base model without a name \(llama\), and the model here is 'other/model' \(llama\): \d+ of \d+ "
        r"sampled tensors differ, the first is model\.layers\.2\.self_attn\.q_proj\.weight\. Load the base"
    )
    other = make_model(seed=1)
    other.name_or_path = "other/model"
    with pytest.raises(ValueError, match=message):
        check_base(fingerprint(make_model(seed=0)), fingerprint(other))


def test_a_slightly_trained_base_is_another_base(llama):
    before = fingerprint(llama)
    llama.model.layers[2].mlp.up_proj.weight.data += 1e-4
    with pytest.raises(
        ValueError, match=r"1 of \d+ sampled tensors differ, the first is model\.layers\.2\.mlp\.up_proj"
    ):
        check_base(before, fingerprint(llama))


def test_another_kind_or_depth_of_model(make_model):
    llama = fingerprint(make_model("llama"))
    with pytest.raises(ValueError, match="model_type is 'gpt2' instead of 'llama'"):
        check_base(llama, fingerprint(make_model("gpt2")))
    with pytest.raises(ValueError, match="num_blocks is 5 instead of 4"):
        check_base(llama, fingerprint(make_model("llama", num_layers=5)))
    with pytest.raises(
        ValueError, match=r"parameters have other names, for instance model.layers.2.mlp.down_proj.bias"
    ):
        check_base(llama, fingerprint(make_model("llama", mlp_bias=True)))


def test_what_is_random_in_each_process_does_not_count(make_model):
    """A new head, a pooler and rows for new tokens are initialised at random each time a base is loaded."""
    model = make_model()
    before = fingerprint(model)
    model.lm_head.weight.data.normal_()
    model.resize_token_embeddings(120)
    check_base(before, fingerprint(model))


def test_what_is_sampled_is_part_of_the_file_format():
    """From other tensors, or other places in them, the base of each saved adapter would look like another one."""
    assert spread([str(i) for i in range(2 * MAX_TENSORS)]) == [str(2 * i) for i in range(MAX_TENSORS)]
    assert spread(["a", "b"]) == ["a", "b"]
    assert sampled_values(torch.arange(64).view(8, 8), 4) == [8.0, 24.0, 40.0, 56.0]
    assert sampled_values(torch.arange(3), 4) == [0.0, 1.0, 2.0]
