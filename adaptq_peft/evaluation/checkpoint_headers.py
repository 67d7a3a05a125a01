"""What the safetensors headers of a checkpoint say of its weights: dtypes, bytes, names, shapes. None is read."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import get_local_safetensors_metadata, get_safetensors_metadata, is_offline_mode
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from torch import nn
from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils import CONFIG_NAME, cached_file

from ..quantization.checkpoint_weights import name_keys


@dataclass(frozen=True)
class CheckpointSummary:
    """What is stored in a checkpoint, beside what its config.json says.

    Attributes:
        bytes_by_dtype: bytes of the tensors in each dtype, the largest first, such as {"bfloat16": 269_060_352}.
        mismatches: a sentence for each kind of difference between the tensors and the model of config.json.
    """

    bytes_by_dtype: dict[str, int]
    mismatches: list[str]


class CheckpointHeaders:
    """The headers of a safetensors checkpoint: a folder, the Hub's cache, or a repository, by requests for ranges.

    Args:
        name: folder or Hub repository.

    Attributes:
        tensors: name of each tensor -> huggingface_hub's `TensorInfo`.

    Raises:
        HeadersUnavailable: if there are no safetensors files, or the Hub can't be asked.
        ValueError: if a header can't be read.
        FileNotFoundError: if a file that a folder's index names is not there.
    """

    def __init__(self, name: str | os.PathLike[str]) -> None:
        try:
            found = _local(os.fspath(name)) or _remote(os.fspath(name))
        except SafetensorsParsingError as error:
            raise ValueError(f"{os.fspath(name)!r} has a damaged safetensors file: {error}") from error
        self.tensors: dict[str, Any] = {}
        for file in found.files_metadata.values():
            self.tensors.update(file.tensors)

    @property
    def dtype(self) -> torch.dtype | None:
        """The floating point dtype that most bytes are in; `None`: there is none."""
        sizes = {str_to_torch_dtype[name]: size for name, size in self._sizes().items()}
        return next((dtype for dtype in sizes if dtype.is_floating_point), None)

    def summarize(self, model: nn.Module) -> CheckpointSummary:
        """Compare the tensors with those of a model.

        Args:
            model: the model of the checkpoint's config; it may be on the meta device.
        """
        sizes = {str(str_to_torch_dtype[name]).removeprefix("torch."): size for name, size in self._sizes().items()}
        return CheckpointSummary(sizes, self._mismatches(model))

    def _sizes(self) -> dict[str, int]:
        sizes: Counter[str] = Counter()
        for tensor in self.tensors.values():
            sizes[tensor.dtype] += tensor.data_offsets[1] - tensor.data_offsets[0]
        return dict(sizes.most_common())

    def _mismatches(self, model: nn.Module) -> list[str]:
        sources = name_keys(model, list(self.tensors), is_own=False)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        missing = [name for name in parameters if name not in sources and name not in tied]
        extra = [name for name in sources if name not in parameters and name not in buffers]
        shapes = [
            (name, list(parameters[name].shape), list(self.tensors[source.keys[0]].shape))
            for name, source in sources.items()
            if name in parameters and source.conversion is None
        ]
        found = {
            "weights are not stored": _without(missing, getattr(model, "_keys_to_ignore_on_load_missing", None)),
            "stored tensors are none of the model's": _without(
                extra, getattr(model, "_keys_to_ignore_on_load_unexpected", None)
            ),
            "weights have another shape": [
                f"{name} is {stored}, and {by_config} by config.json"
                for name, by_config, stored in shapes
                if by_config != stored
            ],
        }
        return [f"{len(names)} {what}, the first: {names[0]}" for what, names in found.items() if names]


class HeadersUnavailable(Exception):
    """There are no safetensors headers to read, or not here and now."""


def _local(name: str) -> Any:
    """Of a folder, or of a repository that is in the cache with all its files; `None`: of neither."""
    if os.path.isdir(name):
        try:
            return get_local_safetensors_metadata(name)
        except NotASafetensorsRepoError as error:
            raise HeadersUnavailable(str(error)) from error
    try:
        config = cached_file(name, CONFIG_NAME, local_files_only=True)
        return get_local_safetensors_metadata(os.path.dirname(str(config)))
    except (OSError, NotASafetensorsRepoError):
        return None


def _remote(name: str) -> Any:
    if is_offline_mode():
        raise HeadersUnavailable(f"the safetensors files of {name!r} are not in the cache, and HF_HUB_OFFLINE is set")
    try:
        return get_safetensors_metadata(name)
    except SafetensorsParsingError:
        raise
    except Exception as error:  # the HTTP client's own errors, too, whichever it is
        raise HeadersUnavailable(f"the Hub did not give the headers of {name!r}: {error}") from error


def _without(names: list[str], patterns: Any) -> list[str]:
    return [name for name in names if not any(re.search(pattern, name) for pattern in patterns or ())]
