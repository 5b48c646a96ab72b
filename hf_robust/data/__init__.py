"""Text data: readers of public files, checks, and preference rows as tensors."""

from hf_robust.data.preferences import collate_preferences, tokenize_preferences, user_token_mask
from hf_robust.data.readers import (
    load_preferences,
    load_utility,
    read_advbench,
    read_harmbench,
    read_jailbreakbench,
    split_by_behavior,
)

__all__ = [
    "collate_preferences",
    "load_preferences",
    "load_utility",
    "read_advbench",
    "read_harmbench",
    "read_jailbreakbench",
    "split_by_behavior",
    "tokenize_preferences",
    "user_token_mask",
]
