"""What stands in for things that PEFT's tests name and that are not here, or not for other methods."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import inspect
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptq_peft import AdaptQConfig

# ------------------------------------------------------------------ packages that the files import but no case needs


def _expand(cases: Any) -> Callable[[Any], Any]:
    """`parameterized.expand` by pytest's own parametrization."""

    def decorate(function: Any) -> Any:
        names = list(inspect.signature(function).parameters)[1:]
        return pytest.mark.parametrize(",".join(names), [tuple(case)[: len(names)] for case in cases])(function)

    return decorate


_PACKAGES: dict[str, dict[str, Any]] = {
    "diffusers": {"__version__": "0", "StableDiffusionPipeline": type("StableDiffusionPipeline", (), {})},
    "parameterized": {"parameterized": types.SimpleNamespace(expand=_expand)},
    "datasets": {"load_dataset": None},
}


def install_packages() -> list[str]:
    """Put a stand-in into `sys.modules` for each of these packages that is not installed. Returns their names."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    for name in missing:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(_PACKAGES[name])
        sys.modules[name] = module
    return missing


# ------------------------------------------------------------------------- names in the tests that stand for a method


def from_lora_config(
    *args: Any, r: Any = None, lora_alpha: Any = None, init_lora_weights: bool = True, bias: Any = None, **kwargs: Any
) -> AdaptQConfig:
    """`AdaptQConfig` where a test that is the same for every method writes `LoraConfig`.

    It adapts all blocks, or those that the test names and nothing else.
    """
    chosen: dict[str, Any] = {"selection_strategy": "first", "selection_ratio": 1.0, "frozen_rank": 0, **kwargs}
    return AdaptQConfig(*args, init_weights=init_lora_weights, quantization="none", **chosen)


#: Patterns of "file.Class.test" of tests that write `LoraConfig` but check what every method shares.
COMMON_TESTS: tuple[str, ...] = (
    "test_custom_models.TestPeftCustomModel.test_set_adapter_non_overlapping_trainable_token_indices",
    "test_custom_models.TestPeftCustomModel.test_multiple_active_adapters_with_*_trainable_token_indices_*",
    "test_custom_models.TestPeftCustomModel.test_delete_adapter_with_multiple_adapters_works",
    "test_custom_models.TestPeftCustomModel.test_delete_adapter_multiple_adapters_with_*",
    "test_custom_models.TestPeftCustomModel.test_set_requires_grad_trainable_tokens",
    "test_custom_models.TestPeftCustomModel.test_weight_bias_attributes",
    "test_custom_models.TestPeftCustomModel.test_multiple_adapters_no_needless_copy_modules_to_save",
    "test_custom_models.TestPeftCustomModel.test_multiple_adapters_mixed_modules_to_save_merging_adapters",
    "test_custom_models.TestPeftCustomModel.test_multiple_adapters_same_modules_to_save_merging_adapters_raises",
    "test_custom_models.TestPeftCustomModel.test_*existing_model_card",
    "test_custom_models.TestPeftCustomModel.test_save_embedding_layers_excludes_similarly_named_sibling",
    "test_custom_models.TestRequiresGrad.test_loading_model_with_trainble_tokens_requires_grad_set_correctly",
    "test_low_level_api.TestInjectAdapterFromStateDict.test_inject_from_state_dict_transformers",
    "test_low_level_api.TestInjectAdapterFromStateDict.test_inject_from_state_dict_transformers_irregular_targets",
    "test_low_level_api.TestInjectAdapterFromStateDict.test_inject_from_state_dict_low_cpu_mem_usage",
    "test_low_level_api.TestInjectAdapterFromStateDict.test_inject_from_state_dict_extra_keys_warning",
    "test_low_level_api.TestInjectAdapterFromStateDict.test_inject_from_state_dict_compiled_model",
    "test_tuners_utils.TestTargetedModuleNames.test_*_targeted_module_*",
    "test_tuners_utils.TestTargetedModuleNames.test_layers_to_transform_filters_by_layer_not_expert_index",
    "test_tuners_utils.TestExcludedModuleNames.test_*",
    "test_tuners_utils.TestModelAndLayerStatus.test_*",
    "test_tuners_utils.TestTunerStateDictKeyPrefixes.test_prefixes_auxiliary_modules_not_included",
    "test_tuners_utils.TestTunerStateDictKeyPrefixes.test_prefixes_tuner_layer_inside_auxiliary_*",
    "test_low_level_api.TestPeftStateDict.test_get_and_set_peft_model_state_dict_*",
    "test_low_level_api.TestPeftStateDict.test_get_peft_model_state_dict_removes_*",
    "test_low_level_api.TestPeftStateDict.test_trained_modules_to_save_module_named_like_peft_prefix_*",
    "test_low_level_api.TestPeftStateDict.test_set_peft_model_state_dict_preserves_input",
    "test_low_level_api.TestGetBaseModelStateDict.test_*",
)
#: Tests that name no method, but run over all registered ones.
TESTS_OF_ALL_METHODS: tuple[str, ...] = ("test_config.TestPeftConfig.test_from_peft_type",)

#: PEFT lists, by class and inside a test, the methods that support a feature. Where ADAPTQ does too it takes the place
#: of one of them: test -> (file with the list, name in it).
LISTED_METHODS: dict[str, tuple[tuple[str, str], ...]] = {
    "test_mixed_adapter_batches": (("testing_common", "RoadConfig"), ("test_decoder_models", "LoraConfig")),
    "test_generate_with_mixed_adapter_batches": (
        ("testing_common", "LoraConfig"),
        ("test_decoder_models", "LoraConfig"),
    ),
}
#: Functions of PEFT's tests that skip, or change, the cases of methods that they don't know.
SKIPPING_FUNCTIONS: tuple[tuple[str, str], ...] = (
    ("testing_common", "_skip_if_conv1d_not_supported"),  # a list of the methods that can do GPT-2's Conv1D
    ("test_decoder_models", "check_beft_config"),  # meant for BEFT only, and by a mistake in it for all others instead
)

#: Tests that save an adapter from one randomly initialized model and load it into another one, which ADAPTQ refuses:
#: (pattern of "file.Class.test", the model class). The model is made from a fixed seed for them.
OTHER_BASE: tuple[tuple[str, str], ...] = (
    ("test_custom_models.TestRequiresGrad.test_loading_model*_requires_grad_set_correctly", "DeepMLP"),
    ("test_custom_models.TestRequiresGrad.test_loading_model*_requires_grad_set_correctly", "ModelEmbConv1D"),
)


def seeded(model_class: Callable[..., Any]) -> Callable[..., Any]:
    """A function that makes a model, always with the same weights."""

    def make(*args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(0)
        return model_class(*args, **kwargs)

    return make


# ----------------------------------------------------------------------------------------------------------- the Hub


class AlwaysSeen(dict[str, int]):
    """For `hub_online_once`: every id has been downloaded before, so it stays offline."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> int:
        return 1


def download_to(hub: Path, download: Callable[..., str]) -> Callable[..., str]:
    """`hf_hub_download` that "downloads" into another `cache_dir` by copying from `hub`."""

    def copy_and_download(repo_id: str, *args: Any, **kwargs: Any) -> str:
        source = hub / f"models--{repo_id.replace('/', '--')}"
        if kwargs.get("cache_dir") and source.is_dir():
            shutil.copytree(source, Path(kwargs["cache_dir"]) / source.name, dirs_exist_ok=True)
        return download(repo_id, *args, **kwargs)

    copy_and_download.__signature__ = inspect.signature(download)  # type: ignore[attr-defined]  # PEFT reads it
    return copy_and_download


def quotes_dataset(quotes: tuple[str, ...]) -> Any:
    """What `load_dataset("ybelkada/english_quotes_copy")` has: a train split with quote, author and tags."""
    from datasets import Dataset, DatasetDict

    columns = {"quote": list(quotes) * 8, "author": ["a"] * len(quotes) * 8, "tags": [["b"]] * len(quotes) * 8}
    return DatasetDict({"train": Dataset.from_dict(columns)})
