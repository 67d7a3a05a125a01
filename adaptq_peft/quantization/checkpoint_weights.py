"""Original weights of a model, read from its safetensors checkpoint one tensor at a time."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from huggingface_hub import constants, is_offline_mode
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.hub import extract_commit_hash

from .backends import is_quantized

#: Small tensors of each file that are compared with the model's, and the difference that a dtype may make to them: two
#: roundings to bfloat16, each by at most 2^-9 relative.
COMPARED_TENSORS = 8
DTYPE_TOLERANCE = 2.0**-7

#: Parts of a name that PEFT's wrappers add.
_WRAPPERS = ("base_layer", "original_module")


class OriginalWeightsUnavailable(ValueError):
    """The original weights of a model can't be read from a checkpoint."""


@dataclass(frozen=True)
class _Source:
    """Where one tensor of the model is: keys of the checkpoint, several or of another form if `conversion` is set."""

    keys: tuple[str, ...]
    conversion: str | None = None


class CheckpointWeights:
    """The tensors of the safetensors checkpoint that a model was loaded from, read one at a time.

    Nothing is read, looked up or downloaded before the first `read`. Only the file that holds a tensor is opened, and
    of that only its header and the tensor are read. Nothing is ever unpickled.

    Args:
        model: a transformers model, quantized or not, with or without adapters inside it. Not a `PeftModel`.
        path: folder or Hub repository of the checkpoint. `None` (default): the model's `name_or_path`.
        revision: branch, tag or commit of a Hub repository. `None` (default): the commit that the model's config
            names, else the default branch as it is in the cache. transformers 5 does not record the revision that a
            model was loaded from, so give it where you gave it to `from_pretrained`.
    """

    def __init__(self, model: nn.Module, path: str | None = None, revision: str | None = None) -> None:
        config = getattr(model, "config", None)
        self._model = model
        self._checked: set[str] = set()
        self._failure: OSError | None = None
        self._is_own = path is None
        self._path = str(path or getattr(model, "name_or_path", None) or "")
        self._revision = revision or (getattr(config, "_commit_hash", None) if self._is_own else None)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in memory of its own, in the dtype and orientation of the checkpoint.

        Args:
            name: dotted name of a parameter in the transformers model without adapters, such as
                "model.layers.0.self_attn.q_proj.weight". GPT-2's `Conv1D` weights are [in, out].

        Raises:
            OriginalWeightsUnavailable: if there is no such checkpoint or tensor, if the checkpoint is quantized
                itself, not in safetensors format, damaged or of another model, or if transformers makes the tensor
                from several.
        """
        source = self._sources.get(name)
        if source is None:
            raise self._unavailable(f"none of its {len(self._files)} tensors is {name}")
        if source.conversion:
            raise self._unavailable(
                f"{name} is made from {', '.join(source.keys)} by {source.conversion} and can't be read as one tensor"
            )
        self._check_same_weights(self._files[source.keys[0]])
        return self._read_key(source.keys[0])

    @cached_property
    def _sources(self) -> dict[str, _Source]:
        """Name of each tensor of the model -> where it is in the checkpoint."""
        keys = list(self._files)
        self._check_not_quantized()
        return name_keys(self._model, keys, self._is_own)

    @cached_property
    def _files(self) -> dict[str, str]:
        """Key of each tensor in the checkpoint -> name of its file."""
        if not self._path:
            raise self._unavailable("it was built in memory, and was not loaded from a checkpoint")
        if single := self._find(SAFE_WEIGHTS_NAME):
            with self._open(single) as file:
                return dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)
        if index := self._find(SAFE_WEIGHTS_INDEX_NAME):
            with open(index, encoding="utf-8") as text:
                return json.load(text)["weight_map"]
        pickled = [name for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME) if self._find(name, download=False)]
        if pickled:
            raise self._unavailable(
                f"it has {pickled[0]} and no safetensors file, and pickles are never opened; convert it once: load "
                "the model in 16 bits, call its save_pretrained, and use that folder"
            )
        raise self._unavailable(f"there is no {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}") from self._failure

    def _read_key(self, key: str) -> torch.Tensor:
        path = self._find(self._files[key])
        if path is None:
            raise self._unavailable(f"its file {self._files[key]}, which holds {key}, is missing") from self._failure
        with self._open(path) as file:
            try:
                return file.get_tensor(key)
            except SafetensorError as error:
                raise self._unavailable(f"{path} has no tensor {key}: {error}") from error

    def _open(self, path: str) -> Any:
        # Reads into memory of the tensor's own: a tensor from a memory map would keep pages of the file resident.
        try:
            return safe_open(path, framework="pt", device="cpu", backend="pread")
        except (SafetensorError, OSError) as error:
            raise self._unavailable(f"{path} is damaged: {error}") from error

    def _find(self, filename: str, download: bool = True) -> str | None:
        """Path of a file of the checkpoint: from the folder, from the Hub's cache, or downloaded into it."""
        for local_only in (True, False) if download and not is_offline_mode() else (True,):
            try:
                path = cached_file(self._path, filename, revision=self._revision, local_files_only=local_only)
            except OSError as error:
                self._failure = error  # says more, for instance that the repository is gated
                continue
            if path is not None:
                # All files of one commit: the default branch may move on meanwhile.
                self._revision = extract_commit_hash(path, None) or self._revision
                return path
        return None

    def _check_not_quantized(self) -> None:
        path = self._find(CONFIG_NAME)
        if path is None:
            return
        with open(path, encoding="utf-8") as text:
            quantization = json.load(text).get("quantization_config")
        if quantization:
            raise self._unavailable(
                f"it is quantized itself ({quantization.get('quant_method', 'unknown method')}), so it holds no "
                "original weights; name the 16-bit checkpoint that it was made from"
            )

    def _check_same_weights(self, file: str) -> None:
        """Compare the norms and biases in a file, which quantization leaves alone, with the model's, once."""
        if file in self._checked:
            return
        names = {
            name: tensor
            for name, tensor in _unmerged_vectors(self._model).items()
            if (source := self._sources.get(name)) and not source.conversion and self._files[source.keys[0]] == file
        }
        chosen = list(names)[:: max(1, len(names) // COMPARED_TENSORS)]
        other = [name for name in chosen if not _are_close(self._read_key(self._sources[name].keys[0]), names[name])]
        if len(other) > len(chosen) / 2:
            raise self._unavailable(
                f"it has other weights than the model, for instance {other[0]}; if the model was loaded from another "
                "revision, name that revision"
            )
        self._checked.add(file)

    def _unavailable(self, reason: str) -> OriginalWeightsUnavailable:
        return OriginalWeightsUnavailable(
            f"The original weights of {type(self._model).__name__} can't be read from {self._describe()}: {reason}. "
            "They are read from the safetensors files in the folder or Hub repository that the model was loaded from."
        )

    def _describe(self) -> str:
        if not self._path:
            return "a checkpoint"
        if os.path.isdir(self._path):
            return f"the folder {self._path!r}"
        revision = f" at revision {self._revision}" if self._revision else ""
        reach = "offline" if is_offline_mode() else "and on the Hub"
        return (
            f"{self._path!r}{revision} (no folder; as a Hub repository in the cache {constants.HF_HUB_CACHE}, {reach})"
        )


def name_keys(model: nn.Module, keys: list[str], is_own: bool) -> dict[str, _Source]:
    """Map the checkpoint's keys to the model's names as `from_pretrained` does.

    Args:
        model: the transformers model, with or without values.
        keys: names of the tensors in the checkpoint.
        is_own: whether the model was loaded from it.
    """
    recorded = getattr(model, "_weight_conversions", None) if is_own else None  # has the key_mapping of the user, too
    conversions = get_model_conversion_mapping(model) if recorded is None else recorded  # type: ignore[arg-type]
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    prefix = getattr(model, "base_model_prefix", None)
    known: dict[str, Any] = {**dict.fromkeys(_weights_as_codes(model), True), **_base_tensors(model)}
    named: dict[str, list[str]] = {}
    converted: dict[str, str] = {}
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:  # as in transformers: it should not have been renamed
            name, pattern = rename_source_key(key, [], [], prefix, known)
        for target, conversion in _targets(name, pattern, converters).items():
            named.setdefault(target, []).append(key)
            if conversion:
                converted[target] = conversion
    return {name: _Source(tuple(found), converted.get(name)) for name, found in named.items()}


def _targets(name: str, pattern: str | None, converters: list[WeightConverter]) -> dict[str, str | None]:
    """Names of the tensors that a key contributes to -> the operations of their conversion, if there are any."""
    if pattern is None:
        return {name: None}
    converter = next(entry for entry in converters if pattern in entry.source_patterns)
    operations = ", ".join(type(operation).__name__ for operation in converter.operations)
    return {name.replace(converter.target_patterns[0], target): operations for target in converter.target_patterns}


def _base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers under the names that they have in the model without adapters."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {_base_name(name): tensor for name, tensor in tensors}


def _weights_as_codes(model: nn.Module) -> set[str]:
    """Names of the weights that quantized linears hold as codes under other names."""
    return {f"{_base_name(name)}.weight" for name, module in model.named_modules() if is_quantized(module)}


def _base_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _unmerged_vectors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Norms and biases that no merged adapter has changed."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)]
    merged = tuple(f"{_base_name(name)}." for name, layer in layers if layer.merged)
    return {
        name: tensor
        for name, tensor in _base_tensors(model).items()
        if tensor.ndim == 1 and tensor.is_floating_point() and not tensor.is_meta and not name.startswith(merged)
    }


def _are_close(original: torch.Tensor, loaded: torch.Tensor) -> bool:
    if original.shape != loaded.shape:
        return False
    return torch.allclose(loaded.detach().cpu().float(), original.float(), rtol=DTYPE_TOLERANCE, atol=1e-6)
