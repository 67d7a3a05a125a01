"""Adapters on the Hub: from a cache in offline mode, and to and from a small server that speaks the Hub's protocol."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import runpy
import subprocess
import sys
import textwrap
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub.constants
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from support import logits
from transformers import AutoModelForCausalLM

import adaptq_peft
from adaptq_peft import AdaptQConfig, QuantizedBaseReference, hotswap_adapter, quantize_base

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
COMMITS = {"main": "a" * 40, "v1": "b" * 40}
OFFLINE_SUBFOLDER = pytest.mark.xfail(
    strict=True,
    raises=huggingface_hub.errors.LocalEntryNotFoundError,
    reason="PEFT 0.21.2 offline looks for sub/sub/adapter_model.safetensors, for any method; online it does not",
)


def put_into_cache(cache, repo_id, folder, revision="main"):
    """Lay a folder out as `huggingface_hub` does after a download."""
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "blobs").mkdir(exist_ok=True)
    (repo / "refs" / revision).write_text(COMMITS[revision])
    for path in (path for path in folder.rglob("*") if path.is_file()):
        blob = repo / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.write_bytes(path.read_bytes())
        pointer = repo / "snapshots" / COMMITS[revision] / path.relative_to(folder)
        pointer.parent.mkdir(parents=True, exist_ok=True)
        pointer.unlink(missing_ok=True)
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    return repo


@pytest.fixture
def cache(tmp_path, monkeypatch):
    assert huggingface_hub.constants.HF_HUB_OFFLINE  # by conftest: nothing here goes over the network
    folder = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def base(cache, make_model, tmp_path):
    """Puts a base into the cache as "org/base" and returns a function that loads it from there."""
    make_model().save_pretrained(tmp_path / "base")
    put_into_cache(cache, "org/base", tmp_path / "base")
    return lambda: AutoModelForCausalLM.from_pretrained("org/base")


@pytest.fixture
def save_adapter(base, batch, tmp_path):
    """Saves an adapter with random deltas; returns its folder and its logits."""

    def save(name, seed=1, **fields):
        model = get_peft_model(base(), AdaptQConfig(task_type="CAUSAL_LM", layers_to_transform=[2, 3], **fields))
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.1, generator=generator)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name, logits(model, batch)

    return save


@pytest.fixture
def adapter(save_adapter, cache):
    """Puts an adapter into the cache as "org/adapter", another one as its revision v1 and in its subfolder "sub"."""
    folder, expected = save_adapter("adapter")
    old_folder, old_expected = save_adapter("old", seed=2)
    put_into_cache(cache, "org/adapter", folder)
    put_into_cache(cache, "org/adapter", old_folder, "v1")
    (folder.parent / "with_sub").mkdir()
    old_folder.rename(folder.parent / "with_sub" / "sub")
    repo = put_into_cache(cache, "org/adapter", folder.parent / "with_sub")
    return {"expected": expected, "old": old_expected, "repo": repo}


def test_config_by_name(adapter):
    config = PeftConfig.from_pretrained("org/adapter")
    assert isinstance(config, AdaptQConfig)
    assert (config.base_model_name_or_path, config.layers_to_transform) == ("org/base", [2, 3])


@pytest.mark.parametrize(
    ("where", "key"),
    [
        ({}, "expected"),
        ({"revision": "v1"}, "old"),
        ({"revision": COMMITS["v1"]}, "old"),
        pytest.param({"subfolder": "sub"}, "old", marks=OFFLINE_SUBFOLDER),
    ],
)
def test_model_by_name(adapter, base, batch, where, key):
    assert torch.equal(logits(PeftModel.from_pretrained(base(), "org/adapter", **where), batch), adapter[key])


@pytest.mark.parametrize(("where", "key"), [({}, "expected"), ({"revision": "v1"}, "old")])
def test_base_and_adapter_by_one_name(adapter, batch, where, key):
    model = AutoPeftModelForCausalLM.from_pretrained("org/adapter", **where)
    assert torch.equal(logits(model, batch), adapter[key])


def test_transformers_loads_both_by_the_name_of_the_adapter(adapter, batch):
    model = AutoModelForCausalLM.from_pretrained("org/adapter")
    assert model.peft_config["default"].layers_to_transform == [2, 3]
    assert torch.equal(logits(model, batch), adapter["expected"])


def test_an_adapter_is_swapped_in_by_name(adapter, base, batch):
    model = PeftModel.from_pretrained(base(), "org/adapter")
    hotswap_adapter(model, "org/adapter", revision="v1")
    assert torch.equal(logits(model, batch), adapter["old"])


def test_another_cache_folder(adapter, base, batch, cache, tmp_path):
    model = base()
    cache.rename(tmp_path / "elsewhere")
    loaded = PeftModel.from_pretrained(model, "org/adapter", cache_dir=tmp_path / "elsewhere")
    assert torch.equal(logits(loaded, batch), adapter["expected"])


@pytest.mark.parametrize(
    ("where", "path"),
    [({}, f"main/{WEIGHTS}"), ({"revision": "v1"}, f"v1/{WEIGHTS}"), ({"subfolder": "sub"}, f"main/sub/{WEIGHTS}")],
)
def test_a_truncated_file_in_the_cache_is_an_error_before_the_base_is_touched(adapter, base, where, path):
    revision, _, name = path.partition("/")
    file = adapter["repo"] / "snapshots" / COMMITS[revision] / name
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:-100])
    model = base()
    modules = list(model.modules())
    with pytest.raises(ValueError, match=r"models--org--adapter.*is truncated or damaged\. Copy or save the adapter"):
        PeftModel.from_pretrained(model, "org/adapter", **where)
    assert list(model.modules()) == modules


def test_weights_that_are_not_in_the_cache_are_an_error_of_the_hub_client(adapter, base):
    for path in adapter["repo"].rglob(WEIGHTS):
        path.unlink()
    AdaptQConfig.from_pretrained("org/adapter")
    with pytest.raises(huggingface_hub.errors.LocalEntryNotFoundError):
        PeftModel.from_pretrained(base(), "org/adapter")


def test_a_subfolder_offline_by_the_path_of_the_snapshot(adapter, base, batch):
    folder = huggingface_hub.snapshot_download("org/adapter")
    model = PeftModel.from_pretrained(base(), folder, subfolder="sub")
    assert torch.equal(logits(model, batch), adapter["old"])


@pytest.fixture
def quantized_base(cache, base, samples, tmp_path):
    """Puts a quantized base into the cache as "org/quantized", and another one as its revision v1."""
    for revision, data in (("main", samples[:30]), ("v1", samples[30:])):
        quantize_base(base(), tmp_path / revision, data=data, calibration="absmax", tokens=200)
        repo = put_into_cache(cache, "org/quantized", tmp_path / revision, revision)
    return repo


@pytest.mark.parametrize("revision", ["main", "v1"])
def test_a_quantized_base_by_name(quantized_base, save_adapter, base, batch, revision):
    reference = "org/quantized" if revision == "main" else QuantizedBaseReference("org/quantized", revision)
    folder, expected = save_adapter("adapter", quantized_base=reference)
    saved = json.loads((folder / CONFIG).read_text())["quantized_base"]
    assert (saved["name_or_path"], saved["revision"]) == ("org/quantized", COMMITS[revision])
    (quantized_base / "refs" / "main").write_text("c" * 40)  # the default branch moves on
    assert torch.equal(logits(PeftModel.from_pretrained(base(), folder), batch), expected)


def test_a_quantized_base_that_is_not_in_the_cache(quantized_base, save_adapter, base):
    folder, _ = save_adapter("adapter", quantized_base="org/quantized")
    for path in (quantized_base / "snapshots" / COMMITS["main"]).iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no quantized base 'org/quantized': neither a folder with"):
        PeftModel.from_pretrained(base(), folder)


class HubHandler(BaseHTTPRequestHandler):
    """As much of the Hub's protocol as pushes and downloads of small files need. No LFS, no Xet, one revision."""

    def do_HEAD(self):
        repo_id, found, path = self.path.partition("?")[0][1:].partition("/resolve/")
        content = self.server.repos.get(repo_id, {}).get(path.partition("/")[2])
        if not found or content is None:
            return self.reply(b"", 404, {"X-Error-Code": "EntryNotFound"})
        etag = hashlib.sha256(content).hexdigest()
        return self.reply(content, 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMITS["main"]})

    do_GET = do_HEAD

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posts.append(self.path)
        if self.path == "/api/repos/create":
            given = json.loads(body)
            repo_id = f"{given['organization']}/{given['name']}"
            self.server.repos.setdefault(repo_id, {})
            return self.answer({"url": f"http://{self.headers['Host']}/{repo_id}"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.path.endswith("/preupload/main"):
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]
            return self.answer({"files": modes})
        repo_id = self.path.removeprefix("/api/models/").removesuffix("/commit/main")
        for entry in map(json.loads, body.splitlines()):
            if entry["key"] == "file":
                file = entry["value"]
                self.server.repos[repo_id][file["path"]] = base64.b64decode(file["content"])
        url = f"http://{self.headers['Host']}/{repo_id}/commit/{COMMITS['main']}"
        return self.answer({"commitUrl": url, "commitOid": COMMITS["main"]})

    def answer(self, content):
        self.reply(json.dumps(content).encode(), 200, {"Content-Type": "application/json"})

    def reply(self, content, status, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub():
    """A Hub on this machine: `.repos` is {repo id: {path: content}}, `.posts` the paths that were posted to."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.repos, server.posts = {}, []
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def client(hub, tmp_path):
    """Runs a script whose Hub is that server, with an empty cache of its own, and returns what it printed."""

    def run(name, code):
        variables = {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HOME": str(tmp_path / name),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(Path(adaptq_peft.__file__).parents[1]),
        }
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env=os.environ | variables,
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


@pytest.fixture
def base_on_hub(hub, make_model, tmp_path):
    tokenizer = runpy.run_path(str(Path(__file__).parent / "training" / "conftest.py"))["make_tokenizer"]()
    tokenizer.save_pretrained(tmp_path / "base")
    make_model(vocab_size=len(tokenizer), pad_token_id=0).save_pretrained(tmp_path / "base")
    hub.repos["org/base"] = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}


def card(hub, repo_id):
    text = hub.repos[repo_id]["README.md"].decode()
    assert text.count("## ADAPTQ adapter") == 1
    return text


def test_push_and_load_over_http(hub, client, base_on_hub):
    pushed = client(
        "pusher",
        """
        import torch, adaptq_peft
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained("org/base")
        model = get_peft_model(model, adaptq_peft.AdaptQConfig(task_type="CAUSAL_LM", layers_to_transform=[2, 3]))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.1)
        model.push_to_hub("org/adapter")
        model.push_to_hub("org/adapter")  # updates the card that is there
        torch.set_num_threads(1)
        print(model.eval()(torch.arange(3, 15)[None]).logits.double().sum().item())
        """,
    )
    assert hub.posts.count("/api/models/org/adapter/commit/main") == 2
    assert set(hub.repos["org/adapter"]) == {"README.md", CONFIG, WEIGHTS}
    assert json.loads(hub.repos["org/adapter"][CONFIG])["base_model_name_or_path"] == "org/base"
    text = card(hub, "org/adapter")
    assert "library_name: peft" in text
    assert "base_model: org/base" in text
    loaded = client(
        "loader",
        """
        import torch, adaptq_peft
        from peft import AutoPeftModelForCausalLM
        from transformers import pipeline
        model = AutoPeftModelForCausalLM.from_pretrained("org/adapter")
        torch.set_num_threads(1)
        print(model.eval()(torch.arange(3, 15)[None]).logits.double().sum().item())
        generate = pipeline("text-generation", model="org/adapter")
        assert generate.model.peft_config["default"].layers_to_transform == [2, 3]
        assert len(generate("In the year", max_new_tokens=2)) == 1
        """,
    )
    assert loaded == pushed


def test_trainers_push_the_section(hub, client, base_on_hub):
    pytest.importorskip("trl")
    client(
        "trainers",
        """
        import adaptq_peft
        from datasets import Dataset
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
        from trl import SFTConfig, SFTTrainer

        def config():
            return adaptq_peft.AdaptQConfig(task_type="CAUSAL_LM", layers_to_transform=[2, 3])

        common = dict(max_steps=1, save_steps=1, report_to="none", per_device_train_batch_size=2, use_cpu=True)
        arguments = SFTConfig("sft", bf16=False, hub_model_id="org/sft", push_to_hub=True, max_length=16, **common)
        data = Dataset.from_list([{"text": "In the year of the treaty"}] * 4)
        trainer = SFTTrainer("org/base", arguments, train_dataset=data, peft_config=config())
        trainer.train()
        trainer.push_to_hub()

        model = get_peft_model(AutoModelForCausalLM.from_pretrained("org/base"), config())
        arguments = TrainingArguments("plain", hub_model_id="org/plain", **common)
        data = [{"input_ids": list(range(3, 15)), "labels": list(range(3, 15))}] * 4
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train()
        trainer.push_to_hub()
        """,
    )
    assert "It has been trained using [TRL]" in card(hub, "org/sft")
    assert "generated automatically according to the information the Trainer" in card(hub, "org/plain")
    for repo_id in ("org/sft", "org/plain"):
        assert {CONFIG, WEIGHTS} < set(hub.repos[repo_id])
        assert "base_model: org/base" in card(hub, repo_id)
