"""Which tokens of a prompt are the user's own words, or the last of them."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# First and last code point of the Unicode private-use area: text that stands for nothing, so that it can mark a place.
_PRIVATE_USE = (0xE000, 0xF8FF)


def chat_ids(tokenizer: Any, messages: list[Any], **template_kwargs: Any) -> list[int]:
    """Token ids of a rendered conversation."""
    return list(
        tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **template_kwargs)["input_ids"]
    )


def user_token_mask(
    prompt: str | list[dict[str, Any]],
    processing_class: "PreTrainedTokenizerBase",
    *,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int] | None:
    """
    Which tokens of a prompt are the user's own words.

    The chat template is rendered twice, plainly and with private-use characters around the content of each user
    message, so that a word of the user that also stands in a chat marker or a system prompt is not mistaken for it.

    Args:
        prompt: text, or messages, rendered with the generation prompt as for training.
        processing_class: the tokenizer. For messages it must be a fast one, as only these give character offsets.
        template_kwargs: further arguments of the chat template, `tools` included.

    Returns:
        One 0 or 1 for each token of the whole prompt. 1: for text, every token that is not special (the unknown token
        counts as the user's); for messages, every token that overlaps the content of a user message. `None` if that
        cannot be told: a slow tokenizer, a template that alters the content, or no user token at all.
    """
    if isinstance(prompt, str):
        encoding = processing_class(text=prompt, return_special_tokens_mask=True)
        added = {i for i, token in processing_class.added_tokens_decoder.items() if getattr(token, "special", False)}
        special = (added | set(processing_class.all_special_ids)) - {processing_class.unk_token_id}
        pairs = zip(encoding["input_ids"], encoding["special_tokens_mask"], strict=True)
        mask = [int(not is_special and token not in special) for token, is_special in pairs]
        return mask if any(mask) else None
    found = _located(prompt, processing_class, dict(template_kwargs or {}))
    if found is None:
        return None
    spans, offsets, _ = found
    return _overlapping(offsets, spans)


def suffix_token_mask(
    prompt: list[dict[str, Any]],
    suffix: str,
    processing_class: "PreTrainedTokenizerBase",
    *,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int] | None:
    """
    Which tokens of a conversation are the last characters of its last user message.

    Args:
        prompt: messages, rendered with the generation prompt as for training.
        suffix: the characters in question, as they stand in the message.
        processing_class: the tokenizer.
        template_kwargs: further arguments of the chat template, `tools` included.

    Returns:
        One 0 or 1 for each token of the whole prompt, 1 on every token that overlaps them; `None` if that cannot be told
        (see [`user_token_mask`]) or the last user message does not end in `suffix`.
    """
    found = _located(prompt, processing_class, dict(template_kwargs or {}))
    if found is None:
        return None
    spans, offsets, rendered = found
    start, end = spans[-1]
    if not suffix or not rendered[start:end].endswith(suffix):
        return None
    return _overlapping(offsets, [(end - len(suffix), end)])


def _located(
    prompt: list[dict[str, Any]], processing_class: Any, template_kwargs: dict[str, Any]
) -> tuple[list[tuple[int, int]], list[tuple[int, int]], str] | None:
    """Character spans of the user's words in the rendered conversation, those of its tokens, and itself."""
    if not processing_class.is_fast:
        return None

    def render(messages: list[dict[str, Any]]) -> str:
        kwargs = template_kwargs
        return str(processing_class.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs))

    rendered = render(prompt)
    used = set(rendered) | set(json.dumps(prompt, ensure_ascii=False, default=str))
    free = [chr(code) for code in range(*_PRIVATE_USE) if chr(code) not in used][:2]
    if len(free) < 2:
        return None
    start, end = free
    marked = render([_mark_user_content(message, start, end) for message in prompt])
    if marked.replace(start, "").replace(end, "") != rendered:
        return None
    spans = _marked_spans(marked, start, end)
    encoding = processing_class(rendered, add_special_tokens=False, return_offsets_mapping=True)
    whole = chat_ids(processing_class, prompt, add_generation_prompt=True, **template_kwargs)
    if not spans or encoding["input_ids"] != whole:
        return None
    return spans, encoding["offset_mapping"], rendered


def _overlapping(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int] | None:
    """1 for each token that overlaps a span; `None` if there is none."""
    mask = [int(any(left < span_end and right > start for start, span_end in spans)) for left, right in offsets]
    return mask if any(mask) else None


def _mark_user_content(message: dict[str, Any], start: str, end: str) -> dict[str, Any]:
    """The message with markers around its text, inside surrounding white space, which many templates strip."""
    if message["role"] != "user":
        return message

    def mark(text: Any) -> Any:
        if not isinstance(text, str) or not text.strip():
            return text
        core = text.strip()
        before, after = text.split(core, 1)
        return f"{before}{start}{core}{end}{after}"

    content = message["content"]
    if isinstance(content, list):
        blocks = [
            {**block, "text": mark(block.get("text"))} if isinstance(block, dict) and "text" in block else block
            for block in content
        ]
        return {**message, "content": blocks}
    return {**message, "content": mark(content)}


def _marked_spans(marked: str, start: str, end: str) -> list[tuple[int, int]]:
    """Character spans between the markers, counted in the text without them; empty if they do not pair up."""
    spans: list[tuple[int, int]] = []
    position, opened = 0, None
    for character in marked:
        if character == start:
            if opened is not None:
                return []
            opened = position
        elif character == end:
            if opened is None:
                return []
            spans.append((opened, position))
            opened = None
        else:
            position += 1
    return spans if opened is None else []
