"""A factor on what an adapter adds to each block, and the derivative of a loss with respect to all of them at once."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..evaluation import token_nll
from ..evaluation_mode import evaluation_mode
from ..layer import AdaptQLayer
from ..selection import Block, find_blocks
from .documents import Documents
from .original_model import trains_biases

#: Where the derivative at 0 is taken: a delta has no gradient where its factor is exactly 0.
SMALLEST = 1e-3

#: What PEFT's layers hold a parameter in that the change of the weight is proportional to, besides `scaling`.
PROPORTIONAL = {
    "LoRA or AdaLoRA": ("lora_B", "lora_embedding_B"),
    "SHiRA": ("shira_weight",),
    "LoHa": ("hada_w2_b",),
    "LoKr": ("lokr_w1", "lokr_w1_b"),
    "RandLoRA": ("randlora_lambda",),
}
ALLOWED = f"ADAPTQ, {', '.join(PROPORTIONAL)}, and no DoRA"


class BlockScales:
    """W = W0 + factor * scale * delta, with one factor for each adapted block of a model; 1 is as it was trained.

    Parameters of less than 32 bits are written, rounded, from a copy that is kept: what is measured is what is saved.

    Args:
        model: a `PeftModel` with one active adapter, of ADAPTQ or a method in `PROPORTIONAL`.

    Attributes:
        blocks: indices of the blocks that have something to scale.
        unscaled: what stays as it was trained: the adapter's `modules_to_save`, its layers outside of all blocks,
            `trainable_token_indices`, and biases of the base that PEFT's `bias` trains.

    Raises:
        ValueError: if there is no such adapter, several are active, it is merged or switched off, it runs at another
            scale than its config's, or it is of a kind that can't be scaled.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.adapter = active_adapter(model)
        found = {block.index: list(layers.values()) for block, layers in layers_by_block(model, self.adapter)}
        self._layers = {index: layers for index, layers in found.items() if layers}
        for layer in chain.from_iterable(self._layers.values()):
            if layer.merged or layer.disable_adapters:
                what = "merged; call model.unmerge_adapter()" if layer.merged else "switched off; switch it on"
                raise ValueError(f"adapter {self.adapter!r} can't be scaled while it is {what} first")
            if isinstance(layer, AdaptQLayer):
                self._check_scale(layer)
        self.blocks = list(self._layers)
        if not self.blocks:
            kind = type(model.peft_config[self.adapter]).__name__  # type: ignore[union-attr, index]
            raise ValueError(
                f"adapter {self.adapter!r} ({kind}) has nothing in any block that can be scaled; allowed: {ALLOWED}"
            )
        self.unscaled = _outside_of_factors(model, self.adapter, chain.from_iterable(self._layers.values()))
        self._trained = {layer: layer.scaling[self.adapter] for layers in self._layers.values() for layer in layers}
        self._parameters = {layer: linear_parameters(layer, self.adapter) for layer in self._trained}
        self._originals: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        self.take_as_trained()

    def take_as_trained(self) -> None:
        """From now on the values that the parameters have are those of factor 1."""
        self._originals = {
            layer: [(parameter, parameter.detach().clone()) for parameter in own]
            for layer, own in self._parameters.items()
            if any(parameter.itemsize < 4 for parameter in own)
        }

    def _check_scale(self, layer: AdaptQLayer) -> None:
        """Refuse a scale that is not saved: what is loaded would be another adapter than what was measured."""
        config: Any = self._model.peft_config[self.adapter]  # type: ignore[union-attr, index]
        found = layer.scaling[self.adapter]
        corrected = layer.is_corrected_by(self.adapter)
        saved = config.frozen_scaling if corrected else config.delta_scaling
        if found != saved:
            name = f"frozen_alpha / frozen_rank {saved}" if corrected else f"delta_scaling {saved}"
            raise ValueError(
                f"adapter {self.adapter!r} runs at scale {found} in a layer, by set_scale, and its config has {name}: "
                "the scale of a layer is not saved, so what is fitted would not be what is loaded; set it back first"
            )

    @torch.no_grad()
    def set(self, factors: np.ndarray | float) -> None:
        """Run with these factors, [blocks] or one for all, from now on."""
        for factor, layers in zip(np.broadcast_to(factors, len(self.blocks)), self._layers.values(), strict=True):
            for layer in layers:
                if layer not in self._originals:
                    layer.scaling[self.adapter] = self._trained[layer] * float(factor)
                for parameter, original in self._originals.get(layer, ()):
                    parameter.copy_(original * float(factor))

    @torch.no_grad()
    def fold(self, factors: np.ndarray) -> None:
        """Multiply the deltas by these factors, at the scale of the config: so they are saved, loaded and merged."""
        self.set(factors)
        for factor, layers in zip(factors, self._layers.values(), strict=True):
            for layer in layers:
                if layer not in self._originals:
                    layer.scaling[self.adapter] = self._trained[layer]
                    for parameter in self._parameters[layer]:
                        parameter.mul_(float(factor))

    def gradient(self, factors: np.ndarray, documents: Documents, batch_size: int) -> np.ndarray:
        """d loss / d factor of each block at these factors, in nats a token: [blocks], from one backward pass.

        W is linear in each delta, so the derivative is <d loss / d delta, delta> / factor.
        """
        factors = np.maximum(factors, SMALLEST)
        self.set(factors)
        flat = [*chain.from_iterable(self._parameters.values())]
        flags = [parameter.requires_grad for parameter in flat]
        try:
            for parameter in flat:
                parameter.requires_grad_(True)
            return self._products(flat, documents, batch_size) / factors
        finally:
            for parameter, flag in zip(flat, flags, strict=True):
                parameter.requires_grad_(flag)

    def _products(self, flat: list[Tensor], documents: Documents, batch_size: int) -> np.ndarray:
        """<d loss / d delta, delta>, summed over the deltas of each block."""
        products, count = torch.zeros(len(flat), dtype=torch.float64), 0
        for batch in documents.batches(batch_size):
            with evaluation_mode(self._model), torch.enable_grad():
                loss = token_nll(batch.logits(self._model), batch.targets).sum()
                gradients = torch.autograd.grad(loss, flat, allow_unused=True)
            products += torch.tensor([_dot(g, p) for g, p in zip(gradients, flat, strict=True)], dtype=torch.float64)
            count += len(batch.targets)
        sizes = [sum(len(self._parameters[layer]) for layer in layers) for layers in self._layers.values()]
        return np.array([float(part.sum()) for part in products.split(sizes)]) / count


