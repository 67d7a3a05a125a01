"""`adaptq_bnb_config`: a model is loaded with its frozen blocks in 4 bits, never whole in 16 bits."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from .block_forms import linears_with_reasons
from .config import AdaptQConfig
from .plan import choose_blocks
from .quantization import QuantizationSettings, resolve_quantization
from .quantization.arrival import loaded_dtype
from .selection import Block, find_blocks, strategy_needs_profile
from .skeleton import build_skeleton
from .targets import is_excluded

_LOAD_PLAIN = "load the model without a quantization_config"


def adaptq_bnb_config(
    adapter: AdaptQConfig | Sequence[int] | int | str | os.PathLike[str],
    model: PreTrainedConfig | nn.Module | str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
) -> BitsAndBytesConfig:
    """A `quantization_config` for `from_pretrained` that quantizes the linears of the frozen blocks and nothing else.

    Each weight is quantized as it is read, so the 16-bit model is never whole in memory. `get_peft_model` with the
    same blocks then finds its work done, and gives the model that it would have made from the whole 16-bit one.

        blocks = [14, 15]
        quantization_config = adaptq_bnb_config(blocks, "org/model", dtype=torch.bfloat16)
        model = AutoModelForCausalLM.from_pretrained(
            "org/model", quantization_config=quantization_config, dtype=torch.bfloat16
        )
        model = get_peft_model(model, AdaptQConfig(layers_to_transform=blocks))

    The blocks are found from the model's config alone. Its class is the one that config.json names; another head on
    the same blocks makes no difference.

    Args:
        adapter: the blocks that are adapted (0-based, an int or a list), quantized as `AdaptQConfig` does by default
            ("nf4"); or an `AdaptQConfig` with `layers_to_transform`, or with a `profile` by which they are chosen,
            whose `quantization`, `layers_pattern`, `exclude_modules` and `modules_to_save` count, too; or folder or
            Hub repository of a saved adapter.
        model: folder or Hub repository of the 16-bit checkpoint, its config, or the model itself, which may be on the
            meta device (for code of your own). `None` (default): the base that a saved adapter names.
        dtype: the dtype given to `from_pretrained`, in which the quantized layers compute. `None` (default): that of
            the config, as `from_pretrained` without a dtype takes; float32 if the config has none.

    Raises:
        ValueError: if no blocks are given or found, an index is out of range, the checkpoint is quantized already,
            nothing would be quantized, or `quantization` is "auto" and the plan is unknown or has int8 linears.
    """
    adapter_config = _adapter_config(adapter)
    settings = resolve_quantization(adapter_config.quantization)
    if settings is None:
        raise ValueError(f'quantization is "none", so no block is quantized; {_LOAD_PLAIN}')
    if settings.backend != "bitsandbytes":
        raise ValueError(f"only bitsandbytes quantizes while loading, not {settings.describe()}; {_LOAD_PLAIN}")
    skeleton = _skeleton(adapter_config.base_model_name_or_path if model is None else model)
    frozen = _frozen_blocks(skeleton, adapter_config)
    plan = _plan_of(frozen, adapter_config)
    prefix = getattr(skeleton, "base_model_prefix", "")
    skipped = [_all_but(frozen, prefix)]
    left = _left_linears(skeleton, frozen, settings, adapter_config)
    left += [name for name, precision in plan.items() if precision == "none"]
    skipped += [name.removeprefix(f"{prefix}.") for name in left]
    compute_dtype = settings.compute_dtype or dtype or loaded_dtype(skeleton) or torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=settings.bits == 4,
        load_in_8bit=settings.bits == 8,
        llm_int8_threshold=settings.outlier_threshold,
        llm_int8_skip_modules=skipped,
        bnb_4bit_quant_type=settings.quant_type,
        bnb_4bit_use_double_quant=settings.nested_absmax,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=settings.storage_dtype,
    )


def _adapter_config(adapter: AdaptQConfig | Sequence[int] | int | str | os.PathLike[str]) -> AdaptQConfig:
    if isinstance(adapter, (str, os.PathLike)):
        adapter = AdaptQConfig.from_pretrained(os.fspath(adapter))
    elif not isinstance(adapter, AdaptQConfig):
        adapter = AdaptQConfig(layers_to_transform=adapter if isinstance(adapter, int) else list(adapter))
    needs_profile = strategy_needs_profile(adapter.selection_strategy) and adapter.profile is None
    if adapter.layers_to_transform is None and needs_profile:
        raise ValueError(
            "layers_to_transform of this AdaptQConfig is None, and the blocks have to be known before the model is "
            "loaded; set them, or give a profile: profile_activations(name, data) makes one from the checkpoint on "
            "disk"
        )
    return adapter


def _plan_of(frozen: list[Block], config: AdaptQConfig) -> dict[str, str]:
    """The precision of each linear of the frozen blocks, if `quantization` is "auto"; empty otherwise."""
    if config.quantization != "auto":
        return {}
    if config.precision is None:
        raise ValueError(
            'quantization is "auto" and precision is None: the plan is measured on the 16-bit model. Make the adapter '
            "on that, or set precision to that of an adapter that was made."
        )
    inside = tuple(f"{block.name}." for block in frozen)
    plan = {name: precision for name, precision in config.precision.items() if name.startswith(inside)}
    in_8_bits = [name for name, precision in plan.items() if precision == "int8"]
    if in_8_bits:
        raise ValueError(
            f"the plan stores {len(in_8_bits)} linears in int8, the first is {in_8_bits[0]}, and others in 4 bits; a "
            f"BitsAndBytesConfig has one precision. So {_LOAD_PLAIN}, and get_peft_model quantizes it in memory."
        )
    return plan


def _skeleton(model: PreTrainedConfig | nn.Module | str | os.PathLike[str] | None) -> nn.Module:
    if model is None:
        raise ValueError("model is None, and the adapter does not name its base; name the checkpoint or its config")
    return model if isinstance(model, nn.Module) else build_skeleton(model)


def _frozen_blocks(skeleton: nn.Module, config: AdaptQConfig) -> list[Block]:
    blocks = find_blocks(skeleton, config.layers_pattern)
    adapted, _ = choose_blocks(skeleton, blocks, config)
    frozen = [block for block in blocks if block.index not in adapted]
    if not frozen:
        raise ValueError(f"all {len(blocks)} blocks are adapted, so none is quantized; {_LOAD_PLAIN}")
    return frozen


def _all_but(frozen: list[Block], prefix: str) -> str:
    """A regular expression for the names of all modules but those inside the given blocks.

    transformers takes the entries of a skip list for regular expressions that match from the start of a name
    (`should_convert_module`). So heads of all names are left alone, and block 1 is not taken for block 10. The prefix
    is optional: it is there in a model with a head, and not in a bare one.
    """
    indices: dict[str, list[str]] = {}
    for block in frozen:
        path, _, index = block.name.removeprefix(f"{prefix}.").rpartition(".")
        indices.setdefault(re.escape(path), []).append(index)
    lists = "|".join(rf"{path}\.(?:{'|'.join(chosen)})" for path, chosen in indices.items())
    start = rf"(?:{re.escape(prefix)}\.)?" if prefix else ""
    return rf"(?!{start}(?:{lists})\.).*"


def _left_linears(
    skeleton: nn.Module, frozen: list[Block], settings: QuantizationSettings, config: AdaptQConfig
) -> list[str]:
    """Linears of the frozen blocks that the swap in memory leaves alone, too. Warns of those that it does not."""
    left: list[str] = []
    later: dict[str, str] = {}
    for name, linear, reason in linears_with_reasons(
        skeleton, frozen, settings, lambda name: is_excluded(name, config)
    ):
        if reason:
            left.append(name)
        elif type(linear) is not nn.Linear and not isinstance(linear, Conv1D):
            later[name] = type(linear).__name__
    if later:
        name, class_name = next(iter(later.items()))
        warnings.warn(
            f"{len(later)} linears of frozen blocks, the first is {name}, are of class {class_name}, which "
            "transformers does not quantize: they arrive in 16 bits, and get_peft_model quantizes them",
            stacklevel=3,
        )
    return left
