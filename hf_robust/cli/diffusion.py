"""`hf-robust diffusion`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from trl import ModelConfig, ScriptArguments, TrlParser

from hf_robust.cli.arguments import finish
from hf_robust.threats import check_choice
from hf_robust.trainers import DiffusionConfig, DiffusionTrainer

ADAPTERS = ("lora", "sara")
# Attention of the UNet by diffusers' names, and of CLIP's text encoder by transformers'
_TARGETS = {"unet": ["to_q", "to_k", "to_v", "to_out.0"], "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"]}


@dataclass
class AdapterArguments:
    """
    Which adapters are put where, with `--use_peft`; `--lora_r` and its companions are TRL's.

    Parameters:
        adapter (`str`, defaults to `"lora"`):
            `"lora"` or `"sara"` ([`~hf_robust.tuners.SaraConfig`]).
        adapter_parts (`list[str]`, defaults to `["unet"]`):
            `"unet"`, `"text_encoder"` or both.
        sara_threshold (`float`, defaults to `2e-3`):
            SaRA trains the weights' entries that are smaller than this (the paper's example).
    """

    adapter: str = field(default="lora", metadata={"help": "Kind of adapter: lora or sara."})
    adapter_parts: list[str] = field(
        default_factory=lambda: ["unet"], metadata={"help": "Where adapters go: unet, text_encoder or both."}
    )
    sara_threshold: float = field(default=2e-3, metadata={"help": "SaRA trains entries smaller than this."})

    def peft_config(self, model_args: ModelConfig) -> dict[str, Any] | None:
        """
        PEFT configurations by part, `None` without `--use_peft`.

        Args:
            model_args: TRL's, with the ranks and names of layers.

        Raises:
            ValueError: an unknown kind or part.
        """
        if not model_args.use_peft:
            return None
        check_choice("--adapter", self.adapter, ADAPTERS)
        for part in self.adapter_parts:
            check_choice("--adapter_parts", part, tuple(_TARGETS))
        return {part: self._config(model_args, part) for part in self.adapter_parts}

    def callbacks(self, model_args: ModelConfig) -> list[Any]:
        """What SaRA needs beside its configuration: the low-rank term and the second selection."""
        if not model_args.use_peft or self.adapter != "sara":
            return []
        from hf_robust.tuners import SaraProgressCallback, SaraRankLossCallback

        return [SaraRankLossCallback(), SaraProgressCallback()]

    def _config(self, model_args: ModelConfig, part: str) -> Any:
        if self.adapter == "sara":
            from hf_robust.tuners import SaraConfig

            return SaraConfig(threshold=self.sara_threshold, target_modules=model_args.lora_target_modules)
        from peft import LoraConfig

        return LoraConfig(
            r=model_args.lora_r,
            lora_alpha=model_args.lora_alpha,
            lora_dropout=model_args.lora_dropout,
            target_modules=model_args.lora_target_modules or _TARGETS[part],
            use_rslora=model_args.use_rslora,
            use_dora=model_args.use_dora,
        )


def load_diffusion_model(model_args: ModelConfig) -> Any:
    """
    The [`~hf_robust.diffusion.DiffusionModel`] of `model_name_or_path`.

    Args:
        model_args: TRL's.

    Raises:
        ValueError: no model was named.
        ImportError: diffusers is missing.
    """
    from hf_robust.diffusion import DiffusionModel

    if model_args.model_name_or_path is None:
        raise ValueError(
            "`--model_name_or_path` is required: a pipeline folder, or a Hub id of Stable Diffusion or SDXL."
        )
    dtype = getattr(torch, model_args.dtype) if model_args.dtype not in (None, "auto") else torch.float32
    # A folder has no revision
    revision = {} if Path(model_args.model_name_or_path).is_dir() else {"revision": model_args.model_revision}
    return DiffusionModel.from_pretrained(model_args.model_name_or_path, dtype=dtype, **revision)


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Train with [`~hf_robust.trainers.DiffusionTrainer`].

    Args:
        arguments: command line after `hf-robust diffusion`.

    Returns:
        Exit status.
    """
    parser = TrlParser((ScriptArguments, AdapterArguments, DiffusionConfig, ModelConfig), prog="hf-robust diffusion")
    script_args, adapter_args, training_args, model_args = parser.parse_args_and_config(
        args=arguments, fail_with_unknown_args=True
    )
    if script_args.dataset_name is None:
        parser.error(
            "--dataset_name is required: a Hub id, or a folder of images with a metadata.jsonl or metadata.csv"
        )
    peft_config = adapter_args.peft_config(model_args)

    def rows(split: str, streaming: bool) -> Any:
        from datasets import load_dataset

        return load_dataset(script_args.dataset_name, name=script_args.dataset_config, split=split, streaming=streaming)

    evaluates = str(getattr(training_args.eval_strategy, "value", training_args.eval_strategy)) != "no"
    trainer = DiffusionTrainer(
        load_diffusion_model(model_args),
        training_args,
        train_dataset=rows(script_args.dataset_train_split, script_args.dataset_streaming),
        eval_dataset=rows(script_args.dataset_test_split, False) if evaluates else None,
        peft_config=peft_config,
        callbacks=adapter_args.callbacks(model_args),
    )
    finish(trainer, script_args, training_args)
    return 0
