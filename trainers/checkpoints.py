"""Checkpoints: what makes one whole, which settings it belongs to, and weights that were saved under other names."""

import contextlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_robust.data.redaction import redacted
from hf_robust.report.evaluation_plan import differences
from hf_robust.report.report import write_json

logger = logging.getLogger(__name__)

# Written last: a checkpoint with it is whole. It holds the run's settings and the sizes of the large files.
RECORD = "hf_robust_checkpoint.json"
_STATE = "trainer_state.json"
# What an older checkpoint of the same number is called while it is replaced; neither rotated nor pushed under this name
_REPLACED = "_replaced-"
# `.metadata` tells where the parts of a sharded one lie
_LARGE = (".safetensors", ".pt", ".pth", ".bin", ".distcp", ".metadata")
# What training goes on with besides the weights, one of each; missing under `save_only_model=True`
_GOES_ON_WITH = (("optimizer*", "global_step*"), ("rng_state*.pth",))
_ONLY_MODEL = (
    "it holds weights alone (`save_only_model=True`), so that optimizer, schedule and random numbers would begin anew"
)
_PICKLED = ("pytorch_model.bin", "adapter_model.bin")
# How `torch.save` says that a file could not be written
_TORCH_WRITES = "PytorchStreamWriter|inline_container|iostream|unexpected pos"
# Rows of an optimizer step: their product counts, not how it is split
_ROWS = ("per_device_train_batch_size", "gradient_accumulation_steps", "processes")


