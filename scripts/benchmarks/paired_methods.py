"""How sure the difference of two methods of a comparison is, over the test documents that both were measured on.

    adaptq compare --output-dir STUDY ...
    python scripts/benchmarks/paired_methods.py STUDY --pairs adaptq-recipe-budget@1.6e-3,lora-budget@1.6e-3

The ratio of the perplexities of the first to the second, over the seeds that both have. Its 95% interval is the
bootstrap-t of `fit_to_budget` from both sides, which resamples documents; seeds are the column after it. Studies
of the same texts with seeds of their own, as those in another dtype, may be given together.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from adaptq_peft.comparison.records import RunStore
from adaptq_peft.preservation.bounds import rise_per_token, upper_bounds

CONFIDENCE = 0.975  # of each side

Seed = tuple[int, Path]
Records = dict[tuple[str, float, Seed], dict[str, Any]]


def read_records(studies: list[Path], samples: int) -> Records:
    """Test figures of the finished runs by (method, rate, (seed, study)); all have the same texts.

    The study is in the key so that no run in float32 is compared with one in bfloat16.
    """
    return {
        (record["method"], record["rate"], (record["seed"], study)): record["test"]
        for study in studies
        for record in RunStore(study / "runs", identity={}).records()
        if record["samples"] == samples and record["test"]
    }


def find_seeds(records: Records, sides: list[tuple[str, float]]) -> list[Seed]:
    """Seeds that both sides of a pair have, in one study."""
    common = set.intersection(*({key[2] for key in records if key[:2] == side} for side in sides))
    if not common:
        have = sorted({f"{method}@{rate:g}" for method, rate, _ in records})
        raise SystemExit(f"{sides[0]} and {sides[1]} have no seed in common; finished are {have}")
    return sorted(common)


def differences(records: Records, sides: list[tuple[str, float]], text: str, seeds: list[Seed]) -> np.ndarray:
    """Summed nats of the first minus those of the second: [seeds, documents]."""
    nll = [[records[(*side, seed)][text]["documents"]["adapted"] for seed in seeds] for side in sides]
    return np.array(nll[0]) - np.array(nll[1])


def compare(records: Records, names: list[str]) -> None:
    """Print the rows of a pair of methods."""
    split = [name.rpartition("@") for name in names]
    sides = [(method, float(rate)) for method, _, rate in split]
    seeds = find_seeds(records, sides)
    for text in ("domain", "general"):
        tokens = np.array(records[(*sides[0], seeds[0])][text]["documents"]["num_tokens"])
        each = differences(records, sides, text, seeds)
        mean = each.mean(0)
        ratio, *ratios = np.exp([rise_per_token(nats, tokens) for nats in (mean, *each)])
        lower = np.exp(-upper_bounds(-mean[None], tokens, CONFIDENCE)[0])
        upper = np.exp(upper_bounds(mean[None], tokens, CONFIDENCE)[0])
        by_seed = ", ".join(f"{seed}: {of_seed:.3f}" for (seed, _), of_seed in zip(seeds, ratios, strict=True))
        print(
            f"| {' | '.join(names)} | {text} | {ratio:.3f} | {lower:.3f} to {upper:.3f} | {by_seed} | {len(tokens)} | "
            f"{(mean < 0).mean():.0%} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="+", type=Path, metavar="STUDY", help="output folder of `adaptq compare`")
    parser.add_argument("--pairs", nargs="+", required=True, help="METHOD@RATE,METHOD@RATE")
    parser.add_argument("--samples", type=int, default=500, help="N of the runs")
    arguments = parser.parse_args()
    records = read_records(arguments.studies, arguments.samples)
    print("| first | second | text | ratio | 95% interval | by seed | documents | first is better in |")
    print("|---|---|---|---:|---|---|---:|---:|")
    for pair in arguments.pairs:
        compare(records, pair.split(","))


if __name__ == "__main__":
    main()
