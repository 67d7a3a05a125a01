"""The section about the adapter in the README.md beside it: its "model card" on the Hub.

PEFT writes the card first and the adapter afterwards, and others write it anew between a save and an upload:
`PushToHubMixin.push_to_hub`, `Trainer.create_model_card` and that of TRL's trainers. So the section is made from the
files of the adapter alone, once when `AdaptQConfig` is saved, which PEFT does last, and again whenever
`huggingface_hub.ModelCard.save` writes a README.md beside an ADAPTQ adapter.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import count, groupby
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CardData, ModelCard, RepoCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from .. import __version__
from ..quantization import resolve_quantization
from .certified_deltas import are_certified
from .checkpoint import FROZEN_KEY

CARD_NAME = "README.md"
BEGIN, END = "<!-- adaptq_peft: begin -->", "<!-- adaptq_peft: end -->"
STAGES = ("base", "quantized", "adapted")
#: What a certificate must have; see `adaptq_peft.fit_to_budget`.
CERTIFIED = (
    *("budget", "confidence", "degradation", "upper_bound", "quantization", "training"),
    *("num_documents", "num_tokens"),
)
ADAPTER_PLACEHOLDER = "USER/REPOSITORY"

#: What a profile may hold for each block, and what the card says about it.
_STATISTICS = {
    "magnitude": "mean(abs(H)) of a block's output H",
    "update": "how much the block changes its input, relative",
    "sensitivity": "predicted rise of the general loss, in nats a token, if the block's linears are quantized",
}

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}


def update_model_card(folder: str | os.PathLike[str]) -> None:
    """Write the section about an adapter into the README.md beside it, in place of an earlier one.

    All else in the card stays as it is, but for its metadata: `library_name` is "peft", the tags have "adaptq", and
    `base_model` is the base's name, where that can be a name on the Hub (the Hub refuses a card with anything else).
    The file is replaced atomically. Where `folder` holds no saved ADAPTQ adapter, nothing happens.

    Args:
        folder: what `save_pretrained` wrote to.
    """
    folder = Path(folder)
    config = _read_config(folder)
    if config is None:
        return
    path = folder / CARD_NAME
    card = ModelCard.load(path) if path.exists() else ModelCard("---\nlibrary_name: peft\n---\n")
    _update_metadata(card.data, config.get("base_model_name_or_path"))
    weights, certificate = read_weights(folder), config.get("certificate")
    file = folder / SAFETENSORS_WEIGHTS_NAME
    damaged = file.is_file() and weights.num_values is None
    certified = not certificate or damaged or are_certified(config, file)
    card.text = _replace_section(card.text, render_section(config, weights, certified))
    with tempfile.TemporaryDirectory(dir=folder, prefix=".adaptq-") as staging:
        RepoCard.save(card, Path(staging, CARD_NAME))
        os.replace(Path(staging, CARD_NAME), path)


def keep_section_when_cards_are_rewritten() -> None:
    """Make `ModelCard.save` add the section to a README.md beside an ADAPTQ adapter. A second call changes nothing."""
    save = ModelCard.save
    if getattr(save, "adds_adaptq_section", False):
        return

    @functools.wraps(save)
    def save_with_section(card: ModelCard, filepath: Path | str) -> None:
        save(card, filepath)
        if Path(filepath).name == CARD_NAME:
            update_model_card(Path(filepath).parent)

    save_with_section.adds_adaptq_section = True  # type: ignore[attr-defined]
    ModelCard.save = save_with_section  # type: ignore[method-assign, assignment]


class Weights(NamedTuple):
    """An adapter's weights file: its size in bytes, and the numbers in it (`None` if its header can't be read)."""

    num_bytes: int
    num_values: int | None


def read_weights(folder: Path) -> Weights:
    """Look at the weights file of an adapter, at its header only."""
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.exists():
        return Weights((folder / WEIGHTS_NAME).stat().st_size, None)
    try:
        with safe_open(path, "pt") as file:
            trained = [name for name in file.keys() if FROZEN_KEY not in name]  # noqa: SIM118
            values = sum(math.prod(file.get_slice(name).get_shape()) for name in trained)
    except SafetensorError:  # damaged, and maybe about to be replaced: loading reports it, a card need not
        values = None
    return Weights(path.stat().st_size, values)


def render_section(config: Mapping[str, Any], weights: Weights, certified: bool = True) -> str:
    """The section as Markdown, markers included.

    Args:
        config: content of `adapter_config.json`.
        weights: what is known of the weights file.
        certified: whether its deltas are those of the certificate, if there is one.
    """
    parts = [
        BEGIN,
        "## ADAPTQ adapter",
        _method(config),
        _table(("", ""), _facts(config, weights)),
        *_perplexities(config.get("evaluation")),
        *_certificate(config.get("certificate"), certified),
        *_profile(config),
        "### How to load",
        _how_to_load(config),
        END,
    ]
    return "\n\n".join(parts)


def _read_config(folder: Path) -> dict[str, Any] | None:
    """The config of the ADAPTQ adapter in a folder; `None` if there is none with weights beside it."""
    if not any((folder / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        return None
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) and config.get("peft_type") == "ADAPTQ" else None


def _update_metadata(data: CardData, base: str | None) -> None:
    data["library_name"] = "peft"
    tags = {*(data.get("tags") or ()), "adaptq"}
    if base is not None and _is_repo_id(base):
        data["base_model"] = base
        tags.add(f"base_model:adapter:{base}")
    elif base is not None:
        tags.discard(f"base_model:adapter:{base}")
        if data.get("base_model") == base:
            data.pop("base_model")
    data["tags"] = sorted(tags)


def _is_repo_id(name: str) -> bool:
    """Whether a model of this name can be on the Hub: it is not a folder here, and it has the form of a name there."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not os.path.exists(name)


