"""Ways to weaken a trained adapter, at equal degradation of general text: which keeps the most of the domain?

    OMP_NUM_THREADS=1 python scripts/benchmarks/shrinkage.py --adapter runs/adapter --domain legal_train.jsonl \
        --general wikitext2_valid.txt --output runs/shrinkage

One factor on all deltas, a factor for each block (`BlockScales`, with the steps of `fit_to_budget`),
covariance-weighted shrinkage over lambda, and both. Half of the general documents and of the held-out domain documents
choose (slopes, second moments), the others are reported. Each row is compared with one factor that costs as much
general loss, interpolated between the factors that were measured. `shrinkage_adapter.py` trains the adapter. What the
output folder has already is not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from shrinkage_adapter import domain_split

from adaptq_peft.comparison.texts import read_documents
from adaptq_peft.demo.model import load_demo_model
from adaptq_peft.preservation.block_scales import BlockScales
from adaptq_peft.preservation.budget_search import FIRST_STEP, propose_step
from adaptq_peft.preservation.delta_shrinkage import DeltaShrinkage
from adaptq_peft.preservation.documents import Documents, measure_documents, tokenize_documents

Point = tuple[float, float]  # general and domain loss, nats a token


class Bench:
    """The model and its texts; losses are means over tokens."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        base, tokenizer = load_demo_model(dtype=torch.bfloat16)
        sizes: dict[str, Any] = {"max_length": arguments.max_tokens, "max_tokens": arguments.max_tokens}
        _, choosing, reporting = domain_split(arguments.domain)
        general = tokenize_documents(tokenizer, read_documents(arguments.general), **sizes)
        order = np.random.default_rng(0).permutation(general.num_documents).tolist()
        half = len(order) // 2
        self.size = arguments.batch
        self.choosing = (general.subset(order[:half]), tokenize_documents(tokenizer, choosing, **sizes))
        self.reporting = (general.subset(order[half:]), tokenize_documents(tokenizer, reporting, **sizes))
        self.searching = tuple(text.subset(range(text.num_documents // 2)) for text in self.choosing)
        self.model: Any = base
        self._file = arguments.output / "report.json"
        saved = json.loads(self._file.read_text()) if self._file.exists() else {}
        self.rows: list[dict[str, Any]] = saved.get("rows", [])
        self.base: Point = tuple(saved.get("base") or self.report())
        self.model = PeftModel.from_pretrained(base, arguments.adapter).eval()
        self.scales = BlockScales(self.model)

    def loss(self, documents: Documents) -> float:
        total = measure_documents(self.model, documents, batch_size=self.size).total
        return total.nll / total.num_tokens

    def report(self) -> Point:
        return self.loss(self.reporting[0]), self.loss(self.reporting[1])

    def note(self, family: str, setting: str, **more: Any) -> None:
        """Measure the model as it is on the documents for reporting, if that was not done before."""
        if self.has(family, setting):
            return
        general, domain = self.report()
        self.rows.append({"family": family, "setting": setting, "general": general, "domain": domain, **more})
        print(f"{family:28} {setting:24} general {general:.4f} domain {domain:.4f}", flush=True)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps({"base": self.base, "rows": self.rows}, indent=1) + "\n")

    def has(self, family: str, setting: str) -> bool:
        return any((row["family"], row["setting"]) == (family, setting) for row in self.rows)

    def curve(self) -> list[Point]:
        """(general, domain) of one factor, from the smallest to 1."""
        rows = [row for row in self.rows if row["family"] == "one factor"]
        return [(row["general"], row["domain"]) for row in sorted(rows, key=lambda row: float(row["setting"]))]


def domain_at(curve: list[Point], general: float) -> float:
    """Domain loss of the largest factor at which general loss is `general`; NaN if there is none."""
    for (low, low_domain), (high, high_domain) in reversed(list(itertools.pairwise(curve))):
        if min(low, high) <= general <= max(low, high) and low != high:
            return low_domain + (general - low) / (high - low) * (high_domain - low_domain)
    return math.nan


def search(bench: Bench, start: np.ndarray, limit: float, steps: int) -> np.ndarray:
    """Factors that lower the domain loss with general loss up to `limit`, on half of the documents for choosing."""
    general, domain = bench.searching

    def evaluate(factors: np.ndarray) -> tuple[bool, float, float]:
        bench.scales.set(factors)
        found, on_domain = bench.loss(general), bench.loss(domain)
        return found > limit + 1e-4, found if found > limit + 1e-4 else on_domain, found

    best, radius = start, FIRST_STEP
    rank = evaluate(best)
    slopes = None
    for _ in range(steps):
        slopes = slopes or tuple(bench.scales.gradient(best, text, bench.size) for text in (domain, general))
        factors = propose_step(best, *slopes, limit - rank[2], radius)
        found = evaluate(factors)
        if found[:2] >= rank[:2]:
            radius /= 2
            continue
        best, rank, slopes = factors, found, None
    return best


def measure_block_scales(
    bench: Bench, family: str, targets: dict[float, float], steps: int, setting: str = ""
) -> None:
    """Block by block, within each target: from no factors on if they hold it, else from its own factor on."""
    ones = np.ones(len(bench.scales.blocks))
    bench.scales.set(ones)
    unscaled = bench.loss(bench.searching[0])
    for factor, limit in targets.items():
        if bench.has(family, f"{setting}as factor {factor}"):
            continue
        factors = search(bench, ones if unscaled <= limit else factor * ones, limit, steps)
        bench.scales.set(factors)
        bench.note(family, f"{setting}as factor {factor}", factors=factors.tolist())
    bench.scales.set(ones)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, help="folder of a saved adapter on SmolLM2-135M")
    parser.add_argument("--domain", type=Path, required=True, help="as given to shrinkage_adapter.py")
    parser.add_argument("--general", type=Path, required=True, help="general documents: .txt, .jsonl or .json")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--max-tokens", type=int, default=256, help="of each document")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--factors", nargs="+", type=float, default=[1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    )
    parser.add_argument("--strengths", nargs="*", type=float, default=[0.03, 0.1, 0.3, 1.0, 3.0, 10.0], help="lambda")
    parser.add_argument("--dampings", nargs="*", type=float, default=[0.01])
    parser.add_argument(
        "--targets", nargs="*", type=float, default=[0.7, 0.4], help="factors that set the general loss"
    )
    parser.add_argument("--both", nargs="*", type=float, default=[], help="lambdas from which blocks are scaled, too")
    parser.add_argument("--only-both", action="store_true", help="no block scales without shrinkage")
    parser.add_argument("--steps", type=int, default=3, help="of the search block by block")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    bench = Bench(arguments)
    print(f"base {bench.base}", flush=True)
    ones, targets = np.ones(len(bench.scales.blocks)), {}
    for factor in arguments.factors:
        bench.scales.set(factor * ones)
        if factor in arguments.targets:
            targets[factor] = bench.loss(bench.searching[0])
        bench.note("one factor", f"{factor}")
    bench.scales.set(ones)
    general, domain = bench.choosing
    if not arguments.only_both:
        measure_block_scales(bench, "block scales", targets, arguments.steps)
    for damping in arguments.dampings:
        shrinkage = DeltaShrinkage(bench.model, domain, general, bench.size, damping)
        for strength in arguments.strengths:
            shrinkage.set(strength)
            bench.note(f"shrinkage, damping {damping}", f"lambda {strength}")
        shrinkage.set(0)
    for strength in arguments.both:
        shrinkage.set(strength)
        measure_block_scales(bench, "shrinkage + block scales", targets, arguments.steps, f"lambda {strength}, ")
    print_table(bench)


def print_table(bench: Bench) -> None:
    """As Markdown."""
    curve = bench.curve()
    print("\n| family | setting | general | domain perplexity | one factor at equal general loss | difference, nats |")
    print("|---|---|---|---|---|---|")
    for row in bench.rows:
        equal = domain_at(curve, row["general"])
        print(
            f"| {row['family']} | {row['setting']} | {math.expm1(row['general'] - bench.base[0]):+.2%} | "
            f"{math.exp(row['domain']):.3f} | {math.exp(equal):.3f} | {row['domain'] - equal:+.4f} |"
        )


if __name__ == "__main__":
    main()
