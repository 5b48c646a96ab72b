"""What [`AdversarialTrainer`] checks before training starts."""

import logging
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from hf_robust.sites import EmbeddingSite
from hf_robust.threats import check_choice
from hf_robust.trainers.adversarial_config import AdversarialConfig
from hf_robust.trainers.adversarial_inputs import ImageInputs, Inputs, TextInputs
from hf_robust.trainers.labels import LABEL_COLUMNS, first_wrong_label, is_class

logger = logging.getLogger(__name__)

# Where labels lie beyond the model's classes
REMEDY = "Set `num_labels` of the model, or number the classes from 0 on."


def check_arguments(args: AdversarialConfig, compute_loss_func: Any) -> None:
    """
    Refuse settings that no model could be trained with. Needs no model, so it comes first.

    Args:
        args: the configuration.
        compute_loss_func: the trainer's argument.

    Raises:
        ValueError: another loss function, or activation checkpointing of a kind that allows no gradient of an input.
    """
    if args.epsilon == 0:
        return
    if compute_loss_func is not None:
        raise ValueError(
            "`compute_loss_func` replaces the loss that adversarial training is: leave it out, or use `epsilon=0`."
        )
    if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise ValueError(
            "`gradient_checkpointing_kwargs={'use_reentrant': True}`: reentrant activation checkpointing allows no gradient "
            "with respect to a perturbation. Set `gradient_checkpointing_kwargs={'use_reentrant': False}`."
        )
    order = getattr(args, "train_sampling_strategy", "random")
    if args.loss_type == "free_at" and order != "random":
        raise ValueError(
            f"`train_sampling_strategy={str(order)!r}` cannot be combined with `loss_type='free_at'`, which hands out shuffled "
            "batches several times in a row: leave it at 'random', or use 'fast_at'."
        )
    if args.gradient_checkpointing and args.loss_type == "grad_align":
        raise ValueError(
            "`gradient_checkpointing=True` cannot be combined with `loss_type='grad_align'`, which differentiates twice. "
            "Switch it off."
        )


def inputs_of(model: nn.Module, args: AdversarialConfig, processing_class: Any) -> Inputs:
    """
    What is perturbed: the pixels of an image classifier, or the embeddings of a text classifier.

    Args:
        model: unwrapped.
        args: the configuration.
        processing_class: the trainer's; an image processor, or `None` for raw pixels.

    Raises:
        ValueError: the model is no classifier of images or texts with one label each, or does not fit `loss_type`, `norm` or
            the image processor.
    """
    config: Any = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    if problem not in (None, "single_label_classification") or getattr(config, "num_labels", 2) < 2:
        raise ValueError(
            f"`model` has problem_type {problem!r} and {getattr(config, 'num_labels', None)} labels: adversarial training "
            "needs one label out of two or more (`problem_type='single_label_classification'`)."
        )
    if args.loss_type == "grad_align" and args.epsilon != 0:
        _check_double_backward(config)
    name = getattr(model, "main_input_name", "input_ids")
    found: Inputs
    if name == "pixel_values":
        if args.recipe.text_only and args.epsilon != 0:
            raise ValueError(
                f"`loss_type={args.loss_type!r}` perturbs the embeddings of tokens and `model` ({type(model).__name__}) takes "
                "images: use a text classifier, or 'pgd_at', 'trades', 'vat', … ."
            )
        found = ImageInputs(processing_class, getattr(config, "num_channels", 3))
    elif name == "input_ids":
        found = TextInputs(args.epsilon_relative, EmbeddingSite(model).hidden_size)
    else:
        raise ValueError(
            f"`model` ({type(model).__name__}) takes `{name}`; this trainer takes image classifiers (`pixel_values`) and text "
            "classifiers (`input_ids`)."
        )
    if args.norm is not None:
        check_choice("norm", args.norm, found.norms)
    return found


def _check_double_backward(config: Any) -> None:
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in (None, "eager"):
        raise ValueError(
            f"`loss_type='grad_align'` differentiates the model twice, which attention of the kind {implementation!r} does not "
            "allow: load the model with `attn_implementation='eager'`."
        )


def warn_of_half_precision(model: nn.Module, args: AdversarialConfig) -> None:
    """
    Say so where a method's start is lost in the rounding of half precision, so that rows are not perturbed at all.

    Args:
        model: unwrapped.
        args: the configuration.
    """
    half = args.bf16 or args.fp16 or getattr(model, "dtype", None) in (torch.bfloat16, torch.float16)
    if args.loss_type == "smart" and half and args.epsilon != 0:
        logger.warning(
            "`loss_type='smart'` starts its search at noise of 1e-5, which half precision rounds away: in many rows the "
            "divergence is exactly 0 and has no gradient, so that they are not attacked. Train in float32 (`bf16=False`, "
            "`fp16=False`), or use 'freelb', or 'vat' with `vat_xi=1`."
        )


def check_parallelism(accelerator: Accelerator, args: AdversarialConfig) -> None:
    """
    Refuse parallelisms in which a gradient of the inputs does not come out of the pass that trains.

    Args:
        accelerator: the trainer's.
        args: the configuration.

    Raises:
        ValueError: DeepSpeed or FSDP with a method that needs such a gradient.
    """
    if args.epsilon == 0:
        return
    sharded = accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
    if sharded and (args.recipe.is_shared or args.loss_type == "grad_align"):
        raise ValueError(
            f"`loss_type={args.loss_type!r}` takes the inputs' gradient out of the pass that trains, which is not supported "
            f"under {accelerator.distributed_type.value}: use data parallelism (DDP), or 'pgd_at'."
        )
    if sharded and args.proximal_weight:
        raise ValueError(
            f"`proximal_weight={args.proximal_weight!r}` keeps a copy of the whole weights, which is not supported under "
            f"{accelerator.distributed_type.value}: use data parallelism (DDP), or `proximal_weight=0`."
        )


def check_data(argument: str, dataset: Any, num_labels: int) -> None:
    """
    Refuse a dataset without usable labels.

    Args:
        argument: its name.
        dataset: a streaming one is not looked at.
        num_labels: classes of the model.

    Raises:
        ValueError: empty, no labels, or labels out of range.
    """
    if not hasattr(dataset, "__len__"):
        return
    if len(dataset) == 0:
        raise ValueError(f"`{argument}` is empty: give at least one row.")
    row = dataset[0]
    name = next((name for name in LABEL_COLUMNS if name in row), None)
    if name is None:
        raise ValueError(
            f"`{argument}` has no labels, only {', '.join(map(repr, row))}: adversarial training needs a column `labels` (or "
            "`label`) with the number of each row's class."
        )
    wrong = first_wrong_label(dataset, name, lambda label: is_class(label, num_labels))
    if wrong is None:
        return
    place, value = wrong
    if not is_class(value):
        raise ValueError(
            f"`{argument}` has `{name}` {value!r:.100} ({type(value).__name__}) in row {place}: give each row the number of "
            "one class (a whole number)."
        )
    raise ValueError(
        f"`{argument}` has `{name}` {value} in row {place} and `model` has {num_labels} classes: labels must lie in 0 … "
        f"{num_labels - 1}. {REMEDY}"
    )


def pixels_of(row: dict[str, Any]) -> torch.Tensor:
    """
    The pixels of a dataset's first row.

    Args:
        row: with `pixel_values`.

    Raises:
        ValueError: they are no numbers, or not in equal rows.
    """
    try:
        return torch.as_tensor(row["pixel_values"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"`pixel_values` of row 0 are {row['pixel_values']!r:.100} ({error}): give numbers [channels, height, width], such "
            "as the image processor makes."
        ) from error
