"""Lets PEFT know ADAPTQ without an `import adaptq_peft` in the program: opt in, for one Python environment.

PEFT has no plugin entry points, so a program that only loads an adapter, such as a server, ends with
`KeyError: 'ADAPTQ'`. `enable` writes one .pth file into the environment's site-packages. Python runs its line at every
start: it adds an import finder that waits for peft, and imports adaptq_peft right after it.
"""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

FILE_NAME = "adaptq_peft_autoload.pth"
_HOOK = Path(__file__).with_name("autoload_hook.py")


def autoload_file() -> Path:
    """The .pth file of the Python environment that runs, whether it exists or not."""
    return Path(sysconfig.get_path("purelib"), FILE_NAME)


def is_enabled() -> bool:
    """Whether the environment loads adaptq_peft with peft."""
    return autoload_file().is_file()


def enable() -> Path:
    """Write the .pth file, atomically, and return its path. A second call writes it anew.

    Raises:
        OSError: if the environment's site-packages can't be written to.
    """
    path = autoload_file()
    # A .pth file is read line by line, so the code is a string; in a namespace of its own, as in any module.
    line = f"import sys; exec({_HOOK.read_text(encoding='utf-8')!r}, {{'__name__': '_adaptq_peft_autoload'}})\n"
    staged = path.with_suffix(".tmp")  # not read by Python
    try:
        staged.write_text(line, encoding="utf-8")
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    return path


def disable() -> Path:
    """Remove the .pth file, if there is one, and return its path.

    Raises:
        OSError: if the environment's site-packages can't be written to.
    """
    path = autoload_file()
    path.unlink(missing_ok=True)
    return path