def _replace_section(text: str, section: str) -> str:
    """The text with the section in place of the old one, else below the first heading, else at the top."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        return before + section + after
    lines = text.splitlines()
    heading = next((number for number, line in enumerate(lines) if line.startswith("# ")), -1)
    head, tail = lines[: heading + 1], lines[heading + 1 :]
    return "\n".join([*head, "", section, "", *tail]).rstrip() + "\n"


def _method(config: Mapping[str, Any]) -> str:
    adapted, num_blocks = _blocks(config)
    if not num_blocks:
        return "Full-rank deltas on the target modules; nothing is quantized."
    frozen = "frozen" if config.get("quantization") == "none" else "frozen, their linears quantized"
    frozen += f", with low-rank corrections of rank {config['frozen_rank']}" if config.get("frozen_rank") else ""
    return (
        f"Full-rank deltas, `W0 + {config.get('delta_scaling')} * delta`, on {len(adapted)} of {num_blocks} "
        f"transformer blocks; the other {num_blocks - len(adapted)} are {frozen}."
    )


def _facts(config: Mapping[str, Any], weights: Weights) -> list[tuple[str, str]]:
    adapted, num_blocks = _blocks(config)
    facts = [("base model", _base(config)), ("recognized by", _fingerprint(config.get("base_fingerprint")))]
    if num_blocks:
        facts.append(("adapted blocks", f"{_ranges(adapted)} ({len(adapted)} of {num_blocks}), {_chosen(config)}"))
        facts.append(("frozen blocks", _quantization(config.get("quantization"), config.get("precision"))))
        if config.get("quantization") == "auto" and config.get("weight_budget") is not None:
            facts.append(("budget of the plan", _budget(config["weight_budget"])))
        facts.extend(("codes of the frozen blocks", codes) for codes in _calibrated_codes(config))
    if weights.num_values is not None:
        facts.append(("trained parameters", f"{weights.num_values:,}"))
    facts.append(("adapter file", f"{weights.num_bytes / 1e6:,.1f} MB"))
    facts.append(("saved by", f"adaptq_peft {__version__}, PEFT {config.get('peft_version')}"))
    return facts


def _blocks(config: Mapping[str, Any]) -> tuple[list[int], int]:
    adapted = config.get("layers_to_transform")
    adapted = [adapted] if isinstance(adapted, int) else adapted or []
    return adapted, (config.get("base_fingerprint") or {}).get("num_blocks", 0)


def _base(config: Mapping[str, Any]) -> str:
    fingerprint = config.get("base_fingerprint") or {}
    name = config.get("base_model_name_or_path")
    revision = fingerprint.get("commit_hash") or config.get("revision")
    parts = [f"`{name}`" if name else "without a name"]
    parts += [f"revision `{revision}`"] if revision else []
    parts += [str(fingerprint[key]) for key in ("model_type", "dtype") if fingerprint.get(key)]
    return ", ".join(parts)


def _fingerprint(fingerprint: Mapping[str, Any] | None) -> str:
    if not fingerprint:
        return "nothing"
    samples = json.dumps(fingerprint["samples"], sort_keys=True).encode()
    return f"values of {len(fingerprint['samples'])} tensors, SHA-256 `{hashlib.sha256(samples).hexdigest()[:16]}`"


def _chosen(config: Mapping[str, Any]) -> str:
    profile, strategy = config.get("profile"), config.get("selection_strategy")
    if profile:
        return f"rule `{strategy}` on {profile['num_samples']} samples, {profile['num_tokens']:,} tokens"
    return f"rule `{strategy}`" if strategy in ("random", "first", "last") else "given by index"


def _budget(budget: int | str) -> str:
    """Of the weights of the frozen blocks' linears; bits are on average."""
    return f"{budget:,} bytes" if isinstance(budget, int) else f"{budget} a weight" if "bit" in budget else budget


