"""What can be chosen about a study, and what a finished run depends on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

DTYPES = ("auto", "float32", "bfloat16", "float16")
#: Settings that say which runs there are, not what a run is; the dtype is noted apart, once it is decided.
_NOT_OF_A_RUN = ("output_dir", "methods", "samples", "seeds", "rates", "dtype", "save_adapters")


@dataclass(frozen=True)
class StudySettings:
    """What can be chosen about a study.

    Attributes:
        output_dir: where finished runs, tables and figures go; made if missing.
        methods: names of methods or of their groups; see `resolve_methods`.
        samples: training-set sizes N, in samples of `length` tokens.
        seeds: of the choice of samples, their order, and whatever a method draws. The learning rate is searched with
            the first.
        rates: learning rates that each method tries. Methods that train full-rank weights take a fixed fraction of
            them (`Method.rate_factor`); methods with a fixed recipe ignore them.
        epochs: passes over the N samples.
        batch_size: samples a step, before a method's gradient accumulation.
        length: tokens of a sample.
        weight_decay: of AdamW.
        evaluation_tokens: tokens of the test, on the domain and on general text each.
        validation_tokens: the same of the text that rates are chosen on, and that a budget is fitted on.
        max_length: tokens in a window of the evaluation.
        anchor_samples: general samples that the anchor holds.
        budget: allowed degradation for methods that hold one.
        dtype: that models are loaded in, as torch names it; "auto": that of finished runs in the folder, else bfloat16
            on a GPU, and on a CPU what it computes faster in.
        scales: factors below 1 at which the trained change is measured, too, where `Method.is_scaled` says so.
        save_adapters: whether the adapter of each finished run is saved, too.

    Raises:
        ValueError: if a number is out of range; all faults are in one message.
    """

    output_dir: Path = Path("runs/compare")
    methods: tuple[str, ...] = ("main",)
    samples: tuple[int, ...] = (500,)
    seeds: tuple[int, ...] = (0,)
    rates: tuple[float, ...] = (1e-4, 2e-4, 4e-4, 8e-4)
    epochs: int = 3
    batch_size: int = 8
    length: int = 128
    weight_decay: float = 0.01
    evaluation_tokens: int = 20_000
    validation_tokens: int = 10_000
    max_length: int = 512
    anchor_samples: int = 256
    budget: float = 0.02
    dtype: str = "auto"
    scales: tuple[float, ...] = ()
    save_adapters: bool = False

    def __post_init__(self) -> None:
        faults = [fault for field in fields(self) for fault in _faults(field.name, getattr(self, field.name))]
        if faults:
            raise ValueError("settings of the study out of range: " + "; ".join(faults))

    def of_a_run(self) -> dict[str, Any]:
        """The settings that decide what a run gives, as JSON types."""
        return {
            **{name: value for name, value in asdict(self).items() if name not in _NOT_OF_A_RUN},
            "scales": list(self.scales),
        }


_LEAST = {
    "samples": 1,
    "seeds": 0,
    "epochs": 1,
    "batch_size": 1,
    "length": 2,
    "evaluation_tokens": 2,
    "validation_tokens": 2,
    "max_length": 2,
    "anchor_samples": 1,
}


def _faults(name: str, given: Any) -> list[str]:
    """What is wrong with the value of one setting; of a tuple, with each of its values."""
    values = given if isinstance(given, tuple) else (given,)
    faults = []
    if name in ("methods", "samples", "seeds", "rates") and (not values or len(set(values)) < len(values)):
        faults.append(f"{name}={given}, must be one or more different values")
    if name in _LEAST:
        faults += [f"{name}={value}, must be at least {_LEAST[name]}" for value in values if value < _LEAST[name]]
    if name == "rates":
        faults += [f"rates={value}, must be above 0" for value in values if not value > 0]
    if name == "scales":
        faults += [f"scales={value}, must be from 0 to below 1" for value in values if not 0 <= value < 1]
    if name == "dtype" and given not in DTYPES:
        faults.append(f"dtype={given!r}, must be one of {list(DTYPES)}")
    if name == "weight_decay" and not given >= 0:
        faults.append(f"weight_decay={given}, must be at least 0")
    if name == "budget" and not given > -1:
        faults.append(f"budget={given}, must be above -1; 0.02 allows 2% more perplexity")
    return faults
