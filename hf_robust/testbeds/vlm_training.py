"""How the VLM testbed's model comes about: recipe, configuration, training behind a frozen image tower."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import CLIPModel, GenerationConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from .clip_training import CLIPRecipe
from .diffusion_training import batch_indices, optimise
from .digits_data import SIZE
from .digits_training import shifted
from .small_llama import isolated_rng
from .vlm_language import CHAT_TEMPLATE, PATCH, QUESTIONS, VisualQuestion

# To be raised whenever training changes in a way that the recipe's fields do not show: it is part of the cache key.
TRAINING_VERSION = 1


@dataclass(frozen=True)
class VLMRecipe:
    """Everything that decides the VLM testbed's model.

    Attributes:
        clip: The recipe of the CLIP whose image tower it sees with; its seed and split hold for everything.
        width: Hidden size of the Llama, of four heads; its MLPs are twice as wide.
        layers: Its decoder layers.
        shift: Pixels by which training pictures are shifted at random.
        batch_size: Questions per step.
        steps: Optimizer steps.
        learning_rate: Peak learning rate (AdamW, linear warm-up, cosine to 0).
        check_pictures: Held-out pictures that the model is asked about when it is built.
        bar: Share of exact matches on them below which it is refused.
    """

    clip: CLIPRecipe = field(default_factory=CLIPRecipe)
    width: int = 64
    layers: int = 2
    shift: int = 0
    batch_size: int = 32
    steps: int = 500
    learning_rate: float = 3e-3
    check_pictures: int = 450
    bar: float = 0.9

    def __post_init__(self) -> None:
        for name in ("layers", "batch_size", "steps", "check_pictures"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least 1")
        if not 0 <= self.bar <= 1:
            raise ValueError(f"bar={self.bar!r} must be a share from 0 to 1")
        if self.width % 8:
            raise ValueError(f"width={self.width!r} must be a multiple of 8: four heads, each with rotary pairs")

    def key(self) -> str:
        """16 hexadecimal digits that change with any field, the CLIP, the language or the training code's version."""
        text = json.dumps([TRAINING_VERSION, asdict(self), self.clip.key(), QUESTIONS, CHAT_TEMPLATE], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def build_vlm(recipe: VLMRecipe, tokenizer: Any, clip: CLIPModel) -> LlavaForConditionalGeneration:
    """A LLaVA whose image tower is the CLIP's, the rest random from torch's global generator, float32."""
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=recipe.width, intermediate_size=2 * recipe.width,
        num_hidden_layers=recipe.layers, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
        tie_word_embeddings=False, **special,
    )  # fmt: skip
    model: Any = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=clip.config.vision_config,
            text_config=text,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=(SIZE // PATCH) ** 2,
        )
    )
    model.generation_config = GenerationConfig(**special)
    model.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    return model


def to_texts(processor: Any, conversations: Sequence[Any], *, prompt: bool) -> list[str]:
    """Conversations as the tokenizer takes them, with as many image tokens as the picture has patches.

    Args:
        processor: From `build_processor`.
        conversations: Lists of messages.
        prompt: Whether an answer is to follow.
    """
    # What the processor itself does where it is given the picture
    places = " ".join(["<image>"] * (SIZE // PATCH) ** 2)
    texts = [processor.apply_chat_template(messages, add_generation_prompt=prompt) for messages in conversations]
    return [text.replace("<image>", places) for text in texts]


def encode(processor: Any, questions: Sequence[VisualQuestion]) -> dict[str, torch.Tensor]:
    """Ids of prompts with answers, padded on the right, each [N, length] int64.

    Returns:
        `input_ids`, `attention_mask`, and `labels`, which are the answers with their end, -100 elsewhere.
    """
    answers = [[{"role": "assistant", "content": question.answer}] for question in questions]
    prompts = [question.prompt for question in questions]
    starts = [len(ids) for ids in processor.tokenizer(to_texts(processor, prompts, prompt=True)).input_ids]
    whole = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    rows = processor.tokenizer(to_texts(processor, whole, prompt=False)).input_ids
    length = max(map(len, rows))
    ids = torch.tensor([row + [processor.tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    places = torch.arange(length)
    mask = places < torch.tensor([[len(row)] for row in rows])
    learned = mask & (places >= torch.tensor(starts)[:, None])
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~learned, -100)}


def train_vlm(
    recipe: VLMRecipe, processor: Any, clip: CLIPModel, data: dict[str, torch.Tensor], *, progress: bool
) -> LlavaForConditionalGeneration:
    """A LLaVA trained on captions and questions, in evaluation mode; its image tower stays the CLIP's.

    Args:
        recipe: What decides it.
        processor: From `build_processor`.
        clip: Gives the image tower.
        data: `pixel_values` and `labels` of the training pictures.
        progress: Whether to show a progress bar.
    """
    kinds = list(QUESTIONS)
    # All there is to be said: one row for each kind and digit, [kinds, 10, length]
    digits = int(data["labels"].max()) + 1
    said = encode(processor, [VisualQuestion(kind, 0, label) for kind in kinds for label in range(digits)])
    with isolated_rng(recipe.clip.seed):
        model: Any = build_vlm(recipe, processor.tokenizer, clip).train()
        model.model.vision_tower.requires_grad_(False).eval()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        batches = batch_indices(len(data["labels"]) * len(kinds), recipe.batch_size, recipe.clip.seed)
        for _ in optimise(trained, recipe.steps, recipe.learning_rate, title="VLM testbed", progress=progress):
            batch = next(batches)
            picture, kind = batch // len(kinds), batch % len(kinds)
            rows = kind * digits + data["labels"][picture]
            pixel_values = shifted(data["pixel_values"][picture], recipe.shift)
            model(pixel_values=pixel_values, **{name: values[rows] for name, values in said.items()}).loss.backward()
    return model.requires_grad_(True).eval()
