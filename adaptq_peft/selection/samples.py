"""Takes samples from calibration data, in whichever form it comes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, tee
from pathlib import Path
from typing import Any

from .json_files import JSON_SUFFIXES, read_json_entries, read_utf8


def reread(data: Any) -> Any:
    """Calibration data that can be read again: profiling and calibrated rounding read the same. Reads nothing yet."""
    return _Reread(data) if isinstance(data, Iterator) else data


class _Reread:
    """What an iterator yields, as often as it is asked for."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        (self._unread,) = tee(iterator, 1)

    def __iter__(self) -> Iterator[Any]:
        self._unread, copy = tee(self._unread)
        return copy


def draw_samples(data: Any, samples: int) -> list[Any]:
    """At most `samples` entries of `data`: evenly spaced ones if its length is known, else the first.

    Args:
        data: as for `calibration_batches`, but no `DataLoader` and not `None`.
        samples: how many at most.

    Raises:
        ValueError: if it has another form.
        FileNotFoundError: if a path names no file.
    """
    if isinstance(data, (str, os.PathLike)):
        data = _read_file(data)
    is_indexed = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if isinstance(data, Mapping) or hasattr(data, "iterrows"):  # which iterate over their keys, not over samples
        raise ValueError(
            f"calibration data is a {type(data).__name__} with {[str(key) for key in data][:4]}; allowed: one sample "
            "an entry. Of a DatasetDict give one split, data['train']; columns go into datasets.Dataset.from_dict or "
            "from_pandas."
        )
    if not (is_indexed or isinstance(data, Iterable)):
        raise ValueError(
            f"calibration data is a {type(data).__name__}; allowed: a list of texts or dicts, a Dataset, a "
            "DataLoader, or the path of a .txt, .json or .jsonl file"
        )
    if not is_indexed:
        return list(islice(data, samples))
    total, rows = len(data), getattr(data, "iloc", data)  # a pandas Series is indexed by labels
    count = min(samples, total)
    return [rows[i * total // count] for i in range(count)]  # a torch Dataset may have no __iter__


def _read_file(path: str | os.PathLike[str]) -> Sequence[Any]:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"calibration data is the path {str(path)!r}, and there is no such file. Give an existing .txt, .json or "
            ".jsonl file; texts themselves go into a list."
        )
    if path.suffix in JSON_SUFFIXES:
        return read_json_entries(path)
    if path.suffix == ".txt":
        return [line for line in read_utf8(path).split("\n") if line.strip()]
    raise ValueError(f"calibration file {str(path)!r} ends in {path.suffix!r}; allowed: .txt, .json, .jsonl")
