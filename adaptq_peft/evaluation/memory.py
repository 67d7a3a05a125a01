"""Bytes that a model's weights take, measured from its tensors, beside what the paper's formula says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..quantization import is_quantized
from ..selection import find_blocks


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a model's tensors, by what they are for. Each tensor counts once, however many modules share it.

    Attributes:
        quantized_linears: Quantized linears within the blocks: packed codes, scales, nested scales and lookup tables.
        dense_linears: Weights of the other linears within the blocks, the adapted ones' base weights among them.
        adapters: What is trained: deltas, and whatever else PEFT keeps for an adapter, of all adapters in the model.
        other: Everything else: embeddings, head, norms, biases, buffers.
    """

    quantized_linears: int
    dense_linears: int
    adapters: int
    other: int

    @property
    def block_linears(self) -> int:
        """Weights of the blocks' linears without adapters: what the paper's formula is about."""
        return self.quantized_linears + self.dense_linears

    @property
    def base(self) -> int:
        """The whole model without adapters."""
        return self.block_linears + self.other

    @property
    def total(self) -> int:
        """Everything, adapters included."""
        return self.base + self.adapters


def measure_weight_bytes(model: nn.Module, layers_pattern: str | None = None) -> WeightBytes:
    """Count the bytes of every parameter, buffer and quantization tensor of a model.

    Optimizer states, gradients and activations are not weights and are not counted.

    Args:
        model: A plain model or a `PeftModel`, dense or quantized.
        layers_pattern: Name of the list of blocks where it cannot be found, as in `AdaptQConfig`.

    Raises:
        ValueError: If no blocks are found.
    """
    count = _TensorCounter()
    adapters = count.bytes_of(_adapter_tensors(model))
    quantized = dense = 0
    for block in find_blocks(model, layers_pattern):
        for module in block.module.modules():
            if is_quantized(module):
                quantized += count.bytes_of(_quantized_weight_tensors(module))
            elif isinstance(module, (nn.Linear, Conv1D)):
                dense += count.bytes_of([module.get_parameter("weight")])
    other = count.bytes_of(_all_tensors(model))
    return WeightBytes(quantized_linears=quantized, dense_linears=dense, adapters=adapters, other=other)


def paper_weight_ratio(num_blocks: int, num_adapted: int) -> float:
    """The paper's size of the blocks' weights relative to 16 bits, (4L + 12K) / 16L: 4 bits frozen, 16 bits adapted.

    It leaves out the scales that 4-bit codes need and the trained deltas.

    Args:
        num_blocks: L, at least 1.
        num_adapted: K, from 0 to L.

    Raises:
        ValueError: If a number is out of range.
    """
    if num_blocks < 1:
        raise ValueError(f"num_blocks={num_blocks}; a model has at least 1 block")
    if not 0 <= num_adapted <= num_blocks:
        raise ValueError(f"num_adapted={num_adapted}; it must be from 0 to num_blocks={num_blocks}")
    return (4 * num_blocks + 12 * num_adapted) / (16 * num_blocks)


class _TensorCounter:
    """Adds up the bytes of tensors and counts each only on its first appearance."""

    def __init__(self) -> None:
        self._seen: dict[tuple[object, ...], Tensor] = {}

    def bytes_of(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of those of `tensors` that were not counted before."""
        total = 0
        for tensor in tensors:
            key = self._key(tensor)
            if key not in self._seen:
                self._seen[key] = tensor  # held, so that its address cannot be given to another tensor meanwhile
                total += tensor.numel() * tensor.element_size()
        return total

    @staticmethod
    def _key(tensor: Tensor) -> tuple[object, ...]:
        if tensor.is_meta:  # no address; a parameter and its `data` share the storage
            return ("storage", tensor.untyped_storage()._cdata)
        if tensor.numel() == 0:
            return ("object", id(tensor))
        return (tensor.device, tensor.data_ptr(), tensor.numel() * tensor.element_size())


def _all_tensors(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        if is_quantized(module):
            yield from _quantized_weight_tensors(module)
        yield from module.parameters(recurse=False)
        yield from module.buffers(recurse=False)


def _adapter_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Tensors of PEFT adapters: what tuner layers and `modules_to_save` wrappers list in `adapter_layer_names`."""
    for module in model.modules():
        for name in getattr(module, "adapter_layer_names", ()):
            try:
                container = attrgetter(name)(module)
            except AttributeError:  # PEFT lists the names of all variants of a layer; not each layer has each
                continue
            if isinstance(container, nn.Module):
                yield from _all_tensors(container)


def _quantized_weight_tensors(linear: nn.Module) -> Iterator[Tensor]:
    """The weight of a quantized linear: packed codes, then scales and tables, wherever the library keeps them."""
    weight = linear._parameters.get("weight")
    if weight is not None:  # GPTQ has buffers alone
        yield weight
    yield from linear.buffers(recurse=False)
    for owner, name in ((weight, "quant_state"), (weight, "CB"), (weight, "SCB"), (linear, "state")):
        yield from _tensors_within(getattr(owner, name, None))


def _tensors_within(state: object) -> Iterator[Tensor]:
    """Tensors that a bitsandbytes state holds, nested states included."""
    if isinstance(state, Tensor):
        yield state
    elif type(state).__module__.startswith("bitsandbytes."):
        for value in vars(state).values():
            yield from _tensors_within(value)
