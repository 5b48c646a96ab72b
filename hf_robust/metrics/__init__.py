"""Arithmetic of figures: pure functions over counts and verdicts."""

from hf_robust.metrics.proportions import wilson_interval

__all__ = ["wilson_interval"]
