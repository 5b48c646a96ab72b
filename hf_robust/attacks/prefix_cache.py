"""Keys and values of what precedes a suffix, computed once and shared by all candidates."""

import logging
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_robust.attacks.generation import evaluating
from hf_robust.attacks.prompts import PromptBatch, takes

logger = logging.getLogger(__name__)


class _SharedLayer(DynamicLayer):
    """
    One layer's keys and values of a prefix, read by every row of a forward and changed by none.

    The rows are gathered when the layer is reached, so that only one layer's copy exists at a time, and nothing is
    stored: the prefix serves any number of forwards.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor):
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values, self.rows = keys, values, rows
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None and self.values is not None
        return (
            torch.cat([_gather(self.keys, self.rows), key_states], dim=-2),
            torch.cat([_gather(self.values, self.rows), value_states], dim=-2),
        )


def _gather(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    if states.shape[0] == 1:
        return states.expand(len(rows), -1, -1, -1)
    return states.index_select(0, rows.to(states.device))


class PrefixCache:
    """
    Key-value states of the prefixes of a batch of behaviours.

    Args:
        layers: keys and values `[behaviours, heads, prefix, head_dim]` of each layer.
    """

    def __init__(self, layers: list[tuple[torch.Tensor, torch.Tensor]]):
        self.layers = layers

    @classmethod
    def build(cls, model: nn.Module, batch: PromptBatch, device: torch.device) -> "PrefixCache | None":
        """
        Run the prefixes through the model once.

        Returns:
            `None` where there is no prefix, or the model keeps another state than keys and values per token.
        """
        if int(batch.prefix_lengths.min()) == 0 or not takes(model, "past_key_values"):
            return None
        kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
        if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
            logger.debug("No prefix cache: %s keeps states that cannot be expanded (%s).", type(model).__name__, kinds)
            return None
        mask = batch.prefix_mask.to(device)
        inputs: dict[str, Any] = {"input_ids": batch.prefix_ids.to(device), "attention_mask": mask}
        if takes(model, "position_ids"):
            inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
        if takes(model, "logits_to_keep"):
            inputs["logits_to_keep"] = 1
        # Without the config every layer keeps all positions; the attention mask alone then makes windows slide
        cache = DynamicCache()
        with evaluating(model), torch.no_grad():
            model(**inputs, past_key_values=cache, use_cache=True)
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        width = batch.prefix_ids.shape[1]
        if not layers or any(keys is None or keys.shape[-2] != width for keys, _ in layers):
            logger.debug("No prefix cache: %s did not fill the cache it was given.", type(model).__name__)
            return None
        return cls(layers)

    def select(self, rows: torch.Tensor, width: int) -> DynamicCache:
        """
        The cache of a forward.

        Args:
            rows: `[R]` int64 on the CPU, behaviour of each row.
            width: columns of the prefix to keep, counted from its end.
        """
        first = int(rows[0])
        single = bool((rows == first).all())
        rows = rows.to(self.layers[0][0].device)
        cache = DynamicCache()
        for keys, values in self.layers:
            start = keys.shape[-2] - width
            keys, values = keys[:, :, start:], values[:, :, start:]
            if single:
                keys, values = keys[first : first + 1], values[first : first + 1]
            cache.layers.append(_SharedLayer(keys, values, rows))
        return cache
