"""How well sensitivities predict what rounding costs, and what plans within budgets of bits cost: SmolLM2-135M.

    OMP_NUM_THREADS=1 python scripts/benchmarks/precision_plan.py --output runs/precision_plan

Half of the blocks are frozen. For their linears: the predicted rise of the loss in NF4 and in int8, and the measured
one: KL(original || with this linear rounded) on text that the prediction has not seen. Then for each budget the plan,
its predicted rise, the KL and the rise of perplexity that are measured with it, and those of random plans of the same
size. Everything is computed in float32, and a weight that stays as it is counts 2 bytes. `--output` gets report.json
and predicted_measured.png.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from math import log
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from adaptq_peft import AdaptQConfig
from adaptq_peft.demo.model import load_demo_model
from adaptq_peft.demo.texts import load_demo_texts
from adaptq_peft.precision import quantizable_linears
from adaptq_peft.quantization import quantize_linear
from adaptq_peft.quantization.calibrated import (
    CALIBRATION_METHODS,
    mixed_calibration_batches,
    quantize_calibrated,
    resolve_calibration_method,
)
from adaptq_peft.quantization.precision_plan import PRECISIONS, LinearSize, PrecisionPlan, allocate_precision
from adaptq_peft.quantization.sensitivity import SEQUENCE_LENGTH, SEQUENCES, measure_sensitivity
from adaptq_peft.selection import find_blocks

Candidates = dict[str, dict[str, nn.Module]]


@dataclass(frozen=True)
class Cost:
    """What layers cost on a text: KL(original || model) in nats a token, and the relative rise of perplexity."""

    divergence: float
    perplexity_rise: float


class Ruler:
    """Measures `Cost` on windows of a text.

    Args:
        model: the original model, in evaluation mode.
        windows: token ids [1, length] each.
    """

    def __init__(self, model: nn.Module, windows: list[torch.Tensor]) -> None:
        self._model = model
        self._windows = windows
        self._original = [self._log_probabilities(window) for window in windows]
        self._loss = statistics.mean(map(self._loss_of, self._original, windows))

    def measure(self, layers: Mapping[str, nn.Module]) -> Cost:
        """The cost of having these layers in the model."""
        divergences, losses = [], []
        with in_place(self._model, layers):
            for window, before in zip(self._windows, self._original, strict=True):
                after = self._log_probabilities(window)
                divergences.append(float((before.exp() * (before - after)).sum(-1).mean()))
                losses.append(self._loss_of(after, window))
        rise = torch.tensor(statistics.mean(losses) - self._loss).expm1()
        return Cost(statistics.mean(divergences), float(rise))

    def _log_probabilities(self, window: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self._model(input_ids=window, use_cache=False).logits[0].log_softmax(-1)

    @staticmethod
    def _loss_of(log_probabilities: torch.Tensor, window: torch.Tensor) -> float:
        return -float(log_probabilities[:-1].gather(1, window[0, 1:, None]).mean())


@contextmanager
def in_place(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put layers into the model, and the former ones back afterwards."""
    former = {name: model.get_submodule(name) for name in layers}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    try:
        yield
    finally:
        for name, layer in former.items():
            model.set_submodule(name, layer)


def make_candidates(
    model: nn.Module, tokenizer, linears: Mapping[str, nn.Module], arguments: argparse.Namespace
) -> Candidates:
    """NF4 (calibrated, if asked for) and int8 layers for each linear."""
    found: Candidates = {
        name: {form: quantize_linear(linear, settings) for form, settings in PRECISIONS.items() if settings}
        for name, linear in tqdm(linears.items(), desc="Quantizing", unit="linear")
    }
    if arguments.method:
        method, settings = resolve_calibration_method(arguments.method), PRECISIONS["nf4"]
        batches = mixed_calibration_batches(
            model, arguments.general, tokenizer=tokenizer, tokens=arguments.calibration_tokens
        )
        made = quantize_calibrated(model, find_blocks(model), linears, settings, batches, method)
        for name, layer in made.layers.items():
            found[name]["nf4"] = layer
    return found


def layers_of(plan: Mapping[str, str], candidates: Candidates) -> dict[str, nn.Module]:
    """The layers that a plan puts into the model."""
    return {name: candidates[name][form] for name, form in plan.items() if form != "none"}


