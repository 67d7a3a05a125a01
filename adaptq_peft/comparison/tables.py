"""Finished runs as rows: mean and standard deviation over seeds, written as JSON and Markdown."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from .methods import Method, resolve_methods
from .price import Estimate
from .records import Record, Run, RunStore, choose_rate


class Group(NamedTuple):
    """Methods that share a table.

    Args:
        title: of the table.
        references: methods of the main group that an ablation's table repeats: what it varies, or is compared with.
    """

    title: str
    references: tuple[str, ...] = ()


GROUPS = {
    "main": Group("Methods"),
    "selection": Group("Which blocks", ("adaptq-50",)),
    "ratio": Group("How many blocks", ("adaptq-50",)),
    "scaling": Group("How far a step moves the deltas", ("adaptq-recipe-4bit-unanchored",)),
    "rank": Group(
        "Rank of the corrections",
        (
            "full",
            "lora-budget",
            "lora-64-budget",
            "lora-64-one-sided-budget",
            "adaptq-recipe-budget",
            "adaptq-recipe-4bit-budget",
            "adaptq-recipe-4bit-one-sided-budget",
        ),
    ),
    "precision": Group("Precision of the frozen blocks", ("adaptq-50", "adaptq-default")),
}


class Spread(NamedTuple):
    """A figure over seeds.

    Args:
        mean: over the seeds.
        deviation: sample standard deviation; `None` for a single seed.
    """

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of one value a seed."""
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)

    def number(self) -> str:
        """With two decimals, as tables show perplexities."""
        return f"{self.mean:.2f}" + ("" if self.deviation is None else f" ± {self.deviation:.2f}")

    def percent(self) -> str:
        """Of a fraction, as tables show changes: in percent, with its sign."""
        return f"{self.mean:+.1%}" + ("" if self.deviation is None else f" ± {100 * self.deviation:.1f}")


@dataclass(frozen=True)
class Point:
    """A run of the first seed, for the figures and the table of the search.

    Args:
        rate: its learning rate.
        scale: factor on what was trained.
        validation: perplexity on the domain's validation text; `None` if the run failed, or for a scale below 1.
        domain: change of the domain's test perplexity against the base, a fraction; `None` if the run failed.
        general: degradation of the general test perplexity, the same.
    """

    rate: float
    scale: float
    validation: float | None
    domain: float | None
    general: float | None


@dataclass(frozen=True)
class Row:
    """A method with one training-set size, at the learning rate that its validation text chose.

    Args:
        method: name.
        title: of the method, for tables.
        group: the method's.
        samples: N; 0 for a method that is not trained.
        rate: the learning rate.
        at_edge: whether a searched rate is the lowest or highest that was tried, so that a better one may lie outside.
        num_seeds: runs that the figures are taken over.
        figures: by name; empty if all runs failed.
        upper_bound: largest 95% upper bound of the degradation over the seeds; `None` if there are too few documents.
        memory: as `training_memory` gives it.
        feasible: in how many of the runs the budget held; `None` without a budget.
        failures: runs whose loss was not finite.
        points: runs of the first seed, by rate and then scale.
    """

    method: str
    title: str
    group: str
    samples: int
    rate: float
    at_edge: bool
    num_seeds: int
    figures: dict[str, Spread]
    upper_bound: float | None
    memory: dict[str, int]
    feasible: int | None
    failures: int
    points: tuple[Point, ...]


def summarize(store: RunStore, search: Callable[[Method, int], list[Record]]) -> list[Row]:
    """A row for each method and size whose search is done, in the order of the methods; all in the store count.

    Args:
        store: the finished runs.
        search: gives what each rate gave that a method was tried with, by rate; nothing while the search is not done.
    """
    records = store.records()
    sizes = sorted({record["samples"] for record in records} - {0})
    seeds = sorted({record["seed"] for record in records})
    rows = []
    for method in resolve_methods(["all"]):
        for samples in sizes if method.is_trained else [0]:
            tried = search(method, samples)
            if tried:
                rate, seeds_of = choose_rate(tried), seeds if method.is_trained else [0]
                found = [store.find(Run(method, samples, rate, seed)) for seed in seeds_of]
                rows.append(_row(method, samples, rate, [r for r in found if r], tried))
    return rows


