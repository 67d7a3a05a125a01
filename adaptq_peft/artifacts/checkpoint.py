"""Checks of a saved adapter: PEFT itself loads a file with missing, extra or broken tensors without a word."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Collection, Mapping

import torch

#: In the names of the tensors of quantized layers, which are not trained.
FROZEN_KEY = ".adaptq_frozen."
_DELTA_KEY = ".adaptq_delta."


def check_weights_file(path: str | os.PathLike[str], what: str = "adapter") -> None:
    """Check that a safetensors file is complete, from its header alone.

    Args:
        path: the file.
        what: what it holds, for the message.

    Raises:
        ValueError: if the file is shorter or longer than its header says, or has no readable header.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        prefix = file.read(8)
        header_size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        header = file.read(header_size) if 8 + header_size <= size else b""
    try:
        tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        expected = 8 + header_size + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{os.fspath(path)!r} ({size} bytes) has no readable safetensors header: it is truncated or is not a "
            f"safetensors file. Copy or save the {what} again."
        ) from error
    if expected != size:
        raise ValueError(
            f"{os.fspath(path)!r} is {size} bytes and its header describes {expected}: it is truncated or damaged. "
            f"Copy or save the {what} again."
        )


def check_adapter_tensors(
    expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], others: Collection[str]
) -> None:
    """Compare the tensors of an adapter file with the parameters that they are loaded into.

    Args:
        expected: name in the file -> the delta in the model.
        found: name in the file -> tensor in the file.
        others: names in `found` that belong to other parts of the model, such as `modules_to_save`.

    Raises:
        ValueError: if a tensor is missing, extra, wrongly shaped or not finite. All faults are named.
    """
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected and name not in others]
    both = [name for name in expected if name in found]
    shapes = [
        f"{name} is {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in both
        if found[name].shape != expected[name].shape
    ]
    not_finite = [name for name in both if not torch.isfinite(found[name]).all()]
    faults = [
        f"{len(names)} tensors {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for what, names in (
            ("are missing", missing),
            ("are not part of this adapter", extra),
            ("have another shape", shapes),
            ("hold values that are not finite", not_finite),
        )
        if names
    ]
    if not faults:
        return
    if missing and extra:
        faults.append(f"the file has deltas for blocks {_blocks(found)}, and this adapter adapts {_blocks(expected)}")
    if any("_orig_mod." in name for name in (*missing, *extra)):
        faults.append("names with _orig_mod are of an adapter on torch.compile(base): compile the PeftModel instead")
    raise ValueError(
        "The adapter file does not fit the model and its adapter_config.json:\n"
        + "\n".join(f"- {fault}" for fault in faults)
        + "\nNothing was loaded. Use the file and the config that were saved together."
    )


def _blocks(names: Collection[str]) -> list[int]:
    numbers = {re.search(r"\.(\d+)\.", name) for name in names if _DELTA_KEY in name}
    return sorted({int(number.group(1)) for number in numbers if number})
