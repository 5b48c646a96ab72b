"""Progressive re-selection: entries that have grown to the threshold freeze, those still below it go on."""

import logging
from typing import NamedTuple

import torch
from torch import nn

from hf_robust.tuners.sara.layer import SaraLayer

logger = logging.getLogger(__name__)


class Reselection(NamedTuple):
    """Counts after a re-selection: `kept` entries go on, `frozen` ones do not (earlier ones included)."""

    kept: int
    frozen: int


@torch.no_grad()
def reselect(model: nn.Module) -> Reselection:
    """
    Select again, by the present weights: trained entries with |W + δ| ≥ threshold freeze where they are.

    A frozen entry keeps its value for good, also in saved and merged adapters, and gets no gradient; entries that were not
    selected in the first place have not moved, so that none comes in. All active, trainable adapters are treated.

    The parameters keep their identity and shape. So the optimizer goes on unchanged: the state of the entries that stay (say
    Adam's moments) is kept, and what state, momentum or weight decay do at frozen positions has no effect, because the
    forward pass takes the held value there. DDP, schedulers and checkpoints need nothing. Memory stays that of the first
    selection, plus the held values.

    Raises:
        ValueError: no active, trainable SaRA adapter in the model, or one is merged.
    """
    kept = frozen = adapters = 0
    for layer in model.modules():
        if not isinstance(layer, SaraLayer):
            continue
        if layer.merged:
            raise ValueError(
                f"Adapters {layer.merged_adapters} are merged, and their entries cannot be told from the base model's: call "
                "`unmerge_adapter()` first."
            )
        for name in layer.active_adapters:
            if name not in layer.sara_values or not layer.sara_values[name].requires_grad:
                continue
            adapters += 1
            values = layer.effective_values(name)
            stays = (layer.base_entries(name) + values).abs() < layer.sara_config[name].threshold
            if len(before := layer.sara_frozen[name]):
                stays[before.long()] = False
            positions = (~stays).nonzero().squeeze(1)
            layer.sara_frozen[name] = positions.to(layer.sara_indices[name].dtype)
            layer.sara_held[name] = values[positions].clone()
            frozen += len(positions)
            kept += len(stays) - len(positions)
    if not adapters:
        raise ValueError("`model` has no active, trainable SaRA adapter: there is nothing to select again.")
    logger.info("SaRA re-selection: %d entries go on, %d are frozen.", kept, frozen)
    return Reselection(kept, frozen)