def write_tables(folder: Path, rows: Sequence[Row], about: Mapping[str, Any]) -> None:
    """Write `results.json` and `results.md`.

    Args:
        folder: made if missing.
        rows: what `summarize` gave.
        about: what all rows depend on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain = {"about": dict(about), "rows": [_plain(row) for row in rows]}
    (folder / "results.json").write_text(json.dumps(plain, indent=1), encoding="utf-8")
    (folder / "results.md").write_text(markdown(rows, about), encoding="utf-8")


def markdown(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    """All tables, with what they were measured on."""
    parts = ["# Comparison\n", _about(about)]
    for samples in sorted({row.samples for row in rows} - {0}) or [0]:
        for name, group in GROUPS.items():
            chosen = rows_of(rows, name, samples)
            if any(row.group == name and row.samples == samples for row in chosen):
                size = f", N = {samples:,}" if samples else ""
                parts += [f"## {group.title}{size}\n", _table(chosen), _search_table(chosen) if samples else ""]
    return "\n".join(parts)


def rows_of(rows: Sequence[Row], group: str, samples: int) -> list[Row]:
    """The rows of one table: those of the group and size, and for ablations the group's references."""
    wanted = [row for row in rows if row.samples in (0, samples)]
    return [row for row in wanted if row.group == group or row.method in GROUPS[group].references]


def show_estimate(console: Console, found: Estimate) -> None:
    """Print what is left to do and how long it takes."""
    table = Table(title="What is missing", title_justify="left")
    table.add_column("training")
    table.add_column("hours", justify="right")
    for method, hours in found.by_method.items():
        table.add_row(method, f"{hours:.2f}")
    if found.by_method:
        console.print(table)
    console.print(
        f"{found.trainings} trainings with {found.runs} results are missing: about {found.hours:.1f} hours",
        highlight=False,
    )


def _row(method: Method, samples: int, rate: float, found: list[Record], search: list[Record]) -> Row:
    done = [record for record in found if record["test"] is not None]
    bounds = [record["test"]["general"]["upper_bound"] for record in done]
    feasible = [record["finish"]["feasible"] for record in done if "feasible" in record["finish"]]
    tried = [record["rate"] for record in search]
    return Row(
        method=method.name,
        title=method.title,
        group=method.group,
        samples=samples,
        rate=rate,
        at_edge=len(tried) > 1 and rate in (min(tried), max(tried)),
        num_seeds=len(found),
        figures=figures_of(done),
        upper_bound=max(bounds) if bounds and None not in bounds else None,
        memory=search[0]["memory"],
        feasible=sum(feasible) if feasible else None,
        failures=len(found) - len(done),
        points=tuple(point for record in search for point in _points(record)),
    )


_FIGURES: dict[str, tuple[str, ...]] = {
    "general_base": ("general", "base"),
    "general_quantized": ("general", "quantized"),
    "general": ("general", "adapted"),
    "degradation": ("general", "degradation"),
    "quantization": ("general", "quantization"),
    "training": ("general", "training"),
    "domain_base": ("domain", "base"),
    "domain_quantized": ("domain", "quantized"),
    "domain": ("domain", "adapted"),
    "domain_change": ("domain", "change"),
    "domain_kl": ("domain_kl",),
}


def figures_of(records: list[Record]) -> dict[str, Spread]:
    """The figures of a row over runs that differ in the seed, none of which failed; empty without runs."""
    if not records:
        return {}
    values: dict[str, list[float]] = {name: [_at(r["test"], path) for r in records] for name, path in _FIGURES.items()}
    values["seconds_a_step"] = [record["seconds"].get("step", 0.0) for record in records]
    return {name: Spread.of(found) for name, found in values.items()}


def _at(tree: Any, path: tuple[str, ...]) -> float:
    for name in path:
        tree = tree[name]
    return float(tree)


