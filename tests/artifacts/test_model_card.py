from __future__ import annotations

import json
import re

import pytest
import torch
from huggingface_hub import ModelCard, RepoCard
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments

import adaptq_peft
from adaptq_peft import AdaptQConfig, update_model_card
from adaptq_peft.artifacts import model_card
from adaptq_peft.artifacts.model_card import ADAPTER_PLACEHOLDER, BEGIN, CERTIFIED, END

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
EVALUATION = {
    "general": {"text": "WikiText-2 test", "base": 25.61, "quantized": 28.62, "adapted": 26.2},
    "domain": {"adapted": 13.5},
}


def section(folder):
    """The section of the card in a folder; there must be exactly one."""
    text = (folder / CARD).read_text()
    assert (text.count(BEGIN), text.count(END), text.count("## ADAPTQ adapter")) == (1, 1, 1)
    return text[text.index(BEGIN) : text.index(END)]


def row(text, name):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return line.strip("| ").split(" | ")


@pytest.fixture
def adapted(make_model, samples, tmp_path):
    """Builds an adapter on a base that was loaded from `tmp_path/base`."""

    def build(**fields):
        make_model().save_pretrained(tmp_path / "base")
        base = type(make_model()).from_pretrained(tmp_path / "base")
        return get_peft_model(base, AdaptQConfig(task_type="CAUSAL_LM", calibration_data=samples, **fields))

    return build


def test_the_section_says_what_the_adapter_is(adapted, tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "adapter")
    text, config = section(tmp_path / "adapter"), model.peft_config["default"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert "`W0 + 0.25 * delta`, on 2 of 4 transformer blocks; the other 2 are frozen, their linears quantized" in text
    assert "quantized, with low-rank corrections of rank 8." in text
    assert row(text, "base model") == ["base model", f"`{tmp_path / 'base'}`, llama, float32"]
    assert re.fullmatch(r"values of \d+ tensors, SHA-256 `[0-9a-f]{16}`", row(text, "recognized by")[1])
    assert row(text, "adapted blocks")[1] == "0-1 (2 of 4), rule `update` on 60 samples, 414 tokens"
    assert row(text, "frozen blocks")[1] == "linears in 4 bits, NF4, nested absmax (bitsandbytes)"
    assert row(text, "trained parameters")[1] == f"{trained:,}"
    assert row(text, "adapter file")[1] == f"{(tmp_path / 'adapter' / WEIGHTS).stat().st_size / 1e6:,.1f} MB"
    assert row(text, "saved by")[1].startswith(f"adaptq_peft {adaptq_peft.__version__}, PEFT ")
    for index, state in enumerate(["adapted", "adapted", "frozen", "frozen"]):
        figures = [f"{getattr(config.profile, name)[index]:.3g}" for name in ("magnitude", "update")]
        assert row(text, str(index)) == [str(index), *figures, state]
    assert "Perplexity" not in text


def test_the_section_stands_below_the_heading_and_the_rest_of_the_card_stays(adapted, tmp_path):
    adapted().save_pretrained(tmp_path / "adapter")
    text = ModelCard.load(tmp_path / "adapter" / CARD).text.strip()
    assert re.match(rf"# Model Card for Model ID\n\n{BEGIN}\n", text)
    assert "### Framework versions\n\n- PEFT" in text


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"layers_to_transform": [0, 2, 3]}, "adapted blocks", "0, 2-3 (3 of 4), given by index"),
        ({"selection_strategy": "first"}, "adapted blocks", "0-1 (2 of 4), rule `first`"),
        ({"quantization": "none"}, "frozen blocks", "not quantized"),
        ({"quantization": "int8"}, "frozen blocks", "linears in 8 bits, LLM.int8() (bitsandbytes)"),
    ],
)
def test_other_settings(adapted, tmp_path, fields, name, value):
    adapted(**fields).save_pretrained(tmp_path / "adapter")
    assert row(section(tmp_path / "adapter"), name)[1] == value


