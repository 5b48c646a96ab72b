"""What the VLM testbed's model is asked about a digit, its words, and how it is addressed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .digits_data import MEAN, NAMES, SIZE, STD

PAD, BOS, EOS, UNK, USER, ASSISTANT, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>", "<image>"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNK, USER, ASSISTANT, IMAGE)
PATCH = 2
"""Height and width of the image tower's patches."""

QUESTIONS = {
    "caption": "describe this picture",
    "name": "which digit is this",
    "parity": "is this digit even or odd",
    "next": "which number comes after this digit",
}
"""By kind: the first asks for a caption, the others are visual question answering."""

# Content is a text, or a list of parts as processors and TRL write it.
CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}\
{{ ' <user>' if message['role'] == 'user' else ' <assistant>' }}\
{% if message['content'] is string %}{{ ' ' + message['content'] }}{% else %}{% for part in message['content'] %}\
{{ ' <image>' if part['type'] == 'image' else ' ' + part['text'] }}{% endfor %}{% endif %}\
{% if message['role'] != 'user' %}{{ ' ' + eos_token }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ ' <assistant>' }}{% endif %}"""


def answer(kind: str, label: int) -> str:
    """The right answer to a kind of question about a digit.

    Raises:
        ValueError: Unknown kind.
    """
    if kind == "caption":
        return f"a photo of the digit {NAMES[label]}"
    if kind == "name":
        return NAMES[label]
    if kind == "parity":
        return ("even", "odd")[label % 2]
    if kind == "next":
        return (*NAMES, "ten")[label + 1]
    raise ValueError(f"kind={kind!r} is unknown; use one of {', '.join(QUESTIONS)}")


@dataclass(frozen=True)
class VisualQuestion:
    """One question about one picture.

    Attributes:
        kind: One of `QUESTIONS`.
        picture: The picture's place in its split.
        label: The digit that it shows.
    """

    kind: str
    picture: int
    label: int

    @property
    def prompt(self) -> list[dict[str, Any]]:
        """The conversation, with the picture before the question."""
        return [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTIONS[self.kind]}]},
        ]

    @property
    def answer(self) -> str:
        """The right answer."""
        return answer(self.kind, self.label)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer of questions and answers; pads on the left, adds no special tokens by itself."""
    said = [answer(kind, label) for kind in QUESTIONS for label in range(len(NAMES))]
    words = sorted({word for text in (*QUESTIONS.values(), *said) for word in text.split()})
    vocabulary = {word: number for number, word in enumerate([*SPECIAL_TOKENS, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNK,
        additional_special_tokens=[USER, ASSISTANT, IMAGE], chat_template=CHAT_TEMPLATE, padding_side="left",
        clean_up_tokenization_spaces=False, model_max_length=64,
    )  # fmt: skip


def build_processor() -> Any:
    """A LLaVA processor: the digits' size and normalisation, `build_tokenizer` and its chat template."""
    from transformers import LlavaProcessor

    # Not CLIPImageProcessor, which warns where torchvision is missing; what is saved is the same.
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    side = {"height": SIZE, "width": SIZE}
    return LlavaProcessor(
        CLIPImageProcessorPil(size=side, crop_size=side, image_mean=list(MEAN), image_std=list(STD)),
        build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )
