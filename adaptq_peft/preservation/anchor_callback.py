"""The anchor in any transformers Trainer: one more callback, and nothing else."""

from __future__ import annotations

from typing import Any

from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .anchor import Anchor
from .original_model import has_adapter

#: Not the class's name: the Trainer would make a new callback from a state of that name, without the base's answers.
STATE_KEY = "adaptq_anchor"
_DOMAIN_TO_GENERAL = 4


class PreservationCallback(Anchor, TrainerCallback):
    """Holds a model to its base on general text while a Trainer (also TRL's) trains it on the domain.

        anchor = PreservationCallback.from_base(model, general_texts, tokenizer)  # before get_peft_model
        trainer = SFTTrainer(model=model, peft_config=config, ..., callbacks=[anchor])

    Arguments are those of `Anchor`. `PreservationCallback(general_texts)` without `from_base` asks the model that the
    Trainer has, with its adapters off, when training begins: for LoRA on a 16-bit base that is the original, too; of
    blocks that were quantized it is the quantized base, and a warning says so.

    The gradient of the anchor's loss is taken at the beginning of each optimizer step, before that of the domain's
    batches, which add theirs to it. So it is clipped, unscaled (fp16) and averaged over processes with them, and
    `grad_norm` in the logs is that of both. (At `on_pre_optimizer_step` the Trainer has done all of this already.)
    The "loss" in the logs is the domain's alone; "anchor_kl" and "anchor_weight" are added to the log entries.
    """

    _share: int | None = None  # the batch size that the last Trainer gave
    _beginning: dict[str, Any] | None = None  # the state in which the first run began

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prepare, and go on where a checkpoint left off; without one begin as the first run with this anchor did."""
        _check_supported(args)
        needs_base = self.mode == "kl" or self._general_texts is None
        if self.answers is None and needs_base and state.global_step > 0 and not has_adapter(kwargs["model"]):
            raise ValueError(
                f"training goes on from step {state.global_step} of a model without an adapter: its base is gone. "
                "Make the anchor with PreservationCallback.from_base(model, ...), with the model as it was loaded"
            )
        self.pop_metrics()  # of steps that a run before did not log
        self.prepare(kwargs["model"], kwargs.get("processing_class"))
        if self.batch_size in (None, self._share):
            self.batch_size = self._share = _share_of_domain(args)
        callbacks: Any = state.stateful_callbacks  # a dict once the state is made, whatever its annotation
        saved = callbacks.get(STATE_KEY)
        self._beginning = self._beginning or self.state_dict()
        if saved is not None or state.global_step == 0:
            self.load_state_dict(saved or self._beginning)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the gradient of the anchor's loss where the domain's will be added."""
        model: nn.Module = kwargs["model"]
        optimizer = kwargs.get("optimizer")
        scaler = getattr(optimizer, "scaler", None)  # accelerate's wrapper has the one of fp16
        model.train()
        if callable(getattr(optimizer, "train", None)):  # schedule-free ones hold other weights for evaluation
            optimizer.train()  # type: ignore[union-attr]
        for loss in self.losses(model, state.train_batch_size or args.per_device_train_batch_size):
            (loss if scaler is None else scaler.scale(loss)).backward()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the state where the Trainer saves it with each checkpoint."""
        state.stateful_callbacks[STATE_KEY] = self.state_dict()  # type: ignore[index, call-overload]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the anchor's numbers to a log entry of training."""
        if logs is not None and "loss" in logs:
            metrics = self.pop_metrics()
            logs.update(metrics)
            state.log_history[-1].update(metrics)


def _share_of_domain(args: TrainingArguments) -> int:
    """Texts for one of the anchor to 4 of the domain in an optimizer step of a process."""
    return max(args.per_device_train_batch_size * args.gradient_accumulation_steps // _DOMAIN_TO_GENERAL, 1)


def _check_supported(args: TrainingArguments) -> None:
    """Raise ValueError where gradients can't be taken beside the Trainer's own step."""
    optim = str(getattr(args.optim, "value", args.optim))
    found = {
        "deepspeed": args.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"),
        "fsdp": args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"),
        f"optim={optim!r}": optim in ("lomo", "adalomo") or optim.endswith("_layerwise"),
    }
    used = [name for name, given in found.items() if given]
    if used:
        raise ValueError(
            f"PreservationCallback can't be used with {used[0]}: it takes a gradient of its own beside the Trainer's. "
            "Use one GPU or DistributedDataParallel, and an optimizer that steps after the backward pass."
        )
