"""SaRA: train only the small entries of pretrained weights, as a method of PEFT."""

from typing import TYPE_CHECKING, Any

from hf_robust.tuners.sara.config import SaraConfig, sara_learning_rate
from hf_robust.tuners.sara.layer import SaraLayer
from hf_robust.tuners.sara.model import SaraModel
from hf_robust.tuners.sara.rank_loss import nuclear_norm, sara_rank_loss
from hf_robust.tuners.sara.registration import register
from hf_robust.tuners.sara.reselection import Reselection, reselect

if TYPE_CHECKING:
    from hf_robust.tuners.sara.callbacks import SaraProgressCallback, SaraRankLossCallback

__all__ = [
    "Reselection",
    "SaraConfig",
    "SaraLayer",
    "SaraModel",
    "SaraProgressCallback",
    "SaraRankLossCallback",
    "nuclear_norm",
    "reselect",
    "sara_learning_rate",
    "sara_rank_loss",
]

register(SaraConfig, SaraModel)


def __getattr__(name: str) -> Any:
    # PEFT is told of the method behind its own import, which may come in the middle of that of transformers: no trainer's
    # callback can be defined there
    if name in ("SaraProgressCallback", "SaraRankLossCallback"):
        from hf_robust.tuners.sara import callbacks

        return getattr(callbacks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
