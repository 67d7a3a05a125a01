"""The command line: passes its options on, and turns known errors into a message and exit code 1."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adaptq_peft import autoload
from adaptq_peft.cli import app
from adaptq_peft.demo import run
from adaptq_peft.demo.reload import ReloadError

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


def test_defaults_are_those_of_the_settings(settings_seen):
    RUNNER.invoke(app, ["demo"])
    assert settings_seen == [run.DemoSettings()]


def test_bad_ratio_is_a_usage_error(settings_seen):
    result = RUNNER.invoke(app, ["demo", "--ratio", "1.5"])
    assert result.exit_code == 2
    assert "ratio=1.5, must be in (0, 1]" in result.output
    assert settings_seen == []


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