def _points(record: Record) -> list[Point]:
    rate, validation = record["rate"], record["validation"]["domain"]
    if record["test"] is None:
        return [Point(rate, 1.0, None, None, None)]
    general, domain = record["test"]["general"], record["test"]["domain"]
    points = [Point(rate, 1.0, validation, domain["change"], general["degradation"])]
    for scale, figures in record.get("scaled", {}).items():
        if None not in figures.values():
            changes = (figures[name] / record["test"][name]["base"] - 1 for name in ("domain", "general"))
            points.append(Point(rate, float(scale), None, *changes))
    return points


def _plain(row: Row) -> dict[str, Any]:
    figures = {name: spread._asdict() for name, spread in row.figures.items()}
    return {**vars(row), "figures": figures, "points": [vars(point) for point in row.points]}


_LEGEND = """
Perplexity on test text, mean ± standard deviation over seeds. Degradation is the relative rise of general perplexity
against the 16-bit base, split into what quantizing and what training brought; negative is better. "at most" is its 95%
upper bound, the largest over the seeds. KL is KL(base || adapted) on the domain, nats a token. Memory: weights on a
16-bit base, gradients and 8-bit optimizer states, without activations. The learning rate is that with the lowest
perplexity on the domain's validation text, searched with the first seed; † marks one at the edge of those that were
tried, where a better one may lie outside.
"""


def _about(about: Mapping[str, Any]) -> str:
    return "\n".join([*(f"- {name}: {json.dumps(value)}" for name, value in about.items()), _LEGEND])


_COLUMNS = (
    "method",
    "rate",
    "general, quantized",
    "general",
    "degradation",
    "= quantization",
    "+ training",
    "at most",
    "domain, quantized",
    "domain",
    "change",
    "KL",
    "trained",
    "memory",
    "s a step",
    "seeds",
)


def _table(rows: Sequence[Row]) -> str:
    base = next((row.figures for row in rows if row.figures), None)
    caption = ""
    if base:
        caption = f"Base: general {base['general_base'].mean:.2f}, domain {base['domain_base'].mean:.2f}.\n"
    header = f"| {' | '.join(_COLUMNS)} |\n|---|{'---:|' * (len(_COLUMNS) - 1)}"
    return "\n".join([caption, header, *(f"| {' | '.join(_cells(row))} |" for row in rows), ""])


def _cells(row: Row) -> list[str]:
    edge = "†" if row.at_edge else ""
    rate = f"{row.rate:.3g}{edge}" if row.samples else ""
    memory = [f"{row.memory['trained_parameters'] / 1e6:.2f}M", f"{row.memory['total'] / 2**20:,.0f} MiB"]
    count = str(row.num_seeds) + (f" ({row.failures} diverged)" if row.failures else "")
    if row.feasible is not None:
        count += f", budget held in {row.feasible}"
    if not row.figures:
        return [row.title, rate, *["diverged"] * 10, *memory, "", count]
    figures = row.figures
    return [
        row.title,
        rate,
        f"{figures['general_quantized'].mean:.2f}",
        figures["general"].number(),
        *(figures[name].percent() for name in ("degradation", "quantization", "training")),
        "" if row.upper_bound is None else f"{row.upper_bound:+.1%}",
        f"{figures['domain_quantized'].mean:.2f}",
        figures["domain"].number(),
        figures["domain_change"].percent(),
        f"{figures['domain_kl'].mean:.3f}",
        *memory,
        f"{figures['seconds_a_step'].mean:.2f}" if row.samples else "",
        count,
    ]


def _search_table(rows: Sequence[Row]) -> str:
    """What each learning rate gave, with the first seed."""
    lines = [
        "Each learning rate, first seed (validation: domain perplexity; test: domain change / general degradation):\n",
        "| method | rate | scale | validation | domain | general |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        for point in row.points if row.samples else ():
            validation = "" if point.validation is None else f"{point.validation:.2f}"
            changes = ["diverged" if value is None else f"{value:+.1%}" for value in (point.domain, point.general)]
            cells = [row.title, f"{point.rate:.3g}", f"{point.scale:g}", validation, *changes]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])