def linear_parameters(layer: BaseTunerLayer, adapter: str) -> list[Tensor]:
    """The parameters of an adapter in a layer by which the weight is multiplied if they all are: deltas, or B.

    Raises:
        ValueError: if the weight is not linear in any, as with DoRA, or the method is not known here.
    """
    if isinstance(layer, AdaptQLayer):
        corrected = layer.is_corrected_by(adapter)
        return list((layer.adaptq_low_rank_B if corrected else layer.adaptq_delta)[adapter].parameters())
    if adapter not in getattr(layer, "lora_magnitude_vector", {}):  # DoRA
        for name in chain.from_iterable(PROPORTIONAL.values()):
            container: Any = getattr(layer, name, {})
            if adapter in container:
                held = container[adapter]
                return list(held.parameters()) if isinstance(held, nn.Module) else [held]
    raise ValueError(f"adapters in {class_path(layer)} can't be scaled; allowed: {ALLOWED}")


def class_path(layer: object) -> str:
    """Module and name of a layer's class: the name alone, such as Linear, is the same for many methods of PEFT."""
    return f"{type(layer).__module__}.{type(layer).__name__}"


def active_adapter(model: nn.Module) -> str:
    """Name of the one active adapter of a `PeftModel`; ValueError if it is none or several."""
    if not isinstance(model, PeftModel):
        raise ValueError(f"a PeftModel is needed, as get_peft_model makes it, and this is a {type(model).__name__}")
    active: Any = model.active_adapters
    if len(active) != 1:
        raise ValueError(f"one active adapter is needed, and {type(model).__name__} has {list(active)}")
    return active[0]


def layers_by_block(model: nn.Module, adapter: str) -> list[tuple[Block, dict[str, Any]]]:
    """Each block with the layers in it that an adapter changes: dotted name in the base model -> layer."""
    pattern = getattr(model.peft_config[adapter], "layers_pattern", None)  # type: ignore[union-attr, index]
    return [
        (
            block,
            {
                f"{block.name}.{name}": module
                for name, module in block.module.named_modules()
                if _is_scaled(module, adapter)
            },
        )
        for block in find_blocks(model.get_base_model(), pattern or None)  # type: ignore[operator]
    ]


def _is_scaled(module: nn.Module, adapter: str) -> bool:
    """Whether an adapter changes a layer, by a scale that the layer holds."""
    return isinstance(module, BaseTunerLayer) and adapter in getattr(module, "scaling", {})


def _outside_of_factors(model: Any, adapter: str, scaled: Iterable[nn.Module]) -> list[str]:
    """What an adapter trains without a factor of ours, by name."""
    config, within = model.peft_config[adapter], set(scaled)
    whole = list(getattr(config, "modules_to_save", None) or [])
    outside = [
        name
        for name, module in model.get_base_model().named_modules()
        if _is_scaled(module, adapter) and module not in within
    ]
    tokens = ["trainable_token_indices"] if getattr(config, "trainable_token_indices", None) else []
    return [*whole, *outside, *tokens, *(["bias"] if trains_biases(model, config) else [])]


def _dot(gradient: Tensor | None, parameter: Tensor) -> float:
    return 0.0 if gradient is None else float((gradient.float() * parameter.detach().float()).sum())
