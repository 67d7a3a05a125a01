"""The command line, `adaptq ...`: thin over the package."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

app = typer.Typer(
    help="Activation-driven adaptive pathway tuning with quantization, as a PEFT method.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


@app.callback()
def main() -> None:
    """ADAPTQ for PEFT. `adaptq COMMAND --help` says more."""


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option(help="Folder for the report, the figures and the adapter.")] = Path(
        "runs/demo"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the order of the training samples.")] = 0,
    ratio: Annotated[float, typer.Option(help="Share of the blocks that is adapted, above 0 and at most 1.")] = 0.5,
) -> None:
    """Adapt SmolLM2-135M to early American presidential messages: profile, quantize, train, save, reload, report."""
    from .demo.settings import DemoSettings

    try:
        settings = DemoSettings(output_dir=output_dir, steps=steps, seed=seed, ratio=ratio)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    try:
        from .demo.reload import ReloadError
        from .demo.run import run_demo
    except ModuleNotFoundError as error:
        _fail(f'{error}: pip install "adaptq_peft[demo]"', error)
    try:
        run_demo(settings)
    except (ReloadError, ModuleNotFoundError) as error:
        _fail(str(error), error)


class Autoload(str, Enum):
    """What `adaptq autoload` is asked to do."""

    on = "on"
    off = "off"
    status = "status"


@app.command()
def autoload(action: Annotated[Autoload, typer.Argument(help="What to do.")] = Autoload.status) -> None:
    """Load adaptq_peft whenever a program in this Python environment imports peft: on, off or status."""
    from . import autoload as environment

    try:
        if action is Autoload.on:
            environment.enable()
        elif action is Autoload.off:
            environment.disable()
    except OSError as error:
        _fail(f"{error}. Run it as a user who may write there, or in a virtual environment of your own.", error)
    state = "on" if environment.is_enabled() else "off"
    typer.echo(f"autoload is {state}: {environment.autoload_file()} {'exists' if state == 'on' else 'does not exist'}")


def _fail(message: str, cause: Exception) -> NoReturn:
    """Print the message in red and end with exit code 1."""
    typer.secho(f"Error: {message}", fg=typer.colors.RED, err=True)
    raise typer.Exit(code=1) from cause
