from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from support import logits, randomize

from adaptq_peft import AdaptQConfig
from adaptq_peft.layer import AdaptQLayer
from adaptq_peft.quantization import is_quantized


def config(**fields):
    return AdaptQConfig(task_type="CAUSAL_LM", layers_to_transform=[3], **{"frozen_rank": 0, **fields})


def is_plain(model):
    return not any(is_quantized(module) or isinstance(module, AdaptQLayer) for module in model.modules())


def test_unload_gives_back_originals_that_were_kept(model, batch, recwarn):
    expected = logits(model, batch)
    wrapped = get_peft_model(model, config(original_weights="keep"))
    randomize(wrapped)
    recwarn.clear()
    unloaded = wrapped.unload()
    assert is_plain(unloaded)
    assert torch.equal(logits(unloaded, batch), expected)
    assert not recwarn.list


def test_unload_takes_off_what_is_merged(model, batch):
    expected = logits(model, batch)
    wrapped = get_peft_model(model, config(original_weights="keep", frozen_rank=2, init_weights=False))
    wrapped.merge_adapter()
    assert not torch.allclose(logits(wrapped, batch), expected)
    assert torch.equal(logits(wrapped.unload(), batch), expected)


@pytest.mark.parametrize("kept", ["keep", "checkpoint"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_what_is_unloaded_follows_the_dtype_that_the_model_was_cast_to(model, batch, tmp_path, quantization, kept):
    model.save_pretrained(tmp_path)

    def adapted():
        base = type(model).from_pretrained(tmp_path)
        wrapped = get_peft_model(base, config(quantization=quantization, original_weights=kept, frozen_rank=2))
        randomize(wrapped)
        return wrapped.to(torch.bfloat16)

    expected = logits(adapted(), batch)
    for form in (None, "original"):
        merged = adapted().merge_and_unload(frozen=form)
        assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
        torch.testing.assert_close(logits(merged, batch), expected, rtol=0, atol=0.3)
    cast = type(model).from_pretrained(tmp_path).to(torch.bfloat16)
    assert torch.equal(logits(adapted().unload(), batch), logits(cast, batch))
    merged = adapted()
    merged.merge_adapter()
    torch.testing.assert_close(logits(merged, batch), expected, rtol=0, atol=0.1)


def test_unload_reads_originals_from_the_checkpoint(model, batch, tmp_path, recwarn):
    model.save_pretrained(tmp_path)
    base = type(model).from_pretrained(tmp_path)
    wrapped = get_peft_model(base, config())
    recwarn.clear()
    assert torch.equal(logits(wrapped.unload(), batch), logits(model, batch))
    assert not recwarn.list


def test_unload_says_when_originals_are_gone(model, batch):
    wrapped = get_peft_model(model, config())
    start = logits(wrapped, batch)
    randomize(wrapped)
    with pytest.warns(UserWarning, match=r"original weights of \d+ quantized linears can't be had, so the unloaded"):
        unloaded = wrapped.unload()
    assert is_plain(unloaded)
    torch.testing.assert_close(logits(unloaded, batch), start, rtol=1e-4, atol=1e-5)


def test_merging_with_the_original_frozen_blocks(model, batch):
    plain = copy.deepcopy(model)
    wrapped = get_peft_model(model, config(original_weights="keep"))
    unquantized = get_peft_model(plain, config(quantization="none"))
    for found in (wrapped, unquantized):
        randomize(found)
    merged = wrapped.merge_and_unload(frozen="original")
    assert is_plain(merged)
    torch.testing.assert_close(logits(merged, batch), logits(unquantized, batch), rtol=1e-4, atol=1e-5)


def test_corrections_that_are_not_finite_are_an_error_where_merging_is_to_be_safe(llama):
    wrapped = get_peft_model(llama, config(frozen_rank=2))
    layer = next(m for m in wrapped.modules() if isinstance(m, AdaptQLayer) and m.is_corrected_by("default"))
    layer.adaptq_low_rank_B["default"].weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        wrapped.merge_and_unload(safe_merge=True)


def test_originals_that_are_gone_are_an_error_before_anything_changes(llama, batch):
    wrapped = get_peft_model(llama, config())
    randomize(wrapped)
    expected = logits(wrapped, batch)
    with pytest.raises(ValueError, match="it was built in memory"):
        wrapped.merge_and_unload(frozen="original")
    assert torch.equal(logits(wrapped, batch), expected)


def test_frozen_blocks_can_stay_quantized(llama, batch):
    wrapped = get_peft_model(llama, config())
    randomize(wrapped)
    expected = logits(wrapped, batch)
    merged = wrapped.merge_and_unload(frozen="quantized")
    assert sum(is_quantized(module) for module in merged.modules()) == 21
    torch.testing.assert_close(logits(merged, batch), expected, rtol=1e-4, atol=1e-5)


def test_an_unknown_form(llama):
    with pytest.raises(ValueError, match=r"frozen is 'plain'; allowed: None or one of \['dequantized', 'original',"):
        get_peft_model(llama, config()).merge_and_unload(frozen="plain")


def test_a_delta_on_a_weight_that_other_blocks_have_is_not_merged(llama, batch):
    layers = llama.model.layers
    layers[1].mlp.up_proj.weight = layers[3].mlp.up_proj.weight
    wrapped = get_peft_model(llama, config())
    randomize(wrapped)
    expected = logits(wrapped, batch)
    message = r"a weight of model\.layers\.3\.mlp\.up_proj is shared by \['model\.layers\.1\.mlp\.up_proj', 'model"
    for merge in (wrapped.merge_adapter, wrapped.merge_and_unload):
        with pytest.raises(ValueError, match=message):
            merge()
    assert torch.equal(logits(wrapped, batch), expected)
    assert wrapped.unload() is llama
