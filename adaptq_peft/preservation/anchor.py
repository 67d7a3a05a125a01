"""The anchor: a second loss that holds a model to its base on general text while it learns the domain."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..evaluation.perplexity import token_logits, token_nll
from ..offloading import input_device
from .anchor_weight import AdaptiveWeight
from .teacher import AnsweredText, BaseAnswers, collate
from .top_k_kl import top_k_kl

MODES = ("kl", "replay")
_PLAIN_LOOP_BATCH = 4
_Self = TypeVar("_Self", bound="Anchor")


class Anchor:
    """Gives, for each optimizer step, the loss of a batch of general text. For plain loops:

        anchor = Anchor.from_base(model, general_texts, tokenizer)  # before get_peft_model
        model = get_peft_model(model, config)
        for batch in loader:
            model(**batch).loss.backward()
            anchor.loss(model).backward()
            optimizer.step()
            optimizer.zero_grad()

    With gradient accumulation call it once an optimizer step, and with `DistributedDataParallel` before the domain's
    backward pass, on the module inside (`model.module`): the gradients are then averaged with the domain's.

    Args:
        general_texts: text of the kind that the model must not forget, as `calibration_data` of `AdaptQConfig`: texts,
            dicts, a Dataset, a DataLoader or the path of a file. None (default): the base writes it.
        tokenizer: for texts. None (default) takes the one that `model.name_or_path` names.
        mode: "kl" (default): KL(base || model), from answers of the base that are cached once. "replay":
            cross-entropy on the text itself; no cache, but it also teaches what the text says.
        weight: factor of the loss, in nats a token, beside the domain's mean loss a token. Default 1.
        target_kl: hold the mean KL, in nats a token, at this by adapting the weight (`AdaptiveWeight`), which `weight`
            then starts. On text that the base would write the KL is the expected rise of the negative log likelihood:
            for 2% more perplexity log(1.02) = 0.0198. None (default): the weight is constant. Only for "kl".
        one_sided: only positions count where the model gives the text's next token less probability than its base
            did, so that it is not pulled back from what it got better at, as the inequality constraints of gradient
            episodic memory allow (Lopez-Paz and Ranzato 2017, arXiv:1706.08840). Default False: all count. Only for
            "kl"; `target_kl` is then that of these positions, still over the number of all.
        batch_size: texts in an optimizer step, for each process. None (default): a quarter of the samples of the
            domain in a Trainer, 4 in a plain loop.
        samples: texts at most. Default 256.
        max_length: tokens that a text is cut to. Default 256.
        top_k: next tokens whose probabilities are cached at each position. Default 64.
        seed: seed of the order of the texts. Default 0.

    Attributes:
        answers: what the base answered, once `prepare` has run.

    Raises:
        ValueError: if a number is out of range or `mode` is unknown; all faults are named.
    """

    def __init__(
        self,
        general_texts: Any = None,
        tokenizer: Any = None,
        *,
        mode: str = "kl",
        weight: float = 1.0,
        target_kl: float | None = None,
        one_sided: bool = False,
        batch_size: int | None = None,
        samples: int = 256,
        max_length: int = 256,
        top_k: int = 64,
        seed: int = 0,
    ) -> None:
        if isinstance(general_texts, BaseAnswers) and general_texts.kind != mode:
            raise ValueError(
                f"The anchor can't be set up: mode={mode!r}, and the BaseAnswers hold {general_texts.kind!r}: "
                'BaseAnswers.of makes those for mode="kl", BaseAnswers.replay those for mode="replay".'
            )
        numbers = {"batch_size": batch_size, "samples": samples, "max_length": max_length, "top_k": top_k}
        _check(mode, weight, target_kl, one_sided, numbers)
        self.answers: BaseAnswers | None = general_texts if isinstance(general_texts, BaseAnswers) else None
        self.mode = mode
        self.batch_size = batch_size
        self._general_texts = general_texts
        self._tokenizer = tokenizer
        self._reading: dict[str, Any] = {"samples": samples, "max_length": max_length}
        self._top_k = top_k
        self._seed = seed
        self._weight = AdaptiveWeight(weight, target_kl)
        self._target = target_kl
        self._one_sided = one_sided
        self._position = 0
        self._sum, self._steps = torch.zeros(()), 0  # of the losses since `pop_metrics`

    @classmethod
    def from_base(cls: type[_Self], model: nn.Module, *args: Any, **settings: Any) -> _Self:
        """Make an anchor and ask `model` for its answers. Call it with the original model, before `get_peft_model`.

        Args:
            model: the model as it was loaded; a 4-bit one gives the answers of a 4-bit one, and a warning.
            args, settings: those of the class: `general_texts`, `tokenizer`, `weight` and so on.
        """
        anchor = cls(*args, **settings)
        anchor.prepare(model)
        return anchor

    def prepare(self, model: nn.Module, tokenizer: Any = None) -> None:
        """Ask the model, with its adapters off, for its answers, unless they are here already.

        Args:
            model: the model, with or without an adapter.
            tokenizer: taken where none was given before.
        """
        if self.answers is None:
            given = (model, self._general_texts, self._tokenizer or tokenizer)
            if self.mode == "kl":
                self.answers = BaseAnswers.of(*given, **self._reading, top_k=self._top_k)
            else:
                self.answers = BaseAnswers.replay(*given, **self._reading)
        if not len(self.answers):
            raise ValueError("The general texts of the anchor have one token each; give texts of two or more.")

    @property
    def weight(self) -> float:
        """The factor of the loss now."""
        return self._weight.value

    def loss(self, model: nn.Module) -> Tensor:
        """Weighted mean loss a token on the next batch of general text, a scalar with a gradient."""
        return torch.stack(list(self.losses(model))).sum()

    def losses(self, model: nn.Module, micro_batch: int | None = None) -> Iterator[Tensor]:
        """The parts of `loss`, one after the other: take the gradient of each before the next.

        Args:
            model: the model that trains, in the mode that it trains in.
            micro_batch: texts run at once; None: all.
        """
        texts = self._next_texts()
        answers = sum(len(text.tokens) for text in texts)
        size = micro_batch or len(texts)
        weight, total = self.weight, torch.zeros(())
        for start in range(0, len(texts), size):
            part = self._divergence(model, texts[start : start + size]) / answers
            total = total.to(part.device) + part.detach()
            yield weight * part
        self._record(total)

    def _divergence(self, model: nn.Module, texts: list[AnsweredText]) -> Tensor:
        batch, *answers = collate(texts, input_device(model))
        logits = token_logits(model, **batch)
        vocabulary = self.answers.vocabulary  # type: ignore[union-attr]
        if logits.shape[-1] < vocabulary:
            raise ValueError(
                f"the model has {logits.shape[-1]} tokens to choose among, the base that answered had {vocabulary}: "
                "make the anchor from the base that is trained"
            )
        logits = logits.flatten(0, 1)
        rows, tokens, log_probs, base = (part.to(logits.device) for part in answers)
        if self._one_sided:
            with torch.no_grad():
                nll = token_nll(logits, batch["input_ids"].flatten().roll(-1))[rows]
            worse = -nll < base
            rows, tokens, log_probs = rows[worse], tokens[worse], log_probs[worse]
        return top_k_kl(logits, rows, tokens, log_probs)

    def _next_texts(self) -> list[AnsweredText]:
        """This process's share of the next batch; each pass over the texts has an order of its own."""
        if self.answers is None:
            raise ValueError("the anchor has no answers of the base yet: make it with from_base(model, ...)")
        size = self.batch_size or _PLAIN_LOOP_BATCH
        process, processes = _process()
        places = range(self._position + process * size, self._position + (process + 1) * size)
        self._position += processes * size
        return [self.answers[self._text_at(place)] for place in places]

    def _text_at(self, place: int) -> int:
        count = len(self.answers)  # type: ignore[arg-type]
        order = torch.Generator().manual_seed(self._seed + place // count)
        return int(torch.randperm(count, generator=order)[place % count])

    def _record(self, kl: Tensor) -> None:
        _, processes = _process()
        if processes > 1:
            torch.distributed.all_reduce(kl)
            kl = kl / processes
        if self._target is not None:
            self._weight.update(kl.item())
        self._sum, self._steps = self._sum.to(kl.device) + kl, self._steps + 1

    def pop_metrics(self) -> dict[str, float]:
        """Mean over the steps since the last call: "anchor_kl" or "anchor_loss", nats a token, and "anchor_weight"."""
        if not self._steps:
            return {}
        mean = self._sum.item() / self._steps
        self._sum, self._steps = torch.zeros(()), 0
        return {"anchor_kl" if self.mode == "kl" else "anchor_loss": mean, "anchor_weight": self.weight}

    def state_dict(self) -> dict[str, Any]:
        """Where the anchor is in its texts, and its weight; ready for JSON. The answers are not in it."""
        digest = None if self.answers is None else self.answers.digest
        return {"position": self._position, "weight": self._weight.state_dict(), "texts": digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another left off; on other texts a warning says so."""
        if self.answers is not None and state["texts"] not in (None, self.answers.digest):
            warnings.warn(
                "The general texts of the anchor are not those that the checkpoint was trained with: training goes on "
                "with the new ones.",
                stacklevel=2,
            )
        self._position = state["position"]
        self._weight.load_state_dict(state["weight"])


def _process() -> tuple[int, int]:
    """Rank of this process and number of processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _check(mode: str, weight: float, target_kl: float | None, one_sided: bool, numbers: dict[str, int | None]) -> None:
    faults = [
        f"{name}={given} must be at least 1" for name, given in numbers.items() if given is not None and given < 1
    ]
    if mode not in MODES:
        faults.append(f"mode={mode!r}; allowed: {', '.join(map(repr, MODES))}")
    if not 0 < weight < float("inf"):
        faults.append(f"weight={weight} must be positive")
    if target_kl is not None and not 0 < target_kl < float("inf"):
        faults.append(f"target_kl={target_kl} must be positive, in nats a token: log(1.02) = 0.0198 stands for 2%")
    if target_kl is not None and mode != "kl":
        faults.append(f'target_kl is for mode="kl"; mode={mode!r} has no KL to hold')
    if one_sided and mode != "kl":
        faults.append(f'one_sided is for mode="kl"; mode={mode!r} has no base to be worse than')
    if faults:
        raise ValueError("The anchor can't be set up: " + "; ".join(faults) + ".")
