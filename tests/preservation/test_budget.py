"""The budget: derivatives by finite differences, a bound that is held, settings that survive save, load and merge."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from peft import (
    AdaLoraConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    RandLoraConfig,
    ShiraConfig,
    VeraConfig,
    get_peft_model,
)
from support import logits, randomize, randomize_trained
from tqdm import tqdm

from adaptq_peft import AdaptQConfig, BaseReference, fit_to_budget, measure_forgetting
from adaptq_peft.layer import AdaptQLayer
from adaptq_peft.preservation import budget as budget_module
from adaptq_peft.preservation import budget_search
from adaptq_peft.preservation.block_scales import BlockScales
from adaptq_peft.preservation.budget import FAMILIES
from adaptq_peft.preservation.documents import measure_documents, tokenize_documents


def mean_loss(model, documents):
    total = measure_documents(model, documents).total
    return total.nll / total.num_tokens


def texts_in(documents):
    return {tuple(window.tokens.tolist()) for window in documents.windows}


@pytest.fixture
def certify_only(monkeypatch):
    """`certify_only(*factors)`: the candidates are these factors on both blocks, and no other."""

    def run(*factors):
        some = [budget_search.Setting(factor * np.ones(2)) for factor in factors]
        monkeypatch.setattr(budget_module, "candidates", lambda points: some)

    return run


#: Methods of PEFT whose change of the weight can be scaled.
OTHERS = {
    "lora": (LoraConfig, {}),
    "adalora": (AdaLoraConfig, {"total_step": 10}),
    "shira": (ShiraConfig, {"r": 2}),
    "loha": (LoHaConfig, {}),
    "lokr": (LoKrConfig, {}),
    "lokr, both factors decomposed": (LoKrConfig, {"r": 1, "decompose_both": True}),
    "randlora": (RandLoraConfig, {}),
}


def adapt_with(load, name):
    """A model with a random adapter of one of `OTHERS` on blocks 1 and 3."""
    torch.manual_seed(0)  # where SHiRA's weights are, and RandLoRA's bases
    kind, options = OTHERS[name]
    layers = r".*layers\.[13]\..*(q_proj|down_proj)"
    model = get_peft_model(load(), kind(target_modules=layers, **options))
    randomize_trained(model, std=0.3)
    return model


@pytest.fixture(params=["adaptq", *OTHERS])
def scaled(request, adapt, load):
    return adapt(std=0.1, quantization="none") if request.param == "adaptq" else adapt_with(load, request.param)


def test_one_backward_pass_gives_the_derivative_of_each_scale(scaled, general, tokenizer):
    documents, scales, factors = tokenize_documents(tokenizer, general), BlockScales(scaled), np.array([0.7, 0.4])
    found = scales.gradient(factors, documents, batch_size=4)
    assert scales.blocks == [1, 3]
    for block in range(2):
        shift, losses = np.eye(2)[block] * 0.02, []
        for moved in (factors + shift, factors - shift):
            scales.set(moved)
            losses.append(mean_loss(scaled, documents))
        assert found[block] == pytest.approx((losses[0] - losses[1]) / 0.04, rel=0.03, abs=1e-4)


def test_the_derivative_is_taken_without_dropout(load, general, tokenizer):
    lora = LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
    scales, documents = BlockScales(get_peft_model(load(), lora).train()), tokenize_documents(tokenizer, general)
    first, second = (scales.gradient(np.ones(4), documents, batch_size=8) for _ in range(2))
    assert np.array_equal(first, second)


def test_fold_gives_the_outputs_of_set(scaled, batch):
    scales, factors = BlockScales(scaled), np.array([0.5, 0.25])
    scales.set(factors)
    expected = logits(scaled, batch)
    scales.fold(factors)
    assert torch.equal(logits(scaled, batch), expected)


def test_corrections_of_frozen_blocks_are_scaled_with_the_deltas(adapt, batch):
    model = adapt(frozen_rank=4, init_weights=False)
    scales, factors = BlockScales(model), np.array([0.5, 1.0, 0.0, 0.25])
    assert scales.blocks == [0, 1, 2, 3]
    before = logits(model, batch)
    scales.set(factors)
    expected = logits(model, batch)
    scales.fold(factors)
    assert torch.equal(logits(model, batch), expected)
    assert not torch.equal(expected, before)


def test_gradient_leaves_flags_and_gradients_alone(adapt, general, tokenizer):
    model = adapt(inference_mode=True)
    BlockScales(model).gradient(np.zeros(2), tokenize_documents(tokenizer, general), 8)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_budget_is_held_and_survives_save_load_and_merge(
    family, adapt, load, general, domain, tokenizer, batch, tmp_path
):
    quantized = measure_forgetting(adapt(std=0), general * 2, tokenizer=tokenizer)
    model, budget = adapt(std=0.3), round(1.5 * quantized.upper_bound, 2)
    assert measure_forgetting(model, general * 2, tokenizer=tokenizer).degradation > budget
    report = fit_to_budget(model, general * 2, domain, budget, family=family, tokenizer=tokenizer)
    assert report.feasible
    assert report.family == family
    assert (report.shrinkage is None) == (family == "scales")
    assert report.degradation < report.upper_bound <= budget
    assert list(report.scales) == [1, 3]
    assert 0 <= min(report.scales.values()) < 1 or report.shrinkage > 0
    certificate = model.peft_config["default"].certificate
    assert {**certificate, **report.certificate()} == certificate
    expected = logits(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(), tmp_path / "adapter")
    assert torch.equal(logits(loaded, batch), expected)
    assert loaded.peft_config["default"].certificate == certificate
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f"at most {report.upper_bound:+.2%} with 95% confidence: within the budget of {budget:+.1%}" in card
    assert ("how the deltas were weakened: by a factor on each block." in card) != bool(report.shrinkage)
    assert torch.allclose(logits(loaded.merge_and_unload(), batch), expected, atol=1e-4)


def test_what_is_reported_is_what_is_left_in_the_adapter(
    adapt, general, domain, tokenizer, batch, load, tmp_path, monkeypatch
):
    """Where only shrinking is tried: the report's losses are those of the model afterwards, and of the saved one."""
    monkeypatch.setattr(budget_search, "GLOBAL_FACTORS", (1.0,))
    monkeypatch.setattr(budget_search, "STRENGTHS", (0.5,))
    model = adapt(std=0.3, quantization="none")
    base = BaseReference.of(model, general, domain, tokenizer=tokenizer)
    report = fit_to_budget(model, base=base, budget=5.0, family="shrinkage")
    assert report.shrinkage > 0
    assert f"Shrinkage of the deltas: lambda {report.shrinkage:.3g}" in str(report)
    assert mean_loss(model, base.domain) == pytest.approx(
        report.domain.adapted.total.nll / report.domain.adapted.total.num_tokens, rel=1e-6
    )
    assert report.certificate()["family"] == "shrinkage"
    assert report.certificate()["shrinkage"] == report.shrinkage
    expected = logits(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(load(), tmp_path / "adapter"), batch), expected)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f"shrunk by the covariances of both texts with lambda {report.shrinkage:.3g}, and by blocks" in card


