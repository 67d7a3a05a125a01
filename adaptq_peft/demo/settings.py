"""What can be chosen about the demo."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class DemoSettings:
    """What can be chosen about the demo.

    Attributes:
        output_dir: Where the report, the figures and the adapter go; made if missing.
        steps: Optimizer steps.
        seed: Seed of the order of the training samples.
        ratio: Share of the blocks that is adapted, in (0, 1].
        learning_rate: Peak learning rate, as in a script written for LoRA.
        batch_size: Samples a step.
        sequence_length: Tokens in a training or calibration sample.
        calibration_samples: Paragraphs that the profile is taken on.
        evaluation_tokens: Tokens of domain and of general text that perplexity is measured on.
        quantization_calibration: How the 4-bit codes are chosen, as in `AdaptQConfig`; `None`: plain rounding.

    Raises:
        ValueError: If a number is out of range; all faults are in one message.
    """

    output_dir: Path = Path("runs/demo")
    steps: int = 100
    seed: int = 0
    ratio: float = 0.5
    learning_rate: float = 2e-4
    batch_size: int = 4
    sequence_length: int = 128
    calibration_samples: int = 100
    evaluation_tokens: int = 10_000
    quantization_calibration: str | None = "auto"

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch_size": 1, "sequence_length": 2, "calibration_samples": 1, "evaluation_tokens": 2}
        given = asdict(self)
        faults = [f"{name}={given[name]}, must be at least {n}" for name, n in least.items() if given[name] < n]
        if not 0 < self.ratio <= 1:
            faults.append(f"ratio={self.ratio}, must be in (0, 1]")
        if not self.learning_rate > 0:
            faults.append(f"learning_rate={self.learning_rate}, must be above 0")
        if faults:
            raise ValueError("settings of the demo out of range: " + "; ".join(faults))
