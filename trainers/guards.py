"""Checks that every trainer with an embedding attack makes before training starts."""

from typing import Any

from accelerate import Accelerator
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel, ProcessorMixin, TrainingArguments

from hf_robust.sites import EmbeddingSite


def check_arguments(args: TrainingArguments) -> None:
    """
    Refuse settings that an embedding attack cannot work with. Needs no model, so it comes first.

    Raises:
        ValueError: packing, padding-free batches or reentrant activation checkpointing.
    """
    for name in ("packing", "padding_free", "eval_packing"):
        if getattr(args, name, None):
            raise ValueError(
                f"`{name}=True` cannot be combined with an embedding attack: rows share a sequence there, so a "
                f"perturbation has no row of its own. Set `{name}=False`."
            )
    if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise ValueError(
            "`gradient_checkpointing_kwargs={'use_reentrant': True}`: reentrant activation checkpointing allows no "
            "gradient with respect to a perturbation. Set `gradient_checkpointing_kwargs={'use_reentrant': False}`."
        )


def check_processing_class(processing_class: Any) -> None:
    """
    Refuse vision-language models, whose image positions an embedding attack does not reach.

    Raises:
        ValueError: `processing_class` is a multimodal processor.
    """
    if isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            f"`processing_class={type(processing_class).__name__}` belongs to a vision-language model; this trainer "
            "takes text-only causal language models for now. Pass a text model and its tokenizer."
        )


def check_model(model: PreTrainedModel, accelerator: Accelerator) -> None:
    """
    Refuse models and parallelisms that an embedding attack cannot work with.

    Raises:
        ValueError: a vision-language model, no input embeddings, a prompt-learning adapter, or a split sequence or tensor.
    """
    if any(getattr(model.config, name, None) is not None for name in ("vision_config", "audio_config")):
        raise ValueError(
            f"`model` ({model.config.model_type}) has an image or audio tower; this trainer takes text-only causal "
            "language models for now."
        )
    EmbeddingSite(model)
    if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"`peft_config` ({type(model.active_peft_config).__name__}) adds virtual prompt positions, which an attack on "
            "the prompt's embeddings does not reach. Use a weight adapter such as `LoraConfig`."
        )
    parallelism = accelerator.parallelism_config
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled or parallelism.tp_enabled):
        raise ValueError(
            "`parallelism_config` with context, sequence or tensor parallelism splits the prompt or the embeddings over "
            "processes, where an embedding attack is not supported. Use data parallelism (DDP, FSDP2, ZeRO)."
        )
