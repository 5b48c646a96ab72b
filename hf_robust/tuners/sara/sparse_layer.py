"""A layer whose weight has changes at a few places: gradients arrive at these alone, and no second weight is kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class LinearOp:
    """`x [..., in] → [..., out]` with a weight `[out, in]`, or `[in, out]` if `transposed` (GPT-2's `Conv1D`)."""

    transposed: bool

    def prepare(self, x: Tensor) -> Tensor:
        """What comes before the operation itself."""
        return x

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same calls as in the layer itself, so that the results are the same bit for bit."""
        if not self.transposed:
            return F.linear(x, weight, bias)
        out = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight)  # type: ignore[arg-type]  # always has a bias
        return out.view(*x.shape[:-1], weight.shape[1])

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients for x, weight and bias, each `None` unless needed."""
        rows, columns = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x = grad @ (weight.T if self.transposed else weight) if needs[0] else None
        grad_weight = (columns.T @ rows if self.transposed else rows.T @ columns) if needs[1] else None
        return grad_x, grad_weight, rows.sum(0) if needs[2] else None


@dataclass(frozen=True)
class ConvolutionOp:
    """A convolution of one to three dimensions, `x [batch, in, ...] → [batch, out, ...]`."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    # (mode, amounts as F.pad takes them) where the padding is a step of its own, before the convolution
    pad: tuple[str, tuple[int, ...]] | None

    def prepare(self, x: Tensor) -> Tensor:
        """Padding that the convolution cannot do itself."""
        return x if self.pad is None else F.pad(x, self.pad[1], mode=self.pad[0])

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution."""
        zeros = (0,) * len(self.stride)
        return torch.convolution(
            x, weight, bias, self.stride, self.padding, self.dilation, False, zeros, self.groups
        )  # fmt: skip

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients for x, weight and bias, each `None` unless needed."""
        zeros = (0,) * len(self.stride)
        grads = torch.ops.aten.convolution_backward(
            grad,
            x,
            weight,
            [weight.shape[0]],
            self.stride,
            self.padding,
            self.dilation,
            False,
            zeros,
            self.groups,
            needs,
        )
        return grads[0], grads[1], grads[2]


def is_supported(layer: nn.Module) -> bool:
    """Whether the layer is a linear layer or a convolution with a plain floating-point weight."""
    # nn.MultiheadAttention reads the weight of its output projection and never calls it.
    if isinstance(layer, NonDynamicallyQuantizableLinear) or not isinstance(layer, (nn.Linear, Conv1D, *_CONVOLUTIONS)):
        return False
    # Type of the quantized layers of bitsandbytes: uint8 or int8.
    return isinstance(layer.weight, Tensor) and layer.weight.is_floating_point()


def op_of(layer: nn.Module) -> LinearOp | ConvolutionOp:
    """The operation of a layer that [`is_supported`]."""
    if isinstance(layer, _CONVOLUTIONS):
        # Amounts of padding are in the attribute for every mode; names ("same", "valid") only there.
        own_step = layer.padding_mode != "zeros" or isinstance(layer.padding, str)
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        amounts = tuple(layer._reversed_padding_repeated_twice)
        return ConvolutionOp(
            stride=tuple(layer.stride),
            padding=(0,) * len(layer.stride) if own_step else tuple(layer.padding),  # type: ignore[arg-type]
            dilation=tuple(layer.dilation),
            groups=layer.groups,
            pad=(mode, amounts) if own_step and any(amounts) else None,
        )
    return LinearOp(transposed=isinstance(layer, Conv1D))


@dataclass(frozen=True)
class Changes:
    """
    Changes of one adapter to a layer's weight and bias.

    Attributes:
        values: `[k]`, floating point: what is added.
        indices: `[k]`, int32 or int64, ascending: places in the flattened weight, followed by the bias.
        split: how many of them lie in the weight.
    """

    values: Tensor
    indices: Tensor
    split: int


def add_at(tensor: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """
    A copy of `tensor` with `values` added at flat `indices`; the sums are rounded to the tensor's type once.

    Differentiable for `values` and `tensor`.
    """
    flat = tensor.reshape(-1)
    sums = (flat[indices] + values).to(tensor.dtype)
    result = flat.index_put((indices,), sums).view(tensor.shape)
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
        return result.contiguous(memory_format=torch.channels_last)
    return result


def changed_parameters(weight: Tensor, bias: Tensor | None, changes: Sequence[Changes]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with the changes of all adapters, one after the other, as merging them does."""
    size = weight.numel()
    for change in changes:
        weight = add_at(weight, change.values[: change.split], change.indices[: change.split])
        if bias is not None and change.split < len(change.indices):
            bias = add_at(bias, change.values[change.split :], change.indices[change.split :] - size)
    return weight, bias


class _SparseLayer(torch.autograd.Function):
    """
    `op` with changed weight and bias.

    What is kept for the backward pass is the input, the layer's own weight and the changes: the changed weight is made
    once more there, and dropped. The dense gradient of the weight exists for one layer at a time. Everything in the
    backward pass is differentiable again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        op: LinearOp | ConvolutionOp,
        dtype: torch.dtype,
        splits: list[int],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *pairs: Tensor,
    ) -> Tensor:
        ctx.op, ctx.dtype, ctx.splits = op, dtype, splits
        ctx.save_for_backward(x, weight, bias, *pairs)
        new_weight, new_bias = _SparseLayer.new_parameters(ctx, weight, bias, pairs)
        return op.forward(x, new_weight, new_bias)

    @staticmethod
    def new_parameters(
        ctx: Any, weight: Tensor, bias: Tensor | None, pairs: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        halves = zip(pairs[::2], pairs[1::2], ctx.splits, strict=True)
        new_weight, new_bias = changed_parameters(weight, bias, [Changes(*half) for half in halves])
        return new_weight.to(ctx.dtype), None if new_bias is None else new_bias.to(ctx.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,) = grad_outputs
        x, weight, bias, *pairs = ctx.saved_tensors
        _, _, _, needs_x, needs_weight, needs_bias, *needs_pairs = ctx.needs_input_grad
        wanted = [need and len(index) > 0 for need, index in zip(needs_pairs[::2], pairs[1::2], strict=True)]
        ends = [need and len(index) > split for need, index, split in zip(wanted, pairs[1::2], ctx.splits, strict=True)]
        new_weight, _ = _SparseLayer.new_parameters(ctx, weight, None, pairs)
        grad_x, grad_weight, grad_bias = ctx.op.backward(
            grad, x, new_weight, (needs_x, needs_weight or any(wanted), bias is not None and (needs_bias or any(ends)))
        )
        grads: list[Tensor | None] = []
        for number, split in enumerate(ctx.splits):
            values, indices = pairs[2 * number : 2 * number + 2]
            parts = []
            if wanted[number]:
                parts.append(grad_weight.reshape(-1)[indices[:split]])
            if ends[number]:
                parts.append(grad_bias[indices[split:] - weight.numel()])
            gradient = torch.cat(parts).to(values.dtype) if parts else torch.zeros_like(values)
            grads += [gradient if needs_pairs[2 * number] else None, None]
        grad_weight = grad_weight.to(weight.dtype) if needs_weight else None
        grad_bias = grad_bias.to(bias.dtype) if needs_bias else None
        return None, None, None, grad_x, grad_weight, grad_bias, *grads


def sparse_layer(
    op: LinearOp | ConvolutionOp, x: Tensor, weight: Tensor, bias: Tensor | None, changes: Sequence[Changes]
) -> Tensor:
    """
    Output of a layer with changes to its weight and bias; without changes in value, that of the layer bit for bit.

    Under autocast, the operation runs in autocast's type, as the layer itself would.
    """
    x = op.prepare(x)
    device = x.device.type
    dtype = weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x = x.to(dtype)
    unbatched = isinstance(op, ConvolutionOp) and x.dim() < weight.dim()
    pairs = [tensor for change in changes for tensor in (change.values, change.indices)]
    splits = [change.split for change in changes]
    out = _SparseLayer.apply(op, dtype, splits, x.unsqueeze(0) if unbatched else x, weight, bias, *pairs)
    return out.squeeze(0) if unbatched else out
