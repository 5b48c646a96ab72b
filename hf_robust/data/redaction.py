"""Access tokens and other secrets taken out of what is logged, saved, reported and pushed."""

import base64
import binascii
import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar

MARK = "***"

T = TypeVar("T")

# Shorter ones are no tokens, and words that occur in any text
_SHORTEST = 8


def _without_basic(found: re.Match[str]) -> str:
    """`Basic` and a user and password in base64; anything else is English."""
    try:
        held = base64.b64decode(found[2], validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return found[0]
    return f"{found[1]}{MARK}" if ":" in held and held.isprintable() else found[0]


# What is a secret wherever it stands. Bounded looks ahead keep the time linear in the length of a text.
_IN_TEXT: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    # Users and passwords in URLs
    (re.compile(r"(\b[a-z][a-z0-9+.-]{0,30}://)[^/\s?#\"<>]*@", re.IGNORECASE), r"\1"),
    # Parameters of URLs: ?key=, &access_token=, &X-Amz-Signature=
    (
        re.compile(
            r"((?:[?&#]|&amp;|\\u0026)(?:key|sig|auth|pwd|pass|[\w.~-]{0,40}?(?:token|signature|secret|passw(?:or)?d|passphrase"
            r"|credentials?|api[-_.]?key|(?:access|account|subscription)[-_.]?key(?:[-_.]?id)?))=)"
            r"[^&#\s\"'<>\\`|]*[^&#\s\"'<>\\`|.,;:!?)\]}]",
            re.IGNORECASE,
        ),
        rf"\1{MARK}",
    ),
    # Headers, and names with a value that no word is: `Bearer …`, `api_key='…'`, `X-Api-Key: …`
    (re.compile(r"(\bbearer\s+)(?=[\w.~+/=-]{0,64}?\d)[\w.~+/=-]{12,}", re.IGNORECASE), rf"\1{MARK}"),
    (re.compile(r"(\bbasic\s+)([A-Za-z0-9+/]{8,}={0,2})", re.IGNORECASE), _without_basic),
    (
        re.compile(
            r"((?:(?:api|access|private|secret|account|subscription)[-_ ]?key(?:[-_ ]?id)?|(?:auth|access|refresh)[-_ ]?token"
            r"|(?:client|api)[-_ ]?secret|password|passwd|passphrase|authorization|cookie)[\"']?\s{0,4}[:=]\s{0,4}[\"']?"
            r"(?:token\s+)?)(?=[\w.~+/=%-]{0,64}?\d)[\w.~+/=%-]{16,}",
            re.IGNORECASE,
        ),
        rf"\1{MARK}",
    ),
    # Known forms, of the Hub, OpenAI and those that took after it, GitHub, Google, Amazon, and JSON Web Tokens
    (
        re.compile(
            r"(?<![A-Za-z0-9])(?:(?:hf|api_org)_[A-Za-z0-9]{16,}"
            r"|(?:sk-|gsk_|xai-|nvapi-|gh[oprsu]_|github_pat_)(?=[\w-]{0,64}?[A-Za-z0-9]{16})[\w-]+"
            r"|AIza[\w-]{30,}|A[KS]IA[A-Z0-9]{16}\b|eyJ[\w-]{8,4096}\.eyJ[\w-]{8,}\.[\w-]*)"
        ),
        MARK,
    ),
)

# Names of what is secret, however they begin: api_key, X-Api-Key, hf_token, Proxy-Authorization, clientSecret
_SECRET = re.compile(
    r"(token|(auth|access|refresh|bearer|api|hub|hf)[-_ ]?tokens|(api|access|private|secret|account|subscription)[-_ ]?keys?"
    r"|access[-_ ]?key[-_ ]?ids?|passwords?|passwd|passphrases?|pwd|secrets?|credentials?|cookies?|bearer"
    r"|(^|[-_ ]|basic|http|proxy)auth|auth[-_ ]?headers?|authorization([-_ ]?headers?)?)$"
)
# How many, rather than which
_COUNTED = re.compile(r"(tokens?|cookies?)$")
# A tokenizer's, by name or by form: `</s>`, `<|im_end|>`, `[PAD]`
_WORD_NAME = re.compile(
    r"(^|[-_])(eos|bos|pad|unk|sep|cls|mask|image|video|audio|boi|eoi|eot|eom|start|end|stop|special)[-_]token$"
)
_WORD = re.compile(r"<[^<>\s]*>|\[[A-Z_]+\]")


