"""A study as a whole: what it runs and in which order, that it goes on where it was stopped, and what it writes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure
from peft import PeftModel
from transformers import AutoModelForCausalLM

from adaptq_peft.comparison import StudyError, StudySettings, run_study
from adaptq_peft.comparison import study as study_module
from adaptq_peft.comparison.methods import resolve_methods
from adaptq_peft.comparison.plots import plot_fronts
from adaptq_peft.comparison.training import Trained, draw_samples, num_steps
from adaptq_peft.demo.training import training_windows
from adaptq_peft.evaluation import describe_environment

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MEMORY = {"trained_parameters": 10, "weights": 1, "gradients": 1, "optimizer_states": 1, "total": 3}


def fake_record(validation: float, test: float) -> dict:
    general = {"base": 20.0, "quantized": 22.0, "adapted": 21.0, "degradation": 0.05, "quantization": 0.1}
    general |= {"training": -0.05, "upper_bound": 0.06}
    domain = {"base": 30.0, "quantized": 33.0, "adapted": test, "change": test / 30 - 1}
    return {
        "memory": MEMORY,
        "seconds": {"build": 1.0, "step": 0.5},
        "losses": [3.0],
        "finish": {},
        "validation": {"domain": validation, "general": 20.0},
        "test": {"general": general, "domain": domain, "domain_kl": 0.1},
        "failure": None,
        "scaled": {"0.5": {"domain": 28.0, "general": 20.5}},
    }


class FakeTraining:
    """Stands in for training and measuring; notes what was run, and may be stopped or fail."""

    def __init__(self) -> None:
        self.timed: list[str] = []
        self.trained: list[str] = []
        self.ran: list[str] = []
        self.stop_at: int | None = None
        self.failing: str = ""
        self.device = "CPU"

    def train_run(self, run, *arguments, steps=None):
        if self.stop_at == len(self.ran):
            raise KeyboardInterrupt
        if self.failing == run.method.name:
            raise RuntimeError("no such luck")
        (self.trained if steps is None else self.timed).append(str(run))
        return Trained(None, MEMORY, [3.0], {"build": 1.0, "step": 0.5})

    def results(self, trained, runs, *arguments):
        for run in runs:
            self.ran.append(str(run))
            # Validation is best at the first rate, the test at the last; seeds differ by 1.
            record = fake_record(10.0 + run.rate, 20.0 - 1000 * run.rate + run.seed)
            yield run, {**record, "environment": {"device": self.device}}


@pytest.fixture
def fake(monkeypatch):
    training = FakeTraining()
    monkeypatch.setattr(study_module, "train_run", training.train_run)
    monkeypatch.setattr(study_module, "results", training.results)
    monkeypatch.setattr(study_module, "seconds_a_token", lambda measurements: 0.001)
    monkeypatch.setattr(study_module, "plot_fronts", lambda folder, rows: [])  # drawing takes seconds
    return training


@pytest.fixture
def study(settings, checkpoint, texts, console):
    """`study(dry_run=False, **settings)`: runs a study of the tiny model."""

    def run(dry_run=False, **changes):
        return run_study(settings(**changes), model=str(checkpoint), texts=texts, console=console, dry_run=dry_run)

    return run


def test_rates_are_searched_with_the_first_seed_and_the_best_on_validation_is_repeated(fake, study):
    rows = study(methods=("lora",), seeds=(0, 1, 2))
    assert fake.ran == [
        "lora, N=8, rate 0.001, seed 0",
        "lora, N=8, rate 0.002, seed 0",
        "lora, N=8, rate 0.001, seed 1",
        "lora, N=8, rate 0.001, seed 2",
    ]
    (row,) = rows
    assert (row.rate, row.at_edge, row.num_seeds) == (1e-3, True, 3)
    assert row.figures["domain"] == pytest.approx((20.0, 1.0))


def test_stopped_study_goes_on_where_it_was(fake, study):
    fake.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        study(methods=("lora", "full"), seeds=(0, 1))
    done, fake.ran, fake.stop_at = list(fake.ran), [], None
    rows = study(methods=("lora", "full"), seeds=(0, 1))
    assert len(done) == 2
    assert not set(done) & set(fake.ran)
    assert len(done) + len(fake.ran) == 6
    assert [row.num_seeds for row in rows] == [2, 2]
    fake.ran = []
    assert study(methods=("lora", "full"), seeds=(0, 1)) == rows
    assert fake.ran == []


def test_other_calls_add_to_the_tables(fake, study):
    study(methods=("lora", "lora-qv"), samples=(8,), rates=(1e-3, 2e-3))
    for changes in ({"samples": (16,), "rates": (4e-3,)}, {"samples": (8,), "rates": (1e-3,), "seeds": (1,)}):
        rows = study(methods=("lora",), **{"seeds": (0,), **changes})
    assert [(row.method, row.samples, row.rate, row.num_seeds) for row in rows] == [
        ("lora-qv", 8, 1e-3, 1),
        ("lora", 8, 1e-3, 2),
        ("lora", 16, 4e-3, 1),
    ]


def test_other_weights_in_the_same_folder_are_another_model(fake, settings, checkpoint, texts, console, tmp_path):
    folder, counts = shutil.copytree(checkpoint, tmp_path / "model"), []
    for change in (False, False, True):
        if change:
            model = AutoModelForCausalLM.from_pretrained(folder)
            model.model.layers[0].mlp.down_proj.weight.data.normal_()
            model.save_pretrained(folder)
        run_study(settings(methods=("lora",), rates=(1e-3,)), model=str(folder), texts=texts, console=console)
        counts.append(len(fake.ran))
    assert counts == [1, 1, 2]


def test_runs_on_other_texts_are_other_runs(fake, settings, checkpoint, texts, console):
    counts = []
    for each in (texts, texts, replace(texts, general_test=texts.general_test[1:])):
        run_study(settings(methods=("lora",), rates=(1e-3,)), model=str(checkpoint), texts=each, console=console)
        counts.append(len(fake.ran))
    assert counts == [1, 1, 2]


def test_samples_are_cut_from_the_training_text_of_the_domain(settings, checkpoint, texts, tokenizer, console):
    study = study_module._Study(settings(methods=("lora",)), str(checkpoint), texts, console)
    expected = training_windows(tokenizer, texts.domain_train, 16)
    assert [w["input_ids"].tolist() for w in study.windows] == [w["input_ids"].tolist() for w in expected]


def test_study_that_goes_on_keeps_its_dtype(fake, study, monkeypatch, tmp_path):
    study(methods=("lora",))
    fake.ran = []
    monkeypatch.setattr(study_module, "faster_dtype", lambda: torch.bfloat16)  # timed anew, it may come out otherwise
    study(methods=("lora",))
    assert fake.ran == []
    study(methods=("lora",), dtype="bfloat16")
    assert len(fake.ran) == 2


def test_a_table_of_what_is_not_trained_alone(fake, study, tmp_path):
    study(methods=("vanilla",))
    text = (tmp_path / "results.md").read_text()
    assert text.count("## Methods\n") == 1
    assert "| not trained |" in text
    assert "Each learning rate" not in text


def test_another_call_adds_to_the_tables(fake, study, tmp_path):
    study(methods=("lora",))
    rows = study(methods=("vanilla", "adaptq-50"), samples=(8, 16))
    assert [(row.method, row.samples) for row in rows if row.group == "main"] == [
        ("vanilla", 0),
        ("lora", 8),
        ("adaptq-50", 8),
        ("adaptq-50", 16),
    ]
    text = (tmp_path / "results.md").read_text()
    assert text.index("## Methods, N = 8") < text.index("## Methods, N = 16")
    (front, blocks, *_) = plot_fronts(tmp_path, rows)
    assert (front.name, blocks.name) == ("front_main.png", "front_selection.png")
    assert front.read_bytes().startswith(PNG_SIGNATURE)


def test_ablations_are_beside_what_they_vary_in_table_and_figure(fake, study, tmp_path, monkeypatch):
    names = ("lora-64-budget", "adaptq-recipe-4bit-budget", "recipe-20-rank-64-scaling-0.25-budget")
    titles = [method.title for method in resolve_methods(names)]
    rows = study(methods=(*names, "shira"))
    text = (tmp_path / "results.md").read_text()
    (table,) = (part for part in text.split("## ") if part.startswith("Rank of the corrections"))
    assert all(title in table for title in titles)
    assert "SHiRA" not in table

    drawn = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: drawn.update({path.name: figure}))
    plot_fronts(tmp_path, rows)
    figure = drawn["front_rank.png"]
    (legend,) = figure.legends
    assert [label.get_text() for label in legend.get_texts()] == titles
    figure.draw_without_rendering()
    place = legend.get_window_extent()
    assert 0 <= place.x0 < place.x1 <= figure.bbox.width


def test_rates_of_another_call_count_in_the_search(fake, study):
    study(methods=("lora",), rates=(1e-3, 2e-3))
    (row,) = study(methods=("lora",), rates=(4e-3,), seeds=(0, 1))
    assert fake.ran[-1] == "lora, N=8, rate 0.001, seed 1"  # the best on validation of all three
    assert [point.rate for point in row.points if point.scale == 1] == [1e-3, 2e-3, 4e-3]
    assert (row.rate, row.at_edge) == (1e-3, True)


def test_method_is_no_row_while_its_search_goes_on(fake, study, tmp_path):
    fake.stop_at = 1
    with pytest.raises(KeyboardInterrupt):
        study(methods=("lora",))
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == []
    fake.stop_at = None
    (row,) = study(methods=("qlora",), rates=(5e-3,))[:1]  # another call shows what was tried
    assert (row.method, len(row.points)) == ("lora", 2)


def test_runs_of_several_machines_say_where_each_was_made(fake, study, tmp_path):
    study(methods=("lora",), rates=(1e-3,))
    fake.device = "H200"
    study(methods=("lora",), rates=(2e-3, 4e-3))
    environments = json.loads((tmp_path / "results.json").read_text())["about"]["environments"]
    assert sorted(one["device"] for one in environments) == ["CPU", "H200"]


def test_methods_that_share_a_training_are_trained_once(fake, study):
    study(methods=("lora", "lora-quantize", "adaptq-50", "select-activation"), rates=(1e-3,))
    assert fake.timed == fake.trained == ["lora, N=8, rate 0.001, seed 0", "adaptq-50, N=8, rate 0.001, seed 0"]
    assert len(fake.ran) == 3


def test_failed_training_does_not_cost_the_others(fake, study, console, tmp_path):
    fake.failing = "full"
    with pytest.raises(StudyError, match=r"2 trainings failed:\nfull, N=8, .*RuntimeError: no such luck"):
        study(methods=("full", "lora"))
    assert [row["method"] for row in json.loads((tmp_path / "results.json").read_text())["rows"]] == ["lora"]
    assert "full could not be timed: RuntimeError: no such luck" in console.file.getvalue()


def test_dry_run_prints_the_price_and_trains_nothing(fake, study, console, tmp_path):
    assert study(dry_run=True, methods=("lora",), seeds=(0, 1)) == []
    assert fake.ran == []
    assert "3 trainings with 3 results are missing" in console.file.getvalue()
    assert not (tmp_path / "results.md").exists()


def test_too_little_text_is_said_before_anything_runs(fake, study):
    with pytest.raises(ValueError, match=r"N=5000 training samples are asked for, and the domain's training text has"):
        study(samples=(8, 5000))
    assert fake.ran == []


def test_too_few_documents_for_a_budget_are_said_before_anything_runs(fake, settings, checkpoint, texts, console):
    few = replace(texts, general_valid=texts.general_valid[:15])
    with pytest.raises(
        ValueError, match=r"15 general documents for validation, and \['lora-budget'\] need at least 16"
    ):
        run_study(settings(methods=("lora", "lora-budget")), model=str(checkpoint), texts=few, console=console)
    assert fake.ran == []


def test_steps_count_epochs_batches_and_accumulation():
    settings = StudySettings(epochs=3, batch_size=8)
    lora, paper, vanilla = (resolve_methods([name])[0] for name in ("lora", "lora-paper", "vanilla"))
    assert [num_steps(500, method, settings) for method in (lora, paper, vanilla)] == [189, 48, 0]


def test_fewer_samples_are_the_first_of_more(windows):
    more, fewer, other = (draw_samples(windows, count, seed) for count, seed in ((12, 1), (5, 1), (5, 2)))
    assert [w["input_ids"].tolist() for w in more[:5]] == [w["input_ids"].tolist() for w in fewer]
    assert [w["input_ids"].tolist() for w in other] != [w["input_ids"].tolist() for w in fewer]


def test_settings_report_all_faults_at_once():
    with pytest.raises(
        ValueError, match=r"rates=0, must be above 0; epochs=0, must be at least 1; scales=1.5, must be"
    ):
        StudySettings(rates=(1e-4, 0), epochs=0, scales=(1.5,))
    with pytest.raises(ValueError, match=r"seeds=\(1, 1\), must be one or more different values"):
        StudySettings(seeds=(1, 1))
    with pytest.raises(ValueError, match=r"budget=-1, must be above -1; 0.02 allows 2% more"):
        StudySettings(budget=-1)
    with pytest.raises(ValueError, match=r"dtype='int8', must be one of \['auto', 'float32'"):
        StudySettings(dtype="int8")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 2),
        ("batch_size", 2),
        ("length", 8),
        ("weight_decay", 0.2),
        ("evaluation_tokens", 99),
        ("validation_tokens", 99),
        ("max_length", 16),
        ("anchor_samples", 2),
        ("budget", 0.5),
        ("scales", (0.5,)),
    ],
)
def test_a_run_depends_on_what_it_is_made_and_measured_with(settings, name, value):
    assert settings(**{name: value}).of_a_run() != settings().of_a_run()


def test_a_run_does_not_depend_on_which_others_there_are(settings):
    assert settings(samples=(9,), seeds=(3,), rates=(1.0,), methods=("lora",)).of_a_run() == settings().of_a_run()


@pytest.mark.filterwarnings("ignore:Profiled 8 calibration samples")
def test_real_study_writes_runs_tables_and_figures(study, tmp_path, console):
    rows = study(methods=("vanilla", "lora", "adaptq-50"), rates=(2e-3,), scales=(0.5,))
    assert [row.method for row in rows if row.group == "main"] == ["vanilla", "lora", "adaptq-50"]
    vanilla, lora, adaptq = rows[:3]
    assert vanilla.figures["degradation"].mean == 0
    assert lora.figures["quantization"].mean == 0
    assert adaptq.figures["quantization"].mean != 0
    assert lora.memory["total"] < adaptq.memory["total"]
    assert [point.scale for point in adaptq.points] == [1.0, 0.5]
    text = (tmp_path / "results.md").read_text()
    assert "| ADAPT-Q-50 | 0.002 |" in text
    for name in ("front_main.png", "front_selection.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG_SIGNATURE)
    assert len(list((tmp_path / "runs").glob("*.json"))) == 3
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["about"]["settings"]["epochs"] == 1
    assert report["about"]["environments"] == [describe_environment()]
    assert "3 trainings with 3 results are missing" in console.file.getvalue()
    assert "adaptq-50, N=8, rate 0.002, seed 0: general " in console.file.getvalue()


@pytest.mark.filterwarnings("ignore:Profiled 8 calibration samples")
def test_saved_adapters_are_what_was_measured(study, tmp_path, load, measurements):
    study(methods=("lora", "lora-budget", "adaptq-50", "vanilla"), rates=(0.05,), budget=0.0, save_adapters=True)
    folders = list((tmp_path / "adapters").iterdir())
    assert {folder.name.split("_")[0] for folder in folders} == {"adaptq-50", "lora", "lora-budget"}
    for folder in folders:
        record = json.loads((tmp_path / "runs" / f"{folder.name}.json").read_text())
        model = PeftModel.from_pretrained(load(), folder)
        assert measurements.validation(model) == pytest.approx(record["validation"])
    assert len(list((tmp_path / "runs").glob("lora*.json"))) == 2


def test_adapters_are_saved_only_where_asked_for(study, tmp_path):
    study(methods=("lora",), rates=(0.05,))
    assert not (tmp_path / "adapters").exists()
