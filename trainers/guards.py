"""Checks that every trainer with an embedding attack makes before training starts."""

from typing import Any

from accelerate import ParallelismConfig
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel, ProcessorMixin, TrainingArguments

from hf_robust.sites import EmbeddingSite, language_model

# TRL 1.16, which forces it because of DeepSpeed (huggingface/trl#2514). To be removed with it.
FORCED_REENTRANT = (
    "Adapters under DeepSpeed's ZeRO-3 get reentrant checkpointing from TRL, whatever is set: use ZeRO-2 or FSDP2 there, or no "
    "checkpointing."
)


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
            "gradient with respect to a perturbation. Set `gradient_checkpointing_kwargs={'use_reentrant': False}`. "
            + FORCED_REENTRANT
        )


def check_processing_class(processing_class: Any) -> None:
    """
    Refuse processors of anything but text and images.

    Raises:
        ValueError: `processing_class` is a multimodal processor without a tokenizer, or one of sound.
    """
    if isinstance(processing_class, ProcessorMixin) and (
        getattr(processing_class, "tokenizer", None) is None
        or getattr(processing_class, "feature_extractor", None) is not None
    ):
        raise ValueError(
            f"`processing_class={type(processing_class).__name__}` is no processor of text and images: this trainer takes "
            "language models and vision-language models. Pass the model's tokenizer or processor."
        )


def check_vision_arguments(args: Any) -> None:
    """
    Refuse settings that need to know which token is which word, where a processor puts images among them.

    Raises:
        ValueError: `attack_positions` or `attack_suffix_epsilon`.
    """
    for argument, plain in (("attack_positions", "all_prompt"), ("attack_suffix_epsilon", None)):
        if getattr(args, argument) != plain:
            raise ValueError(
                f"`{argument}={getattr(args, argument)!r}` is not supported for vision-language models, whose processors put "
                f"images among the words: use {plain!r}."
            )


def check_parallelism(parallelism: ParallelismConfig | None) -> None:
    """
    Refuse to split a row or its states over processes: attacks, noise and the losses here take rows as wholes.

    Raises:
        ValueError: context, sequence or tensor parallelism.
    """
    if parallelism is None:
        return
    for name in ("cp", "sp", "tp"):
        size = getattr(parallelism, f"{name}_size")
        if size is not None and size > 1:
            raise ValueError(
                f"`parallelism_config` with `{name}_size={size}` splits sequences or tensors over processes, which attacks and "
                "perturbed losses do not support. Use data parallelism (DDP, FSDP2, ZeRO), which splits the weights too."
            )


def check_one_device(args: TrainingArguments) -> None:
    """
    Refuse `nn.DataParallel`, whose copies of a model neither hooks nor the searches on the original reach.

    Args:
        args: the configuration.

    Raises:
        ValueError: several devices and one process.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"`args` would run {args.n_gpu} devices from one process (`nn.DataParallel`), which is not supported: start one "
            "process for each, with `accelerate launch` or `torchrun`, or show this one a single device "
            "(`CUDA_VISIBLE_DEVICES=0`)."
        )


def check_model(model: PreTrainedModel) -> None:
    """
    Refuse models that an embedding attack cannot work with.

    Raises:
        ValueError: a model of sound, an image tower without a language model behind it, no input embeddings, or a
            prompt-learning adapter.
    """
    if getattr(model.config, "audio_config", None) is not None:
        raise ValueError(
            f"`model` ({model.config.model_type}) has an audio tower; this trainer takes language models and vision-language "
            "models."
        )
    if getattr(model.config, "vision_config", None) is not None and language_model(model) is None:
        raise ValueError(
            f"`model` ({model.config.model_type}) has an image tower, but no language model behind it that `get_decoder()` "
            "finds: an attack would not reach the images. Use another vision-language model."
        )
    EmbeddingSite(model)
    if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"`peft_config` ({type(model.active_peft_config).__name__}) adds virtual prompt positions, which an attack on "
            "the prompt's embeddings does not reach. Use a weight adapter such as `LoraConfig`."
        )