@pytest.mark.parametrize("name", OTHERS)
def test_other_adapters_of_peft_are_held_to_a_budget(name, load, general, domain, tokenizer, batch, tmp_path):
    model = adapt_with(load, name)
    trained = measure_forgetting(model, general * 2, tokenizer=tokenizer)
    report = fit_to_budget(model, general * 2, domain, budget=0.5 * trained.upper_bound, tokenizer=tokenizer)
    assert report.feasible
    assert report.upper_bound <= 0.5 * trained.upper_bound
    assert min(report.scales.values()) < 1
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(), tmp_path)
    assert torch.allclose(logits(loaded, batch), expected, atol=1e-5)
    assert torch.allclose(logits(loaded.merge_and_unload(), batch), expected, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_error_on_the_way_leaves_the_adapter_as_it_was(
    family, adapt, general, domain, tokenizer, batch, monkeypatch
):
    model = adapt(std=0.3)
    before = logits(model, batch)

    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("adaptq_peft.preservation.budget.measure_quantized", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit_to_budget(model, general, domain, family=family, tokenizer=tokenizer)
    assert torch.equal(logits(model, batch), before)


def test_a_harmless_adapter_keeps_its_scale(adapt, general, domain, tokenizer, certify_only):
    certify_only(1.0, 0.0)
    report = fit_to_budget(adapt(std=1e-5, quantization="none"), general, domain, 0.05, tokenizer=tokenizer)
    assert report.feasible
    assert report.scales == {1: 1.0, 3: 1.0}
    assert report.quantization == 0


def test_a_wide_budget_leaves_the_least_loss_on_the_domain(adapt, load, general, domain, tokenizer):
    reference = BaseReference.of(load(), general, domain, tokenizer=tokenizer)
    model = adapt(std=0.3, quantization="none")
    least = min(mean_loss(each, reference.domain) for each in (load(), model))
    fit_to_budget(model, base=reference, budget=1e6)
    assert mean_loss(model, reference.domain) <= least + 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_what_certifies_had_no_part_in_choosing(family, adapt, load, general, domain, tokenizer, monkeypatch):
    chosen_on, certified_on, is_certifying = set(), set(), []
    fit, measure, shrinkage = budget_module._Fit, budget_module.measure_documents, budget_module.DeltaShrinkage
    certify, gradient = fit.certify, BlockScales.gradient

    def measured(model, documents, **options):
        (certified_on if is_certifying else chosen_on).update(texts_in(documents))
        return measure(model, documents, **options)

    def shrunk(model, domain, general, size):
        chosen_on.update(texts_in(general))
        return shrinkage(model, domain, general, size)

    def derived(scales, factors, documents, size):
        chosen_on.update(texts_in(documents))
        return gradient(scales, factors, documents, size)

    monkeypatch.setattr(budget_module, "measure_documents", measured)
    monkeypatch.setattr(budget_module, "DeltaShrinkage", shrunk)
    monkeypatch.setattr(BlockScales, "gradient", derived)
    monkeypatch.setattr(fit, "certify", lambda *arguments: is_certifying.append(1) or certify(*arguments))
    reference = BaseReference.of(load(), general, domain, tokenizer=tokenizer)
    fit_to_budget(adapt(std=0.3), base=reference, family=family)
    assert certified_on
    assert not certified_on & chosen_on
    assert texts_in(reference.general) == certified_on | (chosen_on - texts_in(reference.domain))


def test_candidates_are_bounded_jointly_at_the_confidence_that_is_asked_for(
    adapt, general, domain, tokenizer, certify_only, monkeypatch
):
    calls, bounds = [], budget_module.upper_bounds

    def record(differences, num_tokens, confidence, seed):
        calls.append((len(differences), confidence))
        return bounds(differences, num_tokens, confidence, seed)

    monkeypatch.setattr(budget_module, "upper_bounds", record)
    certify_only(1.0, 0.5, 0.0)
    fit_to_budget(adapt(std=0.3), general, domain, confidence=0.7, tokenizer=tokenizer)
    assert calls[-1] == (3, 0.7)
    assert {confidence for _, confidence in calls} == {0.7}


@pytest.fixture
def fit_as_trained(adapt, load, general, domain, tokenizer, certify_only):
    """`fit_as_trained(budget, std=0.3)`: the report on an adapter that is not weakened."""
    reference = BaseReference.of(load(), general, domain, tokenizer=tokenizer)
    certify_only(1.0)

    def run(budget, std=0.3):
        return fit_to_budget(adapt(std=std, quantization="none"), base=reference, budget=budget)

    return run


def test_the_budget_is_one_of_the_perplexity_not_of_the_loss(fit_as_trained):
    bound = fit_as_trained(1e3).upper_bound
    assert bound > 0
    assert not fit_as_trained((bound + math.log1p(bound)) / 2).feasible


def test_where_only_the_mean_is_within_the_budget_more_documents_are_asked_for(fit_as_trained):
    found = fit_as_trained(1e3, std=0.03)
    assert found.degradation < found.upper_bound
    found = fit_as_trained((found.degradation + found.upper_bound) / 2, std=0.03)
    assert not found.feasible
    assert found.note.startswith("The mean is within the budget, but 12 documents are too few to show it")


@pytest.fixture
def fit_named(load, general, domain, tokenizer, tmp_path):
    """A model whose adapter, named otherwise than PEFT names one, has been certified and saved; and its folder."""
    config = AdaptQConfig(task_type="CAUSAL_LM", layers_to_transform=[1, 3], frozen_rank=0)
    model = get_peft_model(load(), config, adapter_name="mine")
    randomize(model, "mine")
    assert fit_to_budget(model, general, domain, 1e3, tokenizer=tokenizer).feasible
    model.save_pretrained(tmp_path)
    return model, tmp_path / "mine"


def test_an_adapter_of_another_name_is_certified(fit_named, load):
    model, folder = fit_named
    certificate = model.peft_config["mine"].certificate
    assert certificate["sample"]
    assert PeftModel.from_pretrained(load(), folder).peft_config["default"].certificate == certificate


def test_a_scale_that_was_changed_since_is_not_certified(fit_named, load):
    _, folder = fit_named
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"delta_scaling": 4.0}))
    with pytest.warns(UserWarning, match="they or their scale were changed since"):
        assert PeftModel.from_pretrained(load(), folder).peft_config["default"].certificate is None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_progress_bar_ends_at_the_number_of_settings(family, adapt, general, domain, tokenizer, monkeypatch):
    ends = []

    class Bar(tqdm):
        def __exit__(self, *error):
            ends.append((self.n, self.total))
            super().__exit__(*error)

    measured, measure = [], budget_module._Fit._measure

    def count(fit, setting, documents):
        measured.append(setting)
        return measure(fit, setting, documents)

    monkeypatch.setattr(budget_module, "tqdm", Bar)
    monkeypatch.setattr(budget_module._Fit, "_measure", count)
    fit_to_budget(adapt(std=0.3), general, domain, family=family, tokenizer=tokenizer)
    tried = budget_search.most_settings(family == "shrinkage") - len(budget_search.CANDIDATES)
    assert ends == [(len(measured) - tried, len(measured) - tried)]  # tried settings are measured on both texts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("delta_dtype", ["float32", "bfloat16"])
