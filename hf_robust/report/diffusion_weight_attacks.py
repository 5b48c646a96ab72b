"""Attacks by somebody who holds the erased weights: the old text encoder put back, fine-tuning on a few pictures."""

import contextlib
import hashlib
import random
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_robust.attacks.budget import Budget, Clock
from hf_robust.attacks.diffusion.base import DiffusionAttack
from hf_robust.threats import check_at_least

if TYPE_CHECKING:
    from hf_robust.attacks.diffusion.run import Run
    from hf_robust.diffusion import DiffusionModel


def swap_back(model: "DiffusionModel", original: "DiffusionModel") -> "DiffusionModel":
    """
    The erased pipeline with the text encoder(s) of the original: undoes any erasure that lies in the text encoder, which
    whoever downloads the weights can do in one line.

    Args:
        model: the erased model. It is left as it is.
        original: the model before erasing.

    Returns:
        A frozen model with copies of the original's text encoders. It shares the UNet with `model`: items are counted in
        both.

    Raises:
        ValueError: the models have text encoders of other shapes.
    """
    found = [[tuple(p.shape) for p in one.text_encoders.parameters()] for one in (model, original)]
    if found[0] != found[1]:
        raise ValueError(
            "`original` has text encoders of another shape than `model`: give the pipeline that the erasure started from, "
            "with adapters merged."
        )
    swapped = model.copy_frozen(share_unet=True)
    swapped.text_encoders = original.copy_frozen(share_unet=True).text_encoders
    return swapped.to(model.device)


def few_image_finetuning(
    model: "DiffusionModel",
    images: Sequence[Any],
    captions: Sequence[str],
    *,
    num_steps: int = 100,
    learning_rate: float = 1e-5,
    batch_size: int = 4,
    train_parts: Sequence[str] = ("unet", "text_encoder"),
    seed: int = 0,
) -> "DiffusionModel":
    """
    The erased model after plain denoising training on a few pictures of the concept, by
    [`~hf_robust.trainers.DiffusionTrainer`] at a constant learning rate, AdamW without weight decay.

    Args:
        model: the erased model. It is left as it is, and so is the global random state.
        images: pictures of the concept, at the model's image size: PIL images, arrays or paths.
        captions: one for each.
        num_steps: optimiser steps.
        learning_rate: 1e-5 is usual where all weights of Stable Diffusion are trained.
        batch_size: pictures in a step, at most as many as there are.
        train_parts: what is trained, in [`~hf_robust.trainers.DiffusionConfig`]'s words. Default: all that an erasure may
            have changed.
        seed: of the order, noise and time steps.

    Returns:
        The trained copy, frozen.

    Raises:
        ValueError: no pictures, or another number of captions.
    """
    if not len(images) or len(images) != len(captions):
        raise ValueError(
            f"`images` has {len(images)} and `captions` {len(captions)} entries: give one caption for each picture of the "
            "concept, and at least one."
        )
    rows = [{"image": image, "text": caption} for image, caption in zip(images, captions, strict=True)]
    with _global_random_state(), tempfile.TemporaryDirectory() as scratch, torch.enable_grad():
        from hf_robust.trainers import DiffusionConfig, DiffusionTrainer

        trained = model.copy_frozen()
        arguments = DiffusionConfig(
            output_dir=scratch,
            max_steps=num_steps,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            per_device_train_batch_size=min(batch_size, len(rows)),
            train_parts=list(train_parts),
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=model.device.type == "cpu",
        )
        DiffusionTrainer(model=trained, args=arguments, train_dataset=rows).train()
    return trained.requires_grad_(False).eval().to(model.device)


