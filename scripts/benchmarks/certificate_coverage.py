"""How often the certificate of a real adapter is wrong: bounds from drawn documents against the rise on all of them.

    python scripts/benchmarks/certificate_coverage.py my-adapter --general wiki_test.txt

The losses of the base, and of the adapter with its change multiplied by each of `--factors`, are measured once on each
paragraph of the file that fills `--tokens` tokens. Then `--documents` of them are drawn without replacement, `--draws`
times, and bounded as `fit_to_budget` bounds its candidates. All paragraphs stand for the truth. For a budget that half
of the candidates hold, it also counts how often the first candidate within the bound is truly above the budget.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from common import load_base_of_adapter, make_adapter_parser
from peft import PeftModel

from adaptq_peft.evaluation import describe_environment
from adaptq_peft.preservation.block_scales import BlockScales
from adaptq_peft.preservation.bounds import rise_per_token, upper_bounds
from adaptq_peft.preservation.documents import measure_documents, tokenize_documents


def measure(arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """(summed nats of each candidate minus those of the base, [candidates, documents]; tokens, [documents])."""
    base, tokenizer = load_base_of_adapter(arguments)
    lines = (line.strip() for line in arguments.general.read_text(encoding="utf-8").splitlines())
    texts = [line for line in lines if len(tokenizer(line, verbose=False)["input_ids"]) >= arguments.tokens]
    documents = tokenize_documents(tokenizer, texts, max_length=arguments.tokens, max_tokens=arguments.tokens)
    before = measure_documents(base, documents, batch_size=16)
    model = PeftModel.from_pretrained(base, arguments.adapter).eval()
    scales, rows = BlockScales(model), []
    for factor in arguments.factors:
        scales.set(factor)
        rows.append(measure_documents(model, documents, batch_size=16).nll - before.nll)
    return np.stack(rows), before.num_tokens


def main() -> None:
    parser = make_adapter_parser(__doc__.splitlines()[0])
    parser.add_argument("--general", type=Path, required=True, help="a .txt file with a paragraph in each line")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a document")
    parser.add_argument("--documents", type=int, nargs="+", default=[16, 32, 64], help="documents in a draw")
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0, 2 / 3, 1 / 3, 0.0])
    parser.add_argument("--confidence", type=float, default=0.95)
    arguments = parser.parse_args()
    differences, tokens = measure(arguments)
    truth = rise_per_token(differences, tokens)
    budget = float(np.median(truth))
    print(describe_environment())
    print(f"{len(tokens)} paragraphs of {arguments.tokens} tokens; true rise in nats a token", truth.round(4).tolist())
    print("| documents | any candidate above its bound | the first candidate alone | chosen one above the budget |")
    print("|---|---|---|---|")
    draw = np.random.default_rng(0)
    for count in arguments.documents:
        wrong = np.zeros(3)
        for seed in range(arguments.draws):
            chosen = draw.choice(len(tokens), count, replace=False)
            bounds = upper_bounds(differences[:, chosen], tokens[chosen], arguments.confidence, seed, resamples=500)
            alone = upper_bounds(differences[:1, chosen], tokens[chosen], arguments.confidence, seed, resamples=500)
            passed = np.flatnonzero(bounds <= budget)
            fails = bool(len(passed)) and truth[passed[0]] > budget
            wrong += [(truth > bounds).any(), truth[0] > alone[0], fails]
        shares = wrong / arguments.draws
        errors = np.sqrt(shares * (1 - shares) / arguments.draws)
        cells = " | ".join(f"{share:.1%} ± {error:.1%}" for share, error in zip(shares, errors, strict=True))
        print(f"| {count} | {cells} |")


if __name__ == "__main__":
    main()
