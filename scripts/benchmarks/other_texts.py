"""What the adapters of a comparison do to text of other kinds than they were trained, anchored and tested on.

    adaptq compare --save-adapters --output-dir STUDY ...
    python scripts/benchmarks/other_texts.py STUDY --texts presidents=demo-domain my_texts=documents.jsonl

"demo-domain" and "demo-general" stand for the demo's test texts: messages of US presidents, and Wikipedia's prose.
Mean and standard deviation over the seeds of each method, size and rate; "at most" is the largest 95% bound.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

import torch
from common import model_name
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import adaptq_peft  # noqa: F401  (registers the method)
from adaptq_peft.comparison.texts import cut_documents, demo_study_texts, read_documents
from adaptq_peft.preservation import BaseReference, measure_forgetting


def read(name: str) -> list[str]:
    if name in ("demo-domain", "demo-general"):
        texts = demo_study_texts()
        return texts.domain_test if name == "demo-domain" else texts.general_test
    return read_documents(Path(name))


def mean_and_deviation(values: list[float]) -> str:
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.1%}{deviation}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("study", type=Path, help="output folder of `adaptq compare --save-adapters`")
    parser.add_argument("--texts", nargs="+", required=True, help="NAME=FILE of documents: .txt, .json or .jsonl")
    parser.add_argument("--tokens", type=int, default=12_000, help="of each text")
    parser.add_argument("--model", default="smollm2", help="the base: 'smollm2' is the demo's model")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    folders = sorted((arguments.study / "adapters").iterdir())
    name = model_name(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(name)

    def load() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, arguments.dtype)).eval()

    print("| method | samples | rate | text | base | quantized | degradation | at most | seeds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for text in arguments.texts:
        title, _, file = text.partition("=")
        documents = cut_documents(tokenizer, read(file), arguments.tokens)
        reference = BaseReference.of(load(), documents, tokenizer=tokenizer)
        found = defaultdict(list)
        for folder in folders:
            run = json.loads((arguments.study / "runs" / f"{folder.name}.json").read_text())
            report = measure_forgetting(PeftModel.from_pretrained(load(), folder).eval(), base=reference)
            found[run["method"], run["samples"], run["rate"]].append(report)
        for (method, samples, rate), reports in found.items():
            degradation = mean_and_deviation([report.degradation for report in reports])
            quantization = mean_and_deviation([report.quantization for report in reports])
            bound = max(report.upper_bound for report in reports)
            base = reports[0].general.perplexities()["base"]
            print(
                f"| {method} | {samples} | {rate:g} | {title} | {base:.2f} | {quantization} | {degradation} | "
                f"{bound:+.1%} | {len(reports)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
