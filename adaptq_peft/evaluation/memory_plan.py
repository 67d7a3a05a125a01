"""What training would take in memory, before any weights are loaded: the tensors are counted on the meta device."""

from __future__ import annotations

import copy
import os
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from ..block_forms import linears_with_reasons
from ..config import AdaptQConfig
from ..plan import choose_blocks
from ..precision import assume_precision, choose_precision
from ..quantization import QuantizationSettings, is_linear, quantize_on_meta, resolve_quantization
from ..quantization.precision_plan import PRECISIONS, memory_bytes
from ..selection import find_blocks, strategy_needs_profile
from ..skeleton import build_skeleton
from ..targets import is_excluded
from .checkpoint_headers import CheckpointHeaders, CheckpointSummary, HeadersUnavailable
from .memory import WeightBytes, measure_weight_bytes, paper_weight_ratio
from .optimizer_states import OPTIMIZERS, check_optimizer, optimizer_state_bytes, trained_parameters


@dataclass(frozen=True)
class MethodMemory:
    """Bytes of one way to train a model. Activations are not counted.

    Attributes:
        weights: the model's tensors with what the method adds.
        trained_parameters: number of trained parameters.
        gradients: bytes of their gradients.
        optimizer_states: bytes for each of `OPTIMIZERS`.
    """

    weights: WeightBytes
    trained_parameters: int
    gradients: int
    optimizer_states: dict[str, int]

    def training(self, optimizer: str) -> int:
        """Weights, gradients and the states of one optimizer."""
        return self.weights.total + self.gradients + self.optimizer_states[optimizer]


