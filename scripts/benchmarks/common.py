"""What the benchmarks share: models, batches, timing in turn, peak memory."""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftConfig
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from adaptq_peft.evaluation import describe_environment


def make_parser(description: str) -> argparse.ArgumentParser:
    """Options of every benchmark: which model, where, in which dtype, how often."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", default="smollm2", help="'smollm2' (the demo's 135M model) or a model folder or id")
    model.add_argument(
        "--shape", help="random Llama weights instead: layers,hidden,intermediate,heads,kv_heads,vocabulary"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each variant, after one warm-up")
    parser.add_argument("--output", type=Path, help="write the result as JSON to this file, too")
    return parser


def load_model(arguments: argparse.Namespace) -> nn.Module:
    """The base model that the options name, in their dtype, on their device."""
    dtype = getattr(torch, arguments.dtype)
    if arguments.shape:
        names = (
            "num_hidden_layers",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "vocab_size",
        )
        sizes = [int(number) for number in arguments.shape.split(",")]
        config = LlamaConfig(**dict(zip(names, sizes, strict=True)), tie_word_embeddings=True)
        torch.manual_seed(0)
        with torch.device(arguments.device):
            return LlamaForCausalLM(config).to(dtype)
    return AutoModelForCausalLM.from_pretrained(model_name(arguments.model), dtype=dtype).to(arguments.device)


def model_name(given: str) -> str:
    """What `from_pretrained` takes for a value of `--model`: of "smollm2" the folder of the demo's model."""
    if given != "smollm2":
        return given
    from adaptq_peft.demo.model import demo_model_folder

    return str(demo_model_folder())


def make_adapter_parser(description: str) -> argparse.ArgumentParser:
    """Options of the benchmarks that take a trained adapter: which, on which base, in which dtype."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("adapter", help="folder of an ADAPTQ or LoRA adapter")
    parser.add_argument("--model", help="its base, if it is not where the adapter says; 'smollm2' is the demo's model")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    return parser


def load_base_of_adapter(arguments: argparse.Namespace) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The base that the options of `make_adapter_parser` name, and its tokenizer."""
    name = model_name(arguments.model or PeftConfig.from_pretrained(arguments.adapter).base_model_name_or_path)
    base = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, arguments.dtype))
    return base.eval(), AutoTokenizer.from_pretrained(name)


def random_batch(model: nn.Module, samples: int, length: int) -> dict[str, torch.Tensor]:
    """Random token ids [samples, length], without padding."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(10, model.config.vocab_size, (samples, length), generator=generator)
    input_ids = input_ids.to(next(model.parameters()).device)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_in_turn(variants: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each variant, run in turn A B C A B C ..., after one warm-up of each.

    On a machine whose speed drifts only such pairs can be compared.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, run in variants.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(seconds: dict[str, list[float]], of: str, to: str) -> float:
    """Median over turns of the ratio of two variants."""
    return statistics.median(a / b for a, b in zip(seconds[of], seconds[to], strict=True))


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes that torch had allocated at once beyond what was allocated before `run`, from its own records."""
    gc.collect()
    synchronize()
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    records = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    current = peak = 0
    for record in sorted(records, key=lambda event: event.start_ns()):
        current += record.nbytes()
        peak = max(peak, current)
    return peak


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and, for 4-bit ones, of their scales."""
    total = 0
    for parameter in {id(p): p for p in model.parameters()}.values():
        total += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            total += state.absmax.nbytes
            state = getattr(state, "state2", None)
    return total


def measured_with(arguments: argparse.Namespace) -> dict[str, object]:
    """The options of a benchmark, and what it runs on."""
    command = {name: str(value) for name, value in vars(arguments).items() if value is not None}
    return {"command": command, "environment": describe_environment()}


def report(arguments: argparse.Namespace, result: dict[str, object]) -> None:
    """Print the result with what it was measured with, and write it where `--output` says."""
    text = json.dumps({**measured_with(arguments), **result}, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")
