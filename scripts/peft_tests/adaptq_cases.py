"""The ADAPTQ cases that are put into PEFT's parametrizations by method, in place of those of other methods.

`CASES` names a parametrization by file and arguments, `CASES_OF_TEST` a single test.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from adaptq_peft import AdaptQConfig

Values = list[Any]

#: What `--fast` keeps: the cases with these ids, else the first of a list, on these models.
FAST_CASES = frozenset({"nf4", "mixed-rank", "MLP-both", "MLP-modules_to_save", "Embedding-Conv1D", "Conv2d", "same"})
FAST_MODELS = frozenset(
    {
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        "peft-internal-testing/tiny-random-GPT2LMHeadModel",
        "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated",
        "peft-internal-testing/tiny-random-DebertaModel",
        "peft-internal-testing/tiny-random-BertForSequenceClassification",
    }
)


def _rows(*rows: tuple[Any, ...], ids: list[str]) -> Values:
    return [pytest.param(*row, id=name) for row, name in zip(rows, ids, strict=True)]


# ---------------------------------------------------------------- models without blocks: target_modules and no profile

_CUSTOM: dict[str, tuple[str, dict[str, Any]]] = {
    "MLP regex": ("MLP", {"target_modules": "lin0"}),
    "MLP first": ("MLP", {"target_modules": ["lin0"]}),
    "MLP second": ("MLP", {"target_modules": ["lin1"]}),
    "MLP both": ("MLP", {"target_modules": ["lin0", "lin1"]}),
    "MLP all-linear": ("MLP", {"target_modules": "all-linear"}),
    "MLP modules_to_save": ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    "MLP exclude_modules": ("MLP", {"target_modules": ".*lin.*", "exclude_modules": ["lin1"]}),
    "MLP scaling": ("MLP", {"target_modules": ["lin0"], "delta_scaling": 1.0}),
    "MLP parameters": ("MlpUsingParameters", {"target_modules": ["lin0", "lin1"]}),
    "LayerNorm": ("MLP_LayerNorm", {"target_modules": ["layernorm0", "lin1"]}),
    "Embedding": ("EmbConv1D", {"target_modules": ["emb"]}),
    "Embedding Conv1D": ("EmbConv1D", {"target_modules": ["emb", "conv1d"]}),
    "Conv1D trainable tokens": (
        "EmbConv1D",
        {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [0, 10]}},
    ),
    "Embedding modules_to_save": ("EmbConv1D", {"target_modules": ["conv1d"], "modules_to_save": ["emb"]}),
    "Conv1d": ("Conv1d", {"target_modules": ["conv1d"]}),
    "Conv1d groups": ("Conv1dGroups", {"target_modules": ["conv1d"]}),
    "Conv2d": ("Conv2d", {"target_modules": ["conv2d", "lin0"]}),
    "Conv2d groups": ("Conv2dGroups", {"target_modules": ["conv2d"]}),
    "Conv3d": ("Conv3d", {"target_modules": ["conv3d"]}),
    "MHA beside": ("MHA", {"target_modules": ["lin0"]}),
}
CUSTOM = _rows(
    *((f"ADAPTQ {name}", model, AdaptQConfig, kwargs) for name, (model, kwargs) in _CUSTOM.items()),
    ids=[name.replace(" ", "-") for name in _CUSTOM],
)

_RANDOM = {"init_weights": False}
_LIN0 = {"target_modules": ["lin0"], **_RANDOM}
_LIN1 = {"target_modules": ["lin1"], **_RANDOM}
MULTIPLE_ACTIVE = _rows(
    ("ADAPTQ same", "adaptq", AdaptQConfig, _LIN0, _LIN0),
    ("ADAPTQ different", "adaptq", AdaptQConfig, _LIN0, _LIN1),
    ("ADAPTQ overlapping", "adaptq", AdaptQConfig, _LIN0, {"target_modules": ["lin0", "lin1"], **_RANDOM}),
    (
        "ADAPTQ + trainable tokens",
        "lora+trainable_tokens",  # the test's name for a model with an embedding
        AdaptQConfig,
        {**_LIN0, "trainable_token_indices": {"emb": [0, 1, 2]}},
        {**_LIN0, "trainable_token_indices": {"emb": [3, 4, 5, 6]}},
    ),
    ids=["same", "different", "overlapping", "trainable-tokens"],
)


def _mixed(name: str, *modules: list[str], **kwargs: Any) -> Values:
    configs = [AdaptQConfig(target_modules=targets, **_RANDOM, **kwargs) for targets in modules]
    return _rows((f"ADAPTQ {name}", *configs), ids=["adaptq"])


# ------------------------------------------------------------------------------------------------- transformers models


def _variants(task_type: str) -> dict[str, dict[str, Any]]:
    """What is adapted and how the rest is stored: each on every model."""
    return {
        "plain": {"task_type": task_type, "layers_to_transform": [0], "quantization": "none"},
        "nf4": {"task_type": task_type, "layers_to_transform": [1], "original_weights": "keep"},
        "int8-linears": {
            "task_type": task_type,
            "layers_to_transform": [0],
            "quantization": "int8",
            "original_weights": "keep",
            "target_modules": "all-linear",
        },
        "mixed-rank": {
            "task_type": task_type,
            "layers_to_transform": [1],
            "frozen_rank": 4,
            "original_weights": "keep",
        },
    }


def _profiled(task_type: str) -> dict[str, Any]:
    """The defaults of AdaptQConfig, but for a calibration that takes milliseconds: nf4, blocks chosen by a profile."""
    return {"task_type": task_type, "calibration_samples": 2, "calibration_max_length": 4, "original_weights": "keep"}


def _configs(variants: dict[str, dict[str, Any]]) -> Values:
    return _rows(*((AdaptQConfig, kwargs) for kwargs in variants.values()), ids=list(variants))


def _all_blocks(task_type: str) -> Values:
    """For tests that set `layers_to_transform` themselves, and compare what is adapted with that of all blocks."""
    kwargs = {"task_type": task_type, "selection_ratio": 1.0, "selection_strategy": "first", "frozen_rank": 0}
    return _configs({"plain": {**kwargs, "quantization": "none"}, "nf4": kwargs})


_TOKENS = {**_variants("CAUSAL_LM")["plain"], "trainable_token_indices": [0, 1, 3]}
DECODER = _configs({**_variants("CAUSAL_LM"), "profiled": _profiled("CAUSAL_LM"), "trainable-tokens": _TOKENS})
ENCODER_DECODER = _configs(_variants("SEQ_2_SEQ_LM"))
FEATURE_EXTRACTION = _configs(_variants("FEATURE_EXTRACTION"))
SEQ_CLS = _configs(_variants("SEQ_CLS"))


def _linears_only() -> Values:
    """For the conversion to LoRA, which has no place for deltas on norms."""
    targets = ["q_proj", "v_proj", "c_attn"]
    kwargs = {"task_type": "CAUSAL_LM", "layers_to_transform": [0], "quantization": "none", "target_modules": targets}
    return _configs({"plain": kwargs})


def _strong(task_type: str) -> Values:
    """For tests that want each adapter to generate other tokens than the base model."""
    return _configs({name: {**kwargs, "delta_scaling": 2.0} for name, kwargs in _variants(task_type).items()})


def _compile_settings() -> Values:
    # The graph is what ADAPTQ can break; compiling it to C++ takes a minute a case, and is PyTorch's affair.
    backend = {"backend": "aot_eager", "torch_compile_backend": "aot_eager"}
    base: dict[str, Any] = {"task_type": "CAUSAL_LM", "layers_to_transform": [1]}
    settings = {
        "plain": {**base, "quantization": "none"},
        "nf4": base,
        "modules_to_save": {**base, "modules_to_save": ["embed_tokens"]},
    }
    return _rows(*(((AdaptQConfig(**kwargs), backend),) for kwargs in settings.values()), ids=list(settings))


CASES: dict[tuple[str, tuple[str, ...]], Callable[[], Values]] = {
    ("test_custom_models", ("test_name", "model_id", "config_cls", "config_kwargs")): lambda: CUSTOM,
    (
        "test_custom_models",
        ("test_name", "tuner_method", "config_cls", "config_kwargs_1", "config_kwargs_2"),
    ): lambda: MULTIPLE_ACTIVE,
    ("test_custom_models", ("config_cls",)): lambda: _rows(
        (functools.partial(AdaptQConfig, original_weights="keep"),),
        (functools.partial(AdaptQConfig, quantization="none"),),
        ids=["nf4", "plain"],
    ),
    ("test_custom_models", ("config0",)): lambda: _rows((AdaptQConfig(**_LIN0),), ids=["adaptq"]),
    ("test_custom_models", ("test_name", "config0", "config1")): lambda: _mixed("mixed", ["lin0"], ["lin0"]),
    ("test_decoder_models", ("config_cls", "config_kwargs")): lambda: DECODER,
    ("test_encoder_decoder_models", ("config_cls", "config_kwargs")): lambda: ENCODER_DECODER,
    ("test_feature_extraction_models", ("config_cls", "config_kwargs")): lambda: FEATURE_EXTRACTION,
    ("test_seq_classifier", ("config_cls", "config_kwargs")): lambda: SEQ_CLS,
    ("test_config", ("config_class", "mandatory_kwargs")): lambda: _rows((AdaptQConfig, {}), ids=["adaptq"]),
    ("test_config", ("config_class",)): lambda: _rows((AdaptQConfig,), ids=["adaptq"]),
    ("test_torch_compile", ("settings",)): _compile_settings,
    ("test_low_level_api", ("config",)): lambda: _rows(
        (AdaptQConfig(layers_to_transform=[0], quantization="none"),), (AdaptQConfig(layers_to_transform=[1]),),
        ids=["plain", "nf4"],
    ),
}  # fmt: skip

CASES_OF_TEST: dict[tuple[str, str], Callable[[], Values]] = {
    ("test_decoder_models", "test_lora_conversion"): _linears_only,
    ("test_decoder_models", "test_training_decoders_layer_indexing"): lambda: _all_blocks("CAUSAL_LM"),
    ("test_decoder_models", "test_generate_with_mixed_adapter_batches"): lambda: _strong("CAUSAL_LM"),
    ("test_encoder_decoder_models", "test_generate_with_mixed_adapter_batches"): lambda: _strong("SEQ_2_SEQ_LM"),
    ("test_encoder_decoder_models", "test_training_encoder_decoders_layer_indexing"): lambda: _all_blocks(
        "SEQ_2_SEQ_LM"
    ),
    ("test_feature_extraction_models", "test_training_layer_indexing"): lambda: _all_blocks("FEATURE_EXTRACTION"),
    ("test_custom_models", "test_save_pretrained_targeting_lora_to_embedding_layer"): lambda: _rows(
        (AdaptQConfig(target_modules=["lin0", "embed_tokens"], **_RANDOM),),
        (AdaptQConfig(target_modules=r"^embed_tokens", **_RANDOM),),
        ids=["list", "regex"],
    ),
    ("test_custom_models", "test_save_pretrained_targeting_lora_to_embedding_layer_non_transformers"): lambda: _rows(
        (AdaptQConfig(target_modules=["lin0", "emb"], **_RANDOM),),
        (AdaptQConfig(target_modules=r"^emb", **_RANDOM),),
        ids=["list", "regex"],
    ),
    ("test_custom_models", "test_mixed_adapter_batches_lora_wrong_adapter_name_raises"): lambda: _mixed(
        "wrong adapter name", ["lin0"]
    ),
    ("test_custom_models", "test_mixed_adapter_batches_different_target_layers"): lambda: _mixed(
        "different layers", ["lin0"], ["lin1"]
    ),
    ("test_custom_models", "test_mixed_adapter_batches_multiple_modules_to_save"): lambda: _mixed(
        "modules_to_save", ["lin0"], ["lin0"], modules_to_save=["lin1"]
    ),
    ("test_custom_models", "test_mixed_adapter_batches_unsupported_layer_raises"): lambda: _mixed(
        "unsupported", ["lin0"], ["lin0"], modules_to_save=["gru"]
    ),
    ("test_custom_models", "test_mixed_adapter_batches_partly_overlapping_target_layers"): lambda: _mixed(
        "overlapping layers", ["lin0"], ["lin0", "lin1"]
    ),
    ("test_custom_models", "test_mixed_adapter_batches_lora_conv1d_emb"): lambda: _mixed(
        "Conv1D and embedding", ["emb", "conv1d"], ["emb", "conv1d"]
    ),
    ("test_custom_models", "test_mixed_adapter_batches_lora_conv1d_emb_multiple_modules_to_save"): lambda: _mixed(
        "Conv1D, embedding and modules_to_save", ["emb", "conv1d"], ["emb", "conv1d"], modules_to_save=["lin0"]
    ),
    ("test_custom_models", "test_mixed_adapter_batches_lora_conv2d"): lambda: _mixed("Conv2d", ["conv2d"], ["conv2d"]),
}
