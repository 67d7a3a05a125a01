"""A study from end to end: priced, run where it was stopped, and written as tables and figures.

plan -> price -> search learning rates with the first seed -> repeat the chosen ones with the others -> report
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from torch import nn

from ..demo.display import progress_bar
from ..demo.model import demo_model_folder, faster_dtype
from ..demo.quiet import quiet_libraries
from ..demo.training import training_windows
from ..fingerprint import fingerprint_base
from ..selection import find_blocks
from .measure import Measurements
from .methods import Method, check_documents_for_budgets, resolve_methods
from .plots import check_matplotlib, plot_fronts
from .price import Estimate, Price, estimate, seconds_a_token
from .records import Record, Run, RunStore, choose_rate, recorded_dtype
from .settings import StudySettings
from .tables import Row, show_estimate, summarize, write_tables
from .texts import StudyTexts, demo_study_texts
from .training import draw_samples, num_steps, results, train_run
from .untrained import UntrainedAdapters

RUNS_FOLDER, ADAPTERS_FOLDER = "runs", "adapters"


class StudyError(RuntimeError):
    """Some runs of a study failed; all others are done."""


def run_study(
    settings: StudySettings,
    *,
    model: str | None = None,
    texts: StudyTexts | None = None,
    console: Console | None = None,
    dry_run: bool = False,
) -> list[Row]:
    """Run what is missing of a study and write `results.json`, `results.md` and the figures to its folder.

    Finished runs are found by all that they depend on (the model, the texts, the settings, what the method does), so a
    study that was stopped goes on, and another set of methods, sizes or seeds adds to the same folder.

    Args:
        settings: what to run.
        model: folder or Hub repository of a causal language model; `None`: the demo's SmolLM2-135M-Instruct.
        texts: `None`: the demo's.
        console: where to print; `None`: to the terminal.
        dry_run: print the price and stop.

    Returns:
        The rows of the tables; none in a dry run.

    Raises:
        ValueError: if a method is unknown, or there is too little text.
        StudyError: if runs failed. The others were done, and the tables were written.
        ModuleNotFoundError: if matplotlib, or the demo's model or texts where they are used, are not installed.
    """
    check_matplotlib()
    study = _Study(settings, model, texts or demo_study_texts(), console or Console())
    with quiet_libraries():
        missing = list(study.missing())
        show_estimate(study.console, study.price(missing))
        if dry_run:
            return []
        study.run()
    rows = study.report()
    plot_fronts(settings.output_dir, rows)
    if study.failures:
        raise StudyError(f"{len(study.failures)} trainings failed:\n" + "\n".join(study.failures))
    return rows


@dataclass
class _Study:
    """The state of a study: what it works on, and what is done."""

    settings: StudySettings
    model: str | None
    texts: StudyTexts
    console: Console
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        name = self.model or str(demo_model_folder())
        folder = self.settings.output_dir / RUNS_FOLDER
        dtype = _resolve_dtype(self.settings.dtype, recorded_dtype(folder))
        tokenizer = AutoTokenizer.from_pretrained(name)

        def load() -> Any:
            base: Any = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
            return base.to("cuda" if torch.cuda.is_available() else "cpu").eval()

        self.load: Callable[[], Any] = load
        self.methods = resolve_methods(self.settings.methods)
        check_documents_for_budgets(self.methods, self.texts)
        self.windows = training_windows(tokenizer, self.texts.domain_train, self.settings.length)
        draw_samples(self.windows, max(self.settings.samples), 0)  # an error about too little text comes early
        self.untrained = UntrainedAdapters()
        self.measurements = Measurements(load, tokenizer, self.texts, self.settings)
        identity = {
            "model": self.model or "SmolLM2-135M-Instruct",
            "dtype": dtype,
            "texts": self.texts.digest,
            "settings": self.settings.of_a_run(),
        }
        if self.model is not None:  # a folder, or a branch on the Hub, may get other weights
            base = load()
            blocks = find_blocks(base)
            fingerprint: Any = fingerprint_base(base, blocks, range(len(blocks)))
            identity["weights"] = fingerprint["samples"]
        self.store = RunStore(folder, identity)

    def searched(self, samples: int) -> Iterator[Run]:
        """The runs that the learning rate is chosen among."""
        for method in self.methods:
            for rate in method.rates(self.settings.rates):
                yield self._run(method, samples, rate, self.settings.seeds[0])

    def repeated(self, samples: int) -> Iterator[Run]:
        """The chosen ones with the other seeds, of methods whose search is done."""
        for method in self.methods:
            rate = self.chosen_rate(method, samples)
            if rate is not None and method.is_trained:
                for seed in self.settings.seeds[1:]:
                    yield self._run(method, samples, rate, seed)

    def chosen_rate(self, method: Method, samples: int) -> float | None:
        """The rate with the best validation perplexity of all that were tried; `None` while the search is not done."""
        search = self.search(method, samples)
        return choose_rate(search) if search else None

    def search(self, method: Method, samples: int) -> list[Record]:
        """What all rates gave that a method was tried with; empty while those of this call are not done."""
        run = self._run(method, samples, 0.0, self.settings.seeds[0])
        found = self.store.searched(method, run.samples).get(run.seed, [])
        return found if self._is_done(method, samples, found) else []

    def reported(self, method: Method, samples: int) -> list[Record]:
        """As `search`, with the seed that most rates were tried with: a call with another one adds to the tables."""
        run = self._run(method, samples, 0.0, self.settings.seeds[0])
        found = self.store.searched(method, run.samples)
        if run.seed in found and not self._is_done(method, samples, found[run.seed]):
            del found[run.seed]
        return max(found.values(), key=lambda tried: (len(tried), tried[0]["seed"] == run.seed), default=[])

    def _is_done(self, method: Method, samples: int, found: list[Record]) -> bool:
        """Whether all rates of this call have been tried, if it asks for this method and size."""
        is_asked = method in self.methods and (samples in self.settings.samples or not method.is_trained)
        return not is_asked or {record["rate"] for record in found}.issuperset(method.rates(self.settings.rates))

    def missing(self) -> Iterator[list[Run]]:
        """Groups of runs that share a training and have not finished; rates to be chosen stand in as the first."""
        for samples in self.settings.samples:
            runs = list(self.searched(samples))
            for method in self.methods:
                rate = self.chosen_rate(method, samples) or method.rates(self.settings.rates)[0]
                seeds = self.settings.seeds[1:] if method.is_trained else ()
                runs += [self._run(method, samples, rate, seed) for seed in seeds]
            yield from self._groups(runs)

    def price(self, groups: list[list[Run]]) -> Estimate:
        """Time what is needed of each kind of training that is missing, and add up."""
        prices: dict[str, Price] = {}
        for runs in groups:
            training = runs[0].method.training
            if training not in prices:
                try:
                    prices[training] = self._price(runs[0])
                except Exception as error:  # its training will say so, too, and cost the others nothing
                    prices[training] = Price(0.0, 0.0)
                    failure = f"{runs[0].method.name} could not be timed: {type(error).__name__}: {error}"
                    self.console.print(failure, style="red", markup=False, highlight=False)
        return estimate(groups, prices, seconds_a_token(self.measurements) if groups else 0.0, self.settings)

    def run(self) -> None:
        """All runs that are missing; the tables are written after each training."""
        for samples in self.settings.samples:
            for phase in (self.searched, self.repeated):
                groups = self._groups(phase(samples))
                for number, runs in enumerate(groups, 1):
                    self._train(runs, f"{number}/{len(groups)} {runs[0]}")

    def report(self) -> list[Row]:
        """Write the tables of all finished runs in the folder with this model, these texts and these settings."""
        rows = summarize(self.store, self.reported)
        about = {"environments": self.store.environments(), "training_samples": len(self.windows)}
        write_tables(self.settings.output_dir, rows, {**self.store.identity, **about})
        return rows

    def _run(self, method: Method, samples: int, rate: float, seed: int) -> Run:
        """A run; those of a method that is not trained do not depend on the size and the seed."""
        return Run(method, samples, rate, seed) if method.is_trained else Run(method, 0, 0.0, 0)

    def _groups(self, runs: Iterable[Run]) -> list[list[Run]]:
        """Those that have not finished, by what they share; methods that are the same one are run once."""
        groups: dict[Any, dict[str, Run]] = {}
        for run in runs:
            if self.store.find(run) is None:
                groups.setdefault(run.training, {}).setdefault(run.method.finish, run)
        return [list(by_finish.values()) for by_finish in groups.values()]

    def _train(self, runs: list[Run], title: str) -> None:
        """One training; a failure is kept for the end, so that it does not cost the others."""
        steps = num_steps(runs[0].samples, runs[0].method, self.settings)
        try:
            with progress_bar(self.console, title) as update:
                trained = train_run(
                    runs[0],
                    self.load,
                    self.windows,
                    self.measurements,
                    self.settings,
                    lambda step, loss: update(step, steps, f"loss {loss:.3f}"),
                    self.untrained,
                )
                about = (self.load, self.measurements, self.settings, self._save_adapter)
                for run, record in results(trained, runs, *about):
                    self.store.save(run, record)
                    self.console.print(f"  {run}: {_outcome(record)}", markup=False, highlight=False)
        except Exception as error:
            self.failures.append(f"{runs[0]}: {type(error).__name__}: {error}")
            self.console.print(traceback.format_exc(), style="red", markup=False, highlight=False)
        gc.collect()  # models have cycles, and the next one is about to be loaded
        self.report()

    def _save_adapter(self, run: Run, model: nn.Module) -> None:
        if self.settings.save_adapters and isinstance(model, PeftModel):
            model.save_pretrained(str(self.settings.output_dir / ADAPTERS_FOLDER / self.store.name(run)))

    def _price(self, run: Run) -> Price:
        """Seconds of a kind of training: from a finished run of it, else timed on two steps."""
        known = self.store.timed(run.method)
        if known is None:
            arguments = (self.load, self.windows, self.measurements, self.settings, _nothing, self.untrained)
            with self.console.status(f"Timing {run.method.name}"):
                known = train_run(run, *arguments, steps=2).seconds
        return Price(known["build"], known.get("step", 0.0))


def _resolve_dtype(chosen: str, recorded: str | None) -> str:
    """The dtype of a study: which one is faster is measured once, and a study that goes on keeps it."""
    if chosen != "auto":
        return chosen
    if recorded is not None:
        return recorded
    found = torch.bfloat16 if torch.cuda.is_available() else faster_dtype()
    return str(found).removeprefix("torch.")


def _nothing(step: int, loss: float) -> None:
    """A run that is only timed reports no progress."""


def _outcome(record: Record) -> str:
    if record["failure"]:
        return f"failed: {record['failure']}"
    general, domain = record["test"]["general"], record["test"]["domain"]
    return (
        f"general {general['adapted']:.2f} ({general['degradation']:+.1%}), domain {domain['adapted']:.2f} "
        f"({domain['change']:+.1%})"
    )
