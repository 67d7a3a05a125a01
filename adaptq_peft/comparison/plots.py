"""The front: what each method gains on the domain against what it loses on general text."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .tables import GROUPS, Row, rows_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "osD^vP*X<>ph"
#: Above this degradation, in percent, the axis is logarithmic.
LARGE = 20
#: With a title of more characters than this the legend has one column a panel instead of two.
LONG_TITLE = 45


def check_matplotlib() -> None:
    """Raise ModuleNotFoundError, with the command that installs it, if matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError('the figures need matplotlib; run `pip install "adaptq_peft[demo]"`')


def plot_fronts(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Write `front_GROUP.png` for each group of methods that has points: a panel for each training-set size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sizes, written = sorted({row.samples for row in rows} - {0}), []
    for name, group in GROUPS.items():
        panels = [(size, [row for row in rows_of(rows, name, size) if row.samples]) for size in sizes]
        panels = [(size, chosen) for size, chosen in panels if any(row.group == name for row in chosen)]
        if not panels:
            continue
        figure = Figure(figsize=(1 + 6 * len(panels), 7), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        styles = _styles([row.method for _, chosen in panels for row in chosen])
        for one, (size, chosen) in zip(axes, panels, strict=True):
            _draw(one, f"{group.title}, N = {size:,}", chosen, styles)
        handles = {label: h for one in axes for h, label in zip(*one.get_legend_handles_labels(), strict=True)}
        columns = len(panels) * (1 if max(map(len, handles)) > LONG_TITLE else 2)
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=8
        )
        written.append(folder / f"front_{name}.png")
        figure.savefig(written[-1], dpi=130, bbox_inches="tight")  # a long legend is wider
    return written


def _styles(methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A color and a marker for each method, the same in all panels."""
    from matplotlib import colormaps

    colors = colormaps["tab20"].colors  # type: ignore[attr-defined]
    unique = list(dict.fromkeys(methods))
    return {
        name: {"color": colors[i % len(colors)], "marker": MARKERS[i % len(MARKERS)]} for i, name in enumerate(unique)
    }


def _draw(axes: Axes, title: str, rows: Sequence[Row], styles: dict[str, dict[str, Any]]) -> None:
    """One curve a method over learning rates, a dotted one over scales from each, the chosen rate with its spread."""
    for row in rows:
        style = styles[row.method]
        full = [point for point in row.points if point.scale == 1 and point.domain is not None]
        axes.plot(*_percents(full), linewidth=1, markersize=4, label=row.title, **style)
        for rate in {point.rate for point in full}:
            scaled = [point for point in row.points if point.rate == rate and point.domain is not None]
            scaled.sort(key=lambda point: point.scale)
            if len(scaled) > 1:
                axes.plot(*_percents(scaled), linewidth=1, linestyle=":", markersize=3, **style)
        if row.figures:
            change, loss = row.figures["domain_change"], row.figures["degradation"]
            spread: dict[str, Any] = {"xerr": 100 * (change.deviation or 0), "yerr": 100 * (loss.deviation or 0)}
            axes.errorbar(-100 * change.mean, 100 * loss.mean, **spread, markersize=9, capsize=3, **style)
    axes.axhline(0, color="#718096", linewidth=0.8)
    if axes.get_ylim()[1] > LARGE:
        axes.set_yscale("symlog", linthresh=LARGE)
    axes.set_xlabel("domain gain: fall of the perplexity, % of the base (right is better)")
    axes.set_ylabel("general degradation, % of the base (down is better)")
    axes.set_title(f"{title} (large: the chosen rate)", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _percents(points: Sequence[Any]) -> tuple[list[float], list[float]]:
    return [-100 * point.domain for point in points], [100 * point.general for point in points]
