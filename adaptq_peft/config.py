"""`AdaptQConfig`: every choice of the method in one dataclass that is valid once it is built."""

from __future__ import annotations

import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from transformers import BitsAndBytesConfig, HqqConfig

from .artifacts.certified_deltas import are_certified
from .artifacts.checkpoint import check_weights_file
from .artifacts.model_card import CERTIFIED, STAGES, update_model_card
from .artifacts.quantized_base import QuantizedBaseReference
from .quantization import ORIGINAL_WEIGHTS, QUANTIZATION_NAMES, names_checkpoint, resolve_quantization
from .quantization.calibrated import CALIBRATION_METHODS
from .quantization.precision_plan import PRECISIONS, weight_budget_bytes
from .registration import ensure_peft_type
from .selection import ActivationProfile, selection_strategy_names, strategy_needs_general_profile
from .selection.samples import reread

FORMAT_VERSION = 1
DELTA_DTYPES = ("float32", "bfloat16", "float16")
FROZEN_RANK_INITS = ("zero", "svd")

#: Given at run time, used once, and never part of `to_dict`, JSON, a pickle or a deepcopy.
RUNTIME_FIELDS = ("calibration_data", "general_calibration_data", "calibration_tokenizer")


class Calibration(NamedTuple):
    """What a config was given to profile with, in the order of `RUNTIME_FIELDS`."""

    data: Any
    general_data: Any
    tokenizer: Any


