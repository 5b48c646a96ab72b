"""Losses of robust fine-tuning of CLIP's image tower: FARE, TeCoA, PMG-AFT and Sim-CLIP; one value for each image."""

import torch
import torch.nn.functional as F

from hf_robust.objectives.language_modeling import kl_divergence

# Similarities are multiplied by this before the softmax: where CLIP's own temperature ended (arXiv 2103.00020)
LOGIT_SCALE = 100.0


def fare_loss(features: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """
    Squared L2 distance from the features of the frozen tower, summed over dimensions: "Robust CLIP: Unsupervised Adversarial
    Fine-Tuning of Vision Embeddings for Robust Large Vision-Language Models" (arXiv 2402.12336).

    Args:
        features: `[batch, width]` of the perturbed images, not normalised.
        reference: `[batch, width]` of the clean images in the frozen tower, not normalised.

    Returns:
        `[batch]` float32.
    """
    return (features.float() - reference.float()).square().sum(dim=-1)


def similarity_logits(features: torch.Tensor, class_features: torch.Tensor, scale: float = LOGIT_SCALE) -> torch.Tensor:
    """
    Zero-shot logits: cosine similarity of images and classes, times a scale.

    Args:
        features: `[batch, width]` of images.
        class_features: `[classes, width]` of the classes' texts.
        scale: inverse temperature.

    Returns:
        `[batch, classes]` float32.
    """
    return scale * F.normalize(features.float(), dim=-1) @ F.normalize(class_features.float(), dim=-1).T


def tecoa_loss(
    features: torch.Tensor, class_features: torch.Tensor, labels: torch.Tensor, scale: float = LOGIT_SCALE
) -> torch.Tensor:
    """
    Cross-entropy over the similarities with the classes' texts: "Understanding Zero-Shot Adversarial Robustness for
    Large-Scale Models" (arXiv 2212.07016).

    Args:
        features: `[batch, width]` of the perturbed images.
        class_features: `[classes, width]` of the classes' texts.
        labels: `[batch]` int64.
        scale: inverse temperature.

    Returns:
        `[batch]` float32, nats.
    """
    return F.cross_entropy(similarity_logits(features, class_features, scale), labels, reduction="none")


def pmg_aft_loss(
    adversarial: torch.Tensor,
    clean: torch.Tensor,
    frozen: torch.Tensor,
    labels: torch.Tensor,
    *,
    generalization_weight: float = 1.0,
    clean_weight: float = 1.0,
) -> torch.Tensor:
    """
    Cross-entropy under attack, held near the frozen model under the same attack and near the model's own clean answer:
    "Pre-trained Model Guided Fine-Tuning for Zero-Shot Adversarial Robustness" (arXiv 2401.04350).

    `CE(adversarial) + a * KL(adversarial ‖ frozen) + b * KL(adversarial ‖ clean)`

    Args:
        adversarial: `[batch, classes]` logits of the perturbed images.
        clean: `[batch, classes]` logits of the clean images; the gradient flows here too.
        frozen: `[batch, classes]` logits of the perturbed images in the frozen tower.
        labels: `[batch]` int64.
        generalization_weight: a.
        clean_weight: b.

    Returns:
        `[batch]` float32, nats.
    """
    loss = F.cross_entropy(adversarial.float(), labels, reduction="none")
    loss = loss + generalization_weight * kl_divergence(frozen, adversarial)
    return loss + clean_weight * kl_divergence(clean, adversarial)


def sim_clip_loss(adversarial: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """
    Symmetric negative cosine similarity with a stop-gradient on one side of each half: "Sim-CLIP: Unsupervised Siamese
    Adversarial Fine-Tuning for Robust and Semantically-Rich Vision-Language Models" (arXiv 2407.14971).

    Args:
        adversarial: `[batch, width]` features of the perturbed images.
        clean: `[batch, width]` features of the clean images in the same tower.

    Returns:
        `[batch]` float32, between -1 and 1.
    """
    adversarial, clean = adversarial.float(), clean.float()
    one = F.cosine_similarity(adversarial, clean.detach(), dim=-1)
    other = F.cosine_similarity(clean, adversarial.detach(), dim=-1)
    return -(one + other) / 2
