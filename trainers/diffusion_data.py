"""Rows of image and caption for [`DiffusionTrainer`]: reading, checking and batching them."""

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset

from hf_robust.threats import check_choice

RESIZES = ("none", "crop", "stretch")
# Rows whose images are opened before training starts; the others are checked as they are read
_CHECKED_ROWS = 16
_TOKENIZED_ROWS = 1000


def to_pixels(image: Any, size: int, *, resize: str = "none", place: str = "image") -> torch.Tensor:
    """
    An image of any common kind as the models take it.

    Args:
        image: a PIL image; an array or tensor, uint8 or floats in [0, 1], `[H, W]`, `[H, W, C]` or `[C, H, W]` with C 1, 3 or
            4 (the fourth, transparency, is dropped); the path of an image file; or `{"bytes": …, "path": …}` as `datasets`
            keeps images that it does not decode.
        size: height and width of the result, in pixels.
        resize: `"none"`: another size is an error; `"crop"`: the middle square, scaled; `"stretch"`: scaled to the square.
        place: where the image is from, for messages.

    Returns:
        `[3, size, size]` float32 in [0, 1].

    Raises:
        ValueError: no image, another size with `resize="none"`, or values outside [0, 1].
        FileNotFoundError: a path that leads nowhere.
    """
    from PIL import Image

    check_choice("image_resize", resize, RESIZES)
    if isinstance(image, Mapping) and ("bytes" in image or "path" in image):
        image = io.BytesIO(image["bytes"]) if image.get("bytes") is not None else image.get("path")
    if isinstance(image, str | os.PathLike | io.BytesIO):
        image = _opened(image, place)
    if isinstance(image, Image.Image):
        image = np.array(image.convert("RGB"))
    elif not isinstance(image, np.ndarray | torch.Tensor | list):
        raise ValueError(
            f"{place} is {type(image).__name__}, which is no image: give a PIL image, an array [H, W, 3], a path, or a column "
            "of type `datasets.Image`."
        )
    if not isinstance(image, torch.Tensor):
        try:
            image = torch.as_tensor(np.array(image))
        except (TypeError, ValueError):
            raise ValueError(
                f"{place} holds something that is no number, or rows of several lengths: give [H, W], [H, W, C] or [C, H, W]."
            ) from None
    pixels = _channels_first(image, place)
    height, width = pixels.shape[1:]
    if (height, width) == (size, size):
        return pixels
    if resize == "none":
        raise ValueError(
            f"{place} is {width} × {height} pixels and the model is trained at {size} × {size}: set `image_resize='crop'` or "
            "'stretch' to have images scaled, or `image_size` to train at another size."
        )
    if resize == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        pixels = pixels[:, top : top + side, left : left + side]
    scaled = torch.nn.functional.interpolate(
        pixels.unsqueeze(0), size=(size, size), mode="bicubic", antialias=True, align_corners=False
    )
    return scaled[0].clamp(0, 1)  # bicubic weights overshoot at edges


def _opened(image: Any, place: str) -> Any:
    """An image file as a PIL image."""
    from PIL import Image

    name = "what its bytes hold" if isinstance(image, io.BytesIO) else repr(str(image))
    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{place} is {name}, where there is no file: give paths from the working folder."
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{place} is {name}, which cannot be read as an image ({error}).") from None


def _channels_first(pixels: torch.Tensor, place: str) -> torch.Tensor:
    """`[3, H, W]` float32 in [0, 1] of an array in any accepted layout."""
    if pixels.dim() == 2:
        pixels = pixels.unsqueeze(-1)
    if pixels.dim() == 3 and pixels.shape[-1] not in (1, 3, 4) and pixels.shape[0] in (1, 3, 4):
        pixels = pixels.permute(1, 2, 0)
    if pixels.dim() != 3 or pixels.shape[-1] not in (1, 3, 4) or not pixels.numel():
        raise ValueError(
            f"{place} has shape {tuple(pixels.shape)}, which is no image: give [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 "
            "channels."
        )
    pixels = pixels[..., :3].permute(2, 0, 1).expand(3, -1, -1)
    if pixels.dtype == torch.uint8:
        return pixels.float() / 255
    low, high = pixels.min().item(), pixels.max().item()
    if not pixels.is_floating_point() and low >= 0 and high <= 255:  # nested lists of bytes arrive as int64
        return pixels.float() / 255
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"{place} has values from {low:.3g} to {high:.3g}: give bytes (uint8, 0 to 255), or floats from 0 to 1."
        )
    return pixels.float().contiguous()


class NumberedRows(torch.utils.data.Dataset):
    """
    Rows under fixed names and with their number, by which the trainer draws their time step and noise.

    Args:
        rows: a map-style dataset.
        image_column: name of its images.
        caption_column: name of its captions.
    """

    def __init__(self, rows: Any, image_column: str, caption_column: str):
        columns = list(dict.fromkeys([image_column, caption_column]))
        # Other columns are not worth decoding
        self.rows = rows.select_columns(columns) if isinstance(rows, Dataset) else rows
        self.image_column, self.caption_column = image_column, caption_column

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        row = self.rows[place]
        return {"image": row.get(self.image_column), "text": row.get(self.caption_column), "row": int(place)}


