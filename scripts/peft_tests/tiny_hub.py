"""A local Hub cache: tiny models with random weights under the ids that PEFT's tests load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 128
#: Larger than the usual 0.02: outputs must move visibly when the weights do.
INITIALIZER_RANGE = 0.2
_REVISION = "0" * 40

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": INITIALIZER_RANGE,
}
_DECODER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_ENCODER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GPT: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": None}
_OPT: dict[str, Any] = {
    "hidden_size": 16,
    "ffn_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 16,
}
_BART: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "init_std": INITIALIZER_RANGE,
}
_T5: dict[str, Any] = {
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 32,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}

#: Hub id -> the model class in transformers, its config class, and what the config says beside `_COMMON`.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", "OPTConfig", _OPT),
    "peft-internal-testing/opt-125m": ("OPTForCausalLM", "OPTConfig", {**_OPT, "num_hidden_layers": 12}),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", "GPT2Config", _GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", "GPTJConfig", {**_GPT, "rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _DECODER),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_DECODER, "head_dim": 4, "sliding_window": 16},
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        "T5Config",
        _T5,
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        "BartConfig",
        _BART,
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", "BertConfig", _ENCODER),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", "RobertaConfig", _ENCODER),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", "DebertaConfig", _ENCODER),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", "DebertaV2Config", _ENCODER),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification",
        "BertConfig",
        _ENCODER,
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        _ENCODER,
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        "LlamaConfig",
        {**_DECODER, "num_labels": 1},
    ),
}

#: Hub id, revision and content of `adapter_config.json`: what test_config.py loads.
_LORA_CONFIG = (
    "peft-internal-testing/tiny-opt-lora-revision",
    "test",
    {"peft_type": "LORA", "task_type": "CAUSAL_LM"},
)
TOKENIZER_ID = "peft-internal-testing/tiny-random-OPTForCausalLM"
QUOTES = ("be yourself , everyone else is taken", "so many books , so little time", "a room without books is dark")


def build_hub(cache: Path) -> None:
    """Write all of it into `cache`, laid out as `huggingface_hub` lays out what it has downloaded."""
    transformers.utils.logging.disable_progress_bar()
    for repo_id, model in MODELS.items():
        add_model(cache, repo_id, *model)
    repo_id, revision, config = _LORA_CONFIG
    _add(cache, repo_id, revision, lambda path: (path / "adapter_config.json").write_text(json.dumps(config)))
    add_tokenizer(cache, TOKENIZER_ID)


def add_model(cache: Path, repo_id: str, model_class: str, config_class: str, changes: dict[str, Any]) -> None:
    """Write a model with random weights into `cache`: a row of `MODELS`."""
    _add(cache, repo_id, "main", _random_model(model_class, config_class, changes).save_pretrained)


def add_tokenizer(cache: Path, repo_id: str) -> None:
    """Write a tokenizer that knows the words of `QUOTES` beside a model that `add_model` has written."""
    _tokenizer().save_pretrained(_snapshot(cache, repo_id))


def _random_model(model_class: str, config_class: str, changes: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**_COMMON, **changes})
    model = getattr(transformers, model_class)(config)
    for name, parameter in model.named_parameters():  # biases start at zero, where a shift of one isn't noticed
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=INITIALIZER_RANGE)
    return model


def _add(cache: Path, repo_id: str, revision: str, write: Callable[[Path], Any]) -> None:
    path = _snapshot(cache, repo_id)
    path.mkdir(parents=True)
    write(path)
    reference = path.parents[1] / "refs" / revision
    reference.parent.mkdir()
    reference.write_text(_REVISION)


def _snapshot(cache: Path, repo_id: str) -> Path:
    return cache / f"models--{repo_id.replace('/', '--')}" / "snapshots" / _REVISION


def _tokenizer() -> transformers.PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *sorted({word for quote in QUOTES for word in quote.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=32,
    )
