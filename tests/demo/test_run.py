"""The whole demo on a tiny model: what it writes, and that a second process gets the same figures."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from adaptq_peft.demo import run
from adaptq_peft.demo.reload import ReloadError
from adaptq_peft.demo.run import evenly_spaced, run_demo
from adaptq_peft.demo.settings import DemoSettings
from adaptq_peft.evaluation import Perplexity

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def tiny_settings(folder: Path, **changes) -> DemoSettings:
    small = {"steps": 3, "batch_size": 2, "sequence_length": 16, "calibration_samples": 50, "evaluation_tokens": 200}
    return DemoSettings(output_dir=folder, **(small | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, demo_texts, tiny_model_folder):
    """One real run, second process included: (returned report, output folder, what was printed)."""
    folder = tmp_path_factory.mktemp("demo")
    printed = StringIO()
    console = Console(file=printed, width=100)
    report = run_demo(tiny_settings(folder), console=console, texts=demo_texts, model_folder=tiny_model_folder)
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
    assert 0.625 < report["memory"]["block_linears_ratio"] < 1
    assert len(report["training"]["losses"]) == 3
    assert report["adapter_bytes"]["adapter_model.safetensors"] > 0


def test_second_process_has_the_same_perplexities(finished):
    report, _, printed = finished
    assert report["reload_identical"] is True
    for text in ("domain", "general"):
        assert report["perplexity"][text]["reloaded"] == report["perplexity"][text]["trained"]
    assert "exactly the same perplexities" in printed


def test_training_changed_the_model(finished):
    report, _, _ = finished
    assert report["perplexity"]["domain"]["trained"]["nll"] != report["perplexity"]["domain"]["quantized"]["nll"]


def test_change_is_split_into_quantization_and_training(finished):
    report, _, _ = finished
    for text, change in report["relative_change"].items():
        figures = {stage: figure["perplexity"] for stage, figure in report["perplexity"][text].items()}
        assert change["quantization"] == pytest.approx((figures["quantized"] - figures["base"]) / figures["base"])
        assert change["training"] == pytest.approx((figures["trained"] - figures["quantized"]) / figures["base"])
        assert change["total"] == pytest.approx(change["quantization"] + change["training"])


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


def test_difference_after_reload_is_an_error_and_the_report_says_so(
    tmp_path, monkeypatch, demo_texts, tiny_model_folder
):
    wrong = {"domain": Perplexity(1.0, 10), "general": Perplexity(1.0, 10)}
    monkeypatch.setattr(run, "reload_in_new_process", lambda *paths: wrong)
    settings = tiny_settings(tmp_path, steps=1)
    console = Console(file=StringIO())
    with pytest.raises(ReloadError, match="the reloaded adapter differs on domain text"):
        run_demo(settings, console=console, texts=demo_texts, model_folder=tiny_model_folder)
    assert json.loads((tmp_path / "report.json").read_text())["reload_identical"] is False


def test_settings_report_all_faults_at_once():
    with pytest.raises(
        ValueError, match=r"steps=0, must be at least 1; ratio=1.5, must be in \(0, 1\]; learning_rate=0"
    ):
        DemoSettings(steps=0, ratio=1.5, learning_rate=0)


def test_evenly_spaced_takes_from_the_whole_list():
    assert evenly_spaced(list("abcdef"), 3) == ["a", "c", "e"]
    assert evenly_spaced(list("ab"), 3) == ["a", "b"]
