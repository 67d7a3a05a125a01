"""Second moments of what an adapter's linears read on two texts, block by block."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from peft import PeftModel
from torch import Tensor

from ..quantization.calibrated.block_stream import BlockStream, linears_by_input
from ..quantization.calibrated.calibrate import input_moments
from ..selection import Block
from ..selection.calibration import Batch
from .documents import Documents
from .original_model import adapters_disabled

Moments = dict[tuple[str, ...], tuple[Tensor, Tensor]]


def moments_by_block(
    model: PeftModel, blocks: Sequence[Block], names: Collection[str], domain: Documents, general: Documents, size: int
) -> Iterator[Moments]:
    """The means of x x^T over the tokens of each text, for each input x that some of the named linears read.

    On domain text the model has its adapter, on general text it is its base: the inputs on which the weights are as
    wanted. Memory: the hidden states of all tokens of both texts and the inputs of one linear on one of them,
    [tokens, features] each, and the moments of one block.

    Args:
        model: in evaluation mode, with one active adapter. Iterate without gradients.
        blocks: consecutive blocks; there is a result for each.
        names: dotted names of linears in the base model.
        domain: text on which the adapter should go on to work.
        general: text on which it should do nothing.
        size: full windows run at once, or as many tokens in shorter ones.

    Yields:
        Names of the linears that read the same tensor -> (domain, general), float32 [in, in] each. Those that do not
        run on both texts are left out.
    """
    base, way_out = model.get_base_model(), {"purpose": "shrinkage", "without": 'family="scales"'}
    on_domain = BlockStream.open(base, blocks, padded_batches(domain, size), **way_out)
    with adapters_disabled(model):
        on_general = BlockStream.open(base, blocks, padded_batches(general, size), **way_out)
    for block in blocks:
        start = f"{block.name}."
        own = [name.removeprefix(start) for name in names if name.startswith(start)]
        groups = linears_by_input(on_domain, block, block.module, own) if own else []
        first = [_moments(on_domain, block, group[0]) for group in groups]
        on_domain.advance(block)
        with adapters_disabled(model):
            second = [_moments(on_general, block, group[0]) for group in groups]
            on_general.advance(block)
        yield {
            tuple(start + name for name in group): (one, other)
            for group, one, other in zip(groups, first, second, strict=True)
            if one is not None and other is not None
        }


def padded_batches(documents: Documents, size: int) -> list[Batch]:
    """Keyword arguments for `model.forward`; masked are padding and tokens after which nothing is predicted."""
    batches: list[Batch] = []
    for batch in documents.batches(size):
        mask = batch.predicted.flip(1).cumsum(1).flip(1) > 0
        batches.append({"input_ids": batch.input_ids, "attention_mask": mask.long()})
    return batches


def _moments(stream: BlockStream, block: Block, name: str) -> Tensor | None:
    inputs = list(stream.inputs_of(block, block.module, block.module.get_submodule(name)))
    return input_moments(inputs, None, stream.token_counts())[0] if any(map(len, inputs)) else None
