"""Everything that a folder of `adaptq compare` holds: each method at each rate, and methods against each other.

    adaptq compare --output-dir STUDY ...
    python scripts/benchmarks/study_tables.py STUDY > STUDY/README.md

The tables of `adaptq compare` have the rate that validation text chose; here are all, with mean and standard deviation
over the seeds of each. STUDY/pairs.txt names what is paired: in each line a METHOD@RATE and those that it is compared
with. The ratio of the perplexities is over the seeds that both have in the same dtype. Its 95% interval is the
bootstrap-t of `fit_to_budget` from both sides, which resamples documents; seeds are the column after it.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np

from adaptq_peft.comparison.methods import method_names
from adaptq_peft.comparison.records import Record, RunStore
from adaptq_peft.comparison.tables import Spread, figures_of
from adaptq_peft.preservation.bounds import rise_per_token, upper_bounds

CONFIDENCE = 0.975  # of each side

Cell = tuple[int, str, float]
"""Training-set size, method and learning rate: a row of the table."""
Seed = tuple[int, str]
"""With the dtype: no run is compared with one in another."""
Cells = dict[Cell, dict[Seed, Record]]


def read_cells(study: Path) -> Cells:
    """The finished runs whose loss was finite, by cell and seed, in the order of sizes, methods and rates."""
    order = {name: number for number, name in enumerate(method_names())}
    cells: Cells = defaultdict(dict)
    for record in RunStore(study / "runs", identity={}).records():
        if record["test"]:
            seed = record["seed"], record["depends_on"]["dtype"]
            cells[record["samples"], record["method"], record["rate"]][seed] = record
    return dict(sorted(cells.items(), key=lambda item: (item[0][0], order[item[0][1]], item[0][2])))


def row(cell: Cell, by_seed: dict[Seed, Record]) -> str:
    """A line of the table of all rates."""
    records = list(by_seed.values())
    figures, memory = figures_of(records), records[0]["memory"]
    quantization = figures["quantization"].mean
    cells = [
        f"`{cell[1]}`",
        f"{cell[2]:g}",
        Spread.of([record["validation"]["domain"] for record in records]).number(),
        figures["domain"].number(),
        figures["domain_change"].percent(),
        figures["general"].number(),
        figures["degradation"].percent(),
        f"{quantization:+.1%}" if quantization else "",
        f"{figures['training'].mean:+.1%}",
        f"{max(record['test']['general']['upper_bound'] for record in records):+.1%}",
        f"{figures['domain_kl'].mean:.3f}",
        f"{memory['trained_parameters'] / 1e6:.1f}M",
        f"{memory['total'] / 2**20:,.0f} MiB",
        ", ".join(map(_seed, by_seed)),
    ]
    return f"| {' | '.join(cells)} |"


def read_pairs(study: Path) -> list[tuple[str, str]]:
    """What pairs.txt names; nothing if there is none."""
    file = study / "pairs.txt"
    lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    return [(first, second) for first, *others in lines for second in others]


def pair_rows(cells: Cells, samples: int, names: tuple[str, str]) -> list[str]:
    """The lines of a pair: one for each text; none if the two have no seed in common with this size."""
    split = [name.rpartition("@") for name in names]
    first, second = (cells.get((samples, method, float(rate)), {}) for method, _, rate in split)
    seeds = sorted(set(first) & set(second))
    lines = []
    for text in ("domain", "general") if seeds else ():
        tokens = np.array(first[seeds[0]]["test"][text]["documents"]["num_tokens"])
        nll = [[of[seed]["test"][text]["documents"]["adapted"] for seed in seeds] for of in (first, second)]
        each = np.array(nll[0]) - np.array(nll[1])  # summed nats: [seeds, documents]
        mean = each.mean(0)
        ratio, *ratios = np.exp([rise_per_token(nats, tokens) for nats in (mean, *each)])
        lower = np.exp(-upper_bounds(-mean[None], tokens, CONFIDENCE)[0])
        upper = np.exp(upper_bounds(mean[None], tokens, CONFIDENCE)[0])
        by_seed = ", ".join(f"{of_seed:.3f}" for of_seed in ratios)
        shown = [f"`{name}`" for name in names] if text == "domain" else ["", ""]
        numbers = [f"{ratio:.3f}", f"{lower:.3f} to {upper:.3f}", by_seed, f"{(mean < 0).mean():.0%} of {len(tokens)}"]
        numbers.append(", ".join(map(_seed, seeds)))
        lines.append(f"| {' | '.join([*shown, text, *numbers])} |")
    return lines


def report(study: Path) -> str:
    """All tables, as Markdown."""
    cells, pairs = read_cells(study), read_pairs(study)
    sizes = sorted({samples for samples, _, _ in cells})
    paired = {names: {samples: pair_rows(cells, samples, names) for samples in sizes} for names in pairs}
    empty = [names for names, lines in paired.items() if not any(lines.values())]
    if empty:
        raise SystemExit(f"{study / 'pairs.txt'}: {empty} have no finished run with a seed in common")
    parts = [_HEAD.format(study=study.name)]
    for samples in sizes:
        of_size = {cell: by_seed for cell, by_seed in cells.items() if cell[0] == samples}
        runs = [record for by_seed in of_size.values() for record in by_seed.values()]
        base = ", ".join(
            f"{text} {_range([run['test'][text]['base'] for run in runs])}" for text in ("domain", "general")
        )
        parts += [
            f"## {samples:,} samples\n",
            f"Base: {base}.\n",
            _ROWS,
            *(row(cell, by_seed) for cell, by_seed in of_size.items()),
        ]
        lines = [line for by_size in paired.values() for line in by_size[samples]]
        if lines:
            parts += [_PAIRS, *lines]
        parts.append("")
    return "\n".join(parts)


_HEAD = """# {study}

Written by `python scripts/benchmarks/study_tables.py docs/studies/{study} > docs/studies/{study}/README.md` from the
finished runs in `runs`. Methods have the names of [`adaptq compare`](../../comparison.md#the-methods);
[the study](../../study.md) says what was run how, and what follows. Perplexity on test text, and on the domain's
validation text; mean ± standard deviation over seeds. "degradation" is against the 16-bit base, "at most" its 95%
upper bound, the largest over the seeds. KL is on the domain, nats a token. Memory: weights, gradients and 8-bit
optimizer states. Seeds are in bfloat16 where nothing is said.
"""
_ROWS = """| method | rate | domain, validation | domain | change | general | degradation | = quantization | \
+ training | at most | KL | trained | memory | seeds |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|"""
_PAIRS = """
Ratios of perplexities, below 1 the first is better; the interval resamples documents.

| first | second | text | ratio | 95% interval | by seed | first is better in | seeds |
|---|---|---|---:|---|---|---:|---|"""


def _seed(seed: Seed) -> str:
    number, dtype = seed
    return str(number) if dtype == "bfloat16" else f"{number} ({dtype})"


def _range(values: list[float]) -> str:
    """Processors round differently."""
    ends = [f"{min(values):.2f}", f"{max(values):.2f}"]
    return " to ".join(dict.fromkeys(ends))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="output folder of `adaptq compare`")
    print(report(parser.parse_args().study), end="")


if __name__ == "__main__":
    main()
