"""What the anchor does to a short training run: general and domain perplexity, with it and without.

    python scripts/benchmarks/anchored_training.py --domain legal_train.jsonl --general valid_first_half.txt \
        --evaluate-on valid_second_half.txt --steps 32

Domain text for the evaluation is the last tenth of the documents, on which nothing is trained. Domain samples and
general texts are of `--length` tokens, 4 of the domain to 1 of general text, in each optimizer step.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from common import load_model, make_parser, model_name, report
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, Trainer, TrainingArguments, default_data_collator

from adaptq_peft import AdaptQConfig
from adaptq_peft.comparison.texts import read_documents
from adaptq_peft.demo.training import training_windows
from adaptq_peft.evaluation import evaluate_perplexity
from adaptq_peft.preservation.anchor_callback import PreservationCallback
from adaptq_peft.preservation.teacher import BaseAnswers


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--domain", type=Path, required=True, help='a .jsonl file with "text" in each line')
    parser.add_argument("--general", type=Path, required=True, help="text of the anchor")
    parser.add_argument("--evaluate-on", type=Path, required=True, help="other general text, for the perplexity")
    parser.add_argument("--methods", nargs="+", default=["adaptq", "adaptq+kl"], help="adaptq, lora; + kl or replay")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--delta-scaling", type=float, default=0.25)
    parser.add_argument("--weight", type=float, default=1.0)
    parser.add_argument("--samples", type=int, default=64, help="general texts")
    parser.add_argument("--evaluation-tokens", type=int, default=4096)
    return parser.parse_args()


def general_texts(path: Path, characters: int = 600) -> list[str]:
    """The paragraphs that are long enough to fill a sample."""
    return [line.strip() for line in path.read_text().splitlines() if len(line) >= characters]


def wrap(base: torch.nn.Module, method: str, arguments: argparse.Namespace) -> torch.nn.Module:
    if method.startswith("lora"):
        return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
    config = AdaptQConfig(
        task_type="CAUSAL_LM", selection_strategy="last", delta_scaling=arguments.delta_scaling, frozen_rank=0
    )
    return get_peft_model(base, config)


def train(model: torch.nn.Module, samples: list, callbacks: list, arguments: argparse.Namespace) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                output_dir=folder,
                max_steps=arguments.steps,
                per_device_train_batch_size=arguments.batch,
                learning_rate=arguments.learning_rate,
                warmup_steps=-(-arguments.steps // 10),
                logging_steps=4,
                save_strategy="no",
                report_to="none",
                use_cpu=arguments.device == "cpu",
            ),
            train_dataset=samples,
            data_collator=default_data_collator,
            callbacks=callbacks,
        )
        trainer.train()
    return trainer.state.log_history


def main() -> None:
    arguments = parse()
    base = load_model(arguments).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_name(arguments.model))
    documents = read_documents(arguments.domain)
    held_out = max(len(documents) // 10, 1)
    samples = training_windows(tokenizer, documents[:-held_out], arguments.length)
    evaluated = {"general": [arguments.evaluate_on.read_text()], "domain": documents[-held_out:]}

    def perplexities(model: torch.nn.Module) -> dict[str, float]:
        limits = {"max_length": 512, "batch_size": 1, "max_tokens": arguments.evaluation_tokens}
        return {
            name: evaluate_perplexity(model, tokenizer, texts, **limits).value for name, texts in evaluated.items()
        }

    reading = {"samples": arguments.samples, "max_length": arguments.length}
    texts = general_texts(arguments.general)
    answers = {}
    if any(method.endswith("+kl") for method in arguments.methods):
        answers["kl"] = BaseAnswers.of(base, texts, tokenizer, **reading)
    if any(method.endswith("+replay") for method in arguments.methods):
        answers["replay"] = BaseAnswers.replay(base, texts, tokenizer, **reading)
    result: dict[str, object] = {"base": perplexities(base)}
    print(result, flush=True)
    for method in arguments.methods:
        mode = method.partition("+")[2]
        callbacks = [PreservationCallback(answers[mode], mode=mode, weight=arguments.weight)] if mode else []
        model = wrap(copy.deepcopy(base), method, arguments)
        before = perplexities(model)
        log = train(model, samples, callbacks, arguments)
        result[method] = {"before": before, "after": perplexities(model), "log": log}
        print(method, before, result[method]["after"], flush=True)
    report(arguments, result)


if __name__ == "__main__":
    main()
