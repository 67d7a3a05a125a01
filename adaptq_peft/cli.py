"""The command line, `adaptq ...`: thin over the package."""

from __future__ import annotations

import json
import signal
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TypeVar

import typer
from rich.console import Console

if TYPE_CHECKING:
    import torch

Number = TypeVar("Number", int, float)

DEVICE_HELP = "That runs the model, such as cpu or cuda:1. Default: the accelerator, if there is one."

app = typer.Typer(
    help="Activation-driven adaptive pathway tuning with quantization, as a PEFT method.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


@app.callback()
def main() -> None:
    """ADAPTQ for PEFT. `adaptq COMMAND --help` says more."""
    # A scheduler's signal, too, ends a command so that its temporary folders go.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option(help="Folder for the report, the figures and the adapter.")] = Path(
        "runs/demo"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the order of the training samples.")] = 0,
    ratio: Annotated[float, typer.Option(help="Share of the blocks that is adapted, above 0 and at most 1.")] = 0.5,
    calibrate: Annotated[
        bool, typer.Option(help="Choose the 4-bit codes on text; without it rounding is plain and takes seconds.")
    ] = True,
) -> None:
    """Adapt SmolLM2-135M to early American presidential messages: profile, quantize, train, save, reload, report."""
    from .demo.settings import DemoSettings

    try:
        settings = DemoSettings(
            output_dir=output_dir,
            steps=steps,
            seed=seed,
            ratio=ratio,
            quantization_calibration="auto" if calibrate else None,
        )
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


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Folder or Hub repository of a checkpoint; no weights are read.")],
    ratio: Annotated[float, typer.Option(help="Share of the blocks that is adapted.")] = 0.5,
    num_blocks: Annotated[int | None, typer.Option(help="Number of adapted blocks, instead of --ratio.")] = None,
    blocks: Annotated[str | None, typer.Option(help="The adapted blocks themselves, such as 14,15.")] = None,
    budget: Annotated[
        str | None, typer.Option(help='Take as many blocks as fit, without activations: "12GiB" or "12GB".')
    ] = None,
    optimizer: Annotated[str, typer.Option(help="Optimizer that --budget counts, as transformers names it.")] = (
        "adamw_torch"
    ),
    quantization: Annotated[
        str, typer.Option(help="Of the frozen blocks: nf4, fp4, int8, hqq4, hqq3, hqq2, none or auto.")
    ] = "nf4",
    weight_budget: Annotated[
        str | None, typer.Option(help='With auto, for the linears of the frozen blocks: "5.0 bits" or "1.5GiB".')
    ] = None,
    frozen_rank: Annotated[int, typer.Option(min=0, help="Rank of corrections on the frozen blocks; 0: none.")] = 8,
    delta_dtype: Annotated[str, typer.Option(help="Of what is trained, in all methods.")] = "float32",
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of LoRA and QLoRA.")] = 16,
    galore_rank: Annotated[int, typer.Option(min=1, help="Rank of galore_adamw.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show the memory that training a model takes, before any weights are loaded."""
    from .cli_tables import show_memory_plan
    from .config import AdaptQConfig
    from .evaluation import check_optimizer, largest_num_adapted_blocks, plan_memory

    given = {"--blocks": blocks, "--num-blocks": num_blocks, "--budget": budget}
    chosen = [option for option, value in given.items() if value is not None]
    if len(chosen) > 1:
        raise typer.BadParameter(f"{' and '.join(chosen)} each say how many blocks; give one of them")
    try:
        config = AdaptQConfig(
            selection_ratio=ratio,
            num_adapted_blocks=num_blocks,
            layers_to_transform=_indices(blocks),
            quantization=quantization,
            weight_budget=weight_budget,
            frozen_rank=frozen_rank,
            delta_dtype=delta_dtype,
        )
        check_optimizer(optimizer)
        if budget is not None:
            config.num_adapted_blocks = largest_num_adapted_blocks(
                model, budget, config, optimizer=optimizer, galore_rank=galore_rank
            )
        planned = plan_memory(model, config, lora_rank=lora_rank, galore_rank=galore_rank)
    except (OSError, ValueError) as error:
        _fail(str(error), error)
    if as_json:
        typer.echo(json.dumps(planned.to_dict(), indent=1))
    else:
        show_memory_plan(Console(), model, planned)


@app.command()
def profile(
    model: Annotated[str, typer.Argument(help="Folder or Hub repository of a checkpoint.")],
    data: Annotated[Path, typer.Option(help="Texts of the domain: a .txt (a text a line), .json or .jsonl file.")],
    general: Annotated[Path | None, typer.Option(help="General texts, for strategies that compare.")] = None,
    output: Annotated[Path, typer.Option(help="Where the profile is written.")] = Path("profile.json"),
    strategy: Annotated[str, typer.Option(help="Rule that chooses the blocks which are shown.")] = "update",
    ratio: Annotated[float, typer.Option(help="Share of the blocks that is chosen.")] = 0.5,
    samples: Annotated[int, typer.Option(min=1, help="Texts that are profiled at most.")] = 100,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens a text is cut to.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts in a forward pass.")] = 8,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Read each layer from the disk when it runs; never load the blocks.")
    ] = False,
) -> None:
    """Profile a model's blocks on texts, show the choice, and write a file for AdaptQConfig(profile=...)."""
    from .cli_tables import show_scores
    from .config import AdaptQConfig
    from .plan import choose_blocks
    from .selection import find_blocks, profile_activations
    from .skeleton import build_skeleton

    if output.is_dir():
        raise typer.BadParameter(f"{str(output)!r} is a folder; give the name of a file", param_hint="--output")
    if stream and device is not None:
        raise typer.BadParameter("--stream runs on the accelerator, if there is one; leave --device out")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        config = AdaptQConfig(
            selection_strategy=strategy,
            selection_ratio=ratio,
            calibration_data=data,
            general_calibration_data=general,
        )
        skeleton = build_skeleton(model)
        loaded = None if stream else type(skeleton).from_pretrained(model, device_map=_device(device))
        found = profile_activations(
            model if loaded is None else loaded,
            data,
            general_data=general,
            samples=samples,
            max_length=max_length,
            batch_size=batch_size,
        )
        config.profile = found
        profiled = skeleton if loaded is None else loaded  # only a model with weights can give sensitivities
        chosen, found = choose_blocks(profiled, find_blocks(profiled), config)  # type: ignore[assignment]
        found.save(output)
    except (OSError, ValueError) as error:
        _fail(str(error), error)
    show_scores(Console(), found, chosen, strategy)
    use = f'AdaptQConfig(profile="{output}", selection_strategy="{strategy}", selection_ratio={ratio:g})'
    typer.echo(f"Written to {output}. To use it: {use}")


