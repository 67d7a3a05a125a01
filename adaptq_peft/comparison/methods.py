"""The methods that are compared: one small entry each, in the order of the tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from peft import LoraConfig, OSFConfig, ShiraConfig, get_peft_model
from peft.helpers import find_kappa_target_modules
from torch import nn
from transformers import PreTrainedModel

from ..block_forms import quantize_blocks
from ..config import AdaptQConfig
from ..preservation.budget import MIN_GENERAL_DOCUMENTS
from ..quantization import QUANTIZATION_NAMES, resolve_quantization
from ..selection import find_blocks, selection_strategy_names, strategy_needs_general_profile
from .texts import StudyTexts

Sample = dict[str, list[int]]


@dataclass(frozen=True)
class Inputs:
    """What a method may look at when it prepares a model.

    Attributes:
        samples: the training samples, each with "input_ids".
        general: general samples for training, in the same form; empty for methods that have no general text.
        seed: of the run.
    """

    samples: list[Sample]
    general: list[Sample]
    seed: int


Build = Callable[..., nn.Module]
"""Called with (the 16-bit base, `Inputs`, and the method's options); returns the model that trains."""


@dataclass(frozen=True)
class Method:
    """A way to adapt a model: a row of the tables.

    Methods that differ in `finish` alone share one training.

    Attributes:
        name: how settings and files call it.
        title: how tables call it.
        build: makes the model that trains from the base.
        options: keyword arguments of `build`, as JSON types.
        group: "main", "selection", "ratio", "scaling", "rank" or "precision": the table that it is in.
        anchor: "" (none), "general": KL to the base on general text, "one-sided": on that where the model predicts it
            worse than its base, or "written" and "written-one-sided": the same on text that the base writes, as where
            no general text is at hand: then calibration has none either.
        finish: what is done after training: "" (nothing), "budget" or "quantize".
        fixed_rate: learning rate of a fixed recipe; `None`: it is searched.
        rate_factor: what the rates that are searched are multiplied by. Full-rank weights take a quarter of what
            low-rank matrices take; ADAPTQ has that factor in its `delta_scaling`.
        accumulation: batches whose gradients are added up for a step.
        autocast: whether float32 weights are trained that the model computes with in the base's dtype.
        is_trained: whether it trains at all.
    """

    name: str
    title: str
    build: Build
    options: dict[str, Any] = field(default_factory=dict)
    group: str = "main"
    anchor: str = ""
    finish: str = ""
    fixed_rate: float | None = None
    rate_factor: float = 1.0
    accumulation: int = 1
    autocast: bool = False
    is_trained: bool = True

    def rates(self, searched: Sequence[float]) -> tuple[float, ...]:
        """The learning rates that this method tries."""
        if not self.is_trained:
            return (0.0,)
        return (self.fixed_rate,) if self.fixed_rate is not None else tuple(r * self.rate_factor for r in searched)

    @property
    def training(self) -> str:
        """Equal for methods that train in the same way, and all that training depends on."""
        described = [self.build.__name__, self.options, self.anchor, self.accumulation, self.autocast, self.is_trained]
        return json.dumps(described, sort_keys=True)

    @property
    def untrained_adapter(self) -> str | None:
        """Equal for ADAPTQ methods whose models are the same before training; `None` for other methods."""
        if self.build is not _adaptq:
            return None
        return json.dumps([self.options, self.has_general_text], sort_keys=True)

    @property
    def is_scaled(self) -> bool:
        """Whether it is measured with its trained change multiplied by the settings' `scales`, too.

        Not where a budget has scaled the change or quantizing has rounded it, nor for OSF.
        """
        return self.is_trained and not self.finish and self.build is not _osf

    @property
    def has_general_text(self) -> bool:
        """Whether it is given general text to prepare the model and to train."""
        return not self.anchor.startswith("written")


def method_names() -> list[str]:
    """Names of all methods, in the order of the tables."""
    return list(_methods())


def resolve_methods(names: Sequence[str]) -> list[Method]:
    """The methods with these names or in these groups; "all" is every group.

    They come in the order of the tables, each once.

    Raises:
        ValueError: if a name is unknown.
    """
    methods = _methods()
    groups = sorted({method.group for method in methods.values()})
    unknown = [name for name in names if name not in methods and name not in (*groups, "all")]
    if unknown:
        raise ValueError(f"unknown methods {unknown}; allowed are the groups {[*groups, 'all']} and {list(methods)}")
    return [m for m in methods.values() if m.name in names or m.group in names or "all" in names]


def check_documents_for_budgets(methods: Sequence[Method], texts: StudyTexts) -> None:
    """Raise ValueError if a budget can't be fitted on the general text for validation: before anything is trained."""
    budgeted = [method.name for method in methods if method.finish == "budget"]
    if budgeted and len(texts.general_valid) < MIN_GENERAL_DOCUMENTS:
        raise ValueError(
            f"there are {len(texts.general_valid)} general documents for validation, and {budgeted} need at least "
            f"{MIN_GENERAL_DOCUMENTS} to fit and certify a budget; give more general text, or leave these methods out"
        )


def _methods() -> dict[str, Method]:
    """All methods by name. Made anew each time: strategies may be registered while a program runs."""
    return {method.name: method for entries in (_baselines, _adaptq_main, _ablations) for method in entries()}


def _baselines() -> Iterator[Method]:
    every: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    query_value: dict[str, Any] = {"r": 8, "lora_alpha": 16}
    yield Method("vanilla", "not trained", _base, is_trained=False)
    yield Method("full", "full fine-tuning", _full, rate_factor=0.25, autocast=True)
    yield Method("lora-paper", "LoRA, the paper's recipe", _lora, query_value, fixed_rate=2e-4, accumulation=4)
    yield Method("lora-qv", "LoRA on q, v", _lora, query_value)
    yield Method("lora", "LoRA on all linears", _lora, every)
    yield Method("lora-budget", "LoRA + budget", _lora, every, finish="budget")
    yield Method("lora-quantize", "LoRA, then half in NF4", _lora, every, finish="quantize")
    yield from _also_with_budget(Method("lora-anchor", "LoRA + anchor", _lora, every, anchor="general"))
    title = "LoRA + one-sided anchor"
    yield from _also_with_budget(Method("lora-one-sided", title, _lora, every, anchor="one-sided"))
    wide = {**every, "r": 64, "lora_alpha": 128}
    yield Method("lora-64", "LoRA r=64 on all linears", _lora, wide)
    yield Method("lora-64-budget", "LoRA r=64 + budget", _lora, wide, finish="budget")
    yield from _also_with_budget(Method("lora-64-anchor", "LoRA r=64 + anchor", _lora, wide, anchor="general"))
    title = "LoRA r=64 + one-sided anchor"
    yield from _also_with_budget(Method("lora-64-one-sided", title, _lora, wide, anchor="one-sided"))
    yield Method("qlora", "QLoRA: all in NF4, LoRA", _quantized_lora, {"share": 1.0, **every})
    yield Method("quantize-lora", "half in NF4, then LoRA", _quantized_lora, {"share": 0.5, **every})
    yield Method("shira", "SHiRA, as many weights as LoRA", _shira, {"r": 8})
    yield Method("shira-budget", "SHiRA + budget", _shira, {"r": 8}, finish="budget")
    yield Method("osf", "OSF, all linears", _osf, rate_factor=0.5)
    yield Method("kappatune", "KappaTune: LoRA on a fifth", _kappatune, {"r": 40, "lora_alpha": 80, "share": 0.2})


def _adaptq_main() -> Iterator[Method]:
    half, mixed = _adaptq_options(), _adaptq_options(frozen_rank=8)
    paper = _adaptq_options(delta_scaling=1.0)
    yield Method("adaptq-paper", "ADAPT-Q-50, the paper's recipe", _adaptq, paper, fixed_rate=5e-5, accumulation=4)
    yield Method("adaptq-10", "ADAPT-Q-10", _adaptq, _adaptq_options(selection_ratio=0.1))
    yield Method("adaptq-20", "ADAPT-Q-20", _adaptq, _adaptq_options(selection_ratio=0.2))
    yield Method("adaptq-50", "ADAPT-Q-50", _adaptq, half)
    yield Method("adaptq-50-anchor", "ADAPT-Q-50 + anchor", _adaptq, half, anchor="general")
    yield Method("adaptq-50-mixed", "ADAPT-Q-50 mixed rank", _adaptq, mixed)
    name, title = "adaptq-50-mixed-anchor", "ADAPT-Q-50 mixed rank + anchor"
    yield from _also_with_budget(Method(name, title, _adaptq, mixed, anchor="general"))
    yield Method("adaptq-default", "ADAPT-Q, the defaults", _adaptq, _default_options())
    recipe = _default_options(selection_ratio=0.2, frozen_rank=64, quantization="int8")
    name, title = "adaptq-recipe", "ADAPT-Q, the recipe"
    yield from _also_with_budget(Method(name, title, _adaptq, recipe, anchor="one-sided"))
    yield from _also_with_budget(Method(f"{name}-unanchored", f"{title} without anchor", _adaptq, recipe))
    name, title = f"{name}-written", f"{title} without general text"
    yield from _also_with_budget(Method(name, title, _adaptq, recipe, anchor="written-one-sided"))
    recipe = _recipe_4bit_options()
    name, title = "adaptq-recipe-4bit", "ADAPT-Q, the 4-bit recipe"
    yield from _also_one_sided(Method(name, title, _adaptq, recipe, anchor="general"))
    yield from _also_with_budget(Method(f"{name}-unanchored", f"{title} without anchor", _adaptq, recipe))
    name, title = f"{name}-written", f"{title} without general text"
    yield from _also_one_sided(Method(name, title, _adaptq, recipe, anchor="written"))


def _ablations() -> Iterator[Method]:
    for rule in selection_strategy_names():
        options = _adaptq_options(selection_strategy=rule)
        yield Method(f"select-{rule}", f"ADAPT-Q-50, blocks by {rule}", _adaptq, options, group="selection")
    for percent in (10, 20, 30, 50, 70, 100):
        options = _adaptq_options(selection_ratio=percent / 100)
        yield Method(f"ratio-{percent}", f"ADAPT-Q, {percent}% of the blocks", _adaptq, options, group="ratio")
    for scaling in (0.0625, 0.125, 0.25, 0.5, 1.0):
        options = _recipe_4bit_options(delta_scaling=scaling)
        title = f"ADAPT-Q, the 4-bit recipe without anchor, delta_scaling {scaling:g}"
        yield Method(f"scaling-{scaling:g}", title, _adaptq, options, group="scaling")
    fifth = "ADAPT-Q, the 4-bit recipe on a fifth of the blocks, rank 64"
    for name, title, ratio in (
        ("recipe-50-rank-64", "ADAPT-Q, the 4-bit recipe, rank 64", 0.5),
        ("recipe-20-rank-64", fifth, 0.2),
        ("recipe-3-rank-64", "ADAPT-Q, the 4-bit recipe on a thirtieth of the blocks, rank 64", 0.03),
    ):
        options = _recipe_4bit_options(selection_ratio=ratio, frozen_rank=64)
        yield from _also_with_budget(Method(name, title, _adaptq, options, group="rank", anchor="general"))
    for scaling in (0.25, 0.5):
        options = _recipe_4bit_options(selection_ratio=0.2, frozen_rank=64, delta_scaling=scaling)
        name, title = f"recipe-20-rank-64-scaling-{scaling:g}", f"{fifth}, delta_scaling {scaling:g}"
        yield from _also_one_sided(Method(name, title, _adaptq, options, group="rank", anchor="general"))
    for name in QUANTIZATION_NAMES:
        options = _adaptq_options(quantization=name)
        yield Method(f"frozen-{name}", f"ADAPT-Q-50, frozen in {name}", _adaptq, options, group="precision")
    options = _adaptq_options(quantization_calibration="auto")
    yield Method("frozen-nf4-calibrated", "ADAPT-Q-50, calibrated NF4", _adaptq, options, group="precision")
    options = _default_options(quantization="int8")
    yield Method("default-int8", "ADAPT-Q, the defaults over int8", _adaptq, options, group="precision")
    options = _default_options(quantization_calibration="auto")
    yield Method("default-calibrated", "ADAPT-Q, the defaults, calibrated", _adaptq, options, group="precision")
    title = "ADAPT-Q, the 4-bit recipe without anchor, frozen in 16 bits"
    options = _recipe_4bit_options(quantization="none", quantization_calibration=None)
    yield from _also_with_budget(Method("frozen-none-recipe", title, _adaptq, options, group="precision"))


def _also_with_budget(method: Method) -> Iterator[Method]:
    """The method, and the same training held to a budget."""
    yield method
    yield replace(method, name=f"{method.name}-budget", title=f"{method.title} + budget", finish="budget")


def _also_one_sided(method: Method) -> Iterator[Method]:
    """The method with its anchor and with that one-sided, each also held to a budget."""
    yield from _also_with_budget(method)
    anchor = {"general": "one-sided", "written": "written-one-sided"}[method.anchor]
    name, title = f"{method.name}-one-sided", f"{method.title}, one-sided anchor"
    yield from _also_with_budget(replace(method, name=name, title=title, anchor=anchor))


def _adaptq_options(**changes: Any) -> dict[str, Any]:
    """Fields of `AdaptQConfig`: the plain method on half the blocks, with changes.

    All that the tables vary are written out: a run stays what it was when the library's defaults change, and methods
    that are the same one share their runs.
    """
    plain = {
        "selection_ratio": 0.5,
        "selection_strategy": "activation",
        "quantization": "nf4",
        "quantization_calibration": None,
        "delta_scaling": 0.25,
        "frozen_rank": 0,
    }
    return {**plain, **changes}


def _default_options(**changes: Any) -> dict[str, Any]:
    """Half of the blocks by "update", the others in plain NF4 with low-rank corrections, with changes."""
    return _adaptq_options(**{"selection_strategy": "update", "frozen_rank": 8, **changes})


def _recipe_4bit_options(**changes: Any) -> dict[str, Any]:
    """As `_default_options`, with calibrated codes and deltas that move half as far a step."""
    return _default_options(**{"quantization_calibration": "auto", "delta_scaling": 0.125, **changes})


def _base(base: PreTrainedModel, inputs: Inputs) -> nn.Module:
    return base


def _full(base: PreTrainedModel, inputs: Inputs) -> nn.Module:
    """All parameters in float32, as PEFT keeps what it trains: small updates are lost in 16 bits."""
    return base.float().requires_grad_(True)


def _lora(base: PreTrainedModel, inputs: Inputs, **options: Any) -> nn.Module:
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options))


