"""Tiny models from configs, for tests: nothing is downloaded."""

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

_COMMON = dict(
    vocab_size=61,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=1,
    bos_token_id=2,
    eos_token_id=3,
)


def _config(name: str, **overrides):
    common = {**_COMMON, **overrides}
    if name == "llama":
        return LlamaForCausalLM, LlamaConfig(**common)
    if name == "qwen3":
        return Qwen3ForCausalLM, Qwen3Config(**common, head_dim=4)
    if name == "gemma3":
        return Gemma3ForCausalLM, Gemma3TextConfig(**common, head_dim=4, query_pre_attn_scalar=4)
    if name == "mistral":
        return MistralForCausalLM, MistralConfig(**common)
    if name == "phi3":
        return Phi3ForCausalLM, Phi3Config(**common)
    if name == "gpt2":
        dropout = overrides.get("attention_dropout", 0.0)
        return GPT2LMHeadModel, GPT2Config(
            vocab_size=61, n_embd=16, n_layer=2, n_head=4, n_positions=64, pad_token_id=1, bos_token_id=2, eos_token_id=3,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
        )  # fmt: skip
    if name == "opt":
        dropout = overrides.get("attention_dropout", 0.0)
        return OPTForCausalLM, OPTConfig(
            vocab_size=61, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=16, pad_token_id=1, bos_token_id=2, eos_token_id=3,
            dropout=dropout, attention_dropout=dropout, layerdrop=dropout,
        )  # fmt: skip
    raise ValueError(name)


ARCHITECTURES = ("llama", "qwen3", "gemma3", "mistral", "phi3", "gpt2", "opt")


def tiny_model(name: str = "llama", seed: int = 0, **overrides):
    """A 2-layer model of width 16 with random weights, float32, in training mode. `overrides` go to the config."""
    cls, config = _config(name, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(config).train()


def tiny_batch(batch: int = 3, length: int = 10, prompt: int = 5, side: str = "right", seed: int = 0):
    """input_ids, attention_mask, labels with rows of different lengths, padded on `side`; token id 0 is a label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 61, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    labels = torch.full_like(ids, -100)
    for row in range(batch):
        pad = row % 3
        if side == "right":
            mask[row, length - pad :] = 0
            labels[row, prompt : length - pad] = ids[row, prompt : length - pad]
        else:
            mask[row, :pad] = 0
            labels[row, prompt:] = ids[row, prompt:]
    ids[:, prompt] = 0
    labels[:, prompt] = 0
    ids = torch.where(mask.bool(), ids, torch.ones_like(ids))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