@dataclass
class AdaptQConfig(PeftConfig):
    """Configuration of ADAPTQ: full-rank deltas on K transformer blocks, the linears of all other blocks in 4 bits.

    Use it where a script uses `LoraConfig`: `get_peft_model(model, AdaptQConfig(task_type="CAUSAL_LM"))`. After
    `get_peft_model` the config holds what was resolved: `layers_to_transform`, `profile` and `base_fingerprint`. Used
    again, it makes another adapter on the same blocks; for other blocks make a new one.
    The defaults are those that did better than the paper's method on both texts of a comparison at LoRA's usual rate
    (docs/study.md). The paper's method is `AdaptQConfig(selection_strategy="activation", frozen_rank=0)`.

    Args:
        selection_ratio: alpha in (0, 1]: K = floor(alpha * L) of the L blocks are adapted, at least 1. Default 0.5.
        num_adapted_blocks: K itself, between 1 and L. `None` (default) computes it from `selection_ratio`.
        selection_strategy: which blocks: a name in the registry of `adaptq_peft.selection` ("activation", "update",
            "contrast", "sensitivity", "activation+sensitivity", "random", "first", "last", or your own). Default
            "update": blocks that change their input most, relative to it. "activation" is the paper's rule.
        selection_seed: seed of the strategy "random". Default 0.
        layers_to_transform: explicit block indices (0-based, an int or a list). Skips the profile and the strategy.
            Holds the adapted blocks once the adapter is made.
        layers_pattern: dotted name, or its end, of the `ModuleList` of blocks, or a list of such names, where they
            can't be found.
        target_modules: `None` (default): every parameter of the adapted blocks gets a delta. Else, as in other PEFT
            methods, only the modules with these names (a list of suffixes, a regex or "all-linear"), within the
            adapted blocks. Names that occur in some blocks only choose those blocks, where nothing else does. On a
            model without blocks the matching modules get deltas and nothing is profiled.
        exclude_modules: module names (a list of suffixes, or a regex) that get no delta and are not quantized.
        modules_to_save: modules outside the blocks that are trained and saved whole, as in other PEFT methods.
        trainable_token_indices: rows of the embedding that are trained, as in `LoraConfig`.
        init_weights: `True` (default): deltas start at zero, so training starts at the base model. `False`: deltas
            start random with standard deviation 0.02, for tests only.
        calibration_data: domain data that is profiled: `list[str]`, `list[dict]` (with "text", "messages" or
            "input_ids"), a `datasets.Dataset`, a `DataLoader`, or the path of a .txt, .json or .jsonl file. Runtime
            only. `None` (default): the model writes its own calibration text, with a warning.
        general_calibration_data: general data, in the same forms, for strategies that compare, calibrated rounding
            and predicted rises of the loss. Runtime only.
        calibration_tokenizer: tokenizer for texts. Runtime only. `None`: that of the model's `name_or_path`.
        calibration_samples: how many samples are profiled at most. Default 100.
        calibration_max_length: tokens a sample is cut to, unless it holds an image or the like. Default 512.
        calibration_batch_size: samples in one forward pass of the profile. Default 8.
        profile: an `ActivationProfile` made before by `profile_activations`, or the path of one that its `save` or
            `adaptq profile` wrote; nothing is profiled then.
        quantization: how the linears of the frozen blocks are stored: "nf4" (default), "fp4", "int8", "none", or a
            `transformers.BitsAndBytesConfig`. The names mean bitsandbytes with nested absmax (double quantization).
            "hqq4", "hqq3", "hqq2" or a `transformers.HqqConfig`: HQQ with groups of 64, 4.5, 3.7 and 2.5 bits a weight
            with their scales; needs `pip install "adaptq_peft[hqq]"`. Its codes are saved with the adapter.
            "auto": each linear gets "nf4", "int8" or "none", by a plan within `weight_budget` or by `precision`.
        quantization_calibration: how the codes of the frozen blocks are chosen. `None` (default): plain rounding.
            "auto", "absmax", "gptq", "descent" or "asymmetric": calibrated on `calibration_data`,
            `general_calibration_data` and text that the model writes itself. The codes are saved with the adapter.
        quantized_base: folder or Hub repository of calibrated codes that several adapters share, as `quantize_base` or
            `adaptq quantize-base` writes it; the linears of the frozen blocks take theirs from there. A
            `QuantizedBaseReference` names a revision, too. The saved adapter holds the reference, with the file's
            SHA-256. `None` (default): codes are made here.
        weight_budget: with quantization "auto", what the weights of the frozen blocks' linears may take with their
            scales: bytes as an integer, "1.5GiB" or "700MB", or bits a weight on average, "5.0 bits". Embeddings,
            norms, adapted blocks and linears that can't be quantized do not count.
        precision: with quantization "auto", dotted name of each linear -> "nf4", "int8" or "none". Skips the
            measurement. Holds the plan for the linears of the frozen blocks once the adapter is made.
        original_weights: where the original weights of a linear come from that is quantized already: because the model
            arrived in 4 bits, another adapter on it has frozen that block, or `unload()` takes all adapters off.
            "checkpoint" (default): the safetensors checkpoint of the model, local or in the Hub's cache, tensor by
            tensor. "keep": this adapter keeps the originals of what it quantizes, in the memory that they are in.
            "dequantized": none; adapted blocks start from their dequantized weights. A folder or the Hub repository
            "owner/name": the 16-bit checkpoint to read instead of the model's own, for a model that was loaded from a
            checkpoint in GPTQ.
        delta_scaling: s in W = W0 + s * delta, > 0. Adam moves W by learning rate x s, so the default 0.25 turns the
            usual LoRA rate 2e-4 into the full-rank rate 5e-5.
        delta_dtype: "float32", "bfloat16" or "float16". `None` (default): PEFT's rule, float32 unless the model is
            wrapped with `autocast_adapter_dtype=False`, then the dtype of the base weight. Of corrections, too.
        frozen_rank: r > 0 gives each linear of the frozen blocks that is quantized (with quantization "none": that
            would be) a trainable correction of this rank, scale * B A, as LoRA: mixed rank. `target_modules` narrows
            the choice there, too. Default 8. 0: frozen blocks are not trained, as in the paper, and those below the
            lowest adapted block cost no backward pass.
        frozen_alpha: the scale of corrections is frozen_alpha / frozen_rank, as LoRA's `lora_alpha` / `r`. `None`
            (default): twice the rank, so the scale is 2 at each rank and LoRA's usual learning rates fit.
        frozen_rank_init: "zero" (default): B starts at zero, so training starts at the quantized base. "svd": B A
            starts as the nearest one to what quantization took away, so training starts closer to the original model.
            It needs the original weights, and has no effect where a saved adapter is loaded.
        evaluation: measured perplexities, for the model card: {"general": {"text": "WikiText-2 test", "base": 25.6,
            "quantized": 28.6, "adapted": 26.2}, ...}. "text" says on what; any of the four may be left out. Nothing
            fills it in but you and `adaptq demo`.
        certificate: what `fit_to_budget` found: the budget that the adapter holds, the measured degradation, its upper
            bound and confidence, the split, the documents, lambda, the factor of each block, and a sample of the
            deltas that it holds for. Filled in. `None` if a file is loaded that has other deltas, as after further
            training.
        base_fingerprint: identifies the base model that the adapter was made for; filled in by `get_peft_model`.
        adaptq_version: version of the saved format; filled in.

    Raises:
        ValueError: if any field is invalid. All faults are reported in one message.
    """

    selection_ratio: float = 0.5
    num_adapted_blocks: int | None = None
    selection_strategy: str = "update"
    selection_seed: int = 0
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    target_modules: set[str] | list[str] | str | None = None
    exclude_modules: set[str] | list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    init_weights: bool = True
    calibration_data: InitVar[Any] = None
    general_calibration_data: InitVar[Any] = None
    calibration_tokenizer: InitVar[Any] = None
    calibration_samples: int = 100
    calibration_max_length: int = 512
    calibration_batch_size: int = 8
    profile: ActivationProfile | None = None  # or a path, read at once
    quantization: str | dict | BitsAndBytesConfig | HqqConfig = "nf4"
    quantization_calibration: str | None = None
    quantized_base: QuantizedBaseReference | str | dict | None = None
    weight_budget: int | str | None = None
    precision: dict[str, str] | None = None
    original_weights: str = "checkpoint"
    delta_scaling: float = 0.25
    delta_dtype: str | None = None
    frozen_rank: int = 8
    frozen_alpha: float | None = None
    frozen_rank_init: str = "zero"
    evaluation: dict | None = None
    certificate: dict | None = None
    base_fingerprint: dict | None = None
    adaptq_version: int = field(default=FORMAT_VERSION)

    #: Whether `from_pretrained` made this config: the values of its adapter are about to be loaded. Not a field.
    is_from_file = False
    #: Whether an adapter was made with this object, or the one that it was copied from, in this process. Not a field.
    is_made_here = False

    def __post_init__(  # type: ignore[override]
        self, calibration_data: Any, general_calibration_data: Any, calibration_tokenizer: Any
    ) -> None:
        super().__post_init__()
        self.peft_type = ensure_peft_type()
        given = (*map(reread, (calibration_data, general_calibration_data)), calibration_tokenizer)
        vars(self).update(zip(RUNTIME_FIELDS, given, strict=True))
        self._normalize()
        faults = [fault for check in _CHECKS for fault in check(self)]
        if faults:
            raise ValueError("AdaptQConfig is not valid:\n" + "\n".join(f"- {fault}" for fault in faults))

    def _normalize(self) -> None:
        """Bring the forms that a field may take into the one that is stored: JSON types and `ActivationProfile`."""
        if isinstance(self.layers_to_transform, (list, tuple, set, range)):
            indices = list(self.layers_to_transform)
            self.layers_to_transform = sorted(indices) if all(type(index) is int for index in indices) else indices
        if isinstance(self.target_modules, (list, tuple)):  # sets, as in other PEFT methods
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)
        if isinstance(self.modules_to_save, str):
            self.modules_to_save = [self.modules_to_save]
        if isinstance(self.delta_dtype, torch.dtype):
            self.delta_dtype = str(self.delta_dtype).removeprefix("torch.")
        if isinstance(self.quantization, (BitsAndBytesConfig, HqqConfig)):
            self.quantization = self.quantization.to_dict()
        if isinstance(self.original_weights, os.PathLike):
            self.original_weights = os.fspath(self.original_weights)
        if isinstance(self.quantized_base, (str, os.PathLike)):
            self.quantized_base = QuantizedBaseReference(os.fspath(self.quantized_base))
        with suppress(TypeError):  # other keys than theirs: the checks say so
            if isinstance(self.quantized_base, dict):
                self.quantized_base = QuantizedBaseReference(**self.quantized_base)
        with suppress(TypeError):
            if isinstance(self.profile, dict):
                self.profile = ActivationProfile(**self.profile)
        with suppress(OSError, ValueError):
            if isinstance(self.profile, (str, os.PathLike)):
                self.profile = ActivationProfile.load(self.profile)

    @property
    def frozen_scaling(self) -> float:
        """The scale of B A in a low-rank correction."""
        return 2.0 if self.frozen_alpha is None else self.frozen_alpha / self.frozen_rank

    @property
    def is_saved(self) -> bool:
        """Whether the adapter was saved before, so that its codes are in its file and not made anew."""
        return self.base_fingerprint is not None and not self.is_made_here

    @property
    def calibration(self) -> Calibration:
        """The runtime-only fields; all `None` after a load or a copy."""
        return Calibration(*(getattr(self, name) for name in RUNTIME_FIELDS))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in RUNTIME_FIELDS}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> AdaptQConfig:
        """As in PEFT. The weights beside the config are checked to be complete, before a model is prepared for them.

        They are those in the folder or, for a name on the Hub, in the cache: nothing is downloaded for the check.

        Raises:
            ValueError: if there is no config, it is not valid, or the weights file is truncated.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        name = os.path.join(subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        weights = os.path.join(pretrained_model_name_or_path, name)
        if not os.path.isdir(pretrained_model_name_or_path):
            where = {key: kwargs.get(key) for key in ("cache_dir", "revision", "repo_type")}
            cached = try_to_load_from_cache(pretrained_model_name_or_path, name, **where)
            weights = cached if isinstance(cached, str) else weights
        if os.path.isfile(weights):
            check_weights_file(weights)
        certificate = getattr(config, "certificate", None)  # the file may be of another method
        if certificate and not are_certified(vars(config), Path(weights)):
            warnings.warn(
                f"The deltas in {weights!r} are not those that fit_to_budget certified: they or their scale were "
                "changed since, or they are pickled and not compared. Their certificate is dropped; call "
                "fit_to_budget again for one.",
                stacklevel=2,
            )
            config.certificate = None
        config.is_from_file = True
        return config

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """What a file holds, as PEFT asks for it: one without `frozen_rank` is from before there were corrections."""
        return {"frozen_rank": 0, **super().check_kwargs(**kwargs)}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json` into `save_directory`, atomically: a crash leaves the previous file.

        If the weights lie there, the section about the adapter in README.md is brought up to date.

        Raises:
            ValueError: if `evaluation` or `certificate` is not in the form that is documented above.
        """
        faults = [*_check_evaluation(self), *_check_certificate(self)]  # are filled in late
        if faults:
            raise ValueError(f"the config can't be saved: {faults[0]}")
        os.makedirs(save_directory, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=save_directory, prefix=".adaptq-") as staging:
            super().save_pretrained(staging, **kwargs)
            os.replace(os.path.join(staging, CONFIG_NAME), os.path.join(save_directory, CONFIG_NAME))
        update_model_card(save_directory)
        safe, pickled = (Path(save_directory, name) for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))
        if safe.is_file() and pickled.is_file() and safe.stat().st_mtime_ns < pickled.stat().st_mtime_ns:
            warnings.warn(
                f"{str(pickled)!r} was just saved, and PEFT will load the older {SAFETENSORS_WEIGHTS_NAME} beside it. "
                "Remove that file, or save without safe_serialization=False.",
                stacklevel=2,
            )


