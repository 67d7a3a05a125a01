"""Bytes of the blocks' linears before and after, and of the adapter file against its deltas.

python scripts/benchmarks/sizes.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from common import load_model, make_parser, report
from peft import get_peft_model

from adaptq_peft import AdaptQConfig
from adaptq_peft.evaluation.memory import measure_weight_bytes, paper_weight_ratio
from adaptq_peft.selection import find_blocks


def main() -> None:
    arguments = make_parser(__doc__.splitlines()[0]).parse_args()
    model = load_model(arguments)
    before = measure_weight_bytes(model)
    count = len(find_blocks(model))
    config = AdaptQConfig(
        task_type="CAUSAL_LM", selection_strategy="last", num_adapted_blocks=count // 2, frozen_rank=0
    )
    wrapped = get_peft_model(model, config)
    after = measure_weight_bytes(wrapped)
    deltas = sum(p.nbytes for p in wrapped.parameters() if p.requires_grad)
    with tempfile.TemporaryDirectory() as folder:
        wrapped.save_pretrained(folder)
        file = (Path(folder) / "adapter_model.safetensors").stat().st_size
    report(
        arguments,
        {
            "before": vars(before),
            "after": vars(after),
            "paper_ratio": paper_weight_ratio(count, count // 2),
            "delta_bytes": deltas,
            "file_bytes": file,
            "file_to_deltas": file / deltas,
        },
    )


if __name__ == "__main__":
    main()
