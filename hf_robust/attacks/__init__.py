"""Searches for a perturbation; the same call in training and in evaluation."""

from hf_robust.attacks.embedding import EmbeddingAttack
from hf_robust.attacks.gcg import GCG
from hf_robust.attacks.gradient import SearchResult, gradient_search
from hf_robust.attacks.results import AttackResult
from hf_robust.attacks.suffix import EmbeddingSuffixAttack

__all__ = ["GCG", "AttackResult", "EmbeddingAttack", "EmbeddingSuffixAttack", "SearchResult", "gradient_search"]
