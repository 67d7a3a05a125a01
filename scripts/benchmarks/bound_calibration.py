"""How often the truth exceeds a one-sided upper bound of the degradation, for four ways to compute it.

Documents are simulated: their lengths, the rise of the loss a token on each, and the noise of a finite document are
drawn from populations whose true rise is known. No model is run. A calibrated 95% bound is exceeded in 5% of draws.

    python scripts/benchmarks/bound_calibration.py --draws 1000
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

from adaptq_peft.preservation.bounds import rise_per_token, upper_bounds

CONFIDENCE = 0.95
POPULATION = 1_000_000
RESAMPLES = 500

Generator = np.random.Generator
#: What happens to the loss of documents, nats a token.
RISES: dict[str, Callable[[Generator, int], np.ndarray]] = {
    "symmetric": lambda generator, count: generator.normal(0.03, 0.05, count),
    "some lose much": lambda generator, count: generator.gamma(0.5, 0.08, count),
    "some gain much": lambda generator, count: 0.06 - generator.gamma(0.5, 0.08, count),
    "5% lose 0.4": lambda generator, count: np.where(generator.random(count) < 0.05, 0.4, 0.01),
}


def draw(
    rise: Callable[[Generator, int], np.ndarray], generator: Generator, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Differences in nats and numbers of tokens of documents of log-normal length, about 20 to 1,000 tokens."""
    num_tokens = np.clip(np.exp(generator.normal(5, 0.8, count)), 8, 1024).round()
    per_token = rise(generator, count) + generator.normal(0, 0.5, count) / np.sqrt(num_tokens)
    return per_token * num_tokens, num_tokens


def other_bounds(differences: np.ndarray, num_tokens: np.ndarray, generator: Generator) -> dict[str, float]:
    """A normal interval by linearization, and the percentile and the basic bootstrap."""
    count, rise = len(num_tokens), rise_per_token(differences, num_tokens)
    residual = differences - rise * num_tokens
    error = np.sqrt(count / (count - 1) * (residual**2).sum()) / num_tokens.sum()
    weights = generator.multinomial(count, np.full(count, 1 / count), RESAMPLES)
    again = weights @ differences / (weights @ num_tokens)
    return {
        "normal": float(rise + 1.6449 * error),
        "percentile": float(np.quantile(again, CONFIDENCE)),
        "basic": float(2 * rise - np.quantile(again, 1 - CONFIDENCE)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--documents", type=int, nargs="+", default=[32, 64, 128])
    options = parser.parse_args()
    print("| population | documents | bootstrap-t | normal | percentile | basic |\n|---|---|---|---|---|---|")
    for name, rise in RISES.items():
        truth = rise_per_token(*draw(rise, np.random.default_rng(0), POPULATION))
        for count in options.documents:
            generator = np.random.default_rng(count)
            exceeded = dict.fromkeys(("bootstrap-t", "normal", "percentile", "basic"), 0)
            for seed in range(options.draws):
                differences, num_tokens = draw(rise, generator, count)
                bounds = other_bounds(differences, num_tokens, generator)
                own = upper_bounds(differences[None], num_tokens, CONFIDENCE, seed, RESAMPLES)[0]
                for method, bound in {"bootstrap-t": own, **bounds}.items():
                    exceeded[method] += bool(truth > bound)
            shares = " | ".join(f"{number / options.draws:.1%}" for number in exceeded.values())
            print(f"| {name} | {count} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
