"""Time until a model with half of its blocks in NF4 is ready: bitsandbytes' own loading against this package's ways.

    python scripts/benchmarks/loading_time.py --repeats 7

The variants run in turn in one process, on one checkpoint, with the upper half of the blocks left in `--dtype`:
- bitsandbytes: `from_pretrained(quantization_config=BitsAndBytesConfig(...))` with these blocks in its skip list;
- split: the same with `adaptq_bnb_config(blocks, folder)`;
- swapped: `from_pretrained` in `--dtype`, then the linears of the lower half are quantized in memory;
- adapter: `from_pretrained` in `--dtype`, then `get_peft_model`, which also adds deltas and takes the fingerprint.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable

import torch
from common import load_model, make_parser, median_ratio, report, time_in_turn
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from adaptq_peft import AdaptQConfig, adaptq_bnb_config
from adaptq_peft.block_forms import quantize_blocks
from adaptq_peft.quantization import resolve_quantization
from adaptq_peft.selection import find_blocks


def make_variants(folder: str, arguments: argparse.Namespace) -> dict[str, Callable[[], object]]:
    dtype = getattr(torch, arguments.dtype)

    def load(**options: object):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).to(arguments.device)

    blocks = find_blocks(load())
    adapted = [block.index for block in blocks[len(blocks) // 2 :]]
    skipped = [f"{blocks[index].name}." for index in adapted] + ["lm_head"]
    own = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
    )

    def swapped() -> None:
        model = load()
        quantize_blocks(model, find_blocks(model)[: adapted[0]], resolve_quantization("nf4"))

    return {
        "bitsandbytes": lambda: load(quantization_config=own),
        "split": lambda: load(quantization_config=adaptq_bnb_config(adapted, folder)),
        "swapped": swapped,
        "adapter": lambda: get_peft_model(load(), AdaptQConfig(layers_to_transform=adapted, frozen_rank=0)),
    }


def main() -> None:
    arguments = make_parser(__doc__.splitlines()[0]).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        load_model(arguments).save_pretrained(folder)
        variants = make_variants(folder, arguments)
        seconds = time_in_turn(variants, arguments.repeats)
    result = {
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio_to_bitsandbytes": {
            name: median_ratio(seconds, name, "bitsandbytes") for name in list(seconds) if name != "bitsandbytes"
        },
    }
    report(arguments, result)


if __name__ == "__main__":
    main()
