"""A QLoRA script with ADAPTQ in place of LoRA: the model is loaded in 4 bits, and `SFTTrainer` makes the adapter.

    python scripts/examples/qlora_script.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data my_texts.txt

`--data` is a text file, a sample a line. The adapted blocks get their original weights back from the model's
checkpoint, tensor by tensor. With `--blocks 20 21 ...` the model arrives already split, with those blocks in 16 bits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from adaptq_peft import AdaptQConfig, adaptq_bnb_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model id on the Hub, or a folder")
    parser.add_argument("--data", type=Path, required=True, help="a text file, a sample a line")
    parser.add_argument("--blocks", type=int, nargs="+", help="the blocks to adapt; default: chosen by a profile")
    parser.add_argument("--output", type=Path, default=Path("my-adapter"), help="folder of adapter and checkpoints")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256, help="tokens a sample is cut to")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="as for LoRA")
    options = parser.parse_args()

    in_4_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    if options.blocks:
        in_4_bits = adaptq_bnb_config(options.blocks, options.model, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16, quantization_config=in_4_bits)
    texts = [line for line in options.data.read_text(encoding="utf-8").splitlines() if line.strip()]
    trainer = SFTTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(options.model),
        args=SFTConfig(
            output_dir=str(options.output),
            max_length=options.max_length,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            logging_steps=1,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=Dataset.from_dict({"text": texts}),
        peft_config=AdaptQConfig(task_type="CAUSAL_LM", layers_to_transform=options.blocks, calibration_data=texts),
    )
    trainer.train()
    trainer.save_model()  # what was trained, and nothing else


if __name__ == "__main__":
    main()
