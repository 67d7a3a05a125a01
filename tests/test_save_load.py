"""A saved adapter, loaded by PEFT's own calls."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import logits, randomize

import adaptq_peft
from adaptq_peft import AdaptQConfig

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def saved(make_model, samples, batch, tmp_path):
    """Builds a base on disk and a trained adapter of it; returns folders, the base and the expected logits."""

    def build(kind="llama", dtype=torch.float32, seed=0, **fields):
        base = make_model(kind, seed=seed).to(dtype)
        base.save_pretrained(tmp_path / "base")
        base = type(base).from_pretrained(tmp_path / "base", dtype=dtype)
        config = AdaptQConfig(task_type="CAUSAL_LM", calibration_data=samples, **{"frozen_rank": 0, **fields})
        wrapped = get_peft_model(base, config)
        randomize(wrapped)
        wrapped.save_pretrained(tmp_path / "adapter")
        return tmp_path / "base", tmp_path / "adapter", wrapped, logits(wrapped, batch)

    return build


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none"])
def test_loading_gives_bit_identical_logits(saved, batch, kind, dtype, quantization):
    base_dir, adapter_dir, wrapped, expected = saved(kind, dtype, quantization=quantization)
    base = type(wrapped.get_base_model()).from_pretrained(base_dir, dtype=dtype)
    assert torch.equal(logits(PeftModel.from_pretrained(base, adapter_dir), batch), expected)
    auto = AutoPeftModelForCausalLM.from_pretrained(adapter_dir, dtype=dtype)
    assert torch.equal(logits(auto, batch), expected)


def test_in_a_fresh_process_without_calibration_data(saved, batch, tmp_path):
    _, adapter_dir, _, expected = saved(dtype=torch.bfloat16)
    torch.save({"batch": batch, "expected": expected}, tmp_path / "expected.pt")
    code = f"""
        import torch
        import adaptq_peft
        import adaptq_peft.plan
        from peft import AutoPeftModelForCausalLM
        adaptq_peft.plan.profile_activations = None  # loading never profiles
        torch.set_num_threads(1)
        data = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
        model = AutoPeftModelForCausalLM.from_pretrained({str(adapter_dir)!r}, dtype=torch.bfloat16).eval()
        with torch.no_grad():
            print(torch.equal(model(**data["batch"]).logits, data["expected"]))
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert result.stdout.strip() == "True", result.stderr


@pytest.mark.parametrize("trainable", [True, False])
def test_low_cpu_mem_usage(saved, batch, trainable):
    base_dir, adapter_dir, wrapped, expected = saved(dtype=torch.bfloat16)
    base = type(wrapped.get_base_model()).from_pretrained(base_dir, dtype=torch.bfloat16)
    loaded = PeftModel.from_pretrained(base, adapter_dir, low_cpu_mem_usage=True, is_trainable=trainable)
    assert torch.equal(logits(loaded, batch), expected)
    assert any(p.requires_grad for p in loaded.parameters()) == trainable


def test_the_file_holds_the_deltas_and_nothing_else(saved):
    _, adapter_dir, wrapped, _ = saved()
    trainable = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    with safe_open(adapter_dir / WEIGHTS, "pt") as file:
        names = set(file.keys())
    assert names == {name.replace(".adaptq_delta.default.", ".adaptq_delta.") for name in trainable}
    assert "base_model.model.model.layers.0.mlp.up_proj.adaptq_delta.weight" in names
    assert sorted(path.name for path in adapter_dir.iterdir()) == ["README.md", CONFIG, WEIGHTS]


def test_training_goes_on_after_loading(saved, batch, train):
    base_dir, adapter_dir, wrapped, _ = saved()
    base = type(wrapped.get_base_model()).from_pretrained(base_dir)
    loaded = PeftModel.from_pretrained(base, adapter_dir, is_trainable=True)
    assert train(loaded, batch, steps=3) == train(wrapped, batch, steps=3)


def test_modules_to_save_come_back(saved, batch):
    base_dir, adapter_dir, wrapped, _ = saved(modules_to_save=["lm_head"])
    wrapped.lm_head.modules_to_save["default"].weight.data.mul_(1.5)
    expected = logits(wrapped, batch)
    wrapped.save_pretrained(adapter_dir)
    base = type(wrapped.get_base_model()).from_pretrained(base_dir)
    assert torch.equal(logits(PeftModel.from_pretrained(base, adapter_dir), batch), expected)


def test_transformers_own_loader(saved, batch):
    base_dir, adapter_dir, wrapped, expected = saved()
    base = type(wrapped.get_base_model()).from_pretrained(base_dir)
    base.load_adapter(str(adapter_dir))
    assert torch.equal(logits(base, batch), expected)


def test_a_base_in_another_dtype_is_still_the_base(saved, batch):
    base_dir, adapter_dir, wrapped, expected = saved(dtype=torch.bfloat16)
    base = type(wrapped.get_base_model()).from_pretrained(base_dir, dtype=torch.float32)
    found = logits(PeftModel.from_pretrained(base, adapter_dir), batch)
    assert (found - expected).norm() / expected.norm() < 0.05


