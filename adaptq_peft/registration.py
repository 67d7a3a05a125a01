"""Adds ADAPTQ to PEFT's list of methods: the only file that touches PEFT's enum and registry.

`peft.utils.register_peft_method` refuses a name that `PeftType` does not have, and an enum can't be subclassed, so the
member is created here. It is a real member: look-up by value, iteration, pickling, deepcopy and JSON work.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

from packaging.version import Version
from peft import mapping
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

NAME = "ADAPTQ"
MINIMUM_PEFT = Version("0.21.0")  # the first release in which a tuner saves and loads its own weights
_OWNER = "adaptq_peft"


def _check_peft_version() -> None:
    installed = Version(importlib.metadata.version("peft"))
    if installed.release < MINIMUM_PEFT.release or not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"):
        raise ImportError(
            f"adaptq_peft needs peft >= {MINIMUM_PEFT}, found peft {installed}. Run `pip install -U peft`."
        )


def ensure_peft_type() -> PeftType:
    """Return `PeftType.ADAPTQ`, creating the enum member on the first call in a process.

    Raises:
        ImportError: if PEFT is older than 0.21, or if something else has already defined `PeftType.ADAPTQ`.
    """
    _check_peft_version()
    member: Any = PeftType.__members__.get(NAME)
    if member is None:
        member = str.__new__(PeftType, NAME)
        member._name_ = NAME
        member._value_ = NAME
        member._adaptq_owner = _OWNER
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
        type.__setattr__(PeftType, NAME, member)
    elif getattr(member, "_adaptq_owner", None) != _OWNER:
        raise ImportError(
            f"PeftType.{NAME} is already defined by peft {importlib.metadata.version('peft')} or by another plugin, "
            "so adaptq_peft can't register its own. Use that implementation, or uninstall one of the two."
        )
    return member


def register_tuner(config_class: type, tuner_class: type) -> None:
    """Register the ADAPTQ config and tuner classes with PEFT. Calling it again replaces the classes.

    Args:
        config_class: a `PeftConfig` subclass.
        tuner_class: a `BaseTuner` subclass with `prefix = "adaptq_"`.
    """
    peft_type = ensure_peft_type()
    if peft_type in mapping.PEFT_TYPE_TO_CONFIG_MAPPING:  # a reload of this package: PEFT would raise a KeyError
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_class
        mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = tuner_class
        return
    register_peft_method(name=NAME.lower(), config_cls=config_class, model_cls=tuner_class)