def _check_count(config: AdaptQConfig) -> Iterator[str]:
    count = config.num_adapted_blocks
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        yield f"num_adapted_blocks is {count!r}; allowed: None or an integer from 1 to the number of blocks"


def _check_ratio(config: AdaptQConfig) -> Iterator[str]:
    ratio = config.selection_ratio
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
        yield f"selection_ratio is {ratio!r}; allowed: a number above 0 and at most 1"


def _check_strategy(config: AdaptQConfig) -> Iterator[str]:
    if config.layers_to_transform is not None:  # chosen already, maybe by a strategy that only its author has
        return
    names = selection_strategy_names()
    if config.selection_strategy not in names:
        yield (
            f"selection_strategy is {config.selection_strategy!r}; registered are {names}; add your own with "
            "adaptq_peft.register_selection_strategy"
        )
    elif (
        strategy_needs_general_profile(config.selection_strategy)
        and config.calibration.general_data is None
        and getattr(config.profile, "general_magnitude", None) is None
    ):
        yield (
            f"selection_strategy {config.selection_strategy!r} compares domain data with general data; pass "
            "general_calibration_data too, or a profile made with general data"
        )


def _check_seed(config: AdaptQConfig) -> Iterator[str]:
    if type(config.selection_seed) is not int:
        yield f"selection_seed is {config.selection_seed!r}; allowed: an integer"


