"""Captions and answers about images while their pixels are attacked: exact match of vision-language models."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_robust.attacks.generation import evaluating
from hf_robust.attacks.gradient import SearchResult
from hf_robust.data.behavior import Behavior
from hf_robust.metrics.arithmetic import exact_matches
from hf_robust.objectives import per_row_mean, token_nll
from hf_robust.report.report import Report
from hf_robust.report.vision_attacks import run_attack
from hf_robust.report.vision_data import Images, questioned_images
from hf_robust.report.vision_evaluation import evaluate_task
from hf_robust.report.vision_tasks import Answer, device_of
from hf_robust.sites import LabelIndex, PixelUnits, label_logits, quiet
from hf_robust.sites.image_layout import ImageLayout
from hf_robust.threats import check_at_least

_REPEATABLE = 1e-4


def evaluate_vlm(
    model: nn.Module,
    processor: Any,
    *,
    dataset: Any,
    attacks: Mapping[str, Any],
    max_new_tokens: int = 32,
    sanity_images: int = 32,
    output_dir: str | Path | None = None,
    overwrite: bool = False,
    subject: str = "model",
    batch_size: int = 16,
    progress: bool = True,
) -> Report:
    """
    Robustness of a vision-language model on captions or questions about images: the share of greedy answers that are the
    right one word for word (case and white space aside), without attack and under attacks on the pixels.

    An attack maximises the language-modelling loss of the right answer, the mean over its tokens, after the prompt; the model
    then answers freely. Rows that are wrong without attack are not attacked. Everything else is as in
    [`~hf_robust.report.evaluate_vision`].

    δ is a perturbation of an image, `[batch, channels, height, width]` in the units of `pixel_values`: after resizing and
    cropping (LLaVA-1.5, Qwen-VL, whose patches are cut from it), or as it comes from the dataset where its tiles are
    (LLaVA-NeXT). What the model is given is made of it as the processor does: see [`~hf_robust.sites.image_layout`]. Images
    of one batch must have one size where the processor keeps their sizes.

    Args:
        model: vision-language model, or a PEFT model around one. It is the same afterwards.
        processor: its processor: image processor, tokenizer, and the image token's place in a prompt.
        dataset: rows with `image`, `answer` (or `caption`, `completion`) and, unless it is about captions, `question` (or
            `prompt`). A row's `category` gives figures by category.
        attacks: by name: [`~hf_robust.attacks.PGD`], [`~hf_robust.attacks.APGD`], or
            [`~hf_robust.report.vision_attacks.RandomNoise`]; objects whose `search` takes an `objective`.
        max_new_tokens: length of an answer at most.
        sanity_images: see [`~hf_robust.report.evaluate_vision`].
        output_dir: likewise.
        overwrite: likewise.
        subject: likewise.
        batch_size: likewise.
        progress: likewise.

    Returns:
        The report: `accuracy` and `robust_accuracy` are shares of exact matches.

    Raises:
        ValueError: no rows, a row without an answer, images of several sizes in a batch or of an unknown layout, or an output
            folder of another evaluation.
        TypeError: an attack that takes no `objective`.
    """
    check_at_least("max_new_tokens", max_new_tokens, 1, "Give the length of an answer.")
    for name, attack in attacks.items():
        if "objective" not in inspect.signature(getattr(attack, "search", lambda: None)).parameters:
            raise TypeError(
                f"`attacks[{name!r}]` ({type(attack).__name__}) takes no `objective`, so it cannot attack answers: use PGD, "
                "APGD or RandomNoise."
            )
    return evaluate_task(
        AnswerTask(model, processor, dataset, max_new_tokens),
        attacks=attacks,
        sanity_images=sanity_images,
        output_dir=output_dir,
        overwrite=overwrite,
        subject=subject,
        batch_size=batch_size,
        progress=progress,
    )


class AnswerTask:
    """
    Images, questions and their right answers.

    Args:
        model: vision-language model.
        processor: its processor.
        dataset: see [`evaluate_vlm`].
        max_new_tokens: likewise.
    """

    pipeline_tag = "image-text-to-text"
    num_classes = None
    class_names: Sequence[str] = ()

    def __init__(self, model: nn.Module, processor: Any, dataset: Any, max_new_tokens: int):
        for name in ("image_processor", "tokenizer"):
            if getattr(processor, name, None) is None:
                raise ValueError(
                    f"`processor` ({type(processor).__name__}) has no `{name}`: give the model's processor."
                )
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        self.image_processor = processor.image_processor
        self.images = Images(dataset, self.image_processor)
        self.behaviors = questioned_images(dataset, self.images)

    @property
    def measure(self) -> str:
        """What counts as right."""
        return f"exact match of the greedy answer, {self.max_new_tokens} tokens at most, case and white space aside"

    def inputs(self, batch: Sequence[Behavior]) -> dict[str, Any]:
        """Prompts, prompts with their answers, and pixel values."""
        pictures, device = self.images.pictures(batch), device_of(self.model)
        prompts = [self._prompt(behavior.prompt) for behavior in batch]
        whole = [
            prompt + ("" if prompt.endswith((" ", "\n")) else " ") + str(behavior.answer)
            for prompt, behavior in zip(prompts, batch, strict=True)
        ]
        asked, answered = (self._tokens(texts, pictures).to(device) for texts in (prompts, whole))
        labels = torch.full_like(answered["input_ids"], -100)
        for row in range(len(batch)):
            place = _after_prompt(asked, answered, row)
            labels[row, place:] = answered["input_ids"][row, place:]
        if bool((labels == -100).all(dim=1).any()):
            raise ValueError(
                "An answer has no tokens of its own after its prompt: check the processor's chat template."
            )
        cut = asked["pixel_values"].dim() != 4
        return {
            "pixel_values": self.images.pixel_values(batch, device),
            "layout": ImageLayout(self.image_processor, asked) if cut else None,
            "asked": _without_pixels(asked),
            "answered": _without_pixels(answered),
            "labels": labels,
            "answers": [str(behavior.answer) for behavior in batch],
        }

    def attack(self, attack: Any, inputs: Mapping[str, Any]) -> SearchResult:
        """Run an attack on a batch."""
        index = LabelIndex.from_labels(inputs["labels"])

        def objective(delta: torch.Tensor) -> tuple[torch.Tensor, None]:
            return -self._loss(inputs, index, inputs["pixel_values"] + delta), None

        return run_attack(attack, self.model, inputs["pixel_values"], labels=None, objective=objective)

    @torch.no_grad()
    def answers(self, inputs: Mapping[str, Any], pixel_values: torch.Tensor) -> list[Answer]:
        """What the model says of these pixels."""
        model: Any = self.model
        asked = inputs["asked"]
        with evaluating(model):
            ids = model.generate(
                **asked,
                pixel_values=self._given(inputs, pixel_values),
                do_sample=False,
                num_beams=1,
                max_new_tokens=self.max_new_tokens,
            )
        new = ids[:, asked["input_ids"].shape[1] :]
        said = [text.strip() for text in self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)]
        right = exact_matches(said, inputs["answers"], ignore_case=True)
        loss = self._losses(inputs, pixel_values)
        return [
            Answer(ok and fine, text, None, fine)
            for ok, text, fine in zip(right, said, loss.isfinite().tolist(), strict=True)
        ]

    @torch.no_grad()
    def repeatable(self, inputs: Mapping[str, Any]) -> list[bool]:
        """Whether the loss of each answer is the same when computed twice."""
        first, second = (self._losses(inputs, inputs["pixel_values"]) for _ in range(2))
        same = (first - second).abs() <= _REPEATABLE * first.abs().clamp(min=1e-6)
        return (same | ~first.isfinite() | ~second.isfinite()).tolist()

    def units(self, channels: int) -> PixelUnits:
        """The scale of the pixel values."""
        return PixelUnits(self.image_processor, channels=channels)

    @property
    def _dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    def _given(self, inputs: Mapping[str, Any], pixel_values: torch.Tensor) -> torch.Tensor:
        """What the model is given of images: themselves, patches or tiles."""
        if inputs["layout"] is not None:
            gain = self.units(pixel_values.shape[1]).radius(1.0).to(pixel_values.device)
            pixel_values = inputs["layout"].place(list((pixel_values - inputs["pixel_values"]) / gain))
        return pixel_values.to(self._dtype)

    def _prompt(self, question: str) -> str:
        if getattr(self.processor, "chat_template", None):
            parts = [{"type": "image"}, *([{"type": "text", "text": question}] if question else [])]
            return self.processor.apply_chat_template(
                [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
            )
        token = getattr(self.processor, "image_token", "<image>")
        return question if token in question else f"{token}\n{question}"

    def _tokens(self, texts: list[str], pictures: list[Any]) -> Any:
        tokenizer = self.processor.tokenizer
        side, tokenizer.padding_side = tokenizer.padding_side, "left"
        try:
            return self.processor(images=pictures, text=texts, padding=True, return_tensors="pt")
        finally:
            tokenizer.padding_side = side

    def _losses(self, inputs: Mapping[str, Any], pixel_values: torch.Tensor) -> torch.Tensor:
        with quiet(self.model):
            return self._loss(inputs, LabelIndex.from_labels(inputs["labels"]), pixel_values)

    def _loss(self, inputs: Mapping[str, Any], index: LabelIndex, pixel_values: torch.Tensor) -> torch.Tensor:
        """Mean negative log-likelihood of each answer's tokens, `[batch]`."""
        logits = label_logits(self.model, index, **inputs["answered"], pixel_values=self._given(inputs, pixel_values))
        return per_row_mean(token_nll(logits, index.targets), index.rows, index.counts)


def _without_pixels(tokens: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in tokens.items() if name != "pixel_values"}


def _after_prompt(asked: Mapping[str, torch.Tensor], answered: Mapping[str, torch.Tensor], row: int) -> int:
    """Where in a row of prompt and answer, padded on the left, the tokens begin that the prompt alone does not have."""
    starts = [int((given["attention_mask"][row] != 0).int().argmax()) for given in (asked, answered)]
    prompt, whole = (given["input_ids"][row, start:] for given, start in zip((asked, answered), starts, strict=True))
    shared = min(len(prompt), len(whole))
    differ = (prompt[:shared] != whole[:shared]).nonzero()
    return starts[1] + (int(differ[0]) if len(differ) else shared)
