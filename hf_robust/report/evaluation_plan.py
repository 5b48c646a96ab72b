"""What an evaluation is about to do, as plain values: two runs with equal plans give equal figures."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_robust.attacks.registry import ATTACKS
from hf_robust.data.redaction import MARK, redacted, without_tokens
from hf_robust.report.report import write_json

# Values hashed of each tensor, evenly spread: any training moves some of them, and a model of 70B parameters is read in
# seconds.
_SAMPLES = 1024


def settings_of(attack: Any) -> dict[str, Any]:
    """
    Settings of an attack as JSON values: `class`, `attack` (its name in the registry, if it has one), and every public
    attribute but the progress bar. Infinite numbers become `"inf"`, objects the name of their class or function, secrets
    `"***"` (see [`~hf_robust.data.redaction.redacted`]).

    Args:
        attack: any attack whose settings are plain attributes.
    """
    names = {cls: name for name, cls in ATTACKS.items()}
    found: dict[str, Any] = {"class": type(attack).__name__}
    if type(attack) in names:
        found["attack"] = names[type(attack)]
    public = {
        name: value
        for name, value in vars(attack).items()
        if not name.startswith("_") and name not in ("progress", "generator")
    }
    return found | {name: _plain(value) for name, value in redacted(public).items()}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        # Not asdict, which would copy a model held in a field
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if callable(getattr(value, "attack", None)):
        return settings_of(value)  # an attack that wraps another one
    if isinstance(value, nn.Module):
        return fingerprint(value)
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """
    What tells one model from another: name, adapters, number and dtypes of its weights, and a digest of their names, shapes
    and a sample of their values.

    Args:
        model: causal language model or PEFT model.

    Returns:
        `name`, `adapters`, `dtype`, `parameters` and `weights` (SHA-256 as hexadecimal digits).
    """
    digest, dtypes, count = hashlib.sha256(), set(), 0
    for name, tensor in model.named_parameters():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.device.type != "meta" and tensor.numel():
            step = max(1, tensor.numel() // _SAMPLES)
            values = tensor.detach().flatten()[::step].contiguous().view(torch.uint8)
            digest.update(values.cpu().numpy().tobytes())
        dtypes.add(str(tensor.dtype).removeprefix("torch."))
        count += tensor.numel()
    return {
        "name": model_name(model),
        "adapters": _adapters(model),
        "dtype": ", ".join(sorted(dtypes)),
        "parameters": count,
        "weights": digest.hexdigest(),
    }


def _adapters(model: nn.Module) -> list[str]:
    """Active PEFT adapters; none where the model has none or they are switched off."""
    if not hasattr(model, "peft_config"):
        return []
    active: Any = getattr(model, "active_adapters", [])
    active = active() if callable(active) else active
    return sorted([active] if isinstance(active, str) else active)


def model_name(model: Any) -> str:
    """The name or path that the base model was loaded from; its class where it was made on the spot."""
    base = getattr(model, "get_base_model", lambda: model)()
    config = getattr(base, "config", None)  # of a diffusion pipeline, which has no name itself
    return getattr(base, "name_or_path", "") or getattr(config, "name_or_path", "") or type(base).__name__


def describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """What of a tokenizer decides on what a model reads: class, size and a digest of the chat template."""
    template = json.dumps(getattr(tokenizer, "chat_template", None))
    return {
        "class": type(tokenizer).__name__,
        "tokens": len(tokenizer),
        "chat_template": hashlib.sha256(template.encode()).hexdigest(),
    }


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """
    Where two plans differ: `"attacks.gcg.num_steps (50 before, 60 now)"`. What is redacted in the new one is not compared: an
    older version may have kept it in the old one.

    Args:
        old: plain values.
        new: plain values.
        name: of the place in the plan.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(key for key in new if key not in old)]
        missing = "nothing"
        return [
            line
            for key in names
            for line in differences(old.get(key, missing), new.get(key, missing), f"{name}.{key}" if name else key)
        ]

    def short(value: Any) -> str:
        text = value if isinstance(value, str) else json.dumps(value)
        return text if len(text) <= 40 else f"{text[:37]}..."

    return [] if new in (old, MARK) else [f"{name} ({short(old)} before, {short(new)} now)"]


def check_plan(path: Path, plan: dict[str, Any], argument: str = "output_dir") -> None:
    """
    Write the plan, without access tokens and keys, or make sure that what was begun in this folder followed the same one.

    Args:
        path: plan.json.
        plan: plain values.
        argument: what the user calls the folder, for errors.

    Raises:
        ValueError: the folder holds work of another plan; the message names the differences.
    """
    plan = without_tokens(json.loads(json.dumps(plan)))
    if not path.is_file():
        write_json(path, plan)
        return
    discard = "pass `overwrite=True` to discard" if argument == "output_dir" else "delete"
    remedy = f"Choose another `{argument}`, or {discard} the work that is there."
    try:
        old = without_tokens(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"`{argument}={str(path.parent)!r}`: plan.json cannot be read ({error}). {remedy}") from error
    found = differences(old, plan)
    if found:
        shown = "; ".join(found[:8]) + ("; …" if len(found) > 8 else "")
        raise ValueError(
            f"`{argument}={str(path.parent)!r}` holds another evaluation, which differs in {shown}. {remedy}"
        )
