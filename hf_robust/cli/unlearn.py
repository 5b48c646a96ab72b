"""`hf-robust unlearn`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoProcessor, PreTrainedTokenizerBase
from trl import ModelConfig, TrlParser

from hf_robust.cli.arguments import finish, load_tokenizer, model_arguments
from hf_robust.data import load_unlearning
from hf_robust.data.unlearning import FORMATS
from hf_robust.trainers import UnlearnConfig, UnlearnTrainer
from hf_robust.trainers.unlearn_data import IMAGE_COLUMNS

_TRAINED_ON = ("prompt", "completion", "messages", "text", *IMAGE_COLUMNS, "tools", "chat_template_kwargs")


@dataclass
class UnlearnDataArguments:
    """
    Which rows are to be forgotten and which are to be kept.

    Parameters:
        forget_dataset_name (`str`, *optional*):
            Hub id, folder or file (.csv, .json, .jsonl, .parquet) of rows to forget, as `SFTTrainer` takes them, or in the form
            of TOFU, MUSE or WMDP (see `file_format`). Rows with `images` are for vision-language models. Required.
        retain_dataset_name (`str`, *optional*):
            The same of rows to keep. Required unless `retain_weight` is 0.
        forget_dataset_config (`str`, *optional*):
            Configuration of a Hub dataset of rows to forget, such as TOFU's `forget10`.
        retain_dataset_config (`str`, *optional*):
            Configuration of a Hub dataset of rows to keep, such as TOFU's `retain90`.
        forget_split (`str`, defaults to `"train"`):
            Split of the rows to forget.
        retain_split (`str`, defaults to `"train"`):
            Split of the rows to keep.
        file_format (`str`, defaults to `"auto"`):
            `"tofu"`, `"muse"` or `"wmdp"` for rows of these sets; `"auto"` tells them by their columns, and takes others as
            they are.
        conversational (`bool`, *optional*):
            Whether plain prompts and completions become chat messages. Default: whether the tokenizer has a chat template.
    """

    forget_dataset_name: str | None = field(
        default=None, metadata={"help": "Rows to forget: Hub id, folder or file, as for SFTTrainer."}
    )
    retain_dataset_name: str | None = field(
        default=None, metadata={"help": "Rows to keep: Hub id, folder or file, as for SFTTrainer."}
    )
    forget_dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the Hub dataset of rows to forget."}
    )
    retain_dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the Hub dataset of rows to keep."}
    )
    forget_split: str = field(default="train", metadata={"help": "Split of the rows to forget."})
    retain_split: str = field(default="train", metadata={"help": "Split of the rows to keep."})
    file_format: str = field(default="auto", metadata={"help": f"Of the rows: {', '.join(FORMATS)}."})
    conversational: bool | None = field(
        default=None,
        metadata={"help": "Turn plain rows into chat messages. Default: whether the tokenizer has a chat template."},
    )

    @property
    def dataset_name(self) -> str | None:
        """The dataset that a pushed model card names."""
        return self.forget_dataset_name

    def load(self, kind: str, tokenizer: PreTrainedTokenizerBase) -> Any:
        """
        Rows to forget or to keep; `None` if none were named.

        Args:
            kind: `"forget"` or `"retain"`.
            tokenizer: decides whether rows become messages, unless `conversational` does.
        """
        source = getattr(self, f"{kind}_dataset_name")
        if source is None:
            return None
        has_template = True if tokenizer.chat_template is not None else None
        rows, _ = load_unlearning(
            source,
            split=getattr(self, f"{kind}_split"),
            name=getattr(self, f"{kind}_dataset_config"),
            file_format=self.file_format,
            conversational=has_template if self.conversational is None else self.conversational,
            argument=f"{kind}_dataset_name",
        )
        # What else there is to a row (its question once more, wrong answers) is for evaluations
        return rows.select_columns([name for name in _TRAINED_ON if name in rows.column_names])


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Train with [`~hf_robust.trainers.UnlearnTrainer`]. Where `eval_strategy` asks for evaluations, they report the
    cross-entropy on both kinds of rows.

    Args:
        arguments: command line after `hf-robust unlearn`.

    Returns:
        Exit status.
    """
    parser = TrlParser((UnlearnDataArguments, UnlearnConfig, ModelConfig), prog="hf-robust unlearn")
    data_args, training_args, model_args = parser.parse_args_and_config(args=arguments, fail_with_unknown_args=True)
    tokenizer = load_tokenizer(model_args, training_args.trust_remote_code)
    if data_args.forget_dataset_name is None:
        parser.error("--forget_dataset_name is required: rows to forget (Hub id, folder or file), as for SFTTrainer")
    if data_args.retain_dataset_name is None and training_args.retain_weight:
        parser.error("--retain_dataset_name is required: rows to keep (Hub id, folder or file); or --retain_weight 0")
    forget, retain = data_args.load("forget", tokenizer), data_args.load("retain", tokenizer)
    evaluates = str(getattr(training_args.eval_strategy, "value", training_args.eval_strategy)) != "no"
    both = {name: rows for name, rows in (("forget", forget), ("retain", retain)) if rows is not None}
    processing: Any = tokenizer
    if any(column in rows.column_names for rows in both.values() for column in IMAGE_COLUMNS):
        processing = AutoProcessor.from_pretrained(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            trust_remote_code=training_args.trust_remote_code,
        )
    trainer = UnlearnTrainer(
        args=training_args,
        forget_dataset=forget,
        retain_dataset=retain,
        eval_dataset=both if evaluates else None,
        processing_class=processing,
        **model_arguments(model_args, training_args),
    )
    finish(trainer, data_args, training_args)
    return 0
