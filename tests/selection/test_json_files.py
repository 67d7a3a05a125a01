"""JSON files as users have them: any line ends, separators within strings, a byte order mark."""

from __future__ import annotations

import json

import pytest

from adaptq_peft.selection.json_files import read_json_entries

ENTRIES = [{"text": "one\u2028more\x85end"}, "two"]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_entries_are_read_as_they_were_written(tmp_path, suffix, mark):
    lines = [json.dumps(entry, ensure_ascii=False) for entry in ENTRIES]
    text = "\r\n\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]"
    (tmp_path / f"a{suffix}").write_text(mark + text, encoding="utf-8", newline="")
    assert read_json_entries(tmp_path / f"a{suffix}") == ENTRIES


def test_the_line_that_is_no_json_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('"one"\n\n{"text": }\n')
    with pytest.raises(ValueError, match=r"line 3 of '.*a.jsonl' is not JSON: Expecting value.*one entry a line"):
        read_json_entries(tmp_path / "a.jsonl")


def test_a_file_in_another_encoding_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('"café"'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"'.*a.jsonl' is not in UTF-8, which texts must be in"):
        read_json_entries(tmp_path / "a.jsonl")


def test_what_is_no_list_is_named(tmp_path):
    (tmp_path / "a.json").write_text('"text"')
    with pytest.raises(ValueError, match=r"a.json' holds a str; allowed: a list of texts or objects"):
        read_json_entries(tmp_path / "a.json")
