"""Learn a domain and keep what the model knew: README's recipe, from the model to a certified adapter.

    python scripts/examples/learn_and_keep.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data my_texts.txt \
        --general wikipedia.txt --budget 0.02

Both are text files, a text a line. A tenth of `--data` is held out. Half of `--general` (32 lines or more) anchors
the training; on the other half the budget is fitted and certified.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from adaptq_peft import AdaptQConfig, BaseReference, PreservationCallback, fit_to_budget


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model id on the Hub, or a folder")
    parser.add_argument("--data", type=Path, required=True, help="domain: a text file, a text a line")
    parser.add_argument("--general", type=Path, required=True, help="what must not be forgotten, in the same form")
    parser.add_argument("--output", type=Path, default=Path("my-adapter"), help="folder of the adapter")
    parser.add_argument("--budget", type=float, default=0.02, help="general perplexity may rise by this fraction")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=-1, help="fewer steps than the epochs have")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=128, help="tokens a text is cut to in training")
    parser.add_argument("--learning-rate", type=float, default=1.6e-3)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    train, held_out = read(options.data, 0.1)
    general, general_held_out = read(options.general, 0.5)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="bfloat16")

    # What the base says is asked before its blocks are quantized.
    anchor = PreservationCallback.from_base(model, general, tokenizer, one_sided=True, max_length=options.max_length)
    reference = BaseReference.of(model, general_held_out, held_out, tokenizer=tokenizer)

    config = AdaptQConfig(
        task_type="CAUSAL_LM",
        selection_ratio=0.2,
        frozen_rank=64,
        quantization="int8",
        calibration_data=train,
    )
    model = get_peft_model(model, config)
    model.print_trainable_parameters()

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.output),
            num_train_epochs=options.epochs,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            warmup_steps=0.1,  # below 1: a share of all steps
            weight_decay=0.01,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=[tokenizer(text, truncation=True, max_length=options.max_length) for text in train],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[anchor],
    )
    trainer.train()

    report = fit_to_budget(model, base=reference, budget=options.budget)
    print(report)
    model.save_pretrained(options.output)


def read(path: Path, held_out: float) -> tuple[list[str], list[str]]:
    """The texts of a file in two parts, the second a fraction of them."""
    texts = load_dataset("text", data_files=str(path), split="train").filter(lambda row: row["text"].strip())
    parts = texts.train_test_split(test_size=held_out, seed=0)
    return list(parts["train"]["text"]), list(parts["test"]["text"])


if __name__ == "__main__":
    main()
