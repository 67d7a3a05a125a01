"""What the demo prints, with Rich: tables, bars and progress. Nothing here computes a result."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.bar import Bar
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..evaluation import Perplexity, WeightBytes

Update = Callable[[int, int, str], None]
"""Called with (done, in all, a note to show at the end of the bar)."""


@contextmanager
def progress_bar(console: Console, description: str) -> Iterator[Update]:
    """A progress bar that stays on the screen; yields the function that moves it."""
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=None, note="")
        yield lambda done, total, note: progress.update(task, completed=done, total=total, note=note)


def show_inputs(console: Console, model: Mapping[str, Any], texts: Mapping[str, Any]) -> None:
    """Print which model and which texts are used."""
    trained, tested = texts["domain_train_documents"], texts["domain_test_documents"]
    lines = (
        f"model    {model['name']} ({model['parameters'] / 1e6:.1f}M parameters, {model['dtype']})",
        f"domain   {texts['domain_train_words']:,} words of {len(trained)} documents for training",
        f"         {texts['domain_test_words']:,} words of {len(tested)} others for the test: {', '.join(tested)}",
        f"general  {texts['general_test_words']:,} words for the test",
    )
    console.print("\n".join(lines), markup=False, highlight=False)


def show_profile(
    console: Console, magnitude: Sequence[float], update: Sequence[float], adapted: Collection[int]
) -> None:
    """Print what was profiled of each block, with a bar for its update, which chooses; adapted blocks are marked."""
    table = Table(title="Activation profile", title_justify="left", box=None, padding=(0, 1))
    for name in ("block", "mean |activation|", "update"):
        table.add_column(name, justify="right")
    table.add_column("")
    table.add_column("")
    for block, (mean, value) in enumerate(zip(magnitude, update, strict=True)):
        chosen = block in adapted
        bar = Bar(size=max(update), begin=0, end=value, width=36, color="blue" if chosen else "bright_black")
        state = "[blue]adapted[/]" if chosen else "[dim]quantized[/]"
        table.add_row(str(block), f"{mean:.3f}", f"{value:.3f}", bar, state)
    console.print(table)


def show_memory(console: Console, before: WeightBytes, after: WeightBytes, paper_ratio: float) -> None:
    """Print bytes before and after, measured from the tensors, and the paper's formula beside its own scope."""
    table = Table(title="Weights in memory, measured from the tensors", title_justify="left")
    for name in ("", "before", "after", "after / before", "paper: (4L+12K)/16L"):
        table.add_column(name, justify="left" if not name else "right")
    rows = (
        ("linears of the blocks", before.block_linears, after.block_linears, f"{paper_ratio:.4f}"),
        ("whole model without the adapter", before.base, after.base, ""),
        ("adapter (trained)", before.adapters, after.adapters, ""),
        ("whole model with the adapter", before.total, after.total, ""),
    )
    for name, old, new, formula in rows:
        table.add_row(name, _megabytes(old), _megabytes(new), f"{new / old:.4f}" if old else "", formula)
    console.print(table)


def show_perplexities(console: Console, stages: Mapping[str, Mapping[str, Perplexity]]) -> None:
    """Print perplexity on domain and general text, a row for each stage."""
    table = Table(title="Perplexity (lower is better)", title_justify="left")
    for name in ("stage", "domain", "general"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage, figures in stages.items():
        table.add_row(stage, *(f"{figures[name].value:.3f}" for name in ("domain", "general")))
    console.print(table)


def show_changes(console: Console, changes: Mapping[str, Mapping[str, float]]) -> None:
    """Print the change of perplexity against the base, split into what quantization and what training brought."""
    table = Table(title="Change against the 16-bit base (+ is worse)", title_justify="left")
    for name in ("text", "quantization", "training", "total"):
        table.add_column(name, justify="left" if name == "text" else "right")
    for text, parts in changes.items():
        table.add_row(text, *(_signed_percent(parts[name]) for name in ("quantization", "training", "total")))
    console.print(table)


def show_reload(console: Console, figures: Mapping[str, Perplexity]) -> None:
    """Print the perplexities of the second process, which were found equal to those of the first."""
    values = " · ".join(f"{text} {figure.value:.3f}" for text, figure in figures.items())
    console.print(f"The reloaded adapter has exactly the same perplexities: {values}", style="green", highlight=False)


def show_seconds(console: Console, seconds: Mapping[str, float]) -> None:
    """Print the wall time of each step in one line."""
    steps = " · ".join(f"{name} {taken:.0f} s" for name, taken in seconds.items())
    console.print(f"[dim]{steps} · in all {sum(seconds.values()):.0f} s[/]")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _signed_percent(fraction: float) -> str:
    return f"[{'red' if fraction > 0 else 'green'}]{fraction:+.1%}[/]"
