"""Fine-tune a causal language model with ADAPTQ in a plain PyTorch loop.

    python scripts/examples/plain_loop.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data my_texts.txt

`--data` is a text file, a sample a line. 50 to 100 samples or more choose the blocks well.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from adaptq_peft import AdaptQConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model id on the Hub, or a folder")
    parser.add_argument("--data", type=Path, required=True, help="a text file, a sample a line")
    parser.add_argument("--output", type=Path, default=Path("my-adapter"), help="folder of the adapter")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256, help="tokens a sample is cut to")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="as for LoRA")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = [line for line in options.data.read_text(encoding="utf-8").splitlines() if line.strip()]

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="bfloat16").to(device)
    model = get_peft_model(model, AdaptQConfig(task_type="CAUSAL_LM", calibration_data=texts))
    model.print_trainable_parameters()

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.learning_rate)
    model.train()
    for step in range(1, options.steps + 1):
        chosen = random.choices(texts, k=options.batch_size)
        batch = tokenizer(
            chosen, return_tensors="pt", padding=True, truncation=True, max_length=options.max_length
        ).to(device)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")

    model.save_pretrained(options.output)  # what was trained, and nothing else


if __name__ == "__main__":
    main()
