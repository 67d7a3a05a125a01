"""Time and peak memory of one optimizer step: ADAPTQ against plain unfreezing, LoRA and QLoRA.

    python scripts/benchmarks/training_step.py --batch 8 --length 256

The variants, all with AdamW, run in turn in one process:
- adaptq: the paper's method: the top half of the blocks adapted, the rest as `--quantization` says and not trained,
  deltas in the dtype of the weights;
- calibrated: the same with `quantization_calibration="auto"`; not in the default variants, since it takes minutes;
- default: `AdaptQConfig()`: half of the blocks by "update" on the batch, the rest with corrections of rank 8;
- recipe: the config of the recipe in the README, in the dtypes of PEFT: a fifth of the blocks, corrections of rank 64
  on the rest over int8; lora-64: LoRA r=64 on all linears. Neither is in the default variants;
- unfrozen: the same blocks of the same base unfrozen directly, without PEFT, the others quantized in the same way;
- lora: PEFT's LoRA, r=8 on all linears, 16-bit base; qlora: the same with all linears of the blocks in NF4.

`step_bytes` is the peak within a step beyond what is held between steps, `held_bytes` parameters, gradients excluded.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable

import torch
from common import (
    load_model,
    make_parser,
    median_ratio,
    parameter_bytes,
    peak_bytes,
    random_batch,
    report,
    time_in_turn,
)
from peft import LoraConfig, get_peft_model
from torch import nn

from adaptq_peft import AdaptQConfig
from adaptq_peft.block_forms import quantize_blocks
from adaptq_peft.quantization import resolve_quantization
from adaptq_peft.selection import find_blocks


def top_half(model: nn.Module) -> list[int]:
    count = len(find_blocks(model))
    return list(range(count - count // 2, count))


def make_adaptq(model: nn.Module, quantization: str, calibration: str | None = None) -> nn.Module:
    config = AdaptQConfig(
        task_type="CAUSAL_LM",
        layers_to_transform=top_half(model),
        quantization=quantization,
        quantization_calibration=calibration,
        frozen_rank=0,
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def make_default(model: nn.Module, quantization: str, batch: dict[str, torch.Tensor]) -> nn.Module:
    config = AdaptQConfig(task_type="CAUSAL_LM", quantization=quantization, calibration_data=samples_of(batch))
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def make_recipe(model: nn.Module, batch: dict[str, torch.Tensor]) -> nn.Module:
    config = AdaptQConfig(
        task_type="CAUSAL_LM",
        selection_ratio=0.2,
        frozen_rank=64,
        quantization="int8",
        calibration_data=samples_of(batch),
    )
    return get_peft_model(model, config)


def samples_of(batch: dict[str, torch.Tensor]) -> list[dict[str, list[int]]]:
    return [{"input_ids": row} for row in batch["input_ids"].tolist()]


def make_unfrozen(model: nn.Module, quantization: str) -> nn.Module:
    blocks, trained = find_blocks(model), top_half(model)
    frozen = [block for block in blocks if block.index not in trained]
    model.requires_grad_(False)
    quantize_blocks(model, frozen, resolve_quantization(quantization))
    for index in trained:
        blocks[index].module.requires_grad_(True)
    return model


def make_lora(model: nn.Module, quantization: str, rank: int = 8) -> nn.Module:
    quantize_blocks(model, find_blocks(model), resolve_quantization(quantization))
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules="all-linear"))


def make_step(model: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def step() -> None:
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--quantization", default="nf4", help="of frozen blocks where the variant leaves it open")
    parser.add_argument("--variants", nargs="+", default=["adaptq", "default", "unfrozen", "lora", "qlora"])
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    base = load_model(arguments)
    batch = random_batch(base, arguments.batch, arguments.length)
    makers = {
        "adaptq": lambda model: make_adaptq(model, arguments.quantization),
        "default": lambda model: make_default(model, arguments.quantization, batch),
        "calibrated": lambda model: make_adaptq(model, arguments.quantization, "auto"),
        "recipe": lambda model: make_recipe(model, batch),
        "unfrozen": lambda model: make_unfrozen(model, arguments.quantization),
        "lora": lambda model: make_lora(model, "none"),
        "lora-64": lambda model: make_lora(model, "none", rank=64),
        "qlora": lambda model: make_lora(model, "nf4"),
    }
    models = {name: makers[name](copy.deepcopy(base)) for name in arguments.variants}
    steps = {name: make_step(model, batch) for name, model in models.items()}
    seconds = time_in_turn(steps, arguments.repeats)
    first = arguments.variants[0]
    blocks = find_blocks(base)
    result = {
        "adapted_base_bytes": sum(p.nbytes for i in top_half(base) for p in blocks[i].module.parameters()),
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        f"ratio_{first}_to": {name: median_ratio(seconds, first, name) for name in arguments.variants[1:]},
        "held_bytes": {name: parameter_bytes(model) for name, model in models.items()},
        "step_bytes": {name: peak_bytes(step) for name, step in steps.items()},
        "trainable_parameters": {
            name: sum(p.numel() for p in model.parameters() if p.requires_grad) for name, model in models.items()
        },
    }
    report(arguments, result)


if __name__ == "__main__":
    main()
