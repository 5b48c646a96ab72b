"""SaRA as a tuner of PEFT: which layers it takes, and what it refuses."""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from torch import nn

from hf_robust.tuners.sara.config import SaraConfig
from hf_robust.tuners.sara.layer import SaraLayer, select_small, wrap
from hf_robust.tuners.sara.registration import PREFIX
from hf_robust.tuners.sara.sparse_layer import is_supported

logger = logging.getLogger(__name__)

_QUANTILES = (0.0, 0.01, 0.1, 0.5)
# Entries per layer that the quantiles of a message are taken from
_SAMPLE = 100_000


class SaraModel(BaseTuner):
    """
    A model whose small weights are trained (SaRA), made by `peft.get_peft_model(model, SaraConfig(...))`.

    *SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation*. Of the entries of a
    pretrained weight, the smallest contribute least; SaRA trains these and leaves the others. Gradients and optimizer state
    exist for the selected entries alone.

    Everything of PEFT applies: saving, loading, merging, disabling, several adapters. An adapter file holds the selected
    places and their changes, so that it loads on the same base model and nothing has to be selected again.

    Weight decay draws the changes, not the weights, to zero.

    Example:

    ```python
    >>> from peft import get_peft_model
    >>> from hf_robust.tuners import SaraConfig, sara_learning_rate

    >>> model = get_peft_model(unet, SaraConfig(threshold=2e-3))
    >>> learning_rate = sara_learning_rate(2e-3)
    ```

    Raises:
        ValueError: no entry of the chosen layers lies below the threshold.
        TypeError: a chosen layer is neither a linear layer nor a convolution, or is quantized.
    """

    prefix = PREFIX
    tuner_layer_cls = SaraLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: SaraConfig, model_config: dict) -> SaraConfig:
        return peft_config  # the default depends on the model: see below

    def _prepare_model(self, peft_config: SaraConfig, model: nn.Module) -> None:
        """Complete the configuration, and refuse what cannot work while the model is still untouched."""
        if peft_config.target_modules is None:
            peft_config.target_modules = _default_targets(model)
        _maybe_include_all_linear_layers(peft_config, model)
        layers: dict[str, Any] = dict(self._targets_of(peft_config, model))
        for name, layer in layers.items():
            try:
                wrap(layer)
            except TypeError as error:
                raise TypeError(f"{name}: {error}") from None
        parameters = [(layer.weight, layer.bias if peft_config.train_biases else None) for layer in layers.values()]
        if not layers or any(weight.is_meta for weight, _ in parameters):
            return  # PEFT's own error follows; or the selection comes with the checkpoint
        counts = [len(select_small(weight, bias, peft_config.threshold)) for weight, bias in parameters]
        if not any(counts):
            raise ValueError(
                f"`threshold={peft_config.threshold!r}` selects no entry of the {len(layers)} chosen layers. Quantiles of "
                f"|W| there: {_quantiles(parameters)}. Raise `threshold` above the share of entries that you want to train, "
                "or choose other `target_modules`."
            )
        total = sum(weight.numel() + (0 if bias is None else bias.numel()) for weight, bias in parameters)
        logger.info(
            "SaRA selects %d of %d entries (%.2f %%) below %g.",
            sum(counts), total, 100 * sum(counts) / total, peft_config.threshold,
        )  # fmt: skip

    def _targets_of(self, peft_config: SaraConfig, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Names and base layers that the configuration names; insides of adapter layers are not looked at."""
        inside: tuple[str, ...] = ()
        for name, module in model.named_modules():
            if name.startswith(inside) and inside:
                continue
            if isinstance(module, BaseTunerLayer):
                inside += (name + ".",)
            if name and self._check_target_module_exists(peft_config, name):
                yield name, module.base_layer if isinstance(module, SaraLayer) else module

    def _create_and_replace(
        self,
        peft_config: SaraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, SaraLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = wrap(target)
        layer._active_adapter = self.active_adapter
        layer.update_layer(adapter_name, peft_config)
        layer.train(target.training)
        self._replace_module(parent, target_name, layer, target)


def _default_targets(model: nn.Module) -> set[str]:
    """All layers that can be adapted, but the output head and layers that share their weight with another module."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    names, inside = set(), ()  # type: tuple[set[str], tuple[str, ...]]
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (name + ".",)
        base = module.base_layer if isinstance(module, SaraLayer) else module
        if name and base is not head and is_supported(base) and owners[id(base.weight)] == 1:
            names.add(name)
    return names


def _quantiles(parameters: list[tuple[torch.Tensor, torch.Tensor | None]]) -> str:
    samples = []
    for pair in parameters:
        for tensor in pair:
            if tensor is not None:
                flat = tensor.detach().reshape(-1)
                samples.append(flat[:: max(1, len(flat) // _SAMPLE)].float().abs().cpu())
    ordered = torch.cat(samples).sort().values
    values = [float(ordered[round(share * (len(ordered) - 1))]) for share in _QUANTILES]
    names = ["smallest", *(f"{share:.0%}" for share in _QUANTILES[1:])]
    return ", ".join(f"{name} {value:.3g}" for name, value in zip(names, values, strict=True))
