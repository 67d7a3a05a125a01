"""Trains one adapter on domain text and saves it, for `shrinkage.py` to take apart: SmolLM2-135M.

    OMP_NUM_THREADS=1 python scripts/benchmarks/shrinkage_adapter.py --domain legal_train.jsonl --output runs/adapter \
        --delta-scaling 1.0

Documents that `domain_split` holds out are not trained on.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import set_seed

from adaptq_peft import AdaptQConfig
from adaptq_peft.comparison.texts import hold_out, read_documents
from adaptq_peft.demo.model import load_demo_model
from adaptq_peft.demo.training import train, training_windows


def domain_split(path: Path) -> tuple[list[str], list[str], list[str]]:
    """Domain documents for training (70%), for choosing (15%) and for reporting (15%)."""
    training, held_out = hold_out(read_documents(path), 0.3)
    choosing, reporting = hold_out(held_out, 0.5)
    return training, choosing, reporting


def wrap(base: nn.Module, arguments: argparse.Namespace, samples: list) -> nn.Module:
    if arguments.method == "lora":
        return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
    config = AdaptQConfig(
        task_type="CAUSAL_LM",
        selection_ratio=arguments.ratio,
        selection_strategy="activation",
        quantization=arguments.quantization,
        frozen_rank=arguments.frozen_rank,
        delta_scaling=arguments.delta_scaling,
        calibration_data=[{"input_ids": sample["input_ids"].tolist()} for sample in samples[:32]],
    )
    return get_peft_model(base, config)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", type=Path, required=True, help="domain documents: .jsonl, .json or .txt")
    parser.add_argument("--output", type=Path, required=True, help="folder for the adapter")
    parser.add_argument("--method", choices=["adaptq", "lora"], default="adaptq")
    parser.add_argument("--ratio", type=float, default=0.5, help="of blocks that are adapted")
    parser.add_argument("--quantization", default="nf4", help="of the others")
    parser.add_argument("--frozen-rank", type=int, default=0)
    parser.add_argument("--delta-scaling", type=float, default=0.25)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    base, tokenizer = load_demo_model(dtype=torch.bfloat16)
    samples = training_windows(tokenizer, domain_split(arguments.domain)[0], arguments.length)
    set_seed(0)
    model = wrap(base, arguments, samples)
    start = time.perf_counter()
    losses = train(
        model,
        samples,
        steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        batch_size=arguments.batch,
        seed=0,
        on_step=lambda step, loss: print(f"step {step}: {loss:.4f} nats, {time.perf_counter() - start:.0f} s"),
    )
    model.save_pretrained(arguments.output)
    about = {"arguments": {name: str(value) for name, value in vars(arguments).items()}, "losses": losses}
    (arguments.output / "training.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
