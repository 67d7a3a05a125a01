"""Finds the transformer blocks of a model, and the hidden states in what they take and give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Block:
    """One transformer block: entry `index` of the model's list of blocks, at dotted path `name`.

    `in_decoder`: its tokens are those that the decoder of an encoder-decoder model reads, which have their own mask.
    """

    index: int
    name: str
    module: nn.Module
    in_decoder: bool = False


def find_blocks(model: nn.Module, layers_pattern: str | list[str] | None = None) -> list[Block]:
    """Find the transformer blocks of a model, in the order in which they run.

    A candidate is an outermost `ModuleList` whose entries hold layers with parameters and are of one class, or of
    several that the model names in `_no_split_modules`. Among several lists, those whose entries it names there are
    preferred, then the one with the most parameters. The lists of an encoder-decoder model are joined, encoder first.

    Args:
        model: any module; a transformers model, or one that PEFT has wrapped.
        layers_pattern: dotted name of the `ModuleList`, or its end ("h", "decoder.layers"), or several, of which
            those that match are taken, their entries of whichever classes. Default `None`: find it.

    Returns:
        One `Block` for each entry, indices from 0.

    Raises:
        ValueError: if no list of blocks is found, or `layers_pattern` matches none.
    """
    candidates = _candidate_lists(model)
    if layers_pattern:
        patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
        chosen = _matching(candidates, patterns) or _matching(_candidate_lists(model, any_classes=True), patterns)
        if not chosen:
            raise ValueError(
                f"layers_pattern {layers_pattern!r} matches no list of blocks in {type(model).__name__}. "
                f"{_describe(candidates)}"
            )
    else:
        chosen = _choose(model, candidates)
    if not chosen:
        raise ValueError(
            f"No transformer blocks found in {type(model).__name__}: it has no ModuleList of equal modules that "
            "hold layers with parameters. Set layers_pattern to the name of the list of blocks, or give "
            "target_modules and no calibration data to put deltas on single modules."
        )
    named = [(f"{name}.{i}", block) for name, blocks in chosen.items() for i, block in enumerate(blocks)]
    has_decoder = is_encoder_decoder(model)
    return [
        Block(index, name, module, in_decoder=has_decoder and "decoder" in name.split("."))
        for index, (name, module) in enumerate(named)
    ]


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a decoder of the model reads other tokens than its encoder does."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def hidden_states_of(values: Any) -> Tensor:
    """The hidden states among the inputs or the output of a block: the entry of that name, else the first."""
    if isinstance(values, Tensor):
        return values
    if isinstance(values, Mapping):
        return values["hidden_states"] if "hidden_states" in values else next(iter(values.values()))
    return values[0]


def _candidate_lists(model: nn.Module, any_classes: bool = False) -> dict[str, nn.ModuleList]:
    no_split = _no_split_classes(model)
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found) or not isinstance(module, nn.ModuleList):
            continue
        classes = {type(entry).__name__ for entry in module}
        fits = len(classes) == 1 or (classes and (any_classes or classes <= no_split))
        # A layer without layers in it, such as each linear of an MLP, is no block.
        if fits and all(any(entry.children()) and any(True for _ in entry.parameters()) for entry in module):
            found[name] = module
    return found


def _no_split_classes(model: nn.Module) -> set[str]:
    return set(getattr(model, "_no_split_modules", None) or ())


def _matching(candidates: dict[str, nn.ModuleList], patterns: list[str]) -> dict[str, nn.ModuleList]:
    return {name: m for name, m in candidates.items() if any(f".{name}".endswith(f".{p}") for p in patterns)}


def _choose(model: nn.Module, candidates: dict[str, nn.ModuleList]) -> dict[str, nn.ModuleList]:
    no_split = _no_split_classes(model)
    preferred = {n: m for n, m in candidates.items() if type(m[0]).__name__ in no_split} or candidates
    if len(preferred) < 2 or is_encoder_decoder(model):
        return preferred
    largest = max(preferred, key=lambda name: sum(p.numel() for p in preferred[name].parameters()))
    return {largest: preferred[largest]}


def _describe(candidates: dict[str, nn.ModuleList]) -> str:
    if not candidates:
        return "The model has no such list."
    return "Found: " + ", ".join(f"{name} ({len(m)} x {type(m[0]).__name__})" for name, m in candidates.items()) + "."