def check_writable(folder: str | os.PathLike[str]) -> None:
    """
    Make sure that a folder can be written to before hours of training depend on it.

    Args:
        folder: made if it is not there.

    Raises:
        OSError: it cannot be made or written to.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"`output_dir={str(folder)!r}` cannot be written to ({error.strerror or error}), and checkpoints go there: choose "
            "another folder, or change its permissions."
        ) from error


@contextlib.contextmanager
def saving(folder: Path, *, cleans_up: bool) -> Iterator[None]:
    """
    What writes a checkpoint goes inside. If writing fails, what there is of it goes, so that the newest checkpoint is a whole
    one, and the error says where to go on from. A whole one of the same number stays aside until the new one is whole.
    With several processes, none writes before all have entered. A link in the folder's place is replaced, not followed.

    Args:
        folder: of the checkpoint.
        cleans_up: whether this process writes the model's files.

    Raises:
        OSError: the checkpoint could not be written: no space, no permission, a lost disk.
    """
    aside = folder.with_name(f"{_REPLACED}{folder.name}")
    # Without a record it may be what a kill left of the last replacement: then the one aside stays
    replaces = problem_of(folder) is None and (_record_of(folder) is not None or problem_of(aside) is not None)
    if cleans_up and replaces:
        _remove(aside)
        folder.replace(aside)
    elif cleans_up and folder.is_symlink():  # what it leads to is not ours
        folder.unlink()
    elif cleans_up:  # rests of one: what is not rewritten is not to make them whole
        for name in (RECORD, _STATE):
            (folder / name).unlink(missing_ok=True)
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        is_write = not isinstance(error, RuntimeError) or re.search(_TORCH_WRITES, str(error))
        if not is_write or (folder / RECORD).is_file() or _state_of(folder) is not None:
            raise  # it is written, and something else failed: a push to the Hub
        if cleans_up:
            _remove(folder)
            with contextlib.suppress(OSError):  # there is none, or it stays where `newest_whole` finds it
                aside.replace(folder)
        removed = " and was removed" if cleans_up else ""  # others have written a file of it and do not see the rest
        last = newest_whole(folder.parent)
        remedy = "There is no earlier checkpoint" if last is None else f"The last whole checkpoint is {str(last)!r}"
        raise OSError(
            f"{folder.name} could not be written to `output_dir={str(folder.parent)!r}` ({_first_line(error)}; "
            f"{_free(folder.parent)}){removed}. {remedy}: make room or change the folder's permissions, then run again"
            + ("." if last is None else " with `resume_from_checkpoint=True`.")
        ) from error
    if cleans_up:
        _remove(aside)
        if not _holds_weights_alone(folder):  # older ones that lie aside are not gone back to any more
            for _, _, path in _numbered(folder.parent, up_to=int(folder.name.rpartition("-")[2])):
                if path.name.startswith(_REPLACED):
                    _remove(path)


def _remove(folder: Path) -> None:
    """Broken off in the middle, it does not leave a checkpoint that looks whole. Of a link only the link goes."""
    with contextlib.suppress(OSError):
        if folder.is_symlink():
            folder.unlink()
            return
        (folder / _STATE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def write_record(folder: Path, settings: Mapping[str, Any]) -> None:
    """
    Mark a checkpoint as whole.

    Args:
        folder: of the checkpoint, in which everything else has been written.
        settings: of the run, plain values.
    """
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*"))}
    large = {name: size for name, size in files.items() if name.endswith(_LARGE)}
    write_json(folder / RECORD, {"version": 1, "settings": _as_json(settings), "files": large})


def problem_of(folder: Path) -> str | None:
    """
    What is wrong with a checkpoint, in words; `None` if it is whole. Sizes are looked at, not contents.

    Args:
        folder: of the checkpoint.
    """
    if not folder.is_dir():
        return "there is no such folder"
    pickled = next((path for name in _PICKLED for path in folder.rglob(name) if path.is_file()), None)
    if pickled is not None:
        return f"it holds pickled weights ({pickled.relative_to(folder).as_posix()}), which are not read"
    if _state_of(folder) is None:
        return f"it has no whole {_STATE}, so that writing it was broken off"
    for name, size in ((_record_of(folder) or {}).get("files") or {}).items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            return f"it lacks {name}" if found is None else f"{name} has {found:,} of {size:,} bytes"
    return None


def _numbered(output_dir: Path, up_to: int | None = None) -> list[tuple[int, bool, Path]]:
    """Checkpoints: step, whether in its place rather than aside, folder."""
    found = [
        (int(name[2]), name[1] is None, path)
        for path in (output_dir.iterdir() if output_dir.is_dir() else ())
        if path.is_dir() and (name := re.fullmatch(rf"({_REPLACED})?{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name))
    ]
    return [each for each in found if up_to is None or each[0] <= up_to]


def _holds_weights_alone(folder: Path) -> bool:
    return not all(any(next(folder.glob(name), None) for name in names) for names in _GOES_ON_WITH)


def newest_whole(output_dir: str | os.PathLike[str]) -> Path | None:
    """
    The checkpoint of the highest step that is whole and can be resumed from; what is passed over is told in a warning. Of one
    whose replacement was broken off by a kill, that is the older one, which lies aside.

    Args:
        output_dir: of the run.
    """
    ordered = [path for *_, path in sorted(_numbered(Path(output_dir)), reverse=True)]
    problems = {path: problem_of(path) or (_ONLY_MODEL if _holds_weights_alone(path) else None) for path in ordered}
    for path, problem in problems.items():
        if problem is not None:
            logger.warning("%s is passed over: %s.", path, problem)
    whole = [path for path in ordered if problems[path] is None]
    # Without a record: of a plain Trainer, or one whose writing was broken off at the very end
    recorded = next((path for path in whole if _record_of(path) is not None), None)
    for path in whole[: whole.index(recorded) if recorded is not None else 0]:
        logger.warning("%s is passed over: it has no %s, so that writing it was broken off.", path, RECORD)
    return recorded if recorded is not None else next(iter(whole), None)


def checkpoint_to_resume(given: Any, output_dir: str | os.PathLike[str], settings: Mapping[str, Any]) -> str | None:
    """
    The checkpoint to go on from, once it is known to be whole and of a run with these settings.

    Args:
        given: the user's `resume_from_checkpoint`: a folder, or `True` for the newest one in `output_dir`.
        output_dir: of the run.
        settings: of the run, as [`write_record`] takes them.

    Raises:
        ValueError: no checkpoint, one that is not whole, one of weights alone (`save_only_model=True`), or one of other
            settings, each of which the message names.
    """
    if given is None or given is False:
        return None
    folder = newest_whole(output_dir) if given is True else Path(given)
    if folder is None:
        whole = [path for _, _, path in sorted(_numbered(Path(output_dir))) if problem_of(path) is None]
        remedy = f" Or load the weights of {whole[-1].name} as the model: {_ONLY_MODEL}." if whole else ""
        raise ValueError(
            f"`resume_from_checkpoint=True`: there is no whole checkpoint in `output_dir={str(output_dir)!r}`. Leave it out to "
            f"start from the beginning.{remedy}"
        )
    problem = problem_of(folder)
    if problem is not None:
        last = newest_whole(folder.parent)
        instead = "another checkpoint" if last is None else repr(str(last))
        raise ValueError(f"`resume_from_checkpoint={str(folder)!r}`: {problem}. Resume from {instead} instead.")
    if _holds_weights_alone(folder):
        raise ValueError(
            f"`resume_from_checkpoint={str(folder)!r}`: {_ONLY_MODEL}. To train on from it, load it as the model, without "
            "`resume_from_checkpoint`; to be able to resume, train with `save_only_model=False`."
        )
    record = _record_of(folder)
    if record is None:
        logger.warning("%s does not tell the settings it was trained with, so that they are not compared.", folder)
        return str(folder)
    found = differences(*_comparable(_as_json(record.get("settings") or {}), _as_json(settings)))
    if found:
        raise ValueError(
            f"`resume_from_checkpoint={str(folder)!r}` is of a run with other settings: {'; '.join(found)}. A resumed run goes "
            "on as it began: set them back. To begin a new run with its weights, load them as the model instead."
        )
    return str(folder)


def _comparable(old: dict[str, Any], new: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both without what the other does not know (an older version), and without equal rows for each optimizer step."""

    def rows(settings: dict[str, Any]) -> Any:
        values = [settings.get(name) for name in _ROWS]
        return math.prod(v for v in values if isinstance(v, int)) if None not in values else values

    same = {name for name in _ROWS if rows(old) == rows(new)}
    if any(name.startswith("peft_config.") for name in old.keys() & new.keys()):
        same |= {"adapter", "lora_dropout"}  # which older versions tell of it, in other words
    names = [name for name in new if name in old and name not in same]
    return {name: old[name] for name in names}, {name: new[name] for name in names}


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    return redacted(json.loads(json.dumps(dict(settings), default=str)))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _state_of(folder: Path) -> dict[str, Any] | None:
    return _read(folder / _STATE)


