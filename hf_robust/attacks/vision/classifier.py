"""What an attack on pixels asks of an image classifier."""

import inspect
from typing import Any

import torch
from torch import nn

from hf_robust.attacks.vision.losses import MIN_CLASSES


def input_dtype(model: Any, pixel_values: torch.Tensor) -> torch.dtype:
    """
    The dtype in which a model sees images: that of its first float weight, else the images' own.

    Args:
        model: module or callable.
        pixel_values: float.
    """
    if isinstance(model, nn.Module):
        for weight in model.parameters():
            if weight.is_floating_point():
                return weight.dtype
    return pixel_values.dtype


def logits_of(model: Any, pixel_values: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """
    Logits of an image classifier, `[batch, classes]` float32.

    Args:
        model: see [`~hf_robust.attacks.PGD.perturb`]. Models of transformers and PEFT, and any that has such an
            argument, get the images as `pixel_values`; others as their first argument.
        pixel_values: `[batch, ..., channels, height, width]`; a module gets them in the dtype of its weights.
        inputs: further inputs of the model.
    """
    pixel_values = pixel_values.to(input_dtype(model, pixel_values))
    function = model.forward if isinstance(model, nn.Module) else model
    by_name = hasattr(model, "config") or "pixel_values" in inspect.signature(function).parameters
    output = model(pixel_values=pixel_values, **inputs) if by_name else model(pixel_values, **inputs)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or len(logits) != len(pixel_values):
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(
            f"`model` returned {shape} for {len(pixel_values)} images instead of logits [batch, classes]: give an image "
            "classifier, or pass `objective`."
        )
    return logits.float()


def class_numbers(labels: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """
    Labels as `[batch]` int64 on the device of the images; whether they are classes of the model is for [`check_labels`].

    Args:
        labels: `[batch]` whole numbers.
        pixel_values: `[batch, ...]`.

    Raises:
        ValueError: none, of another shape, or no whole numbers.
    """
    if labels is None:
        raise ValueError("`labels=None`: give the true classes `[batch]`, or an `objective`.")
    labels = torch.as_tensor(labels)
    if labels.shape != (len(pixel_values),) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"`labels` is {labels.dtype} of shape {tuple(labels.shape)} for {len(pixel_values)} images: give one class "
            "number (int64) for each."
        )
    return labels.to(pixel_values.device).long()


def check_labels(labels: torch.Tensor, logits: torch.Tensor, loss: str) -> None:
    """
    Raise a `ValueError` unless the labels are classes of the model, and these enough for the loss.

    Args:
        labels: `[batch]` int64.
        logits: `[batch, classes]`.
        loss: one of `PIXEL_LOSSES`.
    """
    classes = logits.shape[1]
    if classes < MIN_CLASSES[loss]:
        raise ValueError(
            f"`loss={loss!r}` needs {MIN_CLASSES[loss]} classes, the model has {classes}: use `loss='ce'`."
        )
    if not len(labels):
        return
    smallest, largest = torch.stack([*labels.aminmax()]).tolist()
    if smallest < 0 or largest >= classes:
        wrong = smallest if smallest < 0 else largest
        raise ValueError(
            f"`labels` has {wrong}, but the model's {classes} classes are 0 to {classes - 1}: map the labels to the model's "
            "classes, and leave unlabelled rows out."
        )
