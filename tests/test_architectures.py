"""The whole way, from profiling to merging, on a tiny model of each architecture."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptq_peft import AdaptQConfig, profile_activations
from adaptq_peft.layer import AdaptQLayer
from adaptq_peft.quantization import is_quantized
from adaptq_peft.selection import find_blocks

VOCABULARY, LENGTH, IMAGE = 96, 10, 16

COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
DECODER = {**COMMON, **SIZES, "max_position_embeddings": 64}
GROUPED = {**DECODER, "num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {**GROUPED, "num_experts_per_tok": 2, "output_router_logits": False}
FUSED = ("gate_up_proj", "down_proj")
VISION = {**SIZES, "num_hidden_layers": 2, "image_size": IMAGE, "patch_size": 8}
SEQ2SEQ = {
    **COMMON,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "decoder_start_token_id": 2,
}

Inputs = dict[str, torch.Tensor]


def tokens(generator: torch.Generator, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (length,), generator=generator)


def text(generator: torch.Generator) -> Inputs:
    return {"input_ids": tokens(generator)}


def causal(generator: torch.Generator) -> Inputs:
    ids = tokens(generator)
    return {"input_ids": ids, "labels": ids}


def classified(generator: torch.Generator) -> Inputs:
    return {"input_ids": tokens(generator), "labels": torch.randint(0, 2, (), generator=generator)}


def translated(generator: torch.Generator) -> Inputs:
    return {"input_ids": tokens(generator), "labels": tokens(generator, 7)}


def image(generator: torch.Generator, size: int = IMAGE) -> torch.Tensor:
    return torch.randn(3, size, size, generator=generator)


def labelled_image(generator: torch.Generator) -> Inputs:
    return {"pixel_values": image(generator), "labels": torch.randint(0, 2, (), generator=generator)}


def speech(generator: torch.Generator) -> Inputs:
    return {"input_features": torch.randn(16, 40, generator=generator), "labels": tokens(generator, 7)}


def captioned_image(generator: torch.Generator) -> Inputs:
    return {"input_ids": tokens(generator), "pixel_values": image(generator)}


def image_in_text(generator: torch.Generator) -> Inputs:
    ids = torch.cat([torch.full((4,), VOCABULARY - 1), tokens(generator) % (VOCABULARY - 4)])
    return {
        "input_ids": ids,
        "pixel_values": image(generator, 32),
        "labels": ids,
        "token_type_ids": (ids == 95).long(),
    }


@dataclass
class Case:
    """A tiny model, what a sample of its data looks like, and how the adapter is configured.

    Args:
        model_class: name of a class of transformers.
        config: builds its config.
        sample: draws a sample of data.
        task_type: PEFT's task type.
        fields: further fields of the AdaptQConfig.
        with_loss: inputs that make the model return a loss, where labels don't.
        left: last parts of the names of all frozen weights that are not quantized.
        blocks: names of the lists of blocks, where there is a choice.
    """

    model_class: str
    config: Callable[[], Any]
    sample: Callable[[torch.Generator], Inputs]
    task_type: str | None = "CAUSAL_LM"
    fields: dict[str, Any] = field(default_factory=dict)
    with_loss: dict[str, Any] = field(default_factory=dict)
    left: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()

    def build(self) -> Any:
        torch.manual_seed(0)
        return getattr(transformers, self.model_class)(self.config()).eval()


def config(name: str, **fields: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**copy.deepcopy(fields))


def classifier(name: str, head: list[str], **fields: Any) -> Case:
    return Case(
        f"{name}ForSequenceClassification",
        config(f"{name}Config", **{**DECODER, **fields}),
        classified,
        "SEQ_CLS",
        {"modules_to_save": head},
    )


def deberta(name: str, **expected: Any) -> Case:
    case = classifier(name, ["classifier"], relative_attention=True, pos_att_type=["c2p", "p2c"])
    return replace(case, **expected)


def gemma3() -> Any:
    return transformers.Gemma3Config(
        text_config={**GROUPED, "sliding_window": 8},
        vision_config=VISION | {"image_size": 32},
        mm_tokens_per_image=4,
        image_token_index=VOCABULARY - 1,
        boi_token_index=VOCABULARY - 2,
        eoi_token_index=VOCABULARY - 3,
    )


def clip() -> Any:
    return transformers.CLIPConfig(
        text_config={**DECODER, "projection_dim": 64},
        vision_config={**VISION, "projection_dim": 64},
        projection_dim=64,
    )


BOTH_TOWERS = {
    "clip": ("text_model.encoder.layers", "vision_model.encoder.layers"),
    "gemma3": ("model.vision_tower.encoder.layers", "model.language_model.layers"),
}

CASES = {
    "llama": Case("LlamaForCausalLM", config("LlamaConfig", **GROUPED), causal),
    "mistral": Case("MistralForCausalLM", config("MistralConfig", **GROUPED), causal),
    "qwen2": Case("Qwen2ForCausalLM", config("Qwen2Config", **DECODER, num_key_value_heads=2), causal),
    "qwen3": Case("Qwen3ForCausalLM", config("Qwen3Config", **GROUPED), causal),
    "gemma3-text": Case("Gemma3ForCausalLM", config("Gemma3TextConfig", **GROUPED, sliding_window=8), causal),
    "gemma3": Case("Gemma3ForConditionalGeneration", gemma3, image_in_text, blocks=("model.language_model.layers",)),
    "phi3": Case("Phi3ForCausalLM", config("Phi3Config", **DECODER), causal),
    "gpt2": Case("GPT2LMHeadModel", config("GPT2Config", **COMMON, n_embd=64, n_layer=4, n_head=4), causal),
    "gpt-j": Case(
        "GPTJForCausalLM", config("GPTJConfig", **COMMON, n_embd=64, n_layer=4, n_head=4, rotary_dim=8), causal
    ),
    "gpt-neox": Case("GPTNeoXForCausalLM", config("GPTNeoXConfig", **DECODER), causal),
    "opt": Case(
        "OPTForCausalLM",
        config("OPTConfig", **DECODER, ffn_dim=128, word_embed_proj_dim=64),
        causal,
    ),
    "bloom": Case("BloomForCausalLM", config("BloomConfig", **COMMON, hidden_size=64, n_layer=4, n_head=4), causal),
    "falcon": Case("FalconForCausalLM", config("FalconConfig", **DECODER), causal),
    "mamba": Case(
        "MambaForCausalLM",
        config("MambaConfig", **COMMON, hidden_size=64, num_hidden_layers=4),
        causal,
        left=("dt_proj", "x_proj", "out_proj"),
    ),
    "mixtral": Case("MixtralForCausalLM", config("MixtralConfig", **EXPERTS, num_local_experts=4), causal, left=FUSED),
    "qwen3-moe": Case(
        "Qwen3MoeForCausalLM",
        config("Qwen3MoeConfig", **EXPERTS, num_experts=4, moe_intermediate_size=64),
        causal,
        left=FUSED,
    ),
    "t5": Case(
        "T5ForConditionalGeneration",
        config(
            "T5Config", **COMMON, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0
        ),
        translated,
        "SEQ_2_SEQ_LM",
        left=("wo",),
        blocks=("encoder.block", "decoder.block"),
    ),
    "bart": Case(
        "BartForConditionalGeneration",
        config("BartConfig", **SEQ2SEQ),
        translated,
        "SEQ_2_SEQ_LM",
        blocks=("model.encoder.layers", "model.decoder.layers"),
    ),
    "bert": classifier("Bert", ["classifier"]),
    "roberta": classifier("Roberta", ["classifier"], pad_token_id=0),
    "deberta": deberta("Deberta", left=("in_proj",)),
    "deberta-v2": deberta("DebertaV2"),
    "modernbert": classifier("ModernBert", ["head", "classifier"], cls_token_id=1, sep_token_id=2),
    "vit": Case(
        "ViTForImageClassification",
        config("ViTConfig", **{**VISION, "num_hidden_layers": 4}),
        labelled_image,
        None,
        {"modules_to_save": ["classifier"]},
    ),
    "whisper": Case(
        "WhisperForConditionalGeneration",
        config(
            "WhisperConfig",
            **SEQ2SEQ,
            num_mel_bins=16,
            max_source_positions=20,
            max_target_positions=20,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
        speech,
        None,
        blocks=("model.encoder.layers", "model.decoder.layers"),
    ),
    "clip": Case(
        "CLIPModel",
        clip,
        captioned_image,
        None,
        with_loss={"return_loss": True},
        blocks=("text_model.encoder.layers",),
    ),
}


def draw(case: Case, count: int, seed: int) -> list[Inputs]:
    generator = torch.Generator().manual_seed(seed)
    return [case.sample(generator) for _ in range(count)]


def outputs(model: nn.Module, batch: Inputs) -> list[torch.Tensor]:
    model.eval()
    with torch.no_grad():
        found = model(**batch)
    return [value for value in found.values() if isinstance(value, torch.Tensor)]


def train(model: nn.Module, batch: dict[str, Any]) -> list[float]:
    """Three steps on one batch, without dropout, so that the losses compare."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    losses = []
    for _ in range(3):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert missing == []
        assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in parameters)
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_deltas_that_are_read_count(model: nn.Module, batch: Inputs, expected: list[torch.Tensor]) -> None:
    """Each layer whose weight is read instead of calling it, as in Mamba's mixer, changes the output."""
    for name, layer in model.named_modules():
        if isinstance(layer, AdaptQLayer) and layer.read_directly:
            scale = layer.scaling["default"]
            layer.set_scale("default", 0.0)
            changed = outputs(model, batch)
            layer.set_scale("default", scale)
            assert any(not torch.equal(a, b) for a, b in zip(changed, expected, strict=True)), name


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_from_profile_to_merge(name, tmp_path):
    case = CASES[name]
    model, fresh = case.build(), case.build()
    batch = torch.utils.data.default_collate(draw(case, 4, seed=1)) | case.with_loss

    fields = {"frozen_rank": 0, **case.fields}
    adapter = AdaptQConfig(task_type=case.task_type, calibration_data=draw(case, 50, seed=2), **fields)
    wrapped = get_peft_model(model, adapter)

    blocks = find_blocks(model)
    lists = tuple(dict.fromkeys(block.name.rpartition(".")[0] for block in blocks))
    assert lists == case.blocks if case.blocks else len(lists) == 1
    assert len(adapter.layers_to_transform) == len(blocks) // 2
    assert len(adapter.profile.magnitude) == len(blocks)
    left = wrapped.base_model.quantization_report.left
    for block in blocks:
        linears = {
            f"{block.name}.{path}": module
            for path, module in block.module.named_modules()
            if isinstance(module, (nn.Linear, Conv1D)) or is_quantized(module)
        }
        if block.index in adapter.layers_to_transform:
            assert not any(is_quantized(module) for module in linears.values())
        else:
            assert {path for path, module in linears.items() if not is_quantized(module)} <= left.keys()
    assert {path.rpartition(".")[2] for path in left} == set(case.left)

    losses = train(wrapped.eval(), batch)
    assert losses[-1] < losses[0]

    trained = outputs(wrapped, batch)
    assert_deltas_that_are_read_count(wrapped, batch, trained)
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(outputs(loaded, batch), trained, strict=True))

    merged = wrapped.merge_and_unload()
    assert not any(isinstance(module, AdaptQLayer) or is_quantized(module) for module in merged.modules())
    for found, expected in zip(outputs(merged, batch), trained, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", BOTH_TOWERS)
@pytest.mark.filterwarnings("ignore")
def test_both_towers(name, tmp_path):
    """layers_pattern takes the blocks of both, in whichever order they run."""
    case, patterns = CASES[name], BOTH_TOWERS[name]
    model, fresh = case.build(), case.build()
    data, batch = draw(case, 50, seed=2), torch.utils.data.default_collate(draw(case, 4, seed=1)) | case.with_loss

    separate = [profile_activations(model, data, layers_pattern=pattern).magnitude for pattern in patterns]
    both = profile_activations(model, data, layers_pattern=list(patterns)).magnitude
    assert both == [*separate[0], *separate[1]]
    assert min(both) > 0

    ends = [f"{pattern}.{len(part) - 1}." for pattern, part in zip(patterns, separate, strict=True)]
    last = [len(separate[0]) - 1, len(both) - 1]
    adapter = AdaptQConfig(
        task_type=case.task_type, layers_pattern=list(patterns), layers_to_transform=last, frozen_rank=0
    )
    wrapped = get_peft_model(model, adapter)
    trained = {path for path, p in wrapped.base_model.model.named_parameters() if p.requires_grad}
    assert all(any(path.startswith(end) for path in trained) for end in ends)
    assert all(path.startswith(tuple(ends)) for path in trained)

    wrapped.train()
    wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    losses = train(wrapped, batch)  # checks that each delta gets a gradient
    assert losses[-1] < losses[0]
    expected = outputs(wrapped, batch)
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(outputs(loaded, batch), expected, strict=True))
