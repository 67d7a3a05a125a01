"""Texts and samples in JSON files, which users give as paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: Endings of the files that `read_json_entries` reads.
JSON_SUFFIXES = (".json", ".jsonl")


def read_json_entries(path: Path) -> list[Any]:
    """The entries of a .json file with a list, or of a .jsonl file with one a line; a byte order mark is skipped.

    Raises:
        ValueError: if a .json file holds no list.
    """
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".jsonl":  # splitlines() would also cut at U+2028, within strings
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    entries = json.loads(text)
    if not isinstance(entries, list):
        raise ValueError(f"{str(path)!r} holds a {type(entries).__name__}; allowed: a list of texts or objects")
    return entries
