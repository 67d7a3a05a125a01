"""Time of profiling against a plain no-grad forward through the blocks on the same batches.

python scripts/benchmarks/profiling.py --samples 100 --length 128
"""

from __future__ import annotations

import argparse
import statistics

import torch
from common import load_model, make_parser, median_ratio, random_batch, report, time_in_turn
from torch import nn

from adaptq_peft import profile_activations


def plain_forward(model: nn.Module, batches: list[torch.Tensor]) -> None:
    """The backbone without the head: embeddings, blocks and the final norm."""
    model.eval()
    with torch.no_grad():
        for input_ids in batches:
            model.base_model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False)


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    model = load_model(arguments)
    input_ids = random_batch(model, arguments.samples, arguments.length)["input_ids"]
    batches = list(input_ids.split(arguments.batch))
    data = [{"input_ids": row} for row in input_ids.cpu()]
    seconds = time_in_turn(
        {
            "profile": lambda: profile_activations(model, data, batch_size=arguments.batch),
            "plain forward": lambda: plain_forward(model, batches),
        },
        arguments.repeats,
    )
    report(
        arguments,
        {
            "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
            "ratio": median_ratio(seconds, "profile", "plain forward"),
        },
    )


if __name__ == "__main__":
    main()
