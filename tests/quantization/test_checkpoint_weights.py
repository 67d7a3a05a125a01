from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BitsAndBytesConfig,
    GPT2Model,
    LlamaForSequenceClassification,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import cached_file as transformers_cached_file

from adaptq_peft import AdaptQConfig
from adaptq_peft.layer import AdaptQLayer
from adaptq_peft.quantization import checkpoint_weights
from adaptq_peft.quantization.checkpoint_weights import CheckpointWeights, OriginalWeightsUnavailable

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def block_weights(model):
    """Names and tensors of the matrices inside the blocks."""
    return {name: p.detach() for name, p in model.named_parameters() if p.ndim == 2 and re.search(r"\.\d+\.", name)}


def vary_norms(model, seed=0):
    """Norms of random models are all ones: give them values, so that models can be told apart."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


@pytest.fixture
def base(make_model):
    return vary_norms(make_model()).bfloat16()


def assert_reads(weights, expected):
    assert expected
    for name, tensor in expected.items():
        read = weights.read(name)
        assert read.dtype == tensor.dtype, name
        assert torch.equal(read, tensor), name


@pytest.mark.parametrize("shard", ["1GB", "40KB"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_local_folder(make_model, tmp_path, kind, shard):
    model = vary_norms(make_model(kind)).bfloat16()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors").is_file() == (shard == "1GB")
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float32)  # the checkpoint's own dtype is read
    weights = CheckpointWeights(loaded)
    assert_reads(weights, block_weights(model))
    assert_reads(
        weights,
        {loaded.base_model_prefix + ".norm.weight": model.model.norm.weight}
        if kind == "llama"
        else {"transformer.h.0.attn.c_attn.weight": model.transformer.h[0].attn.c_attn.weight},
    )


def test_a_tensor_has_memory_of_its_own(base, tmp_path):
    base.save_pretrained(tmp_path)
    read = CheckpointWeights(AutoModelForCausalLM.from_pretrained(tmp_path)).read(Q_PROJ)
    assert read.device.type == "cpu"
    assert read.untyped_storage().nbytes() == read.nbytes
    read.zero_()
    assert torch.equal(load_file(tmp_path / "model.safetensors")[Q_PROJ], base.model.layers[1].self_attn.q_proj.weight)


def test_a_model_that_arrived_in_4_bits(base, tmp_path):
    base.save_pretrained(tmp_path, max_shard_size="40KB")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    assert model.model.layers[1].self_attn.q_proj.weight.dtype == torch.uint8
    assert_reads(CheckpointWeights(model), block_weights(base))


def test_adapters_inside_the_model_are_looked_through(base, tmp_path):
    base.save_pretrained(tmp_path)
    config = AdaptQConfig(layers_to_transform=[1], modules_to_save=["lm_head"])
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path), config)
    weights = CheckpointWeights(wrapped.get_base_model())
    assert_reads(weights, block_weights(base))
    for layer in wrapped.modules():
        if isinstance(layer, AdaptQLayer):
            for _, parameter in layer.parameters_of("default"):
                parameter.requires_grad_(False).fill_(1.0)
    wrapped.merge_adapter()  # changes block 1, and what stands in for the 4-bit linears of the others
    assert_reads(CheckpointWeights(wrapped.get_base_model()), block_weights(base))


# --- names ---


@pytest.mark.parametrize(("saved_class", "other_class"), [("head", "bare"), ("bare", "head")])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_base_prefix_may_be_missing_or_added(make_model, tmp_path, kind, saved_class, other_class):
    with_head = vary_norms(make_model(kind))
    bare_class = {"llama": LlamaModel, "gpt2": GPT2Model}[kind]
    models = {"head": (with_head, type(with_head)), "bare": (with_head.base_model, bare_class)}
    models[saved_class][0].save_pretrained(tmp_path)
    loaded = models[other_class][1].from_pretrained(tmp_path)
    assert_reads(CheckpointWeights(loaded), block_weights(models[other_class][0]))


def test_another_head_than_the_checkpoint_has(base, tmp_path):
    base.save_pretrained(tmp_path)
    loaded = LlamaForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    weights = CheckpointWeights(loaded)
    assert_reads(weights, block_weights(base))
    with pytest.raises(OriginalWeightsUnavailable, match=r"none of its 39 tensors is score\.weight"):
        weights.read("score.weight")


def test_names_that_transformers_has_changed(tmp_path):
    """ViT's checkpoints keep their old names: `encoder.layer.0.attention.attention.query` is `layers.0...q_proj`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = vary_norms(ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4)))
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "model.safetensors"))
    expected = block_weights(model)
    if not keys.isdisjoint(expected):
        pytest.fail(f"the saved names should differ from the model's: {sorted(keys.intersection(expected))}")
    assert_reads(CheckpointWeights(ViTForImageClassification.from_pretrained(tmp_path)), expected)


