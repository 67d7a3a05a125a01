"""The pytest plugin that turns PEFT's test files into tests of ADAPTQ. The files themselves are not changed."""

from __future__ import annotations

import copy
import functools
import os
import sys
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import peft.config
import pytest
import stand_ins
import tiny_hub
import torch
import transformers
from adaptq_cases import CASES, CASES_OF_TEST, FAST_CASES, FAST_MODELS
from peft import PeftConfig, PeftType
from skips import SKIPS, Skip, find_skip

from adaptq_peft import AdaptQConfig

_adaptq_tests: set[str] = set()  # tests that run over PEFT's methods, and now over ADAPTQ cases instead
_used_skips: set[Skip] = set()
_unused_skips: set[str] = set()
_missing_packages: list[str] = []
_counts: Counter[tuple[str, str]] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="a few cases and models of each test")
    parser.addoption("--all-skips-used", action="store_true", help="fail if a row of skips.py covers no test")


def pytest_configure() -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # tiny models: threads cost more than they give
    _missing_packages.extend(stand_ins.install_packages())


# ------------------------------------------------------------------------------------------ which cases there are


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Put our cases in the place of those of other methods, before pytest parametrizes."""
    fast = metafunc.config.getoption("fast")
    marks = metafunc.definition.own_markers
    for index, mark in enumerate(marks):
        if mark.name != "parametrize":
            continue
        names, values = mark.args
        if _names_method(values):
            rows = _our_cases(metafunc, tuple(name.strip() for name in names.split(",")))
            rows = [row for row in rows if row.id in FAST_CASES] or rows[:1] if fast else rows
            marks[index] = pytest.mark.parametrize(names, rows).mark
            _adaptq_tests.add(_name(metafunc.module, metafunc.function))
        elif fast and names == "model_id":
            marks[index] = pytest.mark.parametrize(names, [value for value in values if value in FAST_MODELS]).mark


def _our_cases(metafunc: pytest.Metafunc, names: tuple[str, ...]) -> list[Any]:
    file, test = _file(metafunc.module), metafunc.function.__name__
    if find_skip(file, test, "") is not None:  # the whole test: the values don't matter
        return [pytest.param(*[None] * len(names), id="adaptq")]
    cases = CASES_OF_TEST.get((file, test)) or CASES.get((file, names))
    if cases is None:
        raise pytest.UsageError(f"{file}.py::{test} runs over PEFT methods, by {names}: no ADAPTQ cases and no skip")
    return cases()


def _names_method(value: Any) -> bool:
    """Whether a parameter value is, or holds, a config class or a config."""
    if isinstance(value, (str, dict, torch.Tensor)):
        return False
    if isinstance(value, PeftConfig) or (isinstance(value, type) and issubclass(value, PeftConfig)):
        return True
    try:
        return any(_names_method(entry) for entry in value)
    except TypeError:
        return False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    while _missing_packages:  # only the imports of the test files needed them
        del sys.modules[_missing_packages.pop()]
    others = [item for item in items if not _is_ours(item)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if _is_ours(item)]
    for item in items:
        if hasattr(item, "callspec"):  # a config is filled in when it is used, and PEFT's tests share theirs
            item.callspec.params.update({k: _fresh(v) for k, v in item.callspec.params.items()})
        skip = _skip_of(item)
        if skip is not None:
            item.add_marker(pytest.mark.skip(reason=skip.reason))
            _used_skips.add(skip)


def _is_ours(item: pytest.Function) -> bool:
    return (
        _name(item.module, item.function) in _adaptq_tests
        or _is_listed(stand_ins.COMMON_TESTS, item)
        or _is_listed(stand_ins.TESTS_OF_ALL_METHODS, item)
    )


def _is_listed(patterns: tuple[str, ...], item: pytest.Function) -> bool:
    return any(fnmatchcase(_name(item.module, item.function), pattern) for pattern in patterns)


def _fresh(value: Any) -> Any:
    return copy.deepcopy(value) if _names_method(value) else value


def _skip_of(item: pytest.Function) -> Skip | None:
    case = item.callspec.id if hasattr(item, "callspec") else ""
    return find_skip(_file(item.module), item.originalname, case)


def _file(module: Any) -> str:
    return module.__name__.rpartition(".")[2]


def _name(module: Any, function: Any) -> str:
    return f"{_file(module)}.{function.__qualname__}"


# ------------------------------------------------------------------------------------------ running one of them


def pytest_collection_finish() -> None:
    """What stands in for other things in all tests."""
    hub = Path(os.environ["HF_HUB_CACHE"])
    peft.config.hf_hub_download = stand_ins.download_to(hub, peft.config.hf_hub_download)
    modules = _test_modules()
    if "testing_utils" in modules:
        modules["testing_utils"]._HUB_MODEL_ACCESSES = stand_ins.AlwaysSeen()
    for file, name in stand_ins.SKIPPING_FUNCTIONS:
        if file in modules:
            setattr(modules[file], name, lambda *_: None)
    for module in modules.values():
        if hasattr(module, "load_dataset_english_quotes"):
            module.load_dataset_english_quotes = functools.partial(stand_ins.quotes_dataset, tiny_hub.QUOTES)


@pytest.fixture(autouse=True)
def _stand_ins(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in for other things in single tests."""
    item: Any = request.node
    modules = _test_modules()
    for file, name in stand_ins.LISTED_METHODS.get(item.originalname, ()):
        if file in modules:
            monkeypatch.setattr(modules[file], name, AdaptQConfig)
    for pattern, model in stand_ins.OTHER_BASE:
        if fnmatchcase(_name(item.module, item.function), pattern):
            monkeypatch.setattr(item.module, model, stand_ins.seeded(getattr(item.module, model)))
    if _is_listed(stand_ins.COMMON_TESTS, item):
        monkeypatch.setattr(item.module, "LoraConfig", stand_ins.from_lora_config)
    if _is_listed(stand_ins.TESTS_OF_ALL_METHODS, item):  # some of the others need packages that are not here
        monkeypatch.setattr(item.module, "PeftType", (PeftType.ADAPTQ,))


def _test_modules() -> dict[str, Any]:
    return {_file(module): module for name, module in list(sys.modules.items()) if name.startswith("tests.")}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Function, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A skip that is not in the table is a failure."""
    report: Any = yield
    if report.skipped and _skip_of(item) is None:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} skips itself, and skips.py has no row for it: {report.longrepr[2]}"
    return report  # type: ignore[return-value]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        _counts[Path(report.nodeid.partition("::")[0]).name, report.outcome] += 1


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section("ADAPTQ cases in PEFT's test files")
    for file in sorted({file for file, _ in _counts}):
        counts = [f"{_counts[file, outcome]:5} {outcome}" for outcome in ("passed", "failed", "skipped")]
        terminalreporter.write_line(f"{file:36}{', '.join(counts)}")
    for skip in sorted(_unused_skips):
        terminalreporter.write_line(f"ERROR: covers no test: {skip}")


# Tests are collected in each worker of pytest-xdist, and not in the process that has the workers ("dsession").


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    collects = not session.config.pluginmanager.has_plugin("dsession")
    if session.config.getoption("all_skips_used") and collects:
        _unused_skips.update(str(skip) for skip in SKIPS if skip not in _used_skips)
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["unused_skips"] = list(_unused_skips)
    if _unused_skips and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _unused_skips.update(getattr(node, "workeroutput", {}).get("unused_skips", ()))
