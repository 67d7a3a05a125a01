"""One file of calibrated codes for several adapters: what they take from it, and what is refused."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import logits, randomize
from torch import nn
from transformers import BitsAndBytesConfig

from adaptq_peft import AdaptQConfig, QuantizedBaseReference, adaptq_bnb_config, hotswap_adapter, quantize_base
from adaptq_peft.artifacts import quantized_base
from adaptq_peft.artifacts.quantized_base import FILE_NAME, QuantizedBase
from adaptq_peft.block_forms import linears_of
from adaptq_peft.quantization import is_quantized, quantize_linear, resolve_quantization
from adaptq_peft.selection import find_blocks

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def kind():
    return "llama"


@pytest.fixture
def base(make_model, kind, tmp_path):
    """A base with a checkpoint on disk."""
    model = make_model(kind)
    model.save_pretrained(tmp_path / "base")
    return type(model).from_pretrained(tmp_path / "base")


@pytest.fixture
def make_base(base, samples, tmp_path):
    """Writes a quantized base, from little text and by the fastest method; returns its folder."""

    def make(name="quantized", seed=0, **options):
        options = {"calibration": "absmax", "data": samples[seed:], "tokens": 200, **options}
        quantize_base(base, tmp_path / name, **options)
        return tmp_path / name

    return make


@pytest.fixture
def folder(make_base):
    return make_base()


def config(folder, blocks=(1, 3), **fields):
    return AdaptQConfig(task_type="CAUSAL_LM", layers_to_transform=list(blocks), quantized_base=folder, **fields)


def adapted(base, folder, blocks=(1, 3), name="default", **fields):
    model = get_peft_model(copy.deepcopy(base), config(folder, blocks, **fields), adapter_name=name)
    randomize(model, name, seed=len(name))
    return model


def codes(module, name):
    return {f"{name}.{key}": tensor for key, tensor in module.state_dict().items() if key.startswith("weight")}


def edit_header(file, **changes):
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    about = json.loads(header["adaptq_quantized_base"]) | changes
    save_file(load_file(file), file, {**header, "adaptq_quantized_base": json.dumps(about)})


class TestWhatAnAdapterTakes:
    @pytest.fixture(params=["llama", "gpt2"])
    def kind(self, request):
        return request.param

    def test_frozen_blocks_have_its_codes_and_adapted_ones_their_weights(self, base, folder):
        model = adapted(base, folder).base_model.model
        stored = load_file(folder / FILE_NAME)
        for block in find_blocks(base):
            for name, linear in linears_of(block):
                found = model.get_submodule(name)
                if block.index in (1, 3):
                    assert torch.equal(found.base_layer.weight, linear.weight)
                else:
                    assert all(torch.equal(tensor, stored[key]) for key, tensor in codes(found, name).items())
                    assert torch.equal(found.bias, linear.bias) if linear.bias is not None else found.bias is None

    def test_it_is_nearer_to_the_original_than_plain_rounding(self, base, make_base, batch):
        plain = get_peft_model(copy.deepcopy(base), config(None))
        calibrated = get_peft_model(copy.deepcopy(base), config(make_base(calibration="gptq", tokens=2000)))
        errors = [float((logits(model, batch) - logits(base, batch)).norm()) for model in (calibrated, plain)]
        assert errors[0] < errors[1]

    def test_reload_is_bit_exact_without_calibration_and_the_adapter_holds_no_codes(
        self, base, folder, batch, tmp_path, monkeypatch
    ):
        monkeypatch.setattr("adaptq_peft.frozen_codes.quantize_calibrated", None)
        model = adapted(base, folder)
        model.save_pretrained(tmp_path / "adapter")
        assert all(
            re.search(r"\.adaptq_(delta|low_rank_[AB])\.", name) for name in load_file(tmp_path / "adapter" / WEIGHTS)
        )
        saved = json.loads((tmp_path / "adapter" / CONFIG).read_text())["quantized_base"]
        digest = hashlib.sha256((folder / FILE_NAME).read_bytes()).hexdigest()
        assert saved == {"name_or_path": str(folder), "revision": None, "sha256": digest}
        for options in ({}, {"low_cpu_mem_usage": True}):
            loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter", **options)
            assert torch.equal(logits(loaded, batch), logits(model, batch))

    def test_transformers_own_loader(self, base, folder, batch, tmp_path):
        model = adapted(base, folder)
        model.save_pretrained(tmp_path / "adapter")
        loaded = copy.deepcopy(base)
        loaded.load_adapter(str(tmp_path / "adapter"))
        assert torch.equal(logits(loaded, batch), logits(model, batch))

    def test_a_model_that_arrives_split_or_all_in_4_bits(self, base, folder, batch, tmp_path):
        model = adapted(base, folder)
        model.save_pretrained(tmp_path / "adapter")
        whole = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        for arrival in (adaptq_bnb_config([1, 3], base), whole):
            arrived = type(base).from_pretrained(tmp_path / "base", quantization_config=arrival)
            loaded = PeftModel.from_pretrained(arrived, tmp_path / "adapter")
            assert torch.equal(logits(loaded, batch), logits(model, batch))

    def test_in_another_dtype_the_weights_are_read_in_that(self, base, folder, batch):
        model = adapted(copy.deepcopy(base).to(torch.bfloat16), folder)
        states = [layer.weight.quant_state for layer in model.modules() if is_quantized(layer)]
        assert states
        assert {state.dtype for state in states} == {torch.bfloat16}
        assert logits(model, batch).isfinite().all()

    def test_codes_in_another_storage_dtype(self, base, folder, batch):
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_quant_storage="bfloat16",
            bnb_4bit_compute_dtype=torch.float32,
        )
        model = adapted(base, folder, quantization=settings)
        assert {layer.weight.dtype for layer in model.modules() if is_quantized(layer)} == {torch.bfloat16}
        assert torch.equal(logits(model, batch), logits(adapted(base, folder), batch))

    def test_corrections_repair_what_is_left(self, base, folder, batch):
        plain = get_peft_model(copy.deepcopy(base), config(folder))
        repaired = get_peft_model(copy.deepcopy(base), config(folder, frozen_rank=8, frozen_rank_init="svd"))
        errors = [float((logits(model, batch) - logits(base, batch)).norm()) for model in (repaired, plain)]
        assert errors[0] < errors[1]

    def test_unload_gives_the_original_back(self, base, folder, batch):
        assert torch.equal(logits(adapted(base, folder).unload(), batch), logits(base, batch))

    def test_the_card_names_it(self, base, folder, tmp_path):
        adapted(base, folder).save_pretrained(tmp_path / "adapter")
        text = (tmp_path / "adapter" / "README.md").read_text()
        digest = open_base(folder).reference.sha256
        assert f"from the quantized base `{folder}`, SHA-256 `{digest[:16]}`" in text

    def test_linears_that_are_rounded_plainly_are_stored_and_listed(self, make_model, samples, tmp_path):
        odd = make_model(intermediate_size=96)
        quantize_base(odd, tmp_path / "odd", data=samples, calibration="absmax", tokens=200)
        model = get_peft_model(odd, config(tmp_path / "odd", [0, 1, 2]))
        assert model.base_model.quantization_report.plain == {
            "model.layers.3.mlp.down_proj": "in_features 96 is no multiple of 64: groups cross rows"
        }


def open_base(folder):
    return QuantizedBase(QuantizedBaseReference(str(folder)))


class TestSeveralAdapters:
    def test_on_different_blocks_each_is_as_it_is_alone(self, base, folder, batch, tmp_path):
        blocks = {"first": [0, 1], "second": [1, 2], "third": [3]}
        alone = {name: adapted(base, folder, chosen, name) for name, chosen in blocks.items()}
        for model in alone.values():
            model.save_pretrained(tmp_path)
        keep = {"original_weights": "keep"}
        both = get_peft_model(copy.deepcopy(base), config(folder, [0, 1], **keep), adapter_name="first")
        both.add_adapter("second", config(folder, [1, 2], **keep))
        both.load_adapter(tmp_path / "third", adapter_name="third")
        for name in ("first", "second"):
            randomize(both, name, seed=len(name))
        for name in ("third", "first", "second", "third"):
            both.set_adapter(name)
            assert torch.equal(logits(both, batch), logits(alone[name], batch)), name

    def test_with_and_without_a_base_do_not_go_together(self, base, folder, make_base, batch):
        model = adapted(base, folder)
        expected = logits(model, batch)
        other_base = make_base("other", seed=20)
        for other, named in ((None, "plain rounding"), (other_base, "the quantized base '.*other'")):
            message = rf"codes from {named}, and adapter 'default' on this model from the quantized base '.*zed'\."
            with pytest.raises(ValueError, match=message):
                model.add_adapter("second", config(other, [0]))
        assert torch.equal(logits(model, batch), expected)
        model.add_adapter("second", config(None, [0], quantization="none"))

    def test_one_is_swapped_for_another_of_the_same_base(self, base, folder, make_base, batch, tmp_path):
        model = adapted(base, folder)
        folder.rename(tmp_path / "moved")
        second = get_peft_model(copy.deepcopy(base), config(tmp_path / "moved"))
        randomize(second, seed=77)
        second.save_pretrained(tmp_path / "second")
        hotswap_adapter(model, tmp_path / "second")
        assert torch.equal(logits(model, batch), logits(second, batch))
        adapted(base, make_base("other", seed=20)).save_pretrained(tmp_path / "third")
        with pytest.raises(ValueError, match=r"does not fit into the place of 'default': quantized_base is Quant"):
            hotswap_adapter(model, tmp_path / "third")

    def test_codes_that_a_deleted_adapter_left(self, base, folder, make_base, batch):
        other_base = make_base("other", seed=20)
        model = adapted(base, folder)
        model.delete_adapter("default")
        with pytest.raises(ValueError, match=r"14 linears of this model, the first is .* have calibrated codes of"):
            model.add_adapter("second", config(None))
        model.add_adapter("second", config(other_base))
        randomize(model, "second", seed=len("default"))
        model.set_adapter("second")
        assert torch.equal(logits(model, batch), logits(adapted(base, other_base), batch))

    def test_combined(self, base, folder, batch):
        model = adapted(base, folder, name="first", original_weights="keep")
        model.add_adapter("second", config(folder, original_weights="keep"))
        model.add_weighted_adapter(["first", "second"], [1.0, 0.0], "both")
        expected = logits(model, batch)
        model.set_adapter("both")
        torch.testing.assert_close(logits(model, batch), expected)

    def test_bytes_on_disk(self, base, folder, make_base, samples, tmp_path):
        """Codes in the adapter cost each adapter what its share of the base costs once."""
        fields = {"calibration_data": samples, "quantization_calibration": "absmax"}
        inside = get_peft_model(copy.deepcopy(base), config(None, **fields))
        inside.save_pretrained(tmp_path / "inside")
        adapted(base, folder).save_pretrained(tmp_path / "shared")
        sizes = {name: (tmp_path / name / WEIGHTS).stat().st_size for name in ("inside", "shared")}
        shared = load_file(tmp_path / "shared" / WEIGHTS)
        assert sizes["shared"] - sum(tensor.nbytes for tensor in shared.values()) < 10_000  # names
        half = make_base("half", blocks=[0, 2]) / FILE_NAME
        assert abs(sizes["inside"] - sizes["shared"] - half.stat().st_size) < 10_000


class TestErrors:
    """The model stays as it was, and the message says what to do."""

    @pytest.fixture
    def refuse(self, base):
        def run(message, folder, model=None, error=ValueError):
            model = base if model is None else model
            modules = list(model.modules())
            with pytest.raises(error, match=message):
                get_peft_model(model, config(folder))
            assert list(model.modules()) == modules

        return run

    def test_a_missing_folder(self, refuse, tmp_path):
        message = r"no quantized base '.*nowhere': neither a folder with quantized_base\.safetensors nor a Hub repo"
        refuse(message, tmp_path / "nowhere", error=FileNotFoundError)
        refuse(r"`adaptq quantize-base MODEL --output FOLDER` makes one", "org/nowhere", error=FileNotFoundError)

    def test_a_truncated_file(self, refuse, folder):
        file = folder / FILE_NAME
        file.write_bytes(file.read_bytes()[:-100])
        refuse(r"it is truncated or damaged\. Copy or save the quantized base again\.", folder)
        file.write_bytes(b"")
        refuse(r"has no readable safetensors header.*Copy or save the quantized base again\.", folder)

    def test_another_file(self, refuse, folder):
        save_file({"weight": torch.zeros(3)}, folder / FILE_NAME)
        refuse(r"is no quantized base: its header has no 'adaptq_quantized_base'", folder)

    def test_another_version(self, refuse, folder):
        edit_header(folder / FILE_NAME, version=2)
        refuse(r"has version 2 of the quantized base's format, and this adaptq_peft reads version 1; run `pip", folder)

    def test_another_base_model(self, refuse, folder, base):
        other = copy.deepcopy(base)
        name, linear = linears_of(find_blocks(other)[2])[0]
        linear.weight.data += 1e-3
        message = (
            rf"This quantized base \('.*quantized'\) was made for the base model .*: 1 of \d+ sampled tensors differ, "
            rf"the first is {name}\.weight\. Load that model, or make a quantized base of this one"
        )
        refuse(message, folder, other)

    def test_another_kind_of_model(self, refuse, folder, make_model):
        refuse(r"was made for the base model .*model_type is 'gpt2' instead of 'llama'", folder, make_model("gpt2"))

    def test_a_missing_linear(self, refuse, make_base, base):
        folder = make_base("part", blocks=[0, 1])
        refuse(r"has no codes of \S+\.2\.\S+, which this adapter freezes\. It has 14 linears, the last is", folder)
        get_peft_model(base, config(folder, [2, 3]))

    def test_a_linear_of_another_size(self, folder):
        larger = quantize_linear(nn.Linear(64, 256, bias=False), resolve_quantization("nf4"))
        with pytest.raises(ValueError, match=r"bytes of codes of .*q_proj, and the model's linear is \[256, 64\]"):
            open_base(folder).load_into("model.layers.0.self_attn.q_proj", larger)

    def test_other_settings(self, refuse, make_base):
        folder = make_base("fp4", quantization="fp4")
        refuse(r"is in fp4 with nested absmax, and the adapter's quantization asks for nf4 with nested absmax", folder)

    def test_a_changed_file(self, base, folder, make_base, tmp_path, batch):
        model = adapted(base, folder)
        model.save_pretrained(tmp_path / "adapter")
        (folder / FILE_NAME).rename(tmp_path / FILE_NAME)
        make_base(seed=20)
        with pytest.raises(ValueError, match=r"has changed since the adapter was saved: its SHA-256 is \w{16}\.\.\. "):
            PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
        moved = AdaptQConfig.from_pretrained(str(tmp_path / "adapter"))
        moved.quantized_base.name_or_path = str(tmp_path)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter", config=moved)
        assert torch.equal(logits(loaded, batch), logits(model, batch))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"quantized_base": 3}, r"quantized_base is 3; allowed: None, a folder, a Hub repository or a reference"),
            ({"quantization_calibration": "auto"}, r"holds calibrated codes, and quantization_calibration is 'auto'"),
            ({"quantization": "int8"}, r"holds 4-bit codes, and quantization is 'int8'; leave one of them out"),
            ({"quantization": "none"}, r"holds 4-bit codes, and quantization is 'none'; leave one of them out"),
            (
                {"original_weights": "dequantized"},
                r"is for frozen blocks, and original_weights \"dequantized\" roun",
            ),
        ],
    )
    def test_in_the_config(self, fields, message):
        with pytest.raises(ValueError, match=message):
            AdaptQConfig(**{"quantized_base": "folder", **fields})


class TestMaking:
    def test_the_model_is_not_changed(self, base, make_base):
        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        modules = list(base.modules())
        make_base()
        assert list(base.modules()) == modules
        assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())

    def test_what_it_says_of_itself(self, make_base, samples, tmp_path):
        texts = tmp_path / "law.jsonl"
        texts.write_text("\n".join(json.dumps(sample) for sample in samples))
        about = open_base(make_base(data=texts, general_data=samples, calibration="auto")).description
        assert about.calibration["method"] == "descent"
        assert about.calibration["text"] == ["law.jsonl", "texts given in Python", "written by the model"]
        assert 100 < about.calibration["tokens"] < 300
        assert (about.quant_type, about.nested_absmax, about.version) == ("nf4", True, 1)

    def test_a_crash_leaves_the_former_file(self, make_base, folder, monkeypatch):
        before = (folder / FILE_NAME).read_bytes()

        def fail(tensors, file, metadata):
            Path(file).touch()
            raise OSError("disk full")

        monkeypatch.setattr(quantized_base, "save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            make_base(seed=20)
        assert (folder / FILE_NAME).read_bytes() == before
        assert [path.name for path in folder.iterdir()] == [FILE_NAME]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"calibration": None},
                r"calibration is None: plain rounding gives the same codes at each load, so th",
            ),
            ({"calibration": "best"}, r"quantization_calibration is 'best'; allowed: "),
            (
                {"quantization": "int8"},
                r"quantization is 'int8'; a quantized base holds 4-bit codes: 'nf4', 'fp4'",
            ),
            ({"quantization": BitsAndBytesConfig(load_in_8bit=True)}, r"a quantized base holds 4-bit codes"),
            ({"blocks": [1, 4]}, r"blocks \[4\] are not in the model, which has 4: 0 to 3"),
            ({"blocks": []}, r"there is no linear to quantize in these blocks"),
        ],
    )
    def test_refused(self, make_base, options, message):
        with pytest.raises(ValueError, match=message):
            make_base(**options)

    def test_a_model_that_is_not_the_original(self, base, folder, make_base, tmp_path):
        for model in (adapted(base, folder), adapted(base, None, quantization="none")):
            with pytest.raises(ValueError, match=r"is quantized or has an adapter; quantize_base needs the original"):
                quantize_base(model, tmp_path / "again")
        with pytest.raises(ValueError, match="is not in memory: it is offloaded, or on the meta device"):
            quantize_base(copy.deepcopy(base).to("meta"), tmp_path / "again")
