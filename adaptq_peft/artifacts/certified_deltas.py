"""Tells whether the deltas beside a certificate are those that it is about, from some of their values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils import WEIGHTS_NAME
from safetensors import safe_open

from ..fingerprint import spread
from ..quantization.origin import are_same_samples, sampled_values

VALUES_PER_TENSOR = 8

_PREFIX = "base_model.model."
#: Not A of a correction B A: what changes it changes B.
_SAMPLED = (".adaptq_delta.", ".adaptq_low_rank_B.")
#: Fields of the config that the deltas and corrections are multiplied by.
_SCALES = ("delta_scaling", "frozen_alpha")


def certified_state(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What a certificate says of the adapter that it is about: "sample", as `sample_deltas` gives it, and "scaling".

    Args:
        config: the fields of its `AdaptQConfig`.
        tensors: its state dict, as it is saved.
    """
    return {"sample": sample_deltas(tensors), "scaling": _scaling(config)}


def sample_deltas(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[float]] | None:
    """Some values of an adapter's deltas, and of B of its corrections.

    Args:
        tensors: its state dict, as it is saved.

    Returns:
        {tensor name: at most `VALUES_PER_TENSOR` values} of the tensors that `spread` leaves, or `None` if one has no
        values, as on the meta device.
    """
    return None if any(tensor.is_meta for tensor in tensors.values()) else _sample(tensors, tensors.__getitem__)


def are_certified(config: Mapping[str, Any], weights: Path) -> bool:
    """Whether deltas and their scales are those of a certificate; yes, too, where there are none to compare.

    Args:
        config: fields of an `AdaptQConfig` with a certificate. One without a "sample", or without "scaling", is from
            before there were these.
        weights: `adapter_model.safetensors`. Without it pickled weights beside it are not opened: they are not.
    """
    certificate = config["certificate"]
    if certificate.get("scaling", _scaling(config)) != _scaling(config):
        return False
    certified = certificate.get("sample")
    if certified is None:
        return True
    if not weights.is_file():
        return not weights.with_name(WEIGHTS_NAME).is_file()
    with safe_open(weights, "pt") as file:
        found = _sample(file.keys(), file.get_tensor)
    return certified.keys() == found.keys() and all(are_same_samples(certified[name], found[name]) for name in found)


def _scaling(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: config.get(name) for name in _SCALES}


def _sample(names: Collection[str], read: Callable[[str], torch.Tensor]) -> dict[str, list[float]]:
    own = sorted(name for name in names if any(kind in name for kind in _SAMPLED))
    return {
        name.removeprefix(_PREFIX): [float(f"{x:.6g}") for x in sampled_values(read(name), VALUES_PER_TENSOR)]
        for name in spread(own)
    }
