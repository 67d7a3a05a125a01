"""`adaptq compare`: options become settings and texts, and known errors a message and a code."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adaptq_peft import comparison
from adaptq_peft.cli import app
from adaptq_peft.comparison import StudyError, StudySettings, plots

RUNNER = CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1"})


@pytest.fixture
def seen(monkeypatch):
    """What `run_study` was called with."""
    calls = []
    monkeypatch.setattr(comparison, "run_study", lambda settings, **options: calls.append((settings, options)))
    return calls


def test_defaults_are_those_of_the_settings(seen):
    result = RUNNER.invoke(app, ["compare"])
    assert result.exit_code == 0, result.output
    assert seen == [(StudySettings(), {"model": None, "texts": None, "dry_run": False})]


def test_lists_and_numbers_reach_the_settings(seen):
    lists = ["--methods", "lora,ratio", "--samples", "50,500", "--seeds", "1,2", "--rates", "1e-4", "--scales", "0.5"]
    numbers = ["--epochs", "2", "--batch-size", "4", "--length", "64", "--budget", "0.05", "--evaluation-tokens", "99"]
    others = ["--validation-tokens", "98", "--dtype", "float32", "--save-adapters", "--output-dir", "out"]
    result = RUNNER.invoke(app, ["compare", *lists, *numbers, *others, "--dry-run", "--model", "m"])
    assert result.exit_code == 0, result.output
    expected = StudySettings(
        output_dir=Path("out"),
        methods=("lora", "ratio"),
        samples=(50, 500),
        seeds=(1, 2),
        rates=(1e-4,),
        scales=(0.5,),
        epochs=2,
        batch_size=4,
        length=64,
        budget=0.05,
        evaluation_tokens=99,
        validation_tokens=98,
        dtype="float32",
        save_adapters=True,
    )
    assert seen == [(expected, {"model": "m", "texts": None, "dry_run": True})]


def test_files_become_texts(seen, tmp_path):
    file = tmp_path / "texts.json"
    file.write_text(json.dumps([f"text {number}" for number in range(10)]))
    names = ("--domain-train", "--domain-test", "--general-train", "--general-test")
    result = RUNNER.invoke(app, ["compare", *(part for name in names for part in (name, str(file)))])
    assert result.exit_code == 0, result.output
    assert len(seen[0][1]["texts"].general_valid) == 5


def test_each_file_becomes_the_texts_of_its_name(seen, tmp_path):
    parts = [f"{text}_{part}" for text in ("domain", "general") for part in ("train", "valid", "test")]
    options = []
    for part in parts:
        (tmp_path / f"{part}.txt").write_text(part)
        options += [f"--{part.replace('_', '-')}", str(tmp_path / f"{part}.txt")]
    result = RUNNER.invoke(app, ["compare", *options])
    assert result.exit_code == 0, result.output
    assert vars(seen[0][1]["texts"]) == {part: [part] for part in parts}


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--rates", "0"], 2, "rates=0.0, must be above 0"),
        (["--samples", "many"], 2, "Invalid value for --samples: 'many'; allowed: whole numbers"),
        (["--domain-train", "a.txt"], 1, "no file is given for ['domain_test', 'general_train', 'general_test']"),
    ],
)
def test_wrong_options_are_named(seen, options, code, message):
    result = RUNNER.invoke(app, ["compare", *options])
    assert (result.exit_code, seen) == (code, [])
    assert message in result.output


def test_failed_runs_end_with_a_code(monkeypatch):
    def fail(settings, **options):
        raise StudyError("1 trainings failed:\nlora")

    monkeypatch.setattr(comparison, "run_study", fail)
    result = RUNNER.invoke(app, ["compare"])
    assert result.exit_code == 1
    assert "Error: 1 trainings failed" in result.output


def test_missing_matplotlib_is_said_before_anything_runs(monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    result = RUNNER.invoke(app, ["compare"])
    assert result.exit_code == 1
    assert 'pip install "adaptq_peft[demo]"' in result.output


def test_a_signal_to_end_is_taken_as_an_interrupt(monkeypatch):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    monkeypatch.setattr(comparison, "run_study", lambda settings, **options: signal.raise_signal(signal.SIGTERM))
    assert RUNNER.invoke(app, ["compare"]).exit_code == 130
