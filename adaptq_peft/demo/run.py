"""The demo: the whole method on a real 135M model and real text, in the order of the steps below.

load -> measure -> profile, select, quantize -> measure -> train -> measure -> save -> reload elsewhere -> report
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import get_peft_model
from rich.console import Console

from ..config import AdaptQConfig
from ..evaluation import Perplexity, WeightBytes, describe_environment, measure_weight_bytes, paper_weight_ratio
from . import display
from .evaluate import EvaluationSet, split_change
from .model import load_demo_model
from .plots import plot_perplexities, plot_profile
from .quiet import quiet_libraries
from .reload import check_identical, reload_in_new_process
from .settings import DemoSettings
from .texts import DemoTexts, load_demo_texts
from .training import train, training_windows

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STAGES = ("base", "quantized", "trained")
EVALUATION_FILE = "evaluation_texts.json"
ADAPTER_FOLDER = "adapter"
EVALUATED_ON = {"domain": "held-out documents of the domain", "general": "general prose"}


def run_demo(
    settings: DemoSettings | None = None,
    *,
    console: Console | None = None,
    texts: DemoTexts | None = None,
    model_folder: Path | None = None,
) -> dict[str, Any]:
    """Run the whole demo; write `report.json`, `profile.png`, `perplexities.png` and the adapter to the output folder.

    Args:
        settings: Choices; None takes the defaults.
        console: Where to print; None prints to the terminal.
        texts: Texts to use; None reads them from the installed packages.
        model_folder: A saved causal language model with its tokenizer; None takes SmolLM2-135M-Instruct.

    Returns:
        What was written to `report.json`.

    Raises:
        ReloadError: If the saved adapter cannot be loaded in a second process, or does not have exactly the same
            perplexities there. The report and the figures are written all the same.
        ModuleNotFoundError: If a package with the model or the texts is missing; the message says how to install it.
    """
    run = _Run(settings or DemoSettings(), console or Console())
    with quiet_libraries():
        model, tokenizer, texts = _load(run, model_folder, texts)
        evaluation = _write_evaluation_set(run, texts)
        _measure(run, "base", model, tokenizer, evaluation)
        adapted = _adapt(run, model, tokenizer, texts)
        _measure(run, "quantized", adapted, tokenizer, evaluation)
        _train(run, adapted, tokenizer, texts)
        _measure(run, "trained", adapted, tokenizer, evaluation)
        _save(run, adapted)
    _show_results(run)
    _reload(run)
    return run.report


class _Run:
    """What the steps share: the settings, where to print, and what has been found out so far."""

    def __init__(self, settings: DemoSettings, console: Console) -> None:
        self.settings = settings
        self.console = console
        self.folder = Path(settings.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.perplexities: dict[str, dict[str, Perplexity]] = {}
        self.seconds: dict[str, float] = {}
        chosen = asdict(settings) | {"output_dir": str(settings.output_dir)}
        self.report: dict[str, Any] = {"settings": chosen, "environment": describe_environment()}

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Note the wall time of a step."""
        start = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - start

    def write_report(self) -> None:
        """Write what has been found out so far to `report.json`."""
        (self.folder / "report.json").write_text(json.dumps(self.report, indent=1), encoding="utf-8")


