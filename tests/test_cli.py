"""The command line: passes its options on, and turns known errors into a message and exit code 1."""

from __future__ import annotations

import json
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from adaptq_peft import AdaptQConfig, autoload, profile_activations
from adaptq_peft.cli import app
from adaptq_peft.cli_tables import show_memory_plan
from adaptq_peft.demo import run
from adaptq_peft.demo.reload import ReloadError
from adaptq_peft.evaluation import MemoryPlan, MethodMemory, WeightBytes, plan_memory

RUNNER = CliRunner(env={"COLUMNS": "120", "NO_COLOR": "1"})


@pytest.fixture
def settings_seen(monkeypatch):
    seen = []
    monkeypatch.setattr(run, "run_demo", seen.append)
    return seen


def test_help_lists_the_demo():
    result = RUNNER.invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "demo" in result.output


def test_no_arguments_show_the_help():
    assert "demo" in RUNNER.invoke(app, []).output


def test_demo_options_reach_the_settings(settings_seen):
    result = RUNNER.invoke(app, ["demo", "--output-dir", "out", "--steps", "7", "--seed", "3", "--ratio", "0.25"])
    assert result.exit_code == 0, result.output
    (settings,) = settings_seen
    assert (settings.output_dir, settings.steps, settings.seed, settings.ratio) == (Path("out"), 7, 3, 0.25)


def test_demo_without_calibration(settings_seen):
    RUNNER.invoke(app, ["demo", "--no-calibrate"])
    assert settings_seen == [run.DemoSettings(quantization_calibration=None)]


def test_defaults_are_those_of_the_settings(settings_seen):
    RUNNER.invoke(app, ["demo"])
    assert settings_seen == [run.DemoSettings()]


def test_bad_ratio_is_a_usage_error(settings_seen):
    result = RUNNER.invoke(app, ["demo", "--ratio", "1.5"])
    assert result.exit_code == 2
    assert "ratio=1.5, must be in (0, 1]" in result.output
    assert settings_seen == []


@pytest.mark.parametrize(
    ("arguments", "option", "given", "example"),
    [
        (["compare", "--samples", "50,x"], "--samples", "50,x", "50,500"),
        (["compare", "--samples", "0.5"], "--samples", "0.5", "50,500"),
        (["compare", "--rates", "1e-4;2e-4"], "--rates", "1e-4;2e-4", "1e-4,2e-4"),
        (["compare", "--scales", "half"], "--scales", "half", "0.3,0.5"),
        (["plan", "no-model", "--blocks", "1-4"], "--blocks", "1-4", "14,15"),
        (["quantize-base", "no-model", "--output", "out", "--blocks", ""], "--blocks", "", "14,15"),
    ],
)
def test_numbers_that_are_none_are_a_usage_error_that_names_the_option(arguments, option, given, example):
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code == 2
    said = " ".join(result.output.replace("\u2502", " ").split())
    numbers = "numbers" if option in ("--rates", "--scales") else "whole numbers"
    assert f"Invalid value for {option}: {given!r}; allowed: {numbers} with commas between, such as {example}" in said


def test_package_missing_on_import_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "adaptq_peft.demo.run", None)
    result = RUNNER.invoke(app, ["demo"])
    assert result.exit_code == 1
    assert 'pip install "adaptq_peft[demo]"' in result.output


@pytest.mark.parametrize("error", [ReloadError("differs"), ModuleNotFoundError("pip install it")])
def test_known_errors_are_a_message_and_a_code(monkeypatch, error):
    def fail(settings):
        raise error

    monkeypatch.setattr(run, "run_demo", fail)
    result = RUNNER.invoke(app, ["demo"])
    assert result.exit_code == 1
    assert f"Error: {error}" in result.output