def _quantization(quantization: Any, precision: Mapping[str, str] | None) -> str:
    if quantization == "auto":
        counts = Counter((precision or {}).values())
        names = {"nf4": "NF4 with nested absmax", "int8": "LLM.int8()", "none": "the base's precision"}
        used = [f"{counts[key]} in {name}" for key, name in names.items() if counts[key]]
        return f"linears by plan: {', '.join(used)}"
    if not isinstance(quantization, Mapping):
        names = {
            "nf4": "4 bits, NF4, nested absmax",
            "fp4": "4 bits, FP4, nested absmax",
            "int8": "8 bits, LLM.int8()",
        }
        if quantization in names:
            return f"linears in {names[quantization]} (bitsandbytes)"
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") == "hqq":
        hqq = resolve_quantization(quantization)
        return "not quantized" if hqq is None else f"linears by {hqq.describe()}; codes in the adapter file"
    if quantization.get("quant_method") == "gptq":
        return f"linears by {resolve_quantization(quantization).describe()}, as the base has them"  # type: ignore[union-attr, arg-type]
    kind = "load_in_4bit" if quantization.get("load_in_4bit") else "load_in_8bit"
    prefix = "bnb_4bit_" if kind == "load_in_4bit" else "llm_int8_"
    settings = [f"{key}={value}" for key, value in sorted(quantization.items()) if key.startswith(prefix)]
    return f"linears by bitsandbytes: {', '.join([kind, *settings])}"


def _calibrated_codes(config: Mapping[str, Any]) -> list[str]:
    base = config.get("quantized_base")
    if base:
        at = f"@`{base['revision']}`" if base.get("revision") else ""
        return [f"from the quantized base `{base['name_or_path']}`{at}, SHA-256 `{str(base['sha256'])[:16]}`"]
    method = config.get("quantization_calibration")
    return [f"calibrated (`{method}`), in the adapter file"] if method else []


