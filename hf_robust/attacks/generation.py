"""Greedy decoding under an attack."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from hf_robust.attacks.prompts import max_positions, pad_id, takes
from hf_robust.sites import EmbeddingSite


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """
    Evaluation mode inside, every module's mode put back on exit. For forwards without gradient: activation
    checkpointing, which is of no use there, would switch the key-value cache off.
    """
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def stop_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """Ids that end an answer: those of the model's generation config and the tokenizer's eos."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [found] if isinstance(found, int) else list(found or [])
    return sorted({*ids, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])})


@torch.no_grad()
def greedy(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    deltas: Sequence[tuple[int, torch.Tensor]] | None = None,
) -> list[str]:
    """
    Greedy completions, with the key-value cache and left padding. No random state is touched, and the model's
    generation config (penalties, sampling) has no say but for its eos ids.

    Args:
        model: causal language model or PEFT model, unwrapped.
        tokenizer: decodes the answers; special tokens are left out.
        prompts: token ids of each prompt.
        max_new_tokens: tokens to generate at most; fewer where the model takes no more positions.
        batch_size: prompts per forward.
        deltas: for each prompt the position where its perturbation begins and the perturbation of the input embeddings,
            `[tokens, hidden]`.
    """
    texts: list[str] = []
    with evaluating(model):
        for start in range(0, len(prompts), batch_size):
            chunk = slice(start, start + batch_size)
            ids = _greedy_batch(
                model, tokenizer, prompts[chunk], max_new_tokens, None if deltas is None else deltas[chunk]
            )
            texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts


def _greedy_batch(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    deltas: Sequence[tuple[int, torch.Tensor]] | None,
) -> list[list[int]]:
    site = EmbeddingSite(model)
    device = next(site.module.parameters()).device
    length = max(len(prompt) for prompt in prompts)
    limit = max_positions(model)
    count = max_new_tokens if limit is None else min(max_new_tokens, limit - length)
    answers: list[list[int]] = [[] for _ in prompts]
    if count <= 0:
        return answers
    padding = pad_id(model, tokenizer)
    ids = torch.tensor([[padding] * (length - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=device)
    kwargs: dict[str, Any] = {"use_cache": True}
    if takes(model, "logits_to_keep"):
        kwargs["logits_to_keep"] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0) if takes(model, "position_ids") else None
    with contextlib.ExitStack() as stack:
        if deltas is not None:
            full = torch.zeros(len(prompts), length, deltas[0][1].shape[-1], device=device)
            for row, (start, delta) in enumerate(deltas):
                begin = length - len(prompts[row]) + start
                full[row, begin : begin + delta.shape[0]] = delta.to(device)
            stack.enter_context(site.add(full))
        out = _forward(model, ids, mask, positions, kwargs)
    stops = set(stop_ids(model, tokenizer))
    done = [False] * len(prompts)
    for step in range(count):
        tokens = out.logits[:, -1].argmax(dim=-1)
        for row, token in enumerate(tokens.tolist()):
            if not done[row]:
                done[row] = token in stops
                if not done[row]:
                    answers[row].append(token)
        if all(done) or step == count - 1:
            break
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        positions = None if positions is None else positions[:, -1:] + 1
        kwargs["past_key_values"] = out.past_key_values
        out = _forward(model, tokens.to(device).unsqueeze(1), mask, positions, kwargs)
    return answers


def _forward(
    model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor | None, kwargs: dict[str, Any]
) -> Any:
    if positions is not None:
        kwargs = {**kwargs, "position_ids": positions}
    return model(input_ids=ids, attention_mask=mask, **kwargs)
