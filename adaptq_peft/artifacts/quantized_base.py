"""A quantized base that several adapters share: one safetensors file of calibrated codes, written, opened and checked.

`<linear>.weight` holds the packed codes, `<linear>.weight.absmax` and so on the scales, as in bitsandbytes' own state
dict. What they are of, and how they were made, is JSON in the file's header.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from huggingface_hub.utils.sha import sha_fileobj
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from ..fingerprint import check_base, fingerprint_base, sample_weights
from ..quantization import QuantizationSettings, load_quantized, origin_of
from ..selection import Block
from .checkpoint import check_weights_file

FILE_NAME = "quantized_base.safetensors"
FORMAT_VERSION = 1
_HEADER_KEY = "adaptq_quantized_base"


@dataclass
class QuantizedBaseReference:
    """Where a shared quantized base is. Once opened, two references are equal if they are to the same file content.

    Args:
        name_or_path: folder or Hub repository. The file may move: set another place here, the content is checked.
        revision: branch, tag or commit of a Hub repository. `None` (default): its default branch. Once the base was
            opened: the commit.
        sha256: of the file, in hexadecimal digits; filled in when the base is opened. Only that content is accepted.
    """

    name_or_path: str = field(compare=False)
    revision: str | None = field(default=None, compare=False)
    sha256: str | None = None


@dataclass(frozen=True)
class BaseDescription:
    """What the header of the file says.

    Args:
        quant_type: "nf4" or "fp4".
        nested_absmax: whether the scales are quantized too.
        calibration: "method", "text" (names of the kinds of text) and "tokens".
        fingerprint: of the base model, without its linears: `fingerprint_base` with no adapted block.
        weights: name of the weight of each linear in the file -> a sample of its original values.
        plain: dotted name of each linear that was rounded plainly -> why.
        version: of this format.
    """

    quant_type: str
    nested_absmax: bool
    calibration: dict[str, Any]
    fingerprint: dict[str, Any]
    weights: dict[str, str]
    plain: dict[str, str]
    version: int = FORMAT_VERSION


def write_quantized_base(
    folder: str | os.PathLike[str], layers: Mapping[str, nn.Module], description: BaseDescription
) -> None:
    """Write the file, atomically: a crash leaves the previous one.

    Args:
        folder: where; made if it is not there.
        layers: dotted name of each linear in the base model -> `Linear4bit` with its codes. Biases are not written.
        description: what the header says.
    """
    tensors = {
        f"{name}.{key}": tensor.cpu().clone() if key.endswith("quant_map") else tensor.cpu()  # tables are shared
        for name, layer in layers.items()
        for key, tensor in layer.state_dict().items()
        if key.startswith("weight")
    }
    header = {"format": "pt", _HEADER_KEY: json.dumps(asdict(description), sort_keys=True)}
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".adaptq-") as staging:
        save_file(tensors, os.path.join(staging, FILE_NAME), metadata=header)
        os.replace(os.path.join(staging, FILE_NAME), os.path.join(folder, FILE_NAME))


class QuantizedBase:
    """An open quantized base.

    Args:
        reference: where it is, and if a saved adapter refers to it, which content it has to have.

    Attributes:
        reference: with the commit and the sha256 filled in.
        description: what its header says.
        num_bytes: size of the file.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the file is truncated, is not the one that was saved, or has another version.
    """

    def __init__(self, reference: QuantizedBaseReference) -> None:
        path = _find(reference)
        check_weights_file(path, "quantized base")
        self.num_bytes = os.path.getsize(path)
        with open(path, "rb") as content:
            digest = sha_fileobj(content).hex()
        if reference.sha256 not in (None, digest):
            raise ValueError(
                f"{path!r} has changed since the adapter was saved: its SHA-256 is {digest[:16]}... instead of "
                f"{str(reference.sha256)[:16]}... The adapter was trained on other codes; put the former file back, "
                "or set quantized_base.name_or_path of the adapter's config to where it is."
            )
        is_on_hub = not os.path.isdir(reference.name_or_path)
        commit = extract_commit_hash(path, None) if is_on_hub else None
        self.reference = replace(reference, revision=commit or reference.revision, sha256=digest)
        self._file: Any = safe_open(path, framework="pt", device="cpu", backend="pread")  # no pages stay mapped
        self.description = _read_description(path, self._file.metadata() or {})
        self._names: dict[str, list[str]] = {}
        for key in self._file.keys():  # noqa: SIM118  # not a dict
            name, _, rest = key.rpartition(".weight")
            self._names.setdefault(name, []).append(f"weight{rest}")

    def check(self, model: nn.Module, blocks: Sequence[Block], settings: QuantizationSettings) -> None:
        """Check that the codes are of this model, and are what its config asks for.

        Norms are compared, and the weights of all linears that are not quantized on the model.

        Raises:
            ValueError: if they are of another base, or were made with other settings.
        """
        about = self.description
        made = QuantizationSettings(bits=4, quant_type=about.quant_type, nested_absmax=about.nested_absmax)
        if not made.same_codes(settings):
            raise ValueError(
                f"the quantized base {self.reference.name_or_path!r} is in {made.describe()}, and the adapter's "
                f"quantization asks for {settings.describe()}. Give AdaptQConfig the quantization that the base has."
            )
        found = fingerprint_base(model, list(blocks), ())
        here = sample_weights(model, {name.rpartition(".")[0] for name in about.weights})
        if found is None:
            return
        both = {name: sample for name, sample in about.weights.items() if name in here}
        check_base(
            {**about.fingerprint, "samples": about.fingerprint["samples"] | both},
            {**found, "samples": found["samples"] | here},
            f"quantized base ({self.reference.name_or_path!r})",
            "Load that model, or make a quantized base of this one: adaptq quantize-base.",
        )

    def load_into(self, name: str, layer: nn.Module) -> None:
        """Give a `Linear4bit` the codes and scales of the base.

        Args:
            name: dotted name of the linear in the base model.
            layer: the layer, changed in place; its bias stays.

        Raises:
            ValueError: if the base has no such linear, or one of another shape.
        """
        if name not in self._names:
            raise ValueError(
                f"the quantized base {self.reference.name_or_path!r} has no codes of {name}, which this adapter "
                f"freezes. It has {len(self._names)} linears, the last is {list(self._names)[-1]}. Adapt that block, "
                "or make a base that has it: adaptq quantize-base without --blocks."
            )
        target: Any = layer
        tensors = {key: self._file.get_tensor(f"{name}.{key}") for key in self._names[name]}
        codes = tensors["weight"].flatten().view(torch.uint8)
        if codes.numel() != target.weight.data.numel() * target.weight.data.element_size():
            raise ValueError(
                f"the quantized base {self.reference.name_or_path!r} has {codes.numel()} bytes of codes of {name}, "
                f"and the model's linear is [{target.out_features}, {target.in_features}]"
            )
        tensors["weight"] = codes.view(target.weight.dtype).view_as(target.weight)
        origin = origin_of(layer)
        load_quantized(layer, tensors)
        target.weight.quant_state.dtype = origin.dtype  # in which this model has its weights
        target.adaptq_origin = replace(origin, calibrated=True)


def _find(reference: QuantizedBaseReference) -> str:
    """Path of the file: in the folder, in the Hub's cache, or downloaded into it."""
    name = reference.name_or_path
    try:
        path = cached_file(name, FILE_NAME, revision=reference.revision)
    except OSError as error:
        raise FileNotFoundError(
            f"there is no quantized base {name!r}: neither a folder with {FILE_NAME} nor a Hub repository that has it "
            f"({error}). `adaptq quantize-base MODEL --output FOLDER` makes one. If a saved adapter's was moved, load "
            "its config, set quantized_base.name_or_path, and pass the config to PeftModel.from_pretrained."
        ) from error
    assert path is not None  # cached_file raises
    return path


def _read_description(path: str, header: Mapping[str, str]) -> BaseDescription:
    if _HEADER_KEY not in header:
        raise ValueError(f"{path!r} is no quantized base: its header has no {_HEADER_KEY!r}")
    about: dict[str, Any] = json.loads(header[_HEADER_KEY])
    if about.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{path!r} has version {about.get('version')!r} of the quantized base's format, and this adaptq_peft "
            f"reads version {FORMAT_VERSION}; run `pip install -U adaptq_peft`, or make the base again"
        )
    return BaseDescription(**about)
