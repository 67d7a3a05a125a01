"""What is stored is told from the headers alone, and where it is not the model of config.json."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import makers_of_checkpoints
from transformers import AutoModelForCausalLM

from adaptq_peft import AdaptQConfig
from adaptq_peft.evaluation import largest_num_adapted_blocks, measure_weight_bytes, plan_memory
from adaptq_peft.evaluation.checkpoint_headers import CheckpointHeaders, HeadersUnavailable
from adaptq_peft.skeleton import build_skeleton

FILE = "model.safetensors"


@pytest.fixture
def save(make_model, tmp_path):
    makers = makers_of_checkpoints(make_model)

    def run(kind="llama", dtype=torch.float32, **options):
        makers[kind]().to(dtype).save_pretrained(tmp_path, **options)
        return tmp_path

    return run


def summarize(folder):
    return CheckpointHeaders(folder).summarize(build_skeleton(folder))


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("shards", ["10GB", "60KB"])
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "t5", "qwen-moe"])
def test_what_save_pretrained_wrote_is_the_model_of_the_config(save, kind, shards):
    folder = save(kind, torch.bfloat16, max_shard_size=shards)
    stored = sum(tensor.nbytes for file in folder.glob("*.safetensors") for tensor in load_file(file).values())
    found = summarize(folder)
    assert (found.bytes_by_dtype, found.mismatches) == ({"bfloat16": stored}, [])


def test_each_difference_is_named(save):
    folder = save()
    tensors = load_file(folder / FILE)
    tensors["model.norm.weight"] = torch.zeros(5, dtype=torch.float16)
    tensors["model.layers.3.mlp.other.weight"] = tensors.pop("model.layers.3.mlp.up_proj.weight")
    save_file(tensors, folder / FILE, {"format": "pt"})
    found = summarize(folder)
    assert found.mismatches == [
        "1 weights are not stored, the first: model.layers.3.mlp.up_proj.weight",
        "1 stored tensors are none of the model's, the first: model.layers.3.mlp.other.weight",
        "1 weights have another shape, the first: model.norm.weight is [5], and [64] by config.json",
    ]
    assert found.bytes_by_dtype["float16"] == 10


def test_a_config_without_a_dtype_is_loaded_in_that_of_the_tensors(save):
    folder = save(dtype=torch.bfloat16)
    edit_config(folder, dtype=None)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    plan = plan_memory(folder)
    assert plan.dtype == str(loaded.dtype).removeprefix("torch.") == "bfloat16"
    assert plan.unquantized == measure_weight_bytes(loaded)
    least = plan_memory(folder, AdaptQConfig(num_adapted_blocks=1)).methods["ADAPTQ"].training("sgd")
    assert largest_num_adapted_blocks(folder, least, optimizer="sgd") == 1
    assert plan_memory(folder, dtype=torch.float16).dtype == "float16"


def test_the_dtype_of_the_config_counts_where_it_has_one(save):
    folder = save(dtype=torch.float32)
    edit_config(folder, dtype="bfloat16")
    plan = plan_memory(folder)
    assert plan.dtype == "bfloat16"
    assert plan.unquantized == measure_weight_bytes(AutoModelForCausalLM.from_pretrained(folder))
    assert list(plan.checkpoint.bytes_by_dtype) == ["float32"]


def test_without_safetensors_the_config_is_all(save):
    folder = save()
    with_headers = plan_memory(folder)
    (folder / FILE).unlink()
    with pytest.raises(HeadersUnavailable, match="not a valid safetensors folder"):
        CheckpointHeaders(folder)
    without = plan_memory(folder)
    assert without.checkpoint is None
    assert without.methods == with_headers.methods
    assert plan_memory(build_skeleton(folder).config).checkpoint is None


def test_a_damaged_file(save):
    folder = save()
    file = folder / FILE
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"has a damaged safetensors file: .*file is truncated"):
        plan_memory(folder)


class TestHub:
    @pytest.fixture
    def cached(self, save, tmp_path, monkeypatch):
        """The checkpoint in the cache, as "org/model"."""
        save()
        repo = tmp_path / "cache" / "models--org--model"
        snapshot = repo / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("a" * 40)
        for name in ("config.json", FILE):
            (tmp_path / name).rename(snapshot / name)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        return snapshot

    def test_from_the_cache(self, cached):
        stored = sum(tensor.nbytes for tensor in load_file(cached / FILE).values())
        assert plan_memory("org/model").checkpoint.bytes_by_dtype == {"float32": stored}

    def test_offline_without_the_weights(self, cached):
        (cached / FILE).unlink()
        with pytest.raises(HeadersUnavailable, match="'org/model' are not in the cache, and HF_HUB_OFFLINE is set"):
            CheckpointHeaders("org/model")
        assert plan_memory("org/model").checkpoint is None

    def test_from_the_hub_by_its_client(self, cached, monkeypatch):
        local = huggingface_hub.get_local_safetensors_metadata(cached)
        Path(cached / FILE).unlink()
        module = "adaptq_peft.evaluation.checkpoint_headers"
        monkeypatch.setattr(f"{module}.is_offline_mode", lambda: False)
        monkeypatch.setattr(f"{module}.get_safetensors_metadata", {"org/model": local}.__getitem__)
        assert plan_memory("org/model").checkpoint.mismatches == []

        def fail(name):
            raise ConnectionResetError("no route")

        monkeypatch.setattr(f"{module}.get_safetensors_metadata", fail)
        with pytest.raises(HeadersUnavailable, match="the Hub did not give the headers of 'org/model': no route"):
            CheckpointHeaders("org/model")
