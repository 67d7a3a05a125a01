"""Fine-tune a causal language model with ADAPTQ and transformers' `Trainer`.

    python scripts/examples/train_with_trainer.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data my_texts.txt

`--data` is a text file, a sample a line; the last tenth is held out. Checkpoints are saved on the way: after a crash
add `--resume` to the same command.
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

from adaptq_peft import AdaptQConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model id on the Hub, or a folder")
    parser.add_argument("--data", type=Path, required=True, help="a text file, a sample a line")
    parser.add_argument("--output", type=Path, default=Path("my-adapter"), help="folder of adapter and checkpoints")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument(
        "--save-steps", type=int, default=50, help="a checkpoint and an evaluation every so many steps"
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256, help="tokens a sample is cut to")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="as for LoRA")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = load_dataset("text", data_files=str(options.data), split="train").filter(lambda row: row["text"].strip())
    parts = texts.train_test_split(test_size=0.1, shuffle=False)
    tokens = parts.map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=options.max_length),
        batched=True,
        remove_columns="text",
    )

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="bfloat16")
    model = get_peft_model(model, AdaptQConfig(task_type="CAUSAL_LM", calibration_data=parts["train"]))
    model.print_trainable_parameters()

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=options.save_steps,
            save_steps=options.save_steps,
            load_best_model_at_end=True,
            report_to="none",
        ),
        train_dataset=tokens["train"],
        eval_dataset=tokens["test"],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model()  # the deltas of the best checkpoint


if __name__ == "__main__":
    main()
