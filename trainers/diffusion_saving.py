"""How [`DiffusionTrainer`] saves and reloads: pipeline folders that diffusers opens, and adapters beside them."""

import copy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers import Trainer

if TYPE_CHECKING:
    from hf_robust.diffusion.model import DiffusionModel

ADAPTERS_FOLDER = "adapters"


def add_adapters(model: "DiffusionModel", peft_config: Any) -> dict[str, Any]:
    """
    Put adapters around the parts of a model.

    Args:
        model: changed in place: its UNet and text encoders become `PeftModel`s.
        peft_config: a PEFT configuration for the UNet, or a dict of them by `"unet"` and `"text_encoder"` (of SDXL, both
            text encoders get one).

    Returns:
        The `PeftModel`s by the name of their part, see [`~hf_robust.diffusion.DiffusionModel.part`].

    Raises:
        ValueError: an unknown part, one that has an adapter already, or an adapter with virtual tokens.
    """
    from peft import PeftConfig, get_peft_model

    if is_adapted(model):
        raise ValueError(
            "`peft_config` is given but `model` has adapters already: merge them, or leave `peft_config` out."
        )
    configs = {"unet": peft_config} if isinstance(peft_config, PeftConfig) else dict(peft_config)
    for name, config in configs.items():
        if name not in ("unet", "text_encoder") or not isinstance(config, PeftConfig):
            raise ValueError(
                f"`peft_config` has {name!r}: {type(config).__name__}; give a PEFT configuration, or a dict of them by 'unet' "
                "and 'text_encoder'."
            )
        if config.is_prompt_learning:
            raise ValueError(
                f"`peft_config` ({type(config).__name__}) adds virtual tokens, which a pipeline has no place for. Use a weight "
                "adapter such as `LoraConfig`."
            )
        # PEFT writes into a configuration what it finds out about the model
        if name == "unet":
            model.unet = get_peft_model(model.unet, copy.deepcopy(config))
            continue
        for place, encoder in enumerate(model.text_encoders):
            model.text_encoders[place] = get_peft_model(encoder, copy.deepcopy(config))
    return adapters_of(model)


def adapters_of(model: "DiffusionModel") -> dict[str, Any]:
    """The `PeftModel`s of a model by the name of their part."""
    parts = {name: model.part(name) for name in model.part_names}
    return {name: part for name, part in parts.items() if is_peft_model(part)}


def is_adapted(model: "DiffusionModel") -> bool:
    """Whether a part of the model has adapters."""
    return bool(adapters_of(model))


class PipelineSaving(Trainer):
    """
    Stands before the Hugging Face trainer among the bases of [`DiffusionTrainer`] and writes its folders.

    - Without adapters every folder, checkpoints too, is a pipeline folder (`model_index.json`, `unet/`, …).
    - With adapters a checkpoint holds them alone, as PEFT folders `adapters/unet` and so on; the output folder holds them
      and a pipeline folder with the adapters merged into its weights.
    """

    # By part; empty without `peft_config`
    adapters: dict[str, Any] = {}
    _writes_checkpoint = False

    def _diffusion_model(self) -> "DiffusionModel":
        return self.accelerator.unwrap_model(self.model)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._writes_checkpoint = True
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self._writes_checkpoint = False

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The pipeline or the adapters, as the class says. `state_dict` is what FSDP and ZeRO gathered."""
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self._diffusion_model()
        for name, adapter in self.adapters.items():
            place = folder / ADAPTERS_FOLDER / name
            adapter.save_pretrained(place, safe_serialization=True)
        if self.adapters and self._writes_checkpoint:
            return
        if (
            state_dict is None or self.adapters
        ):  # with adapters no strategy splits the weights: what ZeRO-2 hands over is these
            model.save_pretrained(folder)
        else:
            pipeline = model.pipeline()
            pipeline.register_modules(**{name: _gathered(model, name, state_dict) for name in model.part_names})
            pipeline.save_pretrained(folder, safe_serialization=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Read what [`_save`] wrote into the trained components; any key too many or too few is an error."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        folder, inner = Path(resume_from_checkpoint), self._diffusion_model()
        for name, adapter in self.adapters.items():
            place = folder / ADAPTERS_FOLDER / name
            if not place.is_dir():
                raise ValueError(f"`resume_from_checkpoint={str(folder)!r}` holds no {ADAPTERS_FOLDER}/{name}.")
            try:
                result = adapter.load_adapter(str(place), "default", is_trainable=True)
            except RuntimeError as error:
                first = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), None)
                if first is None:
                    raise
                raise ValueError(
                    f"{place} has weights of other sizes than the adapter ({first}). Resume with the `peft_config` of the "
                    "first run."
                ) from None
            for what, keys in (("has", result.unexpected_keys), ("lacks", result.missing_keys)):
                if keys:
                    other = "lacks" if what == "has" else "has"
                    raise ValueError(
                        f"{place} {what} weights that the adapter {other}: {', '.join(keys[:3])}. Resume with the "
                        "`peft_config` of the first run."
                    )
        if self.adapters:
            return
        trained = [name for name in inner.part_names if any(p.requires_grad for p in inner.part(name).parameters())]
        for name in trained:
            if not (folder / name).is_dir():
                raise ValueError(f"`resume_from_checkpoint={str(folder)!r}` is no pipeline folder: it has no {name}/.")
        inner.load_weights(folder, trained)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """The parent's push, which takes files alone, with the folders of the pipeline or of the adapters."""
        if self.is_world_process_zero() and str(getattr(self.args.hub_strategy, "value", "")) != "end":
            output = Path(self.args.output_dir)
            for path in Path(checkpoint_folder).iterdir():
                if path.is_dir():
                    shutil.copytree(path, output / path.name, dirs_exist_ok=True)
                elif path.name == "model_index.json":
                    shutil.copy(path, output / path.name)
        super()._push_from_checkpoint(checkpoint_folder)


def _gathered(model: "DiffusionModel", name: str, state_dict: dict[str, torch.Tensor]) -> nn.Module:
    """A part with the weights that were gathered from all processes."""
    part: Any = model.part(name)
    (path,) = (path for path, module in model.named_modules() if module is part)
    fresh = part.from_config(part.config) if hasattr(part, "from_config") else type(part)(part.config)
    fresh.load_state_dict({k.removeprefix(f"{path}."): v for k, v in state_dict.items() if k.startswith(f"{path}.")})
    return fresh
