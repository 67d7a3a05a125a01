"""Each method builds, trains and is measured on a tiny Llama; and each is what its name says."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from peft.tuners.lora import LoraLayer

from adaptq_peft import register_selection_strategy
from adaptq_peft.comparison import training
from adaptq_peft.comparison.methods import Inputs, method_names, quantize_lower_blocks, resolve_methods
from adaptq_peft.comparison.records import Run
from adaptq_peft.comparison.training import results, train_run
from adaptq_peft.quantization import is_quantized
from adaptq_peft.selection import strategies

pytestmark = pytest.mark.filterwarnings("ignore:Profiled 8 calibration samples")
MAIN = [method.name for method in resolve_methods(["main"])]


def save_nothing(run, model):
    """Adapters of these runs are not kept."""


def run_of(name: str, rate: float = 1e-3) -> Run:
    (method,) = resolve_methods([name])
    return Run(method, 8 if method.is_trained else 0, rate, seed=0)


@pytest.fixture
def trained(load, windows, measurements, settings, untrained):
    """`trained(run)`: the model after two steps, and its record."""

    def train(run, **changes):
        arguments = (load, windows, measurements, settings(**changes), lambda step, loss: None, untrained)
        model = train_run(run, *arguments, steps=2)
        ((_, record),) = results(model, [run], load, measurements, settings(**changes), save_nothing)
        return record

    return train


# The model writes text for those without general text, which takes seconds: one of each recipe is enough.
WRITTEN = {"adaptq-recipe-written-budget", "adaptq-recipe-4bit-written-one-sided-budget"}


@pytest.mark.parametrize("name", [name for name in MAIN if "-written" not in name or name in WRITTEN])
def test_each_main_method_trains_and_is_measured(name, trained):
    record = trained(run_of(name))
    assert record["failure"] is None
    general, domain = record["test"]["general"], record["test"]["domain"]
    assert general["degradation"] == pytest.approx(general["adapted"] / general["base"] - 1)
    assert general["quantization"] + general["training"] == pytest.approx(general["degradation"])
    quantizes = name.startswith(("adaptq", "qlora", "quantize")) or name == "lora-quantize"
    assert (general["quantized"] != general["base"]) == quantizes
    assert (domain["adapted"] != domain["quantized"]) == (name != "vanilla")
    assert len(record["losses"]) == (0 if name == "vanilla" else 2)
    assert record["finish"].get("feasible") in ((True, False) if name.endswith("-budget") else (None,))


@pytest.mark.parametrize(
    ("name", "has_general", "anchor"),
    [
        ("adaptq-recipe", True, {"answers": "on general", "one_sided": True}),
        ("adaptq-recipe-written", False, {"answers": "on written", "one_sided": True}),
        ("adaptq-recipe-4bit", True, {"answers": "on general", "one_sided": False}),
        ("lora-one-sided-budget", True, {"answers": "on general", "one_sided": True}),
        ("adaptq-recipe-4bit-unanchored", True, None),
        ("adaptq-recipe-4bit-written", False, {"answers": "on written", "one_sided": False}),
        ("adaptq-recipe-4bit-written-one-sided", False, {"answers": "on written", "one_sided": True}),
    ],
)
def test_the_general_text_and_anchor_of_a_method(name, has_general, anchor, load, windows, settings, monkeypatch):
    general = [{"input_ids": [1, 2, 3]}]
    answers = {"answers_on_general": "on general", "answers_on_written": "on written"}
    measurements = SimpleNamespace(general_samples=general, **answers)
    model, seen = load(), {}

    def prepare(run, base, inputs):
        seen.update(general=inputs.general)
        return model, 0.0

    def callback(answers, seed, **options):
        assert seed == 0
        seen["anchor"] = {"answers": answers, **options}

    monkeypatch.setattr(training, "PreservationCallback", callback)
    monkeypatch.setattr(training, "train", lambda model, samples, **options: [1.0])
    monkeypatch.setattr(training, "_StepTimer", lambda: SimpleNamespace(seconds=[1.0]))
    arguments = (load, windows, measurements, settings(), lambda step, loss: None, SimpleNamespace(prepare=prepare))
    train_run(run_of(name), *arguments)
    assert seen["general"] == (general if has_general else [])
    assert seen.get("anchor") == anchor


@pytest.fixture
def asked(windows, measurements, settings, untrained, monkeypatch):
    """`asked(run, load, **settings)`: the model and the options that it would be trained with."""
    seen = {}
    monkeypatch.setattr(
        training, "train", lambda model, samples, **options: seen.update(options, model=model) or [1.0]
    )
    monkeypatch.setattr(training, "_StepTimer", lambda: SimpleNamespace(seconds=[1.0]))

    def prepare(run, load, **changes):
        train_run(run, load, windows, measurements, settings(**changes), lambda step, loss: None, untrained)
        return seen

    return prepare


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.bfloat16), (torch.float32, None)])
def test_full_fine_tuning_computes_in_the_dtype_of_the_base(load, dtype, expected, asked):
    options = asked(run_of("full"), lambda: load().to(dtype))
    assert options["autocast"] == expected
    assert {p.dtype for p in options["model"].parameters()} == {torch.float32}


def test_training_is_that_of_the_run_and_the_settings(load, asked):
    options = asked(run_of("lora-paper", rate=7e-4), load, weight_decay=0.3, batch_size=2)
    found = [options[name] for name in ("learning_rate", "accumulation", "weight_decay", "batch_size")]
    assert found == [7e-4, 4, 0.3, 2]


def test_the_budget_is_that_of_the_settings(trained):
    assert trained(run_of("lora-budget"), budget=0.5)["finish"]["budget"] == 0.5


@pytest.mark.parametrize("name", [name for name in method_names() if name not in MAIN])
def test_each_ablation_prepares_a_model(name, load, windows, measurements, monkeypatch):
    monkeypatch.setattr("adaptq_peft.precision.SEQUENCES", 4)
    (method,) = resolve_methods([name])
    samples = [{"input_ids": window["input_ids"].tolist()} for window in windows[:8]]
    model = method.build(load(), Inputs(samples, measurements.general_samples, 0), **method.options)
    quantized = any(is_quantized(module) for module in model.modules())
    assert quantized == (name != "ratio-100" and not name.startswith("frozen-none"))


@pytest.mark.parametrize("name", ["full", "lora", "adaptq-50-mixed"])
def test_the_trained_change_is_scaled_and_put_back(
    name, load, windows, measurements, settings, untrained, monkeypatch
):
    monkeypatch.setattr(measurements, "_settings", settings(scales=(0.0, 0.5)))
    run, arguments = run_of(name, rate=0.02), (load, windows, measurements, settings(), lambda step, loss: None)
    trained = train_run(run, *arguments, untrained, steps=2)
    before = {key: value.clone() for key, value in trained.model.state_dict().items()}
    ((_, record),) = results(trained, [run], load, measurements, settings(), save_nothing)
    for text in ("general", "domain"):
        nothing, half = (record["scaled"][factor][text] for factor in ("0", "0.5"))
        figures = record["test"][text]
        assert nothing == pytest.approx(figures["quantized"])
        assert len({nothing, half, figures["adapted"]}) == 3
    after = measurements.report(trained.model)
    assert after.degradation == record["test"]["general"]["degradation"]
    assert all(torch.equal(value, before[key]) for key, value in trained.model.state_dict().items())


def test_what_can_not_be_scaled_has_no_scales(trained, measurements, settings, monkeypatch):
    monkeypatch.setattr(measurements, "_settings", settings(scales=(0.5,)))
    assert "scaled" not in trained(run_of("osf"))
    assert "scaled" not in trained(run_of("vanilla"))


def test_quantizing_after_training_compares_with_the_untrained_base_in_the_same_codes(trained):
    after = trained(run_of("lora-quantize"))["test"]["general"]
    before = trained(run_of("quantize-lora"))["test"]["general"]
    assert after["quantized"] == pytest.approx(before["quantized"])
    assert after["adapted"] != after["quantized"]


def test_diverged_training_is_recorded_not_raised(load, windows, measurements, settings, untrained):
    run, arguments = run_of("lora"), (load, windows, measurements, settings(), lambda step, loss: None, untrained)
    trained = train_run(run, *arguments, steps=1)
    next(p for p in trained.model.parameters() if p.requires_grad).data.fill_(float("nan"))
    ((_, measured),) = results(trained, [run], load, measurements, settings(), save_nothing)
    trained.losses = [float("inf")]
    ((_, seen_in_training),) = results(trained, [run], load, measurements, settings(), save_nothing)
    broken = train_run(run_of("lora", rate=1e30), *arguments, steps=2)
    runs = [run_of("lora"), run_of("lora-budget"), run_of("lora-quantize")]
    finished = [record for _, record in results(broken, runs, load, measurements, settings(), save_nothing)]
    assert len(finished) == 3
    for record in (measured, seen_in_training, *finished):
        assert record["failure"] == "its loss is not a finite number"
        assert record["validation"] == {"domain": None, "general": None}
        assert record["test"] is None


def test_a_loss_that_is_not_a_number_is_recorded_as_such(load, windows, measurements, settings, untrained):
    arguments = (load, windows, measurements, settings(), lambda step, loss: None, untrained)
    losses = train_run(run_of("lora", rate=1e30), *arguments, steps=3).losses
    assert [math.isfinite(loss) for loss in losses] == [True, True, False]  # the first step is of the warmup


def test_kappatune_adapts_the_fifth_of_the_linears_with_the_lowest_condition_numbers(load):
    base = load()
    linears = {n: m for n, m in base.model.layers.named_modules() if isinstance(m, torch.nn.Linear)}
    kappa = {n: float(torch.linalg.cond(m.weight.detach())) for n, m in linears.items()}
    model = run_of("kappatune").method.build(base, Inputs([], [], 0), r=2, lora_alpha=4, share=0.2)
    found = {
        n.removeprefix("base_model.model.model.layers.") for n, m in model.named_modules() if isinstance(m, LoraLayer)
    }
    assert found == set(sorted(kappa, key=kappa.get)[: int(0.2 * len(kappa))])


@pytest.mark.parametrize(("share", "blocks"), [(0.5, {0, 1}), (0.3, {0, 1}), (1.0, {0, 1, 2, 3})])
def test_lower_blocks_are_quantized_as_adaptq_freezes_them(load, share, blocks):
    model = load()
    quantize_lower_blocks(model, share)
    found = {int(name.split(".")[2]) for name, module in model.named_modules() if is_quantized(module)}
    assert found == blocks


def test_methods_that_are_the_same_share_their_training():
    trainings = {name: resolve_methods([name])[0].training for name in method_names()}
    same = ("adaptq-50", "select-activation", "ratio-50", "frozen-nf4")
    assert len({trainings[name] for name in same}) == 1
    assert trainings["scaling-0.125"] == trainings["adaptq-recipe-4bit-unanchored"] != trainings["scaling-0.25"]
    assert trainings["lora"] == trainings["lora-quantize"]
    assert trainings["lora"] != trainings["lora-qv"]


def test_methods_of_one_training_do_not_see_each_others_changes(load, windows, measurements, settings, untrained):
    runs = [run_of(name, rate=0.05) for name in ("lora-quantize", "lora-budget", "lora")]
    arguments = (load, windows, measurements, settings(budget=0.0), lambda step, loss: None, untrained)

    def finished(asked):
        trained = train_run(runs[0], *arguments, steps=4)
        found = results(trained, asked, load, measurements, arguments[3], save_nothing)
        return {str(run): record["test"] for run, record in found}

    together = finished(runs)
    assert list(together) == [str(run) for run in reversed(runs)]
    assert together == {name: test for run in runs for name, test in finished([run]).items()}
    plain, budget, quantized = (test["general"]["adapted"] for test in together.values())
    assert budget != plain != quantized


def test_written_out_options_are_the_defaults_of_the_config():
    from adaptq_peft import AdaptQConfig

    config, options = AdaptQConfig(), run_of("adaptq-default").method.options
    assert options == {name: getattr(config, name) for name in options}


@pytest.mark.parametrize("name", method_names())
def test_alpha_of_lora_is_twice_its_rank(name):
    options = run_of(name).method.options
    assert "lora_alpha" not in options or options["lora_alpha"] == 2 * options["r"]


def test_rates_of_full_rank_and_of_fixed_recipes():
    searched = (1e-4, 4e-4)
    assert run_of("full").method.rates(searched) == (0.25e-4, 1e-4)
    assert run_of("lora").method.rates(searched) == searched
    assert run_of("adaptq-paper").method.rates(searched) == (5e-5,)
    assert run_of("lora-paper").method.rates(searched) == (2e-4,)


def test_new_selection_strategies_are_methods(monkeypatch):
    monkeypatch.setattr(strategies, "_REGISTRY", dict(strategies._REGISTRY))
    register_selection_strategy("by-taste", needs="none")(lambda request: [0.0] * request.num_blocks)
    assert "select-by-taste" in method_names()


def test_unknown_method_is_named_with_what_is_allowed():
    with pytest.raises(ValueError, match=r"unknown methods \['lroa'\]; allowed are the groups \['main', .*'lora'"):
        resolve_methods(["lora", "lroa"])
