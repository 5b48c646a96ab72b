"""The CAT recipe that suits the chat testbed, found by the sweep in examples/frontier.py."""

from typing import Any

from datasets import Dataset
from peft import LoraConfig

from hf_robust.testbeds.chat import ChatTestbed
from hf_robust.trainers import CATConfig


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
        "attack_steps": 5,
        "toward_cutoff": 0.05,
        "away_cutoff": -12.0,
        "utility_kl_weight": 8.0,
        "max_steps": 300,
        "learning_rate": 1e-3,
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
    fields: dict[str, Any] = {"r": 32, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**fields, **overrides})


def adversarial_rows(testbed: ChatTestbed, *, steps: bool = True) -> Dataset:
    """
    The quickstart's adversarial rows.

    Args:
        testbed: where they come from.
        steps: whether the rejected answers of the training pairs go on with the harmful steps, as a full harmful answer
            would. Pushing away from a refusable beginning alone leaves what follows it within an attack's reach.
    """
    return testbed.adversarial_dataset(include_steps=steps)
