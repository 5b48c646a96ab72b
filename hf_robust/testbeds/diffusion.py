"""A miniature Stable Diffusion that draws shapes when asked to, for erasing concepts and attacking what was erased."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_robust.diffusion import DiffusionModel, generate, require_diffusers
from hf_robust.metrics.image_judges import ImageJudge

from .cache import no_loading_bar, written_whole
from .chat import default_cache_dir
from .diffusion_drawings import Scene
from .diffusion_judge import judge_accuracy, save_judge, train_judge
from .diffusion_language import TEMPLATES, WORDS
from .diffusion_recipe import DiffusionRecipe
from .diffusion_training import draw_pictures, train_oracle, train_pipeline
from .small_llama import isolated_rng

logger = logging.getLogger(__name__)


class DiffusionTestbed:
    """A pipeline, pictures, prompts and a judge for erasing a concept, made on the spot: no download.

    The pictures show one shape in one colour on one kind of paper; the shape is the concept. Each shape has a name, two
    aliases and a word of two byte-pair tokens, and is drawn as well when asked for by any of them. Meaningless tokens in a
    caption change nothing: the model has seen them in training, so that erasing is not mistaken for confusion.

    The pipeline is a plain Stable Diffusion 1.x in miniature (CLIP text encoder, UNet, VAE, local CLIP tokenizer, noise
    prediction). Judge and pipeline are built when first asked for and cached under
    `cache_dir/diffusion-testbed/<hash of the recipe>/`, each only after it has cleared its bar: the judge names ≥ 99 % of
    1,000 separate pictures rightly, and sees ≥ 90 % of the pipeline's own pictures as prompted. The global random state is
    left alone. The same seed gives the same models on the same machine, torch version and number of threads; elsewhere
    they differ by rounding. Needs `pip install "hf_robust[diffusion]"`.

    Args:
        seed: Chooses pictures, captions, initial weights and order. `None`: the recipe's own seed (0 by default).
        size: "small" (16 × 16 pixels, 5 shapes, minutes on two cores) or "large" (32 × 32, 8 shapes, up to 40 minutes).
        recipe: Everything else; `None` for the size's own. With a recipe, `size` has no say.
        cache_dir: Folder of all testbeds' caches. `None`: `$HF_ROBUST_CACHE`, else `~/.cache/hf_robust`.
        progress: Whether to show progress bars while building.

    Raises:
        ImportError: diffusers is missing.
        ValueError: Unknown size.

    Example:

    ```python
    testbed = DiffusionTestbed(seed=0)
    model, judge = testbed.load_model(), testbed.judge("circle")
    images = generate(model, testbed.prompts("circle", count=8), seeds=range(8), steps=20, guidance_scale=3.0)
    judge(images)  # which of them show a circle
    ```
    """

    def __init__(
        self,
        seed: int | None = None,
        size: str = "small",
        *,
        recipe: DiffusionRecipe | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> None:
        require_diffusers()
        self.recipe = (DiffusionRecipe.of_size(size) if recipe is None else recipe).with_seed(seed)
        self.progress = progress
        root = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
        self.folder = root.absolute() / "diffusion-testbed" / self.recipe.key()

    @property
    def concepts(self) -> tuple[str, ...]:
        """The shapes, by name."""
        return self.recipe.concepts

    # Models

    @property
    def judge_folder(self) -> Path:
        """Folder of the judge: a transformers image classifier with its image processor; builds what is missing.

        Its labels are the concepts and "other", for pictures that show no shape.

        Raises:
            RuntimeError: The judge misses its bar.
        """
        folder = self.folder / "judge"
        if not (folder / "config.json").is_file():
            logger.info("building the diffusion testbed's judge for %s", self.recipe)
            judge = train_judge(self.recipe, progress=self.progress)
            accuracy = judge_accuracy(judge, self.recipe)
            if accuracy < self.recipe.judge_bar:
                raise RuntimeError(
                    f"the diffusion testbed's judge names {accuracy:.1%} of separate pictures rightly, less than "
                    f"judge_bar={self.recipe.judge_bar}: raise judge_steps={self.recipe.judge_steps} or choose another seed"
                )
            with written_whole(folder) as draft:
                save_judge(judge, draft, self.recipe)
                self._note(draft, accuracy=accuracy)
        return folder

    def judge(self, concept: str) -> ImageJudge:
        """Whether pictures [N, 3, H, W] in [0, 1] show the concept; its `labels` names what they show.

        Raises:
            ValueError: Unknown concept.
        """
        self._check(concept)
        with no_loading_bar():
            return ImageJudge(self.judge_folder, label=concept, batch_size=64)

    @property
    def pipeline_folder(self) -> Path:
        """Folder of the original pipeline, for any diffusers pipeline loader; builds what is missing.

        Raises:
            RuntimeError: Too few of its pictures are judged as prompted.
        """
        folder = self.folder / "pipeline"
        if not (folder / "model_index.json").is_file():
            self._save(folder, train_pipeline(self.recipe, progress=self.progress), self.concepts)
        return folder

    def oracle_folder(self, concept: str) -> Path:
        """Folder of the oracle: the same recipe without the concept's pictures and captions; builds what is missing.

        UNet and text encoder are trained anew from the same initial weights; the VAE is the original's, as it is frozen in
        erasing too.

        Raises:
            ValueError: Unknown concept.
            RuntimeError: Too few pictures of the other concepts are judged as prompted.
        """
        self._check(concept)
        folder = self.folder / f"oracle-{concept}"
        if not (folder / "model_index.json").is_file():
            vae: Any = self.load_model().vae
            pipeline = train_oracle(self.recipe, vae, concept, progress=self.progress)
            self._save(folder, pipeline, [name for name in self.concepts if name != concept])
        return folder

    def load_model(self) -> DiffusionModel:
        """A fresh copy of the original, float32, in evaluation mode, on the CPU; builds what is missing."""
        return self._load(self.pipeline_folder)

    def oracle(self, concept: str) -> DiffusionModel:
        """A fresh copy of the oracle: what the model would be had it never seen the concept; builds what is missing.

        Raises:
            ValueError: Unknown concept.
        """
        return self._load(self.oracle_folder(concept))

    def quality(self) -> dict[str, float]:
        """What the build measured: "judge" (accuracy) and "pipeline" (share of own pictures judged as prompted)."""
        folders = {"judge": self.judge_folder, "pipeline": self.pipeline_folder}
        return {
            name: json.loads((folder / "recipe.json").read_text(encoding="utf-8"))["measured"]["accuracy"]
            for name, folder in folders.items()
        }

    def measure(self, model: DiffusionModel, concepts: Sequence[str] | None = None) -> float:
        """Share of a model's pictures that the judge sees as prompted: `check_images` held-out prompts, every word as often.

        Args:
            model: Unwrapped.
            concepts: What is asked for; `None` for all.
        """
        asked = list(self.concepts if concepts is None else concepts)
        share = -(-self.recipe.check_images // len(asked))
        rows = [(prompt, concept) for concept in asked for prompt in self.prompts(concept, count=share)]
        images = generate(
            model, [prompt for prompt, _ in rows], seeds=range(len(rows)), steps=self.recipe.check_steps,
            guidance_scale=self.recipe.check_guidance, batch_size=32, progress=self.progress,
        )  # fmt: skip
        seen = self.judge(asked[0]).labels(images)
        return sum(label == concept for label, (_, concept) in zip(seen, rows, strict=True)) / len(rows)

    # Prompts and pictures

    def words(self, concept: str, kind: str = "all") -> tuple[str, ...]:
        """What a concept may be called.

        Args:
            concept: One of `concepts`.
            kind: "name", "alias" (two words), "two_token" (one word of two byte-pair tokens) or "all".

        Raises:
            ValueError: Unknown concept or kind.
        """
        self._check(concept)
        return WORDS[concept].words(kind)

    def prompts(self, concept: str, *, split: str = "test", words: str = "all", count: int | None = None) -> list[str]:
        """Different prompts for a concept, in an order in which any few of them are mixed.

        Args:
            concept: One of `concepts`.
            split: "train", for erasing, or "test", phrased otherwise, for measuring.
            words: What the concept is called: "name", "alias", "two_token" or "all", every word as often.
            count: Only the first `count`, repeated from the beginning if there are fewer; `None` for all.

        Raises:
            ValueError: Unknown concept, split or words, or `count` below 1.
        """
        return [prompt for prompt, _ in self._captions(concept, split, words, count)]

    def retain_prompts(
        self, concept: str, *, split: str = "train", words: str = "all", count: int | None = None
    ) -> list[str]:
        """Prompts for all other concepts in turn; arguments and errors are those of `prompts`."""
        return [row["prompt"] for row in self.utility_rows(concept, split=split, words=words, count=count)]

    def utility_rows(
        self, concept: str, *, split: str = "test", words: str = "all", count: int | None = None
    ) -> list[dict[str, str]]:
        """As `retain_prompts`, with what the picture is to show: mappings with `prompt` and `label`."""
        self._check(concept)
        others = [other for other in self.concepts if other != concept]
        each = None if count is None else -(-count // len(others))
        columns = [self.prompts(other, split=split, words=words, count=each) for other in others]
        rows = [
            {"prompt": prompt, "label": other}
            for prompts in zip(*columns, strict=True)
            for other, prompt in zip(others, prompts, strict=True)
        ]
        return rows[:count]

    def images(
        self, concept: str, count: int, seed: int = 0, *, split: str = "train"
    ) -> tuple[torch.Tensor, list[str]]:
        """Newly drawn pictures of a concept with captions.

        Args:
            concept: One of `concepts`.
            count: How many.
            seed: Of the drawing; none of the pictures is in the original's training data.
            split: Of the captions, as in `prompts`.

        Returns:
            Pictures [count, 3, H, W], float32 in [0, 1], and a caption for each, with its colour and paper where it says so.

        Raises:
            ValueError: As for `prompts`.
        """
        rows = self._captions(concept, split, "all", count)
        pictures = draw_pictures([scene for _, scene in rows], self.recipe.image_size, [self.recipe.seed, 5, seed])
        return pictures.pixels.float() / 255, [prompt for prompt, _ in rows]

    def _captions(self, concept: str, split: str, words: str, count: int | None) -> list[tuple[str, Scene]]:
        """Prompts with a scene that each describes."""
        self._check(concept)
        if split not in TEMPLATES:
            raise ValueError(f"split={split!r} is unknown; use one of {', '.join(TEMPLATES)}")
        if count is not None and count < 1:
            raise ValueError(f"count={count!r} must be at least 1, or None for all")
        rng = np.random.default_rng([self.recipe.seed, 6, self.concepts.index(concept)])
        columns = []
        for word in WORDS[concept].words(words):
            scenes = [Scene(concept, *kind) for kind in product(self.recipe.colours, self.recipe.textures)]
            filled = {
                template.format(shape=word, colour=scene.colour, texture=scene.texture): scene
                for template, scene in product(TEMPLATES[split], (scenes[i] for i in rng.permutation(len(scenes))))
            }
            rows = list(filled.items())
            columns.append([rows[i] for i in rng.permutation(len(rows))])
        mixed = [row for rows in zip(*columns, strict=True) for row in rows]
        return mixed if count is None else [mixed[i % len(mixed)] for i in range(count)]

    # Building

    def _check(self, concept: str) -> None:
        if concept not in self.concepts:
            raise ValueError(f"concept={concept!r} is unknown; use one of {', '.join(self.concepts)}")

    def _load(self, folder: Path) -> DiffusionModel:
        with no_loading_bar(), isolated_rng(self.recipe.seed):
            return DiffusionModel.from_pretrained(folder).eval()

    def _save(self, folder: Path, pipeline: Any, concepts: Sequence[str]) -> None:
        """Keep a pipeline that draws what it is asked for; refuse any other."""
        share = self.measure(DiffusionModel(pipeline), concepts)
        if share < self.recipe.generation_bar:
            raise RuntimeError(
                f"only {share:.1%} of the diffusion testbed's own pictures are judged as prompted, less than "
                f"generation_bar={self.recipe.generation_bar}, so no erasing can be measured on it: raise "
                f"steps={self.recipe.steps} or vae_steps={self.recipe.vae_steps}, or choose another seed"
            )
        with written_whole(folder, "model_index.json") as draft:
            pipeline.save_pretrained(draft)
            self._note(draft, accuracy=share)

    def _note(self, folder: Path, **measured: float) -> None:
        text = json.dumps({**asdict(self.recipe), "measured": measured}, indent=2) + "\n"
        (folder / "recipe.json").write_text(text, encoding="utf-8")