@pytest.fixture
def checkpoint(make_model, tmp_path):
    """A tiny Llama with a tokenizer that knows eight words."""
    make_model().save_pretrained(tmp_path / "model")
    words = {word: index for index, word in enumerate(["[UNK]", "law", "court", "judge", "rain", "wind", "sun", "."])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("law court judge .\nrain wind sun\n" * 30)
    return str(file)


def test_plan_prints_tables(checkpoint):
    result = RUNNER.invoke(app, ["plan", checkpoint, "--blocks", "1,3"])
    assert result.exit_code == 0, result.output
    assert "Stored: 0.001 GiB in float32" in result.output
    assert "Not as in config.json" not in result.output
    for expected in ("2 of 4 blocks adapted", "ADAPTQ", "QLoRA", "full fine-tuning", "paged_adamw_8bit", "0.6250"):
        assert expected in result.output


def test_the_tables_of_a_plan_show_each_figure_in_its_place():
    weights = WeightBytes(quantized_linears=1 << 30, dense_linears=2 << 30, adapters=3 << 30, other=4 << 30)
    method = MethodMemory(weights, trained_parameters=5_000_000, gradients=6 << 30, optimizer_states={"sgd": 7 << 30})
    plan = MemoryPlan(
        num_blocks=4,
        adapted=[3],
        dtype="bfloat16",
        methods={"ADAPTQ": method},
        unquantized=weights,
        paper_ratio=0.4,
        planned_ratio=0.5,
        peak_in_memory=8 << 30,
        peak_presplit=9 << 30,
    )
    show_memory_plan(Console(file=(out := StringIO()), width=160), "m", plan)
    shown = out.getvalue()
    rows = [line.split("\u2502")[1:3] for line in shown.splitlines() if line.startswith("\u2502")]
    assert {name.strip(): figure.strip() for name, figure in rows} == {
        "trained parameters": "5.0 M",
        "linears of the blocks, quantized": "1.000 GiB",
        "linears of the blocks, others": "2.000 GiB",
        "trained beside the weights": "3.000 GiB",
        "everything else of the model": "4.000 GiB",
        "gradients": "6.000 GiB",
        "sgd: states": "7.000 GiB",
        "in all": "23.000 GiB",
    }
    assert "0.5000 planned, 0.4000 by the" in shown
    assert "8.000 GiB if the model is loaded whole, 9.000 GiB if it is loaded split" in shown


def test_plan_says_where_the_weights_are_not_those_of_the_config(checkpoint):
    config = Path(checkpoint) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 3}))
    result = RUNNER.invoke(app, ["plan", checkpoint])
    assert (
        "Not as in config.json: 9 stored tensors are none of the model's, the first: model.layers.3" in result.output
    )
    (Path(checkpoint) / "model.safetensors").unlink()
    result = RUNNER.invoke(app, ["plan", checkpoint])
    assert "No safetensors headers at hand: dtype and shapes are those of config.json." in result.output


@pytest.mark.parametrize(
    ("options", "fields", "ranks"),
    [
        (
            ["--num-blocks", "1", "--quantization", "int8", "--frozen-rank", "2"],
            {"num_adapted_blocks": 1, "quantization": "int8", "frozen_rank": 2},
            {},
        ),
        (
            ["--num-blocks", "1", "--quantization", "auto", "--weight-budget", "6 bits"],
            {"num_adapted_blocks": 1, "quantization": "auto", "weight_budget": "6 bits"},
            {},
        ),
        (
            ["--ratio", "0.25", "--delta-dtype", "bfloat16", "--lora-rank", "2", "--galore-rank", "3"],
            {"selection_ratio": 0.25, "delta_dtype": "bfloat16"},
            {"lora_rank": 2, "galore_rank": 3},
        ),
    ],
)
def test_plan_as_json_is_that_of_the_function(checkpoint, options, fields, ranks):
    result = RUNNER.invoke(app, ["plan", checkpoint, *options, "--json"])
    assert result.exit_code == 0, result.output
    config = AdaptQConfig(**{"delta_dtype": "float32", **fields})
    assert json.loads(result.output) == plan_memory(checkpoint, config, **ranks).to_dict()


def test_plan_with_a_budget(checkpoint):
    result = RUNNER.invoke(app, ["plan", checkpoint, "--budget", "1GiB", "--json"])
    assert json.loads(result.output)["adapted"] == [0, 1, 2, 3]
    result = RUNNER.invoke(app, ["plan", checkpoint, "--budget", "1KB"])
    assert result.exit_code == 1
    assert "Error: a budget of 1,000 bytes does not fit one adapted block" in result.output


@pytest.mark.parametrize("optimizer", ["sgd", "galore_adamw"])
def test_the_budget_of_a_plan_is_for_the_optimizer_that_is_given(checkpoint, optimizer):
    needed = plan_memory(checkpoint, AdaptQConfig(num_adapted_blocks=2), galore_rank=2).methods["ADAPTQ"]
    budget = ["--budget", f"{needed.training(optimizer) / 1000}KB"]
    options = [*budget, "--optimizer", optimizer, "--galore-rank", "2", "--json"]
    result = RUNNER.invoke(app, ["plan", checkpoint, *options])
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.output)["adapted"]) == 2


@pytest.mark.parametrize("budget", [[], ["--budget", "1GiB"]])
def test_plan_refuses_an_unknown_optimizer(checkpoint, budget):
    result = RUNNER.invoke(app, ["plan", checkpoint, "--optimizer", "lion", *budget])
    assert result.exit_code == 1
    assert "Error: optimizer is 'lion'; known are ['adamw_torch'" in result.output


