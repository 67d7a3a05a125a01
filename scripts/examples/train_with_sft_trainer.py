"""Fine-tune a chat model with ADAPTQ and TRL's `SFTTrainer`; needs `pip install adaptq_peft[train]`.

    python scripts/examples/train_with_sft_trainer.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data my_chats.jsonl

Each line of `--data` is a JSON object with "messages" (a chat) or "text". Only `peft_config` differs from a LoRA
script.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from adaptq_peft import AdaptQConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model id on the Hub, or a folder")
    parser.add_argument("--data", type=Path, required=True, help="a .jsonl file")
    parser.add_argument("--output", type=Path, default=Path("my-adapter"), help="folder of adapter and checkpoints")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256, help="tokens a sample is cut to")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="as for LoRA")
    options = parser.parse_args()

    dataset = load_dataset("json", data_files=str(options.data), split="train")
    trainer = SFTTrainer(
        model=options.model,
        args=SFTConfig(
            output_dir=str(options.output),
            model_init_kwargs={"dtype": "bfloat16"},  # TRL's own default is float32
            max_length=options.max_length,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            logging_steps=1,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=dataset,
        peft_config=AdaptQConfig(task_type="CAUSAL_LM", calibration_data=dataset),
    )
    trainer.train()
    trainer.save_model()  # what was trained, and nothing else


if __name__ == "__main__":
    main()