def test_if_no_setting_holds_the_budget_the_adapter_is_left_and_the_way_out_named(
    family, delta_dtype, adapt, general, domain, tokenizer, batch
):
    model = adapt(std=0.3, frozen_rank=4, delta_dtype=delta_dtype)
    before, state = logits(model, batch), {name: p.detach().clone() for name, p in model.named_parameters()}
    report = fit_to_budget(model, general, domain, -0.9, family=family, tokenizer=tokenizer)
    assert not report.feasible
    assert all(torch.equal(parameter, state[name]) for name, parameter in model.named_parameters())
    assert model.peft_config["default"].certificate is None
    assert torch.equal(logits(model, batch), before)
    assert "infeasible" in str(report)
    assert "Quantizing alone costs" in report.note
    assert report.upper_bound > -0.9


def test_quantizing_is_not_blamed_where_it_cost_nothing(adapt, general, domain, tokenizer):
    report = fit_to_budget(adapt(std=0.3, quantization="none"), general, domain, -0.9, tokenizer=tokenizer)
    assert report.note.startswith("Train anew with a lower rate")
    assert "No factor weakens" not in report.note
    whole = adapt(std=0.3, quantization="none", modules_to_save=["lm_head"])
    report = fit_to_budget(whole, general, domain, -0.9, tokenizer=tokenizer)
    others = "No factor weakens what is trained whole or outside of the blocks"
    assert f"{others}: ['lm_head']." in report.note


