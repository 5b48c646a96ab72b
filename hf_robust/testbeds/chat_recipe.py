"""The CAT recipe that suits the chat testbed, found by the sweep in examples/frontier.py."""

from typing import Any

from datasets import Dataset
from peft import LoraConfig

from hf_robust.data import with_random_suffixes
from hf_robust.testbeds.chat import ChatTestbed
from hf_robust.trainers import CATConfig

# The shares of the adversarial and of the utility prompts that random words follow
SUFFIX_SHARE, UTILITY_SUFFIX_SHARE = 0.5, 0.5


def robust_config(output_dir: str, **overrides: Any) -> CATConfig:
    """
    Configuration of the quickstart's training.

    Args:
        output_dir: where checkpoints would go (none are saved by default).
        overrides: fields to set otherwise.
    """
    fields: dict[str, Any] = {
        "per_device_train_batch_size": 28,
        "adversarial_fraction": 0.25,
        "attack_epsilon": 0.1,
        "attack_suffix_epsilon": 1.0,
        "attack_steps": 5,
        "toward_weight": 1.0,
        "toward_cutoff": 0.05,
        "away_cutoff": -10.0,
        "utility_kl_weight": 4.0,
        "utility_representation_weight": 5.0,
        "max_steps": 300,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 10,
        "weight_decay": 0.0,
        "pad_to_multiple_of": None,
        "gradient_checkpointing": False,
        "bf16": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 25,
        "use_cpu": True,
    }
    return CATConfig(output_dir=output_dir, **{**fields, **overrides})


def robust_lora(**overrides: Any) -> LoraConfig:
    """
    Adapter of the quickstart's training.

    Args:
        overrides: fields to set otherwise.
    """
    fields: dict[str, Any] = {"r": 128, "lora_alpha": 128, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**fields, **overrides})


def adversarial_rows(testbed: ChatTestbed, *, steps: bool = True, suffix_share: float = SUFFIX_SHARE) -> Dataset:
    """
    The quickstart's adversarial rows.

    Args:
        testbed: where they come from.
        steps: whether the rejected answers of the training pairs go on with the harmful steps, as a full harmful answer
            would. Pushing away from a refusable beginning alone leaves what follows it within an attack's reach.
        suffix_share: share of the prompts that random words follow. The ball is then searched around prompts that look
            like those of a suffix attack too.
    """
    rows = testbed.adversarial_dataset(include_steps=steps)
    return with_random_suffixes(rows, testbed.tokenizer, share=suffix_share, seed=testbed.recipe.seed)


def utility_rows(testbed: ChatTestbed, *, suffix_share: float = UTILITY_SUFFIX_SHARE) -> Dataset:
    """
    The quickstart's utility rows.

    Args:
        testbed: where they come from.
        suffix_share: share of the prompts that random words follow, as among the adversarial rows: otherwise the words
            alone would tell what is to be refused.
    """
    rows = testbed.utility_dataset()
    return with_random_suffixes(rows, testbed.tokenizer, share=suffix_share, min_tokens=1, seed=testbed.recipe.seed + 1)
