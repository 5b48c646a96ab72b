"""What is kept of each picture: plain values beside a PNG file, and what the judge saw in it."""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from hf_robust.data.behavior import Behavior
from hf_robust.data.redaction import describe_error, without_tokens
from hf_robust.files import whole_file
from hf_robust.metrics.image_judges import as_uint8
from hf_robust.metrics.judges import Verdict
from hf_robust.report.evaluation_records import Records, Row, finite

logger = logging.getLogger(__name__)

# Columns that hold a picture's seed, tried in this order; the second is that of published prompt lists
_SEED_COLUMNS = ("seed", "evaluation_seed")
_SHOWN_IDS = 8


class Pictures:
    """
    Pictures on disk, `folder/images/<stage>/<place>.png`; with `folder=None` they stay in memory.

    Args:
        folder: of the evaluation.
        records: of the same evaluation, for the stages' names.
    """

    def __init__(self, folder: Path | None, records: Records):
        self._folder, self._records = folder, records
        self._kept: dict[str, torch.Tensor] = {}

    def put(self, stage: str, place: int, image: torch.Tensor) -> str:
        """
        Keep a picture, whole or not at all.

        Args:
            stage: name of the attack or stage.
            place: of the prompt in the evaluation.
            image: `[3, H, W]` uint8 on the CPU.

        Returns:
            The picture's name: its path below the evaluation's folder.
        """
        name = f"images/{self._records.folder_name(stage)}/{place:05d}.png"
        if self._folder is None:
            self._kept[name] = image
            return name
        from PIL import Image

        path = self._folder / name
        with whole_file(path) as draft:
            Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(draft, format="PNG")
        return name

    def get(self, name: str) -> torch.Tensor:
        """
        A picture, `[3, H, W]` uint8.

        Args:
            name: from [`put`].

        Raises:
            ValueError: the file is gone or broken, or the name is none that [`put`] gives.
        """
        if self._folder is None:
            return self._kept[name]
        from PIL import Image

        # Names come out of records, which somebody else may have written
        if not re.fullmatch(r"images/[\w.-]+/\d+\.png", name) or ".." in name:
            raise ValueError(
                f"`output_dir={str(self._folder)!r}` has records of a picture {name!r}, which is none of an evaluation: pass "
                "`overwrite=True` to run the evaluation again."
            )
        try:
            with Image.open(self._folder / name) as picture:
                pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
                return pixels.reshape(picture.height, picture.width, 3).permute(2, 0, 1).contiguous()
        except OSError as error:
            raise ValueError(
                f"`output_dir={str(self._folder)!r}` lacks the picture {name}, which its records name ({error}): pass "
                "`overwrite=True` to run the evaluation again."
            ) from error


def as_prompts(rows: Sequence[Any], argument: str, seeds: Sequence[int] | None = None) -> list[Behavior]:
    """
    Prompts with a seed each, in `metadata["seed"]`, as an evaluation's records and files hold them.

    Args:
        rows: texts, behaviours, or mappings with `prompt` and, optionally, `id`, `seed` (or `evaluation_seed`), `category`,
            and `answer` or `label` (what the picture is to show).
        argument: name of the argument, for errors.
        seeds: one for each row. Default: the row's own, or its place in the list.

    Raises:
        ValueError: no row, a row without a prompt, ids given twice, another number of seeds than rows, or a seed that is no
            whole number from 0 on.
    """
    if isinstance(rows, str) or not isinstance(rows, Sequence) or not rows:
        raise ValueError(f"`{argument}={rows!r}` must be a list with at least one prompt.")
    if seeds is not None and len(seeds) != len(rows):
        raise ValueError(f"`seeds` has {len(seeds)} entries for the {len(rows)} of `{argument}`: give one each.")
    found = []
    for place, row in enumerate(rows):
        if isinstance(row, Behavior):
            values: dict[str, Any] = {**row.metadata, **{k: v for k, v in vars(row).items() if k != "metadata"}}
        else:
            values = {"prompt": row} if isinstance(row, str) else dict(row)
        prompt = values.get("prompt")
        if not isinstance(prompt, str):
            raise ValueError(
                f"`{argument}[{place}]={row!r}` has no `prompt` that is text: a picture is drawn from text."
            )
        name = values.get("id")
        own = next((values[column] for column in _SEED_COLUMNS if values.get(column) not in (None, "")), place)
        label = values.get("answer") or values.get("label")
        found.append(
            Behavior(
                id=f"row_{place}" if name is None else str(name),
                prompt=prompt,
                category=values.get("category"),
                answer=None if label is None else str(label),
                metadata={"seed": _as_seed(own if seeds is None else seeds[place], f"{argument}[{place}]")},
            )
        )
    ids = [behavior.id for behavior in found]
    twice = list(dict.fromkeys(name for name in ids if ids.count(name) > 1))
    if twice:
        raise ValueError(
            f"`{argument}` has ids more than once: {', '.join(map(repr, twice[:_SHOWN_IDS]))}. Give each row an id of its own."
        )
    return found


