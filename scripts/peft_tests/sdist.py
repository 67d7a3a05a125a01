"""Fetches the tests that PEFT ships in its source distribution, for the version that is installed."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path


def default_cache() -> Path:
    """The folder that sdists are kept in: `adaptq_peft/peft_sdist` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adaptq_peft" / "peft_sdist"


def fetch_sdist(cache: Path) -> Path:
    """The sdist of the installed PEFT version, downloaded by pip unless `cache` has it.

    Raises:
        RuntimeError: if pip can't download it.
    """
    version = importlib.metadata.version("peft")
    archive = cache / f"peft-{version}.tar.gz"
    if archive.is_file():
        return archive
    cache.mkdir(parents=True, exist_ok=True)
    # `:all:` would build PEFT's build requirements from source too; it is peft alone that has to come as source.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
    done = subprocess.run([*command, f"peft=={version}", "--dest", str(cache)], capture_output=True, text=True)
    if done.returncode or not archive.is_file():
        raise RuntimeError(f"pip could not download the sdist of peft {version} into {cache}:\n{done.stderr.strip()}")
    return archive


def unpack_tests(archive: Path, folder: Path) -> Path:
    """Unpack `tests/` of the sdist into `folder`, as a package. Returns its path."""
    with tarfile.open(archive) as file:
        top = file.getnames()[0].split("/")[0]
        members = [member for member in file.getmembers() if member.name.startswith(f"{top}/tests/")]
        # The argument `filter` is missing in the first releases of Python 3.11; Debian 12 has one of them.
        file.extraction_filter = getattr(tarfile, "data_filter", None)
        file.extractall(folder, members=members)
    tests = folder / "tests"
    shutil.move(folder / top / "tests", tests)
    (tests / "__init__.py").touch()  # the files import each other relatively; the sdist leaves it out
    return tests
