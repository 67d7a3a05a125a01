"""The command line, `adaptq ...`: thin over the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Activation-driven adaptive pathway tuning with quantization, as a PEFT method.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


@app.callback()
def main() -> None:
    """Keeps `demo` a subcommand while it is the only one. Heavy imports are within the commands."""


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option(help="Folder for the report, the figures and the adapter.")] = Path(
        "runs/demo"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the order of the training samples.")] = 0,
    ratio: Annotated[float, typer.Option(help="Share of the blocks that is adapted, above 0 and at most 1.")] = 0.5,
) -> None:
    """Adapt SmolLM2-135M to 19th century political prose: profile, quantize, train, save, reload, report."""
    from .demo.reload import ReloadError
    from .demo.run import run_demo
    from .demo.settings import DemoSettings

    try:
        run_demo(DemoSettings(output_dir=output_dir, steps=steps, seed=seed, ratio=ratio))
    except (ReloadError, ModuleNotFoundError, ValueError) as error:
        typer.secho(f"Error: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(code=1) from error
