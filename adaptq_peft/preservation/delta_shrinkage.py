"""Covariance-weighted shrinkage of all that an adapter adds to a model; the maths is in `shrinkage`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..evaluation_mode import evaluation_mode
from ..layer import AdaptQLayer
from .block_scales import active_adapter, class_path, layers_by_block, linear_parameters
from .documents import Documents
from .input_moments import moments_by_block
from .shrinkage import DAMPING, ShrinkagePath


class InputFactor(NamedTuple):
    """The matrix of an adapter that multiplies the input of a linear: a delta, or the A of a product B A.

    Args:
        parameter: [out, in] or [r, in]; [in, out] if `transposed`.
        transposed: as in Conv1D.
    """

    parameter: Tensor
    transposed: bool


class DeltaShrinkage:
    """Each linear's delta as D(lambda), with one lambda for the model; 0 is as it was trained, exactly.

    Of a product B A it is A that is shrunk, which is the same. What is no weight of a linear (biases, norms, Conv2d,
    embeddings), and linears that do not run on the texts, are multiplied by 1 / (1 + lambda): what D(lambda) is where
    both texts excite all directions alike. So at infinity nothing is left of the adapter.

    Memory: a copy of the adapter, 8 in^2 bytes for each input that adapted linears read, and while it is made what
    `moments_by_block` says.

    Args:
        model: a `PeftModel` with one active adapter, of ADAPTQ, LoRA or AdaLoRA.
        domain: text on which the adapter should go on to work.
        general: text on which it should do nothing.
        batch_size: full windows run at once, or as many tokens in shorter ones.
        damping: see `ShrinkagePath.of`.

    Raises:
        ValueError: if there is no such adapter, or it can't be scaled; or a block can't be run by itself.
    """

    def __init__(
        self, model: nn.Module, domain: Documents, general: Documents, batch_size: int, damping: float = DAMPING
    ) -> None:
        adapter = active_adapter(model)
        found = layers_by_block(model, adapter)
        touched = [index for index, (_, layers) in enumerate(found) if layers]
        if not touched:
            raise ValueError(f"adapter {adapter!r} adds nothing to any block, so there is nothing to shrink")
        layers = {name: layer for _, within in found for name, layer in within.items()}
        factors = {name: input_factor(layer, adapter) for name, layer in layers.items()}
        self._factors = {name: factor for name, factor in factors.items() if factor is not None}
        #: Names of linears that read the same input, and their path.
        self._paths: list[tuple[tuple[str, ...], ShrinkagePath]] = []
        span = [block for block, _ in found[touched[0] : touched[-1] + 1]]
        with evaluation_mode(model), torch.no_grad():
            for moments in moments_by_block(model, span, self._factors, domain, general, batch_size):  # type: ignore[arg-type]
                self._paths += [(names, ShrinkagePath.of(*pair, damping)) for names, pair in moments.items()]
        shrunk = {name for names, _ in self._paths for name in names}
        self._scaled = [
            parameter
            for name, layer in layers.items()
            for parameter in (_other_parameters if name in shrunk else linear_parameters)(layer, adapter)
        ]
        parameters = [*self._scaled, *(self._factors[name].parameter for name in shrunk)]
        self._originals = {parameter: parameter.detach().clone() for parameter in parameters}

    @torch.no_grad()
    def set(self, strength: float) -> None:
        """Give the adapter the values of D(strength), made from the stored originals."""
        for parameter in self._scaled:
            parameter.copy_(self._originals[parameter] * (1 / (1 + strength)))
        for names, path in self._paths:
            for parameter, transposed in (self._factors[name] for name in names):
                original = self._originals[parameter]
                shrunk = path.shrink(original.t() if transposed else original, strength)
                parameter.copy_(shrunk.t() if transposed else shrunk)


def input_factor(layer: Any, adapter: str) -> InputFactor | None:
    """Of an adapter in a layer; `None` if the layer is no linear, or the adapter has nothing on its weight.

    Raises:
        ValueError: if the adapter is of another method than ADAPTQ, LoRA and AdaLoRA.
    """
    if isinstance(layer, AdaptQLayer):
        if layer.is_corrected_by(adapter):
            return InputFactor(layer.factors_of(adapter)[0], False)
        weight: Any = getattr(layer.adaptq_delta[adapter], "weight", None)
        transposed = isinstance(layer.base_layer, Conv1D)
        is_linear = transposed or isinstance(layer.base_layer, nn.Linear)
        return InputFactor(weight, transposed) if is_linear and weight is not None else None
    if not isinstance(layer, LoraLayer):
        raise ValueError(
            f"what an adapter adds to {class_path(layer)} has no matrix that multiplies the input, so it can't "
            'be shrunk; allowed: ADAPTQ, LoRA and AdaLoRA; use family="scales"'
        )
    if isinstance(layer, ParamWrapper):  # fused experts: what each reads is not what the module reads
        return None
    factor = dict(layer.lora_A).get(adapter)
    weight = factor.weight if isinstance(factor, nn.Linear) else factor
    return InputFactor(weight, False) if isinstance(weight, nn.Parameter) else None


def _other_parameters(layer: BaseTunerLayer, adapter: str) -> list[Tensor]:
    """What an adapter adds to a linear beside its weight: the delta of the bias, or the bias of B."""
    return [parameter for parameter in linear_parameters(layer, adapter) if parameter.ndim == 1]
