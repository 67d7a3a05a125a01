"""What rounding W0 + s * delta to bfloat16 costs a short training: training losses, and the time of one sum.

    python scripts/benchmarks/rounding.py --domain legal_train.jsonl --steps 21

Plain deltas on the upper half of the blocks, nothing quantized. First the model is in float32, so that nothing else is
rounded, and the sum is rounded: not at all, to the nearest number of bfloat16 or of float16, or dithered. Then all of
the model is in bfloat16. All variants see the same batches. `excess` is the mean training loss of a third of the steps
above that without rounding.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import load_model, make_parser, median_ratio, model_name, report, time_in_turn
from peft import get_peft_model
from transformers import AutoTokenizer

from adaptq_peft import AdaptQConfig
from adaptq_peft.comparison.texts import read_documents
from adaptq_peft.demo.training import train, training_windows
from adaptq_peft.merged_weight import temporary_merged_weight


def to_the_nearest(
    rounded: torch.dtype, base: torch.Tensor, deltas: list, scales: list, dtype: torch.dtype
) -> torch.Tensor:
    return torch.add(base, deltas[0], alpha=scales[0]).to(rounded).to(dtype)


def dithered(base: torch.Tensor, deltas: list, scales: list, dtype: torch.dtype) -> torch.Tensor:
    return temporary_merged_weight(base.bfloat16(), deltas, scales, torch.bfloat16).to(dtype)


VARIANTS = {
    "float32": ("float32", temporary_merged_weight),
    "sum in bfloat16, to the nearest": ("float32", partial(to_the_nearest, torch.bfloat16)),
    "sum in float16, to the nearest": ("float32", partial(to_the_nearest, torch.float16)),
    "sum in bfloat16, dithered": ("float32", dithered),
    "all in bfloat16, to the nearest": ("bfloat16", partial(to_the_nearest, torch.bfloat16)),
    "all in bfloat16, dithered": ("bfloat16", dithered),
}


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--domain", type=Path, required=True, help='a .jsonl file with "text" in each line')
    parser.add_argument("--steps", type=int, default=21)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rate", type=float, default=4e-4, help="times delta_scaling 0.25 on the weight")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def losses_with(variant: str, samples: list, arguments: argparse.Namespace) -> list[float]:
    arguments.dtype, merge = VARIANTS[variant]
    base = load_model(arguments)
    config = AdaptQConfig(task_type="CAUSAL_LM", selection_strategy="last", frozen_rank=0, quantization="none")
    model = get_peft_model(base, config)
    with patch("adaptq_peft.delta_linear.temporary_merged_weight", merge):
        return train(
            model,
            samples,
            steps=arguments.steps,
            learning_rate=arguments.rate,
            batch_size=arguments.batch,
            seed=arguments.seed,
            on_step=lambda step, loss: print(variant, step, f"{loss:.4f}", flush=True),
        )


@torch.no_grad()
def milliseconds_of_a_sum(shape: tuple[int, int], device: str, repeats: int) -> dict[str, Any]:
    """Of a bfloat16 weight and a float32 delta, into bfloat16."""
    base, delta = torch.randn(shape, device=device).bfloat16(), torch.randn(shape, device=device) * 1e-3
    out = torch.empty_like(base)
    seconds = time_in_turn(
        {
            "dithered": lambda: temporary_merged_weight(base, [delta], [0.25], torch.bfloat16),
            "torch.add": lambda: torch.add(base, delta, alpha=0.25, out=out),
            "torch.add in float32, then copied": lambda: out.copy_(torch.add(base, delta, alpha=0.25)),
        },
        repeats,
    )
    return {
        "milliseconds": {name: 1000 * statistics.median(values) for name, values in seconds.items()},
        "ratio_dithered_to": {name: median_ratio(seconds, "dithered", name) for name in seconds if name != "dithered"},
    }


def means_of_thirds(losses: list[float]) -> list[float]:
    size = -(-len(losses) // 3)
    return [statistics.mean(losses[i : i + size]) for i in range(0, len(losses), size)]


def main() -> None:
    arguments = parse()
    shape = (1536, 576) if arguments.device == "cpu" else (14336, 4096)
    result: dict[str, Any] = {"sum": {"shape": shape, **milliseconds_of_a_sum(shape, arguments.device, 100)}}
    tokenizer = AutoTokenizer.from_pretrained(model_name(arguments.model))
    samples = training_windows(tokenizer, read_documents(arguments.domain), arguments.length)
    losses = {variant: losses_with(variant, samples, arguments) for variant in VARIANTS}
    exact = means_of_thirds(losses["float32"])
    result["losses"] = losses
    result["excess"] = {
        variant: [mean - of_exact for mean, of_exact in zip(means_of_thirds(values), exact, strict=True)]
        for variant, values in losses.items()
    }
    report(arguments, result)


if __name__ == "__main__":
    main()