def _check_names(config: AdaptQConfig) -> Iterator[str]:
    for name in ("layers_pattern", "target_modules", "exclude_modules", "modules_to_save"):
        value = getattr(config, name)
        names = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(names, (list, set, tuple)) or not all(isinstance(entry, str) for entry in names):
            yield f"{name} is {value!r}; allowed: None, a name, or a list of names"
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        try:
            re.compile(value if isinstance(value, str) else "")
        except re.error as error:
            yield f"{name} is {value!r}, which is no regular expression: {error}; give one, or a list of names"


def _check_init_weights(config: AdaptQConfig) -> Iterator[str]:
    if not isinstance(config.init_weights, bool):
        yield f"init_weights is {config.init_weights!r}; allowed: True (zero) or False (random, for tests)"


def _check_layers(config: AdaptQConfig) -> Iterator[str]:
    layers = config.layers_to_transform
    if layers is None:
        return
    layers = [layers] if type(layers) is int else layers
    integers = isinstance(layers, list) and all(type(index) is int and index >= 0 for index in layers)
    if not isinstance(layers, list) or not integers or not layers or len(set(layers)) != len(layers):
        yield (
            f"layers_to_transform is {config.layers_to_transform!r}; allowed: a list of different block indices, each "
            "0 or more"
        )