@app.command("quantize-base")
def quantize_base(
    model: Annotated[str, typer.Argument(help="Folder or Hub repository of a 16-bit checkpoint.")],
    output: Annotated[Path, typer.Option(help="Folder for quantized_base.safetensors.")],
    blocks: Annotated[str | None, typer.Option(help="Only these blocks, such as 0,1,2. Default: all.")] = None,
    quantization: Annotated[str, typer.Option(help="nf4 or fp4.")] = "nf4",
    calibration: Annotated[str, typer.Option(help="auto, absmax, gptq, descent or asymmetric.")] = "auto",
    data: Annotated[Path | None, typer.Option(help="Texts of the domain: a .txt, .json or .jsonl file.")] = None,
    general: Annotated[Path | None, typer.Option(help="General texts.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of text in all, about. Default: 24,576.")] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
) -> None:
    """Calibrate the 4-bit codes of a model's blocks once, for several adapters: AdaptQConfig(quantized_base=...)."""
    from .artifacts.base_calibration import quantize_base as write_base
    from .cli_tables import show_quantized_base
    from .quantization.calibrated.text import CALIBRATION_TOKENS
    from .skeleton import build_skeleton

    indices = _indices(blocks)
    try:
        base = write_base(
            type(build_skeleton(model)).from_pretrained(model, device_map=_device(device)),
            output,
            blocks=indices,
            quantization=quantization,
            calibration=calibration,
            data=data,
            general_data=general,
            tokens=tokens or CALIBRATION_TOKENS,
        )
    except (OSError, ValueError) as error:
        _fail(str(error), error)
    show_quantized_base(Console(), base, indices)


