"""Runs a model block by block: what the calibration batches are at the entry of each block, one block at a time.

One forward pass of the model records with which arguments (masks, position embeddings, ...) each block is called, and
the hidden states at the entry of the first block that matters. From there on only blocks run. So memory holds the
hidden states of all calibration tokens once, [tokens, features], and the cost is that of a few forward passes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ...offloading import input_device
from ...selection import Block
from ...selection.calibration import Batch, mask_of, real_tokens, token_masks


class _StopForward(Exception):
    """Ends a forward pass whose rest nobody needs."""


@dataclass
class _Call:
    """Arguments of one block in one batch, the hidden states apart."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class BlockStream:
    """The calibration batches on their way through the blocks.

    Attributes:
        hidden: for each batch the hidden states at the entry of the next block, [samples, tokens, features].
        masks: for each batch the attention masks [samples, tokens] of what the blocks may read, as `token_masks` has
            them; padding is no evidence.
    """

    hidden: list[Tensor]
    masks: list[list[Tensor]]
    _calls: dict[str, list[_Call]] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        model: nn.Module,
        blocks: Sequence[Block],
        batches: Sequence[Batch],
        purpose: str = "calibrated quantization",
        without: str = "quantization_calibration=None",
    ) -> BlockStream:
        """Run the model once on all batches, up to the last of `blocks`, and stand before the first of them.

        Args:
            model: in evaluation mode.
            blocks: consecutive blocks, in the order in which they run.
            batches: keyword arguments for `model.forward`, as `calibration_batches` makes them.
            purpose: what needs the stream, for error messages.
            without: the setting that does without it, for error messages.

        Raises:
            ValueError: if a block does not run exactly once in a forward pass, or hidden states are not its first
                argument.
        """
        stream = cls(
            [], [token_masks(batch, blocks[0].in_decoder) for batch in batches], {block.name: [] for block in blocks}
        )
        recorders = [(b.module, stream._recorder(b, b is blocks[0], purpose, without)) for b in blocks]
        device = input_device(model)
        extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        with _hooks(recorders, blocks[-1].module):
            for batch in batches:
                inputs = {key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()}
                _run_until_stopped(model, (), {**extra, **inputs})
        for name, calls in stream._calls.items():
            if len(calls) != len(batches):
                raise ValueError(
                    f"block {name} ran {len(calls)} times in {len(batches)} forward passes of {type(model).__name__}; "
                    f"{purpose} needs blocks that run once each. Set {without}."
                )
        return stream

    def fork(self) -> BlockStream:
        """A second stream at the same place, on which other modules may run in the blocks' places."""
        calls = {name: list(calls) for name, calls in self._calls.items()}
        return BlockStream(list(self.hidden), self.masks, calls)

    def _recorder(self, block: Block, first: bool, purpose: str, without: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(hidden, Tensor):
                raise ValueError(
                    f"block {block.name} takes no hidden states as its first argument; {purpose} can't follow the "
                    f"data through it. Set {without}."
                )
            rest = {key: value for key, value in kwargs.items() if args or key != "hidden_states"}
            self._calls[block.name].append(_Call(args[1:], rest))
            if first:
                self.hidden.append(hidden)

        return record

    def outputs(self, block: Block, module: nn.Module | None = None) -> Iterator[Tensor]:
        """What the block, or `module` in its place, makes of the hidden states of each batch."""
        for hidden, call in zip(self.hidden, self._calls[block.name], strict=True):
            output = (module or block.module)(hidden, *call.args, **call.kwargs)
            yield output if isinstance(output, Tensor) else output[0]

    def advance(self, block: Block, module: nn.Module | None = None) -> None:
        """Let all batches pass the block, or `module` in its place."""
        self.hidden = list(self.outputs(block, module))
        del self._calls[block.name]

    def inputs_of(self, block: Block, module: nn.Module, inner: nn.Module) -> Iterator[Tensor]:
        """The inputs [tokens, in] of a layer `inner` of `module`, which runs in the block's place; no padding.

        The rest of the block does not run. A layer that does not run in a batch has no rows there: [0, 0].
        """
        for hidden, masks, call in zip(self.hidden, self.masks, self._calls[block.name], strict=True):
            with _catch_input(inner) as caught:
                _run_until_stopped(module, (hidden, *call.args), call.kwargs)
            yield real_tokens(caught[0], masks) if caught else hidden.new_empty(0, 0)

    def token_counts(self) -> list[int]:
        """How many tokens each batch has, padding not counted."""
        shapes = [hidden.shape[:-1] for hidden in self.hidden]
        found = [mask_of(masks, shape) for masks, shape in zip(self.masks, shapes, strict=True)]
        return [shape.numel() if mask is None else int(mask.sum()) for mask, shape in zip(found, shapes, strict=True)]

    def first_call(self, block: Block) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keyword arguments of the block for the first batch."""
        call = self._calls[block.name][0]
        return (self.hidden[0], *call.args), call.kwargs


def linears_by_input(stream: BlockStream, block: Block, module: nn.Module, names: Sequence[str]) -> list[list[str]]:
    """Layers of a block in the order in which they run; those that read the same tensor (q, k, v) are together.

    Args:
        stream: stands before the block.
        block: the block.
        module: runs in its place.
        names: names of layers within the block. Those that do not run on the first batch are not in the result.
    """
    groups: list[tuple[Tensor, list[str]]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            if any(name in group for _, group in groups):
                return
            if groups and groups[-1][0] is args[0]:
                groups[-1][1].append(name)
            else:
                groups.append((args[0], [name]))

        return hook

    handles = [module.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    try:
        args, kwargs = stream.first_call(block)
        module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return [group for _, group in groups]


def _stop(*_: Any) -> None:
    raise _StopForward


@contextmanager
def _hooks(recorders: Sequence[tuple[nn.Module, Callable[..., None]]], last: nn.Module) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(record, with_kwargs=True) for module, record in recorders]
    handles.append(last.register_forward_hook(_stop))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _catch_input(layer: nn.Module) -> Iterator[list[Tensor]]:
    caught: list[Tensor] = []

    def catch(_: nn.Module, args: tuple[Any, ...]) -> None:
        caught.append(args[0])
        raise _StopForward

    handle = layer.register_forward_pre_hook(catch)
    try:
        yield caught
    finally:
        handle.remove()


def _run_until_stopped(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with suppress(_StopForward):
        module(*args, **kwargs)