@pytest.mark.parametrize("other", [["--num-blocks", "1"], ["--blocks", "0,1"]])
def test_plan_refuses_two_ways_to_say_how_many_blocks(checkpoint, other):
    result = RUNNER.invoke(app, ["plan", checkpoint, "--budget", "3MiB", *other])
    assert result.exit_code == 2
    assert f"{other[0]} and --budget each say how many blocks" in " ".join(result.output.split())


def test_profile_refuses_a_folder_as_output_and_makes_the_one_around_it(checkpoint, texts, tmp_path):
    result = RUNNER.invoke(app, ["profile", checkpoint, "--data", texts, "--output", str(tmp_path)])
    assert result.exit_code == 2
    assert "is a folder; give the name of a file" in " ".join(result.output.replace("\u2502", " ").split())
    output = tmp_path / "new" / "profile.json"
    result = RUNNER.invoke(app, ["profile", checkpoint, "--data", texts, "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert output.is_file()


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_profile_writes_what_a_config_reads(checkpoint, texts, tmp_path, stream):
    output = str(tmp_path / "profile.json")
    options = ["--data", texts, "--general", texts, "--output", output, "--strategy", "contrast"]
    result = RUNNER.invoke(app, ["profile", checkpoint, *options, *stream])
    assert result.exit_code == 0, result.output
    assert result.output.count("adapted") == result.output.count("quantized") == 2
    assert "on general text" in result.output
    assert result.output.count("magnitude") == 2  # of numbers and, as "contrast" is no column, of bars
    profile = AdaptQConfig(profile=output, selection_strategy="contrast").profile
    assert profile.num_samples == 60
    assert profile.magnitude == profile.general_magnitude
    assert profile == profile_activations(AutoModelForCausalLM.from_pretrained(checkpoint), texts, general_data=texts)


@pytest.mark.filterwarnings("ignore:Profiled 3 calibration samples")
def test_profile_options_reach_the_profile_and_the_table(checkpoint, texts, tmp_path):
    output = str(tmp_path / "profile.json")
    options = ["--samples", "3", "--max-length", "2", "--batch-size", "1", "--ratio", "0.25", "--strategy", "first"]
    result = RUNNER.invoke(app, ["profile", checkpoint, "--data", texts, "--output", output, *options])
    assert result.exit_code == 0, result.output
    profile = AdaptQConfig(profile=output).profile
    assert (profile.num_samples, profile.num_tokens) == (3, 6)
    rows = [line.split() for line in result.output.splitlines() if line.strip()[:1].isdigit()]
    assert [(row[0], row[-1]) for row in rows] == [("0", "adapted"), *((block, "quantized") for block in "123")]


def test_profile_with_a_strategy_that_needs_general_text(checkpoint, texts):
    result = RUNNER.invoke(app, ["profile", checkpoint, "--data", texts, "--strategy", "contrast"])
    assert result.exit_code == 1
    assert "pass general_calibration_data too" in result.output.replace("\n", " ")


def test_quantize_base_writes_what_a_config_reads(checkpoint, texts, tmp_path):
    output = str(tmp_path / "quantized")
    options = ["--data", texts, "--general", texts, "--blocks", "0,2", "--calibration", "absmax", "--tokens", "300"]
    result = RUNNER.invoke(app, ["quantize-base", checkpoint, "--output", output, *options])
    assert result.exit_code == 0, result.output
    file = tmp_path / "quantized" / "quantized_base.safetensors"
    assert f"14 linears in nf4, {file.stat().st_size:,} bytes" in result.output
    assert "calibrated by 'absmax' on" in result.output
    assert "tokens: texts.txt, texts.txt, written by the model" in result.output
    assert f'AdaptQConfig(quantized_base="{output}")' in result.output
    assert "An adapter has to adapt all blocks but these: 0, 2" in result.output
    config = AdaptQConfig(layers_to_transform=[1, 3], quantized_base=output)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), config)
    assert len(model.base_model.quantization_report.swapped) == 14


def test_quantize_base_says_how_to_use_fp4(checkpoint, texts, tmp_path):
    output = str(tmp_path / "quantized")
    options = ["--data", texts, "--quantization", "fp4", "--calibration", "absmax", "--tokens", "300"]
    result = RUNNER.invoke(app, ["quantize-base", checkpoint, "--output", output, *options])
    assert result.output.splitlines()[-1].endswith(f'AdaptQConfig(quantized_base="{output}", quantization="fp4")')