def _load(
    run: _Run, model_folder: Path | None, texts: DemoTexts | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, DemoTexts]:
    run.console.rule("Model and texts")
    with run.timed("load"), run.console.status("Loading (the first time, the model is converted: 20 s)"):
        model, tokenizer = load_demo_model(model_folder)
        texts = texts or load_demo_texts()
    about_model = {
        "name": model.name_or_path,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    about_texts = {
        "domain_train_documents": texts.domain_train_sources,
        "domain_test_documents": texts.domain_test_sources,
        "domain_train_words": _count_words(texts.domain_train),
        "domain_test_words": _count_words(texts.domain_test),
        "general_test_words": _count_words(texts.general_test),
    }
    run.report |= {"model": about_model, "texts": about_texts}
    display.show_inputs(run.console, about_model, about_texts)
    return model, tokenizer, texts


def _write_evaluation_set(run: _Run, texts: DemoTexts) -> EvaluationSet:
    evaluation = EvaluationSet(texts.domain_test, texts.general_test, max_tokens=run.settings.evaluation_tokens)
    evaluation.save(run.folder / EVALUATION_FILE)
    return evaluation


def _measure(
    run: _Run, stage: str, model: nn.Module, tokenizer: PreTrainedTokenizerBase, evaluation: EvaluationSet
) -> None:
    with run.timed(f"perplexity, {stage}"), display.progress_bar(run.console, f"Perplexity, {stage}") as update:
        figures = evaluation.measure(model, tokenizer, lambda text, done, total: update(done, total, f"{text} text"))
        update(1, 1, " · ".join(f"{text} {figure.value:.2f}" for text, figure in figures.items()))
    run.perplexities[stage] = figures


def _adapt(run: _Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: DemoTexts) -> PeftModel:
    """Profile the blocks, choose some, put deltas on those and quantize the others: all of it is `get_peft_model`."""
    run.console.rule("Profile, selection, quantization")
    before = measure_weight_bytes(model)
    config = AdaptQConfig(
        task_type="CAUSAL_LM",
        selection_ratio=run.settings.ratio,
        calibration_data=texts.domain_train,
        calibration_samples=run.settings.calibration_samples,
        calibration_tokenizer=tokenizer,
        calibration_max_length=run.settings.sequence_length,
        quantization_calibration=run.settings.quantization_calibration,
    )
    with run.timed("profile, select, quantize"):
        adapted = get_peft_model(model, config)
    _show_adaptation(run, before, adapted)
    return adapted


def _show_adaptation(run: _Run, before: WeightBytes, adapted: PeftModel) -> None:
    resolved: Any = adapted.peft_config["default"]
    profile, chosen = resolved.profile, resolved.layers_to_transform
    after, ratio = measure_weight_bytes(adapted), paper_weight_ratio(len(profile.magnitude), len(chosen))
    run.report["profile"] = {
        "magnitude": list(profile.magnitude),
        "update": list(profile.update),
        "samples": profile.num_samples,
        "tokens": profile.num_tokens,
        "adapted_blocks": list(chosen),
    }
    run.report["memory"] = {
        "bytes_before": asdict(before),
        "bytes_after": asdict(after),
        "block_linears_ratio": after.block_linears / before.block_linears,
        "paper_ratio": ratio,
    }
    display.show_profile(run.console, profile.magnitude, profile.update, chosen)
    display.show_memory(run.console, before, after, ratio)


def _train(run: _Run, model: PeftModel, tokenizer: PreTrainedTokenizerBase, texts: DemoTexts) -> None:
    run.console.rule("Training")
    chosen = run.settings
    samples = training_windows(tokenizer, texts.domain_train, chosen.sequence_length)
    with run.timed("train"), display.progress_bar(run.console, f"Training, {chosen.steps} steps") as update:
        losses = train(
            model,
            samples,
            steps=chosen.steps,
            learning_rate=chosen.learning_rate,
            batch_size=chosen.batch_size,
            seed=chosen.seed,
            on_step=lambda step, loss: update(step, chosen.steps, f"loss {loss:.3f}"),
        )
    run.report["training"] = {
        "losses": losses,
        "samples_available": len(samples),
        "tokens_seen": chosen.steps * chosen.batch_size * chosen.sequence_length,
    }


def _save(run: _Run, model: PeftModel) -> None:
    config: Any = model.peft_config["default"]
    config.evaluation = _model_card_figures(run)
    with run.timed("save"):
        model.save_pretrained(str(run.folder / ADAPTER_FOLDER))
    files = sorted((run.folder / ADAPTER_FOLDER).iterdir())
    run.report["adapter_bytes"] = {file.name: file.stat().st_size for file in files}


def _model_card_figures(run: _Run) -> dict[str, dict[str, Any]]:
    """The measured perplexities in the form of `AdaptQConfig.evaluation`."""
    names = {"base": "base", "quantized": "quantized", "trained": "adapted"}
    return {
        name: {"text": f"{about}, {run.perplexities['base'][name].num_tokens:,} tokens"}
        | {names[stage]: figures[name].value for stage, figures in run.perplexities.items()}
        for name, about in EVALUATED_ON.items()
    }


def _show_results(run: _Run) -> None:
    """Print the results, and write them and the figures to the output folder."""
    run.console.rule("Results")
    by_text = {
        text: {stage: figures[text] for stage, figures in run.perplexities.items()} for text in ("domain", "general")
    }
    changes = {text: split_change(p["base"], p["quantized"], p["trained"]) for text, p in by_text.items()}
    run.report["perplexity"] = {stage: _plain(figures) for stage, figures in run.perplexities.items()}
    run.report["relative_change"] = changes
    run.write_report()
    _draw(run, by_text)
    display.show_perplexities(run.console, run.perplexities)
    display.show_changes(run.console, changes)


def _reload(run: _Run) -> None:
    """Load the adapter in a process that has only the files, and compare its perplexities to the last bit."""
    run.console.rule("Second process")
    trained = run.perplexities["trained"]
    with run.timed("reload"), run.console.status("Loading the base and the adapter, and measuring again"):
        reloaded = reload_in_new_process(
            run.folder / ADAPTER_FOLDER, run.folder / EVALUATION_FILE, run.folder / "reloaded.json"
        )
    run.report["reload"] = {"identical": reloaded == trained, "perplexity": _plain(reloaded)}
    run.report["seconds"] = run.seconds
    run.write_report()
    check_identical(trained, reloaded)
    display.show_reload(run.console, reloaded)
    display.show_seconds(run.console, run.seconds)
    run.console.print(f"Written to {run.folder}/", markup=False, highlight=False)


def _draw(run: _Run, by_text: Mapping[str, Mapping[str, Perplexity]]) -> None:
    profile = run.report["profile"]
    plot_profile(profile["magnitude"], profile["update"], profile["adapted_blocks"], run.folder / "profile.png")
    domain, general = ({stage: by_text[text][stage].value for stage in STAGES} for text in ("domain", "general"))
    plot_perplexities(domain, general, run.folder / "perplexities.png")


def _plain(figures: Mapping[str, Perplexity]) -> dict[str, dict[str, float]]:
    return {text: asdict(figure) | {"perplexity": figure.value} for text, figure in figures.items()}


def _count_words(texts: list[str]) -> int:
    return sum(len(text.split()) for text in texts)
