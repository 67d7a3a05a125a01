"""The two texts of a study, each in documents for training, validation and test."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..selection.json_files import JSON_SUFFIXES, read_json_entries, read_utf8

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Share of the documents that is held out for validation where no validation text is given. Of general text half: it
#: is not trained on but by the anchor, and certifying a budget takes many documents.
DOMAIN_VALIDATION_SHARE, GENERAL_VALIDATION_SHARE = 0.05, 0.5

#: What is kept of each document at least where many are cut, and how many documents are kept at least.
LEAST_TOKENS, LEAST_DOCUMENTS = 64, 64

#: The heading of an article in WikiText's files: " = Title = ", where sections have more signs.
_ARTICLE = re.compile(r"^ = [^=].*[^=] = $", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class StudyTexts:
    """The documents of a study. Nothing of the test is trained on, tuned on, or used for a choice.

    Attributes:
        domain_train: what the methods are trained on, and profiled with.
        domain_valid: what learning rates are chosen on.
        domain_test: what the domain is reported on.
        general_train: what the anchor holds on to, and what profiles are compared with.
        general_valid: what budgets are fitted and certified on.
        general_test: what forgetting is reported on.
    """

    domain_train: list[str]
    domain_valid: list[str]
    domain_test: list[str]
    general_train: list[str]
    general_valid: list[str]
    general_test: list[str]

    @property
    def digest(self) -> str:
        """A checksum of all documents."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


def read_study_texts(files: Mapping[str, Path | None]) -> StudyTexts:
    """Read documents from files.

    Args:
        files: a path for "domain_train", "domain_test", "general_train" and "general_test". "domain_valid" and
            "general_valid" may be `None` or left out: then evenly spaced documents are held out from the training
            files, 5% of the domain's and half of the general ones.

    Raises:
        ValueError: if a file is missing in `files`, is in an unknown format, or has too few documents.
        FileNotFoundError: if a path names no file.
    """
    needed = ("domain_train", "domain_test", "general_train", "general_test")
    missing = [name for name in needed if files.get(name) is None]
    if missing:
        raise ValueError(f"no file is given for {missing}; give all of {list(needed)}, or none for the demo's texts")
    read = {name: read_documents(path) for name, path in files.items() if path is not None}
    for text, share in (("domain", DOMAIN_VALIDATION_SHARE), ("general", GENERAL_VALIDATION_SHARE)):
        if f"{text}_valid" not in read:
            if len(read[f"{text}_train"]) < 2:
                raise ValueError(
                    f"{str(files[f'{text}_train'])!r} holds one document, and some are held out for validation; a "
                    f".txt file is cut at blank lines. Give more documents, or a file for {text}_valid"
                )
            read[f"{text}_train"], read[f"{text}_valid"] = hold_out(read[f"{text}_train"], share)
    return StudyTexts(**read)


def demo_study_texts() -> StudyTexts:
    """The demo's texts: presidential messages of 1790 to 1829 as the domain, Wikipedia's prose as general text.

    Raises:
        ModuleNotFoundError: if a package with the texts is missing; the message says how to install it.
    """
    from ..demo import texts

    train, test = texts.split_by_document(texts.domain_documents(*texts.DOMAIN_YEARS))
    messages = ["\n\n".join(texts.read_message(name)) for name in train]
    domain_train, domain_valid = hold_out(messages, 2 * DOMAIN_VALIDATION_SHARE)
    rest, general_test = hold_out(texts.load_wikipedia_prose(), 1 / 3)
    general_train, general_valid = hold_out(rest, GENERAL_VALIDATION_SHARE)
    return StudyTexts(
        domain_train=domain_train,
        domain_valid=domain_valid,
        domain_test=[
            "\n\n".join(texts.opening(texts.read_message(name), texts.TEST_WORDS_PER_MESSAGE)) for name in test
        ],
        general_train=general_train,
        general_valid=general_valid,
        general_test=general_test,
    )


def read_documents(path: Path) -> list[str]:
    """The documents of a file.

    Args:
        path: a .jsonl file with a "text" in each line, a .json file with a list of texts or of such objects, or a .txt
            file. That is cut at the headings of articles if it has some as WikiText's files do, else at blank lines.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the ending is another one, a .json file holds no list, an object has no "text", or no document
            has any text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}; give a .txt, .json or .jsonl file of documents")
    if path.suffix == ".txt":
        text = read_utf8(path)
        found = _articles(text) if _ARTICLE.search(text) else _BLANK_LINES.split(text)
    elif path.suffix in JSON_SUFFIXES:
        found = [_text_of(entry, path) for entry in read_json_entries(path)]
    else:
        raise ValueError(f"{str(path)!r} ends in {path.suffix!r}; allowed: .txt, .json, .jsonl")
    documents = [document.strip() for document in found if document.strip()]
    if not documents:
        raise ValueError(f"{str(path)!r} has no text in it")
    return documents


def hold_out(documents: Sequence[str], share: float) -> tuple[list[str], list[str]]:
    """Split documents into (kept, held out): evenly spaced ones, at least one, are held out.

    Args:
        documents: two or more.
        share: which part is held out, above 0 and below 1.

    Raises:
        ValueError: if there are too few documents.
    """
    count = max(round(share * len(documents)), 1)
    if count >= len(documents):
        raise ValueError(
            f"{len(documents)} document(s) can't be split into training and validation; give more, or files for "
            "validation"
        )
    taken = {int((place + 0.5) * len(documents) / count) for place in range(count)}
    return (
        [document for index, document in enumerate(documents) if index not in taken],
        [documents[index] for index in sorted(taken)],
    )


def cut_documents(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], total: int) -> list[str]:
    """Cut the longest documents, so that all together have about `total` tokens.

    None is left out as long as each can keep `LEAST_TOKENS`; of more documents than that evenly spaced ones are taken,
    `LEAST_DOCUMENTS` at least: the first few words of each would say little of a model.

    Args:
        tokenizer: a fast one: where tokens end in the text is asked for.
        documents: any number.
        total: tokens in all; documents with fewer stay as they are.
    """
    encoded: Any = tokenizer(list(documents), return_offsets_mapping=True, add_special_tokens=False, verbose=False)
    ends = [[end for _, end in offsets] for offsets in encoded["offset_mapping"]]
    needed = sum(min(len(places), LEAST_TOKENS) for places in ends)
    if needed > total and len(ends) > LEAST_DOCUMENTS:
        count = max(len(ends) * total // needed, LEAST_DOCUMENTS)
        taken = [place * len(ends) // count for place in range(count)]
        documents, ends = [documents[place] for place in taken], [ends[place] for place in taken]
    most = largest_cap([len(document) for document in ends], total)
    return [
        document if len(places) <= most else document[: places[most - 1]]
        for document, places in zip(documents, ends, strict=True)
    ]


def largest_cap(lengths: Sequence[int], total: int) -> int:
    """The largest c, at least 1, with sum(min(length, c)) <= total."""
    left = total
    for rank, length in enumerate(sorted(lengths)):
        share = left // (len(lengths) - rank)
        if length > share:
            return max(share, 1)
        left -= length
    return max([*lengths, 1])


def _articles(text: str) -> list[str]:
    starts = [match.start() for match in _ARTICLE.finditer(text)]
    return [text[start:end] for start, end in zip([0, *starts], [*starts, len(text)], strict=True)]


def _text_of(entry: Any, path: Path) -> str:
    text = entry.get("text") if isinstance(entry, dict) else entry
    if not isinstance(text, str):
        raise ValueError(
            f'an entry of {str(path)!r} is {str(entry)[:60]!r}; allowed: a text, or an object with "text"'
        )
    return text
