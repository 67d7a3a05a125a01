"""The figure of a forgetting report, drawn by matplotlib without a display."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('plotting needs matplotlib; run `pip install "adaptq_peft[demo]"`') from error

if TYPE_CHECKING:
    from .report import ForgettingReport

WORSE, BETTER, NEUTRAL = "#dd6b20", "#2b6cb0", "#718096"


def plot_report(report: ForgettingReport) -> Figure:
    """The split of the degradation, the difference of each document and, if there are some, the scales by block."""
    figure = Figure(figsize=(13 if report.scales else 9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3 if report.scales else 2)
    _plot_split(axes[0], report)
    _plot_documents(axes[1], report)
    if report.scales:
        _plot_scales(axes[2], report)
    return figure


def _plot_split(axes: Any, report: ForgettingReport) -> None:
    parts = {"quantization": report.quantization, "training": report.training, "degradation": report.degradation}
    values = [100 * value for value in parts.values()]
    axes.bar(list(parts), values, color=[WORSE if value > 0 else BETTER for value in values])
    axes.axhline(0, color=NEUTRAL, linewidth=0.8)
    above = 100 * (report.upper_bound - report.degradation)
    axes.errorbar(["degradation"], values[-1:], yerr=[[0], [above]], color="black", capsize=5)
    if report.budget is not None:
        axes.axhline(100 * report.budget, color="black", linestyle="--", linewidth=1, label="budget")
        axes.legend()
    axes.set_ylabel("general perplexity, % above the base")
    axes.set_title(f"Degradation and its {report.confidence:.0%} upper bound", loc="left", fontsize=10)


def _plot_documents(axes: Any, report: ForgettingReport) -> None:
    per_token = report.general.differences / report.general.base.num_tokens
    axes.scatter(report.general.base.nll / report.general.base.num_tokens, per_token, s=14, color=BETTER, alpha=0.7)
    axes.axhline(0, color=NEUTRAL, linewidth=0.8)
    axes.set_xlabel("loss of the base, nats a token")
    axes.set_ylabel("adapted - base, nats a token")
    axes.set_title("Each general document", loc="left", fontsize=10)


def _plot_scales(axes: Any, report: ForgettingReport) -> None:
    axes.bar([str(block) for block in report.scales], list(report.scales.values()), color=BETTER)
    axes.set_xlabel("block")
    axes.set_ylabel("scale of its deltas")
    axes.set_title("Scales", loc="left", fontsize=10)
