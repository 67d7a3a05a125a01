"""A training script that saves checkpoints, and can be killed: `python killed_run.py OUTPUT_DIR STEP_TO_DIE_AT`."""

from __future__ import annotations

import os
import signal
import sys

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from adaptq_peft import AdaptQConfig


class Die(TrainerCallback):
    """The out-of-memory killer, or the end of a booked slot: no handler runs, nothing is saved."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def build(output_dir, die_at=None):
    """The whole script up to `train()`: what a user starts again, unchanged, after a crash."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        attention_dropout=0.1,  # so that the random state matters, too
        bos_token_id=1,
        eos_token_id=2,
    )
    ids = torch.randint(3, 96, (60, 12))
    samples = [{"input_ids": row, "labels": row} for row in ids]
    model = get_peft_model(
        LlamaForCausalLM(config),
        AdaptQConfig(task_type="CAUSAL_LM", calibration_data=[{"input_ids": row.tolist()} for row in ids]),
    )
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    callbacks = [Die(die_at)] if die_at else None
    return Trainer(model, arguments, train_dataset=samples, eval_dataset=samples[:8], callbacks=callbacks)


if __name__ == "__main__":
    build(sys.argv[1], int(sys.argv[2])).train()
