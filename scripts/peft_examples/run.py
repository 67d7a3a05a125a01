"""Runs three of PEFT's own example scripts with `AdaptQConfig` in the place of `LoraConfig`.

    python scripts/peft_examples/run.py                           # fetches the scripts from GitHub
    python scripts/peft_examples/run.py --repository ../peft      # takes them from a clone

PEFT's sdist has no examples, so they come from its repository, at one commit. In each script only the expression
`LoraConfig(...)` is replaced, and an import added; the change is printed as a diff. They run on the CPU, offline, on
tiny models with random weights under the Hub ids that they load, and on data in the columns that they read. Ends with
0 only if each ran, its losses are finite, and its adapter loads.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "peft_tests"))

import tiny_hub  # noqa: E402

COMMIT = "5d602fdbff04c33c1c4de55cda9d4ae1d7cb7e40"  # the main branch on 2026-08-21, 0.20.1.dev0
RAW = f"https://raw.githubusercontent.com/huggingface/peft/{COMMIT}"
IMPORT = "from adaptq_peft import AdaptQConfig\n"
TEXTS = [f"{quote} {number}" for number in range(4) for quote in tiny_hub.QUOTES]
LOSS = re.compile(r"\b(?:loss|train_loss|train_epoch_loss)\b\W+(?:tensor\()?\W*(-?[\d.]+(?:e-?\d+)?|nan|inf)")


@dataclass(frozen=True)
class Example:
    """A script of PEFT's repository, and what it needs.

    Args:
        script: its path there; it runs with those beside it in `helpers`.
        config: the expression that replaces `LoraConfig(...)`.
        model: Hub id that the script loads; tests of PEFT have the same architecture under the id `like`.
        data: file, relative to the folder that it runs in -> rows.
        options: its command line.
        helpers: paths of further files that it imports.
    """

    script: str
    config: str
    model: str
    like: str
    data: dict[str, list[dict[str, Any]]]
    options: tuple[str, ...] = ()
    helpers: tuple[str, ...] = ()


SENTENCES = [{"sentence": text, "label": ("positive", "negative")[len(text) % 2]} for text in TEXTS]
INSTRUCTIONS = [{"instruction": "quote", "output": text} for text in TEXTS]
LLAMA = "trl-internal-testing/tiny-random-LlamaForCausalLM"

EXAMPLES = (
    Example(  # TRL's SFTTrainer, which calls get_peft_model itself, with gradient checkpointing
        "examples/sft/train.py",
        'AdaptQConfig(task_type="CAUSAL_LM")',
        "example/llama",
        LLAMA,
        {f"data/{split}.jsonl": [{"text": text} for text in TEXTS] for split in ("train", "test")},
        (
            *("--model_name_or_path", "example/llama", "--dataset_name", "data", "--output_dir", "output"),
            *("--use_peft_lora", "True", "--gradient_checkpointing", "True", "--use_reentrant", "True"),
            *("--max_steps", "2", "--per_device_train_batch_size", "2", "--max_length", "16", "--logging_steps", "1"),
            *("--use_cpu", "True", "--report_to", "none", "--bf16", "False"),
        ),
        ("examples/sft/utils.py",),
    ),
    Example(  # transformers' Trainer, load_best_model_at_end, device_map="auto"
        "examples/olora_finetuning/olora_finetuning.py",
        'AdaptQConfig(task_type="CAUSAL_LM")',
        "example/llama",
        LLAMA,
        {"data/train.jsonl": INSTRUCTIONS},
        (
            *("--base_model", "example/llama", "--data_path", "data", "--output_dir", "output", "--dtype", "float32"),
            *("--batch_size", "4", "--val_set_size", "4", "--eval_step", "1", "--save_step", "1"),
        ),
    ),
    Example(  # an accelerate loop on an encoder-decoder model, which can't write calibration text
        "examples/conditional_generation/peft_lora_seq2seq_accelerate_fsdp.py",
        "AdaptQConfig(task_type=TaskType.SEQ_2_SEQ_LM, calibration_data=load_dataset("
        '"json", data_files=f"{base_path}/financial_phrase_bank_train.jsonl", split="train")["sentence"])',
        "t5-base",
        "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated",
        {
            f"temp/data/FinancialPhraseBank-v1.0/financial_phrase_bank_{split}.jsonl": SENTENCES
            for split in ("train", "val")
        },
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run three example scripts of PEFT with AdaptQConfig.")
    parser.add_argument("--repository", type=Path, help=f"a clone of PEFT that has commit {COMMIT[:10]}")
    repository = parser.parse_args().repository
    failed = [example.script for example in EXAMPLES if not run(example, repository)]
    print(f"{len(EXAMPLES) - len(failed)} of {len(EXAMPLES)} examples passed", *failed, sep="\n  failed: ")
    return bool(failed)


def run(example: Example, repository: Path | None) -> bool:
    """Run one example in a new folder and check what it leaves."""
    print(f"=== {example.script}", flush=True)
    with tempfile.TemporaryDirectory(prefix="peft-example-") as name:
        folder = Path(name)
        script = write_scripts(example, repository, folder)
        write_data(example, folder)
        tiny_hub.add_model(folder / "hub", example.model, *tiny_hub.MODELS[example.like])
        tiny_hub.add_tokenizer(folder / "hub", example.model)
        result = start(folder, [str(script), *example.options])
        losses = [float(value) for value in LOSS.findall(result.stdout + result.stderr)]
        print(f"exit status {result.returncode}, losses {losses}", flush=True)
        if result.returncode or not losses or not all(map(math.isfinite, losses)):
            print(result.stdout[-2000:], result.stderr[-4000:], sep="\n")
            return False
        adapters = [p.parent for p in folder.rglob("adapter_config.json") if "checkpoint-" not in str(p)]
        check = start(folder, [str(HERE / "check_adapter.py"), *map(str, adapters)])
        print(check.stdout or check.stderr[-4000:], flush=True)
        return check.returncode == 0


def start(folder: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a Python script in `folder`, offline, with the Hub cache that is there."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
        "HF_HOME": str(folder / "home"),
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "ACCELERATE_USE_CPU": "true",
    }
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


def write_scripts(example: Example, repository: Path | None, folder: Path) -> Path:
    """Write the script and its helpers, the config swapped, into `folder`; print what was changed."""
    changed = 0
    for path in (example.script, *example.helpers):
        source = fetch(path, repository)
        swapped = swap_config(source, example.config)
        lines = (text.splitlines(keepends=True) for text in (source, swapped))
        sys.stdout.writelines(difflib.unified_diff(*lines, fromfile=path, tofile=path, n=0))
        changed += swapped != source
        (folder / Path(path).name).write_text(swapped, encoding="utf-8")
    if changed != 1:
        raise ValueError(f"{changed} files of {example.script} build a LoraConfig; expected 1")
    return folder / Path(example.script).name


def fetch(path: str, repository: Path | None) -> str:
    """The text of a file of PEFT's repository at `COMMIT`, from a clone or, without one, from GitHub."""
    if repository is not None:
        command = ["git", "-C", str(repository), "show", f"{COMMIT}:{path}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    with urllib.request.urlopen(f"{RAW}/{path}", timeout=60) as response:
        return response.read().decode()


def swap_config(source: str, config: str) -> str:
    """`source` with the expression `LoraConfig(...)` replaced by `config` and its import put before it all."""
    calls = [
        ast.get_source_segment(source, node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "LoraConfig"
    ]
    if not calls:
        return source
    (call,) = calls
    assert call is not None
    return IMPORT + source.replace(call, config)


def write_data(example: Example, folder: Path) -> None:
    """Write the example's data as JSON lines."""
    for name, rows in example.data.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
