"""Ten classes of tiny images, a classifier whose robustness is known exactly, and models that mask their gradients."""

import torch
from torch import nn

CLASSES = 10
SHAPE = (3, 4, 4)


def prototypes():
    """`[10, 3, 4, 4]` in {0.25, 0.75}."""
    generator = torch.Generator().manual_seed(0)
    return 0.25 + 0.5 * torch.randint(0, 2, (CLASSES, *SHAPE), generator=generator).float()


def images(count=40, seed=1):
    """`[count, 3, 4, 4]` raw pixels between the prototypes of their classes and others, more or less far, and the classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    others = (labels + torch.randint(1, CLASSES, (count,), generator=generator)) % CLASSES
    share = 0.45 * torch.rand(count, 1, 1, 1, generator=generator)
    centres = prototypes()
    pixels = (1 - share) * centres[labels] + share * centres[others]
    return (pixels + 0.02 * torch.randn(count, *SHAPE, generator=generator)).clamp(0, 1), labels


def rows(count=40):
    """The same as rows of a dataset."""
    pixels, labels = images(count)
    return [{"pixel_values": x, "labels": int(y)} for x, y in zip(pixels, labels, strict=True)]


class Nearest(nn.Module):
    """Linear: the class of the nearest prototype wins. Weights `[10, 48]`."""

    def __init__(self, scale=1.0):
        super().__init__()
        centres = prototypes().flatten(1)
        self.layer = nn.Linear(centres.shape[1], CLASSES)
        with torch.no_grad():
            self.layer.weight.copy_(centres)
            self.layer.bias.copy_(-centres.pow(2).sum(dim=1) / 2)
        self.scale = scale
        self.config = None

    def forward(self, pixel_values):
        return self.scale * self.layer(pixel_values.flatten(1))


class Saturated(Nearest):
    """Logits × 1e4: the softmax is 0 or 1 in float32, and its gradient exactly 0."""

    def __init__(self):
        super().__init__(scale=1e4)


class Quantised(Nearest):
    """The input is rounded to 16 levels, which has no gradient."""

    def forward(self, pixel_values):
        return super().forward((pixel_values * 15).round() / 15)


class Random(Nearest):
    """Noise is drawn at every forward."""

    def forward(self, pixel_values):
        return super().forward(pixel_values + 0.3 * torch.randn_like(pixel_values))


class NotFinite(Nearest):
    """NaN wherever a pixel is far from where images are."""

    def forward(self, pixel_values):
        logits = super().forward(pixel_values)
        return torch.where(logits.argmax(dim=1, keepdim=True) == 0, torch.full_like(logits, torch.nan), logits)


def exact_robust(model, pixels, labels, epsilon):
    """`[N]` bool: whether no point within ε in L∞ and in [0, 1] makes another class at least as high."""
    weight, bias = model.layer.weight.detach(), model.layer.bias.detach()
    robust = torch.ones(len(pixels), dtype=torch.bool)
    for place, (image, label) in enumerate(zip(pixels.flatten(1), labels.tolist(), strict=True)):
        for other in range(CLASSES):
            if other != label:
                difference = weight[label] - weight[other]
                worst = (image - epsilon * difference.sign()).clamp(0, 1)
                robust[place] &= bool(worst @ difference + bias[label] - bias[other] > 0)
    return robust


class Processor:
    """What an image processor tells of its scale."""

    do_normalize = do_rescale = True
    rescale_factor = 1 / 255
    image_mean = [0.5, 0.4, 0.3]
    image_std = [0.25, 0.2, 0.5]


class Normalised(Nearest):
    """The same classifier behind a normalisation."""

    def forward(self, pixel_values):
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (Processor.image_mean, Processor.image_std))
        return super().forward(pixel_values * std + mean)
