"""Attacks on erased diffusion models: can what was unlearned be drawn again?"""

from hf_robust.attacks.diffusion.base import DiffusionAttack, NoAttack
from hf_robust.attacks.diffusion.concept_embedding import ConceptEmbeddingAttack
from hf_robust.attacks.diffusion.concept_inversion import ConceptInversion
from hf_robust.attacks.diffusion.discrete import P4D, RandomPrefix, UnlearnDiffAtk
from hf_robust.attacks.diffusion.embeddings import EmptyPrompt, PromptEmbeddingPGD
from hf_robust.attacks.diffusion.registry import (
    DIFFUSION_ATTACKS,
    build_diffusion_attack,
    diffusion_attack_settings,
)
from hf_robust.attacks.diffusion.results import DiffusionAttackResult

__all__ = [
    "DIFFUSION_ATTACKS",
    "P4D",
    "ConceptEmbeddingAttack",
    "ConceptInversion",
    "DiffusionAttack",
    "DiffusionAttackResult",
    "EmptyPrompt",
    "NoAttack",
    "PromptEmbeddingPGD",
    "RandomPrefix",
    "UnlearnDiffAtk",
    "build_diffusion_attack",
    "diffusion_attack_settings",
]