def test_the_settings_of_a_bitsandbytes_config(adapted, tmp_path):
    adapted(quantization=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")).save_pretrained(tmp_path)
    frozen = row(section(tmp_path), "frozen blocks")[1]
    assert frozen.startswith("linears by bitsandbytes: load_in_4bit, bnb_4bit_compute_dtype=float32, ")
    assert "bnb_4bit_quant_type=fp4" in frozen


def test_the_revision_of_the_base_is_in_the_section(adapted, tmp_path):
    model = adapted()
    model.peft_config["default"].revision = "v1"
    model.save_pretrained(tmp_path / "adapter")
    assert "revision `v1`, llama" in section(tmp_path / "adapter")
    model.peft_config["default"].base_fingerprint["commit_hash"] = "0123abc"  # says more than a branch
    model.save_pretrained(tmp_path / "adapter")
    assert "revision `0123abc`, llama" in section(tmp_path / "adapter")


def test_measured_perplexities(adapted, tmp_path):
    model = adapted()
    model.peft_config["default"].evaluation = EVALUATION
    model.save_pretrained(tmp_path / "adapter")
    text = section(tmp_path / "adapter")
    assert row(text, "general: WikiText-2 test")[1:] == ["25.61", "28.62 (+11.8%)", "26.20 (+2.3%)"]
    assert "| domain |  |  | 13.50 |" in text
    assert AdaptQConfig.from_pretrained(tmp_path / "adapter").evaluation == EVALUATION


def test_the_code_in_the_section_loads_the_adapter(adapted, tmp_path, batch, monkeypatch):
    model = adapted()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    (code,) = re.findall(r"```python\n(.*?)```", section(tmp_path / "adapter"), re.DOTALL)
    assert code.startswith("import adaptq_peft")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name: name)  # the tiny base has no tokenizer
    names = {}
    exec(code.replace(ADAPTER_PLACEHOLDER, str(tmp_path / "adapter")), names)
    assert names["tokenizer"] == str(tmp_path / "base")
    with torch.no_grad():
        assert torch.equal(names["model"].eval()(**batch).logits, model.eval()(**batch).logits)


