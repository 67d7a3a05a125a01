"""Peak memory of getting to a model with its lower half in 4 bits: loaded split, all in 4 bits, or all in 16.

    python scripts/benchmarks/loading_memory.py --shape 16,1024,4096,16,16,8192

A random checkpoint of that shape, or the one that `--model` names, is loaded by a process of its own for each variant:
- split: `from_pretrained(quantization_config=adaptq_bnb_config(blocks, folder))`, then `get_peft_model`;
- restored: `from_pretrained(quantization_config=BitsAndBytesConfig(...))` quantizes all blocks, as QLoRA scripts do,
  then `get_peft_model` reads the original weights of the adapted ones from the checkpoint;
- swapped: `from_pretrained` in `--dtype`, then `get_peft_model`, which swaps the frozen blocks' linears in memory.

Bytes beyond what the process held before loading, sampled every millisecond from Linux's /proc: `resident` counts
mapped pages of the checkpoint files too, which the system can drop, `anonymous` does not. The deltas are in `--dtype`.
The checkpoint is in float32 unless `--checkpoint-dtype` says otherwise: on a CPU, transformers leaves weights that
need no cast in the mapped file, and loading them whole would seem to cost nothing. The processes run with
MALLOC_MMAP_THRESHOLD_=1000000, unless it is set: the C library then returns freed tensors to the system at once.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from common import load_model, make_parser, parameter_bytes, report
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from adaptq_peft import AdaptQConfig, adaptq_bnb_config

VARIANTS = ("split", "restored", "swapped")
STATUS_FIELDS = {"VmRSS:": "resident", "RssAnon:": "anonymous"}


class MemorySampler:
    """The memory of this process beyond what it held when this was built, now and at its peak."""

    def __init__(self) -> None:
        self._start = self._read()
        self.peak = dict.fromkeys(self._start, 0)
        threading.Thread(target=self._sample, daemon=True).start()

    def now(self) -> dict[str, int]:
        return {name: value - self._start[name] for name, value in self._read().items()}

    def _read(self) -> dict[str, int]:
        lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
        return {STATUS_FIELDS[words[0]]: int(words[1]) * 1024 for words in lines if words[0] in STATUS_FIELDS}

    def _sample(self) -> None:
        while True:
            self.peak = {name: max(self.peak[name], value) for name, value in self.now().items()}
            time.sleep(0.001)


def measure(variant: str, folder: str, arguments: argparse.Namespace) -> dict[str, object]:
    """Load and prepare a model in this process; the bytes held and the peak so far after each of the two stages."""
    dtype = getattr(torch, arguments.dtype)
    count = AutoConfig.from_pretrained(folder).num_hidden_layers
    blocks = list(range(count // 2, count))
    memory = MemorySampler()
    quantization = {
        "split": lambda: adaptq_bnb_config(blocks, folder, dtype),
        "restored": lambda: BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
        "swapped": lambda: None,
    }[variant]()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map=arguments.device, quantization_config=quantization
    )
    loaded = describe(model, memory)
    model = get_peft_model(
        model, AdaptQConfig(layers_to_transform=blocks, frozen_rank=0), autocast_adapter_dtype=False
    )
    return {"after from_pretrained": loaded, "after get_peft_model": describe(model, memory)}


def describe(model: nn.Module, memory: MemorySampler) -> dict[str, object]:
    gc.collect()
    result: dict[str, object] = {"peak": memory.peak, "held": memory.now(), "parameters": parameter_bytes(model)}
    if torch.cuda.is_available():
        result["cuda_peak"] = torch.cuda.max_memory_allocated()
    return result


def measure_in_a_process(variant: str, folder: str) -> dict[str, object]:
    with tempfile.NamedTemporaryFile(suffix=".json") as output:
        command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant, "--folder", folder]
        environment = {"MALLOC_MMAP_THRESHOLD_": "1000000", **os.environ}
        subprocess.run([*command, "--output", output.name], check=True, stdout=subprocess.DEVNULL, env=environment)
        return json.loads(Path(output.name).read_text())


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--checkpoint-dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        arguments.output.write_text(json.dumps(measure(arguments.variant, arguments.folder, arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = load_model(arguments)
        parameters = parameter_bytes(model)
        model.to(getattr(torch, arguments.checkpoint_dtype)).save_pretrained(folder, max_shard_size="200MB")
        del model
        variants = {variant: measure_in_a_process(variant, folder) for variant in VARIANTS}
    report(arguments, {"unquantized_parameters": parameters, **variants})


if __name__ == "__main__":
    main()
