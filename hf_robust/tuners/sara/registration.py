"""The one place that tells PEFT of a method that is not PEFT's own."""

from typing import Any

import peft
from packaging.version import Version
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

# Before 0.21, PEFT saves only adapters whose type is a member of its enum.
MIN_PEFT = "0.21.0"
PREFIX = "sara_"


class _MethodName(str):
    """A string where PEFT, transformers and diffusers expect a member of PEFT's enum of methods."""

    __slots__ = ()

    @property
    def value(self) -> str:
        """As of an enum's member: the plain string."""
        return str(self)


# The key in PEFT's mappings, and "peft_type" in adapter_config.json.
SARA: Any = _MethodName("SARA")


def register(config_class: type, model_class: type) -> None:
    """
    Enter SaRA in PEFT's mappings, once; PEFT finds configuration, tuner and parameter names in them.

    `peft.utils.register_peft_method` refuses names that are not in the closed enum `PeftType`. Remove this function and
    call that one when it takes other names (tests/test_sara.py says so). Where PEFT is too old, or has a method of this
    name itself, nothing is entered, and [`check_peft`] gives the reason.
    """
    if Version(peft.__version__) < Version(MIN_PEFT) or SARA in PEFT_TYPE_TO_CONFIG_MAPPING:
        return
    PEFT_TYPE_TO_CONFIG_MAPPING[SARA] = config_class
    PEFT_TYPE_TO_TUNER_MAPPING[SARA] = model_class
    PEFT_TYPE_TO_PREFIX_MAPPING[SARA] = PREFIX


def check_peft(config_class: type) -> None:
    """
    Whether `config_class` is PEFT's configuration for SaRA.

    Raises:
        ImportError: PEFT is older than 0.21, or has another method of this name.
    """
    if Version(peft.__version__) < Version(MIN_PEFT):
        raise ImportError(
            f'SaRA needs peft>={MIN_PEFT}, and {peft.__version__} is installed: pip install -U "peft>={MIN_PEFT}".'
        )
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(SARA)
    if known is None or not issubclass(config_class, known):
        raise ImportError(
            f"peft {peft.__version__} knows {known!r} under the name {SARA!r}, and not hf_robust's SaraConfig: import "
            "hf_robust.tuners, or use PEFT's own method if there is one."
        )
