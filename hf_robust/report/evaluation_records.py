"""What is kept of each behaviour under each attack: plain values, one file for each finished batch."""

import json
import logging
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from hf_robust.attacks.results import AttackResult
from hf_robust.data.redaction import without_tokens
from hf_robust.metrics.judges import Verdict
from hf_robust.report.report import write_json

logger = logging.getLogger(__name__)

# One behaviour: {"id", "result": fields of AttackResult, "verdict": fields of Verdict or None}
Row = dict[str, Any]


def row_of(behavior_id: str, result: AttackResult, verdict: Verdict | None) -> Row:
    """
    A behaviour's record. The embeddings of a continuous attack are left out; a number that is not finite becomes `None`.
    Errors are kept without secrets; prompts and answers as they are.

    Args:
        behavior_id: id of the behaviour.
        result: of the attack.
        verdict: of the judge; `None` where there is nothing to judge.
    """
    values = {field.name: getattr(result, field.name) for field in fields(result) if field.name != "embeddings"}
    values["error"] = without_tokens(result.error)
    judged = None if verdict is None else {**asdict(verdict), "error": without_tokens(verdict.error)}
    return {"id": behavior_id, "result": finite(values), "verdict": finite(judged)}


def finite(value: Any) -> Any:
    """Plain values with `None` for every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


class Records:
    """
    Finished batches on disk, `folder/<stage>/<batch>.json`; with `folder=None` nothing is kept.

    Args:
        folder: parent of the stages' folders.
        stages: names of attacks and other stages, in order.
        elsewhere: stages whose records are kept in another folder, which others may share; `discard` leaves them alone unless
            it is given their name.

    Raises:
        ValueError: two names that would share a folder.
    """

    def __init__(self, folder: Path | None, stages: Sequence[str], elsewhere: Mapping[str, Path] | None = None):
        self._folder = folder
        self._elsewhere = dict(elsewhere or {})
        self._names: dict[str, str] = {}
        for stage in stages:
            name = re.sub(r"[^\w.-]+", "-", stage).strip(".-").lower()
            if not name or name in self._names.values():
                raise ValueError(
                    f"`attacks` has a name {stage!r} that makes no folder name of its own: give names that differ in letters "
                    "or digits."
                )
            self._names[stage] = name

    def path(self, stage: str, batch: int) -> Path | None:
        """File of a batch."""
        folder = self._elsewhere.get(stage, self._folder)
        return None if folder is None else folder / self._names[stage] / f"{batch:05d}.json"

    def folder_name(self, stage: str) -> str:
        """Name of a stage's folder."""
        return self._names[stage]

    def load(self, stage: str, batch: int, ids: Sequence[str]) -> dict[str, Any] | None:
        """
        A finished batch, or `None` if there is none; a file that is not whole counts as none.

        Args:
            stage: name of the attack or stage.
            batch: number of the batch.
            ids: of its behaviours.
        """
        path = self.path(stage, batch)
        if path is None or not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if [row["id"] for row in content["rows"]] == list(ids) and isinstance(content["seconds"], int | float):
                return content
            problem: Any = "other behaviours"
        except (ValueError, KeyError, TypeError) as error:
            problem = error
        logger.warning("%s is not a whole record (%s): the batch runs again.", path.name, problem)
        return None

    def save(self, stage: str, batch: int, content: dict[str, Any]) -> dict[str, Any]:
        """
        Keep a finished batch.

        Args:
            stage: name of the attack or stage.
            batch: number of the batch.
            content: `rows` and `seconds`.

        Returns:
            The content as it will be read back.
        """
        path = self.path(stage, batch)
        if path is not None:
            write_json(path, content)
        return json.loads(json.dumps(content, allow_nan=False))

    def discard(self, stage: str | None = None) -> None:
        """Delete the records of a stage, or all."""
        folder = self._folder if stage is None else self._elsewhere.get(stage, self._folder)
        if folder is not None:
            shutil.rmtree(folder if stage is None else folder / self._names[stage], ignore_errors=True)
