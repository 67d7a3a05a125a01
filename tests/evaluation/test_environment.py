"""What figures were measured on: packages that are missing, processors that differ in what changes rounding."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from adaptq_peft import __version__
from adaptq_peft.evaluation import describe_environment
from adaptq_peft.evaluation import environment as module


def test_it_is_json_with_the_versions_in_use():
    found = json.loads(json.dumps(describe_environment()))
    assert (found["adaptq_peft"], found["torch"]) == (__version__, torch.__version__)
    assert found["threads"] == torch.get_num_threads()


def test_package_that_is_not_installed_has_no_version(monkeypatch):
    def version(package):  # bitsandbytes is a dependency on Linux alone
        if package == "bitsandbytes":
            raise PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(module, "version", version)
    found = describe_environment()
    assert found["bitsandbytes"] is None
    assert found["peft"] == "1.0"


@pytest.mark.parametrize(
    ("known", "described"),
    [
        ({"cpu_name": "Intel Xeon", "avx512_bf16": False, "amx_bf16": False}, "Intel Xeon, AVX512"),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True, "avx2": True}, "AMD EPYC, AVX512, avx512_bf16"),
        ({"sve": True, "sve_bf16": True, "bf16": True}, "aarch64, AVX512, bf16, sve_bf16"),
        (None, "aarch64, AVX512"),
    ],
)
def test_processor_is_named_with_what_multiplies_bfloat16(monkeypatch, known, described):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(module.platform, "processor", lambda: "")
    monkeypatch.setattr(module.platform, "machine", lambda: "aarch64")
    if known is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert describe_environment()["device"] == described


def test_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert describe_environment()["device"] == "NVIDIA H200"
