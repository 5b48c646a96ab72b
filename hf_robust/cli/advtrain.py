"""`hf-robust advtrain`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from datasets import ClassLabel
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
from trl import ModelConfig, ScriptArguments, TrlParser

from hf_robust.cli.arguments import adapter_config, check_not_quantized, finish, loading_arguments
from hf_robust.cli.images import load_rows
from hf_robust.sites.pixels import image_channels, with_channels
from hf_robust.trainers import AdversarialConfig, AdversarialTrainer
from hf_robust.trainers.labels import names_of, numbered_as

_LABELS = ("labels", "label")
_HEADS = ("classifier", "head", "score")


@dataclass
class ColumnArguments:
    """
    Columns of the dataset.

    Parameters:
        image_column (`str`, defaults to `"image"`):
            Images, of an image classifier's dataset.
        text_column (`str`, defaults to `"text"`):
            Texts, of a text classifier's dataset.
        max_length (`int`, *optional*):
            Tokens of a text at most. Default: as many as the tokenizer says the model takes.
    """

    image_column: str = field(default="image", metadata={"help": "Column of images."})
    text_column: str = field(default="text", metadata={"help": "Column of texts."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens of a text at most."})


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Train with [`~hf_robust.trainers.AdversarialTrainer`].

    Args:
        arguments: command line after `hf-robust advtrain`.

    Returns:
        Exit status.
    """
    kinds = (ScriptArguments, AdversarialConfig, ModelConfig, ColumnArguments)
    parser = TrlParser(kinds, prog="hf-robust advtrain")
    script_args, training_args, model_args, columns = parser.parse_args_and_config(
        args=arguments, fail_with_unknown_args=True
    )
    if model_args.model_name_or_path is None:
        parser.error("--model_name_or_path is required: a folder or a Hub id of an image or text classifier")
    if script_args.dataset_name is None:
        parser.error("--dataset_name is required: a folder of images, a file or a Hub id, with a column `label`")
    check_not_quantized(model_args, "hf-robust advtrain")
    if script_args.dataset_streaming:
        raise ValueError(
            "`--dataset_streaming true`: the classes of all rows are looked at before training. Leave it out: images are "
            "decoded only as they are read."
        )
    evaluates = str(getattr(training_args.eval_strategy, "value", training_args.eval_strategy)) != "no"
    train_rows = _labelled(load_rows(script_args, script_args.dataset_train_split, False))
    eval_rows = _labelled(load_rows(script_args, script_args.dataset_test_split, False)) if evaluates else None
    known = {"revision": model_args.model_revision}
    config = AutoConfig.from_pretrained(model_args.model_name_or_path, **known)
    classes = _classes(train_rows, config)
    names = list(classes["id2label"].values()) if classes else names_of(config)
    train_rows = numbered_as(train_rows, "labels", names)
    eval_rows = None if eval_rows is None else numbered_as(eval_rows, "labels", names)
    given = {**loading_arguments(model_args), **classes}
    is_image = config.model_type in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    prepare = partial(_images, channels=image_channels(config)) if is_image else _texts
    processing, convert, collator = prepare(model_args.model_name_or_path, known, columns, train_rows, training_args)
    model_class = AutoModelForImageClassification if is_image else AutoModelForSequenceClassification
    model = model_class.from_pretrained(model_args.model_name_or_path, **given)
    peft_config = adapter_config(model_args, None if is_image else "SEQ_CLS")
    if peft_config is not None:
        from peft import get_peft_model

        if is_image and peft_config.modules_to_save is None:  # as PEFT does for texts: a new head would stay as drawn
            peft_config.modules_to_save = [name for name in _HEADS if hasattr(model, name)] or None
        model = get_peft_model(model, peft_config)
    trainer = AdversarialTrainer(
        model,
        training_args,
        data_collator=collator,
        train_dataset=convert(train_rows),
        eval_dataset=None if eval_rows is None else convert(eval_rows),
        processing_class=processing,
    )
    finish(trainer, script_args, training_args)
    return 0


def _labelled(rows: Any) -> Any:
    """Rows whose labels are in `labels`, whatever the column was called."""
    name = next((name for name in _LABELS if name in rows.column_names), None)
    if name is None:
        raise ValueError(
            f"`--dataset_name`: the rows have no labels, only {', '.join(map(repr, rows.column_names))}. Put images of each "
            "class into a folder of the class's name, or add a column `label`."
        )
    return rows if name == "labels" else rows.rename_column(name, "labels")


def _classes(rows: Any, config: Any) -> dict[str, Any]:
    """Names and number of classes where the dataset knows them and the model has others; with another number, a new head."""
    feature = rows.features["labels"]
    if not isinstance(feature, ClassLabel) or sorted(feature.names) == sorted(names_of(config)):
        return {}
    names = dict(enumerate(feature.names))
    return {
        "num_labels": len(names),
        "id2label": names,
        "label2id": {name: number for number, name in names.items()},
        "ignore_mismatched_sizes": len(names) != config.num_labels,
    }


def _images(
    name: str, known: dict[str, Any], columns: ColumnArguments, rows: Any, args: AdversarialConfig, *, channels: int
) -> Any:
    """Image processor, and a conversion of rows to pixel values as they are read."""
    _check_column("image_column", columns.image_column, rows)
    processor = AutoImageProcessor.from_pretrained(name, **known)
    args.remove_unused_columns = False  # the images themselves are needed until a row is read

    def pixels(batch: dict[str, list[Any]]) -> dict[str, Any]:
        images = [with_channels(image, channels) for image in batch[columns.image_column]]
        found = processor(images=images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": list(found), "labels": batch["labels"]}

    return processor, lambda given: given.select_columns([columns.image_column, "labels"]).with_transform(pixels), None


def _texts(name: str, known: dict[str, Any], columns: ColumnArguments, rows: Any, args: AdversarialConfig) -> Any:
    """Tokenizer, and a conversion of rows to token ids."""
    _check_column("text_column", columns.text_column, rows)
    tokenizer = AutoTokenizer.from_pretrained(name, **known)

    def tokens(batch: dict[str, list[Any]]) -> Any:
        return tokenizer(batch[columns.text_column], truncation=True, max_length=columns.max_length)

    def convert(given: Any) -> Any:
        unused = [column for column in given.column_names if column != "labels"]
        return given.map(tokens, batched=True, remove_columns=unused)

    return tokenizer, convert, DataCollatorWithPadding(tokenizer)


def _check_column(argument: str, column: str, rows: Any) -> None:
    if column not in rows.column_names:
        raise ValueError(
            f"`--{argument} {column}` is no column of the dataset, which has {', '.join(map(repr, rows.column_names))}: name "
            "the right one."
        )
