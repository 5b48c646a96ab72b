"""Batches of images, with or without labels, for CLIP's image tower; checks before training."""

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from datasets import ClassLabel, Dataset, IterableDataset

from hf_robust.trainers.labels import first_wrong_label

IMAGE_COLUMNS = ("pixel_values", "image")
LABEL_COLUMNS = ("labels", "label")


class ImageCollator:
    """
    Make a batch of rows: images through the image processor (`image`), or as they are (`pixel_values`); `labels` or `label`
    where there are some.

    Args:
        image_processor: turns images into `pixel_values`; `None` for rows that hold those.
    """

    def __init__(self, image_processor: Any = None):
        self.image_processor = image_processor

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            rows: of the dataset.

        Returns:
            `pixel_values` `[batch, 3, height, width]` float32 and, if the rows have them, `labels` `[batch]` int64.
        """
        if "pixel_values" in rows[0]:
            pixel_values = torch.stack([torch.as_tensor(row["pixel_values"]) for row in rows]).float()
        else:
            images = [row["image"] for row in rows]
            pixel_values = self.image_processor(images=images, return_tensors="pt")["pixel_values"]
        batch = {"pixel_values": pixel_values}
        column = next((name for name in LABEL_COLUMNS if name in rows[0]), None)
        if column is not None:
            batch["labels"] = torch.tensor([int(row[column]) for row in rows])
        return batch


def class_names_of(dataset: Any) -> list[str] | None:
    """Names of the classes in a dataset's label column, if it has some."""
    features = getattr(dataset, "features", None) or {}
    for column in LABEL_COLUMNS:
        if isinstance(features.get(column), ClassLabel):
            return list(features[column].names)
    return None


def check_image_rows(dataset: Any, name: str, *, needs_labels: bool, processor: Any, classes: int | None) -> None:
    """
    Refuse rows that cannot be trained on.

    Args:
        dataset: what the user gave.
        name: name of the argument.
        needs_labels: whether the loss needs them.
        processor: the image processor, or `None`.
        classes: number of classes, if known.

    Raises:
        TypeError: neither map-style nor streaming dataset.
        ValueError: no rows, no images, no labels, labels out of range, or images without a processor.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(f"`{name}` must be a `Dataset` or `IterableDataset` of images, not `{type(dataset).__name__}`.")
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"`{name}` has 0 rows: give rows with `image` or `pixel_values`.")
    if not any(column in first for column in IMAGE_COLUMNS):
        raise ValueError(
            f"`{name}` has the columns {list(first)}, none of which holds images: name the column `image` or `pixel_values`."
        )
    if "pixel_values" not in first and processor is None:
        raise ValueError(
            f"`processing_class` is missing: `{name}` holds images, which it turns into `pixel_values`. Pass the CLIP's "
            "processor or image processor."
        )
    column = next((label for label in LABEL_COLUMNS if label in first), None)
    if column is None:
        if needs_labels:
            raise ValueError(
                f"`{name}` has the columns {list(first)} and no labels, which this `loss_type` needs: add a column `labels`, "
                "or use `loss_type='fare'`."
            )
        return
    if not isinstance(dataset, Dataset):
        return
    wrong = first_wrong_label(dataset, column, _is_class)
    if wrong is not None:
        raise ValueError(
            f"`{name}` has the label {wrong[1]!r:.100} in row {wrong[0]} of `{column}`: give the number of a class, or leave "
            "the column out where the loss needs none."
        )
    if classes is not None:
        wrong = first_wrong_label(dataset, column, lambda label: 0 <= int(label) < classes)
        if wrong is not None:
            raise ValueError(
                f"`{name}` has the label {wrong[1]} in row {wrong[0]}, but there are {classes} `class_names`: labels go from 0 "
                f"to {classes - 1}."
            )


def _is_class(label: object) -> bool:
    """Whether a label is a whole number of 64 bits; tensors of one number are."""
    number: Any = label.item() if isinstance(label, torch.Tensor) and label.numel() == 1 else label
    is_real = isinstance(number, numbers.Real)
    return is_real and bool(abs(number) < 2**63) and int(number) == number
