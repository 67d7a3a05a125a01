"""Calibration text that a model writes itself, where nobody gave any."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from ..evaluation_mode import evaluation_mode
from ..offloading import input_device
from .blocks import is_encoder_decoder

#: Tokens of a sample that the model writes itself: the paper's samples are this short, and longer ones take minutes.
SELF_WRITTEN_LENGTH = 128
#: Samples that the model writes at once: their cache of keys and values takes 2 GiB in a 7B model.
_WRITTEN_AT_ONCE = 32


def can_write_text(model: nn.Module) -> bool:
    """Whether the model is a causal language model that can write calibration text itself."""
    return _start_token(model) is not None


def write_calibration_samples(model: nn.Module, count: int, length: int, seed: int = 0) -> list[dict[str, Any]]:
    """Let the model write calibration text: sampled from its BOS token at temperature 1.

    The global random state is left as it was.

    Args:
        model: a transformers model that can generate.
        count: number of samples.
        length: tokens a sample, BOS included; a sample ends earlier where the model ends it.
        seed: seed of the sampling. Default 0.

    Returns:
        `count` dicts with "input_ids", a list of ints.

    Raises:
        ValueError: if the model can't generate text or has no BOS token.
    """
    start = _start_token(model)
    if start is None:
        raise ValueError(
            f"{type(model).__name__} can't write its own calibration text (it needs generate() and a BOS token). Pass "
            "calibration_data, for instance 50 to 100 texts of your domain."
        )
    device = input_device(model)
    prompts = torch.full((count, 1), start, dtype=torch.long, device=device).split(_WRITTEN_AT_ONCE)
    random_state = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    end = model.generation_config.eos_token_id  # type: ignore[union-attr]
    plain = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=start, eos_token_id=end)
    with evaluation_mode(model), torch.no_grad(), random_state, _generating_by(model, plain):
        torch.manual_seed(seed)
        written = [
            model.generate(  # type: ignore[operator]
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max(length - 1, 1)
            )
            for prompt in prompts
        ]
    ends = set(end if isinstance(end, list) else [end])
    return [{"input_ids": _cut_after_end(row.tolist(), ends)} for batch in written for row in batch]


def _start_token(model: nn.Module) -> int | None:
    """What a text begins with that the model writes: BOS, or EOS where it has none; `None` if it can't write any."""
    config = getattr(model, "generation_config", None)
    if not hasattr(model, "generate") or is_encoder_decoder(model):
        return None
    tokens = (getattr(config, name, None) for name in ("bos_token_id", "eos_token_id"))
    start = next((token for token in tokens if token is not None), None)
    return start[0] if isinstance(start, list) else start


@contextmanager
def _generating_by(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Within the context nothing of the model's own config, such as a penalty or beams, fills what `config` leaves."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


def _cut_after_end(tokens: list[int], ends: set[int | None]) -> list[int]:
    stop = next((i for i, token in enumerate(tokens) if i > 0 and token in ends), len(tokens) - 1)
    return tokens[: stop + 1]
