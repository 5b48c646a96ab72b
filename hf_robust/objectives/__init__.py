"""Pure loss functions: tensors in, tensor out; no model, no hook."""

from hf_robust.objectives.adversarial import away_loss, leaky_cutoff, toward_loss, zero_confident_tokens
from hf_robust.objectives.diffusion import erasure_target, erasure_with_retention, per_image_mse
from hf_robust.objectives.language_modeling import kl_divergence, per_row_mean, relative_shift, token_nll
from hf_robust.objectives.noise import (
    LOSS_MODES,
    NoiseLossWeights,
    consistency_kl,
    noise_loss_weights,
    noisefit_loss,
    r_drop_loss,
    symmetric_kl,
    teacher_kl,
)

__all__ = [
    "LOSS_MODES",
    "NoiseLossWeights",
    "away_loss",
    "consistency_kl",
    "erasure_target",
    "erasure_with_retention",
    "kl_divergence",
    "leaky_cutoff",
    "noise_loss_weights",
    "noisefit_loss",
    "per_image_mse",
    "per_row_mean",
    "r_drop_loss",
    "relative_shift",
    "symmetric_kl",
    "teacher_kl",
    "token_nll",
    "toward_loss",
    "zero_confident_tokens",
]
