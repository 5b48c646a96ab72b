"""How the CLIP testbed's model comes about: its words, its recipe, its contrastive training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from .diffusion_training import batch_indices, optimise
from .digits_data import MEAN, NAMES, SIZE, STD
from .digits_training import shifted
from .small_llama import isolated_rng

# To be raised whenever training changes in a way that the recipe's fields do not show: it is part of the cache key.
TRAINING_VERSION = 1

TEMPLATES = (
    "a photo of the digit {}",
    "a picture of a {}",
    "the number {}",
    "a handwritten {}",
)
"""What the captions of a digit are; the first is that of zero-shot classification."""
PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer of the captions: bos … eos, padded on the right."""
    words = sorted({word for template in TEMPLATES for word in template.split() if word != "{}"} | set(NAMES))
    # eos must not be 2: a CLIP text model with that id looks for the highest id instead.
    vocabulary = {word: number for number, word in enumerate([PAD, BOS, UNK, EOS, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, BOS, EOS, UNK)])
    special = [(token, vocabulary[token]) for token in (BOS, EOS)]
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNK, model_max_length=16
    )


def build_processor() -> Any:
    """A CLIP processor: the digits' size and normalisation, and `build_tokenizer`."""
    from transformers import CLIPProcessor

    # Not CLIPImageProcessor, which warns where torchvision is missing; what is saved is the same.
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    side = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessorPil(size=side, crop_size=side, image_mean=list(MEAN), image_std=list(STD))
    return CLIPProcessor(images, build_tokenizer())


@dataclass(frozen=True)
class CLIPRecipe:
    """Everything that decides the CLIP testbed's model.

    Attributes:
        seed: Chooses the split, the initial weights and the order of the pictures.
        eval_share: Share of each digit's pictures that no training sees.
        width: Hidden size of both towers, of four heads each; their MLPs are twice as wide.
        vision_layers: Layers of the image tower, whose patches have 2 × 2 pixels.
        text_layers: Layers of the text tower.
        projection: Dimensions of the shared embedding.
        shift: Pixels by which training pictures are shifted at random; 0 by default, as shifts take several times the steps.
        batch_size: Pairs per step.
        steps: Optimizer steps.
        learning_rate: Peak learning rate (AdamW, linear warm-up, cosine to 0).
        bar: Zero-shot accuracy on held-out pictures below which the model is refused.
    """

    seed: int = 0
    eval_share: float = 0.25
    width: int = 64
    vision_layers: int = 4
    text_layers: int = 1
    projection: int = 32
    shift: int = 0
    batch_size: int = 64
    steps: int = 500
    learning_rate: float = 2e-3
    bar: float = 0.9

    def __post_init__(self) -> None:
        for name in ("vision_layers", "text_layers", "projection", "batch_size", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least 1")
        if not 0 <= self.bar <= 1:
            raise ValueError(f"bar={self.bar!r} must be a share from 0 to 1")
        if self.width % 4:
            raise ValueError(f"width={self.width!r} must be a multiple of 4, the number of heads")

    def key(self) -> str:
        """16 hexadecimal digits that change with any field, the language or the training code's version."""
        text = json.dumps([TRAINING_VERSION, asdict(self), MEAN, STD, TEMPLATES], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def build_clip(recipe: CLIPRecipe, tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """A CLIP with random weights from torch's global generator, float32."""
    both: dict[str, Any] = {
        "hidden_size": recipe.width,
        "intermediate_size": 2 * recipe.width,
        "num_attention_heads": 4,
        "projection_dim": recipe.projection,
    }
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "num_hidden_layers": recipe.text_layers}
    vision = {"image_size": SIZE, "patch_size": 2, "num_hidden_layers": recipe.vision_layers}
    return CLIPModel(
        CLIPConfig(
            text_config={**both, **text, **special},
            vision_config={**both, **vision},
            projection_dim=recipe.projection,
        )
    )


def captions(labels: Sequence[int], generator: torch.Generator) -> list[str]:
    """One caption for each label, its template drawn at random."""
    drawn = torch.randint(len(TEMPLATES), (len(labels),), generator=generator).tolist()
    return [TEMPLATES[which].format(NAMES[label]) for which, label in zip(drawn, labels, strict=True)]


def train_clip(
    recipe: CLIPRecipe, tokenizer: PreTrainedTokenizerFast, data: dict[str, torch.Tensor], *, progress: bool
) -> CLIPModel:
    """A CLIP trained on pictures with captions, in evaluation mode.

    The loss is CLIP's, but what a picture should match is every caption of its digit in the batch, in equal parts: with ten
    classes, most of the batch's other pairs would otherwise be false negatives.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    with isolated_rng(recipe.seed):
        model: Any = build_clip(recipe, tokenizer).train()
        batches = batch_indices(len(data["labels"]), recipe.batch_size, recipe.seed)
        for _ in optimise(
            model.parameters(), recipe.steps, recipe.learning_rate, title="CLIP testbed", progress=progress
        ):
            batch = next(batches)
            labels = data["labels"][batch]
            texts = tokenizer(captions(labels.tolist(), generator), padding=True, return_tensors="pt")
            pixel_values = shifted(data["pixel_values"][batch], recipe.shift)
            similarities = model(
                input_ids=texts["input_ids"], attention_mask=texts["attention_mask"], pixel_values=pixel_values
            ).logits_per_image
            same = labels[:, None].eq(labels).float()
            targets = same / same.sum(1, keepdim=True)
            # Symmetric in pictures and captions, as `same` is
            loss = F.cross_entropy(similarities, targets) + F.cross_entropy(similarities.T, targets)
            (loss / 2).backward()
    return model.eval()