@app.command()
def compare(
    output_dir: Annotated[Path, typer.Option(help="Folder for finished runs, tables and figures.")] = Path(
        "runs/compare"
    ),
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub repository; default: the demo's 135M model.")
    ] = None,
    domain_train: Annotated[Path | None, typer.Option(help="Documents to train on: .txt, .json or .jsonl.")] = None,
    domain_valid: Annotated[Path | None, typer.Option(help="To choose on; default: a part of --domain-train.")] = None,
    domain_test: Annotated[Path | None, typer.Option(help="To report on.")] = None,
    general_train: Annotated[Path | None, typer.Option(help="General documents that anchors hold on to.")] = None,
    general_valid: Annotated[Path | None, typer.Option(help="To fit budgets on; default: half of the above.")] = None,
    general_test: Annotated[Path | None, typer.Option(help="To report forgetting on.")] = None,
    methods: Annotated[
        str, typer.Option(help="Names or groups: main, selection, ratio, scaling, rank, precision, all.")
    ] = "main",
    samples: Annotated[str, typer.Option(help="Training-set sizes, such as 50,500,2000.")] = "500",
    seeds: Annotated[str, typer.Option(help="Seeds; rates are searched with the first.")] = "0",
    rates: Annotated[str, typer.Option(help="Learning rates that each method tries.")] = "1e-4,2e-4,4e-4,8e-4",
    scales: Annotated[str, typer.Option(help="Factors on the trained change to measure, too, such as 0.5.")] = "",
    epochs: Annotated[int, typer.Option(help="Passes over the samples.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Samples a step.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of a sample.")] = 128,
    evaluation_tokens: Annotated[int, typer.Option(help="Tokens of each test text.")] = 20_000,
    validation_tokens: Annotated[int, typer.Option(help="Tokens of each validation text.")] = 10_000,
    budget: Annotated[float, typer.Option(help="Degradation that methods with a budget may reach.")] = 0.02,
    dtype: Annotated[str, typer.Option(help="That models are loaded in; auto: the faster one.")] = "auto",
    save_adapters: Annotated[bool, typer.Option("--save-adapters", help="Keep the adapter of each run, too.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print how long it takes, and stop.")] = False,
) -> None:
    """Compare methods on a model and two texts: same tokens, same search over learning rates. Resumes by itself."""
    from .comparison import StudyError, StudySettings, read_study_texts, run_study

    try:
        settings = StudySettings(
            output_dir=output_dir,
            methods=tuple(methods.split(",")),
            samples=_numbers(int, samples, "--samples", "50,500"),
            seeds=_numbers(int, seeds, "--seeds", "0,1,2"),
            rates=_numbers(float, rates, "--rates", "1e-4,2e-4"),
            scales=_numbers(float, scales, "--scales", "0.3,0.5") if scales else (),
            epochs=epochs,
            batch_size=batch_size,
            length=length,
            evaluation_tokens=evaluation_tokens,
            validation_tokens=validation_tokens,
            budget=budget,
            dtype=dtype,
            save_adapters=save_adapters,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    files = {
        "domain_train": domain_train,
        "domain_valid": domain_valid,
        "domain_test": domain_test,
        "general_train": general_train,
        "general_valid": general_valid,
        "general_test": general_test,
    }
    try:
        texts = read_study_texts(files) if any(files.values()) else None
        run_study(settings, model=model, texts=texts, dry_run=dry_run)
    except (StudyError, ImportError, OSError, ValueError) as error:
        _fail(str(error), error)


class Autoload(StrEnum):
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


def _device(name: str | None) -> torch.device | str:
    """The device of that name; by default the accelerator, else the CPU."""
    import torch

    from .offloading import accelerator_or_cpu

    if name is None:
        return accelerator_or_cpu()
    try:
        torch.empty(0, device=name)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        message = f"{name!r} can't be used here: {str(error).splitlines()[0]}"
        raise typer.BadParameter(message, param_hint="--device") from error
    return name


def _indices(blocks: str | None) -> list[int] | None:
    """Block indices from "14,15"."""
    return None if blocks is None else list(_numbers(int, blocks, "--blocks", "14,15"))


def _numbers(kind: type[Number], given: str, option: str, example: str) -> tuple[Number, ...]:
    """The numbers of an option, which has commas between them."""
    try:
        return tuple(kind(number) for number in given.split(","))
    except ValueError as error:
        allowed = f"{'whole numbers' if kind is int else 'numbers'} with commas between, such as {example}"
        raise typer.BadParameter(f"{given!r}; allowed: {allowed}", param_hint=option) from error


def _fail(message: str, cause: Exception) -> NoReturn:
    """Print the message in red and end with exit code 1."""
    typer.secho(f"Error: {message}", fg=typer.colors.RED, err=True)
    raise typer.Exit(code=1) from cause
