"""Tells whether a model is the base that an adapter was made for, from a few hundred of its weights."""

from __future__ import annotations

import struct
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from .module_names import base_name
from .offloading import parameter_value
from .quantization import is_linear, is_quantized, settings_of
from .quantization.origin import sampled_values
from .selection import Block

MAX_TENSORS = 64
VALUES_PER_TENSOR = 4
#: Two roundings to bfloat16, each by at most 2^-9 relative, where the base is loaded in another dtype than before.
DTYPE_TOLERANCE = 2.0**-7

_OF_ADAPTERS = ("adaptq_", "trainable_tokens_", "modules_to_save")


def fingerprint_base(model: nn.Module, blocks: list[Block], adapted: Collection[int]) -> dict[str, Any] | None:
    """A JSON-able description of a base model: names, shapes and a sample of its values.

    Linears of frozen blocks are left out, so it is the same before and after they are quantized, and so is all outside
    the blocks. Adapters on the model are looked through.

    Args:
        model: the base model, or one with adapters on it.
        blocks: its blocks.
        adapted: indices of the blocks that are adapted.

    Returns:
        `name_or_path`, `model_type`, `num_blocks`, `dtype` and `samples`: {tensor name: "shape: values"}, each value
        as the hexadecimal digits of a float32. Of a model that arrived in GPTQ, `codes` too: such samples of frozen
        linears. `None` for a model on the meta device, which has no values.
    """
    skipped = {
        base_name(f"{block.name}.{name}")
        for block in blocks
        if block.index not in adapted
        for name, module in block.module.named_modules()
        if is_linear(module)
    }
    # Only what is inside the blocks: a head, a pooler or rows for new tokens may be random in each process.
    inside = tuple(f"{base_name(block.name)}." for block in blocks) or ("",)
    tensors = {
        name: full_name
        for name, full_name in _base_parameters(model)
        if name.startswith(inside) and name.rpartition(".")[0] not in skipped
    }
    names = list(tensors)
    samples = {name: _sample(parameter_value(model, tensors[name])) for name in spread(names)}
    if None in samples.values():
        return None
    config = getattr(model, "config", None)
    codes = _sample_codes(model, blocks)
    return {
        "name_or_path": getattr(model, "name_or_path", None) or None,
        "model_type": getattr(config, "model_type", None) or type(model).__name__,
        "num_blocks": len(blocks),
        "dtype": str(model.get_parameter(tensors[names[0]]).dtype).removeprefix("torch.") if names else None,
        "samples": samples,
        **({"codes": codes} if codes else {}),
    }


def _sample_codes(model: nn.Module, blocks: list[Block]) -> dict[str, str | None]:
    """Samples of the codes of linears in GPTQ, which come with the base; other codes are made from its weights."""
    inside = tuple(f"{block.name}." for block in blocks)
    codes: dict[str, torch.Tensor] = {
        base_name(f"{name}.qweight"): module.qweight  # type: ignore[misc]
        for name, module in model.named_modules()
        if name.startswith(inside) and is_quantized(module) and settings_of(module).comes_with_base
    }
    return {name: _sample(codes[name]) for name in spread(list(codes))}


def spread(names: list[str]) -> list[str]:
    """At most `MAX_TENSORS` of the names, spread evenly."""
    return names if len(names) <= MAX_TENSORS else [names[i * len(names) // MAX_TENSORS] for i in range(MAX_TENSORS)]


def sample_weights(model: nn.Module, linears: Collection[str]) -> dict[str, str]:
    """Samples, as in a fingerprint, of the weights of linears; those that are quantized on the model are left out.

    Args:
        model: the base model, or one with adapters on it.
        linears: their dotted names in the base model.
    """
    samples: dict[str, str] = {}
    for name, full_name in _base_parameters(model):
        path, _, leaf = full_name.rpartition(".")
        if leaf != "weight" or name.rpartition(".")[0] not in linears or is_quantized(model.get_submodule(path)):
            continue
        if sample := _sample(parameter_value(model, full_name)):
            samples[name] = sample
    return samples


def check_base(
    saved: dict[str, Any],
    found: dict[str, Any],
    what: str = "adapter",
    advice: str = "Load the base that it was trained on. For a new adapter on this model make a new AdaptQConfig.",
) -> None:
    """Compare two fingerprints.

    Values must be equal; if the base is loaded in another dtype than before, equal up to the rounding of bfloat16.

    Args:
        saved: what was saved.
        found: what the model at hand has.
        what: what was saved with the fingerprint, for the message.
        advice: the end of the message.

    Raises:
        ValueError: if they are of different bases; the message names both and says what differs.
    """
    difference = _first_difference(saved, found)
    if difference:
        raise ValueError(
            f"This {what} was made for the base model {_describe(saved)}, and the model here is {_describe(found)}: "
            f"{difference}. {advice}"
        )


def _first_difference(saved: dict[str, Any], found: dict[str, Any]) -> str | None:
    for key in ("model_type", "num_blocks"):
        if saved[key] != found[key]:
            return f"{key} is {found[key]!r} instead of {saved[key]!r}"
    if saved["samples"].keys() != found["samples"].keys():
        return (
            f"parameters have other names, for instance {sorted(saved['samples'].keys() ^ found['samples'].keys())[0]}"
        )
    exact = saved["dtype"] == found["dtype"]
    differing = [
        name for name, sample in saved["samples"].items() if not _equal(sample, found["samples"][name], exact)
    ]
    if differing:
        return f"{len(differing)} of {len(saved['samples'])} sampled tensors differ, the first is {differing[0]}"
    codes = found.get("codes", {})
    differing = [name for name, sample in saved.get("codes", {}).items() if codes.get(name, sample) != sample]
    if differing:
        return f"{len(differing)} sampled tensors of codes differ, the first is {differing[0]}"
    return None


def _equal(saved: str, found: str, exact: bool) -> bool:
    if exact or saved == found:
        return saved == found
    (saved_shape, a), (found_shape, b) = _parse(saved), _parse(found)
    return saved_shape == found_shape and bool(torch.isclose(b, a, rtol=DTYPE_TOLERANCE, atol=1e-6).all())


def _describe(fingerprint: dict[str, Any]) -> str:
    name = fingerprint["name_or_path"]
    return f"{name!r} ({fingerprint['model_type']})" if name else f"without a name ({fingerprint['model_type']})"


def _base_parameters(model: nn.Module) -> list[tuple[str, str]]:
    """Names of the parameters of the base, without those of adapters: the original one, and the one in the model."""
    own: list[tuple[str, str]] = []
    for name, _ in model.named_parameters():
        parts = name.split(".")
        if any(part.startswith(_OF_ADAPTERS) for part in parts):
            continue
        own.append((base_name(name), name))
    return own


def _sample(tensor: torch.Tensor) -> str | None:
    if tensor.is_meta:
        return None
    values = sampled_values(tensor, VALUES_PER_TENSOR)
    return f"{'x'.join(map(str, tensor.shape))}: {struct.pack(f'>{len(values)}f', *values).hex(' ', 4)}"


def _parse(sample: str) -> tuple[str, torch.Tensor]:
    shape, _, digits = sample.partition(": ")
    data = bytes.fromhex(digits)
    return shape, torch.tensor(struct.unpack(f">{len(data) // 4}f", data))