def test_another_base_with_equal_shapes_is_an_error_that_names_both(saved, make_model, tmp_path):
    base_dir, adapter_dir, _, _ = saved(seed=0)
    make_model(seed=1).save_pretrained(tmp_path / "other")
    other = type(make_model()).from_pretrained(tmp_path / "other")
    before = {name: p.clone() for name, p in other.named_parameters()}
    with pytest.raises(
        ValueError, match=rf"made for the base model '{base_dir}' .*model here is '{tmp_path / 'other'}'"
    ):
        PeftModel.from_pretrained(other, adapter_dir)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())


def change_file(adapter_dir, change):
    tensors = load_file(adapter_dir / WEIGHTS)
    change(tensors)
    save_file(tensors, adapter_dir / WEIGHTS)


FIRST = "base_model.model.model.layers.2.input_layernorm.adaptq_delta.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(FIRST), r"1 tensors are missing: base_model.*layers\.2\.input_layernorm"),
        (
            lambda t: t.update({FIRST.replace(".2.", ".1."): torch.zeros(64)}),
            r"1 tensors are not part of this adapter",
        ),
        (
            lambda t: t.update({FIRST: torch.zeros(65)}),
            r"1 tensors have another shape: .* is \(65,\) instead of \(64,\)",
        ),
        (lambda t: t[FIRST].fill_(float("nan")), r"1 tensors hold values that are not finite: base_model"),
    ],
    ids=["missing", "extra", "shape", "not finite"],
)
def test_a_damaged_file_is_an_error(saved, change, message):
    base_dir, adapter_dir, wrapped, _ = saved(layers_to_transform=[2, 3])
    change_file(adapter_dir, change)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(type(wrapped.get_base_model()).from_pretrained(base_dir), adapter_dir)


def test_a_truncated_file_is_an_error_before_the_base_is_touched(saved):
    base_dir, adapter_dir, wrapped, _ = saved()
    base = type(wrapped.get_base_model()).from_pretrained(base_dir)
    modules = list(base.modules())
    (adapter_dir / WEIGHTS).write_bytes((adapter_dir / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"it is truncated or damaged\. Copy or save the adapter again"):
        PeftModel.from_pretrained(base, adapter_dir)
    assert list(base.modules()) == modules


def test_other_blocks_in_the_config_are_an_error(saved):
    base_dir, adapter_dir, wrapped, _ = saved(layers_to_transform=[2, 3])
    config = json.loads((adapter_dir / CONFIG).read_text())
    config["layers_to_transform"] = [1, 2]
    config["base_fingerprint"] = None
    (adapter_dir / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"the file has deltas for blocks \[2, 3\], and this adapter adapts \[1, 2\]"):
        PeftModel.from_pretrained(type(wrapped.get_base_model()).from_pretrained(base_dir), adapter_dir)


def test_resuming_into_a_model_with_other_blocks_is_an_error(saved, make_model):
    base_dir, adapter_dir, wrapped, _ = saved(layers_to_transform=[2, 3])
    base = type(wrapped.get_base_model()).from_pretrained(base_dir)
    other = get_peft_model(base, AdaptQConfig(task_type="CAUSAL_LM", layers_to_transform=[0, 1]))
    with pytest.raises(ValueError, match=r"deltas for blocks \[2, 3\], and this adapter adapts \[0, 1\]"):
        other.load_adapter(str(adapter_dir), "default", is_trainable=True)


def test_a_newer_format_is_an_error(saved):
    base_dir, adapter_dir, wrapped, _ = saved()
    config = json.loads((adapter_dir / CONFIG).read_text())
    config["adaptq_version"] = 99
    (adapter_dir / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="adaptq_version is 99; this adaptq_peft reads version 1"):
        PeftModel.from_pretrained(type(wrapped.get_base_model()).from_pretrained(base_dir), adapter_dir)


def test_a_crash_while_saving_leaves_the_previous_adapter(saved, batch, tmp_path):
    """A second process is killed while it writes a large adapter over a small one."""
    base_dir, adapter_dir, wrapped, expected = saved()
    code = f"""
        import os, threading, time
        from pathlib import Path
        import torch
        from safetensors.torch import save_file
        folder = Path({str(adapter_dir)!r})
        before = set(os.listdir(folder))
        def kill_when_writing():
            while not set(os.listdir(folder)) - before:
                pass
            os._exit(9)
        threading.Thread(target=kill_when_writing, daemon=True).start()
        save_file({{"a": torch.zeros(100_000_000)}}, folder / {WEIGHTS!r})
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True)
    assert result.returncode == 9
    base = type(wrapped.get_base_model()).from_pretrained(base_dir)
    assert torch.equal(logits(PeftModel.from_pretrained(base, adapter_dir), batch), expected)


def test_nothing_is_unpickled(saved, monkeypatch):
    base_dir, adapter_dir, wrapped, _ = saved()
    monkeypatch.setattr(torch, "load", None)
    PeftModel.from_pretrained(type(wrapped.get_base_model()).from_pretrained(base_dir), adapter_dir)


def test_the_version_of_the_package():
    assert adaptq_peft.__version__
