"""From records of images to figures: pure functions over rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_robust.data.behavior import Behavior
from hf_robust.metrics.class_accuracy import class_accuracies
from hf_robust.metrics.proportions import broken_by_any
from hf_robust.report.evaluation_figures import problem, share
from hf_robust.report.evaluation_records import Row
from hf_robust.report.report import Measurement
from hf_robust.report.vision_attacks import radius_text

# More classes than this have no line of their own
SHOWN_CLASSES = 20


def accuracies(subject: str, rows: Sequence[Row]) -> list[Measurement]:
    """
    `accuracy`: share of images that are right without attack.

    Args:
        subject: what the report calls the model.
        rows: one for each image.
    """
    return share(subject, "accuracy", "all", "none", _right(rows))


def robust_accuracies(
    subject: str, rows_by_attack: Mapping[str, Sequence[Row]], split: str = "all"
) -> list[Measurement]:
    """
    `robust_accuracy` of each attack: share of images that are right without it and with it. Images on which it failed to run
    count in no share.

    Args:
        subject: what the report calls the model.
        rows_by_attack: a row for each image, by attack.
        split: what the report calls the images.
    """
    return [
        measured
        for name, rows in rows_by_attack.items()
        for measured in share(subject, "robust_accuracy", split, name, _right(rows))
    ]


def threat_models(
    rows_by_attack: Mapping[str, Sequence[Row]], settings: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[float | None]]:
    """
    Whether each image stays right under all attacks of a threat model (norm and ε).

    Args:
        rows_by_attack: a row for each image, by attack.
        settings: of each attack.

    Returns:
        By a name: that of the attack where a threat model has only one; else `"any"`, or `"any, NORM ε"` where there are
        several threat models.
    """
    groups: dict[tuple[Any, Any], list[str]] = {}
    for name in rows_by_attack:
        norm, epsilon = settings[name].get("norm"), settings[name].get("epsilon")
        groups.setdefault((norm, epsilon) if isinstance(epsilon, int | float) else (name, None), []).append(name)
    found = {}
    for (norm, epsilon), names in groups.items():
        broken = broken_by_any(
            {name: [None if v is None else 1 - v for v in _right(rows_by_attack[name])] for name in names}
        )
        several = "any" if len(groups) == 1 else f"any, {norm} {radius_text(epsilon)}" if epsilon is not None else ""
        found[names[0] if len(names) == 1 else several] = [None if v is None else 1 - v for v in broken]
    return found


def worst_cases(
    subject: str, rows_by_attack: Mapping[str, Sequence[Row]], settings: Mapping[str, Mapping[str, Any]]
) -> list[Measurement]:
    """
    `robust_accuracy` of the worst case, image by image, over the attacks of each threat model that at least two share: see
    [`threat_models`].

    Args:
        subject: what the report calls the model.
        rows_by_attack: a row for each image, by attack.
        settings: of each attack.
    """
    return [
        measured
        for name, right in threat_models(rows_by_attack, settings).items()
        if name not in rows_by_attack
        for measured in share(subject, "robust_accuracy", "all", name, right)
    ]


def class_figures(
    subject: str,
    behaviors: Sequence[Behavior],
    clean: Sequence[Row],
    rows_by_attack: Mapping[str, Sequence[Row]],
    settings: Mapping[str, Mapping[str, Any]],
    class_names: Sequence[str] = (),
) -> list[Measurement]:
    """
    `worst_class_accuracy` and `disparity`, accuracy of the best class minus that of the worst, without attack and in the worst
    case of each threat model; accuracy of each class (`"class:NAME"`, where there are at most 20), without attack and in the
    first threat model.

    Args:
        subject: what the report calls the model.
        behaviors: the images, their classes in `category`; one without a class leaves all of this out.
        clean: rows without attack.
        rows_by_attack: a row for each image, by attack.
        settings: of each attack.
        class_names: the order of the classes; those that are not among them follow as they appear.
    """
    labels = [str(behavior.category) for behavior in behaviors if behavior.category is not None]
    if len(set(labels)) < 2 or len(labels) < len(behaviors):
        return []
    order = [name for name in dict.fromkeys([*class_names, *labels]) if name in set(labels)]
    listed = [("accuracy", "none", _right(clean))]
    listed += [("robust_accuracy", name, right) for name, right in threat_models(rows_by_attack, settings).items()]
    found: list[Measurement] = []
    for place, (metric, attack, right) in enumerate(listed):
        by_class = class_accuracies(right, labels)
        if by_class["worst_class"] is None:
            continue
        worst = by_class["classes"][by_class["worst_class"]]
        found.append(Measurement.share(subject, "worst_class_accuracy", "all", attack, worst["value"], worst["count"]))
        count = sum(part["count"] for part in by_class["classes"].values())
        found.append(
            Measurement.scalar(subject, "disparity", "all", attack, by_class["disparity"], count, "between classes")
        )
        if place < 2 and len(order) <= SHOWN_CLASSES:
            for name in order:
                part = by_class["classes"][name]
                if part["value"] is not None:
                    split = f"class:{name}"
                    found.append(Measurement.share(subject, metric, split, attack, part["value"], part["count"]))
    return found


def _right(rows: Sequence[Row]) -> list[float | None]:
    return [None if problem(row) else float(not row["verdict"]["success"]) for row in rows]
