"""Texts and samples in JSON files, which users give as paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: Endings of the files that `read_json_entries` reads.
JSON_SUFFIXES = (".json", ".jsonl")


def read_utf8(path: Path) -> str:
    """The text of a file, without a byte order mark.

    Raises:
        ValueError: if it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not in UTF-8, which texts must be in: {error}") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where} is not JSON: {error}. A .jsonl file has one entry a line, a .json file one list"
        ) from error


def read_json_entries(path: Path) -> list[Any]:
    """The entries of a .json file with a list, or of a .jsonl file with one a line; a byte order mark is skipped.

    Raises:
        ValueError: if it is not UTF-8 or not JSON, with the line, or a .json file holds no list.
    """
    text = read_utf8(path)
    if path.suffix == ".jsonl":  # splitlines() would also cut at U+2028, within strings
        lines = enumerate(text.split("\n"), start=1)
        return [_parse(line, f"line {number} of {str(path)!r}") for number, line in lines if line.strip()]
    entries = _parse(text, repr(str(path)))
    if not isinstance(entries, list):
        raise ValueError(f"{str(path)!r} holds a {type(entries).__name__}; allowed: a list of texts or objects")
    return entries
