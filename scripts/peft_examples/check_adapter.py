"""Loads the adapters in the given folders and checks that they are ADAPTQ's and trained. Run by run.py."""

from __future__ import annotations

import sys

import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM, PeftConfig

import adaptq_peft  # noqa: F401  registers ADAPTQ

CLASSES = {"CAUSAL_LM": AutoPeftModelForCausalLM, "SEQ_2_SEQ_LM": AutoPeftModelForSeq2SeqLM}


def check(folder: str) -> None:
    """Raise SystemExit if the adapter is not of ADAPTQ, was not trained, or is not finite."""
    config = PeftConfig.from_pretrained(folder)
    model = CLASSES[config.task_type].from_pretrained(folder)
    deltas = [parameter for name, parameter in model.named_parameters() if ".adaptq_delta." in name]
    if not deltas or not all(torch.isfinite(delta).all() for delta in deltas):
        raise SystemExit(f"{folder}: {len(deltas)} deltas, of which some are not finite or there are none")
    if not any(delta.any() for delta in deltas):
        raise SystemExit(f"{folder}: all deltas are zero, so nothing was trained")
    print(f"loaded: {config.peft_type}, blocks {config.layers_to_transform}, {len(deltas)} deltas")


if __name__ == "__main__":
    if not sys.argv[1:]:
        raise SystemExit("no adapter was saved")
    for argument in sys.argv[1:]:
        check(argument)
