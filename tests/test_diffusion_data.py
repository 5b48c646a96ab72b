"""Images and captions: what is read how, and what is refused."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from hf_robust.trainers.diffusion_data import (
    ImageCaptionCollator,
    NumberedRows,
    NumberedStream,
    check_rows,
    listed_ids,
    numbered,
    to_pixels,
)
from tests.diffusion_trainer_data import image, image_rows, list_rows

PIXELS = np.asarray(image(0))
EXPECTED = torch.from_numpy(PIXELS.copy()).permute(2, 0, 1).float() / 255


def refused(*parts: str) -> Any:
    return pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, parts)))


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "given",
    [
        image(0),
        image(0).convert("RGBA"),
        PIXELS,
        PIXELS.tolist(),
        PIXELS.transpose(2, 0, 1),
        torch.from_numpy(PIXELS.copy()),
        PIXELS.astype(np.int64),
        PIXELS.astype(np.float32) / 255,
        PIXELS.astype(np.float64) / 255,
        np.concatenate([PIXELS, np.zeros((16, 16, 1), np.uint8)], axis=-1),
        {"bytes": png(image(0)), "path": None},
    ],
    ids=["pil", "rgba", "hwc", "list", "chw", "tensor", "int64", "float32", "float64", "four-channels", "bytes"],
)
def test_every_kind_of_image_gives_the_same_pixels(given: Any):
    pixels = to_pixels(given, 16)
    assert pixels.dtype == torch.float32 and pixels.shape == (3, 16, 16)
    assert torch.allclose(pixels, EXPECTED, atol=1e-6)


def test_paths_and_grey_images(tmp_path: Path):
    image(0).save(tmp_path / "a.png")
    for path in (tmp_path / "a.png", str(tmp_path / "a.png"), {"bytes": None, "path": str(tmp_path / "a.png")}):
        assert torch.equal(to_pixels(path, 16), EXPECTED)
    grey = PIXELS[..., 0]
    for given in (grey, grey[..., None], grey[None], Image.fromarray(grey)):
        pixels = to_pixels(given, 16)
        assert torch.equal(pixels, (torch.from_numpy(grey.copy()).float() / 255).expand(3, -1, -1))
    with pytest.raises(FileNotFoundError, match="row 3 is .*nowhere.png', where there is no file"):
        to_pixels(tmp_path / "nowhere.png", 16, place="row 3")


def test_another_size_is_refused_or_resized():
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = 255  # the middle square is white, the sides are black
    with refused("row 3", "16 × 8", "16 × 16", "image_resize='crop'"):
        to_pixels(wide, 16, place="row 3")
    assert torch.equal(to_pixels(wide, 4, resize="crop"), torch.ones(3, 4, 4))
    stretched = to_pixels(wide, 8, resize="stretch")
    assert stretched.shape == (3, 8, 8) and stretched[:, :, 0].max() < 0.1 and stretched[:, :, 4].min() > 0.9
    assert 0 <= stretched.min() and stretched.max() <= 1
    with refused("image_resize='fit'", "'crop'"):
        to_pixels(wide, 8, resize="fit")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "NoneType, which is no image"),
        (7, "int, which is no image"),
        (np.zeros((16, 16, 2), np.uint8), "(16, 16, 2)"),
        (np.zeros(16, np.uint8), "which is no image"),
        (np.full((16, 16, 3), -1.0), "values from -1 to -1"),
        (np.full((16, 16, 3), 200.0), "values from 200 to 200"),
        (np.full((16, 16, 3), np.nan), "values from nan"),
        (np.full((16, 16, 3), 300), "values from 300"),
        (["cake"], "holds something that is no number"),
        ([[1, 2], [1]], "rows of several lengths"),
        ([[]], "which is no image"),
        ({"bytes": b"no png", "path": None}, "cannot be read as an image"),
    ],
)
def test_what_is_no_image_is_refused(given: Any, message: str):
    with refused("row 5", message):
        to_pixels(given, 16, place="row 5")


def _ids(captions: list[str]) -> list[torch.Tensor]:
    return [torch.tensor([[len(caption)] for caption in captions])] * 2


def test_batches_carry_pixels_ids_and_row_numbers():
    rows = numbered(image_rows(4), "image", "text")
    assert isinstance(rows, NumberedRows) and len(rows) == 4
    batch = ImageCaptionCollator(_ids, 16)([rows[2], rows[0]])
    assert batch["row"].tolist() == [2, 0]
    assert torch.equal(batch["pixel_values"][1], EXPECTED)
    assert [ids.tolist() for ids in listed_ids(batch)] == [[[len("house in vangogh style")], [22]]] * 2
    stream = numbered(image_rows(3).to_iterable_dataset(), "image", "text")
    assert isinstance(stream, NumberedStream) and [row["row"] for row in stream] == [0, 1, 2]


def test_a_stream_numbers_no_row_twice_with_two_workers():
    rows = numbered(image_rows(8).to_iterable_dataset(num_shards=2), "image", "text")
    loader = torch.utils.data.DataLoader(rows, batch_size=None, num_workers=2, collate_fn=lambda row: row)
    found = list(loader)
    assert len({row["row"] for row in found}) == len(found) == 8
    assert sorted(np.asarray(row["image"]).tobytes() for row in found) == sorted(
        np.asarray(row["image"]).tobytes() for row in list_rows(8)
    )


def test_images_that_datasets_does_not_decode():
    rows = image_rows(2).cast_column("image", ImageFeature(decode=False))
    batch = ImageCaptionCollator(_ids, 16)([numbered(rows, "image", "text")[0]])
    assert torch.equal(batch["pixel_values"][0], EXPECTED)


def check(rows: Any, **changes: Any) -> None:
    given = {"image_column": "image", "caption_column": "text", "image_size": 16, "resize": "none", "tokenize": None}
    check_rows(rows, "train_dataset", **{**given, **changes})


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_rows_that_cannot_be_trained_on_are_refused(kind: Any):
    check(kind(list_rows()))
    with refused("`train_dataset` has no column 'text'", "'caption'", "caption_column"):
        check(kind([{"image": image(0), "caption": "a"}]))
    with refused("no column 'picture'", "image_column"):
        check(kind(list_rows()), image_column="picture")
    with refused("`train_dataset`, row 0", "8 × 8"):
        check(kind(list_rows(2, 8)))
    with refused("row 1", "no image"):
        check(kind([*list_rows(1), {"image": None, "text": "a"}]))
    with refused("row 1", "None: a caption"):
        check(kind([*list_rows(1), {"image": image(0), "text": None}]))


def test_no_rows_and_long_captions():
    for rows in ([], image_rows(2).select([])):
        with refused("`train_dataset` is empty"):
            check(rows)
    with refused("`train_dataset` is missing"):
        check(None)

    def too_long(captions: list[str]) -> Any:
        raise ValueError(f"{len(captions)} captions")

    with refused("8 captions"):
        check(image_rows(), tokenize=too_long)
    check(image_rows().to_iterable_dataset())
    with refused("no column 'caption'"):
        check(image_rows().to_iterable_dataset(), caption_column="caption")
