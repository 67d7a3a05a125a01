"""What `threshold_deltas` does to a trained adapter, beside one factor on all that the adapter adds.

    python scripts/benchmarks/thresholding.py ADAPTER --general wiki_test.txt --domain legal_test.jsonl

Changes of perplexity are against the 16-bit base; "at most" is the 95% bound of the general one.
"""

from __future__ import annotations

from pathlib import Path

from common import load_base_of_adapter, make_adapter_parser
from peft import PeftModel

from adaptq_peft.comparison.texts import cut_documents, read_documents
from adaptq_peft.evaluation import describe_environment
from adaptq_peft.preservation import BaseReference, measure_forgetting, threshold_deltas
from adaptq_peft.preservation.block_scales import BlockScales


def main() -> None:
    parser = make_adapter_parser(__doc__.splitlines()[0])
    parser.add_argument("--general", type=Path, required=True, help="general documents: .txt, .json or .jsonl")
    parser.add_argument("--domain", type=Path, required=True, help="domain documents, not trained on")
    parser.add_argument("--tokens", type=int, default=12_000, help="of each text")
    parser.add_argument("--factors", nargs="*", type=float, default=[0.8, 0.6, 0.4])
    arguments = parser.parse_args()
    print(describe_environment())
    base, tokenizer = load_base_of_adapter(arguments)
    chosen = (read_documents(path) for path in (arguments.general, arguments.domain))
    texts = [cut_documents(tokenizer, documents, arguments.tokens) for documents in chosen]
    reference = BaseReference.of(base, *texts, tokenizer=tokenizer)
    model = PeftModel.from_pretrained(base, arguments.adapter).eval()
    print("| change | general | at most | domain | KL on the domain |")
    print("|---|---|---|---|---|")

    def measure(change: str) -> None:
        report = measure_forgetting(model, base=reference)
        assert report.domain is not None
        changes = f"{report.degradation:+.2%} | {report.upper_bound:+.2%} | {report.domain.degradation:+.2%}"
        print(f"| {change} | {changes} | {report.domain_kl:.3f} |", flush=True)

    measure("none")
    scales = BlockScales(model)
    for factor in arguments.factors:
        scales.set(factor)
        measure(f"factor {factor:g}")
    scales.set(1.0)
    kept, values = map(sum, zip(*threshold_deltas(model).values(), strict=True))
    measure(f"singular values above the noise: {kept} of {values}")


if __name__ == "__main__":
    main()
