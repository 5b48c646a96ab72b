"""A linear softmax classifier as a transformers model, and what no attack on it can beat: its exact robust accuracy."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class LinearImageConfig(PreTrainedConfig):
    """Configuration of `LinearForImageClassification`.

    Attributes:
        image_size: Height and width in pixels.
        num_channels: Channels of `pixel_values`.
    """

    model_type = "hf_robust_linear_image"

    image_size: int = 8
    num_channels: int = 3


class LinearForImageClassification(PreTrainedModel):
    """One linear layer on all pixels; starts from zeros. Importing this module registers it with the Auto classes."""

    config_class = LinearImageConfig
    main_input_name = "pixel_values"

    def __init__(self, config: LinearImageConfig) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(config.num_channels * config.image_size**2, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        """Logits [batch, num_labels] of `pixel_values` [batch, channels, height, width], with the loss if `labels`."""
        logits = self.classifier(pixel_values.flatten(1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


AutoConfig.register(LinearImageConfig.model_type, LinearImageConfig, exist_ok=True)
AutoModelForImageClassification.register(LinearImageConfig, LinearForImageClassification, exist_ok=True)


@torch.no_grad()
def exact_margins(
    model: LinearForImageClassification,
    raw: torch.Tensor,
    labels: torch.Tensor,
    epsilon: float,
    mean: torch.Tensor,
    std: torch.Tensor,
) -> torch.Tensor:
    """Each picture's smallest logit margin, true label against any other, over its L∞ ball cut by the pixel box.

    For the pair (y, j) the margin is linear in the pixels, so clip(x − ε·sign(w_y − w_j), 0, 1) is the minimum over ball and
    box, with w the weights in raw pixels; the smallest of the nine minima is the answer, exact up to float64 rounding. A
    picture stays rightly classified under every attack if and only if its margin is positive.

    Args:
        model: The linear classifier, on any device.
        raw: Pictures in [0, 1], [N, C, H, W].
        labels: int64 [N].
        epsilon: Radius in raw pixels.
        mean: The image processor's, [C].
        std: Likewise.

    Returns:
        float64 [N].
    """
    weight = model.classifier.weight.double().cpu()
    bias = model.classifier.bias.double().cpu()
    raw, labels = raw.double().cpu(), labels.cpu()
    mean, std = mean.double()[:, None, None], std.double()[:, None, None]
    smallest = torch.full((len(raw),), torch.inf, dtype=torch.float64)
    for other in range(len(bias)):
        # [N, C, H, W], in raw pixels: what one unit of a pixel changes the margin by
        slope = (weight[labels] - weight[other]).reshape(raw.shape) / std
        worst = (raw - epsilon * slope.sign()).clamp(0, 1)
        margin = ((worst - mean) * slope).sum((1, 2, 3)) + bias[labels] - bias[other]
        smallest = torch.where(labels.eq(other), smallest, torch.minimum(smallest, margin))
    return smallest
