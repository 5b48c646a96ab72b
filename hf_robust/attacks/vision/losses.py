"""Losses of attacks on classifiers: logits in, one value to be minimised for each row out."""

import torch
import torch.nn.functional as F

PIXEL_LOSSES = ("ce", "dlr", "targeted_dlr")

# Classes below which a loss is not defined: it looks at the third and fourth logit in order
MIN_CLASSES = {"ce": 2, "dlr": 3, "targeted_dlr": 4}


def attack_loss(
    logits: torch.Tensor, labels: torch.Tensor, loss: str, targets: torch.Tensor | None = None
) -> torch.Tensor:
    """
    What an attack minimises.

    With z the logits, in descending order z_(1) ≥ z_(2) ≥ …, y the label and t the target (Croce & Hein, arXiv 2003.01690):
    `"ce"` is minus the cross-entropy; `"dlr"` is `(z_y - max of z_i over i ≠ y) / (z_(1) - z_(3))`, negative where the row is
    misclassified; `"targeted_dlr"` is `(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2)`. The two ratios change neither with the
    scale of the logits nor with what is added to all of them.

    Args:
        logits: `[batch, classes]` float.
        labels: `[batch]` int64.
        loss: `"ce"`, `"dlr"` or `"targeted_dlr"`.
        targets: `[batch]` int64, of `"targeted_dlr"`.

    Returns:
        `[batch]`, in the dtype of `logits`.
    """
    if loss == "ce":
        return -F.cross_entropy(logits, labels, reduction="none")
    order = logits.sort(dim=1, descending=True).values
    true = logits.gather(1, labels[:, None]).squeeze(1)
    if loss == "dlr":
        other = torch.where(true == order[:, 0], order[:, 1], order[:, 0])
        return (true - other) / (order[:, 0] - order[:, 2] + _TINY)
    if targets is None:
        raise ValueError("`loss='targeted_dlr'` needs `targets`, one other class for each row.")
    aim = logits.gather(1, targets[:, None]).squeeze(1)
    return (true - aim) / (order[:, 0] - (order[:, 2] + order[:, 3]) / 2 + _TINY)


# Three equal logits at the top would divide by zero
_TINY = 1e-12


def best_other_classes(logits: torch.Tensor, labels: torch.Tensor, count: int) -> torch.Tensor:
    """
    The classes of highest logit other than the label, in descending order.

    Args:
        logits: `[batch, classes]`.
        labels: `[batch]` int64.
        count: how many; all others where there are fewer.

    Returns:
        `[batch, min(count, classes - 1)]` int64.
    """
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.topk(min(count, logits.shape[1] - 1), dim=1).indices