def _perplexities(evaluation: Mapping[str, Mapping[str, Any]] | None) -> list[str]:
    if not evaluation:
        return []
    rows = [
        (f"{name}: {figures['text']}" if "text" in figures else name, *(_figure(figures, stage) for stage in STAGES))
        for name, figures in evaluation.items()
    ]
    return ["### Perplexity (lower is better)", _table(("text", *STAGES), rows)]


def _certificate(certificate: Mapping[str, Any] | None, certified: bool) -> list[str]:
    """What `fit_to_budget` certified; a bound for text like that which was measured."""
    if not certificate:
        return []
    if not certified:
        changed = "they or their scale were changed since, or they are pickled and not compared"
        return [
            "### Forgetting",
            f"Not certified: the deltas are not those that `fit_to_budget` certified ({changed}).",
        ]
    text = (
        f"General perplexity is {certificate['degradation']:+.2%} against the 16-bit base, and at most "
        f"{certificate['upper_bound']:+.2%} with {certificate['confidence']:.0%} confidence: within the budget of "
        f"{certificate['budget']:+.1%}. Quantization brought {certificate['quantization']:+.2%}, training "
        f"{certificate['training']:+.2%}. Measured on {certificate['num_documents']} documents, "
        f"{certificate['num_tokens']:,} tokens, that were not used to choose how the deltas were weakened"
        f"{_weakened(certificate)}. It holds for text of that kind only."
    )
    return ["### Forgetting, certified", text]


def _weakened(certificate: Mapping[str, Any]) -> str:
    if certificate.get("shrinkage"):
        return f": shrunk by the covariances of both texts with lambda {certificate['shrinkage']:.3g}, and by blocks"
    return ": by a factor on each block" if certificate.get("scales") else ""


def _figure(figures: Mapping[str, Any], stage: str) -> str:
    """A perplexity and, where the base's is known, its relative change against it."""
    value, base = figures.get(stage), figures.get("base")
    if value is None:
        return ""
    return f"{value:.2f}" if stage == "base" or base is None else f"{value:.2f} ({value / base - 1:+.1%})"


def _profile(config: Mapping[str, Any]) -> list[str]:
    profile = config.get("profile")
    if not profile:
        return []
    adapted, _ = _blocks(config)
    columns = {name: text for name, text in _STATISTICS.items() if profile.get(name)}
    values = zip(*(profile[name] for name in columns), strict=True)
    rows = [
        (str(index), *(f"{value:.3g}" for value in row), "adapted" if index in adapted else "frozen")
        for index, row in enumerate(values)
    ]
    explained = "; ".join(f"{name}: {text}" for name, text in columns.items()) + "."
    return ["### Activation profile", explained, _table(("block", *columns, ""), rows)]


def _how_to_load(config: Mapping[str, Any]) -> str:
    auto_class = _AUTO_CLASSES.get(config.get("task_type") or "")
    base = config.get("base_model_name_or_path")
    dtype = (config.get("base_fingerprint") or {}).get("dtype")
    adapter = f'adapter = "{ADAPTER_PLACEHOLDER}"  # this repository, or the folder with these files'
    if auto_class is None or base is None:
        imports = ["from peft import PeftModel"]
        loading = [adapter, "model = PeftModel.from_pretrained(base_model, adapter)  # base_model: loaded by you"]
    else:
        imports = [f"from peft import {auto_class}", "from transformers import AutoTokenizer"]
        argument = f', dtype="{dtype}"' if dtype else ""
        loading = [
            adapter,
            f"model = {auto_class}.from_pretrained(adapter{argument})",
            f'tokenizer = AutoTokenizer.from_pretrained("{base}")',
        ]
    first = "import adaptq_peft  # pip install adaptq_peft; registers the method with PEFT"
    return "\n".join(["```python", first, *imports, "", *loading, "```"])


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ranges(indices: Sequence[int]) -> str:
    """[0, 2, 3, 4] -> "0, 2-4"."""
    counter = count()
    runs = [list(run) for _, run in groupby(indices, key=lambda index: index - next(counter))]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
