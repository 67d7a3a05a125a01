"""A model without its weights: on the meta device, made from its config alone."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig


def build_skeleton(
    model: PreTrainedConfig | str | os.PathLike[str], dtype: torch.dtype | None = None
) -> transformers.PreTrainedModel:
    """The model on the meta device, of the class that its config names, with the dtypes of `from_pretrained`.

    Args:
        model: folder or Hub repository of a checkpoint, of which only config.json is read, or a config. One without
            `architectures`, such as a config made in Python, is that of the model without a head.
        dtype: as given to `from_pretrained`. `None` (default): that of the config.

    Raises:
        ValueError: if the checkpoint is quantized: its parameters have other shapes.
    """
    given: Any = model if isinstance(model, PreTrainedConfig) else AutoConfig.from_pretrained(model)
    if getattr(given, "quantization_config", None) is not None:
        raise ValueError(
            f"the checkpoint {given.name_or_path!r} is quantized already, and from_pretrained keeps it so; name the "
            "16-bit checkpoint that it was made from"
        )
    config = copy.deepcopy(given)  # building a model notes the dtype in it
    model_class = getattr(transformers, (config.architectures or [""])[0], None)
    options = {} if dtype is None else {"dtype": dtype}
    with torch.device("meta"):
        built = (
            model_class._from_config(config, **options) if model_class else AutoModel.from_config(config, **options)
        )
    if not isinstance(model, PreTrainedConfig):
        built.name_or_path = os.fspath(model)
    _keep_in_float32(built)
    return built


def _keep_in_float32(model: Any) -> None:
    """`from_pretrained` leaves layers in float32 that lose too much in 16 bits, such as `wo` of T5 in float16."""
    if model.dtype is None:
        return
    kept = set(model._get_dtype_plan(model.dtype))
    for name, module in model.named_modules():
        if kept.intersection(name.split(".")):
            _cast_parameters(module)


def _cast_parameters(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.float()
