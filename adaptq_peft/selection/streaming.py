"""Runs a model from its checkpoint on disk: a layer of a block is in memory only while it runs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..offloading import accelerator_or_cpu
from ..skeleton import build_skeleton
from .blocks import find_blocks


@contextmanager
def streamed_model(
    name: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    layers_pattern: str | list[str] | None = None,
) -> Iterator[nn.Module]:
    """A model whose blocks stay in the safetensors files of its checkpoint, and run as if they were in memory.

    accelerate's hooks read the weights of each layer before its forward pass and drop them after it. So each forward
    pass reads all blocks once. Everything outside the blocks is loaded. The model is on the accelerator, if there is
    one.

    Weights that transformers makes from several tensors of the checkpoint, as fused experts, are written to a
    temporary folder first, one at a time; the variable TMPDIR says where.

    Args:
        name: folder or Hub repository of the checkpoint.
        dtype: as given to `from_pretrained`. `None` (default): that of the checkpoint's config.
        layers_pattern: name of the list of blocks, where it can't be found.

    Raises:
        ValueError: if no blocks are found, or the checkpoint is quantized.
    """
    skeleton = build_skeleton(name, dtype)
    with tempfile.TemporaryDirectory(prefix="adaptq-") as folder:
        yield type(skeleton).from_pretrained(
            name,
            dtype=skeleton.dtype,
            device_map=device_map_with_blocks_on_disk(skeleton, layers_pattern),
            offload_folder=folder,
        )


def device_map_with_blocks_on_disk(
    model: nn.Module, layers_pattern: str | list[str] | None = None
) -> dict[str, str | torch.device]:
    """A `device_map` for `from_pretrained`: blocks on "disk", all else on the accelerator or the CPU.

    Args:
        model: the model that will be loaded; it may be on the meta device.
        layers_pattern: name of the list of blocks, where it can't be found.
    """
    device = accelerator_or_cpu()
    blocks = {block.name for block in find_blocks(model, layers_pattern)}
    around = {name.rsplit(".", depth)[0] for name in blocks for depth in range(1, name.count(".") + 1)}
    inside: dict[str, str | torch.device] = dict.fromkeys(blocks, "disk")
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for path in ["", *around]:
        children = [name for name, _ in model.get_submodule(path).named_children()]
        own = [name for name, _ in tensors if name.rpartition(".")[0] == path]
        outside = own + [f"{path}.{child}".lstrip(".") for child in children]
        inside.update({name: device for name in outside if name not in blocks | around})
    return inside
