"""Adapters and state snapshots shared by the tests of sites and attacks."""

from typing import Any

import torch
from torch import nn

from hf_robust.sites import LabelIndex

HOOK_TABLES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def with_lora(model: nn.Module, *, seed: int = 0, name: str = "default", **config: Any) -> nn.Module:
    """A PEFT model whose LoRA does something from the start (B is random, not zero), in training mode."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM", **config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, LoraConfig(**settings), adapter_name=name).train()


def hook_count(model: nn.Module) -> int:
    """Hooks of every kind on every module."""
    return sum(len(getattr(module, table)) for module in model.modules() for table in HOOK_TABLES)


def modes_of(model: nn.Module) -> list[dict[str, Any]]:
    """Mode and every number or flag (dropout rates among them) of each module, in order."""
    return [
        {key: value for key, value in vars(module).items() if isinstance(value, bool | int | float)}
        for module in model.modules()
    ]


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that an attack must leave as it was."""
    return {
        "random": torch.get_rng_state().tolist(),
        "modes": modes_of(model),
        "hooks": hook_count(model),
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "grads": {name: None if p.grad is None else p.grad.tolist() for name, p in model.named_parameters()},
        "weights": {name: value.tolist() for name, value in model.state_dict().items()},
    }


def picked(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The rows of full logits that predict a label, found position by position."""
    batch, length = labels.shape
    found = [logits[b, t - 1] for b in range(batch) for t in range(1, length) if labels[b, t] != -100]
    return torch.stack(found).float()


def row_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Token-mean cross-entropy of each row from full logits, by the definition."""
    log_probs = logits.float().log_softmax(-1)
    rows = []
    for b in range(labels.shape[0]):
        positions = [t for t in range(1, labels.shape[1]) if labels[b, t] != -100]
        rows.append(torch.stack([-log_probs[b, t - 1, labels[b, t]] for t in positions]).mean())
    return torch.stack(rows)


def forward_at(model: nn.Module, batch: dict[str, torch.Tensor], delta: torch.Tensor) -> torch.Tensor:
    """Full logits through `inputs_embeds`, without any hook."""
    embeds = model.get_input_embeddings()(batch["input_ids"])
    inputs = {"inputs_embeds": embeds + delta.to(embeds.dtype), "attention_mask": batch["attention_mask"]}
    return model(**inputs, use_cache=False).logits


def index_of(batch: dict[str, torch.Tensor]) -> LabelIndex:
    return LabelIndex.from_labels(batch["labels"])


def inputs_of(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