def test_a_model_that_is_not_of_transformers(tmp_path):
    class Mlp(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.lin(x)

    get_peft_model(Mlp(), AdaptQConfig(target_modules=["lin"])).save_pretrained(tmp_path)
    text = section(tmp_path)
    assert "Full-rank deltas on the target modules; nothing is quantized." in text
    assert "PeftModel.from_pretrained(base_model, adapter)" in text
    assert "adapted blocks" not in text


def test_a_second_save_updates_the_section(adapted, tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / CARD).read_text()
    (tmp_path / "adapter" / CARD).write_text(card + "\nWritten by a user.\n")
    model.peft_config["default"].evaluation = EVALUATION
    model.save_pretrained(tmp_path / "adapter")
    assert "Perplexity" in section(tmp_path / "adapter")
    assert "Written by a user." in (tmp_path / "adapter" / CARD).read_text()
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [CARD, CONFIG, WEIGHTS]


def test_a_second_adapter_has_a_card_of_its_own(adapted, tmp_path):
    model = adapted()
    model.add_adapter("other", AdaptQConfig(task_type="CAUSAL_LM", layers_to_transform=[2, 3], delta_scaling=0.5))
    model.save_pretrained(tmp_path / "adapter")
    assert "0.25 * delta" in section(tmp_path / "adapter")
    assert "0.5 * delta" in section(tmp_path / "adapter" / "other")
    assert ModelCard.load(tmp_path / "adapter" / "other" / CARD).data.library_name == "peft"


def test_metadata(adapted, tmp_path):
    model = adapted()
    model.base_model.model.add_model_tags("mine")
    model.save_pretrained(tmp_path / "adapter")
    data = ModelCard.load(tmp_path / "adapter" / CARD).data
    assert data.library_name == "peft"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["adaptq", "mine", "transformers"]
    assert data.base_model is None  # the Hub refuses the name of a folder here


def test_a_base_on_the_hub_is_in_the_metadata(adapted, tmp_path):
    model = adapted()
    model.peft_config["default"].base_model_name_or_path = "org/base"
    model.save_pretrained(tmp_path / "adapter")
    data = ModelCard.load(tmp_path / "adapter" / CARD).data
    assert data.base_model == "org/base"
    assert "base_model:adapter:org/base" in data.tags
    assert 'AutoTokenizer.from_pretrained("org/base")' in section(tmp_path / "adapter")


def test_a_card_that_is_written_anew_gets_the_section(adapted, tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    before = section(tmp_path)
    (tmp_path / CARD).unlink()
    ModelCard("---\ntags:\n- new\n---\n\n# New\n\ntext\n").save(tmp_path / CARD)
    assert section(tmp_path) == before
    data = ModelCard.load(tmp_path / CARD).data
    assert (data.library_name, data.tags) == ("peft", ["adaptq", "new"])


def test_other_cards_are_left_alone(make_model, tmp_path):
    content = "---\ntags:\n- new\n---\n\n# New\n"
    ModelCard(content).save(tmp_path / CARD)
    AdaptQConfig().save_pretrained(tmp_path)  # a config alone is no adapter
    update_model_card(tmp_path)
    assert (tmp_path / CARD).read_text() == content
    model = get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "lora")
    assert "adaptq" not in (tmp_path / "lora" / CARD).read_text().lower()
    assert RepoCard.save.__qualname__ == "RepoCard.save"  # only that of model cards is extended


@pytest.mark.parametrize("damaged", [WEIGHTS, CONFIG])
def test_a_damaged_adapter_can_be_saved_over(adapted, tmp_path, damaged):
    model = adapted()
    model.peft_config["default"].certificate = {**dict.fromkeys(CERTIFIED, 0.05), "sample": {}}
    model.save_pretrained(tmp_path)
    (tmp_path / damaged).write_bytes((tmp_path / damaged).read_bytes()[:50])
    model.save_pretrained(tmp_path)
    assert "trained parameters" in section(tmp_path)


def test_a_failed_write_leaves_the_card(adapted, tmp_path, monkeypatch):
    adapted().save_pretrained(tmp_path)
    before = (tmp_path / CARD).read_text()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(RepoCard, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        update_model_card(tmp_path)
    assert (tmp_path / CARD).read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [CARD, CONFIG, WEIGHTS]


def test_trainer_checkpoints_the_final_model_and_its_own_card(adapted, batch, tmp_path):
    data = [{"input_ids": row, "labels": row} for row in batch["input_ids"]]
    folder = tmp_path / "run"
    arguments = TrainingArguments(folder, max_steps=2, save_steps=1, report_to="none", per_device_train_batch_size=2)
    trainer = Trainer(adapted(), arguments, train_dataset=data)
    trainer.train()
    for number in (1, 2):
        assert "0-1 (2 of 4)" in section(folder / f"checkpoint-{number}")
    trainer.save_model()
    before = section(folder)
    trainer.create_model_card(model_name="mine")  # writes the card anew
    assert section(folder) == before
    text = (folder / CARD).read_text()
    assert "generated automatically according to the information the Trainer had access to" in text
    assert json.loads((folder / CONFIG).read_text())["peft_type"] == "ADAPTQ"


def test_codes_in_the_file_are_no_trained_parameters(adapted, samples, tmp_path):
    model = adapted(quantization_calibration="absmax")
    model.save_pretrained(tmp_path / "adapter")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert row(section(tmp_path / "adapter"), "trained parameters")[1] == f"{trained:,}"


def test_a_base_in_gptq_is_named():
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    described = model_card._quantization(config, None)
    assert described == "linears by gptq in 4 bits, groups of 128, as the base has them"
