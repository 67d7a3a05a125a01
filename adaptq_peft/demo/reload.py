"""Loads a saved adapter in a process of its own and measures its perplexity, to compare it with what was trained.

Run as `python -m adaptq_peft.demo.reload ADAPTER_FOLDER EVALUATION_SET RESULT_FILE`; `reload_in_new_process` does so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..evaluation import Perplexity
from .evaluate import EvaluationSet


class ReloadError(RuntimeError):
    """The adapter could not be loaded in a second process, or behaves otherwise there than before."""


def reload_in_new_process(adapter: Path, evaluation: Path, result: Path) -> dict[str, Perplexity]:
    """Start a fresh Python, load base and adapter from disk there, and measure the perplexities again.

    Args:
        adapter: Folder that `save_pretrained` wrote.
        evaluation: File that `EvaluationSet.save` wrote.
        result: File that the other process writes its figures to.

    Returns:
        Perplexity on "domain" and "general" in the other process.

    Raises:
        ReloadError: If the other process fails; its last lines are in the message.
    """
    import torch

    # The same number of threads: float sums depend on how the work is divided.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", __name__, str(adapter), str(evaluation), str(result)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        last_lines = "\n".join(finished.stderr.strip().splitlines()[-15:])
        raise ReloadError(f"the second process ended with code {finished.returncode}:\n{last_lines}")
    figures = json.loads(result.read_text(encoding="utf-8"))
    return {name: Perplexity(**values) for name, values in figures.items()}


def check_identical(trained: dict[str, Perplexity], reloaded: dict[str, Perplexity]) -> None:
    """Raise `ReloadError` unless each perplexity is equal to the last bit."""
    for name, expected in trained.items():
        if reloaded[name] != expected:
            raise ReloadError(
                f"the reloaded adapter differs on {name} text: perplexity {reloaded[name].value!r} in the second "
                f"process, {expected.value!r} before saving; they must be equal"
            )


def measure_saved_adapter(adapter: Path, evaluation: EvaluationSet) -> dict[str, Perplexity]:
    """Load the base that the adapter names and the adapter, from disk alone, and measure the perplexities."""
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import adaptq_peft  # noqa: F401  (registers the method with PEFT)

    config: Any = PeftConfig.from_pretrained(str(adapter))
    base_folder = config.base_model_name_or_path
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=config.base_fingerprint["dtype"])
    model = PeftModel.from_pretrained(base, str(adapter))
    return evaluation.measure(model, AutoTokenizer.from_pretrained(base_folder))


def main(adapter: Path, evaluation: Path, result: Path) -> None:
    """Measure the saved adapter and write the figures as JSON."""
    figures = measure_saved_adapter(adapter, EvaluationSet.load(evaluation))
    result.write_text(json.dumps({name: asdict(value) for name, value in figures.items()}), encoding="utf-8")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
