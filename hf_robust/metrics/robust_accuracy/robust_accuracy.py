"""Share of inputs classified rightly whatever the attack."""

from typing import Any

import datasets
import evaluate

from hf_robust.metrics.arithmetic import correct_under_all
from hf_robust.metrics.class_accuracy import class_accuracies
from hf_robust.metrics.proportions import share_of

_DESCRIPTION = """\
Share of inputs whose label is right under attack, with its Wilson interval; of several attacks the worst counts, input by
input. Higher is better.
"""
_INPUTS = """
Args:
    predictions: of each input the label predicted under attack, or a list of one label per attack.
    references: the true labels.
    categories: of `compute` only: name of each row's category, in the order of the rows added, for a share of each.
    per_class: of `compute` only: whether to tell the accuracy of each label, the worst one and the disparity. Default: False.
    confidence: of `compute` only: of the Wilson intervals, 0.90, 0.95 (default) or 0.99.

Returns:
    robust_accuracy: share in [0, 1]; None if no row was judged.
    low, high: ends of its Wilson interval; None likewise.
    count: rows judged.
    missing: rows not judged, in no share.
    categories: with `categories`, the same (share as `value`) for each category by name.
    classes: with `per_class`, the same for each label.
    worst_class: with `per_class`, the label of the lowest share.
    disparity: with `per_class`, the highest share minus the lowest.
"""


class RobustAccuracy(evaluate.Metric):
    """Share of inputs that stay rightly classified under every attack. Higher is better."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=[
                datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
                datasets.Features(
                    {"predictions": datasets.List(datasets.Value("int64")), "references": datasets.Value("int64")}
                ),
            ],
        )

    def _compute(
        self,
        predictions: list[int | list[int]],
        references: list[int],
        categories: list[str] | None = None,
        per_class: bool = False,
        confidence: float = 0.95,
    ) -> dict[str, Any]:
        right = correct_under_all(predictions, references)
        share = share_of(right, categories=categories, confidence=confidence)
        by_class = class_accuracies(right, references, confidence=confidence) if per_class else {}
        return {"robust_accuracy": share.pop("value"), **share, **by_class}
