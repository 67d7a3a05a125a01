"""Finished runs on disk: one JSON file each, named and checked by all that its result depends on."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .methods import Method

Record = dict[str, Any]


def recorded_dtype(folder: Path) -> str | None:
    """The dtype of the finished runs in a folder; `None` if there are none."""
    first = next(iter(sorted(folder.glob("*.json"))), None)
    return None if first is None else json.loads(first.read_text(encoding="utf-8"))["depends_on"]["dtype"]


class Run(NamedTuple):
    """One training of one method.

    Args:
        method: what is trained.
        samples: N; 0 for methods that are not trained.
        rate: peak learning rate.
        seed: of the run.
    """

    method: Method
    samples: int
    rate: float
    seed: int

    @property
    def training(self) -> tuple[str, int, float, int]:
        """Equal for runs that share one training."""
        return self.method.training, self.samples, self.rate, self.seed

    @property
    def untrained(self) -> tuple[str, int, int] | None:
        """Equal for runs whose ADAPTQ adapters are the same before training; `None` for other methods."""
        adapter = self.method.untrained_adapter
        return None if adapter is None else (adapter, self.samples, self.seed)

    def __str__(self) -> str:
        return f"{self.method.name}, N={self.samples}, rate {self.rate:g}, seed {self.seed}"


@dataclass(frozen=True)
class RunStore:
    """The finished runs of a study. A file appears when its run is complete, so a killed run leaves none.

    Attributes:
        folder: where the files are.
        identity: what all runs depend on: the model, the texts, the settings. Runs with another one are left alone.
    """

    folder: Path
    identity: dict[str, Any]

    def name(self, run: Run) -> str:
        """How files of a run are called."""
        return f"{run.method.name}_n{run.samples}_lr{run.rate:g}_seed{run.seed}_{self._digest(run)}"

    def path(self, run: Run) -> Path:
        """The file of a run."""
        return self.folder / f"{self.name(run)}.json"

    def find(self, run: Run) -> Record | None:
        """What a run gave, or `None` if it has not finished. A method that does the same under another name counts."""
        found = sorted(self.folder.glob(f"*_{self._digest(run)}.json"))
        return json.loads(found[0].read_text(encoding="utf-8")) if found else None

    def records(self) -> list[Record]:
        """All finished runs with this identity."""
        read = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self.folder.glob("*.json"))]
        return [r for r in read if all(r["depends_on"].get(name) == value for name, value in self.identity.items())]

    def environments(self) -> list[dict[str, Any]]:
        """What the finished runs were made on, each once; runs of before it was recorded are left out."""
        found = [record["environment"] for record in self.records() if "environment" in record]
        return [one for number, one in enumerate(found) if one not in found[:number]]

    def searched(self, method: Method, samples: int) -> dict[int, list[Record]]:
        """For each seed what a method gave with each learning rate that has been tried, by rate, in whichever call."""
        alike, by_seed = self._depends_on(Run(method, samples, 0.0, 0)), defaultdict(list)
        for record in self.records():
            if {**record["depends_on"], "rate": 0.0, "seed": 0} == alike:
                by_seed[record["seed"]].append(record)
        return {seed: sorted(records, key=lambda record: record["rate"]) for seed, records in by_seed.items()}

    def timed(self, method: Method) -> dict[str, float] | None:
        """The seconds of the parts of some finished run that trained as a method does, or `None`."""
        training = json.loads(method.training)
        alike = (record["seconds"] for record in self.records() if record["depends_on"]["training"] == training)
        return next(alike, None)

    def save(self, run: Run, record: Record) -> None:
        """Write a finished run, in one step."""
        self.folder.mkdir(parents=True, exist_ok=True)
        described = {"method": run.method.name, "samples": run.samples, "rate": run.rate, "seed": run.seed}
        text = json.dumps({**described, **record, "depends_on": self._depends_on(run)}, indent=1)
        path = self.path(run)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)

    def _depends_on(self, run: Run) -> dict[str, Any]:
        method = {"training": json.loads(run.method.training), "finish": run.method.finish}
        return {**self.identity, **method, "samples": run.samples, "rate": run.rate, "seed": run.seed}

    def _digest(self, run: Run) -> str:
        text = json.dumps(self._depends_on(run), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]


def choose_rate(records: Sequence[Record]) -> float:
    """The learning rate of the run with the lowest perplexity on the domain's validation text.

    Runs that do not hold their budget come after all that do, and runs whose loss is not finite last. The test is not
    looked at.

    Args:
        records: runs that differ in the learning rate; at least one.
    """

    def rank(record: Record) -> tuple[bool, bool, float]:
        perplexity = record["validation"]["domain"]
        infeasible = record.get("finish", {}).get("feasible") is False
        return perplexity is None, infeasible, perplexity or 0.0

    return float(min(records, key=rank)["rate"])
