"""Names of modules on a model with adapters."""

from __future__ import annotations

#: Parts of a name that wrapping adds: PEFT's wrappers and torch.compile's.
_WRAPPERS = ("base_layer", "original_module", "token_adapter", "_orig_mod")


def base_name(name: str) -> str:
    """The dotted name that a module or parameter has in the base model itself."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def is_inside_a_wrapper(name: str) -> bool:
    """Whether a name is that of a wrapped layer or of its deltas; the wrapper itself stands for both."""
    return name.rpartition(".")[2] == "base_layer" or is_of_an_adapter(name)


def is_of_an_adapter(name: str) -> bool:
    """Whether a name is that of something that an ADAPTQ layer holds beside the layer it wraps."""
    return any(part.startswith("adaptq_") for part in name.split("."))
