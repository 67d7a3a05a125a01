"""Keeps autograd out of the blocks below the lowest trained one.

Nothing there is trained, so a plain forward records nothing. Two habits of trainers undo that: they make the
embeddings' output require gradients, and they checkpoint every block. Both exist for the trained blocks only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .selection import hidden_states_of


class FrozenPrefix:
    """The blocks of a model, of which those below the lowest trained one run without autograd.

    Args:
        model: the base model.

    Attributes:
        block_names: dotted names of the model's blocks, in the order in which they run; none for a model without.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self.block_names: list[str] = []
        self._hooks: list[Any] = []
        self._not_checkpointed: list[Any] = []

    def set_blocks(self, block_names: list[str]) -> None:
        """Set `block_names`, once they are known."""
        self.block_names = block_names
        self.refresh()
        self.take_over()

    def trained_from(self) -> int:
        """Index of the lowest block that is differentiated: with a trainable parameter, or one before it; else 0."""
        if not self.block_names or self._trains_before_blocks():
            return 0
        for index, name in enumerate(self.block_names):
            if _is_trained(self._model.get_submodule(name)):
                return index
        return 0

    def _trains_before_blocks(self) -> bool:
        """Whether embeddings are trained, or what is registered before the blocks, as a projector of images is."""
        for name, parameter in self._model.named_parameters():
            if name.startswith(f"{self.block_names[0]}."):
                break
            if parameter.requires_grad:
                return True
        try:
            embeddings = self._model.get_input_embeddings()
        except (AttributeError, NotImplementedError):  # no transformers model, or one that reads no tokens
            return False
        return embeddings is not None and _is_trained(embeddings)

    def _lowest_trained(self) -> list[str]:
        """Names of the lowest trained block of each list of blocks: a tower has an input of its own."""
        lowest: dict[str, str] = {}
        for name in self.block_names:
            if _is_trained(self._model.get_submodule(name)):
                lowest.setdefault(name.rpartition(".")[0], name)
        return list(lowest.values()) or self.block_names[:1]

    def enable_input_require_grads(self) -> None:
        """Make the input of the lowest trained block require gradients, which reentrant checkpointing needs.

        transformers marks the output of the embeddings instead; then every block below is differentiated for nothing.
        """
        self.disable_input_require_grads()
        if not self.block_names:
            self._model.enable_input_require_grads()
            return
        for block in map(self._model.get_submodule, self._lowest_trained()):
            self._hooks.append(block.register_forward_pre_hook(_require_grad_of_input, with_kwargs=True))
            if getattr(block, "_gradient_checkpointing_func", None) is not None:
                self._hooks.append(_GradRequiringCheckpoint(block))

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads`, whether it was called here or on the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if hasattr(self._model, "disable_input_require_grads"):
            self._model.disable_input_require_grads()

    def take_over(self) -> None:
        """Where something called `enable_input_require_grads` on the model itself, do it the cheaper way instead."""
        if self.block_names and getattr(self._model, "_require_grads_hooks", None):
            self.enable_input_require_grads()
            self._checkpoint_trained_blocks_only()

    def refresh(self) -> None:
        """Follow a change of the trained blocks."""
        if self._hooks:
            self.enable_input_require_grads()
        self._checkpoint_all_blocks()
        self._checkpoint_trained_blocks_only()

    def let_go(self) -> None:
        """Leave the model without the hooks, and with all of its blocks checkpointed if those above are."""
        self.disable_input_require_grads()
        self._checkpoint_all_blocks()

    def enable_checkpointing(self, enable: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Call `enable`, the model's own method, then leave the blocks below the lowest trained one out."""
        enable(*args, **kwargs)
        self.enable_input_require_grads()
        self._checkpoint_trained_blocks_only()

    def _checkpoint_all_blocks(self) -> None:
        """Undo `_checkpoint_trained_blocks_only`, unless checkpointing has been switched off since."""
        if any(getattr(module, "gradient_checkpointing", False) for module in self._model.modules()):
            for module in self._not_checkpointed:
                module.gradient_checkpointing = True
        self._not_checkpointed = []

    def _checkpoint_trained_blocks_only(self) -> None:
        for name in self.block_names[: self.trained_from()]:
            for module in self._model.get_submodule(name).modules():
                if getattr(module, "gradient_checkpointing", False):
                    module.gradient_checkpointing = False  # type: ignore[assignment]
                    self._not_checkpointed.append(module)


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _require_grad_of_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _require_grad(hidden_states_of(args or kwargs))


def _require_grad(hidden_states: torch.Tensor) -> None:
    if torch.is_grad_enabled() and not hidden_states.requires_grad:
        hidden_states.requires_grad_(True)


class _GradRequiringCheckpoint:
    """Takes the place of the function that checkpoints a block, and gives it an input that requires gradients.

    transformers before 5.23 runs a block's hooks within the checkpoint, too late for a reentrant one.
    """

    def __init__(self, block: Any) -> None:
        self._block = block
        self._checkpoint = block._gradient_checkpointing_func
        block._gradient_checkpointing_func = self

    def remove(self) -> None:
        """Put the function back, unless checkpointing has been set up anew with another one."""
        if self._block._gradient_checkpointing_func is self:
            self._block._gradient_checkpointing_func = self._checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if args:
            _require_grad(args[0])
        return self._checkpoint(function, *args, **kwargs)
