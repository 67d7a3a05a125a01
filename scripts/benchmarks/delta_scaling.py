"""Which delta_scaling suits a script written for LoRA: domain and general perplexity after training at LoRA's rate.

    python scripts/benchmarks/delta_scaling.py --scalings 0.0625 0.25 1.0 --seeds 0 1 2 --steps 100

The demo's model, texts and training run (learning rate 2e-4, batch 4 x 128 tokens), the upper half of the blocks.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from peft import get_peft_model

from adaptq_peft import AdaptQConfig
from adaptq_peft.demo.evaluate import EvaluationSet
from adaptq_peft.demo.model import load_demo_model
from adaptq_peft.demo.texts import load_demo_texts
from adaptq_peft.demo.training import train, training_windows

TEXTS = ("domain", "general")


def run_once(scaling: float, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    model, tokenizer = load_demo_model()
    texts = load_demo_texts()
    evaluation = EvaluationSet(texts.domain_test, texts.general_test, max_tokens=arguments.tokens)
    config = AdaptQConfig(
        task_type="CAUSAL_LM", selection_strategy="last", quantization=arguments.quantization, delta_scaling=scaling
    )
    wrapped = get_peft_model(model, config)
    train(
        wrapped,
        training_windows(tokenizer, texts.domain_train, 128),
        steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        batch_size=4,
        seed=seed,
        on_step=lambda step, loss: None,
    )
    return {name: perplexity.value for name, perplexity in evaluation.measure(wrapped, tokenizer).items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--scalings", nargs="+", type=float, default=[0.0625, 0.25, 1.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--tokens", type=int, default=10_000, help="evaluation tokens of each text")
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--output", type=Path, help="write every run as JSON to this file, after each run")
    arguments = parser.parse_args()
    runs: list[dict[str, float]] = []
    for seed in arguments.seeds:
        for scaling in arguments.scalings:
            runs.append({"scaling": scaling, "seed": seed, **run_once(scaling, seed, arguments)})
            print(json.dumps(runs[-1]), flush=True)
            if arguments.output:
                arguments.output.write_text(json.dumps(runs, indent=1) + "\n")
    print("| delta_scaling | " + " | ".join(f"{text} perplexity" for text in TEXTS) + " |\n|---|---|---|")
    for scaling in arguments.scalings:
        values = {text: [run[text] for run in runs if run["scaling"] == scaling] for text in TEXTS}
        cells = [f"{statistics.mean(v):.2f} ± {statistics.stdev(v) if len(v) > 1 else 0:.2f}" for v in values.values()]
        print(f"| {scaling} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
