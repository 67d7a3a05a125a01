"""Forgetting: the base is found wherever it is, the model is left as it was, and the figures add up."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from support import logits, randomize, tiny_t5
from torch import nn

from adaptq_peft import AdaptQConfig, BaseReference, measure_forgetting
from adaptq_peft.comparison.methods import quantize_lower_blocks
from adaptq_peft.preservation.documents import measure_documents, tokenize_documents
from adaptq_peft.preservation.forgetting import _top_log_probs as top_log_probs
from adaptq_peft.preservation.forgetting import kl_divergence
from adaptq_peft.preservation.original_model import check_base_is_kept, original_model


def test_the_base_is_the_same_from_before_the_checkpoint_kept_weights_and_another_model(
    adapt, load, general, domain, tokenizer
):
    reference = BaseReference.of(load(), general, domain, tokenizer=tokenizer)
    reports = [measure_forgetting(adapt(), base=reference)]
    reports += [
        measure_forgetting(model, general, domain, tokenizer=tokenizer, base=base)
        for model, base in ((adapt(), None), (adapt(original_weights="keep"), None), (adapt(), load()))
    ]
    assert {report.general.base.total.nll for report in reports} == {reference.general_losses.total.nll}
    assert len({(report.degradation, report.upper_bound, report.domain_kl) for report in reports}) == 1
    report = reports[0]
    assert report.quantization + report.training == pytest.approx(report.degradation)
    assert report.quantization != 0
    assert report.training != 0
    assert report.domain_kl > 0
    assert report.upper_bound > report.degradation


def test_a_budget_is_held_by_the_bound_not_by_the_mean(adapt, load, general, tokenizer):
    model, reference = adapt(), BaseReference.of(load(), general, tokenizer=tokenizer)
    report = measure_forgetting(model, base=reference)
    budgets = ((report.degradation + report.upper_bound) / 2, report.upper_bound)
    assert [measure_forgetting(model, base=reference, budget=budget).feasible for budget in budgets] == [False, True]


def test_more_confidence_is_a_higher_bound(adapt, load, general, tokenizer):
    model, reference = adapt(), BaseReference.of(load(), general, tokenizer=tokenizer)
    low, high = (measure_forgetting(model, base=reference, confidence=confidence) for confidence in (0.6, 0.95))
    assert low.degradation < low.upper_bound < high.upper_bound


def test_the_domain_is_measured_with_the_adapter_on_and_off(adapt, general, domain, tokenizer):
    model = adapt()
    report = measure_forgetting(model, general, domain, tokenizer=tokenizer)
    documents = tokenize_documents(tokenizer, domain)
    assert report.domain.adapted.total == measure_documents(model, documents).total
    with model.disable_adapter():
        assert report.domain.quantized.total == measure_documents(model, documents).total != report.domain.base.total


def test_documents_are_cut_as_asked(load, general, domain, tokenizer):
    sizes = {"max_length": 6, "stride": 3, "max_tokens": 9}
    reference = BaseReference.of(load(), general, domain, tokenizer=tokenizer, **sizes)
    for documents, texts in ((reference.general, general), (reference.domain, domain)):
        expected = tokenize_documents(tokenizer, texts, **sizes)
        assert [len(window.tokens) for window in documents.windows] == [len(w.tokens) for w in expected.windows]


def test_the_model_is_as_it_was_afterwards(adapt, general, domain, tokenizer, batch):
    model = adapt(inference_mode=True)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    before, names = logits(model, batch), [name for name, _ in model.named_modules()]
    measure_forgetting(model, general, domain, tokenizer=tokenizer)
    assert torch.equal(logits(model, batch), before)
    assert [name for name, _ in model.named_modules()] == names
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_original_model_is_bit_identical_to_the_base_and_undone_after_an_error(adapt, load, batch):
    model, expected = adapt(), logits(load(), batch)
    before = logits(model, batch)
    with pytest.raises(RuntimeError, match="stop"), original_model(model):  # noqa: PT012
        assert torch.equal(logits(model, batch), expected)
        raise RuntimeError("stop")
    assert torch.equal(logits(model, batch), before)


def test_original_model_has_the_dtype_that_the_model_was_cast_to(adapt, load, batch):
    model, expected = adapt().to(torch.bfloat16), logits(load().to(torch.bfloat16), batch)
    with original_model(model):
        assert torch.equal(logits(model, batch), expected)


def test_a_layer_that_one_adapter_trains_and_another_froze_runs_its_original(adapt, load, batch):
    model = adapt()
    model.add_adapter("other", AdaptQConfig(layers_to_transform=[0]))
    for name in ("default", "other"):
        model.set_adapter(name)
        with original_model(model):
            assert torch.equal(logits(model, batch), logits(load(), batch))


def test_an_untrained_adapter_costs_only_its_quantization(adapt, general, tokenizer):
    report = measure_forgetting(adapt(std=0), general, tokenizer=tokenizer)
    assert report.training == 0
    assert report.degradation == report.quantization


def test_without_quantization_all_is_training_also_for_lora(load, general, tokenizer):
    model = get_peft_model(load(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    report = measure_forgetting(model, general, tokenizer=tokenizer)
    assert report.quantization == 0
    assert report.training == report.degradation != 0


def test_kl_of_the_top_is_a_lower_bound_and_exact_with_the_whole_vocabulary():
    generator = torch.Generator().manual_seed(0)
    base, model = torch.randn(2, 300, 50, generator=generator) * 2
    exact = torch.nn.functional.kl_div(
        model.log_softmax(-1), base.log_softmax(-1), reduction="sum", log_target=True
    ).item()
    assert kl_divergence(top_log_probs(base, 50), model) == pytest.approx(exact, rel=1e-4)
    assert 0.5 * exact < kl_divergence(top_log_probs(base, 10), model) < exact
    assert kl_divergence(top_log_probs(base, 10), base) == pytest.approx(0, abs=1e-4)


def test_kl_is_a_token_of_the_domain(adapt, load, general, domain, tokenizer):
    model, base = adapt().eval(), load().eval()
    total, num_tokens = 0.0, 0
    for text in domain:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            p, q = (each(input_ids=ids).logits[0, :-1].double().log_softmax(-1) for each in (base, model))
        total, num_tokens = total + (p.exp() * (p - q)).sum().item(), num_tokens + len(p)
    report = measure_forgetting(model, general, domain, tokenizer=tokenizer)
    assert report.domain_kl == pytest.approx(total / num_tokens, rel=1e-3)


def test_the_top_is_as_wide_as_asked(load, general, domain, tokenizer):
    reference = BaseReference.of(load(), general, domain, tokenizer=tokenizer, top_k=3)
    assert {top.tokens.shape[1] for top in reference.domain_top} == {3}


def test_report_prints_and_plots(adapt, general, domain, tokenizer, tmp_path):
    report = measure_forgetting(adapt(), general, domain, tokenizer=tokenizer, budget=-0.5)
    text = str(report)
    assert f"{report.degradation:+.2%} = quantization {report.quantization:+.2%}" in text
    assert f"At most {report.upper_bound:+.2%} with 95% confidence, for text like this (24 documents" in text
    assert "Budget -50.0%: infeasible" in text
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 5000


def test_with_few_documents_nothing_is_bounded(adapt, general, tokenizer):
    assert measure_forgetting(adapt(), general[:3], tokenizer=tokenizer).upper_bound == math.inf


def test_what_is_missing_is_named(adapt, make_model, general, tokenizer):
    with pytest.raises(ValueError, match="there is no general text to measure on; pass general_texts"):
        measure_forgetting(adapt())
    in_memory = get_peft_model(make_model(), AdaptQConfig(layers_to_transform=[1]))
    with pytest.raises(ValueError, match=r"can't be had from this one: .*built in memory.*BaseReference\.of"):
        measure_forgetting(in_memory, general, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="no tokenizer was given, and none could be loaded for PeftModel"):
        measure_forgetting(in_memory, general)
    reference = BaseReference.of(make_model(), general, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"texts and settings; leave out \['general_texts', 'tokenizer'\]"):
        measure_forgetting(in_memory, general, base=reference, tokenizer=tokenizer)
    merged: PeftModel = adapt()
    randomize(merged)
    merged.merge_adapter()
    with pytest.raises(ValueError, match="adapters are merged into this model"):
        measure_forgetting(merged, general, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"can't be had from this one: .* has rounded all blocks"):
        measure_forgetting(adapt(original_weights="dequantized"), general, tokenizer=tokenizer)


@pytest.mark.parametrize("kind", ["transformers", "compiled"])
def test_adapters_that_are_not_at_the_top_are_found(kind, load, general, domain, tokenizer):
    config = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    if kind == "transformers":
        model = load()
        model.add_adapter(config)
    else:
        model = torch.compile(get_peft_model(load(), config))
    expected = measure_forgetting(model, base=BaseReference.of(load(), general, domain, tokenizer=tokenizer))
    found = measure_forgetting(model, general, domain, tokenizer=tokenizer)
    assert found.degradation == expected.degradation != 0
    assert found.domain_kl == expected.domain_kl


def test_where_there_is_no_base_nothing_is_compared(load, general, tokenizer):
    lora = get_peft_model(load(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(ValueError, match="LlamaForCausalLM has no adapter and nothing quantized"):
        measure_forgetting(lora.merge_and_unload(), general, tokenizer=tokenizer)
    pissa = get_peft_model(load(), LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="init_lora_weights='pissa', which changes the base's weights"):
        measure_forgetting(pissa, general, tokenizer=tokenizer)
    with pytest.raises(
        ValueError, match="T5ForConditionalGeneration has an encoder and a decoder; BaseReference works"
    ):
        BaseReference.of(tiny_t5(), general, tokenizer=tokenizer)


@pytest.mark.parametrize("start", ["corda", "loftq", "lora_ga"])
def test_starts_that_need_data_of_their_own_change_the_base_too(start):
    model, config = nn.Module(), LoraConfig()
    config.init_lora_weights = start  # on its own, without the rest of such a config
    model.peft_config = {"default": config}
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}', which changes the base's weights"):
        check_base_is_kept(model)


def test_with_a_reference_it_matters_not_how_an_adapter_began(load, general, tokenizer):
    reference = BaseReference.of(load(), general, tokenizer=tokenizer)
    pissa = get_peft_model(load(), LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"))
    assert measure_forgetting(pissa, base=reference).degradation == pytest.approx(0, abs=1e-5)


def test_a_change_of_a_quantized_base_is_all_the_adapters(make_model, general, tokenizer):
    """Nothing is left of the quantized base to split by once its biases are trained."""

    def measured(**options):
        model = make_model(attention_bias=True)
        quantize_lower_blocks(model, 0.5)
        lora = get_peft_model(model, LoraConfig(target_modules=["q_proj"], **options))
        return measure_forgetting(lora, base=reference)

    reference = BaseReference.of(make_model(attention_bias=True), general, tokenizer=tokenizer)
    kept, changed = measured(), measured(bias="all")
    assert kept.degradation == changed.degradation != 0
    assert (kept.quantization, kept.training) == (kept.degradation, 0)
    assert (changed.quantization, changed.training) == (0, changed.degradation)


def test_prompt_tuning_is_measured(load, general, tokenizer):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    report = measure_forgetting(get_peft_model(load(), config), general, tokenizer=tokenizer)
    assert report.training != 0
    assert (
        report.general.base.total.nll
        == BaseReference.of(load(), general, tokenizer=tokenizer).general_losses.total.nll
    )


def test_texts_are_strings_or_rows_with_a_text(load, general, domain, tokenizer):
    expected = BaseReference.of(load(), general, tokenizer=tokenizer).general_losses.total.nll
    for texts in (Dataset.from_dict({"text": general}), [{"text": text} for text in general], iter(general)):
        assert BaseReference.of(load(), texts, tokenizer=tokenizer).general_losses.total.nll == expected
    short = load()
    short.config.max_position_embeddings = 8
    with pytest.raises(ValueError, match=r"windows of \d+ tokens are longer than the 8 positions .* max_length=8"):
        BaseReference.of(short, general, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"windows of \d+ tokens are longer than the 8 positions"):
        BaseReference.of(short, [text[:5] for text in general], domain, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="batch_size=0; it must be at least 1"):
        BaseReference.of(load(), general, tokenizer=tokenizer, batch_size=0)


def test_losses_that_are_no_numbers_are_named(adapt, load, general, domain, tokenizer):
    broken = load()
    nn.init.constant_(broken.lm_head.weight, math.nan)
    with pytest.raises(ValueError, match="the loss of the base is nan on document 0"):
        BaseReference.of(broken, general, tokenizer=tokenizer)
    token = load()
    token.model.embed_tokens.weight.data[tokenizer("z")["input_ids"][1]] = math.nan
    with pytest.raises(ValueError, match=f"the loss of the base on domain text is nan on document {len(domain)}"):
        BaseReference.of(token, general, [*domain, "az za zz"], tokenizer=tokenizer)
    model = adapt()
    next(p for name, p in model.named_parameters() if "adaptq_delta" in name).data.fill_(math.nan)
    with pytest.raises(ValueError, match="the loss of the adapted model is nan on document 0"):
        measure_forgetting(model, general, tokenizer=tokenizer)
