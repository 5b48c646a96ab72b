"""Settings of a SaRA adapter."""

import math
from dataclasses import dataclass, field
from typing import Literal

from peft.config import PeftConfig

from hf_robust.tuners.sara.registration import SARA, check_peft

VALUE_DTYPES = ("float32", "auto")


@dataclass
class SaraConfig(PeftConfig):
    """
    Configuration of SaRA: of the chosen layers, only the entries with |W| < `threshold` are trained.

    The changes are kept in float32 by default, whatever the type of the weights (`value_dtype`): so steps smaller than the
    resolution of bfloat16 or float16 add up.

    Args:
        threshold (`float`, defaults to `2e-3`):
            An entry is trained if its absolute value is below this (the paper's example; absolute, in the units of the
            weights). [`sara_learning_rate`] gives the paper's learning rate for it.
        target_modules (`list[str]` or `str`, *optional*):
            Names (or their endings) of the layers, or a regular expression, or `"all-linear"`, as everywhere in PEFT.
            Linear layers, convolutions (1, 2 and 3 dimensions) and GPT-2's `Conv1D` can be named. Default: all of these,
            except the output head of a language model and layers that share their weight with another module.
        exclude_modules (`list[str]` or `str`, *optional*):
            Names, endings or a regular expression of layers that are left out.
        train_biases (`bool`, defaults to `True`):
            Whether the biases of these layers are searched for small entries, too.
        rank_loss_weight (`float`, defaults to `5e-4`):
            λ of the low-rank term λ·‖P ⊙ M‖_* (the paper's). It counts only if something adds it: see
            [`sara_rank_loss`] and [`SaraRankLossCallback`].
        reselect_at (`float`, *optional*, defaults to `0.5`):
            Share of training after which [`SaraProgressCallback`] freezes the entries that have grown to the threshold
            (the paper's half). `None`: never.
        value_dtype (`str`, defaults to `"float32"`):
            Type in which the changes are stored and trained: `"float32"`, or `"auto"` for that of the weight. PEFT raises
            bfloat16 and float16 adapters to float32 unless `get_peft_model` gets `autocast_adapter_dtype=False`.
        modules_to_save (`list[str]`, *optional*):
            Further modules that are trained as a whole and saved with the adapter.

    Raises:
        ValueError: a number out of its range, or an unknown `value_dtype`.
        ImportError: PEFT is older than 0.21, or brings a method named SaRA itself.
    """

    threshold: float = field(default=2e-3, metadata={"help": "Entries with |W| below this are trained."})
    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names (or endings) of the layers, a regular expression or 'all-linear'. Default: all linear layers and "
            "convolutions but the output head."
        },
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names, endings or a regular expression of layers that are left out."}
    )
    train_biases: bool = field(default=True, metadata={"help": "Whether small entries of the biases are trained, too."})
    rank_loss_weight: float = field(default=5e-4, metadata={"help": "Weight of the nuclear norm in the loss."})
    reselect_at: float | None = field(
        default=0.5, metadata={"help": "Share of training after which entries that have grown are frozen; None: never."}
    )
    value_dtype: Literal["float32", "auto"] = field(
        default="float32", metadata={"help": "Type of the trained changes: float32, or auto (the weight's)."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules that are trained as a whole and saved with the adapter."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_peft(type(self))
        self.peft_type = SARA
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))
        if not (math.isfinite(self.threshold) and self.threshold > 0):
            raise ValueError(f"`threshold={self.threshold!r}` must be a positive number, for example 2e-3.")
        if not (math.isfinite(self.rank_loss_weight) and self.rank_loss_weight >= 0):
            raise ValueError(f"`rank_loss_weight={self.rank_loss_weight!r}` must be 0 (no term) or a positive number.")
        if self.reselect_at is not None and not 0 < self.reselect_at < 1:
            raise ValueError(f"`reselect_at={self.reselect_at!r}` must lie between 0 and 1, or be None for never.")
        if self.value_dtype not in VALUE_DTYPES:
            raise ValueError(f"`value_dtype={self.value_dtype!r}` must be one of {', '.join(VALUE_DTYPES)}.")


def sara_learning_rate(threshold: float) -> float:
    """
    The paper's learning rate for a threshold: 1e-3 · exp(−350 · threshold); 4.97e-4 for 2e-3.

    The larger the entries that are trained, the smaller the steps.
    """
    return 1e-3 * math.exp(-350 * threshold)