def test_legacy_names(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = vary_norms(BertForMaskedLM(BertConfig(**sizes, vocab_size=50)))
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma"): v for k, v in load_file(file).items()}
    save_file(old, file, metadata={"format": "pt"})
    loaded = BertForMaskedLM.from_pretrained(tmp_path)
    name = "bert.encoder.layer.0.output.LayerNorm.weight"
    assert_reads(CheckpointWeights(loaded), {name: model.get_parameter(name).detach(), **block_weights(model)})


def test_a_key_mapping_given_to_from_pretrained(base, tmp_path):
    base.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k.replace("mlp.", "ffn."): v for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, key_mapping={r"ffn\.": "mlp."})
    assert_reads(CheckpointWeights(loaded), block_weights(base))


def test_a_tensor_made_from_several_is_refused_by_name(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=2, vocab_size=50)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    weights = CheckpointWeights(MixtralForCausalLM.from_pretrained(tmp_path))
    assert weights.read("model.layers.0.self_attn.q_proj.weight").shape == (64, 64)
    with pytest.raises(
        OriginalWeightsUnavailable,
        match=r"model\.layers\.0\.mlp\.experts\.gate_up_proj is made from model\.layers\.0\.block_sparse_moe\.experts"
        r"\.0\.w1\.weight, .* by MergeModulelist, Concatenate and can't be read as one tensor",
    ):
        weights.read("model.layers.0.mlp.experts.gate_up_proj")


# --- the Hub's cache ---


def add_to_cache(cache: Path, repo_id: str, commit: str, folder: Path, ref: str | None = None) -> None:
    """Lay a folder out as `huggingface_hub` does: blobs, snapshots/<commit> with links to them, refs."""
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / commit
    for part in (repo / "blobs", repo / "refs", snapshot):
        part.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        blob = repo / "blobs" / f"{commit[:8]}{file.name.encode().hex()}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    if ref:
        (repo / "refs" / ref).write_text(commit)


OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def hub(make_model, tmp_path, monkeypatch):
    """A cache with two revisions of a sharded repository, "main" the newer one; returns the two models."""
    cache = tmp_path / "hub"
    models = {}
    for seed, (commit, ref) in enumerate([(OLD, "v1"), (NEW, "main")]):
        models[commit] = vary_norms(make_model(seed=seed), seed)
        models[commit].save_pretrained(tmp_path / commit, max_shard_size="80KB")
        add_to_cache(cache, "org/tiny", commit, tmp_path / commit, ref)
        shutil.rmtree(tmp_path / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return models


def test_the_hub_cache(hub):
    loaded = AutoModelForCausalLM.from_pretrained("org/tiny")
    assert_reads(CheckpointWeights(loaded), block_weights(hub[NEW]))


@pytest.mark.parametrize("revision", ["v1", OLD])
def test_a_revision_in_the_hub_cache(hub, revision):
    loaded = AutoModelForCausalLM.from_pretrained("org/tiny", revision=revision)
    assert_reads(CheckpointWeights(loaded, revision=revision), block_weights(hub[OLD]))
    loaded.config._commit_hash = OLD  # as transformers before 5.23 recorded it
    assert_reads(CheckpointWeights(loaded), block_weights(hub[OLD]))


def test_weights_of_another_revision_are_refused(hub):
    loaded = AutoModelForCausalLM.from_pretrained("org/tiny", revision="v1")
    loaded.config._commit_hash = None  # transformers before 5.23 recorded it
    with pytest.raises(
        OriginalWeightsUnavailable,
        match=rf"'org/tiny' at revision {NEW} .* it has other weights than the model, for instance "
        r"model\.layers\.0\.input_layernorm\.weight; if the model was loaded from another revision, name",
    ):
        CheckpointWeights(loaded).read(Q_PROJ)


def test_what_the_cache_lacks_is_downloaded_and_no_other_file(hub, tmp_path, monkeypatch):
    """The client's download is stood in for by a second cache; it is asked only after the first one."""
    loaded = AutoModelForCausalLM.from_pretrained("org/tiny")
    asked = []

    def cached_file(repo_id, filename, *, revision, local_files_only):
        asked.append((filename, revision, local_files_only))
        if local_files_only:
            raise OSError("not in the cache")
        return transformers_cached_file(repo_id, filename, revision=revision, local_files_only=True)

    monkeypatch.setattr(checkpoint_weights, "cached_file", cached_file)
    monkeypatch.setattr(checkpoint_weights, "is_offline_mode", lambda: False)
    assert torch.equal(CheckpointWeights(loaded).read(Q_PROJ), block_weights(hub[NEW])[Q_PROJ])
    snapshot = tmp_path / "hub/models--org--tiny/snapshots" / NEW
    shard = json.loads((snapshot / "model.safetensors.index.json").read_text())["weight_map"][Q_PROJ]
    found = ["model.safetensors.index.json", "config.json", shard]
    assert [name for name, _, _ in dict.fromkeys(asked)] == [
        name for name in ("model.safetensors", *found) for _ in ("cache", "Hub")
    ]
    # Once a file is found, all others are taken from its commit.
    assert [revision for name, revision, _ in dict.fromkeys(asked)][-4:] == [NEW] * 4


def test_a_repository_that_is_not_in_the_cache(hub, base):
    base.name_or_path = "org/absent"
    with pytest.raises(
        OriginalWeightsUnavailable,
        match=r"of LlamaForCausalLM can't be read from 'org/absent' \(no folder; as a Hub repository in the cache "
        r".*hub, offline\): there is no model\.safetensors or model\.safetensors\.index\.json\. They are read from",
    ) as raised:
        CheckpointWeights(base).read(Q_PROJ)
    assert isinstance(raised.value.__cause__, OSError)


def test_a_shard_that_is_not_in_the_cache(hub, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained("org/tiny")
    snapshot = tmp_path / "hub/models--org--tiny/snapshots" / NEW
    index = json.loads((snapshot / "model.safetensors.index.json").read_text())
    shard = index["weight_map"]["model.layers.3.mlp.down_proj.weight"]
    weights = CheckpointWeights(loaded)
    assert weights.read(Q_PROJ).shape == (64, 64)
    (snapshot / shard).unlink()
    with pytest.raises(OriginalWeightsUnavailable, match=rf"its file {shard}, which holds .* is missing"):
        weights.read("model.layers.3.mlp.down_proj.weight")


# --- what can't be read ---


def test_a_model_built_in_memory(base):
    weights = CheckpointWeights(base)  # lazy
    with pytest.raises(OriginalWeightsUnavailable, match="built in memory, and was not loaded from a checkpoint"):
        weights.read(Q_PROJ)


def test_a_missing_tensor(base, tmp_path):
    base.save_pretrained(tmp_path)
    weights = CheckpointWeights(AutoModelForCausalLM.from_pretrained(tmp_path))
    with pytest.raises(
        OriginalWeightsUnavailable,
        match=rf"from the folder '{tmp_path}': none of its 39 tensors is model\.layers\.9\.q_proj\.weight",
    ):
        weights.read("model.layers.9.q_proj.weight")


def test_pickles_are_not_opened(base, tmp_path):
    base.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle that would fail if it were opened")
    with pytest.raises(
        OriginalWeightsUnavailable,
        match=r"it has pytorch_model\.bin and no safetensors file, and pickles are never opened; convert it once",
    ):
        CheckpointWeights(loaded).read(Q_PROJ)


def test_a_truncated_file(base, tmp_path):
    base.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(OriginalWeightsUnavailable, match=r"model\.safetensors is damaged: "):
        CheckpointWeights(loaded).read(Q_PROJ)


@pytest.fixture
def quantized_repository(base, tmp_path):
    """A 16-bit checkpoint and the one of the same model in 4 bits; returns the folders."""
    base.save_pretrained(tmp_path / "16bit")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "16bit", quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "4bit")
    return tmp_path / "16bit", tmp_path / "4bit"


def test_a_quantized_checkpoint_has_no_original_weights(quantized_repository):
    _, quantized = quantized_repository
    with pytest.raises(
        OriginalWeightsUnavailable,
        match=r"it is quantized itself \(bitsandbytes\), so it holds no original weights; name the 16-bit checkpoint",
    ):
        CheckpointWeights(AutoModelForCausalLM.from_pretrained(quantized)).read(Q_PROJ)


def test_another_checkpoint_may_be_named(base, quantized_repository):
    original, quantized = quantized_repository
    model = AutoModelForCausalLM.from_pretrained(quantized)
    assert_reads(CheckpointWeights(model, str(original)), block_weights(base))


# --- memory ---


def test_reading_every_tensor_does_not_keep_the_checkpoint_in_memory(tmp_path):
    """Anonymous and file-backed pages: the peak while reading 48 MB one tensor at a time stays below a third of it."""
    script = """
        import sys, torch
        from transformers import LlamaConfig, LlamaForCausalLM
        from adaptq_peft.quantization.checkpoint_weights import CheckpointWeights

        def resident():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * 4096

        config = LlamaConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8,
                             vocab_size=64)
        torch.manual_seed(0)
        LlamaForCausalLM(config).bfloat16().save_pretrained(sys.argv[1], max_shard_size="10MB")
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        model.name_or_path = sys.argv[1]
        weights = CheckpointWeights(model)
        names = [name for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
        weights.read(names[0])
        before, grown, total = resident(), 0, 0
        for name in names:
            tensor = weights.read(name)
            total += tensor.nbytes
            grown = max(grown, resident() - before)
        print(total, grown)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    total, grown = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert total > 45e6
    assert grown < total / 3
