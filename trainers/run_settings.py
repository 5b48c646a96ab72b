"""What decides on the steps of training: stated in the card, written into checkpoints, and the same in a resumed run."""

import dataclasses
import enum
import inspect
from collections.abc import Mapping
from typing import Any

from accelerate.utils import is_peft_model
from peft import PeftModel
from torch import nn

from hf_robust.report.evaluation_plan import fingerprint

# Settings of the parents that decide what training does; those of our own configurations are all listed
_PARENT_SETTINGS = (
    "learning_rate", "lr_scheduler_type", "optim", "weight_decay", "max_grad_norm", "per_device_train_batch_size",
    "gradient_accumulation_steps", "num_train_epochs", "max_length", "bf16", "fp16", "seed", "beta", "loss_type",
)  # fmt: skip
# Those that the card leaves out, and that make a resumed run another all the same
_RESUMED_SETTINGS = (
    "warmup_steps", "lr_scheduler_kwargs", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "label_smoothing_factor",
    "label_smoothing", "data_seed", "neftune_noise_alpha", "packing", "completion_only_loss", "assistant_only_loss",
    "truncation_mode", "train_sampling_strategy", "average_tokens_across_devices", "dataloader_drop_last", "ignore_data_skip",
)  # fmt: skip
# Of `accelerator_config`: which rows a step sees
_ACCELERATOR_SETTINGS = ("split_batches", "even_batches", "use_seedable_sampler")
# Own settings that change no step of training: a resumed run may have others. The noise policy comes with the checkpoint.
_FREE_SETTINGS = (
    "profile", "noise_policy", "attack_batch_size", "latent_bank_dir", "latent_bank_batch_size", "prefix_sharing",
)  # fmt: skip
# Of an adapter's configuration: what PEFT notes by itself, and what the task and the base model decide
_FREE_ADAPTER_SETTINGS = (
    "inference_mode", "revision", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path",
)  # fmt: skip
# Files may move between two runs
_PLACES = ("_path", "_file", "_dir", "_folder")
# Values of `init_lora_weights` that leave the base model as it is; the others decompose it, with other last digits elsewhere
_INITIALISES_ADAPTER_ONLY = (True, False, "gaussian", "eva", "orthogonal")


def setting_names(args: Any) -> list[str]:
    """All fields of our own configuration, and those of the parents that decide what training does."""
    inherited = {f.name for cls in type(args).__mro__ if "hf_robust" not in cls.__module__ for f in _fields(cls)}
    own = [f.name for f in dataclasses.fields(args) if f.name not in inherited]
    return list(dict.fromkeys([*own, *(name for name in _PARENT_SETTINGS if hasattr(args, name))]))


def stated_settings(trainer: Any, peft: Any) -> dict[str, Any]:
    """
    What no field of the configuration tells.

    Args:
        trainer: of the run.
        peft: the active adapter's configuration, if there is one.
    """
    settings: dict[str, Any] = {"trainer": type(trainer).__name__, "processes": trainer.args.world_size}
    if peft is not None:
        modules = getattr(peft, "target_modules", None)
        if isinstance(modules, set | list):
            modules = ", ".join(sorted({module.rpartition(".")[2] for module in modules}))
        sizes = f", r {peft.r}, alpha {peft.lora_alpha}" if hasattr(peft, "lora_alpha") else ""
        settings["adapter"] = f"{type(peft).__name__}{sizes}" + (f", on {modules}" if modules else "")
    return settings


def active_adapter(model: Any) -> Any:
    """Configuration of the adapter in use; `None` without."""
    return model.peft_config[model.active_adapter] if is_peft_model(model) else None


def plain(value: Any) -> Any:
    """An enumeration's value, everything else as it is."""
    return getattr(value, "value", value)


def run_settings(trainer: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """
    What a resumed run has to have in common with the one that wrote the checkpoint, but for [`adapter_settings`].

    Args:
        trainer: of the run.
        data: its datasets by the name of the argument.

    Returns:
        Values by name.
    """
    args, peft = trainer.args, active_adapter(trainer.model)
    settings = {"adapter": "none", **stated_settings(trainer, peft)}
    resumed = [name for name in _RESUMED_SETTINGS if hasattr(args, name)]
    settings |= {name: plain(getattr(args, name)) for name in [*setting_names(args), *resumed]}
    accelerator = {name: getattr(args.accelerator_config, name, None) for name in _ACCELERATOR_SETTINGS}
    settings |= {f"accelerator_config.{name}": value for name, value in accelerator.items()}
    settings |= {f"rows of {name}": len(rows) for name, rows in data.items() if hasattr(rows, "__len__")}
    if peft is not None and hasattr(peft, "lora_dropout"):
        settings["lora_dropout"] = peft.lora_dropout
    free = {name for name in settings if name.startswith("eval_") or name in _FREE_SETTINGS}
    # Longer training is no other training
    return {name: value for name, value in settings.items() if name not in {*free, "num_train_epochs"}}


def adapter_settings(model: nn.Module, *, weights: bool) -> dict[str, Any]:
    """
    Every setting of the adapters, and a digest of the weights below them, which no checkpoint holds.

    Args:
        model: before it is prepared for training, where precisions may change and weights are split.
        weights: whether to look at the weights: on the process that has loaded them.

    Returns:
        `peft_config.<setting>`, or `peft_config.<part>.<setting>` for adapters of a model's parts, and `frozen base weights`;
        nothing for a model without adapters. The digest takes up to 2,047 values of each weight, evenly spread, and is left
        out where weights are split over processes, or changed by how the adapter begins.
    """
    found: dict[str, Any] = {}
    adapters, begins = set(), []
    for path, module in model.named_modules():
        if isinstance(module, PeftModel):
            config = module.peft_config[module.active_adapter]
            prefix = f"peft_config.{path}." if path else "peft_config."
            found |= {f"{prefix}{name}": value for name, value in _values(config.to_dict()).items()}
            adapters |= set(module.peft_config)
            begins += [getattr(c, "init_lora_weights", True) for c in module.peft_config.values()]
    if weights and found and all(value in _INITIALISES_ADAPTER_ONLY for value in begins):
        digest = _frozen_weights(model, adapters)
        found |= {} if digest is None else {"frozen base weights": digest}
    return found


def _frozen_weights(model: nn.Module, adapters: set[str]) -> str | None:
    """Of quantized models what is not quantized: packed weights depend on the device and the library's version."""
    frozen: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id") or hasattr(parameter, "full_tensor") or parameter.is_meta:
            return None
        is_base = not parameter.requires_grad and not adapters & set(name.split("."))
        if is_base and type(parameter) is nn.Parameter and parameter.is_floating_point():
            frozen[str(len(frozen))] = parameter  # by its place: adapters change names
    return fingerprint(nn.ParameterDict(frozen))["weights"][:16] if frozen else None


def _values(value: Any) -> Any:
    """JSON values of a configuration: sets and lists of names in order, objects by their class."""
    if value is None or isinstance(value, bool | int | float | str):
        return plain(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        kept = [key for key in map(str, value) if key not in _FREE_ADAPTER_SETTINGS and not key.endswith(_PLACES)]
        named = {str(key): item for key, item in value.items()}
        return {key: _values(named[key]) for key in kept}
    if isinstance(value, set | frozenset | list | tuple):
        items = [_values(item) for item in value]
        return sorted(set(items)) if all(isinstance(item, str) for item in items) else items
    return (value if inspect.isclass(value) else type(value)).__name__


def _fields(cls: type) -> tuple[Any, ...]:
    return dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
