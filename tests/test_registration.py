from __future__ import annotations

import copy
import importlib
import json
import pickle
import subprocess
import sys
import textwrap

import pytest
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType

import adaptq_peft
from adaptq_peft import AdaptQConfig, AdaptQTuner, registration


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)


def test_the_member_behaves_like_any_other():
    member = PeftType.ADAPTQ
    assert isinstance(member, PeftType)
    assert PeftType("ADAPTQ") is member
    assert PeftType["ADAPTQ"] is member
    assert member in list(PeftType)
    assert (member.name, member.value) == ("ADAPTQ", "ADAPTQ")
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member
    assert json.dumps(member) == '"ADAPTQ"'


def test_peft_finds_the_config_the_tuner_and_the_prefix():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.ADAPTQ] is AdaptQConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.ADAPTQ] is AdaptQTuner
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.ADAPTQ] == "adaptq_"


def test_importing_and_registering_again_changes_nothing():
    member = PeftType.ADAPTQ
    importlib.reload(adaptq_peft)
    registration.register_tuner(AdaptQConfig, AdaptQTuner)
    assert registration.ensure_peft_type() is member
    assert list(PeftType).count("ADAPTQ") == 1


def test_reloading_every_module_in_a_fresh_process():
    result = run_python(
        """
        import importlib, sys
        import adaptq_peft
        from peft.utils.peft_types import PeftType
        before = PeftType.ADAPTQ
        for name in [n for n in sys.modules if n.startswith("adaptq_peft")]:
            del sys.modules[name]
        import adaptq_peft
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
        assert PeftType.ADAPTQ is before
        assert PEFT_TYPE_TO_CONFIG_MAPPING["ADAPTQ"] is adaptq_peft.AdaptQConfig
        print(adaptq_peft.AdaptQConfig().peft_type is before)
        """
    )
    assert result.stdout.strip() == "True", result.stderr


def test_a_config_goes_to_another_process_by_pickle(tmp_path):
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(AdaptQConfig(num_adapted_blocks=3)))
    result = run_python(
        f"""
        import pickle
        config = pickle.load(open({str(tmp_path / "config.pickle")!r}, "rb"))
        print(config.num_adapted_blocks, config.peft_type.value)
        """
    )
    assert result.stdout.split() == ["3", "ADAPTQ"], result.stderr


def test_a_foreign_adaptq_is_an_error():
    result = run_python(
        """
        from peft.utils.peft_types import PeftType
        member = str.__new__(PeftType, "ADAPTQ")
        member._name_ = member._value_ = "ADAPTQ"
        PeftType._member_names_.append("ADAPTQ")
        PeftType._member_map_["ADAPTQ"] = PeftType._value2member_map_["ADAPTQ"] = member
        import adaptq_peft
        """
    )
    assert result.returncode != 0
    assert "ImportError: PeftType.ADAPTQ is already defined by peft" in result.stderr
    assert "uninstall one of the two" in result.stderr


def test_an_old_peft_is_an_error(monkeypatch):
    monkeypatch.setattr(registration.importlib.metadata, "version", lambda name: "0.20.0")
    with pytest.raises(ImportError, match=r"needs peft >= 0\.21\.0, found peft 0\.20\.0\. Run `pip install -U peft`"):
        registration.ensure_peft_type()


def test_a_saved_config_is_read_back_by_peft_itself(tmp_path):
    AdaptQConfig(task_type="CAUSAL_LM", layers_to_transform=[1, 2]).save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, AdaptQConfig)
    assert loaded.peft_type is PeftType.ADAPTQ