def test_what_has_no_factor_is_named(load, make_model):
    lora = LoraConfig(target_modules=["q_proj", "lm_head"], trainable_token_indices=[3], modules_to_save=["norm"])
    assert BlockScales(get_peft_model(load(), lora)).unscaled == ["norm", "lm_head", "trainable_token_indices"]
    biases = LoraConfig(target_modules=["q_proj"], bias="all")
    assert BlockScales(get_peft_model(make_model(attention_bias=True), biases)).unscaled == ["bias"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank", [0, 4])
def test_of_16_bit_deltas_what_was_measured_is_what_is_left(
    family, rank, adapt, load, general, domain, tokenizer, monkeypatch
):
    def some(points):
        strength = 0.3 if family == "shrinkage" else 0.0
        return [budget_search.Setting(0.37 * np.ones_like(points[0].setting.factors), strength)]

    monkeypatch.setattr(budget_module, "candidates", some)
    model = adapt(std=0.1, frozen_rank=rank, delta_dtype="bfloat16")
    reference = BaseReference.of(load(), general, domain, tokenizer=tokenizer)
    report = fit_to_budget(model, base=reference, budget=1e3, family=family)
    assert set(report.scales.values()) == {0.37}
    left = measure_forgetting(model, base=reference)
    assert left.domain.adapted.total == report.domain.adapted.total


def test_what_is_missing_is_named(adapt, load, general, domain, tokenizer):
    with pytest.raises(ValueError, match="there is no domain text to keep the gain on"):
        fit_to_budget(adapt(), general, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"there are 15 general documents; .* so at least 16 are needed"):
        fit_to_budget(adapt(), general[:15], domain, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="budget is -1; allowed: a fraction above -1"):
        fit_to_budget(adapt(), general, domain, -1, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"family is 'both'; allowed: \['scales', 'shrinkage'\]"):
        fit_to_budget(adapt(), general, domain, family="both", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="a PeftModel is needed, as get_peft_model makes it, and this is a Llama"):
        fit_to_budget(load(), general, domain, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"outside of torch\.inference_mode"), torch.inference_mode():
        fit_to_budget(adapt(), general, domain, tokenizer=tokenizer)
    merged = adapt()
    with (
        merged.disable_adapter(),
        pytest.raises(ValueError, match="'default' can't be scaled while it is switched off"),
    ):
        fit_to_budget(merged, general, domain, tokenizer=tokenizer)
    merged.merge_adapter()
    with pytest.raises(ValueError, match=r"can't be scaled while it is merged; call model\.unmerge_adapter\(\) first"):
        fit_to_budget(merged, general, domain, tokenizer=tokenizer)
    for frozen_rank, name in ((0, "delta_scaling 0.25"), (2, "frozen_alpha / frozen_rank 2.0")):
        scaled = adapt(frozen_rank=frozen_rank)
        layers = [m for m in scaled.modules() if isinstance(m, AdaptQLayer)]
        next(m for m in layers if bool(frozen_rank) == m.is_corrected_by("default")).set_scale("default", 0.1)
        with pytest.raises(
            ValueError, match=f"runs at scale 0.1 in a layer, by set_scale, and its config has {name}:"
        ):
            fit_to_budget(scaled, general, domain, tokenizer=tokenizer)
    dora = get_peft_model(load(), LoraConfig(target_modules=["q_proj"], use_dora=True))
    allowed = "allowed: ADAPTQ, LoRA or AdaLoRA, SHiRA, LoHa, LoKr, RandLoRA, and no DoRA"
    with pytest.raises(ValueError, match=rf"adapters in peft\.tuners\.lora\.layer\.Linear can't be scaled; {allowed}"):
        fit_to_budget(dora, general, domain, tokenizer=tokenizer)
    vera = get_peft_model(load(), VeraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=rf"'default' \(VeraConfig\) has nothing .* can be scaled; {allowed}"):
        fit_to_budget(vera, general, domain, tokenizer=tokenizer)
    with pytest.raises(
        ValueError,
        match=r"to peft\.tuners\.shira\.layer\.Linear has no matrix that multiplies .* LoRA and AdaLoRA; use family=",
    ):
        fit_to_budget(adapt_with(load, "shira"), general, domain, family="shrinkage", tokenizer=tokenizer)


def test_an_adapter_that_has_diverged_is_refused(adapt, general, domain, tokenizer):
    model = adapt()
    next(p for name, p in model.named_parameters() if "adaptq_delta" in name).data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"the loss of the adapted model is nan on document 0"):
        fit_to_budget(model, general, domain, tokenizer=tokenizer)


def test_a_combined_adapter_carries_no_certificate(adapt):
    model = adapt()
    model.peft_config["default"].certificate = {"budget": 0.05}  # nothing is saved here
    model.add_adapter("other", AdaptQConfig(layers_to_transform=[1, 3]))
    model.base_model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both")
    assert model.peft_config["both"].certificate is None
