"""How long `fit_to_budget` takes on a real adapter, with what it does to general and domain text.

    python scripts/benchmarks/budget_time.py my-adapter --general wiki_valid.txt --domain legal_train.jsonl

The base's losses on the documents are timed apart: a `BaseReference` has them once for many fits.
`shrinkage_adapter.py` trains an adapter.
"""

from __future__ import annotations

import time
from pathlib import Path

from common import load_base_of_adapter, make_adapter_parser
from peft import PeftModel

from adaptq_peft.comparison.texts import cut_documents, read_documents
from adaptq_peft.evaluation import describe_environment
from adaptq_peft.preservation import BaseReference, fit_to_budget
from adaptq_peft.preservation.budget import FAMILIES


def main() -> None:
    parser = make_adapter_parser(__doc__.splitlines()[0])
    parser.add_argument("--general", type=Path, required=True, help="general documents: .txt, .json or .jsonl")
    parser.add_argument("--domain", type=Path, required=True, help="domain documents, not trained on")
    parser.add_argument("--documents", type=int, default=64, help="of each text")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a document on average")
    parser.add_argument("--budget", type=float, default=0.02)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    arguments = parser.parse_args()
    chosen = [read_documents(path)[: arguments.documents] for path in (arguments.general, arguments.domain)]
    print(describe_environment())
    print("| family | documents | base, s | fit, s | general | at most | domain | holds |")
    print("|---|---|---|---|---|---|---|---|")
    for family in arguments.families:
        base, tokenizer = load_base_of_adapter(arguments)
        texts = [cut_documents(tokenizer, documents, arguments.documents * arguments.tokens) for documents in chosen]
        start = time.perf_counter()
        reference = BaseReference.of(base, *texts, tokenizer=tokenizer)
        asked = time.perf_counter()
        model = PeftModel.from_pretrained(base, arguments.adapter).eval()
        loaded = time.perf_counter()
        report = fit_to_budget(model, base=reference, budget=arguments.budget, family=family)
        fitted = time.perf_counter()
        documents = " and ".join(str(len(documents)) for documents in texts)
        times = f"{asked - start:.0f} | {fitted - loaded:.0f}"
        changes = f"{report.degradation:+.2%} | {report.upper_bound:+.2%} | {report.domain.degradation:+.2%}"
        print(f"| {family} | {documents} | {times} | {changes} | {report.feasible} |", flush=True)


if __name__ == "__main__":
    main()