@contextlib.contextmanager
def _global_random_state() -> Iterator[None]:
    """A trainer seeds everything; afterwards all is as it was."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


class _WeightAttack(DiffusionAttack):
    """Change the weights once, then draw every prompt as it is. Subclasses write `changed`."""

    #: One change for all prompts.
    needs_all_behaviors = True

    def changed(self, model: "DiffusionModel", original: "DiffusionModel") -> "DiffusionModel":
        """The model under attack with other weights; `original` is the model itself where none was given."""
        raise NotImplementedError

    def _before(self, run: "Run", target_images: Any) -> "DiffusionModel":
        model = run.model
        clock, before = Clock(), (model.unet_items, model.unet_backward_items)
        changed = self.changed(model, run.original or model)
        # A copy of the model counts from 0, one that shares its UNet goes on
        shared = changed.unet is model.unet
        forwards = changed.unet_items - before[0] * shared
        backwards = changed.unet_backward_items - before[1] * shared
        for result in run.results:
            result.num_unet_forwards += -(-forwards // len(run.results))
            result.num_unet_backwards += -(-backwards // len(run.results))
            result.seconds += clock.seconds / len(run.results)
        return changed

    def _attack_group(self, run: "Run", target_images: Any, shared: "DiffusionModel") -> None:
        run.model = shared
        rows = run.affordable(run.rows, forwards=run.picture_cost)
        if rows:
            run.judge_pictures(rows, prompts=[run.results[row].prompt for row in rows])


class SwapBack(_WeightAttack):
    """
    Draw with the original's text encoder(s) in the erased pipeline: see [`swap_back`].

    Args:
        num_inference_steps: sampling steps of a picture.
        guidance_scale: its guidance; `None` or 1 samples without an unconditional half.
        batch_size: pictures drawn together.
        budget: as of every attack.
        seed: of no use here.
        progress: whether to show a progress bar.

    Example:

    ```python
    >>> SwapBack().attack(model, prompts, seeds=seeds, judge=judge, original=original)
    ```
    """

    needs_original = True

    def changed(self, model: "DiffusionModel", original: "DiffusionModel") -> "DiffusionModel":
        return swap_back(model, original)


class FewImageFinetuning(_WeightAttack):
    """
    Train the erased model on a few pictures of the concept, then draw: see [`few_image_finetuning`].

    What is spent on the training is divided evenly among the prompts.

    Args:
        images: pictures of the concept, at the model's image size: PIL images, arrays or paths.
        captions: one for each.
        num_steps: optimiser steps.
        learning_rate: of AdamW.
        train_batch_size: pictures in a step.
        train_parts: what is trained.
        num_inference_steps: sampling steps of a picture.
        guidance_scale: its guidance; `None` or 1 samples without an unconditional half.
        batch_size: pictures drawn together.
        budget: as of every attack; it does not bound the training, which `num_steps` does.
        seed: of the training.
        progress: whether to show a progress bar.

    Raises:
        ValueError: no pictures, another number of captions, or a number that makes no sense.
    """

    def __init__(
        self,
        *,
        images: Sequence[Any],
        captions: Sequence[str],
        num_steps: int = 100,
        learning_rate: float = 1e-5,
        train_batch_size: int = 4,
        train_parts: Sequence[str] = ("unet", "text_encoder"),
        num_inference_steps: int = 50,
        guidance_scale: float | None = 7.5,
        batch_size: int = 8,
        budget: Budget | None = None,
        seed: int = 0,
        progress: bool = True,
    ):
        super().__init__(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            batch_size=batch_size,
            budget=budget,
            seed=seed,
            progress=progress,
        )
        if not len(images) or len(images) != len(captions):
            raise ValueError(
                f"`images` has {len(images)} and `captions` {len(captions)} entries: give one caption for each picture of the "
                "concept, and at least one."
            )
        check_at_least("num_steps", num_steps, 1, "Give the optimiser steps.")
        check_at_least("train_batch_size", train_batch_size, 1, "Give the pictures of a step.")
        check_at_least("learning_rate", learning_rate, 0, "1e-5 is usual.")
        self._images, self._captions = list(images), [str(caption) for caption in captions]
        self.num_images = len(self._images)
        # So that a report tells one set of pictures from another without holding them
        self.images_digest = _digest(self._images, self._captions)
        self.num_steps, self.learning_rate = num_steps, float(learning_rate)
        self.train_batch_size, self.train_parts = train_batch_size, list(train_parts)

    def changed(self, model: "DiffusionModel", original: "DiffusionModel") -> "DiffusionModel":
        return few_image_finetuning(
            model,
            self._images,
            self._captions,
            num_steps=self.num_steps,
            learning_rate=self.learning_rate,
            batch_size=self.train_batch_size,
            train_parts=self.train_parts,
            seed=self.seed,
        )


def _digest(images: Sequence[Any], captions: Sequence[str]) -> str:
    """SHA-256 of pixels (of a path: the file's bytes) and captions, as hexadecimal digits."""
    digest = hashlib.sha256()
    for image, caption in zip(images, captions, strict=True):
        if isinstance(image, torch.Tensor):
            image = image.detach().cpu().numpy()
        if hasattr(image, "__array_interface__"):
            pixels = np.ascontiguousarray(np.asarray(image))
            digest.update(f"{pixels.shape} {pixels.dtype}".encode() + pixels.tobytes())
        else:
            with open(image, "rb") as file:
                digest.update(file.read())
        digest.update(caption.encode("utf-8", errors="surrogatepass") + b"\0")
    return digest.hexdigest()


WEIGHT_ATTACKS: dict[str, type] = {"swap_back": SwapBack, "few_image_finetuning": FewImageFinetuning}


def all_diffusion_attacks() -> dict[str, type]:
    """Every attack on diffusion models by its name on the command line."""
    from hf_robust.attacks.diffusion import DIFFUSION_ATTACKS

    return {**DIFFUSION_ATTACKS, **WEIGHT_ATTACKS}