class NumberedStream(torch.utils.data.IterableDataset):
    """
    As [`NumberedRows`] for rows that are streamed: numbered in the order in which they come; with several workers of a
    loader, each of which reads rows of its own, so that no two have the same number.
    """

    def __init__(self, rows: Any, image_column: str, caption_column: str):
        self.rows, self.image_column, self.caption_column = rows, image_column, caption_column

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        first, every = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for place, row in enumerate(self.rows):
            number = first + every * place
            yield {"image": row.get(self.image_column), "text": row.get(self.caption_column), "row": number}

    def set_epoch(self, epoch: int) -> None:
        """Hand the epoch on, by which a stream is shuffled anew."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)


def numbered(rows: Any, image_column: str, caption_column: str) -> NumberedRows | NumberedStream:
    """
    The rows with their numbers.

    Args:
        rows: a `datasets` dataset, a stream, or any sequence of dicts.
        image_column: name of the images.
        caption_column: name of the captions.
    """
    streams = isinstance(rows, IterableDataset | torch.utils.data.IterableDataset)
    kind: Callable[..., NumberedRows | NumberedStream] = NumberedStream if streams else NumberedRows
    return kind(rows, image_column, caption_column)


class ImageCaptionCollator:
    """
    Rows as a batch.

    Args:
        tokenize: captions to one `[rows, length]` int64 tensor for each text encoder.
        image_size: height and width of the images, in pixels.
        resize: see [`to_pixels`].

    Returns, when called with rows of `image`, `text` and `row`:
        `pixel_values` `[rows, 3, image_size, image_size]` float32 in [0, 1]; `row` `[rows]` int64; `input_ids`
        `[rows, length]` int64, and `input_ids_2` for a second text encoder.
    """

    def __init__(self, tokenize: Callable[[list[str]], list[torch.Tensor]], image_size: int, resize: str = "none"):
        self.tokenize, self.image_size, self.resize = tokenize, image_size, resize

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        captions = [check_caption(row["text"], f"the caption of row {row['row']}") for row in rows]
        pixels = [
            to_pixels(row["image"], self.image_size, resize=self.resize, place=f"the image of row {row['row']}")
            for row in rows
        ]
        return {
            "pixel_values": torch.stack(pixels),
            "row": torch.tensor([row["row"] for row in rows]),
            **named_ids(self.tokenize(captions)),
        }


def named_ids(ids: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Token ids of each text encoder under the names that a batch has for them."""
    return {"input_ids" if place == 0 else f"input_ids_{place + 1}": tensor for place, tensor in enumerate(ids)}


def listed_ids(batch: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Token ids of each text encoder out of a batch."""
    return [batch["input_ids"], *([batch["input_ids_2"]] if "input_ids_2" in batch else [])]


def check_caption(caption: Any, place: str) -> str:
    """The caption, which has to be a string."""
    if not isinstance(caption, str):
        raise ValueError(f"{place} is {caption!r}: a caption has to be a string, be it an empty one.")
    return caption


def check_rows(
    rows: Any,
    argument: str,
    *,
    image_column: str,
    caption_column: str,
    image_size: int,
    resize: str,
    tokenize: Callable[[list[str]], list[torch.Tensor]] | None,
) -> None:
    """
    Refuse rows that cannot be trained on. Of a map-style dataset all captions are read and some images opened; of a stream
    the names of the columns are looked at, if they are known.

    Args:
        rows: the dataset.
        argument: the trainer's argument that it was given as.
        image_column: name of the images.
        caption_column: name of the captions.
        image_size: see [`to_pixels`].
        resize: see [`to_pixels`].
        tokenize: raises for a caption that is too long; `None`: captions may be cut.

    Raises:
        ValueError: no rows, a missing column, a row without image or caption, an image of another size, a caption too long.
    """
    if rows is None:
        raise ValueError(f"`{argument}` is missing: give rows with an image and a caption.")
    columns = getattr(rows, "column_names", None)
    streams = isinstance(rows, IterableDataset | torch.utils.data.IterableDataset)
    if not streams and not len(rows):
        raise ValueError(f"`{argument}` is empty: give rows with an image and a caption.")
    if columns is None and not streams:
        columns = list(rows[0])
    if columns is not None:
        for name, column in (("image_column", image_column), ("caption_column", caption_column)):
            if column not in columns:
                raise ValueError(
                    f"`{argument}` has no column {column!r}, only {', '.join(map(repr, columns))}: set `{name}` to the one "
                    f"with the {'images' if name == 'image_column' else 'captions'}."
                )
    if streams:
        return
    length = len(rows)
    step = max(1, length // _CHECKED_ROWS)
    for place in range(0, length, step):
        where = f"`{argument}`, row {place}: the image"
        to_pixels(rows[place][image_column], image_size, resize=resize, place=where)
    captions = captions_of(rows, caption_column)
    for start in range(0, length, _TOKENIZED_ROWS):
        chunk = captions[start : start + _TOKENIZED_ROWS]
        for place, caption in enumerate(chunk, start):
            check_caption(caption, f"`{argument}`, row {place}: the caption")
        if tokenize is not None:
            tokenize(chunk)


def captions_of(rows: Any, caption_column: str) -> list[Any]:
    """All captions of a map-style dataset, without decoding its images."""
    if isinstance(rows, Dataset):
        return list(rows.with_format(None)[caption_column])
    return [rows[place][caption_column] for place in range(len(rows))]
