"""The demo's two figures, drawn by matplotlib without a display."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

ADAPTED_COLOR = "#2b6cb0"
FROZEN_COLOR = "#b8c2cc"
STAGE_COLORS = {"base": "#718096", "quantized": "#dd6b20", "trained": ADAPTED_COLOR}


def plot_profile(magnitude: Sequence[float], update: Sequence[float], adapted: Collection[int], path: Path) -> None:
    """Draw the profile, block by block, the adapted blocks in blue, and write it as a PNG.

    Args:
        magnitude: Mean absolute activation of each block.
        update: Relative change that each block makes to its input.
        adapted: Indices of the adapted blocks.
        path: File to write.

    Raises:
        ValueError: If the two profiles differ in length.
    """
    if len(magnitude) != len(update):
        raise ValueError(
            f"magnitude has {len(magnitude)} blocks and update has {len(update)}; they must be of one model"
        )
    figure, (top, bottom) = _figure(2, 1, size=(9, 6), sharex=True)
    colors = [ADAPTED_COLOR if block in adapted else FROZEN_COLOR for block in range(len(magnitude))]
    top.bar(range(len(magnitude)), magnitude, color=colors)
    top.set_ylabel("mean |activation|")
    top.set_title(f"Activation profile: {len(adapted)} of {len(magnitude)} blocks adapted", loc="left", fontsize=11)
    top.legend(
        handles=[
            Patch(color=ADAPTED_COLOR, label="adapted, not quantized"),
            Patch(color=FROZEN_COLOR, label="frozen, quantized"),
        ],
        frameon=False,
    )
    bottom.scatter(range(len(update)), update, color=colors)
    bottom.set_ylabel("relative update of the input")
    bottom.set_xlabel("block")
    bottom.set_xlim(-0.7, len(update) - 0.3)
    bottom.set_yscale("log")  # the first block changes its input many times more than the rest
    _write(figure, path)


def plot_perplexities(domain: Mapping[str, float], general: Mapping[str, float], path: Path) -> None:
    """Draw perplexity on domain and general text, one bar a stage, and write it as a PNG.

    Args:
        domain: Stage ("base", "quantized", "trained") to perplexity on the domain's test text.
        general: The same on general text; both panels have their own scale from zero.
        path: File to write.

    Raises:
        ValueError: If a stage has no color.
    """
    unknown = sorted({*domain, *general} - set(STAGE_COLORS))
    if unknown:
        raise ValueError(f"unknown stages {unknown}; allowed are {list(STAGE_COLORS)}")
    figure, panels = _figure(1, 2, size=(9, 4))
    for axes, title, values in zip(panels, ("Domain text", "General text"), (domain, general), strict=True):
        bars = axes.bar(list(values), list(values.values()), color=[STAGE_COLORS[stage] for stage in values])
        axes.bar_label(bars, fmt="%.2f", padding=2)
        axes.margins(y=0.12)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_ylabel("perplexity (lower is better)")
    _write(figure, path)


def _figure(rows: int, columns: int, size: tuple[float, float], sharex: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure outside of pyplot's global state, and its axes in reading order."""
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, sharex=sharex, squeeze=False).flat)
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _write(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
