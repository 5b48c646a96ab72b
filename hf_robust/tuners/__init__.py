"""
Adapters: methods of our own for PEFT, which knows them from `import hf_robust` on:

```python
import hf_robust  # PEFT knows "SARA" from here on
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "my-sara-adapter")
```
"""

from typing import TYPE_CHECKING, Any

from hf_robust.tuners.sara import (
    Reselection,
    SaraConfig,
    SaraLayer,
    SaraModel,
    nuclear_norm,
    reselect,
    sara_learning_rate,
    sara_rank_loss,
)

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


def __getattr__(name: str) -> Any:
    # PEFT is told of the method behind its own import, which may come in the middle of that of transformers: no trainer's
    # callback can be defined there
    if name in ("SaraProgressCallback", "SaraRankLossCallback"):
        from hf_robust.tuners.sara import callbacks

        return getattr(callbacks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
