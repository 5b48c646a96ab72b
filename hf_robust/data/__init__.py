"""Text data: readers of public files, checks, and preference rows as tensors."""

from hf_robust.data.behavior import Behavior
from hf_robust.data.behaviors_file import behaviors_digest, read_behaviors, write_behaviors
from hf_robust.data.factual_qa import read_factual_qa
from hf_robust.data.preferences import collate_preferences, tokenize_preferences
from hf_robust.data.random_suffixes import with_random_suffixes
from hf_robust.data.readers import (
    load_preferences,
    load_utility,
    read_advbench,
    read_harmbench,
    read_jailbreakbench,
    split_by_behavior,
)
from hf_robust.data.retain_prompts import load_retain_prompts, object_names
from hf_robust.data.unlearning import forget_retain_overlap, load_unlearning, read_muse, read_tofu, read_wmdp
from hf_robust.data.user_tokens import suffix_token_mask, user_token_mask
from hf_robust.data.xstest import read_xstest

__all__ = [
    "Behavior",
    "behaviors_digest",
    "collate_preferences",
    "forget_retain_overlap",
    "load_preferences",
    "load_retain_prompts",
    "load_unlearning",
    "load_utility",
    "object_names",
    "read_advbench",
    "read_behaviors",
    "read_factual_qa",
    "read_harmbench",
    "read_jailbreakbench",
    "read_muse",
    "read_tofu",
    "read_wmdp",
    "read_xstest",
    "split_by_behavior",
    "suffix_token_mask",
    "tokenize_preferences",
    "user_token_mask",
    "with_random_suffixes",
    "write_behaviors",
]
