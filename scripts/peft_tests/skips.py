"""What is not run, each with its reason. A test that skips itself and is not in this table counts as a failure."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Skip:
    """Tests that are not run.

    Args:
        file: pattern of the file's name, without `.py`.
        test: pattern of the function's name.
        reason: why, shown in the report.
        case: pattern of the parameters' ids, for instance "*-nf4"; by default every case of the test.
        when_missing: skip only where this package is not installed.
    """

    file: str
    test: str
    reason: str
    case: str = "*"
    when_missing: str | None = None

    def matches(self, file: str, test: str, case: str) -> bool:
        """Whether this row covers a test; all three without paths, brackets or `.py`."""
        pairs = ((file, self.file), (test, self.test), (case, self.case))
        return all(fnmatchcase(value, pattern) for value, pattern in pairs)


PROMPT = "prompt learning only: ADAPTQ has no virtual tokens"
WEIGHTED = "PEFT's test calls the arguments of LoRA's and IA3's own add_weighted_adapter (ranks, SVD)"
BIAS = "ADAPTQ has no `bias` argument: biases of the adapted layers get deltas themselves"
LORA_VALUES = "expects LoRA's own class names, parameter counts or containers"
OTHER_METHOD = "about another method, or about none"
TARGET_PARAMETERS = "ADAPTQ has no `target_parameters`: target_modules reaches any layer with parameters of its own"
TWO_HEADS = "PEFT refuses two active adapters with modules_to_save or trainable tokens, for every method"
INPUT_GRADS = (
    "expects the embeddings' output to require gradients; ADAPTQ marks the input of the lowest trained block instead, "
    "so that the blocks below run without autograd"
)
QUANTIZED_BASE = "compares with the base model to 1e-6: with the adapter off, the base is the quantized one"
PACKED = "compares with the base's state dict: quantized weights are packed and have their scales beside them"
INT8_MERGE = "compares to 1e-4: LLM.int8() rounds activations too, and the dequantized blocks of a merged model don't"
T5_BIAS = (
    "block 0 of T5 holds the relative position bias, one for the whole batch: no adapter a sample can apply to it"
)
TRAINED_WHOLE = (
    "a second adapter's modules_to_save names a linear that the first has quantized: refused, the error says how"
)
QUANTIZED = ("nf4", "int8-linears", "mixed-rank", "profiled")  #: ids of the cases with quantized blocks
ACCELERATOR = "needs a GPU"
SHARED_STATE = "about tuners with state shared between layers; ADAPTQ has none"

_ROWS: tuple[Skip, ...] = (
    Skip("test_custom_models", "test_multiple_active_adapters_with_*_modules_to_save_*", TRAINED_WHOLE, case="nf4"),
    Skip("test_custom_models", "test_set_requires_grad", TRAINED_WHOLE, case="nf4"),
    Skip("*", "test_prompt_tuning_*", PROMPT),
    Skip("*", "test_training_prompt_learning_tasks", PROMPT),
    Skip("*", "test_set_requires_grad_prompt_learning_raises", PROMPT),
    Skip("*", "test_prompt_learning_forward_with_inputs_embeds", PROMPT),
    Skip("*", "test_prompt_learning_with_gradient_checkpointing", PROMPT),
    Skip("test_feature_extraction_models", "test_passing_input_embeds_works", PROMPT),
    Skip("*", "test_weighted_combination_of_adapters", WEIGHTED),
    Skip("test_custom_models", "test_add_weighted_adapter_*", WEIGHTED),
    Skip("*", "test_adding_multiple_adapters_with_bias_raises", BIAS),
    Skip("test_custom_models", "test_disable_adapter_with_bias_warns", BIAS),
    Skip("test_custom_models", "test_save_load_roundtrip_fsdp_wrapped_learnable_bias", BIAS),
    Skip(
        "test_decoder_models",
        "test_save_pretrained_targeting_lora_to_embedding_layer",
        "target_modules chooses within the adapted blocks, and the embeddings of a transformer are outside; "
        "test_custom_models.py has the same test on a model without blocks",
    ),
    Skip("test_custom_models", "test_mixed_adapter_batches_lora_opt_timing", "a limit on LoRA's overhead in seconds"),
    Skip(
        "test_low_level_api",
        "test_base_model_module_named_like_peft_prefix",
        "the test looks the prefix up in a dict of its own, which has those of LoRA and LoKr only",
    ),
    Skip("*", "test_merge_layers_multi", TWO_HEADS, case="trainable-tokens-*"),
    Skip("test_custom_models", "test_active_adapter", TWO_HEADS, case="*modules_to_save"),
    Skip("test_custom_models", "test_active_adapter", TWO_HEADS, case="*trainable-tokens"),
    Skip(
        "test_custom_models", "test_default_target_modules_*", "ADAPTQ has no default list of layers: None = the block"
    ),
    Skip("test_custom_models", "test_mixed_adapter_batches_mha_raises", "expects an error of LoRA's attention layer"),
    Skip("*", "test_prepare_for_training_parametrized", INPUT_GRADS),
    *(Skip("*", "test_disable_adapter", QUANTIZED_BASE, case=f"{case}-*") for case in QUANTIZED),
    *(Skip("*", "test_get_base_model_state_dict", PACKED, case=f"{case}-*") for case in QUANTIZED),
    Skip("*", "test_merge_layers*", INT8_MERGE, case="int8-linears-*"),
    Skip("*", "test*_mixed_adapter_batches", T5_BIAS, case="plain-*T5*"),
    Skip("test_tuners_utils", "test_module_type_*", LORA_VALUES),
    Skip("test_tuners_utils", "test_adapter_model_type_*", LORA_VALUES),
    Skip("test_tuners_utils", "test_peft_types_*", LORA_VALUES),
    Skip("test_tuners_utils", "test_nb_params_*", LORA_VALUES),
    Skip("test_tuners_utils", "test_model_status_with_*", LORA_VALUES),
    Skip("test_tuners_utils", "test_model_with_injected_layers", LORA_VALUES),
    Skip("test_tuners_utils", "test_*requires_grad*_irregular", LORA_VALUES),
    Skip("test_tuners_utils", "test_realistic_example", "expects LoRA's default list of layers"),
    Skip(
        "test_tuners_utils", "test_base_model_type_transformers_automodel", "LoRA's default list of layers, on T5Model"
    ),
    Skip("test_tuners_utils", "test_ia3_*", OTHER_METHOD),
    Skip("test_tuners_utils", "test_loha_model", OTHER_METHOD),
    Skip("test_tuners_utils", "test_vera_model", OTHER_METHOD),
    Skip("test_tuners_utils", "test_prefix_tuning", OTHER_METHOD),
    Skip("test_tuners_utils", "test_adaption_prompt", OTHER_METHOD),
    Skip("test_tuners_utils", "test_vanilla_model_raises", OTHER_METHOD),
    Skip("test_tuners_utils", "test_transformer*_model*", OTHER_METHOD),
    Skip("test_tuners_utils", "test_mixed_model_raises", "PeftMixedModel takes a fixed list of PEFT's own methods"),
    Skip("test_tuners_utils", "test_*target_parameters*", TARGET_PARAMETERS),
    Skip("test_tuners_utils", "test_*devices_*gpu_large", ACCELERATOR),
    Skip("test_low_level_api", "test_inject_adapter_in_model_rejects_shared_state_tuners", SHARED_STATE),
    Skip("test_torch_compile", "*", "needs the package `datasets`, of the extra `train`", when_missing="datasets"),
)
#: The rows that apply here.
SKIPS = tuple(row for row in _ROWS if row.when_missing is None or importlib.util.find_spec(row.when_missing) is None)


def find_skip(file: str, test: str, case: str) -> Skip | None:
    """The first row that covers a test, if any."""
    return next((skip for skip in SKIPS if skip.matches(file, test, case)), None)