def _check_calibration(config: AdaptQConfig) -> Iterator[str]:
    for name in ("calibration_samples", "calibration_max_length", "calibration_batch_size"):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            yield f"{name} is {value!r}; allowed: an integer of 1 or more"
    tokenizer = config.calibration.tokenizer
    if tokenizer is not None and not callable(tokenizer):
        yield (
            f"calibration_tokenizer is {tokenizer!r}; allowed: None, or a tokenizer, as AutoTokenizer.from_pretrained "
            "returns it"
        )


def _check_profile(config: AdaptQConfig) -> Iterator[str]:
    if isinstance(config.profile, (str, os.PathLike)):
        try:
            ActivationProfile.load(config.profile)
        except (OSError, ValueError) as error:
            yield f"profile can't be read: {error}"
    elif config.profile is not None and not isinstance(config.profile, ActivationProfile):
        yield f"profile is a {type(config.profile).__name__}; pass what profile_activations returned"


def _check_quantization(config: AdaptQConfig) -> Iterator[str]:
    if isinstance(config.quantization, dict):
        try:
            resolve_quantization(config.quantization)
        except ValueError as error:
            yield str(error)
        return
    if config.quantization in (*QUANTIZATION_NAMES, "auto"):
        return
    yield (
        f"quantization is {config.quantization!r}; allowed: {[*QUANTIZATION_NAMES, 'auto']}, a "
        "transformers.BitsAndBytesConfig or a transformers.HqqConfig"
    )


