"""Which frozen blocks a merged 16-bit model should have: those that were trained with, or the original ones.

    python scripts/benchmarks/merging.py --seeds 0 1 2

Trains the demo's adapter (upper half of the blocks adapted, the lower in NF4), merges it once with the dequantized and
once with the original weights of the frozen blocks, and measures perplexity on held-out text.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics

from peft import get_peft_model

from adaptq_peft import AdaptQConfig
from adaptq_peft.demo.evaluate import EvaluationSet
from adaptq_peft.demo.model import load_demo_model
from adaptq_peft.demo.texts import load_demo_texts
from adaptq_peft.demo.training import train, training_windows

FORMS = ("dequantized", "original")


def run_once(seed: int, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    model, tokenizer = load_demo_model()
    texts = load_demo_texts()
    evaluation = EvaluationSet(texts.domain_test, texts.general_test, max_tokens=arguments.tokens)
    config = AdaptQConfig(
        task_type="CAUSAL_LM", selection_strategy=arguments.strategy, original_weights="keep", frozen_rank=0
    )
    wrapped = get_peft_model(model, config)
    train(
        wrapped,
        training_windows(tokenizer, texts.domain_train, 128),
        steps=arguments.steps,
        learning_rate=2e-4,
        batch_size=4,
        seed=seed,
        on_step=lambda step, loss: None,
    )
    measured = {"adapter": wrapped} | {form: copy.deepcopy(wrapped).merge_and_unload(frozen=form) for form in FORMS}
    return {
        name: {text: perplexity.value for text, perplexity in evaluation.measure(found, tokenizer).items()}
        for name, found in measured.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--strategy", default="last", help="which half of the blocks is adapted")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=10_000, help="evaluation tokens of each text")
    arguments = parser.parse_args()
    runs = []
    for seed in arguments.seeds:
        runs.append(run_once(seed, arguments))
        print(json.dumps({"seed": seed, **runs[-1]}), flush=True)
    print("| model | domain perplexity | general perplexity |\n|---|---|---|")
    for name in ("adapter", *FORMS):
        values = [[run[name][text] for run in runs] for text in ("domain", "general")]
        cells = [f"{statistics.mean(v):.2f} ± {statistics.stdev(v) if len(v) > 1 else 0:.2f}" for v in values]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
