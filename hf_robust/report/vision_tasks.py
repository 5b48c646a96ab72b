"""What an image model is asked, and whether its answer is right: classification, and classification by class texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_robust.attacks.gradient import SearchResult
from hf_robust.attacks.vision.classifier import logits_of
from hf_robust.data.behavior import Behavior
from hf_robust.report.vision_attacks import run_attack
from hf_robust.report.vision_data import Images, labelled_images
from hf_robust.sites import PixelUnits, quiet
from hf_robust.sites.pixels import image_channels

_REPEATABLE = 1e-4


@dataclass(frozen=True)
class Answer:
    """
    What a model said of an image.

    Attributes:
        right: whether it is the right answer.
        said: the answer.
        score: margin of the right class over the best other one (logits), or `None`.
        finite: whether the model's output was finite.
    """

    right: bool
    said: str
    score: float | None
    finite: bool


class ClassificationTask:
    """
    Images and their classes.

    Args:
        model: classifier: returns logits, as `.logits` or as they are.
        dataset: see [`~hf_robust.report.evaluate_vision`].
        image_processor: likewise.
        class_names: by number.
    """

    pipeline_tag = "image-classification"
    measure = "the class of the highest logit"

    def __init__(self, model: nn.Module, dataset: Any, image_processor: Any, class_names: Sequence[str]):
        self.model, self.class_names, self.image_processor = model, list(class_names), image_processor
        channels = image_channels(getattr(model, "config", None))
        self.images = Images(dataset, image_processor, channels)
        self.behaviors, labels = labelled_images(dataset, self.images, self.class_names)
        self._labels = {behavior.id: label for behavior, label in zip(self.behaviors, labels, strict=True)}

    @property
    def num_classes(self) -> int | None:
        """Number of classes."""
        return len(self.class_names)

    def inputs(self, batch: Sequence[Behavior]) -> dict[str, torch.Tensor]:
        """Pixel values and labels of some images."""
        device = device_of(self.model)
        labels = torch.tensor([self._labels[behavior.id] for behavior in batch], device=device)
        return {"pixel_values": self.images.pixel_values(batch, device), "labels": labels}

    def attack(self, attack: Any, inputs: Mapping[str, torch.Tensor]) -> SearchResult:
        """Run an attack on a batch."""
        return run_attack(attack, self.model, inputs["pixel_values"], labels=inputs["labels"])

    @torch.no_grad()
    def answers(self, inputs: Mapping[str, torch.Tensor], pixel_values: torch.Tensor) -> list[Answer]:
        """What the model says of these pixels."""
        with quiet(self.model):
            logits = logits_of(self.model, pixel_values)
        if logits.dim() != 2 or logits.shape[1] != len(self.class_names):
            raise ValueError(
                f"`model` gives logits of shape {list(logits.shape)} for {len(pixel_values)} images and "
                f"{len(self.class_names)} class names: give `class_names`, one for each class."
            )
        labels = inputs["labels"]
        said = logits.argmax(dim=1)
        own = logits.gather(1, labels[:, None]).squeeze(1)
        margin = own - logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
        finite = logits.isfinite().all(dim=1)
        # A tie goes to the attacker, and NaN is no answer
        right = (said == labels) & (margin > 0) & finite
        return [
            Answer(ok, self.class_names[index], score if fine else None, fine)
            for ok, index, score, fine in zip(
                right.tolist(), said.tolist(), margin.tolist(), finite.tolist(), strict=True
            )
        ]

    @torch.no_grad()
    def repeatable(self, inputs: Mapping[str, torch.Tensor]) -> list[bool]:
        """Whether the model says the same of each image when asked twice."""
        with quiet(self.model):
            first, second = (logits_of(self.model, inputs["pixel_values"]) for _ in range(2))
        scale = first.abs().amax(dim=1).clamp(min=1e-12)
        same = (first - second).abs().amax(dim=1) <= _REPEATABLE * scale
        return (same | ~(first.isfinite().all(dim=1) & second.isfinite().all(dim=1))).tolist()

    def units(self, channels: int) -> PixelUnits:
        """The scale of the pixel values."""
        return PixelUnits(self.image_processor, channels=channels)


class ZeroShotClassifier(nn.Module):
    """
    A CLIP model as an image classifier: logits are the similarities of an image to class texts, which are encoded once.

    Every attack on classifiers applies to it. With several templates the class's embedding is the normalised mean of those of
    its texts (Radford et al. 2021, arXiv 2103.00020).

    Args:
        model: CLIP-like model with `get_text_features`, `get_image_features` and `logit_scale`.
        processor: its processor (or tokenizer), which makes tokens of texts.
        class_names: of the classes, in the labels' order.
        templates: texts with `{}` in the place of the class name.

    Raises:
        TypeError: the model is not CLIP-like.
        ValueError: no class, or a template without `{}`.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        class_names: Sequence[str],
        templates: Sequence[str] = ("a photo of a {}.",),
    ):
        super().__init__()
        for name in ("get_text_features", "get_image_features", "logit_scale"):
            if not hasattr(model, name):
                raise TypeError(f"`model` ({type(model).__name__}) has no `{name}`: give a CLIP model.")
        if isinstance(class_names, str) or not class_names:
            raise ValueError(f"`class_names={class_names!r}` must be a list of at least one name.")
        if isinstance(templates, str) or not templates or not all("{}" in template for template in templates):
            raise ValueError(f"`templates={templates!r}` must be texts with {{}} in the place of the class name.")
        self.clip: Any = model
        self.class_names, self.templates = list(class_names), list(templates)
        self.config = getattr(model, "config", None)
        self.name_or_path = getattr(model, "name_or_path", "")
        self.class_embeddings: torch.Tensor
        self.register_buffer("class_embeddings", self._encode(getattr(processor, "tokenizer", processor)), False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Logits.

        Args:
            pixel_values: `[batch, channels, height, width]`.

        Returns:
            `[batch, classes]` in float32.
        """
        features = _tensor(self.clip.get_image_features(pixel_values=pixel_values)).float()
        scale = self.clip.logit_scale.float().exp()
        return scale * nn.functional.normalize(features, dim=-1) @ self.class_embeddings.T

    @torch.no_grad()
    def _encode(self, tokenizer: Any) -> torch.Tensor:
        rows = []
        padding: dict[str, Any] = {"padding": True}
        if "siglip" in str(getattr(self.config, "model_type", "")):
            # It pools the last position, and was trained on texts padded to their full length
            length = self.clip.config.text_config.max_position_embeddings
            padding = {"padding": "max_length", "max_length": length}
        with quiet(self.clip):
            for name in self.class_names:
                texts = [template.format(name) for template in self.templates]
                tokens = tokenizer(texts, truncation=True, return_tensors="pt", **padding).to(device_of(self.clip))
                given = {key: tokens[key] for key in ("input_ids", "attention_mask") if key in tokens}
                features = nn.functional.normalize(_tensor(self.clip.get_text_features(**given)).float(), dim=-1)
                rows.append(nn.functional.normalize(features.mean(dim=0), dim=-1))
        return torch.stack(rows)


class ZeroShotTask(ClassificationTask):
    """Images and class texts: a [`ClassificationTask`] of a [`ZeroShotClassifier`]."""

    pipeline_tag = "zero-shot-image-classification"
    measure = "the class text of the highest similarity"


def device_of(model: nn.Module) -> torch.device:
    """Device of a model's weights; the CPU where it has none."""
    tensor = next((t for t in [*model.parameters(), *model.buffers()]), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _tensor(output: Any) -> torch.Tensor:
    """Features, where a version of transformers returns them within an output."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output
