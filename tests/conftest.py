from __future__ import annotations

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers import logging as transformers_logging

transformers_logging.set_verbosity_error()
torch.set_num_threads(1)  # tiny models: threads cost more than they give

VOCABULARY = 96


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _signals():
    """The command line takes a signal for itself."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def make_llama(num_layers: int = 4, seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    defaults = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**defaults, **changes}))


def make_gpt2(num_layers: int = 4, seed: int = 0, **changes) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    defaults = {
        "n_embd": 64,
        "n_layer": num_layers,
        "n_head": 4,
        "n_positions": 64,
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    return GPT2LMHeadModel(GPT2Config(**{**defaults, **changes}))


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return make_llama()


@pytest.fixture
def gpt2() -> GPT2LMHeadModel:
    return make_gpt2()


@pytest.fixture(params=["llama", "gpt2"])
def model(request):
    return make_llama() if request.param == "llama" else make_gpt2()


@pytest.fixture
def make_model():
    """Builds tiny models: `make_model("llama" | "gpt2", num_layers=4, seed=0, **config)`."""
    return lambda kind="llama", **changes: {"llama": make_llama, "gpt2": make_gpt2}[kind](**changes)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, VOCABULARY, (4, 12), generator=generator)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


@pytest.fixture
def samples() -> list[dict[str, list[int]]]:
    """60 calibration samples of different lengths."""
    generator = torch.Generator().manual_seed(2)
    return [{"input_ids": torch.randint(3, VOCABULARY, (4 + i % 7,), generator=generator).tolist()} for i in range(60)]


@pytest.fixture
def fresh_accelerate_state():
    """accelerate keeps one precision a process, whichever test asked for it first."""
    states = (AcceleratorState, GradientState, PartialState)
    for state in states:
        state._reset_state()
    yield
    for state in states:
        state._reset_state()


@pytest.fixture
def train():
    """Trains the trainable parameters of a model on one batch and returns the losses."""

    def run(model, batch, steps: int = 3, lr: float = 0.05, optimizer=torch.optim.AdamW) -> list[float]:
        model.train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optim = optimizer(parameters, lr=lr)
        losses = []
        for _ in range(steps):
            loss = model(**batch, labels=batch["input_ids"]).loss
            optim.zero_grad()
            loss.backward()
            optim.step()
            losses.append(loss.item())
        return losses

    return run