def _check_precision(config: AdaptQConfig) -> Iterator[str]:
    budget, precision = config.weight_budget, config.precision
    if config.quantization != "auto":
        if budget is not None or precision is not None:
            yield f"weight_budget and precision are for quantization 'auto'; quantization is {config.quantization!r}"
        return
    if budget is None and precision is None:
        yield 'quantization "auto" needs a weight_budget, such as "5.0 bits" or "1.5GiB", or precision'
    if config.original_weights == "dequantized":
        yield 'original_weights "dequantized" rounds adapted blocks, too, for which quantization "auto" plans nothing'
    if budget is not None:
        try:
            weight_budget_bytes(budget, num_weights=1)
        except ValueError as error:
            yield str(error)
    is_dict = precision is None or isinstance(precision, dict)
    wrong = [form for form in (precision or {}).values() if form not in PRECISIONS] if is_dict else [precision]
    if wrong:
        yield f"precision has {wrong[0]!r}; allowed: None or a dict, names of linears to one of {list(PRECISIONS)}"


def _check_quantization_calibration(config: AdaptQConfig) -> Iterator[str]:
    method, allowed = config.quantization_calibration, ["auto", *CALIBRATION_METHODS]
    if method is not None and method not in allowed:
        yield f"quantization_calibration is {method!r}; allowed: None or one of {allowed}"
    elif method is not None and _is_not_calibrated(config):
        yield (
            f"quantization_calibration is {method!r} and needs 4 bits by bitsandbytes; quantization is "
            f"{config.quantization!r}"
        )


def _is_not_calibrated(config: AdaptQConfig) -> bool:
    if any(_check_quantization(config)):
        return False  # said already
    settings = resolve_quantization(config.quantization)
    return settings is None or settings.bits != 4 or settings.backend != "bitsandbytes"


def _check_quantized_base(config: AdaptQConfig) -> Iterator[str]:
    if config.quantized_base is None:
        return
    if not isinstance(config.quantized_base, QuantizedBaseReference):
        yield f"quantized_base is {config.quantized_base!r}; allowed: None, a folder, a Hub repository or a reference"
    if config.quantization_calibration is not None:
        yield (
            f"quantized_base holds calibrated codes, and quantization_calibration is "
            f"{config.quantization_calibration!r}; leave that out"
        )
    if config.quantization == "auto" or _is_not_calibrated(config):
        yield f"quantized_base holds 4-bit codes, and quantization is {config.quantization!r}; leave one of them out"
    if config.original_weights == "dequantized":
        yield 'quantized_base is for frozen blocks, and original_weights "dequantized" rounds adapted ones; choose one'


def _check_original_weights(config: AdaptQConfig) -> Iterator[str]:
    if config.original_weights not in ORIGINAL_WEIGHTS and not names_checkpoint(config.original_weights):
        yield (
            f"original_weights is {config.original_weights!r}; allowed: {list(ORIGINAL_WEIGHTS)}, a folder, or a Hub "
            'repository as "owner/name"'
        )
    elif config.original_weights == "dequantized" and config.quantization == "none":
        yield 'original_weights "dequantized" rounds adapted blocks, too: it needs a quantization other than "none"'
    elif config.original_weights == "dequantized" and not any(_check_quantization(config)):
        settings = resolve_quantization(config.quantization)
        if settings is not None and not settings.rounds_alike_everywhere:
            yield (
                'original_weights "dequantized" rounds adapted blocks, too, at each load, and '
                f'{settings.describe()} depends on the machine; use bitsandbytes, such as quantization "nf4"'
            )


