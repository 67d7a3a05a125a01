"""What `measure_forgetting` and `fit_to_budget` return: figures that print and plot themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ..evaluation import degradation
from .bounds import MIN_DOCUMENTS, degradation_of, upper_bounds
from .documents import DocumentLosses

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class TextComparison:
    """Losses on one set of documents of the same model in three states.

    Attributes:
        base: the 16-bit original.
        quantized: the base with its frozen blocks quantized, adapters off. Equals `base` where nothing is quantized,
            and where the adapter changed the base's weights: then all of the rise is training's.
        adapted: with the adapter.
    """

    base: DocumentLosses
    quantized: DocumentLosses
    adapted: DocumentLosses

    @property
    def degradation(self) -> float:
        """Relative rise of the perplexity, adapted against base: 0.05 is 5% worse, negative is better."""
        return degradation(self.adapted.total, self.base.total)

    @property
    def quantization(self) -> float:
        """What quantizing the base cost: (quantized - base) / base."""
        return degradation(self.quantized.total, self.base.total)

    @property
    def training(self) -> float:
        """What the adapter added: (adapted - quantized) / base. The two parts add up to `degradation`."""
        return self.degradation - self.quantization

    @property
    def differences(self) -> np.ndarray:
        """[documents]: nats of the adapted model minus those of the base, summed over each document."""
        return self.adapted.nll - self.base.nll

    def upper_bound(self, confidence: float) -> float:
        """Upper confidence bound of `degradation`; infinite if there are too few documents to give one."""
        num_tokens = self.base.num_tokens
        if len(num_tokens) < MIN_DOCUMENTS:
            return math.inf
        return degradation_of(float(upper_bounds(self.differences[None], num_tokens, confidence)[0]))

    def perplexities(self) -> dict[str, float]:
        """The perplexities of "base", "quantized" and "adapted"."""
        stages = {"base": self.base, "quantized": self.quantized, "adapted": self.adapted}
        return {stage: losses.total.value for stage, losses in stages.items()}


@dataclass(frozen=True)
class ForgettingReport:
    """How much of what it knew a model has lost.

    Fractions are relative rises of the perplexity on general text against the 16-bit base: 0.05 is 5% worse, negative
    is better. They hold for text like that which was measured, and say nothing of other text.

    Attributes:
        general: losses on general text. After `fit_to_budget`, on those documents that certify.
        domain: losses on domain text, or `None`.
        domain_kl: KL(base || adapted) on the domain text, nats a token, or `None`.
        confidence: of the bound, one-sided.
        upper_bound: upper confidence bound of `degradation`.
        budget: the degradation that is allowed, or `None`.
        feasible: whether `upper_bound` is within the budget; `None` without a budget.
        family: what `fit_to_budget` chose among, "scales" or "shrinkage"; `None` if nothing was chosen.
        shrinkage: lambda of the covariance-weighted shrinkage, 0 if none was best; `None` in the family "scales".
        scales: block -> factor on its deltas; empty if none was chosen.
        note: in words, what to know or do; may be empty.
    """

    general: TextComparison
    domain: TextComparison | None
    domain_kl: float | None
    confidence: float
    upper_bound: float
    budget: float | None = None
    feasible: bool | None = None
    family: str | None = None
    shrinkage: float | None = None
    scales: dict[int, float] = field(default_factory=dict)
    note: str = ""

    @property
    def degradation(self) -> float:
        """Relative rise of the perplexity on general text."""
        return self.general.degradation

    @property
    def quantization(self) -> float:
        """The part of `degradation` that quantizing brought."""
        return self.general.quantization

    @property
    def training(self) -> float:
        """The part of `degradation` that training brought; negative if it repaired what quantizing broke."""
        return self.general.training

    def certificate(self) -> dict[str, Any]:
        """The figures as JSON types, for `AdaptQConfig.certificate`."""
        figures = {
            "budget": self.budget,
            "confidence": self.confidence,
            "feasible": self.feasible,
            "degradation": self.degradation,
            "upper_bound": self.upper_bound,
            "quantization": self.quantization,
            "training": self.training,
            "domain_kl": self.domain_kl,
            "num_documents": len(self.general.base.nll),
            "num_tokens": self.general.base.total.num_tokens,
            "family": self.family,
            "shrinkage": self.shrinkage,
            "scales": {str(block): scale for block, scale in self.scales.items()},
        }
        return {name: value for name, value in figures.items() if value is not None}

    def evaluation(self) -> dict[str, dict[str, float]]:
        """The perplexities, for `AdaptQConfig.evaluation`."""
        texts = {"general": self.general, "domain": self.domain}
        return {name: text.perplexities() for name, text in texts.items() if text is not None}

    def __rich__(self) -> Group:
        return Group(self._table(), *(Text(line) for line in self._lines()))

    def __str__(self) -> str:
        console = Console(width=110, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw the split, the difference of each document and, if there are some, the scales.

        Args:
            path: file to write, a PNG or whatever matplotlib writes; `None`: none.

        Returns:
            The figure; a notebook shows it.

        Raises:
            ModuleNotFoundError: if matplotlib is missing.
        """
        from .plot import plot_report

        figure = plot_report(self)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure

    def _table(self) -> Table:
        table = Table("perplexity", "base", "quantized", "adapted", title="Forgetting", title_justify="left")
        for name, text in (("general", self.general), ("domain", self.domain)):
            if text is not None:
                changes = ("", f" ({text.quantization:+.1%})", f" ({text.degradation:+.1%})")
                figures = zip(text.perplexities().values(), changes, strict=True)
                table.add_row(name, *(f"{perplexity:.2f}{change}" for perplexity, change in figures))
        return table

    def _lines(self) -> list[str]:
        documents = f"{len(self.general.base.nll)} documents, {self.general.base.total.num_tokens:,} tokens"
        lines = [
            f"General degradation {self.degradation:+.2%} = quantization {self.quantization:+.2%} "
            f"+ training {self.training:+.2%}",
            f"At most {self.upper_bound:+.2%} with {self.confidence:.0%} confidence, for text like this ({documents})",
        ]
        if self.domain_kl is not None:
            lines.append(f"KL(base || adapted) on domain text: {self.domain_kl:.4f} nats a token")
        if self.budget is not None:
            lines.append(f"Budget {self.budget:+.1%}: {'held' if self.feasible else 'infeasible'}")
        if self.shrinkage is not None:
            lines.append(f"Shrinkage of the deltas: lambda {self.shrinkage:.3g}")
        if self.scales:
            lines.append("Scale of each block: " + ", ".join(f"{b}: {s:.2f}" for b, s in self.scales.items()))
        return [*lines, self.note] if self.note else lines
