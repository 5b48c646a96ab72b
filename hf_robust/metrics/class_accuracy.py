"""Accuracy of each class, and how far the classes lie apart."""

from collections.abc import Sequence
from typing import Any

from hf_robust.metrics.proportions import share_of


def class_accuracies(
    right: Sequence[float | None], labels: Sequence[int | str], *, confidence: float = 0.95
) -> dict[str, Any]:
    """
    Accuracy of each class with its interval, the worst class, and the disparity: accuracy of the best class minus that of the
    worst. Adversarially trained classifiers are much less even than their mean tells (Xu et al. 2021, arXiv 2010.06121).

    Args:
        right: whether each row was classified rightly; `None` for a row that was not judged, which belongs to no class.
        labels: true class of each row.
        confidence: of the Wilson intervals: 0.90, 0.95 or 0.99.

    Returns:
        `classes` (by label, in the labels' order: see [`~hf_robust.metrics.share_of`]), `worst_class` (of equally bad ones the
        first in that order) and `disparity` in [0, 1]; both are `None` where no row was judged.

    Raises:
        ValueError: no rows, other numbers of labels than of rows, or an unknown `confidence`.
    """
    if len(labels) != len(right) or not len(right):
        raise ValueError(f"`labels` has {len(labels)} entries for {len(right)} rows; give one each, at least one.")
    classes = {
        label: share_of(
            [value for value, own in zip(right, labels, strict=True) if own == label], confidence=confidence
        )
        for label in sorted(set(labels))
    }
    values = {label: share["value"] for label, share in classes.items() if share["value"] is not None}
    return {
        "classes": classes,
        "worst_class": min(values, key=lambda label: values[label], default=None),
        "disparity": max(values.values()) - min(values.values()) if values else None,
    }
