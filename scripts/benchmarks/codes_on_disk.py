"""Bytes on disk of calibrated codes: inside each adapter, or once in a quantized base that adapters refer to.

python scripts/benchmarks/codes_on_disk.py --dtype float32 --shape 4,256,768,4,2,1000
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from common import load_model, make_parser, report
from peft import get_peft_model
from safetensors.torch import load_file

from adaptq_peft import AdaptQConfig, quantize_base
from adaptq_peft.selection import find_blocks


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256, help="calibration tokens; sizes do not depend on them")
    arguments = parser.parse_args()
    model = load_model(arguments)
    model.generation_config = None  # or it would write calibration text of its own, which takes long
    count = len(find_blocks(model))
    tokens = torch.randint(10, model.config.vocab_size, (arguments.tokens,)).tolist()
    data = [{"input_ids": tokens}]
    with tempfile.TemporaryDirectory() as folder:
        base = quantize_base(model, folder, data=data, calibration="absmax", tokens=arguments.tokens)
        common = {
            "selection_strategy": "last",
            "num_adapted_blocks": count // 2,
            "delta_dtype": "bfloat16",
            "frozen_rank": 0,
        }
        fields = {
            "codes_in_the_adapter": {"quantization_calibration": "absmax", "calibration_data": data},
            "reference_to_the_base": {"quantized_base": folder},
            "plain_rounding": {},
        }
        adapters = {}
        for name, own in fields.items():
            config = AdaptQConfig(task_type="CAUSAL_LM", **common, **own)
            get_peft_model(copy.deepcopy(model), config).save_pretrained(f"{folder}/{name}")
            adapters[name] = (Path(folder) / name / "adapter_model.safetensors").stat().st_size
        deltas = load_file(f"{folder}/plain_rounding/adapter_model.safetensors")
        stored = load_file(f"{folder}/quantized_base.safetensors")
    codes = sum(tensor.nbytes for key, tensor in stored.items() if key.endswith(".weight"))
    report(
        arguments,
        {
            "adapter_bytes": adapters,
            "delta_bytes": sum(tensor.nbytes for tensor in deltas.values()),
            "base_bytes": base.num_bytes,
            "base_bits_a_weight": 8 * base.num_bytes / (2 * codes),
        },
    )


if __name__ == "__main__":
    main()
