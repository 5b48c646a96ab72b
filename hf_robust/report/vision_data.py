"""Images of an evaluation: rows of a dataset as behaviours, batches of pixels, and a fingerprint."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hf_robust.data.behavior import Behavior
from hf_robust.sites import PixelUnits
from hf_robust.sites.image_layout import ImageLayout
from hf_robust.sites.pixels import with_channels

_LABELS = ("labels", "label")
_QUESTIONS = ("question", "prompt", "text")
_ANSWERS = ("answer", "caption", "completion")


class Images:
    """
    Images by id, made to pixel values batch by batch.

    Args:
        dataset: sequence of mappings with `image` (PIL, or an array that the processor takes) or `pixel_values`
            (`[channels, height, width]`).
        image_processor: makes pixel values of `image`; not needed where rows hold `pixel_values`.
        channels: that the model sees; pictures are converted to it.

    Raises:
        ValueError: no rows, or a row without an image.
    """

    def __init__(self, dataset: Any, image_processor: Any = None, channels: int = 3):
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or not len(dataset):
            raise ValueError(f"`dataset` ({type(dataset).__name__}) must have rows, found by number: at least one.")
        self._dataset, self._processor, self._channels = dataset, image_processor, channels
        self._places: dict[str, int] = {}
        columns = set(self.row(0))
        self._column = next((name for name in ("pixel_values", "image") if name in columns), None)
        if self._column is None:
            raise ValueError(f"Rows of `dataset` need `image` or `pixel_values`; they have {sorted(columns)}.")
        if self._column == "image" and image_processor is None:
            raise ValueError(
                "`image_processor=None`, but the rows of `dataset` hold `image`: give the model's processor."
            )

    def row(self, place: int) -> Mapping[str, Any]:
        """A row of the dataset."""
        return self._dataset[place]

    def pictures(self, behaviors: Sequence[Behavior]) -> list[Any]:
        """The images of some rows, as a processor takes them."""
        rows = [self.row(self._places[b.id]) for b in behaviors]
        return [with_channels(row[str(self._column)], self._channels) for row in rows]

    def __len__(self) -> int:
        return len(self._dataset)

    def add(self, behavior_id: str, place: int) -> None:
        """Name a row."""
        self._places[behavior_id] = place

    def pixel_values(self, behaviors: Sequence[Behavior], device: Any = "cpu") -> torch.Tensor:
        """
        Pixel values of some images, float32. Where the processor cuts images into patches or tiles, the images themselves,
        normalised as it does: see [`~hf_robust.sites.image_layout`].

        Args:
            behaviors: which.
            device: of the result.

        Returns:
            `[batch, channels, height, width]`.

        Raises:
            ValueError: an image that the processor makes something else of, or images of several sizes.
        """
        found = self.pictures(behaviors)
        if self._column == "image":
            given = self._processor(images=found, return_tensors="pt")
            pixels = given["pixel_values"]
            if "image_grid_thw" in given or "image_sizes" in given and pixels.dim() == 5:
                pixels = self._uncut(found, given)
        else:
            pixels = torch.stack([torch.as_tensor(image, dtype=torch.float32) for image in found])
        pixels = torch.as_tensor(pixels)
        if pixels.dim() != 4 or len(pixels) != len(behaviors):
            raise ValueError(
                f"The images have `pixel_values` of shape {list(pixels.shape)}, not [batch, channels, height, width], nor are "
                "they patches with `image_grid_thw` or tiles with `image_sizes`: images of this layout are not attacked here."
            )
        return pixels.to(device=device, dtype=torch.float32)

    def _uncut(self, pictures: Sequence[Any], given: Mapping[str, Any]) -> torch.Tensor:
        """The images that patches are cut from, as large as the processor has made them; those of tiles as they are given."""
        raw = ImageLayout(self._processor, given).originals
        if raw is None:
            raw = [torch.tensor(np.asarray(picture)).permute(2, 0, 1).float() / 255 for picture in pictures]
        sizes = sorted({tuple(image.shape[1:]) for image in raw})
        if len(sizes) > 1:
            raise ValueError(
                f"The images of a batch have {len(sizes)} sizes ({', '.join(f'{h} × {w}' for h, w in sizes[:3])}, …), which "
                "this processor keeps: use `batch_size=1`, or resize them to one."
            )
        return PixelUnits(self._processor).from_raw(torch.stack(raw))

    def digest(self, behaviors: Sequence[Behavior], batch_size: int) -> str:
        """
        SHA-256 of ids, labels and pixel values, as hexadecimal digits.

        Args:
            behaviors: the rows of an evaluation.
            batch_size: images at once.
        """
        found = hashlib.sha256()
        for start in range(0, len(behaviors), batch_size):
            batch = behaviors[start : start + batch_size]
            # Sixteen bits of a pixel, so that another build of the same library gives the same
            pixels = (self.pixel_values(batch) * 4096).round().to(torch.int32)
            for behavior, image in zip(batch, pixels, strict=True):
                found.update(f"{behavior.id}\0{behavior.prompt}\0{behavior.answer}\0{list(image.shape)}\0".encode())
                found.update(image.contiguous().numpy().tobytes())
        return found.hexdigest()


def labelled_images(dataset: Any, images: Images, class_names: Sequence[str]) -> tuple[list[Behavior], list[int]]:
    """
    Rows of a classification dataset.

    Args:
        dataset: rows with `labels` (or `label`): numbers of classes, or their names.
        images: of the same dataset; gets the rows' names.
        class_names: by number.

    Returns:
        A behaviour for each row (id, class name as `category` and `answer`), and the labels.

    Raises:
        ValueError: a row without label, or a label that is no number or name of a class.
    """
    from hf_robust.trainers.labels import is_class  # trainers write cards with this package: they load it first

    behaviors, labels = [], []
    for place in range(len(dataset)):
        row = dataset[place]
        column = next((name for name in _LABELS if name in row), None)
        if column is None:
            raise ValueError(f"`dataset[{place}]` has no `labels` or `label`; it has {sorted(row)}.")
        value = row[column]
        if isinstance(value, str):
            value = class_names.index(value) if value in class_names else -1
        if getattr(value, "shape", None) in ((), (1,)):
            value = value.item()
        if isinstance(value, float) and value.is_integer():  # a column of pandas that had gaps
            value = int(value)
        if not is_class(value, len(class_names)):
            raise ValueError(
                f"`dataset[{place}]` has the {column[:5]} {row[column]!r}, but the model has {len(class_names)} classes "
                f"({', '.join(map(repr, class_names[:5]))}{', …' if len(class_names) > 5 else ''}): map the labels to the "
                "model's numbers."
            )
        label, name = int(value), f"image_{place}"
        images.add(name, place)
        behaviors.append(Behavior(id=name, prompt="", category=class_names[label], answer=class_names[label]))
        labels.append(label)
    return behaviors, labels


def questioned_images(dataset: Any, images: Images) -> list[Behavior]:
    """
    Rows of a question-answering or captioning dataset.

    Args:
        dataset: rows with `question` (or `prompt`, `text`) and `answer` (or `caption`, `completion`): text, or a conversation
            of one message; a captioning dataset may leave the question out.
        images: of the same dataset; gets the rows' names.

    Raises:
        ValueError: a row without an answer.
    """
    behaviors = []
    for place in range(len(dataset)):
        row = dataset[place]
        answer = _text(next((row[name] for name in _ANSWERS if row.get(name) is not None), None))
        question = _text(next((row[name] for name in _QUESTIONS if row.get(name) is not None), ""))
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(f"`dataset[{place}]` has no `answer` that is text; it has {sorted(row)}.")
        name, kind = f"image_{place}", row.get("category")
        images.add(name, place)
        behaviors.append(
            Behavior(id=name, prompt=str(question), category=None if kind is None else str(kind), answer=answer)
        )
    return behaviors


def _text(value: Any) -> Any:
    """The text of a conversation's last message, its images aside; anything else as it is."""
    if not isinstance(value, list) or not value or not isinstance(value[-1], Mapping):
        return value
    content = value[-1].get("content")
    if isinstance(content, list):
        return " ".join(part["text"] for part in content if isinstance(part, Mapping) and part.get("text"))
    return content
