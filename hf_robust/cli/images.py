"""Rows with images, for the commands that train on them."""

from pathlib import Path
from typing import Any

from datasets import load_dataset
from trl import ScriptArguments

_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}


def load_rows(script_args: ScriptArguments, split: str, streaming: bool) -> Any:
    """
    Rows of a Hub dataset, a folder of images (with `metadata.jsonl` or `metadata.csv`), or a file whose images are in it.

    Args:
        script_args: name and configuration of the dataset.
        split: of the Hub dataset or folder; a file has but one.
        streaming: as an `IterableDataset`.
    """
    path = Path(str(script_args.dataset_name))
    if path.is_file():
        builder = _BUILDERS.get(path.suffix)
        if builder is None:
            raise ValueError(
                f"`--dataset_name {path}`: cannot tell the kind of this file; give one of {', '.join(_BUILDERS)}, a folder "
                "or a Hub id."
            )
        return load_dataset(builder, data_files=str(path), split="train", streaming=streaming)
    return load_dataset(
        str(script_args.dataset_name), name=script_args.dataset_config, split=split, streaming=streaming
    )