def test_quantize_base_takes_a_sample_of_each_kind_at_least(checkpoint, texts, tmp_path):
    options = ["--data", texts, "--calibration", "absmax", "--blocks", "0", "--tokens", "1"]
    result = RUNNER.invoke(app, ["quantize-base", checkpoint, "--output", str(tmp_path / "quantized"), *options])
    assert result.exit_code == 0, result.output


@pytest.fixture
def devices(monkeypatch):
    """The devices that models are loaded on, and the model on the CPU whatever they are."""
    seen = []
    load = LlamaForCausalLM.from_pretrained

    def on_cpu(name, device_map):
        seen.append(device_map)
        return load(name)

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", on_cpu)
    return seen


def test_models_run_on_the_accelerator_or_the_device_that_is_given(checkpoint, texts, tmp_path, monkeypatch, devices):
    monkeypatch.setattr("adaptq_peft.offloading.accelerator_or_cpu", lambda: torch.device("xpu"))
    options = ["--data", texts, "--output", str(tmp_path / "profile.json")]
    for device in ([], ["--device", "cpu"]):
        result = RUNNER.invoke(app, ["profile", checkpoint, *options, *device])
        assert result.exit_code == 0, result.output
    options = ["--output", str(tmp_path / "base"), "--calibration", "absmax", "--tokens", "300"]
    for device in ([], ["--device", "cpu"]):
        result = RUNNER.invoke(app, ["quantize-base", checkpoint, *options, *device])
        assert result.exit_code == 0, result.output
    assert list(map(str, devices)) == ["xpu", "cpu", "xpu", "cpu"]


@pytest.mark.parametrize("device", ["xpu", "nonsense"])
def test_a_device_that_is_not_there_is_a_usage_error(checkpoint, texts, tmp_path, device):
    options = ["--data", texts, "--output", str(tmp_path / "new"), "--device", device]
    for command in ("profile", "quantize-base"):
        result = RUNNER.invoke(app, [command, checkpoint, *options])
        assert result.exit_code == 2
        assert f"{device!r} can't be used here" in result.output
    result = RUNNER.invoke(app, ["profile", checkpoint, *options, "--stream"])
    assert result.exit_code == 2
    assert "leave --device out" in " ".join(result.output.replace("\u2502", " ").split())


@pytest.mark.gpu
def test_profile_and_quantize_base_on_the_gpu(checkpoint, texts, tmp_path):
    options = ["--data", texts, "--output", str(tmp_path / "profile.json")]
    assert RUNNER.invoke(app, ["profile", checkpoint, *options]).exit_code == 0
    options = ["--output", str(tmp_path / "base"), "--tokens", "300"]
    result = RUNNER.invoke(app, ["quantize-base", checkpoint, *options])
    assert result.exit_code == 0, result.output
    assert torch.cuda.max_memory_allocated() > 0


def test_quantize_base_says_what_is_wrong(checkpoint, tmp_path):
    result = RUNNER.invoke(app, ["quantize-base", checkpoint, "--output", str(tmp_path), "--blocks", "9"])
    assert result.exit_code == 1
    assert "Error: blocks [9] are not in the model, which has 4: 0 to 3" in result.output
    result = RUNNER.invoke(app, ["quantize-base", checkpoint, "--output", f"{checkpoint}/config.json"])
    assert result.exit_code == 1
    assert "is a file; give a folder for the quantized base" in result.output.replace("\n", " ")


def test_profile_with_sensitivities(checkpoint, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("adaptq_peft.precision.SEQUENCES", 4)
    output = str(tmp_path / "profile.json")
    options = ["--data", texts, "--output", output, "--strategy", "sensitivity"]
    result = RUNNER.invoke(app, ["profile", checkpoint, *options])
    assert result.exit_code == 0, result.output
    assert "sensitivity" in result.output
    assert len(AdaptQConfig(profile=output).profile.sensitivity) == 4
    result = RUNNER.invoke(app, ["profile", checkpoint, *options, "--stream"])
    assert result.exit_code == 1
    assert "is on the meta device and has no weights" in result.output.replace("\n", " ")


@pytest.fixture
def site_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(autoload.sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


def test_autoload_says_its_state(site_packages):
    for action, state in (([], "off"), (["on"], "on"), (["status"], "on"), (["off"], "off")):
        result = RUNNER.invoke(app, ["autoload", *action])
        assert result.exit_code == 0, result.output
        assert f"autoload is {state}: {site_packages}" in result.output.replace("\n", "")


def test_autoload_in_a_folder_that_cannot_be_written_to_is_an_error(site_packages, monkeypatch):
    monkeypatch.setattr(autoload.sysconfig, "get_path", lambda name: str(site_packages / "missing"))
    result = RUNNER.invoke(app, ["autoload", "on"])
    assert result.exit_code == 1
    assert "Run it as a user who may write there" in result.output