@dataclass(frozen=True)
class MemoryPlan:
    """What `plan_memory` finds.

    Attributes:
        num_blocks: L.
        adapted: indices of the adapted blocks.
        dtype: in which the model is loaded.
        methods: by name: "ADAPTQ", "LoRA", "QLoRA", "full fine-tuning".
        unquantized: the model as it is loaded in `dtype`.
        paper_ratio: the paper's (4L + 12K) / 16L, about the weights of the blocks' linears.
        planned_ratio: the same ratio with these tensors.
        peak_in_memory: bytes at the peak of `get_peft_model` on a model loaded in `dtype`: the model, the quantized
            copies and the deltas.
        checkpoint: what its safetensors headers say; `None`: they can't be had.
        peak_presplit: bytes at the peak of loading through `adaptq_bnb_config` and `get_peft_model`: the result and
            the largest weight. `None` where transformers can't load blocks so: `quantization` "hqq2" and the like.
    """

    num_blocks: int
    adapted: list[int]
    dtype: str
    methods: dict[str, MethodMemory]
    unquantized: WeightBytes
    paper_ratio: float
    planned_ratio: float
    peak_in_memory: int
    peak_presplit: int | None
    checkpoint: CheckpointSummary | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts, for JSON."""
        return asdict(self)


def plan_memory(
    model: PreTrainedConfig | str | os.PathLike[str],
    config: AdaptQConfig | None = None,
    *,
    dtype: torch.dtype | None = None,
    lora_rank: int = 16,
    galore_rank: int = 128,
) -> MemoryPlan:
    """Bytes of weights, deltas, gradients and optimizer states, for ADAPTQ beside LoRA, QLoRA and full fine-tuning.

    Nothing but config.json and the headers of the safetensors files is read. The methods are applied to the model on
    the meta device, so the shapes and dtypes are those that they will have. What is trained is in `config.delta_dtype`
    (float32 by default) in all methods. LoRA and QLoRA train all linears but the head and those that PEFT lets no LoRA
    onto; QLoRA has all linears of the blocks quantized as `config` says.

    Args:
        model: folder or Hub repository of the 16-bit checkpoint, or its config. A config without `architectures`, such
            as one made in Python, is that of the model without its head.
        config: the adapter's config. Blocks that would be chosen by a profile that it does not have are taken to be
            the last K: in a model of equal blocks the bytes are the same. A plan for quantization "auto" that it does
            not have is taken to be one that treats all weights alike. `None` (default): `AdaptQConfig()`.
        dtype: as given to `from_pretrained`. `None` (default): that of the checkpoint's config, else of its tensors.
        lora_rank: r of LoRA and QLoRA.
        galore_rank: rank of "galore_adamw".

    Raises:
        ValueError: if no blocks are found, K or an index is out of range, or the checkpoint is quantized.
    """
    config = config or AdaptQConfig()
    headers = _headers(model)
    dtype = _dtype(model, dtype, headers)
    adaptq, blocks, adapted = _adaptq_model(build_skeleton(model, dtype), config)
    plain = build_skeleton(model, dtype)
    unquantized = measure_weight_bytes(plain, config.layers_pattern)  # type: ignore[arg-type]
    largest = max(parameter.nbytes for parameter in plain.parameters())
    checkpoint = None if headers is None else headers.summarize(plain)
    models = {
        "ADAPTQ": adaptq,
        "LoRA": _lora_model(build_skeleton(model, dtype), config, lora_rank, quantized=False),
        "QLoRA": _lora_model(build_skeleton(model, dtype), config, lora_rank, quantized=True),
        "full fine-tuning": _cast_trained(plain, config),
    }
    methods = {name: measure_method(trained, config.layers_pattern, galore_rank) for name, trained in models.items()}
    weights = methods["ADAPTQ"].weights
    settings = resolve_quantization(config.quantization)
    return MemoryPlan(
        num_blocks=blocks,
        adapted=adapted,
        dtype=str(plain.config.dtype or torch.float32).removeprefix("torch."),
        methods=methods,
        unquantized=unquantized,
        paper_ratio=paper_weight_ratio(blocks, len(adapted)),
        planned_ratio=weights.block_linears / unquantized.block_linears,
        peak_in_memory=unquantized.total + weights.quantized_linears + weights.adapters,
        peak_presplit=weights.total + largest if settings is None or settings.backend == "bitsandbytes" else None,
        checkpoint=checkpoint,
    )


def largest_num_adapted_blocks(
    model: PreTrainedConfig | str | os.PathLike[str],
    budget: int | str,
    config: AdaptQConfig | None = None,
    *,
    optimizer: str = "adamw_torch",
    dtype: torch.dtype | None = None,
    galore_rank: int = 128,
) -> int:
    """The largest K whose weights, deltas, gradients and optimizer states fit into a budget.

    Activations are not counted: leave room for them.

    Args:
        model: as for `plan_memory`.
        budget: bytes, or a text such as "12GiB" or "12GB".
        config: the adapter's config; its `num_adapted_blocks` and `selection_ratio` do not count.
        optimizer: one of `OPTIMIZERS`.
        dtype: as for `plan_memory`.
        galore_rank: as for `plan_memory`.

    Raises:
        ValueError: if one block does not fit, with the bytes that it needs, or the budget or optimizer is unknown.
    """
    limit = memory_bytes(budget)
    dtype = _dtype(model, dtype, _headers(model))
    check_optimizer(optimizer)

    def needed(count: int) -> int:
        chosen = copy.deepcopy(config or AdaptQConfig())
        chosen.layers_to_transform, chosen.num_adapted_blocks = None, count
        trained, _, _ = _adaptq_model(build_skeleton(model, dtype), chosen)
        return measure_method(trained, chosen.layers_pattern, galore_rank).training(optimizer)

    least = needed(1)
    if least > limit:
        raise ValueError(
            f"a budget of {limit:,} bytes does not fit one adapted block: with {optimizer} it takes {least:,} bytes "
            "without activations. Raise the budget, or try delta_dtype='bfloat16' or another optimizer"
        )
    pattern = config.layers_pattern if config else None
    fits, too_many = 1, len(find_blocks(build_skeleton(model, dtype), pattern)) + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if needed(middle) <= limit else (fits, middle)
    return fits


def _headers(model: PreTrainedConfig | str | os.PathLike[str]) -> CheckpointHeaders | None:
    try:
        return None if isinstance(model, PreTrainedConfig) else CheckpointHeaders(model)
    except HeadersUnavailable:
        return None


def _dtype(
    model: PreTrainedConfig | str | os.PathLike[str], dtype: torch.dtype | None, headers: CheckpointHeaders | None
) -> torch.dtype | None:
    """As `from_pretrained` takes it: the given one, else that of config.json (`None`), else that of the tensors."""
    if dtype is not None or headers is None or isinstance(model, PreTrainedConfig):
        return dtype
    return None if AutoConfig.from_pretrained(model).dtype else headers.dtype


def measure_method(
    model: nn.Module, layers_pattern: str | list[str] | None = None, galore_rank: int = 128
) -> MethodMemory:
    """Bytes that training takes, counted from a model that is ready for it, with values or on the meta device.

    Args:
        model: with its adapter; parameters that require gradients are trained.
        layers_pattern: as in `AdaptQConfig`.
        galore_rank: rank of "galore_adamw".
    """
    trained = trained_parameters(model)
    return MethodMemory(
        weights=measure_weight_bytes(model, layers_pattern),  # type: ignore[arg-type]
        trained_parameters=sum(parameter.shape.numel() for parameter in trained),
        gradients=sum(parameter.nbytes for parameter in trained),
        optimizer_states={name: optimizer_state_bytes(name, trained, galore_rank) for name in OPTIMIZERS},
    )


def _adaptq_model(model: nn.Module, config: AdaptQConfig) -> tuple[nn.Module, int, list[int]]:
    """The model with the adapter, L, and the indices of the adapted blocks."""
    chosen = copy.deepcopy(config)
    blocks = find_blocks(model, chosen.layers_pattern)
    unknown = chosen.profile is None and chosen.layers_to_transform is None
    if unknown and strategy_needs_profile(chosen.selection_strategy):
        chosen.selection_strategy = "last"
    adapted, _ = choose_blocks(model, blocks, chosen)
    settings = resolve_quantization(chosen.quantization)
    frozen = [block for block in blocks if block.index not in adapted]
    if chosen.quantization == "auto":
        is_known = chosen.precision is not None
        plan = (
            choose_precision(model, blocks, adapted, chosen) if is_known else assume_precision(model, frozen, chosen)
        )
        chosen.precision = plan.precision
    if settings is not None:
        _quantize(model, [block.index for block in frozen], settings, chosen, chosen.precision)
    # "dequantized" would round the adapted blocks' weights, which takes values and changes no size.
    chosen.layers_to_transform, chosen.original_weights = list(adapted), "checkpoint"
    chosen.quantized_base = None  # its codes have the bytes of any others
    return get_peft_model(model, chosen), len(blocks), list(adapted)  # type: ignore[arg-type]


def _lora_model(model: nn.Module, config: AdaptQConfig, rank: int, quantized: bool) -> nn.Module:
    if quantized:
        settings = resolve_quantization(config.quantization) or resolve_quantization("nf4")
        indices = [block.index for block in find_blocks(model, config.layers_pattern)]
        _quantize(model, indices, settings, config)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out, and what else PEFT corrects by itself
        lora = LoraConfig(r=rank, target_modules="all-linear", exclude_modules=_refused_by_lora(model))
        wrapped = get_peft_model(model, lora)  # type: ignore[arg-type]
    return _cast_trained(wrapped, config)


def _refused_by_lora(model: nn.Module) -> list[str]:
    """Last parts of the names of linears that PEFT lets no LoRA onto: those that Mamba reads itself."""
    refused = []
    for name in {name.rpartition(".")[2] for name, module in model.named_modules() if is_linear(module)}:
        try:
            _check_lora_target_modules_mamba(LoraConfig(), model, name)
        except ValueError:
            refused.append(name)
    return refused


def _cast_trained(model: nn.Module, config: AdaptQConfig) -> nn.Module:
    """What is trained in the dtype of deltas: that of `config`, or float32, as PEFT's rule is."""
    dtype = getattr(torch, config.delta_dtype or "float32")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model


def _quantize(
    model: nn.Module,
    indices: list[int],
    settings: QuantizationSettings,
    config: AdaptQConfig,
    precision: dict[str, str] | None = None,
) -> None:
    """Quantize the linears of blocks as `get_peft_model` does, without values; by a plan, if there is one."""
    blocks = [block for block in find_blocks(model, config.layers_pattern) if block.index in indices]
    for name, linear, reason in linears_with_reasons(model, blocks, settings, lambda name: is_excluded(name, config)):
        planned = settings if precision is None else PRECISIONS[precision.get(name, "none")]
        if planned is not None and not reason:
            model.set_submodule(name, quantize_on_meta(linear, planned))
