"""Trainers: one for each family of methods, importable from `hf_robust` and `hf_robust.trainers`."""

from hf_robust.trainers.capo import CAPOConfig, CAPOTrainer
from hf_robust.trainers.cat import CATTrainer
from hf_robust.trainers.cat_config import CATConfig

__all__ = ["CAPOConfig", "CAPOTrainer", "CATConfig", "CATTrainer"]
