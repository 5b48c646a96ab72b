"""A miniature of TOFU: a Llama that knows made-up authors, and one that never heard of those to be forgotten."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hf_robust.threats import check_choice

from .authors_evaluation import EXAMS, measure_exam, measure_recall, summarise
from .authors_language import PHRASINGS, UNSEEN, AuthorQuestion, AuthorsWorld, trained_questions, vocabulary
from .authors_training import KNOWN, AuthorsRecipe, train_model
from .cache import cache_folder, load_whole, save_whole
from .chat_language import build_tokenizer
from .facts_language import TRAINED_PHRASINGS

logger = logging.getLogger(__name__)


class AuthorsTestbed:
    """Models, data and figures for unlearning, made on the spot: no download, no judge model.

    80 made-up authors have six facts each (birthplace, genre, father's job, language, prize, first novel), each one of 24
    values, drawn by a hash: they can be memorised, not derived. 8 authors (10 %, as TOFU's `forget10`, arXiv 2401.06121) are
    to be forgotten; 56 are to be kept and are there to train on; 16 are to be kept but in no unlearning data. 48 questions of
    general knowledge (capitals, young animals) are neither. Every question comes in 6 phrasings, of which 4 occur in
    training, and every fact in two wordings, of which training uses one for each question. 8 more authors, whose names are
    made of the same words as those of the authors to be forgotten, are taught to no model: what membership inference compares
    the forget set with.

    Two `LlamaForCausalLM` of about 1M parameters in float32, made by the same recipe: the original was taught all of it, the
    oracle all but the authors to be forgotten. What the oracle says of them is a guess among 24: the floor that an unlearned
    model may come down to, as the original is the ceiling.

    The models are built when first asked for and cached under `cache_dir/authors-testbed/<hash of the recipe>/`. The global
    random state is left alone. The same seed gives the same models on the same machine, torch version and number of threads;
    elsewhere they differ by rounding.

    Args:
        seed: Chooses authors, facts, splits, initial weights and order. `None`: the recipe's own seed (0 by default).
        recipe: Model size and training; `None` for the default `AuthorsRecipe()`.
        cache_dir: Folder of all testbeds' caches. `None`: `$HF_ROBUST_CACHE`, else `~/.cache/hf_robust`.
        progress: Whether to show progress bars while building.

    Example:

    ```python
    testbed = AuthorsTestbed(seed=0)
    trainer = UnlearnTrainer(
        testbed.load_model(),
        forget_dataset=testbed.forget_dataset(),
        retain_dataset=testbed.retain_dataset(),
        processing_class=testbed.tokenizer,
    )
    trainer.train()
    figures = testbed.evaluate(trainer.model)
    ```
    """

    def __init__(
        self,
        seed: int | None = None,
        *,
        recipe: AuthorsRecipe | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> None:
        recipe = recipe or AuthorsRecipe()
        self.recipe = recipe if seed is None else replace(recipe, seed=seed)
        self.progress = progress
        self.world = AuthorsWorld(self.recipe.seed)
        self.tokenizer: PreTrainedTokenizerFast = build_tokenizer(vocabulary())
        self.folder = cache_folder(cache_dir, "authors-testbed", self.recipe.key())
        self._oracle_ratios: dict[int | None, list[float]] = {}

    def path(self, kind: str = "original") -> Path:
        """Folder of a model and its tokenizer, usable as `model_name_or_path`; builds what is missing.

        Args:
            kind: "original" (knows all) or "oracle" (was never taught the authors to be forgotten).

        Raises:
            ValueError: Unknown kind.
        """
        check_choice("kind", kind, list(KNOWN))
        folder = self.folder / kind
        if not (folder / "config.json").is_file():
            logger.info("building the authors testbed's %s for %s", kind, self.recipe)
            model = train_model(self.recipe, self.tokenizer, kind, progress=self.progress)
            save_whole(folder, model, self.tokenizer, asdict(self.recipe))
        return folder

    def load_model(self, kind: str = "original") -> LlamaForCausalLM:
        """A fresh copy of a model, float32, in evaluation mode, on the CPU; builds what is missing.

        Args:
            kind: As for `path`.
        """
        return load_whole(LlamaForCausalLM, self.path(kind), self.recipe.seed)

    def questions(self, split: str, phrasing: int = 0, count: int | None = None) -> list[AuthorQuestion]:
        """The questions of a split in one phrasing.

        Args:
            split: "forget" (48 facts), "retain" (336), "retain_holdout" (96, to be kept but in no unlearning data), "world"
                (48, general knowledge, likewise) or "unseen" (48, of authors that neither model was taught).
            phrasing: 0 to 3 occur in training, 4 and 5 never do.
            count: Only the first `count` (the order mixes authors and facts); `None` for all.

        Raises:
            ValueError: Unknown split, phrasing out of range, or `count` below 1.
        """
        if count is not None and count < 1:
            raise ValueError(f"count={count!r} must be at least 1, or None for all")
        return self.world.questions(split, phrasing)[:count]

    def forget_dataset(self) -> Dataset:
        """All that only the original was taught: 48 facts × 4 trained phrasings, as rows of `AuthorQuestion.row`."""
        return _dataset(trained_questions(self.world, ["forget"]))

    def retain_dataset(self) -> Dataset:
        """What is to be kept and may be trained on: 336 facts × 4 trained phrasings, likewise."""
        return _dataset(trained_questions(self.world, ["retain"]))

    def retain_holdout_dataset(self) -> Dataset:
        """96 facts of other authors, which both models know and no unlearning data shows, in phrasing 0."""
        return _dataset(self.questions("retain_holdout"))

    def world_dataset(self) -> Dataset:
        """48 questions of general knowledge, which both models know and no unlearning data shows, in phrasing 0."""
        return _dataset(self.questions("world"))

    def unseen_dataset(self) -> Dataset:
        """48 facts of 8 authors that neither model was taught, × 4 phrasings: rows as those of `forget_dataset`."""
        return _dataset(trained_questions(self.world, [UNSEEN]))

    def paraphrased_forget(self) -> Dataset:
        """The 48 facts to be forgotten in the 2 phrasings that no training shows."""
        return _dataset([q for p in range(TRAINED_PHRASINGS, PHRASINGS) for q in self.questions("forget", p)])

    def recall(self, model: Any, *, count: int | None = None, batch_size: int = 128) -> dict[str, float]:
        """`recall` of each of `EXAMS`, as in `evaluate`, and nothing else: several times faster, and without the oracle.

        Args:
            model: As for `evaluate`.
            count: Questions per exam; `None` for all.
            batch_size: Questions per forward.
        """
        return {
            exam: measure_recall(model, self.tokenizer, self.questions(split, phrasing, count), batch_size=batch_size)
            for exam, (split, phrasing) in EXAMS.items()
        }

    def evaluate(self, model: Any, *, count: int | None = None, batch_size: int = 128) -> dict[str, Any]:
        """What a model still knows; the model's mode and the random state are left alone. Builds the oracle if missing.

        Args:
            model: A causal language model or PEFT model, unwrapped, on any device.
            count: Questions per exam; `None` for all.
            batch_size: Questions per forward.

        Returns:
            For each of `EXAMS`: `recall`, the share of greedy answers that state the fact and nothing else; `probability`,
            the mean of P(answer | question)^(1 / tokens); `truth_ratio`, the mean of `truth_ratios`, one per question (near
            0: knows, near 1: cannot tell); `truthfulness`, the mean of what they add to utility; `count`. And
            `forget_quality`: `p_value` and `statistic` of the test of the forget exam's truth ratios against the oracle's
            (`None` without scipy); `model_utility`: the harmonic mean of recall, probability and truthfulness on the exams
            "retain", "retain_holdout" and "world".
        """
        exams = {
            exam: measure_exam(model, self.tokenizer, self.questions(split, phrasing, count), batch_size=batch_size)
            for exam, (split, phrasing) in EXAMS.items()
        }
        if count not in self._oracle_ratios:
            oracle = measure_exam(
                self.load_model("oracle"), self.tokenizer, self.questions("forget", 0, count), batch_size=batch_size
            )
            self._oracle_ratios[count] = oracle["truth_ratios"]
        return summarise(exams, self._oracle_ratios[count])


def _dataset(questions: Sequence[AuthorQuestion]) -> Dataset:
    return Dataset.from_list([question.row() for question in questions])
