"""What the anchor adds to an optimizer step: time and floating-point operations, at 4 domain texts to 1 general text.

    python scripts/benchmarks/anchoring.py --batch 8 --length 256

Both variants run in turn on one model, the top half of its blocks adapted. `flops` counts matrix products
(`torch.utils.flop_counter`), bitsandbytes' not: with `--quantization none` it counts all of them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from common import load_model, make_parser, median_ratio, peak_bytes, random_batch, report, time_in_turn
from peft import get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from adaptq_peft import AdaptQConfig
from adaptq_peft.preservation.anchor import Anchor
from adaptq_peft.selection import find_blocks


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--quantization", default="nf4", help="of the frozen blocks")
    return parser.parse_args()


def make_steps(model: nn.Module, batch: dict[str, torch.Tensor], anchor: Anchor) -> dict[str, Callable[[], None]]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def step(anchored: bool) -> None:
        if anchored:
            anchor.loss(model).backward()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"anchored": lambda: step(True), "plain": lambda: step(False)}


def count_flops(run: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def main() -> None:
    arguments = parse()
    base = load_model(arguments)
    batch = random_batch(base, arguments.batch, arguments.length)
    general = max(arguments.batch // 4, 1)
    texts = [{"input_ids": row} for row in random_batch(base, 2 * general, arguments.length)["input_ids"].cpu()]
    anchor = Anchor.from_base(base, texts, batch_size=general, max_length=arguments.length)
    count = len(find_blocks(base))
    config = AdaptQConfig(
        task_type="CAUSAL_LM",
        layers_to_transform=list(range(count - count // 2, count)),
        quantization=arguments.quantization,
        frozen_rank=0,
    )
    model = get_peft_model(base, config, autocast_adapter_dtype=False).train()
    steps = make_steps(model, batch, anchor)
    seconds = time_in_turn(steps, arguments.repeats)
    flops = {name: count_flops(step) for name, step in steps.items()}
    result = {
        "tokens": {"domain": arguments.batch * arguments.length, "general": general * arguments.length},
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio": median_ratio(seconds, "anchored", "plain"),
        "flops": flops,
        "flops_ratio": flops["anchored"] / flops["plain"],
        "step_bytes": {name: peak_bytes(step) for name, step in steps.items()},
        "cache_bytes": anchor.answers.nbytes,
    }
    report(arguments, result)


if __name__ == "__main__":
    main()