def random_plan(sizes: Mapping[str, LinearSize], stored_bytes: int, seed: int) -> dict[str, str]:
    """NF4 for all, then int8 or the original precision for linears in random order, as far as it fits."""
    draw = random.Random(seed)
    plan, free = dict.fromkeys(sizes, "nf4"), stored_bytes
    free -= sum(size.stored_bytes(PRECISIONS["nf4"]) for size in sizes.values())
    for name in draw.sample(sorted(sizes), len(sizes)):
        form = draw.choice(["int8", "none"])
        more = sizes[name].stored_bytes(PRECISIONS[form]) - sizes[name].stored_bytes(PRECISIONS["nf4"])
        if more <= free:
            plan[name], free = form, free - more
    return plan


def compare_linears(
    ruler: Ruler, candidates: Candidates, sensitivity: dict[str, dict[str, float]], count: int
) -> list[dict[str, object]]:
    """Predicted and measured rise of `count` evenly spaced linears, each alone, in each precision."""
    names = list(candidates)
    chosen = names[:: max(1, len(names) // count)] if count else names
    return [
        {
            "linear": name,
            "precision": form,
            "predicted": sensitivity[name][form],
            "measured": ruler.measure({name: candidates[name][form]}).divergence,
        }
        for name in tqdm(chosen, desc="Measuring linears", unit="linear")
        for form in candidates[name]
    ]


def describe_plan(
    ruler: Ruler, plan: PrecisionPlan, sizes: Mapping[str, LinearSize], candidates: Candidates, seeds: int
) -> dict[str, object]:
    """A plan beside random ones of its size."""
    cost = ruler.measure(layers_of(plan.precision, candidates))
    others = [random_plan(sizes, plan.stored_bytes, seed) for seed in range(seeds)]
    found = [ruler.measure(layers_of(other, candidates)) for other in others]
    forms = list(plan.precision.values())
    return {
        "bits": plan.bits_a_weight,
        "counts": {form: forms.count(form) for form in PRECISIONS},
        "predicted": plan.predicted_rise,
        "divergence": cost.divergence,
        "perplexity_rise": cost.perplexity_rise,
        "random_divergence": [other.divergence for other in found],
        "random_perplexity_rise": [other.perplexity_rise for other in found],
    }


def log_statistics(rows: list[dict]) -> dict[str, float]:
    """Of log(predicted) against log(measured): correlation, and mean and standard deviation of their difference.

    A rise that is lost in the rounding of float32, zero or below, is left out, and counted.
    """
    values = [(row["predicted"], row["measured"]) for row in rows]
    pairs = [(log(predicted), log(measured)) for predicted, measured in values if predicted > 0 and measured > 0]
    differences = [predicted - measured for predicted, measured in pairs]
    return {
        "linears": len(pairs),
        "left_out": len(values) - len(pairs),
        "correlation": statistics.correlation(*zip(*pairs, strict=True)),
        "mean_difference": statistics.mean(differences),
        "deviation": statistics.stdev(differences),
    }


def plot(rows: list[dict], plans: list[dict], path: Path) -> None:
    """Predicted against measured rises, on logarithmic axes: linears alone, and plans."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 6))
    for form, color in (("nf4", "tab:blue"), ("int8", "tab:orange")):
        chosen = [row for row in rows if row["precision"] == form]
        axes.scatter(
            [row["measured"] for row in chosen], [row["predicted"] for row in chosen], s=14, color=color, label=form
        )
    axes.scatter(
        [plan["divergence"] for plan in plans],
        [plan["predicted"] for plan in plans],
        marker="x",
        color="black",
        label="plans, all linears together",
    )
    limits = axes.get_xlim()
    axes.axline((1e-3, 1e-3), slope=1, color="gray", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="measured KL, nats a token", ylabel="predicted rise, nats a token")
    axes.set_xlim(max(limits[0], 1e-6), None)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def print_tables(statistics_by_form: dict[str, dict[str, float]], plans: list[dict]) -> None:
    """As Markdown."""
    print("\n| linears alone | correlation of logs | predicted / measured (geometric mean) | sd of log |")
    print("|---|---|---|---|")
    for form, found in statistics_by_form.items():
        ratio = torch.tensor(found["mean_difference"]).exp()
        print(f"| {form} | {found['correlation']:.3f} | {ratio:.3f} | {found['deviation']:.3f} |")
    print("\n| bits | NF4, int8, as is | predicted | KL | perplexity | random plans: KL | perplexity |")
    print("|---|---|---|---|---|---|---|")
    for plan in plans:
        counts = ", ".join(map(str, plan["counts"].values()))
        others = [plan["random_divergence"], plan["random_perplexity_rise"]]
        divergence, rise = (statistics.mean(values) if values else float("nan") for values in others)
        print(
            f"| {plan['bits']:.3f} | {counts} | {plan['predicted']:.4f} | {plan['divergence']:.4f} | "
            f"{plan['perplexity_rise']:+.2%} | {divergence:.4f} | {rise:+.2%} |"
        )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapted", default="last", choices=["first", "last"], help="which half stays in float32")
    parser.add_argument("--general", help="a .txt or .jsonl file of general text, beside what the model writes itself")
    parser.add_argument("--sequences", type=int, default=SEQUENCES, help="for the prediction")
    parser.add_argument("--length", type=int, default=SEQUENCE_LENGTH, help="tokens in each")
    parser.add_argument("--test-windows", type=int, default=8, help="windows of Wikipedia text to measure costs on")
    parser.add_argument("--test-length", type=int, default=512, help="tokens in each")
    parser.add_argument("--linears", type=int, default=0, help="how many are measured alone; 0: all")
    parser.add_argument(
        "--budgets", nargs="+", type=float, default=[4.13, 4.25, 4.5, 5.0, 6.0, 8.0, 12.0], help="bits"
    )
    parser.add_argument("--random-plans", type=int, default=3, help="plans of the same size to compare with")
    parser.add_argument(
        "--method", choices=[*CALIBRATION_METHODS, "auto"], help="calibrated rounding of the 4-bit part"
    )
    parser.add_argument("--calibration-tokens", type=int, default=24_576, help="for --method")
    parser.add_argument("--output", type=Path, default=Path("runs/precision_plan"))
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_demo_model()
    model = model.float().eval()
    blocks = find_blocks(model)
    half = len(blocks) // 2
    frozen = blocks[half:] if arguments.adapted == "first" else blocks[:half]
    linears = quantizable_linears(model, frozen, AdaptQConfig())
    sizes = {name: LinearSize(*linear.weight.shape, 2) for name, linear in linears.items()}  # as if in 16 bits
    stream = tokenizer("\n\n".join(load_demo_texts().general_test), return_tensors="pt", verbose=False)["input_ids"]
    windows = list(islice(stream.split(arguments.test_length, dim=1), arguments.test_windows))
    candidates = make_candidates(model, tokenizer, linears, arguments)
    batches = mixed_calibration_batches(
        model,
        arguments.general,
        tokenizer=tokenizer,
        tokens=arguments.sequences * arguments.length,
        max_length=arguments.length,
        batch_size=1,
    )
    start = time.perf_counter()
    sensitivity = measure_sensitivity(model, candidates, batches)
    seconds = time.perf_counter() - start
    ruler = Ruler(model, windows)
    rows = compare_linears(ruler, candidates, sensitivity, arguments.linears)
    found = {form: log_statistics([row for row in rows if row["precision"] == form]) for form in ("nf4", "int8")}
    plans = [
        describe_plan(
            ruler, allocate_precision(sensitivity, sizes, f"{bits} bits"), sizes, candidates, arguments.random_plans
        )
        for bits in tqdm(arguments.budgets, desc="Measuring plans", unit="plan")
    ]
    report = {
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
        "prediction_seconds": seconds,
        "prediction_tokens": sum(batch["input_ids"].numel() for batch in batches),
        "linears": rows,
        "log_statistics": found,
        "plans": plans,
    }
    (arguments.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(rows, plans, arguments.output / "predicted_measured.png")
    print_tables(found, plans)
    print(f"\nPrediction: {seconds:.0f} s for {report['prediction_tokens']} tokens. Written to {arguments.output}.")


if __name__ == "__main__":
    main()
