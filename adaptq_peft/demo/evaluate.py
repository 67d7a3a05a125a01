"""What the demo measures perplexity on, the same in the process that trains and in the one that reloads."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..evaluation import Perplexity, degradation, evaluate_perplexity

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EvaluationSet:
    """Test texts and how they are measured.

    Attributes:
        domain: Held-out documents of the domain.
        general: Documents of general prose.
        max_tokens: At most so many tokens of each are used.
        max_length: Tokens in a window.
    """

    domain: list[str]
    general: list[str]
    max_tokens: int = 10_000
    max_length: int = 512

    def measure(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> dict[str, Perplexity]:
        """Perplexity on "domain" and "general"; `progress` is called with (which text, tokens done, tokens in all)."""
        return {
            name: evaluate_perplexity(
                model,
                tokenizer,
                texts,
                max_length=self.max_length,
                max_tokens=self.max_tokens,
                progress=None if progress is None else partial(progress, name),
            )
            for name, texts in (("domain", self.domain), ("general", self.general))
        }

    def save(self, path: Path) -> None:
        """Write the texts and the settings as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> EvaluationSet:
        """Read what `save` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def split_change(base: Perplexity, quantized: Perplexity, trained: Perplexity) -> dict[str, float]:
    """Relative change of the perplexity against the base, and how much of it quantization and training each brought.

    Returns:
        "quantization": (quantized - base) / base; "training": (trained - quantized) / base; "total": their sum,
        which is the degradation (trained - base) / base. Positive is worse.
    """
    quantization, total = degradation(quantized, base), degradation(trained, base)
    return {"quantization": quantization, "training": total - quantization, "total": total}
