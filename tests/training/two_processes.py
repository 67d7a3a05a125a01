"""Trains in two processes, which are forked: `python two_processes.py FOLDER`, with model and inputs in the folder.

A process of its own, because torch refuses to fork one that has run autograd where it is built for CUDA.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, debug_launcher
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from adaptq_peft import AdaptQConfig


def train(folder: Path) -> None:
    """Train on this process's half of the batches; save the losses, and the deltas and gradients at the end."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    inputs = torch.load(folder / "inputs.pt")
    config = AdaptQConfig(task_type="CAUSAL_LM", calibration_data=inputs["samples"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    loader = DataLoader(torch.cat(inputs["batches"]), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    assert isinstance(model, torch.nn.parallel.DistributedDataParallel)
    losses = []
    for input_ids in loader:
        loss = model(input_ids=input_ids, labels=input_ids).loss
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    parameters = accelerator.unwrap_model(model).named_parameters()
    kept = {name: (parameter.detach(), parameter.grad) for name, parameter in parameters if parameter.requires_grad}
    torch.save((losses, kept), folder / f"process-{accelerator.process_index}.pt")


if __name__ == "__main__":
    debug_launcher(train, (Path(sys.argv[1]),), num_processes=2)
