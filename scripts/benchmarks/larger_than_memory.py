"""Peak memory of preparing a checkpoint that is never whole in memory: profile, select, load split, add deltas.

    python scripts/benchmarks/larger_than_memory.py --folder /tmp

A Llama-shaped checkpoint with random weights (7B parameters by default, 13.5 GB in bfloat16, a file for each block) is
written into a temporary folder under `--folder`, block by block, and deleted afterwards. A process of its own then
1. profiles it from the disk on `--samples` samples of `--tokens` random tokens: `profile_activations(folder, data)`,
2. selects blocks and loads it split: `from_pretrained(quantization_config=adaptq_bnb_config(config, folder))`,
3. adds deltas in bfloat16: `get_peft_model`.

Bytes beyond what the process held before, sampled every millisecond from Linux's /proc: `resident` counts mapped pages
of the checkpoint's files too, which the system can drop, `anonymous` does not. The process runs with
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
import time
import warnings
from pathlib import Path

import torch
from common import parameter_bytes, report
from loading_memory import MemorySampler
from peft import get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from adaptq_peft import AdaptQConfig, adaptq_bnb_config, profile_activations

SHAPE = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
STANDARD_DEVIATION = 0.02


def write_checkpoint(folder: Path, shape: str) -> int:
    """Write random weights, one block in memory at a time. Returns the bytes of all tensors."""
    *sizes, vocabulary = (int(number) for number in shape.split(","))
    config = LlamaConfig(**dict(zip(SHAPE, sizes, strict=True)), vocab_size=vocabulary)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    with torch.device("meta"):
        names = {name: parameter.shape for name, parameter in LlamaForCausalLM(config).named_parameters()}
    files: dict[str, list[str]] = {}
    for name in names:
        index = name.split(".")[2] if name.startswith("model.layers.") else "outside"
        files.setdefault(f"model-{index}.safetensors", []).append(name)
    for file, members in files.items():
        save_file({name: random_weight(names[name]) for name in members}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, members in files.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return 2 * sum(shape.numel() for shape in names.values())


def random_weight(shape: torch.Size) -> torch.Tensor:
    """Ones for a norm; the bfloat16 of normal random numbers for a matrix."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=STANDARD_DEVIATION)


def measure(folder: str, arguments: argparse.Namespace) -> dict[str, object]:
    """Prepare the model in this process; the bytes held and the peak so far after each stage, and its seconds."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 1000, (arguments.samples, arguments.tokens), generator=generator)
    memory, stages = MemorySampler(), {}

    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Profiled")
        profile = profile_activations(folder, [{"input_ids": row} for row in ids], batch_size=arguments.samples)
    stages["profile"] = describe(None, memory, start)

    start = time.perf_counter()
    config = AdaptQConfig(
        profile=profile,
        selection_ratio=arguments.ratio,
        selection_strategy="activation",
        frozen_rank=0,
        delta_dtype="bfloat16",
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=adaptq_bnb_config(config, folder))
    stages["from_pretrained"] = describe(model, memory, start)

    start = time.perf_counter()
    model = get_peft_model(model, config)
    stages["get_peft_model"] = describe(model, memory, start)
    return {"adapted": config.layers_to_transform, "magnitude": profile.magnitude, **stages}


def describe(model: nn.Module | None, memory: MemorySampler, start: float) -> dict[str, object]:
    gc.collect()
    parameters = parameter_bytes(model) if model else 0
    seconds = round(time.perf_counter() - start, 1)
    return {"peak": memory.peak, "held": memory.now(), "parameters": parameters, "seconds": seconds}


def measure_in_a_process(folder: str) -> dict[str, object]:
    with tempfile.NamedTemporaryFile(suffix=".json") as output:
        command = [sys.executable, __file__, *sys.argv[1:], "--checkpoint", folder, "--output", output.name]
        environment = {"MALLOC_MMAP_THRESHOLD_": "1000000", **os.environ}
        subprocess.run(command, check=True, env=environment)
        return json.loads(Path(output.name).read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--shape", default="32,4096,11008,32,32,32000", help=",".join([*SHAPE, "vocab_size"]))
    parser.add_argument("--ratio", type=float, default=0.125, help="share of the blocks that is adapted")
    parser.add_argument("--samples", type=int, default=1, help="calibration samples")
    parser.add_argument("--tokens", type=int, default=16, help="tokens a sample")
    parser.add_argument("--folder", type=Path, help="where the temporary checkpoint is written")
    parser.add_argument("--output", type=Path, help="write the result as JSON to this file, too")
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.checkpoint:
        arguments.output.write_text(json.dumps(measure(arguments.checkpoint, arguments)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="adaptq-random-") as folder:
        start = time.perf_counter()
        size = write_checkpoint(Path(folder), arguments.shape)
        written = round(time.perf_counter() - start, 1)
        result = measure_in_a_process(folder)
    peak = result["get_peft_model"]["peak"]
    shares = {name: round(value / size, 4) for name, value in peak.items()}
    report(arguments, {"checkpoint": size, "seconds to write": written, "peak / checkpoint": shares, **result})


if __name__ == "__main__":
    main()