def _quantized_lora(base: PreTrainedModel, inputs: Inputs, share: float, **options: Any) -> nn.Module:
    quantize_lower_blocks(base, share)
    return _lora(base, inputs, **options)


def _shira(base: PreTrainedModel, inputs: Inputs, **options: Any) -> nn.Module:
    config = ShiraConfig(task_type="CAUSAL_LM", target_modules="all-linear", random_seed=inputs.seed, **options)
    return get_peft_model(base, config)


def _osf(base: PreTrainedModel, inputs: Inputs) -> nn.Module:
    """Half of each weight's singular directions are kept, PEFT's default."""
    return get_peft_model(base, OSFConfig(task_type="CAUSAL_LM", target_modules="all-linear"))


def _kappatune(base: PreTrainedModel, inputs: Inputs, share: float, **options: Any) -> nn.Module:
    """LoRA on the linears of the blocks with the lowest condition numbers (arXiv 2506.16289)."""
    inside = [name for name, module in _block_linears(base)]
    ranked = find_kappa_target_modules(base, top_p=1.0, show_progress=False)["target_modules"] or []
    chosen = [name for name in ranked if name in set(inside)][: max(int(share * len(inside)), 1)]
    return _lora(base, inputs, target_modules=chosen, **options)


def _adaptq(base: PreTrainedModel, inputs: Inputs, **options: Any) -> nn.Module:
    compares = strategy_needs_general_profile(options["selection_strategy"])
    config = AdaptQConfig(
        task_type="CAUSAL_LM",
        selection_seed=inputs.seed,
        calibration_data=inputs.samples,
        general_calibration_data=(inputs.general or None) if compares or options["quantization_calibration"] else None,
        **options,
    )
    return get_peft_model(base, config)


def quantize_lower_blocks(model: PreTrainedModel, share: float) -> None:
    """Put the linears of the lower blocks into NF4 with nested absmax, plainly rounded, in place.

    Args:
        model: a model without adapters.
        share: of the blocks, rounded down as ADAPT-Q rounds the others up.
    """
    blocks = find_blocks(model)
    adapted = max(int((1 - share) * len(blocks)), 0)
    quantize_blocks(model, blocks[: len(blocks) - adapted], resolve_quantization("nf4"))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # so PEFT takes its layers for 4-bit linears


def _block_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for block in find_blocks(model):
        for path, module in block.module.named_modules():
            if isinstance(module, nn.Linear):
                yield f"{block.name}.{path}", module
