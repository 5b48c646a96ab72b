"""The parts of a vision-language model that learn at their own rates."""

from typing import Any

import torch
from torch import nn

# What transformers' models call the module between image tower and language model
PROJECTORS = ("multi_modal_projector", "merger", "connector", "aligner", "mm_projector", "modality_projection")


def vision_parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """
    Parameters of image tower and projector.

    Args:
        model: a vision-language model or PEFT model around one, unwrapped.

    Returns:
        `"vision"` (without a projector inside it, as Qwen-VL's) and `"projector"`; empty where there is none.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()
    tower = base.get_encoder(modality="image")
    projectors = [module for name, module in base.named_modules() if name.rpartition(".")[2] in PROJECTORS]
    between = {id(p): p for module in projectors for p in module.parameters()}
    inside = [] if tower is base else [p for p in tower.parameters() if id(p) not in between]
    return {"vision": inside, "projector": list(between.values())}


def give_rates(optimizer: torch.optim.Optimizer, parts: dict[str, list[nn.Parameter]], rates: dict[str, Any]) -> None:
    """
    Move parameters of an optimizer that has not stepped yet into groups with learning rates of their own.

    Args:
        optimizer: its groups keep their other settings.
        parts: see [`vision_parts`].
        rates: learning rate by part; `None` leaves a part where it is.
    """
    for name, rate in rates.items():
        if rate is None:
            continue
        members = {id(p) for p in parts[name]}
        for group in list(optimizer.param_groups):
            moved = [p for p in group["params"] if id(p) in members]
            if moved:
                group["params"] = [p for p in group["params"] if id(p) not in members]
                settings = {key: value for key, value in group.items() if key not in ("params", "initial_lr")}
                optimizer.add_param_group({**settings, "params": moved, "lr": rate})
