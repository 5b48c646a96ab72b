"""Pure loss functions: tensors in, tensor out; no model, no hook."""

from hf_robust.objectives.adversarial import away_loss, leaky_cutoff, toward_loss, zero_confident_tokens
from hf_robust.objectives.adversarial_training import (
    grad_align_penalty,
    kl_dro_weights,
    mart_loss,
    smoothed_cross_entropy,
    trades_loss,
    vat_kl,
    weat_weights,
)
from hf_robust.objectives.clip import fare_loss, pmg_aft_loss, sim_clip_loss, similarity_logits, tecoa_loss
from hf_robust.objectives.diffusion import erasure_target, erasure_with_retention, per_image_mse
from hf_robust.objectives.language_modeling import kl_divergence, per_row_mean, relative_shift, token_nll
from hf_robust.objectives.noise import (
    LOSS_MODES,
    NoiseLossWeights,
    branch_divergences,
    consistency_kl,
    noise_loss_weights,
    noisefit_loss,
    r_drop_loss,
    symmetric_kl,
    teacher_kl,
)

__all__ = [
    "branch_divergences",
    "LOSS_MODES",
    "NoiseLossWeights",
    "away_loss",
    "consistency_kl",
    "erasure_target",
    "erasure_with_retention",
    "fare_loss",
    "grad_align_penalty",
    "kl_divergence",
    "kl_dro_weights",
    "leaky_cutoff",
    "mart_loss",
    "noise_loss_weights",
    "noisefit_loss",
    "per_image_mse",
    "per_row_mean",
    "pmg_aft_loss",
    "r_drop_loss",
    "relative_shift",
    "sim_clip_loss",
    "similarity_logits",
    "smoothed_cross_entropy",
    "symmetric_kl",
    "teacher_kl",
    "tecoa_loss",
    "token_nll",
    "toward_loss",
    "trades_loss",
    "vat_kl",
    "weat_weights",
    "zero_confident_tokens",
]
