"""The adapter layer: a linear layer or convolution of which the small entries are trained."""

import warnings
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from hf_robust.tuners.sara.config import SaraConfig
from hf_robust.tuners.sara.sparse_layer import Changes, is_supported, op_of, sparse_layer


def select_small(weight: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """
    Places with |entry| < `threshold`, ascending, in the flattened weight followed by the bias.

    Returns:
        `[k]`, int32, or int64 for a layer with more than 2³¹ − 1 entries.
    """
    parts = [(weight.detach().float().abs() < threshold).reshape(-1).nonzero().squeeze(1)]
    if bias is not None:
        parts.append((bias.detach().float().abs() < threshold).nonzero().squeeze(1) + weight.numel())
    size = weight.numel() + (0 if bias is None else bias.numel())
    return torch.cat(parts).to(torch.int32 if size < 2**31 else torch.int64)


class SaraLayer(nn.Module, BaseTunerLayer):
    """
    A layer with SaRA adapters: W + δ at the selected places, W elsewhere; δ is zero at first.

    For each adapter it holds, and saves:

    - `sara_values` (the only parameter), `[k]`: the changes δ;
    - `sara_indices` (buffer), `[k]`, int32 or int64: their places in the flattened weight followed by the bias;
    - `sara_frozen` (buffer), `[f]`, int32 or int64, and `sara_held` (buffer), `[f]`: positions within `sara_values` that a
      re-selection has frozen, and the changes that hold there. The parameter keeps its shape, and with it optimizer state,
      DDP and checkpoints stay valid; what the optimizer still does to frozen positions has no effect.

    Several active adapters add up. Hooks on the wrapped layer itself do not run: set them on this one.

    Args:
        base_layer (`torch.nn.Module`): a linear layer, convolution or GPT-2 `Conv1D`.
    """

    base_layer: Any  # one of several kinds of layers
    active_adapters: list[str]

    adapter_layer_names = ("sara_values",)
    other_param_names = ("sara_indices", "sara_frozen", "sara_held", "sara_split", "sara_config")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.sara_values = nn.ParameterDict()
        self.sara_indices = BufferDict(persistent=True)
        self.sara_frozen = BufferDict(persistent=True)
        self.sara_held = BufferDict(persistent=True)
        self.sara_split: dict[str, int] = {}
        self.sara_config: dict[str, SaraConfig] = {}
        self._op = op_of(base_layer)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # Entries of weight and bias before each merge, in its order: undone bit for bit.
        self._before_merge: list[list[Tensor]] = []

    def update_layer(self, adapter_name: str, config: SaraConfig) -> None:
        """
        Add an adapter: select the small entries of the layer as it is.

        Raises:
            ValueError: another adapter is merged into the layer.
        """
        if self.merged:
            raise ValueError(
                f"Adapter {adapter_name!r} cannot be added while {self.merged_adapters} are merged, because entries are "
                "selected by the base model's weights: call `unmerge_adapter()` first."
            )
        weight, bias = self.base_layer.weight, self.base_layer.bias if config.train_biases else None
        if weight.is_meta:  # the entries come with the checkpoint
            indices = torch.empty(0, dtype=torch.int32, device=weight.device)
        else:
            indices = select_small(weight, bias, config.threshold)
        dtype = torch.float32 if config.value_dtype == "float32" else weight.dtype
        self.sara_config[adapter_name] = config
        self.sara_values[adapter_name] = nn.Parameter(torch.zeros(len(indices), dtype=dtype, device=weight.device))
        self.sara_indices[adapter_name] = indices
        self.sara_frozen[adapter_name] = indices.new_empty(0)
        self.sara_held[adapter_name] = torch.zeros(0, dtype=dtype, device=weight.device)
        self._note_split(adapter_name, indices)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)  # type: ignore[operator]

    def _note_split(self, adapter_name: str, indices: Tensor) -> None:
        # Counted once: in the forward pass it would wait for the device.
        is_weight = indices < self.base_layer.weight.numel()
        self.sara_split[adapter_name] = 0 if indices.is_meta else int(is_weight.sum())

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own also casts to the layer's type, which `value_dtype` decides here.
        target = device or self.base_layer.weight.device
        for name in ("sara_values", "sara_indices", "sara_frozen", "sara_held"):
            entries = getattr(self, name)
            if adapter_name in entries and not entries[adapter_name].is_meta and not target.type == "meta":
                entries[adapter_name] = entries[adapter_name].to(target)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Which entries are selected is decided by the checkpoint: take its sizes. A parameter stays the same object.
        for name in ("sara_values", "sara_indices", "sara_frozen", "sara_held"):
            entries = getattr(self, name)
            for adapter in list(entries.keys()):
                saved, own = state_dict.get(f"{prefix}{name}.{adapter}"), entries[adapter]
                if saved is None or saved.shape == own.shape and (own.is_floating_point() or saved.dtype == own.dtype):
                    pass
                elif name == "sara_values":
                    own.data = torch.zeros(saved.shape, dtype=own.dtype, device=own.device)
                    own.grad = None
                else:
                    dtype = own.dtype if own.is_floating_point() else saved.dtype
                    entries[adapter] = torch.zeros(saved.shape, dtype=dtype, device=own.device)
                if name == "sara_indices" and saved is not None:
                    self._check_indices(adapter, saved)
                    self._note_split(adapter, saved)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_indices(self, adapter: str, indices: Tensor) -> None:
        weight, bias = self.base_layer.weight, self.base_layer.bias
        size = weight.numel() + (0 if bias is None else bias.numel())
        if len(indices) and not indices.is_meta and (int(indices.min()) < 0 or int(indices.max()) >= size):
            raise ValueError(
                f"SaRA adapter {adapter!r} has changes up to place {int(indices.max())}, and this layer has {size} entries "
                f"(weight {tuple(weight.shape)}): load the adapter on the base model that it was trained on."
            )

    # What an adapter is worth ------------------------------------------------------------------------------------------

    def effective_values(self, adapter: str) -> Tensor:
        """Changes that hold, `[k]`: the parameter, with frozen positions held (and without gradient there)."""
        values, frozen = self.sara_values[adapter], self.sara_frozen[adapter]
        if not len(frozen):
            return values
        return values.index_put((frozen,), self.sara_held[adapter].to(values.dtype))

    def base_entries(self, adapter: str) -> Tensor:
        """Entries of the base layer at the adapter's places, `[k]` float32."""
        return torch.cat([parameter.detach().reshape(-1)[where].float() for parameter, where in self._places(adapter)])

    def _changes(self, adapter: str) -> Changes:
        return Changes(self.effective_values(adapter), self.sara_indices[adapter], self.sara_split[adapter])

    # The layer ---------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Output of the layer with its active adapters."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        changes = [self._changes(name) for name in self.active_adapters if name in self.sara_values]
        if self.disable_adapters or self.merged or not changes:
            return self.base_layer(x)
        return sparse_layer(self._op, x, self.base_layer.weight, self.base_layer.bias, changes)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Add the adapters' changes to the layer's own weight and bias, as the forward pass does, bit for bit.

        Args:
            safe_merge: refuse a result with entries that are not finite, leaving the layer as it was.
            adapter_names: default: the active ones.

        Raises:
            ValueError: with `safe_merge`, an entry that is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.sara_values:
                continue
            values, split, places = self.effective_values(name), self.sara_split[name], self._places(name)
            old = [parameter.data.reshape(-1)[where] for parameter, where in places]
            pieces = [values[:split], values[split:]]
            new = [(entries + piece).to(entries.dtype) for entries, piece in zip(old, pieces, strict=False)]
            if safe_merge and not all(torch.isfinite(entries).all() for entries in new):
                raise ValueError(f"Adapter {name!r} has changes that are not finite: it is broken, and was not merged.")
            for (parameter, where), entries in zip(places, new, strict=True):
                _write(parameter, where, entries)
            self._before_merge.append(old)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back what the layer held before merging, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            places, old = self._places(self.merged_adapters.pop()), self._before_merge.pop()
            for (parameter, where), entries in zip(places, old, strict=True):
                _write(parameter, where, entries.to(parameter.device))

    def _places(self, adapter: str) -> list[tuple[nn.Parameter, Tensor]]:
        """The weight, and the bias if it has changes, each with the changes' flat places in it (int64)."""
        weight, split, indices = self.base_layer.weight, self.sara_split[adapter], self.sara_indices[adapter].long()
        places = [(weight, indices[:split])]
        if split < len(indices):
            places.append((self.base_layer.bias, indices[split:] - weight.numel()))
        return places

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Never: sparse changes have full rank."""
        return False

    def __repr__(self) -> str:
        return "sara." + super().__repr__()


def _write(target: nn.Parameter, where: Tensor, values: Tensor) -> None:
    # Not through a view: the weight may be stored in another order (channels last).
    target.data[torch.unravel_index(where, target.shape)] = values


class SaraLinear(SaraLayer):
    """A linear layer or GPT-2 `Conv1D` with adapters (PEFT's "all-linear" knows linear layers by the word in the name)."""


class SaraConvolution(SaraLayer):
    """A convolution with adapters."""


def wrap(layer: nn.Module) -> SaraLayer:
    """
    The layer, ready for adapters.

    Raises:
        TypeError: neither a linear layer nor a convolution, or a quantized one.
    """
    if not is_supported(layer):
        raise TypeError(
            f"SaRA adapts linear layers, convolutions and GPT-2's Conv1D with floating-point weights, not "
            f"{type(layer).__name__}: leave it out of `target_modules`, or load the model without quantization."
        )
    return SaraConvolution(layer) if isinstance(layer, nn.modules.conv._ConvNd) else SaraLinear(layer)
