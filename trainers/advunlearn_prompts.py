"""Prompts that [`AdvUnlearnTrainer`] erases, with the places of the attacked tokens; checked before training starts."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from hf_robust.diffusion.model import DiffusionModel


def erased_rows(dataset: Iterable[Any] | None, concepts: Sequence[str] | None) -> list[dict[str, str | None]]:
    """
    Training rows as `{"text": prompt, "concept": concept}`.

    Args:
        dataset: rows with a `text`, and a `concept` where it is not the (longest) one of `concepts` that the text holds as
            whole words; strings are texts; `None`: the concepts are the prompts.
        concepts: what is erased.

    Raises:
        ValueError: neither is given, there is no row, or a row has no text.
    """
    if dataset is None:
        if not concepts:
            raise ValueError(
                "`concepts` is missing: name what is to be erased, or give `train_dataset` rows with a `text` and a `concept`."
            )
        return [{"text": concept.strip(), "concept": concept.strip()} for concept in concepts]
    rows: list[dict[str, str | None]] = []
    for place, given in enumerate(dataset):
        row = {"text": given} if isinstance(given, str) else given
        if not isinstance(row, Mapping):
            raise ValueError(f"`train_dataset`, row {place} is {row!r}: give a prompt, or a row with a `text`.")
        text, concept = row.get("text"), row.get("concept")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"`train_dataset`, row {place} has `text={text!r}`: give a prompt that draws what is to be erased."
            )
        if concept is not None and not isinstance(concept, str):
            raise ValueError(
                f"`train_dataset`, row {place} has `concept={concept!r}`: give the words that are to be erased, or none."
            )
        if not (concept or "").strip():
            concept = _concept_in(text, concepts or ())
        rows.append({"text": text.strip(), "concept": concept})
    if not rows:
        raise ValueError(
            "`train_dataset` is empty: give rows with a `text`, or leave it out to train on the `concepts`."
        )
    return rows


def _concept_in(text: str, concepts: Sequence[str]) -> str | None:
    """The longest of the concepts that a text holds as whole words, in any case."""
    found = [c for c in concepts if re.search(rf"(?<!\w){re.escape(c.strip())}(?!\w)", text, re.IGNORECASE)]
    return max(found, key=len, default=None)


class ErasedPrompts:
    """
    Token ids of the prompts, as they are and with room for the attack.

    Args:
        model: whose tokenizers are used.
        rows: see [`erased_rows`].
        position: where the attacked tokens are, see [`~hf_robust.diffusion.place_tokens`]; `None`: nothing is attacked.
        count: number of them.

    Attributes:
        prompts: the texts.
        clean: `[N, L]` int64 for each text encoder.
        attacked: the same with the room; equal to `clean` where nothing is attacked.
        mask: `[N, L]` bool, the room.

    Raises:
        ValueError: a prompt is too long, with the attacked tokens or without, or does not hold the concept that is to be
            replaced or stood before.
    """

    def __init__(
        self, model: "DiffusionModel", rows: Sequence[dict[str, str | None]], *, position: str | None, count: int
    ):
        from hf_robust.diffusion import ordinary_ids, place_in_prompts

        self.prompts = [row["text"] or "" for row in rows]
        self.clean = model.tokenize(self.prompts)
        self.attacked, self.mask = self.clean, torch.zeros_like(self.clean[0], dtype=torch.bool)
        self._ordinary = [torch.tensor(ordinary_ids(tokenizer)) for tokenizer in model.tokenizers]
        if position is None:
            return
        placed = []
        for number, row in enumerate(rows):
            if position in ("replace", "insert") and not row["concept"]:
                raise ValueError(
                    f"prompt {row['text']!r} (row {number}) holds none of the `concepts`, so `attack_position={position!r}` "
                    "has no place: give the row a `concept`, or use 'prefix' or 'suffix'."
                )
            try:
                placed.append(
                    place_in_prompts(model, [row["text"] or ""], count=count, position=position, concept=row["concept"])
                )
            except ValueError as error:
                message = str(error).replace("`position=", "`attack_position=").replace("`count=", "`attack_tokens=")
                raise ValueError(message) from None
        self.attacked = [torch.cat([ids[place] for ids, _ in placed]) for place in range(len(self.clean))]
        self.mask = torch.cat([mask for _, mask in placed])

    def __len__(self) -> int:
        return len(self.prompts)

    def random_starts(
        self, prompts: Sequence[int], generators: Sequence[torch.Generator]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """
        Prompts with random ordinary tokens in the room.

        Args:
            prompts: numbers `[B]` of prompts.
            generators: one for each.

        Returns:
            Ids `[B, L]` for each text encoder and the mask `[B, L]`, on the CPU.
        """
        mask = self.mask[list(prompts)]
        ids = [attacked[list(prompts)].clone() for attacked in self.attacked]
        for row, generator in enumerate(generators):
            room = mask[row]
            for tensor, ordinary in zip(ids, self._ordinary, strict=True):
                chosen = torch.randint(len(ordinary), (int(room.sum()),), generator=generator)
                tensor[row, room] = ordinary[chosen]
        return ids, mask


class PromptRows(torch.utils.data.Dataset):
    """
    The prompts over and over, each time as another row with another number.

    Args:
        count: number of prompts.
        length: number of rows at least.
    """

    def __init__(self, count: int, length: int):
        self.count = count
        self.length = count * max(1, -(-length // count))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, row: int) -> dict[str, int]:
        return {"prompt": int(row) % self.count, "row": int(row)}


def collate(rows: Sequence[dict[str, int]]) -> dict[str, torch.Tensor]:
    """Rows of [`PromptRows`] as `[B]` int64 tensors by name."""
    return {name: torch.tensor([row[name] for row in rows]) for name in ("prompt", "row")}
