"""Tables that the command line prints, with Rich. Nothing here computes a result."""

from __future__ import annotations

from collections.abc import Collection

from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from .artifacts.quantized_base import QuantizedBase
from .evaluation import MemoryPlan, MethodMemory
from .selection import ActivationProfile


def show_memory_plan(console: Console, model: str, plan: MemoryPlan) -> None:
    """Print the bytes of each method, with each optimizer, and what preparing takes."""
    chosen = f"{len(plan.adapted)} of {plan.num_blocks} blocks adapted"
    console.print(f"{model}, {plan.dtype}: {chosen}", soft_wrap=True, markup=False, highlight=False)
    for line in _checkpoint_lines(plan):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    table = Table(title="Memory for training, without activations", title_justify="left")
    table.add_column("")
    for name in plan.methods:
        table.add_column(name, justify="right")
    methods = list(plan.methods.values())
    for name, values in _rows(methods):
        table.add_row(name, *values)
    for optimizer in methods[0].optimizer_states:
        table.add_section()
        table.add_row(f"{optimizer}: states", *(_gib(method.optimizer_states[optimizer]) for method in methods))
        table.add_row("  in all", *(f"[bold]{_gib(method.training(optimizer))}[/]" for method in methods))
    console.print(table)
    split = f", {_gib(plan.peak_presplit)} if it is loaded split (adaptq_bnb_config)" if plan.peak_presplit else ""
    console.print(
        f"Linears of the blocks against {plan.dtype}: {plan.planned_ratio:.4f} planned, {plan.paper_ratio:.4f} by the "
        "paper's (4L+12K)/16L, without scales and deltas.\n"
        f"Peak while preparing: {_gib(plan.peak_in_memory)} if the model is loaded whole{split}.",
        highlight=False,
    )


def _checkpoint_lines(plan: MemoryPlan) -> list[str]:
    """What is stored, and each way in which it is not what config.json says."""
    if plan.checkpoint is None:
        return ["No safetensors headers at hand: dtype and shapes are those of config.json."]
    stored = ", ".join(f"{_gib(size)} in {dtype}" for dtype, size in plan.checkpoint.bytes_by_dtype.items())
    return [f"Stored: {stored}", *(f"Not as in config.json: {text}" for text in plan.checkpoint.mismatches)]


def _rows(methods: list[MethodMemory]) -> list[tuple[str, list[str]]]:
    weights = [method.weights for method in methods]
    return [
        ("trained parameters", [f"{method.trained_parameters / 1e6:,.1f} M" for method in methods]),
        ("linears of the blocks, quantized", [_gib(part.quantized_linears) for part in weights]),
        ("linears of the blocks, others", [_gib(part.dense_linears) for part in weights]),
        ("everything else of the model", [_gib(part.other) for part in weights]),
        ("trained beside the weights", [_gib(part.adapters) for part in weights]),
        ("gradients", [_gib(method.gradients) for method in methods]),
    ]


def show_scores(console: Console, profile: ActivationProfile, chosen: Collection[int], strategy: str) -> None:
    """Print the statistics of each block, a bar of that which the strategy is named for, and the chosen ones."""
    about = f"{profile.num_samples} samples, {profile.num_tokens:,} tokens; chosen by {strategy!r}"
    table = Table(title=f"Activation profile: {about}", title_justify="left", box=None, padding=(0, 1))
    columns = {
        "magnitude": profile.magnitude,
        "on general text": profile.general_magnitude,
        "update": profile.update,
        "sensitivity": profile.sensitivity,
    }
    given = {name: values for name, values in columns.items() if values is not None}
    for name in ("block", *given):
        table.add_column(name, justify="right")
    drawn = strategy if strategy in given else "magnitude"
    table.add_column(drawn)
    table.add_column("")
    for block, value in enumerate(given[drawn]):
        color = "blue" if block in chosen else "bright_black"
        bar = Bar(size=max(given[drawn]), begin=0, end=value, width=30, color=color)
        mark = "[blue]adapted[/]" if block in chosen else "[dim]quantized[/]"
        table.add_row(str(block), *(f"{values[block]:.4f}" for values in given.values()), bar, mark)
    console.print(table)


def show_quantized_base(console: Console, base: QuantizedBase, blocks: Collection[int] | None) -> None:
    """Print what was written, and how to use it; `blocks`: the only ones that were quantized."""
    about, place = base.description, base.reference.name_or_path
    fields = [f'quantized_base="{place}"']
    if about.quant_type != "nf4":
        fields.append(f'quantization="{about.quant_type}"')
    calibration = about.calibration
    kinds = ", ".join(calibration["text"])
    lines = [
        f"{len(about.weights)} linears in {about.quant_type}, {base.num_bytes:,} bytes",
        f"calibrated by {calibration['method']!r} on {calibration['tokens']:,} tokens: {kinds}",
        *(f"rounded plainly: {name}: {why}" for name, why in about.plain.items()),
        f"Written to {place}. To use it: AdaptQConfig({', '.join(fields)})",
    ]
    if blocks is not None:
        lines.append(f"An adapter has to adapt all blocks but these: {', '.join(map(str, sorted(blocks)))}")
    console.print("\n".join(lines), soft_wrap=True, markup=False, highlight=False)


def _gib(count: int) -> str:
    return f"{count / 2**30:,.3f} GiB"
