"""What the adapters of a comparison do to text of other kinds than they were trained, anchored and tested on.

    adaptq compare --save-adapters --output-dir STUDY ...
    python scripts/benchmarks/other_texts.py STUDY --texts presidents=demo-domain my_texts=documents.jsonl

"demo-domain" and "demo-general" stand for the demo's test texts: messages of US presidents, and Wikipedia's prose.
Mean and standard deviation over the seeds of each method, size and rate; "at most" is the largest 95% bound.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from functools import cache
from pathlib import Path

import torch
from common import model_name
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from adaptq_peft.comparison.tables import Spread
from adaptq_peft.comparison.texts import cut_documents, demo_study_texts, read_documents
from adaptq_peft.preservation import BaseReference, measure_forgetting


def read(name: str) -> list[str]:
    if name in ("demo-domain", "demo-general"):
        texts = demo_study_texts()
        return texts.domain_test if name == "demo-domain" else texts.general_test
    return read_documents(Path(name))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("study", type=Path, help="output folder of `adaptq compare --save-adapters`")
    parser.add_argument("--texts", nargs="+", required=True, help="NAME=FILE of documents: .txt, .json or .jsonl")
    parser.add_argument("--tokens", type=int, default=12_000, help="of each text")
    parser.add_argument("--model", default="smollm2", help="the base: 'smollm2' is the demo's model")
    arguments = parser.parse_args()
    name = model_name(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(name)
    files = dict(text.split("=", 1) for text in arguments.texts)
    documents = {title: cut_documents(tokenizer, read(file), arguments.tokens) for title, file in files.items()}

    def load(dtype: str) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()

    @cache
    def reference(title: str, dtype: str) -> BaseReference:
        return BaseReference.of(load(dtype), documents[title], tokenizer=tokenizer)

    found = defaultdict(list)
    for folder in tqdm(sorted((arguments.study / "adapters").iterdir()), unit="adapter"):
        run = json.loads((arguments.study / "runs" / f"{folder.name}.json").read_text())
        dtype = run["depends_on"]["dtype"]
        model = PeftModel.from_pretrained(load(dtype), folder).eval()
        for title in documents:
            report = measure_forgetting(model, base=reference(title, dtype))
            found[title, run["method"], run["samples"], run["rate"]].append(report)

    print("| text | method | samples | rate | base | quantized | degradation | at most | seeds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for (title, method, samples, rate), reports in sorted(found.items()):
        perplexity = reports[0].general.perplexities()["base"]
        quantization = Spread.of([report.quantization for report in reports]).percent()
        degradation = Spread.of([report.degradation for report in reports]).percent()
        bound = max(report.upper_bound for report in reports)
        print(
            f"| {title} | {method} | {samples} | {rate:g} | {perplexity:.2f} | {quantization} | {degradation} | "
            f"{bound:+.1%} | {len(reports)} |"
        )


if __name__ == "__main__":
    main()
