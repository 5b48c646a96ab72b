"""The digits testbed's pictures: scikit-learn's handwritten digits, split by seed, and the processor that normalises them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as pillow

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""The labels' names in order."""
SIZE = 8
"""Height and width of the pictures in pixels."""
MEAN, STD = (0.35, 0.3, 0.25), (0.4, 0.36, 0.32)
"""The processor's, per channel: different ones, so that whoever confuses raw and normalised units is found out."""
SPLITS = ("train", "eval")


@dataclass(frozen=True)
class Digits:
    """Pictures of one split.

    Attributes:
        pixels: uint8 [N, 8, 8, 3]; the three channels are alike, ink is 255.
        labels: int64 [N].
    """

    pixels: np.ndarray
    labels: np.ndarray

    def dataset(self) -> Dataset:
        """Rows with `image` (RGB) and `labels` (named by `NAMES`)."""
        features = Features({"image": Image(), "labels": ClassLabel(names=list(NAMES))})
        images = [pillow.fromarray(picture) for picture in self.pixels]
        return Dataset.from_dict({"image": images, "labels": self.labels.tolist()}, features=features)

    def raw(self) -> torch.Tensor:
        """The pictures in [0, 1], float64 [N, 3, 8, 8]."""
        return torch.from_numpy(self.pixels).permute(0, 3, 1, 2).double() / 255

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the image processor makes of them: `pixel_values` float32 [N, 3, 8, 8], and `labels` int64 [N]."""
        mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
        return {
            "pixel_values": ((self.raw() - mean) / std).float(),
            "labels": torch.from_numpy(self.labels),
        }


def load_digits(seed: int, eval_share: float = 0.25) -> dict[str, Digits]:
    """All 1797 pictures in two splits, every digit with the same share in both.

    Args:
        seed: Chooses who is in which split, and the order.
        eval_share: Share of each digit's pictures that no training sees.

    Raises:
        ImportError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits as read
    except ImportError as error:
        raise ImportError(
            'the digits testbeds take their pictures from scikit-learn: pip install "hf_robust[testbeds]"'
        ) from error
    found: Any = read()
    # 0 … 16 grey levels, of which 16 is full ink
    grey = np.rint(found.images * (255 / 16)).astype(np.uint8)
    labels = found.target.astype(np.int64)
    rng = np.random.default_rng([seed, 0])
    chosen: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for label in range(len(NAMES)):
        rows = rng.permutation(np.flatnonzero(labels == label))
        held_out = round(eval_share * len(rows))
        chosen["eval"].append(rows[:held_out])
        chosen["train"].append(rows[held_out:])
    splits = {}
    for split, parts in chosen.items():
        rows = rng.permutation(np.concatenate(parts))
        splits[split] = Digits(np.repeat(grey[rows][..., None], 3, axis=-1), labels[rows])
    return splits


def build_image_processor() -> Any:
    """A ViT image processor for the pictures' size with `MEAN` and `STD`."""
    # Not ViTImageProcessor, which warns where torchvision is missing; what is saved is the same.
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}, image_mean=list(MEAN), image_std=list(STD))
