"""Training runs of the demo and of comparisons: transformers' `Trainer`, as any script would use it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

StepReport = Callable[[int, float], None]
"""Called with (steps done, loss of the last one)."""


def training_windows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int
) -> list[dict[str, torch.Tensor]]:
    """Join the texts and cut them into training samples of exactly `length` tokens; a shorter rest is dropped.

    Returns:
        Dicts of `input_ids` and `labels`, each of shape [length], int64.

    Raises:
        ValueError: If the texts are too short for a single sample.
    """
    stream = torch.tensor(tokenizer("\n\n".join(texts), verbose=False)["input_ids"], dtype=torch.long)
    windows = [window for window in stream.split(length) if window.numel() == length]
    if not windows:
        raise ValueError(f"the training texts have {stream.numel()} tokens; one sample takes {length}")
    return [{"input_ids": window, "labels": window} for window in windows]


def train(
    model: nn.Module,
    samples: list[dict[str, torch.Tensor]],
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    on_step: StepReport,
    accumulation: int = 1,
    weight_decay: float = 0.0,
    autocast: torch.dtype | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[float]:
    """Train what requires gradients with AdamW, 10% warmup, then linear decay to zero, gradients clipped to norm 1.

    Args:
        model: The model, with its adapter if it has one; trained in place, on the device it is on, in its own dtype.
        samples: Training samples of equal length, drawn in an order that `seed` decides.
        steps: Optimizer steps.
        learning_rate: Peak learning rate.
        batch_size: Samples in a forward pass.
        seed: Seed of the order.
        on_step: Called after each step.
        accumulation: Forward passes a step.
        weight_decay: Decoupled weight decay.
        autocast: torch.bfloat16 or torch.float16: compute in it where the model's weights are in float32. Default
            `None`: compute in the dtype of the weights.
        callbacks: Of the Trainer, called before `on_step`.

    Returns:
        The loss of each step, in nats a token.
    """
    callback = _StepCallback(on_step)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            bf16=autocast == torch.bfloat16,
            fp16=autocast == torch.float16,
            warmup_steps=-(-steps // 10),
            optim="adamw_torch",
            seed=seed,
            logging_steps=1,
            logging_nan_inf_filter=False,  # else a loss that is not a number is logged as 0
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=next(model.parameters()).device.type == "cpu",
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=samples,
            data_collator=default_data_collator,
            callbacks=[*callbacks, callback],
        )
        trainer.remove_callback(PrinterCallback)  # it prints a raw dict each step
        trainer.train()
    return callback.losses


class _StepCallback(TrainerCallback):
    """Collects the losses and reports each step."""

    def __init__(self, on_step: StepReport) -> None:
        self.losses: list[float] = []
        self._on_step = on_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:  # the last log is a summary without it
            self.losses.append(float(logs["loss"]))
            self._on_step(state.global_step, self.losses[-1])
