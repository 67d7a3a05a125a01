"""Runs PEFT's own test-suite, of the installed PEFT version, on ADAPTQ.

    python scripts/peft_tests/run.py            # everything
    python scripts/peft_tests/run.py --fast     # a few cases and models of each test

pip fetches PEFT's sdist, which carries its tests. They run unchanged, offline, on tiny models with random weights:

    adaptq_cases.py   the ADAPTQ cases that take the place of other methods' in the parametrizations
    skips.py          what is not run, each with its reason
    tiny_hub.py       the models under the ids that the tests load
    stand_ins.py      what stands in for other things that the tests name
    adaptq_plugin.py  the pytest plugin that puts it together

Ends with 0 only if every case passed or is in `skips.py`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from sdist import default_cache, fetch_sdist, unpack_tests
from tiny_hub import build_hub

FILES = (
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_seq_classifier.py",
    "test_config.py",
    "test_tuners_utils.py",
    "test_torch_compile.py",
    "test_low_level_api.py",
)

# The markers of PEFT's own pyproject.toml. Its warnings-as-errors are left out: they are for PEFT's own use of the
# transformers of its day, and a newer transformers deprecates some of it.
PYTEST_INI = """\
[pytest]
markers =
    single_gpu_tests: tests that run on a single GPU
    multi_gpu_tests: tests that run on multiple GPUs
    regression: whether to run regression suite test
    bitsandbytes: select bitsandbytes integration tests
filterwarnings =
    ignore::DeprecationWarning
    ignore::FutureWarning
"""


def main() -> int:
    arguments, pytest_arguments = _parse()
    archive = fetch_sdist(arguments.cache)
    with tempfile.TemporaryDirectory(prefix="peft-tests-") as name:
        folder = Path(name)
        tests = unpack_tests(archive, folder)
        (folder / "pytest.ini").write_text(PYTEST_INI)
        hub = folder / "hub"
        build_hub(hub)
        files = [str(tests / file) for file in arguments.files or FILES]
        options = ["-p", "adaptq_plugin", "-p", "no:cacheprovider", "-q", "-rfEs", "--tb=short"]
        options += ["--fast"] * arguments.fast
        options += ["--numprocesses", str(arguments.numprocesses), "--dist", "worksteal"]
        options += ["--all-skips-used"] * (not arguments.fast and not arguments.files and not pytest_arguments)
        here = Path(__file__).resolve().parent
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")]),
            "HF_HUB_CACHE": str(hub),
            "HF_HUB_OFFLINE": "1",
            "PEFT_DEBUG_WITH_TORCH_COMPILE": "1",  # else test_torch_compile.py skips itself
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, "-m", "pytest", *options, *files, *pytest_arguments]
        return subprocess.run(command, cwd=folder, env=environment).returncode


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description="Run PEFT's own test-suite on ADAPTQ. Other options go to pytest.")
    parser.add_argument("--fast", action="store_true", help="a few cases and models of each test")
    parser.add_argument("--files", nargs="+", metavar="FILE", help=f"only these of {', '.join(FILES)}")
    parser.add_argument("--numprocesses", type=int, default=2, help="0: in this process (%(default)s)")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder for sdists (%(default)s)")
    return parser.parse_known_args()


if __name__ == "__main__":
    sys.exit(main())