def without_tokens(value: T, token: str | bool | None = None) -> T:
    """
    A text, or all texts in plain values, with secrets replaced by `***`: what looks like a key or an access token, values of
    `Authorization`, of parameters of URLs such as `?key=` and of names such as `api_key=`; users and passwords in URLs go.
    Doing it twice changes nothing more.

    Args:
        value: a message, or a mapping, list, tuple or dataclass at any depth. Stays as it is.
        token: a token to replace, besides the one that the Hub's client is signed in with.

    Returns:
        The value itself where it holds no secret; else a copy, see [`redacted`].
    """
    return _cleaned(value, MARK, _known(token), by_name=False)


def describe_error(error: BaseException) -> str:
    """
    Kind and message of an error, without secrets: a server may echo what it was sent.

    Args:
        error: the error.
    """
    return without_tokens(f"{type(error).__name__}: {error}")


def redacted(value: Any, mark: str | None = MARK) -> Any:
    """
    Settings without secrets, at any depth of mappings, lists, tuples and dataclasses: what stands under a name such as
    `api_key`, `hf_token` or `Authorization`, and in any text what [`without_tokens`] replaces. Switches, counts, enum members
    and a tokenizer's words (`eos_token`) stay.

    Args:
        value: a setting, or a mapping of settings. Stays as it is.
        mark: what stands in the place of a secret that its name gives away.

    Returns:
        The value itself where it holds no secret; else a copy of the mappings (as `dict`), lists, tuples and dataclasses that
        lead to one.
    """
    return _cleaned(value, mark, _known(), by_name=True)


def _known(token: str | bool | None = None) -> list[str]:
    from huggingface_hub import get_token

    return [known for known in (token, get_token()) if isinstance(known, str) and len(known) >= _SHORTEST]


def _cleaned(value: Any, mark: str | None, known: list[str], *, by_name: bool) -> Any:
    def inner(item: Any) -> Any:
        return _cleaned(item, mark, known, by_name=by_name)

    if isinstance(value, str):
        clean = str(value.value) if isinstance(value, Enum) else value
        for secret in known:
            clean = clean.replace(secret, MARK)
        for pattern, put in _IN_TEXT:
            clean = pattern.sub(put, clean)
        return value if clean == value else clean  # an enum's member remains one
    if isinstance(value, Mapping):
        found = [
            (
                inner(name) if isinstance(name, str) else name,
                mark if by_name and _is_secret(name, item) else inner(item),
            )
            for name, item in value.items()
        ]
        same = all(a is b and c is d for (a, c), (b, d) in zip(found, value.items(), strict=True))
        return value if same else dict(found)
    if isinstance(value, list | tuple):
        items = [inner(item) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return items if isinstance(value, list) else tuple(items)
    if is_dataclass(value) and not isinstance(value, type):
        held = {field.name: getattr(value, field.name) for field in fields(value) if hasattr(value, field.name)}
        bare = inner(held)
        if bare is held:
            return value
        value = copy.copy(value)  # not `replace`, which would check and derive anew
        for name, item in bare.items():
            object.__setattr__(value, name, item)  # frozen ones too
    return value


def _is_secret(name: object, value: Any) -> bool:
    name = str(name).casefold()
    if value is None or isinstance(value, bool | Enum) or not _SECRET.search(name):
        return False
    if not _COUNTED.search(name):
        return True
    is_word = _WORD_NAME.search(name) or (isinstance(value, str) and _WORD.fullmatch(value))
    return not is_word and not isinstance(value, int | float)
