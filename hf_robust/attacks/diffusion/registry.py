"""Attacks on diffusion models by name, for command lines, configuration files and reports that are run again."""

from typing import Any

from hf_robust.attacks.diffusion.base import NoAttack
from hf_robust.attacks.diffusion.concept_inversion import ConceptInversion
from hf_robust.attacks.diffusion.discrete import P4D, RandomPrefix, UnlearnDiffAtk
from hf_robust.attacks.diffusion.embeddings import EmptyPrompt, PromptEmbeddingPGD
from hf_robust.attacks.registry import build_from, settings_of

DIFFUSION_ATTACKS: dict[str, type] = {
    "no_attack": NoAttack,
    "random_prefix": RandomPrefix,
    "unlearn_diff_atk": UnlearnDiffAtk,
    "p4d": P4D,
    "prompt_embedding_pgd": PromptEmbeddingPGD,
    "concept_inversion": ConceptInversion,
    "empty_prompt": EmptyPrompt,
}


def diffusion_attack_settings(name: str) -> dict[str, Any]:
    """
    Settings of an attack on diffusion models and their defaults.

    Args:
        name: a key of [`DIFFUSION_ATTACKS`].

    Returns:
        Default of each setting.

    Raises:
        ValueError: the name is unknown; the message has the nearest.
    """
    return settings_of(DIFFUSION_ATTACKS, name)


def build_diffusion_attack(name: str, **settings: Any) -> Any:
    """
    An attack on diffusion models from its name.

    Args:
        name: a key of [`DIFFUSION_ATTACKS`].
        settings: keyword arguments of its class; those left out keep their defaults. `budget` may also be a mapping, such as
            `{"forwards": 1000}`.

    Raises:
        ValueError: the name or a setting is unknown, or has a value that the attack does not take.

    Example:

    ```python
    >>> build_diffusion_attack("unlearn_diff_atk", num_tokens=3)
    ```
    """
    return build_from(DIFFUSION_ATTACKS, name, settings)
