"""`quantization="auto"`: a precision for each linear, measured, saved, reloaded, and respected by everything else."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from support import logits, randomize
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BitsAndBytesConfig,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from adaptq_peft import AdaptQConfig, adaptq_bnb_config, hotswap_adapter, profile_activations
from adaptq_peft.evaluation import measure_weight_bytes, plan_memory
from adaptq_peft.layer import AdaptQLayer
from adaptq_peft.precision import choose_precision, measure_block_sensitivity, sensitivity_batches
from adaptq_peft.quantization import is_quantized, quantize_linear, resolve_quantization, settings_of
from adaptq_peft.quantization.calibrated import (
    CALIBRATION_METHODS,
    mixed_calibration_batches,
    quantize_calibrated,
    text,
)
from adaptq_peft.quantization.sensitivity import measure_sensitivity
from adaptq_peft.selection import find_blocks


@pytest.fixture(autouse=True)
def few_sequences(monkeypatch):
    """The tests below need a plan, not a good one."""
    monkeypatch.setattr("adaptq_peft.precision.SEQUENCES", 6)
    monkeypatch.setattr("adaptq_peft.precision.SEQUENCE_LENGTH", 16)


def config(**fields):
    fields = {"task_type": "CAUSAL_LM", "layers_to_transform": [1, 3], "weight_budget": "6.5 bits", **fields}
    return AdaptQConfig(quantization="auto", **fields)


def made(model, **fields):
    wrapped = get_peft_model(model, config(**fields))
    randomize(wrapped)
    return wrapped


def precision_of(model, name="default"):
    return model.peft_config[name].precision


def linears_of(model):
    """Names of all linears of the blocks -> "nf4", "int8" or "none", as they are in the model."""
    found = {}
    for name, module in model.base_model.model.named_modules():
        if name.endswith(("_proj", "c_attn", "c_proj", "c_fc")):
            linear = module.base_layer if isinstance(module, AdaptQLayer) else module
            found[name] = settings_of(linear).describe().split()[0] if is_quantized(linear) else "none"
    return found


def explicit(model, *forms, blocks=(0, 2)):
    """A plan that gives the linears of blocks these forms in turn."""
    names = [name for name, _ in model.named_modules() if name.endswith(("_proj", "c_attn", "c_fc"))]
    names = [name for name in names if int(name.split(".")[2]) in blocks]
    return {name: forms[index % len(forms)] for index, name in enumerate(names)}


@pytest.fixture
def base(model, tmp_path):
    """A base with a checkpoint on disk, from which original weights can be read."""
    model.save_pretrained(tmp_path / "base")
    return type(model).from_pretrained(tmp_path / "base")


def test_the_plan_is_in_the_config_the_report_and_the_model(model):
    wrapped = made(model, weight_budget="6.5 bits")
    plan = wrapped.base_model.quantization_report.precision
    assert plan.precision == precision_of(wrapped)
    assert 6.0 < plan.bits_a_weight <= 6.5
    assert {"nf4", "int8"} <= set(plan.precision.values())
    assert "bits a weight, predicted rise of the loss" in str(plan)
    found = linears_of(wrapped)
    assert {name: found[name] for name in plan.precision} == plan.precision
    assert all(found[name] == "none" for name in found.keys() - plan.precision.keys())  # adapted
    assert wrapped.base_model.quantization_report.left == {}


def test_bytes_are_within_the_budget(llama):
    wrapped = made(llama, weight_budget="60KB")
    frozen = wrapped.base_model.quantization_report.precision
    assert 59_000 < frozen.stored_bytes <= 60_000
    adapted = sum(p.nbytes for n, p in llama.named_parameters() if "base_layer" in n and p.ndim == 2)
    tables = 4 * (16 + 256) * list(frozen.precision.values()).count("nf4")
    assert measure_weight_bytes(llama).block_linears - adapted <= frozen.stored_bytes + tables


def test_a_budget_for_everything_leaves_everything_as_it_is(llama, batch):
    base = copy.deepcopy(llama)
    wrapped = get_peft_model(llama, config(weight_budget="32 bits"))
    assert set(precision_of(wrapped).values()) == {"none"}
    assert torch.equal(logits(wrapped, batch), logits(base, batch))


def test_more_bits_are_nearer_to_the_original(model, batch):
    def error(bits):
        wrapped = get_peft_model(copy.deepcopy(model), config(weight_budget=f"{bits} bits"))
        return float((logits(wrapped, batch) - logits(model, batch)).norm())

    assert error(4.3) > error(6.5) > error(12) > 0


def test_save_and_load_give_the_same_bits_without_measuring(model, batch, tmp_path, monkeypatch):
    base = copy.deepcopy(model)
    wrapped = made(model)
    wrapped.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["quantization"], saved["weight_budget"], saved["precision"]) == (
        "auto",
        "6.5 bits",
        precision_of(wrapped),
    )
    monkeypatch.setattr("adaptq_peft.precision.measure_sensitivity", None)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert linears_of(loaded) == linears_of(wrapped)
    assert torch.equal(logits(loaded, batch), logits(wrapped, batch))


def test_a_given_plan_is_taken_without_measuring(model, monkeypatch):
    monkeypatch.setattr("adaptq_peft.precision.measure_sensitivity", None)
    everything = explicit(model, "int8", "nf4", "none", blocks=range(4))
    wrapped = made(model, weight_budget=None, precision=everything)
    frozen = {name: form for name, form in everything.items() if name.split(".")[2] in "02"}
    assert precision_of(wrapped) == frozen
    assert wrapped.base_model.quantization_report.precision.predicted_rise is None


def test_a_plan_that_does_not_fit_the_model(llama):
    precision = explicit(llama, "nf4")
    del precision["model.layers.2.mlp.up_proj"]
    with pytest.raises(ValueError, match=r"no entry for 1 linears of the frozen blocks \(first \['model\.layers"):
        made(llama, precision=precision)
    with pytest.raises(ValueError, match=r"names 1 that this model's blocks do not have \(\['lm_head'\]\)"):
        made(llama, precision={**explicit(llama, "nf4"), "lm_head": "nf4"})


def test_a_budget_that_is_too_small_leaves_the_model_as_it_was(llama, batch):
    before, modules = logits(llama, batch), list(llama.modules())
    with pytest.raises(
        ValueError, match=r"weight_budget is '4 bits'.*the least that they take is [\d,]+ bytes \(4\.1"
    ):
        made(llama, weight_budget="4 bits")
    assert list(llama.modules()) == modules
    assert torch.equal(logits(llama, batch), before)


def test_excluded_linears_are_not_in_the_plan(llama):
    wrapped = made(llama, exclude_modules=["up_proj"])
    assert not any("up_proj" in name for name in precision_of(wrapped))
    assert len(wrapped.base_model.quantization_report.left) == 2


def test_it_trains(model, batch, train):
    wrapped = made(model, frozen_rank=2)
    losses = train(wrapped, batch, lr=0.01)
    assert losses[-1] < losses[0]
    assert set(wrapped.base_model.quantization_report.corrected) == set(precision_of(wrapped))


def test_corrections_that_repair_the_rounding_begin_at_zero_where_nothing_is_rounded(llama):
    precision = explicit(llama, "nf4", "none", "int8")
    wrapped = get_peft_model(llama, config(precision=precision, frozen_rank=4, frozen_rank_init="svd"))
    for name, form in precision.items():
        b = wrapped.base_model.model.get_submodule(name).adaptq_low_rank_B["default"].weight
        assert bool(b.any()) == (form != "none")


class TestCalibrated:
    @pytest.fixture(autouse=True)
    def few_tokens(self, monkeypatch):
        def few(*args, tokens=2048, **kwargs):
            return mixed_calibration_batches(*args, tokens=tokens, **kwargs)

        for module in ("frozen_codes", "precision"):
            monkeypatch.setattr(f"adaptq_peft.{module}.mixed_calibration_batches", few)

    def test_the_4_bit_part_is_calibrated_and_saved(self, model, samples, batch, tmp_path, monkeypatch):
        base = copy.deepcopy(model)
        plain = made(copy.deepcopy(model), precision=explicit(model, "nf4", "int8", "none"))
        wrapped = made(
            model,
            precision=explicit(model, "nf4", "int8", "none"),
            quantization_calibration="gptq",
            calibration_data=samples,
        )
        assert linears_of(wrapped) == linears_of(plain)
        assert not torch.equal(logits(wrapped, batch), logits(plain, batch))
        wrapped.save_pretrained(tmp_path)
        monkeypatch.setattr("adaptq_peft.frozen_codes.quantize_calibrated", None)
        loaded = PeftModel.from_pretrained(base, tmp_path)
        assert torch.equal(logits(loaded, batch), logits(wrapped, batch))

    def test_the_model_writes_its_text_once(self, llama, samples, monkeypatch):
        calls, original = [], text.write_calibration_samples
        monkeypatch.setattr(text, "write_calibration_samples", lambda *a, **k: calls.append(a) or original(*a, **k))
        made(llama, quantization_calibration="absmax", calibration_data=samples * 20)
        assert sorted(length for _, _, length in calls) == [16, 64]  # sequences here are shorter than calibration's

    def test_sensitivities_are_those_of_calibrated_layers(self, llama, samples, monkeypatch):
        seen = []
        monkeypatch.setattr("adaptq_peft.precision.measure_sensitivity", _spy(seen))
        made(copy.deepcopy(llama))
        made(llama, quantization_calibration="auto", calibration_data=samples)
        plain, calibrated = seen
        assert sum(of["nf4"] for of in calibrated.values()) < 0.8 * sum(of["nf4"] for of in plain.values())

    def test_candidates_make_up_for_nothing_that_was_rounded_before(self, llama, samples, monkeypatch):
        methods = []

        def note(*args):
            methods.append(args[-1])
            return quantize_calibrated(*args)

        monkeypatch.setattr("adaptq_peft.precision.quantize_calibrated", note)
        fields = {"quantization_calibration": "auto", "calibration_data": samples}
        choose_precision(llama, find_blocks(llama), [0, 1, 2], config(**fields))
        assert methods == [CALIBRATION_METHODS["descent"]]


def _spy(seen):
    def measure(*args, **kwargs):
        seen.append(measure_sensitivity(*args, **kwargs))
        return seen[-1]

    return measure


class TestSeveralAdapters:
    def test_with_one_plan_each_is_as_it_is_alone(self, base, batch):
        plan = explicit(base, "nf4", "int8", "none", blocks=range(4))
        blocks = {"first": [0, 1], "second": [1, 2]}

        def alone(name):
            fields = {"layers_to_transform": blocks[name], "precision": plan, "weight_budget": None}
            model = get_peft_model(copy.deepcopy(base), config(**fields), adapter_name=name)
            randomize(model, name, seed=len(name))
            return model

        both = alone("first")
        both.add_adapter("second", config(layers_to_transform=blocks["second"], precision=plan, weight_budget=None))
        randomize(both, "second", seed=len("second"))
        for name in ("first", "second", "first"):
            both.set_adapter(name)
            assert torch.equal(logits(both, batch), logits(alone(name), batch)), name

    def test_16_bits_beside_4_are_both_kept(self, base, batch):
        first = made(copy.deepcopy(base), precision=explicit(base, "nf4"))
        first.add_adapter("second", config(precision=explicit(base, "none"), weight_budget=None))
        first.set_adapter("second")
        with first.disable_adapter():
            assert torch.equal(logits(first, batch), logits(base, batch))
        first.set_adapter("default")
        alone = made(copy.deepcopy(base), precision=explicit(base, "nf4"))
        assert torch.equal(logits(first, batch), logits(alone, batch))

    def test_plans_that_disagree(self, llama):
        wrapped = made(llama, precision=explicit(llama, "int8"))
        for other in (
            config(precision=explicit(llama, "nf4"), weight_budget=None),
            AdaptQConfig(layers_to_transform=[1, 3]),
        ):
            with pytest.raises(
                ValueError,
                match=r"14 linears quantized otherwise than the new adapter wants them: model\.layers\.0\.self_attn\."
                r"q_proj is in int8 instead of nf4 with nested absmax",
            ):
                wrapped.add_adapter("other", other)
            assert list(wrapped.peft_config) == ["default"]

    def test_a_second_plan_can_not_be_measured(self, llama):
        wrapped = made(llama)
        with pytest.raises(
            ValueError,
            match=r"plan is measured on the original model, and this LlamaForCausalLM has adapters already\. Give",
        ):
            wrapped.add_adapter("other", config())

    def test_hotswap_asks_for_the_same_plan(self, make_model, tmp_path):
        plan = explicit(make_model(), "nf4", "int8")
        made(make_model(), precision=plan).save_pretrained(tmp_path / "same")
        other = {**plan, "model.layers.0.mlp.up_proj": "none"}
        made(make_model(), precision=other).save_pretrained(tmp_path / "other")
        wrapped = made(make_model(), precision=plan)
        hotswap_adapter(wrapped, str(tmp_path / "same"))
        with pytest.raises(ValueError, match="The new adapter does not fit into the place of 'default': precision is"):
            hotswap_adapter(wrapped, str(tmp_path / "other"))

    def test_a_combination_has_the_plan(self, llama, batch):
        wrapped = made(llama)
        wrapped.add_adapter("other", config(precision=precision_of(wrapped), weight_budget=None))
        wrapped.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both")
        assert precision_of(wrapped, "both") == precision_of(wrapped)


class TestArrival:
    @pytest.fixture
    def checkpoint(self, make_model, tmp_path):
        make_model().save_pretrained(tmp_path / "base")
        return str(tmp_path / "base")

    def load(self, checkpoint, **options):
        return AutoModelForCausalLM.from_pretrained(checkpoint, **options)

    def test_a_plan_without_8_bits_is_loaded_presplit(self, checkpoint, batch, tmp_path):
        whole = self.load(checkpoint)
        wrapped = made(whole, precision=explicit(whole, "nf4", "none"))
        wrapped.save_pretrained(tmp_path / "adapter")
        bnb = adaptq_bnb_config(str(tmp_path / "adapter"), checkpoint)
        split = self.load(checkpoint, quantization_config=bnb)
        assert sum(is_quantized(module) for module in split.modules()) == 7
        loaded = PeftModel.from_pretrained(split, tmp_path / "adapter")
        assert linears_of(loaded) == linears_of(wrapped)
        assert torch.equal(logits(loaded, batch), logits(wrapped, batch))

    def test_a_plan_with_8_bits_can_not_be(self, checkpoint):
        plan = explicit(self.load(checkpoint), "nf4", "int8")
        with pytest.raises(ValueError, match=r"the plan stores 7 linears in int8, .* load the model without a quant"):
            adaptq_bnb_config(config(precision=plan), checkpoint)
        adapted = explicit(self.load(checkpoint), "int8", blocks=[1, 3])
        assert adaptq_bnb_config(config(precision={**explicit(self.load(checkpoint), "nf4"), **adapted}), checkpoint)
        with pytest.raises(ValueError, match=r'quantization is "auto" and precision is None: the plan is measured on'):
            adaptq_bnb_config(config(), checkpoint)

    def test_a_model_that_arrived_in_4_bits(self, checkpoint, batch):
        split = self.load(checkpoint, quantization_config=adaptq_bnb_config([1, 3], checkpoint))
        with pytest.raises(ValueError, match="this LlamaForCausalLM has quantized linears already"):
            made(copy.deepcopy(split))
        with pytest.raises(
            ValueError, match=r"q_proj is in nf4 with nested absmax instead of int8\. Load the base in 16"
        ):
            made(copy.deepcopy(split), precision=explicit(split, "int8"))
        wrapped = made(split, precision=explicit(self.load(checkpoint), "nf4", "none"))
        whole = self.load(checkpoint)
        assert torch.equal(
            logits(wrapped, batch), logits(made(whole, precision=explicit(whole, "nf4", "none")), batch)
        )

    @pytest.mark.parametrize("given", [True, False])
    def test_planned_memory(self, checkpoint, given):
        model = self.load(checkpoint)
        fields = {"precision": explicit(model, "nf4", "int8", "none")} if given else {"weight_budget": "9 bits"}
        planned = plan_memory(checkpoint, config(**fields))
        wrapped = made(model, **fields)
        measured, weights = measure_weight_bytes(wrapped), planned.methods["ADAPTQ"].weights
        if given:
            assert weights == measured
        assert weights.block_linears == pytest.approx(measured.block_linears, rel=0.05)

    def test_a_model_without_weights(self, checkpoint):
        loaded = self.load(checkpoint)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(loaded.config)
        with pytest.raises(ValueError, match="this LlamaForCausalLM is on the meta device and has no weights"):
            made(model)


class TestSelection:
    def test_the_blocks_that_suffer_most_are_adapted_and_the_profile_says_so(self, model, samples, tmp_path):
        with torch.no_grad():  # larger weights: larger errors
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2 and any(f".{block}." in name for block in (0, 2)):
                    parameter.mul_(4)
        fields = {"selection_strategy": "sensitivity", "calibration_data": samples, "num_adapted_blocks": 2}
        wrapped = get_peft_model(model, AdaptQConfig(task_type="CAUSAL_LM", **fields))
        found = wrapped.peft_config["default"]
        assert found.layers_to_transform == [0, 2]
        sensitivity = found.profile.sensitivity
        assert min(sensitivity[0], sensitivity[2]) > max(sensitivity[1], sensitivity[3]) > 0
        wrapped.save_pretrained(tmp_path)
        assert AdaptQConfig.from_pretrained(tmp_path).profile == found.profile
        assert "| block | magnitude | update | sensitivity |" in (tmp_path / "README.md").read_text()

    def test_a_compiled_model_is_measured_as_it_is(self, llama, samples):
        """Its blocks have `_orig_mod.` in their names."""
        config = AdaptQConfig(selection_strategy="sensitivity", calibration_data=samples)
        expected = measure_block_sensitivity(llama, find_blocks(llama), config)
        compiled = torch.compile(llama, backend="eager")
        assert measure_block_sensitivity(compiled, find_blocks(compiled), config) == pytest.approx(expected)

    def test_what_is_left_in_16_bits_does_not_count(self, llama, samples):
        skipping = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["mlp", "q_proj", "k_proj", "v_proj"])
        found = []
        for quantization in (skipping, BitsAndBytesConfig(load_in_8bit=True)):
            config = AdaptQConfig(quantization=quantization, calibration_data=samples)
            found.append(measure_block_sensitivity(llama, find_blocks(llama), config))
        assert all(0 < few < all_of_them for few, all_of_them in zip(*found, strict=True))

    def test_it_is_the_sum_over_the_linears_of_a_block(self, llama, samples):
        fields = {"selection_strategy": "activation+sensitivity", "calibration_data": samples}
        wrapped = get_peft_model(copy.deepcopy(llama), AdaptQConfig(task_type="CAUSAL_LM", **fields))
        profile = wrapped.peft_config["default"].profile
        blocks = find_blocks(llama)
        linears = {name: m for b in blocks for name, m in b.module.named_modules(prefix=b.name) if name[-4:] == "proj"}
        candidates = {name: {"nf4": quantize_linear(m, resolve_quantization("nf4"))} for name, m in linears.items()}
        rises = measure_sensitivity(llama, candidates, sensitivity_batches(llama, AdaptQConfig()))
        for block in blocks:
            expected = sum(rises[name]["nf4"] for name in rises if name.startswith(f"{block.name}."))
            assert profile.sensitivity[block.index] == pytest.approx(expected, rel=1e-5)

    def test_block_1_has_its_own_beside_block_10(self, make_model, monkeypatch):
        def measure(model, candidates, batches):
            return {name: {"rounded": 1.0} for name in candidates}

        monkeypatch.setattr("adaptq_peft.precision.sensitivity_batches", lambda *args: [])
        monkeypatch.setattr("adaptq_peft.precision.measure_sensitivity", measure)
        model = make_model(num_layers=12)
        assert measure_block_sensitivity(model, find_blocks(model), AdaptQConfig()) == [7.0] * 12

    def test_it_is_measured_on_general_text(self, llama, monkeypatch):
        seen, tokenizer = [], str.split

        def note(model, *data, **options):
            seen.append((data, options["tokenizer"]))

        monkeypatch.setattr("adaptq_peft.precision.mixed_calibration_batches", note)
        fields = {"general_calibration_data": ["b"], "calibration_tokenizer": tokenizer}
        sensitivity_batches(llama, AdaptQConfig(calibration_data=["a"], **fields))
        sensitivity_batches(llama, AdaptQConfig(calibration_data=["a"]))
        assert seen == [((["b"],), tokenizer), ((None,), None)]

    def test_a_profile_without_it_is_completed(self, llama, samples, monkeypatch):
        profile = profile_activations(llama, samples)
        monkeypatch.setattr("adaptq_peft.plan.profile_activations", None)
        fields = {"selection_strategy": "sensitivity", "profile": profile, "quantization": "none"}
        wrapped = get_peft_model(llama, AdaptQConfig(task_type="CAUSAL_LM", **fields))
        found = wrapped.peft_config["default"].profile
        assert found.magnitude == profile.magnitude
        assert len(found.sensitivity) == 4

    def test_both_the_blocks_and_the_plan(self, llama, samples):
        fields = {"layers_to_transform": None, "selection_strategy": "sensitivity", "calibration_data": samples}
        wrapped = made(llama, **fields)
        assert len(precision_of(wrapped)) == 14

    def test_a_model_with_quantized_linears_can_not_be_measured(self, llama, samples):
        wrapped = get_peft_model(llama, AdaptQConfig(layers_to_transform=[0, 1]))
        with pytest.raises(ValueError, match="The sensitivity of the blocks is measured on the original model, and"):
            wrapped.add_adapter("other", AdaptQConfig(selection_strategy="sensitivity", calibration_data=samples))


def test_merge_and_unload(model, batch):
    base = copy.deepcopy(model)
    wrapped = made(model, original_weights="keep")
    expected = logits(wrapped, batch)
    merged = copy.deepcopy(wrapped).merge_and_unload()
    assert not any(is_quantized(module) for module in merged.modules())
    torch.testing.assert_close(logits(merged, batch), expected, rtol=0.05, atol=0.02)  # int8 rounds its input, too
    assert torch.equal(logits(wrapped.unload(), batch), logits(base, batch))


def test_a_model_without_a_head(llama, samples):
    bare = LlamaModel(llama.config)
    fields = {
        "layers_to_transform": [1],
        "quantization": "auto",
        "weight_budget": "6 bits",
        "calibration_data": samples,
    }
    with pytest.raises(ValueError, match="the output of LlamaModel has no logits"):
        get_peft_model(bare, AdaptQConfig(**fields))


def test_all_blocks_adapted(llama, tmp_path):
    base = copy.deepcopy(llama)
    made(llama, layers_to_transform=[0, 1, 2, 3]).save_pretrained(tmp_path)
    assert precision_of(PeftModel.from_pretrained(base, tmp_path)) == {}


def test_the_model_card_shows_the_plan(llama, tmp_path):
    made(llama, precision=explicit(llama, "nf4", "nf4", "int8", "none"), weight_budget="6.5 bits").save_pretrained(
        tmp_path
    )
    text = (tmp_path / "README.md").read_text()
    assert (
        "| frozen blocks | linears by plan: 8 in NF4 with nested absmax, 3 in LLM.int8(), 3 in the base's precision |"
    ) in text
    assert "| budget of the plan | 6.5 bits a weight |" in text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight_budget": None}, r'quantization "auto" needs a weight_budget, such as "5\.0 bits"'),
        ({"weight_budget": 5.0}, r'weight_budget is 5\.0; allowed: bytes as an integer above 0, "1\.5GiB"'),
        ({"quantization": "nf4"}, r"weight_budget and precision are for quantization 'auto'; quantization is 'nf4'"),
        ({"precision": {"a": "fp4"}}, r"precision has 'fp4'; allowed: None or a dict, names of linears to one of"),
        ({"precision": "nf4"}, r"precision has 'nf4'; allowed: None or a dict, names"),
        ({"original_weights": "dequantized"}, r'original_weights "dequantized" rounds adapted blocks, too, for which'),
    ],
)
def test_invalid_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        AdaptQConfig(**{"quantization": "auto", "weight_budget": "6.5 bits", **fields})


def test_an_encoder_decoder_with_domain_text(samples):
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    t5 = T5ForConditionalGeneration(T5Config(**sizes, vocab_size=96, decoder_start_token_id=0))
    wrapped = get_peft_model(t5, config(layers_to_transform=[3], task_type=None, calibration_data=samples))
    assert {name.split(".")[0] for name in precision_of(wrapped)} == {"encoder", "decoder"}
    assert {"nf4", "int8"} <= set(precision_of(wrapped).values())


def test_a_model_that_can_not_write_text_needs_some():
    bert = BertForMaskedLM(
        BertConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    )
    with pytest.raises(ValueError, match="can't write its own calibration text"):
        get_peft_model(bert, AdaptQConfig(layers_to_transform=[1], quantization="auto", weight_budget="6 bits"))
