"""The whole demo on a tiny model: what it writes, and that a second process gets the same figures."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from adaptq_peft.demo import run
from adaptq_peft.demo.reload import ReloadError
from adaptq_peft.demo.run import run_demo
from adaptq_peft.demo.settings import DemoSettings
from adaptq_peft.evaluation import Perplexity

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def tiny_settings(folder: Path, **changes) -> DemoSettings:
    small = {"steps": 3, "batch_size": 2, "sequence_length": 16, "calibration_samples": 50, "evaluation_tokens": 200}
    small["quantization_calibration"] = None
    return DemoSettings(output_dir=folder, **(small | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, demo_texts, tiny_model_folder):
    """One real run, second process included: (returned report, output folder, what was printed)."""
    folder = tmp_path_factory.mktemp("demo")
    printed = StringIO()
    console = Console(file=printed, width=100)
    settings = tiny_settings(folder, quantization_calibration="auto")
    report = run_demo(settings, console=console, texts=demo_texts, model_folder=tiny_model_folder)
    return report, folder, printed.getvalue()


def test_report_file_holds_what_was_returned(finished):
    report, folder, _ = finished
    assert json.loads((folder / "report.json").read_text()) == report


def test_report_holds_profile_memory_and_losses(finished):
    report, _, _ = finished
    assert len(report["profile"]["magnitude"]) == 4
    assert len(report["profile"]["adapted_blocks"]) == 2
    assert report["profile"]["samples"] == 50
    assert report["memory"]["paper_ratio"] == 0.625
    assert report["memory"]["bytes_before"]["quantized_linears"] == 0
    assert report["memory"]["bytes_after"]["quantized_linears"] > 0
    four_bits = 4.127 / (16 if report["model"]["dtype"] == "bfloat16" else 32)
    assert (1 + four_bits) / 2 < report["memory"]["block_linears_ratio"] < 1
    assert len(report["training"]["losses"]) == 3
    assert report["adapter_bytes"]["adapter_model.safetensors"] > 0


def test_second_process_has_the_same_perplexities(finished):
    report, _, printed = finished
    assert report["reload"] == {"identical": True, "perplexity": report["perplexity"]["trained"]}
    assert "exactly the same perplexities" in printed


def test_adapter_carries_its_figures_and_its_card_shows_them(finished):
    report, folder, _ = finished
    evaluation = json.loads((folder / "adapter" / "adapter_config.json").read_text())["evaluation"]
    stages = {"base": "base", "quantized": "quantized", "adapted": "trained"}
    for text, figures in evaluation.items():
        for stage, reported in stages.items():
            assert figures[stage] == report["perplexity"][reported][text]["perplexity"]
    tokens = report["perplexity"]["base"]["domain"]["num_tokens"]
    card = (folder / "adapter" / "README.md").read_text()
    assert (
        f"| domain: held-out documents of the domain, {tokens:,} tokens | {evaluation['domain']['base']:.2f} | "
        in card
    )


def test_codes_are_calibrated_unless_told_otherwise(finished, short_run):
    report, folder, _ = finished
    assert report["settings"]["quantization_calibration"] == DemoSettings().quantization_calibration == "auto"
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["quantization_calibration"] == "auto"
    plain = short_run()["perplexity"]
    assert plain["base"] == report["perplexity"]["base"]
    assert plain["quantized"] != report["perplexity"]["quantized"]


def test_training_changed_the_model(finished):
    perplexity = finished[0]["perplexity"]
    assert perplexity["trained"]["domain"]["nll"] != perplexity["quantized"]["domain"]["nll"]


def test_change_is_split_into_quantization_and_training(finished):
    report, _, _ = finished
    for text, change in report["relative_change"].items():
        base, quantized, trained = (
            report["perplexity"][stage][text]["perplexity"] for stage in ("base", "quantized", "trained")
        )
        assert change["quantization"] == pytest.approx((quantized - base) / base)
        assert change["training"] == pytest.approx((trained - quantized) / base)
        assert change["total"] == pytest.approx((trained - base) / base)


def test_figures_are_png_files(finished):
    _, folder, _ = finished
    for name in ("profile.png", "perplexities.png"):
        assert (folder / name).read_bytes().startswith(PNG_SIGNATURE)


def test_printed_output_has_each_part(finished):
    _, _, printed = finished
    for part in (
        "Activation profile",
        "linears of the blocks",
        "0.6250",
        "Perplexity (lower is better)",
        "quantization",
    ):
        assert part in printed


@pytest.fixture
def short_run(tmp_path, demo_texts, tiny_model_folder):
    """Runs the demo for one step, with the output in `tmp_path`."""
    settings = tiny_settings(tmp_path, steps=1)
    return lambda: run_demo(
        settings, console=Console(file=StringIO()), texts=demo_texts, model_folder=tiny_model_folder
    )


def test_difference_after_reload_is_an_error_and_the_report_says_so(short_run, tmp_path, monkeypatch):
    wrong = {"domain": Perplexity(1.0, 10), "general": Perplexity(1.0, 10)}
    monkeypatch.setattr(run, "reload_in_new_process", lambda *paths: wrong)
    with pytest.raises(ReloadError, match="the reloaded adapter differs on domain text"):
        short_run()
    assert json.loads((tmp_path / "report.json").read_text())["reload"]["identical"] is False


def test_failure_of_the_second_process_loses_no_results(short_run, tmp_path, monkeypatch):
    def fail(*paths):
        raise ReloadError("the second process ended with code 1")

    monkeypatch.setattr(run, "reload_in_new_process", fail)
    with pytest.raises(ReloadError, match="ended with code 1"):
        short_run()
    assert "relative_change" in json.loads((tmp_path / "report.json").read_text())
    assert (tmp_path / "perplexities.png").is_file()


def test_settings_report_all_faults_at_once():
    with pytest.raises(
        ValueError, match=r"steps=0, must be at least 1; ratio=1.5, must be in \(0, 1\]; learning_rate=0"
    ):
        DemoSettings(steps=0, ratio=1.5, learning_rate=0)
