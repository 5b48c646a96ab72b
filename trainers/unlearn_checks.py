"""What [`UnlearnTrainer`] checks before training starts, and which weights it trains."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from torch import nn

from hf_robust.sites import adapter_off, decoder_layers, quiet, same_trained
from hf_robust.trainers.guards import FORCED_REENTRANT
from hf_robust.trainers.unlearn_config import UnlearnConfig

# How many names a message lists
_SHOWN = 4
# Layers that RMU trains, up to the one it looks behind (the authors: 5, 6 and 7)
_TRAINED_LAYERS = 3


def check_arguments(args: UnlearnConfig, compute_loss_func: Any) -> None:
    """
    Refuse options of the parent that have no meaning with two kinds of rows. Needs no model, so it comes first.

    Args:
        args: the configuration.
        compute_loss_func: the trainer's argument.

    Raises:
        ValueError: packing, padding-free batches, reentrant activation checkpointing, NEFTune, activations that
            are offloaded where no whole backward follows, label smoothing, an order of rows by length, another loss.
    """
    for name in ("packing", "padding_free"):
        if getattr(args, name, None):
            raise ValueError(
                f"`{name}=True` cannot be combined with unlearning: rows share a sequence there, while each forget row has a "
                f"loss of its own. Set `{name}=False`."
            )
    if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise ValueError(
            "`gradient_checkpointing_kwargs={'use_reentrant': True}`: reentrant activation checkpointing gives hidden states "
            "no gradient. Set `gradient_checkpointing_kwargs={'use_reentrant': False}`. " + FORCED_REENTRANT
        )
    if args.neftune_noise_alpha is not None:
        raise ValueError(
            f"`neftune_noise_alpha={args.neftune_noise_alpha!r}` cannot be combined with unlearning: its noise would reach the "
            "model that the losses compare with. Leave it unset, or use `robust='embedding'`."
        )
    if args.activation_offloading and (uses_activations(args) or args.robust != "none"):
        raise ValueError(
            "`activation_offloading=True` is not supported with losses on the hidden states of a layer or with `robust`: it "
            "needs a whole backward behind each forward. Use `activation_checkpointing=True` to save memory."
        )
    if args.label_smoothing_factor:
        raise ValueError(
            f"`label_smoothing_factor={args.label_smoothing_factor!r}` is not supported by unlearning: its losses are made of "
            "the labels' likelihoods alone. Use 0."
        )
    order = str(getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy))
    if order in ("group_by_length", "batch_rebalance"):
        raise ValueError(
            f"`train_sampling_strategy={order!r}` cannot be combined with unlearning, whose rows are pairs of a forget and a "
            "retain row without a length of their own. Use 'random' or 'sequential'."
        )
    if compute_loss_func is not None:
        raise ValueError("`compute_loss_func` replaces the loss that unlearning is: leave it out, or use `SFTTrainer`.")


def check_model(model: Any, accelerator: Accelerator, args: UnlearnConfig, *, aux_loss: bool) -> None:
    """
    Refuse models and parallelisms that the losses do not fit.

    Args:
        model: the trainer's model.
        accelerator: the trainer's.
        args: the configuration.
        aux_loss: whether the parent adds the router's loss of a mixture of experts.

    Raises:
        ValueError: a layer out of range or layers not found; a latent attack behind all that RMU reads; a prompt-learning
            adapter; a router loss; an adapter that has changed the model already, where a loss compares with the model
            without it.
    """
    if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"`peft_config` ({type(model.active_peft_config).__name__}) adds virtual positions in front of the prompt and "
            "leaves the weights, and what they know, as they are. Use a weight adapter such as `LoraConfig`."
        )
    if aux_loss:
        raise ValueError(
            "`model` is a mixture of experts whose router loss unlearning does not compute: set `router_aux_loss_coef=0.0`."
        )
    if args.precompute_ref_log_probs and accelerator.distributed_type.value in ("DEEPSPEED", "FSDP"):
        raise ValueError(
            "`precompute_ref_log_probs=True` runs the model before it is split over processes: leave it off with "
            f"{accelerator.distributed_type.value}, or use DDP."
        )
    if uses_activations(args):
        depth = len(decoder_layers(model))
        if not -depth <= args.activation_layer < depth:
            raise ValueError(
                f"`activation_layer={args.activation_layer!r}`: the model has layers 0 to {depth - 1}, counted from the end if "
                "negative. The authors of RMU take layer 7 of 32."
            )
        behind = -depth <= args.latent_layer < depth and args.latent_layer % depth > args.activation_layer % depth
        if args.loss_type == "rmu" and args.robust == "latent" and behind and args.latent_epsilon and args.latent_steps:
            raise ValueError(
                f"`latent_layer={args.latent_layer!r}` lies behind `activation_layer={args.activation_layer!r}`: "
                "`loss_type='rmu'` reads hidden states that `robust='latent'` would not reach, so training would be the plain "
                "one. Perturb that layer or one before it."
            )
    if (args.forget_reference or args.retain_reference) and is_peft_model(model):
        _check_fresh(model, accelerator, args)


def uses_activations(args: UnlearnConfig) -> bool:
    """Whether a loss looks at hidden states."""
    return args.loss_type == "rmu" or bool(args.retain_weight and args.retain_type == "activation")


@torch.no_grad()
def _check_fresh(model: Any, accelerator: Accelerator, args: UnlearnConfig) -> None:
    """The model before training is the one with its adapter off; an adapter that does something already says otherwise."""
    if accelerator.distributed_type.value in ("DEEPSPEED", "FSDP"):  # its parameters may lie elsewhere
        return
    ids = torch.arange(min(8, model.config.get_text_config().vocab_size), device=model.device).unsqueeze(0)
    with quiet(model):
        now = model(input_ids=ids, use_cache=False).logits
        with adapter_off(model):
            before = model(input_ids=ids, use_cache=False).logits
    if not torch.allclose(now, before, rtol=1e-2, atol=1e-2 * float(before.abs().max())):
        raise ValueError(
            f"`model` carries an adapter that changes its predictions already, while `loss_type={args.loss_type!r}` with "
            f"`retain_type={args.retain_type!r}` compares with the model before training, taken to be the one without adapter. "
            "Merge it (`model.merge_and_unload()`) and pass a `peft_config`, with `init_lora_weights=True`."
        )


def check_adapter_alone_is_trained(model: Any) -> None:
    """
    Switched off, an adapter leaves the model before training only if nothing else of it is trained.

    Args:
        model: a PEFT model, unwrapped.

    Raises:
        ValueError: a weight that is trained and stays when the adapter is off, such as LoRA's biases.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with same_trained(model), model.disable_adapter():  # which freezes what it switches off
        left = [n for n, parameter in model.named_parameters() if parameter.requires_grad and n in trained]
    if left:
        raise ValueError(
            f"`model` trains {_some(left)} outside its adapter, while a loss compares with the model before training, which is "
            "the model with its adapter switched off. Use `bias='none'` in `peft_config`, or freeze them."
        )


