"""What figures were measured on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .. import __version__

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def describe_environment() -> dict[str, Any]:
    """What speed depends on and, by rounding, a little of every loss.

    Returns:
        Versions of this package, Python and each of `PACKAGES`, `None` for one that is not installed; "device", the
        GPU or the processor and its instructions, as far as they change how matrices are multiplied; "threads" of
        PyTorch.
    """
    return {
        "adaptq_peft": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # not in old PyTorch
    name = known.get("cpu_name") or platform.processor() or platform.machine()
    multiplies_bfloat16 = [flag for flag, has in known.items() if has and flag.endswith("bf16")]
    return ", ".join([name, torch.backends.cpu.get_cpu_capability(), *sorted(multiplies_bfloat16)])
