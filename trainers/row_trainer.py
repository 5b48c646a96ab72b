"""Base of the trainers that stand where [`~trl.SFTTrainer`] stood: rows that cannot be tokenised are named."""

from typing import Any, ClassVar

from datasets import Dataset

from hf_robust.data.text_rows import check_has_rows, rows_explained
from hf_robust.trainers.card import CardTrainer


class RowTrainer(CardTrainer):
    """
    [`~hf_robust.trainers.card.CardTrainer`] in front of [`~trl.SFTTrainer`], whose errors about a row come from deep in a
    tokenizer or a chat template, and name neither the row nor the column.

    Attributes:
        _row_arguments: the user's names of the datasets that the parent prepares, by the parent's.
    """

    _row_arguments: ClassVar[dict[str, str]] = {"train": "train_dataset", "eval": "eval_dataset"}

    def __init__(
        self, model, args=None, data_collator=None, train_dataset=None, *parent_args: Any, **parent_kwargs: Any
    ):
        check_has_rows(train_dataset, self._row_arguments["train"])
        super().__init__(model, args, data_collator, train_dataset, *parent_args, **parent_kwargs)

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name) -> Any:
        """
        The parent's tokenisation.

        Raises:
            ValueError: naming argument, row, column, value and remedy, where a row is at fault.
        """
        name = self._row_arguments.get(dataset_name, f"eval_dataset[{dataset_name!r}]")
        # Rows for a `formatting_func` may be of any kind
        rows = dataset if formatting_func is None else None
        with rows_explained(rows, name, processing_class, args.dataset_text_field):
            parent: Any = super()
            prepared = parent._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
            if isinstance(prepared, Dataset) and "input_ids" not in prepared.column_names:
                # TRL drops a column `messages` that holds none
                raise ValueError(
                    f"`{name}` has the columns {dataset.column_names}, none of which gives token ids: give `prompt` and "
                    "`completion`, `messages` or `text`."
                )
        return prepared