def freeze_all_but_named(model: nn.Module, args: UnlearnConfig) -> list[str]:
    """
    Freeze what RMU does not train.

    Args:
        model: the model to be trained, with its adapter.
        args: its `rmu_weights` name weights or modules, or leave them to `activation_layer`.

    Returns:
        Names of the weights that stay trainable.

    Raises:
        ValueError: no such trainable weight, or one behind the layer that all losses look at.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    layers = decoder_layers(model)
    last = args.activation_layer % len(layers)
    if args.rmu_weights is None:
        inside = {id(p) for layer in layers[max(0, last - _TRAINED_LAYERS + 1) : last + 1] for p in layer.parameters()}
        chosen = {name for name, p in trainable.items() if id(p) in inside and "down_proj" in name.split(".")}
    else:
        chosen = set()
        for wanted in args.rmu_weights:
            found = {name for name in trainable if f".{wanted}." in f".{name}."}
            if not found:
                raise ValueError(
                    f"`rmu_weights={args.rmu_weights!r}`: {wanted!r} is no trainable weight or module. Trainable are "
                    f"{_some(trainable)}."
                )
            chosen |= found
    if not chosen:
        raise ValueError(
            f"`loss_type='rmu'` trains the `down_proj` of the layers up to {last} (`activation_layer`), and none of them is "
            f"trainable. Name others with `rmu_weights`, or add 'down_proj' to the adapter's `target_modules`; trainable are "
            f"{_some(trainable)}."
        )
    behind = {id(p) for layer in layers[last + 1 :] for p in layer.parameters()}
    wrong = sorted(name for name in chosen if id(trainable[name]) in behind)
    kept = args.retain_weight and args.retain_type != "activation"
    if len(wrong) == len(chosen) or (wrong and not kept):
        raise ValueError(
            f"`rmu_weights={args.rmu_weights!r}` has weights behind layer {last} (`activation_layer`), which the forget loss "
            f"does not look at{'' if kept else ', nor the retain loss'}: {_some(wrong)}. Leave them out, or raise "
            "`activation_layer`."
        )
    for name, parameter in trainable.items():
        parameter.requires_grad_(name in chosen)
    return sorted(chosen)


def _some(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "") or "none"