def _record_of(folder: Path) -> dict[str, Any] | None:
    return _read(folder / RECORD)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e9:.2f} GB are free there"
    except OSError:
        return "how much is free there is unknown"


def restore_renamed(model: Any, folder: str | Path) -> bool:
    """
    Load a checkpoint by `from_pretrained`, which knows the names that it was saved under, if those are not the model's own.

    `save_pretrained` writes the weights of LLaVA, Qwen-VL, ViT, mixtures of experts and others under the names of their first
    releases, and the Trainer (transformers 5.23) looks for the model's own, finds none, warns, and goes on with the weights
    that it has. To be removed once it reads what it writes.

    Args:
        model: the model to fill; of others than whole models of transformers nothing happens.
        folder: the checkpoint.

    Returns:
        Whether the weights were loaded.
    """
    if not isinstance(model, PreTrainedModel) or saved_names(folder) <= set(model.state_dict()):
        return False
    saved = type(model).from_pretrained(folder, config=model.config, dtype=model.dtype, use_safetensors=True)
    model.load_state_dict(saved.state_dict())
    return True


def saved_names(folder: str | Path) -> set[str]:
    """
    Names of the weights in a checkpoint, whole or in shards; none where there is no such file.

    Args:
        folder: the checkpoint.
    """
    whole, index = Path(folder) / "model.safetensors", Path(folder) / "model.safetensors.index.json"
    if whole.is_file():
        with safe_open(whole, framework="pt") as file:
            return set(file.keys())
    return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"]) if index.is_file() else set()