def _as_seed(value: Any, where: str) -> int:
    try:
        seed = int(value)
    except (TypeError, ValueError):
        seed = -1
    if isinstance(value, bool) or seed < 0 or seed != float(value):
        raise ValueError(f"The seed {value!r} of `{where}` must be a whole number from 0 on.")
    return seed


def seeds_of(behaviors: Sequence[Behavior]) -> list[int]:
    """
    The seeds of prompts.

    Args:
        behaviors: from [`as_prompts`].
    """
    return [int(behavior.metadata["seed"]) for behavior in behaviors]


def judge_pictures(judge: Callable[[torch.Tensor], Any], images: torch.Tensor) -> list[dict[str, Any]]:
    """
    What a judge sees in pictures as they are kept. A picture on which it fails by itself gets an error, the others count.

    Args:
        judge: takes float `[N, 3, H, W]` in [0, 1] and returns a bool for each; an
            [`~hf_robust.metrics.image_judges.ImageJudge`] also tells label and probability.
        images: `[N, 3, H, W]` uint8.

    Returns:
        For each picture the fields of a [`~hf_robust.metrics.judges.Verdict`], and `label`.
    """
    try:
        return _verdicts(judge, images.float() / 255)
    except (torch.OutOfMemoryError, MemoryError):
        raise  # says something about the machine, not about a picture
    except Exception as error:
        if len(images) > 1:
            return [judge_pictures(judge, image[None])[0] for image in images]
        said = describe_error(error)
        logger.warning("The judge failed on a picture: %s", said)
        return [{**asdict(Verdict(success=False, error=said)), "label": None}]


def _verdicts(judge: Any, images: torch.Tensor) -> list[dict[str, Any]]:
    labels: list[str | None] = [None] * len(images)
    scores: list[float | None] = [None] * len(images)
    if callable(getattr(judge, "probabilities", None)):
        found = judge.probabilities(images)
        hits, scores = judge.hits(found).tolist(), found[:, judge.label_id].tolist()
        labels = [judge.label_names[int(index)] for index in found.argmax(dim=-1)]
    else:
        hits = torch.as_tensor(judge(images)).tolist()
    if not isinstance(hits, list) or len(hits) != len(images):
        raise TypeError(f"the judge must return one bool for each of the {len(images)} pictures; it returned {hits!r}")
    return [
        {**asdict(Verdict(success=bool(hit), score=score)), "label": label}
        for hit, score, label in zip(hits, scores, labels, strict=True)
    ]


def row_of(behavior_id: str, result: Any, verdict: dict[str, Any] | None, picture: str | None) -> Row:
    """
    A prompt's record. Picture and embeddings are left out; passes go by the names that all evaluations use.

    Args:
        behavior_id: id of the prompt.
        result: a [`~hf_robust.attacks.diffusion.DiffusionAttackResult`].
        verdict: of [`judge_pictures`]; `None` where there is no picture to judge.
        picture: its name, if there is one.
    """
    renamed = {"num_unet_forwards": "num_forwards", "num_unet_backwards": "num_backwards"}
    values = {
        renamed.get(field.name, field.name): getattr(result, field.name)
        for field in fields(result)
        if field.name not in ("image", "embeddings")
    }
    values["error"] = without_tokens(result.error)
    if verdict is None:
        verdict = {**asdict(Verdict(success=False)), "label": None}
    return {"id": behavior_id, "picture": picture, "result": finite({**values, "truncated": False}), "verdict": verdict}


def picture_of(image: Any) -> torch.Tensor:
    """
    One picture as it is kept.

    Args:
        image: `[3, H, W]`, float in [0, 1] or uint8.

    Returns:
        `[3, H, W]` uint8 on the CPU.

    Raises:
        ValueError: see [`~hf_robust.metrics.image_judges.as_uint8`].
    """
    return as_uint8(image[None])[0]
