"""The scripts in scripts/examples, each in a process of its own, as a user starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from adaptq_peft import AdaptQConfig

EXAMPLES = Path(__file__).parents[2] / "scripts" / "examples"


def run(script, *options):
    command = [sys.executable, str(EXAMPLES / script), "--steps", "2", "--batch-size", "2", "--max-length", "16"]
    result = subprocess.run([*command, *map(str, options)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def assert_trained(model_folder, adapter, adapted_blocks=2):
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype="bfloat16")
    loaded = PeftModel.from_pretrained(base, adapter)
    assert len(loaded.peft_config["default"].layers_to_transform) == adapted_blocks
    deltas = [parameter for name, parameter in loaded.named_parameters() if ".adaptq_delta." in name]
    assert any(delta.any() for delta in deltas)
    assert all(torch.isfinite(delta).all() for delta in deltas)


@pytest.fixture
def data(tmp_path, texts):
    (tmp_path / "data.txt").write_text("\n".join(texts), encoding="utf-8")
    return tmp_path / "data.txt"


def test_plain_loop(model_folder, data, tmp_path):
    shown = run("plain_loop.py", "--model", model_folder, "--data", data, "--output", tmp_path / "adapter")
    assert "step 2: loss" in shown
    assert_trained(model_folder, tmp_path / "adapter")


def test_trainer_and_resume(model_folder, data, tmp_path):
    options = ("--model", model_folder, "--data", data, "--output", tmp_path / "adapter", "--save-steps", "1")
    run("train_with_trainer.py", *options)
    assert_trained(model_folder, tmp_path / "adapter")
    run("train_with_trainer.py", *options, "--steps", "3", "--resume")
    state = json.loads((tmp_path / "adapter" / "checkpoint-3" / "trainer_state.json").read_text(encoding="utf-8"))
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3]


def test_recipe_saves_an_adapter_that_holds_a_budget(model_folder, data, texts, tmp_path):
    general = tmp_path / "general.txt"
    general.write_text("\n".join(text.replace("treaty", "harvest") for text in texts), encoding="utf-8")
    options = ("--model", model_folder, "--data", data, "--output", tmp_path / "adapter")
    shown = run("learn_and_keep.py", *options, "--general", general, "--budget", "0.5")
    assert_trained(model_folder, tmp_path / "adapter", adapted_blocks=1)
    config = AdaptQConfig.from_pretrained(tmp_path / "adapter")
    assert (config.selection_strategy, config.quantization, config.frozen_rank) == ("update", "int8", 64)
    assert config.certificate["budget"] == 0.5
    assert "Budget +50.0%: held" in shown


def test_sft_trainer(model_folder, texts, tmp_path):
    pytest.importorskip("trl")
    chats = [
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]} for text in texts
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, chats)), encoding="utf-8")
    run("train_with_sft_trainer.py", "--model", model_folder, "--data", data, "--output", tmp_path / "adapter")
    assert_trained(model_folder, tmp_path / "adapter")


@pytest.mark.parametrize("blocks", [(), ("--blocks", "0", "2")], ids=["restored", "split"])
def test_a_qlora_script(model_folder, data, tmp_path, blocks):
    pytest.importorskip("trl")
    options = ("--model", model_folder, "--data", data, "--output", tmp_path / "adapter")
    run("qlora_script.py", *options, *blocks)
    assert_trained(model_folder, tmp_path / "adapter")
