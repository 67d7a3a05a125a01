"""The pytest plugin that turns PEFT's test files into a test of ADAPTQ. The files themselves are not changed."""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import stand_ins
import tiny_hub
import torch
import transformers
from adaptq_cases import CASES, CASES_OF_TEST
from peft import PeftConfig, PeftType
from skips import SKIPS, Skip, find_skip

from adaptq_peft import AdaptQConfig

FAST_MODELS = ("OPTForCausalLM", "GPT2LMHeadModel", "BartForConditionalGeneration", "tiny-random-Bert")
FAST_CASES = ("nf4", "MLP-both", "MLP-modules_to_save", "Embedding-Conv1D", "Conv2d", "same", "adaptq")

_state: dict[str, Any] = {"own": set(), "used": set(), "stand_ins": [], "counts": Counter()}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="a few cases and models of each test")


def pytest_configure(config: pytest.Config) -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # tiny models: threads cost more than they give
    _state["stand_ins"] = stand_ins.install_packages()


# ------------------------------------------------------------------------------------------------ which cases there are


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Put our cases in the place of those of other methods, before pytest parametrizes."""
    file, test = _file(metafunc.module), metafunc.function.__name__
    marks = metafunc.definition.own_markers
    for index, mark in enumerate(marks):
        if mark.name != "parametrize" or not _names_method(mark.args[1]):
            continue
        names = (
            tuple(name.strip() for name in mark.args[0].split(",")) if isinstance(mark.args[0], str) else mark.args[0]
        )
        marks[index] = pytest.mark.parametrize(mark.args[0], _our_cases(file, test, names)).mark
        _state["own"].add((file, metafunc.function.__qualname__))


def _our_cases(file: str, test: str, names: tuple[str, ...]) -> list[Any]:
    skip = find_skip(file, test, "")
    if skip is not None and skip.case == "*" and not skip.when_missing:
        _state["used"].add(skip)
        return [pytest.param(*[None] * len(names), id="adaptq", marks=pytest.mark.skip(reason=skip.reason))]
    cases = CASES_OF_TEST.get((file, test)) or CASES.get((file, names))
    if cases is None:
        raise pytest.UsageError(f"{file}.py::{test} runs over PEFT methods, by {names}: no ADAPTQ cases and no skip")
    return cases()


def _names_method(value: Any) -> bool:
    """Whether a parameter value is, or holds, a config class or a config."""
    if isinstance(value, functools.partial):
        value = value.func
    if isinstance(value, PeftConfig) or (isinstance(value, type) and issubclass(value, PeftConfig)):
        return True
    if isinstance(value, (str, dict, torch.Tensor)):
        return False
    try:
        return any(_names_method(entry) for entry in value)
    except TypeError:
        return False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    for name in _state["stand_ins"]:  # only the imports of the test files needed them
        del sys.modules[name]
    kept = [item for item in items if _is_ours(item) and (not config.getoption("fast") or _is_fast(item))]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept
    for item in items:
        if hasattr(item, "callspec"):  # a config is filled in when it is used, and PEFT's lists share theirs
            item.callspec.params.update({k: _fresh(v) for k, v in item.callspec.params.items()})
        skip = find_skip(_file(item.module), item.originalname, _case(item))
        if skip is not None and (skip.when_missing is None or importlib.util.find_spec(skip.when_missing) is None):
            item.add_marker(pytest.mark.skip(reason=skip.reason))
            _state["used"].add(skip)


def _fresh(value: Any) -> Any:
    return copy.deepcopy(value) if _names_method(value) else value


def _is_ours(item: pytest.Function) -> bool:
    file, name = _file(item.module), item.function.__qualname__
    return (file, name) in _state["own"] or _is_listed(stand_ins.TESTS_OF_ALL_METHODS, item) or _is_common(item)


def _is_common(item: pytest.Function) -> bool:
    return _is_listed(stand_ins.COMMON_TESTS, item)


def _is_listed(table: tuple[tuple[str, str], ...], item: pytest.Function) -> bool:
    return any(_file(item.module) == file and fnmatchcase(item.function.__qualname__, name) for file, name in table)


def _is_fast(item: pytest.Function) -> bool:
    values = item.callspec.params if hasattr(item, "callspec") else {}
    models = [value for name, value in values.items() if name == "model_id" and "/" in str(value)]
    if not all(any(known in model for known in FAST_MODELS) for model in models):
        return False
    ours = (_file(item.module), item.function.__qualname__) in _state["own"]
    return (
        not ours
        or any(part in FAST_CASES for part in item.callspec.id.replace("Bert-", "").split("-"))
        or any(item.callspec.id.endswith(case) or case in item.callspec.id for case in FAST_CASES if "-" in case)
    )


def _file(module: Any) -> str:
    return module.__name__.rpartition(".")[2]


def _case(item: pytest.Function) -> str:
    return item.callspec.id if hasattr(item, "callspec") else ""


# --------------------------------------------------------------------------------------------------- running one of them


@pytest.fixture(autouse=True)
def _stand_ins(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {name.rpartition(".")[2]: module for name, module in sys.modules.items() if name.startswith("tests.")}
    item: Any = request.node
    monkeypatch.setattr(modules["testing_utils"], "_HUB_MODEL_ACCESSES", stand_ins.AlwaysSeen())
    hub = Path(os.environ["HF_HUB_CACHE"])
    import peft.config

    monkeypatch.setattr(peft.config, "hf_hub_download", stand_ins.download_to(hub, peft.config.hf_hub_download))
    for (file, test), names in stand_ins.LISTED_METHODS.items():
        if fnmatchcase(_file(item.module), file) and fnmatchcase(item.originalname, test):
            for module, name in names:
                if module in modules:
                    monkeypatch.setattr(modules[module], name, AdaptQConfig)
    for module, name in stand_ins.SKIPPING_FUNCTIONS:
        if module in modules:
            monkeypatch.setattr(modules[module], name, lambda *_: None)
    if _is_listed(stand_ins.TESTS_OF_ALL_METHODS, item):  # of the others some need packages that are not here
        monkeypatch.setattr(item.module, "PeftType", (PeftType.ADAPTQ,))
    if _is_common(item):
        monkeypatch.setattr(item.module, "LoraConfig", stand_ins.from_lora_config)
    if hasattr(item.module, "load_dataset_english_quotes"):
        quotes = functools.partial(stand_ins.quotes_dataset, tiny_hub.QUOTES)
        monkeypatch.setattr(item.module, "load_dataset_english_quotes", quotes)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A skip that is not in the table is a failure."""
    report: Any = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if reason not in {skip.reason for skip in SKIPS}:
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} skips itself, and skips.py has no row for it: {reason}"
    if report.when == "call" or report.outcome != "passed":
        _state["counts"][_file(item.module), report.outcome] += 1  # type: ignore[attr-defined]
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    terminalreporter.section("ADAPTQ cases in PEFT's test files")
    for file in sorted({file for file, _ in _state["counts"]}):
        counts = {outcome: _state["counts"][file, outcome] for outcome in ("passed", "failed", "skipped")}
        terminalreporter.write_line(f"{file + '.py':36}" + ", ".join(f"{n:5} {what}" for what, n in counts.items()))


def pytest_sessionfinish(session: pytest.Session) -> None:
    unused = [skip for skip in SKIPS if skip not in _state["used"] and not skip.when_missing]
    if unused and os.environ.get("ADAPTQ_ALL_PEFT_TESTS"):
        rows = "; ".join(f"{skip.file}::{skip.test}[{skip.case}]" for skip in unused)
        raise pytest.UsageError(f"rows of skips.py that cover no test: {rows}")
