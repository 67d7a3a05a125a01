"""The .pth file, in interpreters of their own: with stand-ins for peft and adaptq_peft, and the real ones."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import peft
import pytest

import adaptq_peft
from adaptq_peft import AdaptQConfig, autoload


@pytest.fixture
def site_packages(tmp_path, monkeypatch):
    """A folder in place of the environment's site-packages."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.setattr(autoload.sysconfig, "get_path", lambda name: str(folder))
    return folder


@pytest.fixture
def run(site_packages):
    """Runs code in a bare interpreter that sees nothing but the folder, with its .pth files."""

    def run_python(code):
        start = f"import site, sys; sys.path.insert(0, {str(site_packages)!r})"
        read = f"site.addsitedir({str(site_packages)!r})"  # twice, as Python 3.11 does in a virtual environment
        command = [sys.executable, "-I", "-S", "-c", f"{start}; {read}; {read}\n{textwrap.dedent(code)}"]
        return subprocess.run(command, capture_output=True, text=True)

    return run_python


def write_package(folder, name, code=""):
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(textwrap.dedent(code))


def test_on_and_off(site_packages):
    assert not autoload.is_enabled()
    assert autoload.enable() == site_packages / "adaptq_peft_autoload.pth"
    assert autoload.enable() == autoload.autoload_file()
    assert autoload.is_enabled()
    assert [path.name for path in site_packages.iterdir()] == ["adaptq_peft_autoload.pth"]
    (line,) = autoload.autoload_file().read_text(encoding="ascii").splitlines()
    assert line.startswith("import sys; exec(")
    autoload.disable()
    autoload.disable()
    assert list(site_packages.iterdir()) == []


def test_adaptq_is_imported_after_peft_and_once(site_packages, run):
    write_package(site_packages, "peft", "import sys\nprint('peft', 'adaptq_peft' in sys.modules)")
    write_package(site_packages, "adaptq_peft", "import peft.utils\nprint('adaptq_peft')")
    (site_packages / "peft" / "utils.py").touch()
    autoload.enable()
    result = run(
        """
        import importlib.util
        assert importlib.util.find_spec("peft") is not None  # as transformers asks whether peft is installed
        assert not {"peft", "adaptq_peft"} & set(sys.modules)
        import peft.utils, importlib
        importlib.reload(peft)
        print(type(peft.__spec__.loader).__name__, [type(finder).__name__ for finder in sys.meta_path])
        """
    )
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[:3] == ["peft False", "adaptq_peft", "peft True"]
    assert lines[3].startswith("SourceFileLoader [")
    assert "ImportAdaptQAfterPeft" not in lines[3]


def test_a_program_that_imports_adaptq_first_is_as_before(site_packages, run):
    write_package(site_packages, "peft", "print('peft')")
    write_package(site_packages, "adaptq_peft", "import peft\nprint('adaptq_peft')")
    autoload.enable()
    result = run("import adaptq_peft")
    assert (result.stdout.split(), result.stderr) == (["peft", "adaptq_peft"], "")


def test_a_program_without_peft_loads_no_module_more(run):
    code = "import json; print(json.dumps(sorted(sys.modules)))"
    before = json.loads(run(code).stdout)
    autoload.enable()
    assert json.loads(run(code).stdout) == before


def test_without_peft_the_error_is_that_of_python(run):
    autoload.enable()
    result = run("import peft")
    assert result.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'peft'"


def test_after_adaptq_was_uninstalled_nothing_happens(site_packages, run):
    write_package(site_packages, "peft")
    autoload.enable()
    result = run("import peft; print('fine')")
    assert (result.stdout, result.stderr) == ("fine\n", "")


@pytest.mark.parametrize("code", ["raise RuntimeError('too old')", "import not_installed"])
def test_an_error_in_adaptq_is_a_warning_and_peft_is_imported(site_packages, run, code):
    write_package(site_packages, "peft")
    write_package(site_packages, "adaptq_peft", code)
    autoload.enable()
    result = run("import peft; print('fine')")
    assert result.stdout == "fine\n"
    assert "adaptq_peft could not be loaded: " in result.stderr
    assert "`adaptq autoload off` stops the attempt" in result.stderr


def test_in_a_virtual_environment(tmp_path):
    """An adapter is loaded by a program that imports only peft: before, with and after autoload."""
    AdaptQConfig(task_type="CAUSAL_LM").save_pretrained(tmp_path / "adapter")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")

    def run_python(code, *arguments):
        return subprocess.run([python, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path)

    purelib = Path(run_python("import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    installed = (Path(adaptq_peft.__file__).parents[1], Path(peft.__file__).parents[1])
    (purelib / "installed.pth").write_text("".join(f"{folder}\n" for folder in installed))
    command = "from adaptq_peft.cli import app; app()"
    load = f"from peft import PeftConfig; print(type(PeftConfig.from_pretrained({str(tmp_path / 'adapter')!r})))"

    assert run_python(load).stderr.splitlines()[-1] == "KeyError: 'ADAPTQ'"
    assert f"autoload is on: {purelib}" in run_python(command, "autoload", "on").stdout
    assert run_python(load).stdout == "<class 'adaptq_peft.config.AdaptQConfig'>\n"
    assert f"autoload is off: {purelib}" in run_python(command, "autoload", "off").stdout
    assert run_python(load).stderr.splitlines()[-1] == "KeyError: 'ADAPTQ'"
