"""Tiny models, and what several test files do to a model with adapters, and with a trainer."""

from __future__ import annotations

import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM, T5Config, T5ForConditionalGeneration

from adaptq_peft.layer import AdaptQLayer


def tiny_qwen_moe():
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "intermediate_size": 64}
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**sizes, **experts, num_key_value_heads=2, shared_expert_intermediate_size=32)
    )


def tiny_t5():
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(**sizes, vocab_size=96, decoder_start_token_id=0))


def randomize(model, name="default", std=0.02, seed=5):
    """Give the deltas of an adapter random values, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, AdaptQLayer) and name in layer.adaptq_delta:
            for parameter in layer.adaptq_delta[name].parameters():
                parameter.data.normal_(std=std, generator=generator)


def randomize_trained(model, std, seed=5):
    """Give all that a model trains random values, whatever the method."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=std, generator=generator)


def logits(model, batch):
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


def makers_of_checkpoints(make_model):
    """What makes each kind of tiny model that checkpoints on disk are tested with, by name."""
    return {
        "llama": make_model,
        "llama-tied": lambda: make_model(tie_word_embeddings=True),
        "gpt2": lambda: make_model("gpt2"),
        "t5": tiny_t5,
        "qwen-moe": tiny_qwen_moe,
    }


def fail_at_call(monkeypatch, owner, method, call):
    """Let the given call of a method, counted from 1, raise a MemoryError."""
    original, calls = getattr(owner, method), []

    def fail(*args):
        calls.append(1)
        if len(calls) == call:
            raise MemoryError("no memory")
        return original(*args)

    monkeypatch.setattr(owner, method, fail)


def trainer_options(folder, **changes):
    """Arguments of transformers' and TRL's trainers for four quick steps on the CPU that are all logged."""
    return {
        "output_dir": str(folder / "run"),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }


def curve(trainer, key="loss"):
    """What a trainer has logged under a key."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def trained(model):
    """Copies of the parameters that are trained, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(left, right):
    """Whether two dicts hold equal tensors under the same names."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
