"""Handwritten digits and a linear classifier fitted in closed form, with what no attack on it can beat."""

from types import SimpleNamespace

import torch
from torch import nn

MEAN, STD = [0.3, 0.5, 0.4], [0.25, 0.5, 0.2]


def processor(mean=MEAN, std=STD, **settings):
    """As much of an image processor as units need."""
    return SimpleNamespace(
        do_normalize=True, image_mean=mean, image_std=std, do_rescale=True, rescale_factor=1 / 255, **settings
    )


def digits():
    """scikit-learn's digits: `[1797, 1, 8, 8]` float32 in [0, 1] and `[1797]` int64."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.images / 16, dtype=torch.float32).unsqueeze(1), torch.tensor(found.target)


class Linear(nn.Module):
    """Logits of flattened images; for normalised images, mean and std of the processor are folded into the weights."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor):
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0])
        self.linear.weight.data, self.linear.bias.data = weight.clone(), bias.clone()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.linear(pixel_values.flatten(1))


def fitted(images: torch.Tensor, labels: torch.Tensor, classes: int = 10) -> Linear:
    """Ridge regression on one-hot labels."""
    flat = images.flatten(1).double()
    flat = torch.cat([flat, torch.ones(len(flat), 1).double()], dim=1)
    goal = nn.functional.one_hot(labels, classes).double() * 20 - 2
    solved = torch.linalg.solve(flat.T @ flat + 20 * torch.eye(flat.shape[1]).double(), flat.T @ goal)
    return Linear(solved[:-1].T.float().contiguous(), solved[-1].float())


def exact_margins(model: Linear, images: torch.Tensor, labels: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Smallest margin in the L-infinity ball and the box: for each pair of classes the worst corner, `[batch]` float64."""
    weight, bias = model.linear.weight.detach().double(), model.linear.bias.detach().double()
    flat = images.flatten(1).double()
    margins = []
    for other in range(len(weight)):
        slope = weight[labels] - weight[other]
        worst = (flat - epsilon * slope.sign()).clamp(0, 1)
        margin = (slope * worst).sum(1) + bias[labels] - bias[other]
        margins.append(torch.where(labels == other, torch.inf, margin))
    return torch.stack(margins).amin(0)


def tiny_cnn(
    channels: int = 3, classes: int = 5, seed: int = 0, batch_norm: bool = False, dropout: float = 0.0
) -> nn.Module:
    """A small convolutional net with random weights, float32, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1),
            nn.BatchNorm2d(8) if batch_norm else nn.Identity(),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(8 * 36, classes),
        ).eval()


def tiny_images(batch: int = 4, channels: int = 3, classes: int = 5, seed: int = 0):
    """`[batch, channels, 6, 6]` in [0, 1], zeros and ones among them, and labels."""
    generator = torch.Generator().manual_seed(seed)
    images = (torch.rand(batch, channels, 6, 6, generator=generator) * 1.2 - 0.1).clamp(0, 1)
    return images, torch.randint(0, classes, (batch,), generator=generator)
