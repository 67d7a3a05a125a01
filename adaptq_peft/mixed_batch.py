"""An adapter for each sample of a batch: `model(..., adapter_names=[...])`, at inference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .layer import AdaptQLayer
from .module_names import base_name
from .selection import is_encoder_decoder

BASE = "__base__"


@contextmanager
def mixed_batch(
    model: nn.Module,
    adapter_names: list[str] | None,
    known: Mapping[str, Any],
    num_beams: int = 1,
    blocks: Sequence[str] = (),
) -> Iterator[None]:
    """Within the context, each call of the model's adapter layers applies `adapter_names`, one for each sample.

    Args:
        model: the base model with adapter layers in it.
        adapter_names: one name a sample, "__base__" for none; `None`: the active adapter, as always.
        known: the adapters of the model.
        num_beams: of beam search, which repeats each sample in the decoder.
        blocks: dotted names of the model's blocks. Default: it has none.

    Raises:
        ValueError: if the model is in training mode, a name is unknown, samples are more or fewer than names, one of
            the adapters has a delta on an embedding in a block, or a module reads the weight of an adapter layer
            instead of calling it.
        TypeError: if `adapter_names` is not a list.
    """
    if adapter_names is None:
        yield
        return
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    if not isinstance(adapter_names, (list, tuple)):
        raise TypeError(f"Got adapter names of type {type(adapter_names)}, expected a list of str.")
    unknown = sorted(set(adapter_names) - {BASE} - set(known))
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
    _check_embeddings(model, adapter_names, blocks)
    repeated = [name for name in adapter_names for _ in range(num_beams)]
    encoder = _encoder_modules(model)
    handles = [
        module.register_forward_pre_hook(
            partial(_pass_names, adapter_names=list(adapter_names) if module in encoder else repeated),
            with_kwargs=True,
        )
        for module in model.modules()
        if isinstance(module, (AdaptQLayer, AuxiliaryTrainingWrapper))
    ]
    check = partial(_check_length, lengths=(len(adapter_names), len(repeated)))
    handles.append(model.register_forward_pre_hook(check, with_kwargs=True))
    layers = [module for module in model.modules() if isinstance(module, AdaptQLayer)]
    for layer in layers:
        layer.in_mixed_batch = True
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            layer.in_mixed_batch = False


def _check_length(model: nn.Module, args: Any, kwargs: Mapping[str, Any], lengths: tuple[int, int]) -> None:
    """Raise ValueError if the samples are not as many as the names, before or after they are repeated for beams."""
    given = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1])
    size = next((len(value) for value in given if isinstance(value, Tensor)), lengths[0])
    if size not in lengths:
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{lengths[0]} and {size} respectively."
        )


def _check_embeddings(model: nn.Module, adapter_names: Sequence[str], blocks: Sequence[str]) -> None:
    inside = tuple(f"{block}." for block in blocks)
    for name, layer in model.named_modules():
        is_embedding = isinstance(layer, AdaptQLayer) and isinstance(layer.base_layer, nn.Embedding)
        if is_embedding and name.startswith(inside) and any(map(layer.has_adapter, adapter_names)):
            raise ValueError(
                f"`adapter_names` can't be used here: an adapter has a delta on {base_name(name)}, an Embedding in a "
                "block, which is of positions and one for all samples. Run the samples of each adapter as a batch of "
                "their own."
            )


def _encoder_modules(model: nn.Module) -> set[nn.Module]:
    """Modules of the encoder of an encoder-decoder model, which sees each sample once."""
    if not is_encoder_decoder(model):
        return set()
    return set(model.get_encoder().modules())  # type: ignore[operator]


def _pass_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}
