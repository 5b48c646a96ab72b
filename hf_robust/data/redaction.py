"""Access tokens taken out of what is logged, reported and pushed."""

import copy
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

# Shorter ones are no tokens, and words that occur in any text
_SHORTEST = 8


def without_tokens(text: str, token: str | bool | None = None) -> str:
    """
    A text with access tokens replaced by `***`.

    Args:
        text: a message.
        token: a token to replace, besides the one that the Hub's client is signed in with and all that look like one.
    """
    from huggingface_hub import get_token

    for secret in (token, get_token()):
        if isinstance(secret, str) and len(secret) >= _SHORTEST:
            text = text.replace(secret, "***")
    return re.sub(r"\bhf_[A-Za-z0-9]{16,}", "***", text)


def describe_error(error: BaseException) -> str:
    """
    Kind and message of an error, without access tokens: a server may echo what it was sent.

    Args:
        error: the error.
    """
    return without_tokens(f"{type(error).__name__}: {error}")


# Names of what is secret, however they begin: api_key, X-Api-Key, hf_token, Proxy-Authorization, clientSecret
_SECRET = re.compile(
    r"(token|(api|access|private|secret)[-_ ]?keys?|passwords?|passwd|secrets?|authorization|credentials?)$"
)
# A tokenizer's, by name or by form: `</s>`, `<|im_end|>`, `[PAD]`
_WORD_NAME = re.compile(
    r"(^|[-_])(eos|bos|pad|unk|sep|cls|mask|image|video|audio|boi|eoi|eot|eom|start|end|stop|special)[-_]token$"
)
_WORD = re.compile(r"<[^<>\s]*>|\[[A-Z_]+\]")
_USER_IN_URL = re.compile(r"(\b[a-z][a-z0-9+.-]{0,30}://)[^/\s?#]*@", re.IGNORECASE)


def redacted(value: Any, mark: str | None = "***") -> Any:
    """
    Settings without secrets, at any depth of mappings, lists, tuples and dataclasses: what stands under a name such as
    `api_key`, `hf_token` or `Authorization`, and users and passwords in URLs. Switches, counts and a tokenizer's words
    (`eos_token`) stay.

    Args:
        value: a setting, or a mapping of settings. Stays as it is.
        mark: what stands in the place of a secret.

    Returns:
        The value itself where it holds no secret; else a copy of the mappings (as `dict`), lists, tuples and dataclasses that
        lead to one.
    """
    if isinstance(value, str):
        clean = _USER_IN_URL.sub(r"\1", value)
        return value if clean == value else clean  # an enum's member remains one
    if isinstance(value, Mapping):
        found = {name: mark if _is_secret(name, item) else redacted(item, mark) for name, item in value.items()}
        return found if any(found[name] is not item for name, item in value.items()) else value
    if isinstance(value, list | tuple):
        items = [redacted(item, mark) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return items if isinstance(value, list) else tuple(items)
    if is_dataclass(value) and not isinstance(value, type):
        held = {field.name: getattr(value, field.name) for field in fields(value) if hasattr(value, field.name)}
        bare = redacted(held, mark)
        if bare is held:
            return value
        value = copy.copy(value)  # not `replace`, which would check and derive anew
        for name, item in bare.items():
            object.__setattr__(value, name, item)  # frozen ones too
    return value


def _is_secret(name: object, value: Any) -> bool:
    name = str(name).casefold()
    if value is None or isinstance(value, bool) or not _SECRET.search(name):
        return False
    if not name.endswith("token"):
        return True
    is_word = _WORD_NAME.search(name) or (isinstance(value, str) and _WORD.fullmatch(value))
    return not is_word and not isinstance(value, int | float)