def _check_scaling(config: AdaptQConfig) -> Iterator[str]:
    scaling = config.delta_scaling
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)) or not 0 < scaling < math.inf:
        yield f"delta_scaling is {scaling!r}; allowed: a finite number above 0"


def _check_dtype(config: AdaptQConfig) -> Iterator[str]:
    if config.delta_dtype is not None and config.delta_dtype not in DELTA_DTYPES:
        yield f"delta_dtype is {config.delta_dtype!r}; allowed: None or one of {list(DELTA_DTYPES)}"


def _check_frozen_rank(config: AdaptQConfig) -> Iterator[str]:
    rank, alpha, init = config.frozen_rank, config.frozen_alpha, config.frozen_rank_init
    if type(rank) is not int or rank < 0:
        yield f"frozen_rank is {rank!r}; allowed: 0 (no corrections) or an integer of 1 or more"
        return
    if alpha is not None and (type(alpha) not in (int, float) or not 0 < alpha < math.inf):
        yield f"frozen_alpha is {alpha!r}; allowed: None (2 * frozen_rank) or a finite number above 0"
    if init not in FROZEN_RANK_INITS:
        yield f"frozen_rank_init is {init!r}; allowed: {list(FROZEN_RANK_INITS)}"
    if rank == 0 and (alpha is not None or init != "zero"):
        yield "frozen_rank is 0, so frozen_alpha and frozen_rank_init do nothing; set frozen_rank or leave them out"


def _check_rounding_repair(config: AdaptQConfig) -> Iterator[str]:
    if config.frozen_rank_init != "svd":
        return
    if config.quantization == "none":
        yield 'frozen_rank_init "svd" repairs quantization, and quantization is "none"; use "zero"'
    if config.original_weights == "dequantized":
        yield 'frozen_rank_init "svd" needs original weights, and original_weights is "dequantized"; use "zero"'


def _check_evaluation(config: AdaptQConfig) -> Iterator[str]:
    if config.evaluation is None:
        return
    entries = config.evaluation.values() if isinstance(config.evaluation, dict) else [None]
    if not all(isinstance(entry, dict) and _is_measurement(entry) for entry in entries):
        yield (
            f"evaluation is {config.evaluation!r}; allowed: None or a dict such as "
            '{"general": {"text": "WikiText-2 test", "base": 25.6, "quantized": 28.6, "adapted": 26.2}}, with finite '
            "perplexities of 1 or more"
        )


def _is_measurement(entry: dict) -> bool:
    figures = [value for key, value in entry.items() if key in STAGES]
    numbers = all(type(value) in (int, float) and 1 <= value < math.inf for value in figures)
    return bool(figures) and numbers and set(entry) <= {"text", *STAGES} and isinstance(entry.get("text", ""), str)


def _check_certificate(config: AdaptQConfig) -> Iterator[str]:
    certificate = config.certificate
    if certificate is None:
        return
    figures = [certificate.get(name) for name in CERTIFIED] if isinstance(certificate, dict) else [None]
    if not all(isinstance(figure, (int, float)) and math.isfinite(figure) for figure in figures):
        yield f"certificate is {certificate!r}; allowed: None or what fit_to_budget made, with numbers for {CERTIFIED}"


def _check_version(config: AdaptQConfig) -> Iterator[str]:
    if config.adaptq_version != FORMAT_VERSION:
        yield (
            f"adaptq_version is {config.adaptq_version!r}; this adaptq_peft reads version {FORMAT_VERSION}; run "
            "`pip install -U adaptq_peft`"
        )


_CHECKS = (
    _check_ratio,
    _check_count,
    _check_strategy,
    _check_seed,
    _check_names,
    _check_init_weights,
    _check_layers,
    _check_calibration,
    _check_profile,
    _check_quantization,
    _check_quantization_calibration,
    _check_quantized_base,
    _check_precision,
    _check_original_weights,
    _check_scaling,
    _check_dtype,
    _check_frozen_rank,
    _check_rounding_repair,
    _check_evaluation,
    _check_certificate,
    _check_version,
)
