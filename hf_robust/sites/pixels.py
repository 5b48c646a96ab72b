"""Pixels as a perturbation site: raw [0, 1] pixels and the units of `pixel_values`."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_robust.threats import check_at_least

# PIL's names of pictures, by their channels
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class PixelUnits:
    """
    What an image processor makes of raw pixels: `pixel_values = (raw * scale - mean) / std` for each channel.

    Radii, steps and the box are always those of raw pixels in [0, 1]; this class says what they are in `pixel_values`.

    Args:
        image_processor: image processor of transformers, or a processor that holds one. Its `image_mean` and `image_std` hold
            where it normalises, its `rescale_factor` (times 255) where it rescales; of timm's models, mean and std of its
            `data_config`. `None`: `pixel_values` are raw.
        channels: number of channels.

    Attributes:
        low: `[channels, 1, 1]` float32, what a raw 0 is in `pixel_values`.
        high: `[channels, 1, 1]` float32, what a raw 1 is.

    Raises:
        ValueError: mean and std do not match the channels, a std is not positive, or the processor tells nothing of its scale.

    Example:

    ```python
    >>> units = PixelUnits(image_processor)
    >>> units.radius(8 / 255)  # one number for each channel
    ```
    """

    low: torch.Tensor
    high: torch.Tensor

    def __init__(self, image_processor: Any = None, *, channels: int = 3):
        processor = getattr(image_processor, "image_processor", image_processor)
        self.channels = channels
        scale, mean, std = 1.0, [0.0] * channels, [1.0] * channels
        named = normalisation(processor)
        if processor is not None and named is None and not _tells_scale(processor):
            raise ValueError(
                f"`image_processor` ({type(processor).__name__}) has neither `do_normalize`, `do_rescale` nor a `data_config` "
                "with mean and std, so that the scale of its `pixel_values` is unknown: give an image processor of "
                "transformers, or `None` for raw pixels in [0, 1]."
            )
        if named is not None:
            mean, std = (self._per_channel(name, given) for name, given in named.items())
            if min(std) <= 0:
                raise ValueError(
                    f"`image_processor.{list(named)[1]}={std!r}` must be positive: pixels are divided by it."
                )
        if getattr(processor, "do_rescale", False):
            scale = 255.0 * float(processor.rescale_factor)
            if abs(scale - 1) < 1e-6:
                scale = 1.0
            if getattr(processor, "rescale_offset", False):  # as in EfficientNet: images are moved to [-1, 1]
                mean = [value + 1.0 for value in mean]
        self.is_raw = scale == 1.0 and not any(mean) and set(std) == {1.0}
        self._mean = torch.tensor(mean).view(-1, 1, 1)
        self._std = torch.tensor(std).view(-1, 1, 1)
        self._scale = scale
        self.low = self.from_raw(torch.zeros(channels, 1, 1))
        self.high = self.from_raw(torch.ones(channels, 1, 1))

    def _per_channel(self, name: str, given: Any) -> list[float]:
        if isinstance(given, int | float):
            given = [given] * self.channels
        if not isinstance(given, Sequence) or len(given) != self.channels:
            raise ValueError(
                f"`image_processor.{name}={given!r}` must have one number for each of the {self.channels} channels of "
                "`pixel_values`: use the processor that made them."
            )
        return [float(value) for value in given]

    def radius(self, eps: float) -> torch.Tensor:
        """
        A radius of raw pixels in `pixel_values`.

        Args:
            eps: in raw [0, 1] pixels, such as 8/255.

        Returns:
            `[channels, 1, 1]` float32.
        """
        return eps * self._scale / self._std

    def to_raw(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Raw pixels. Where `pixel_values` are raw already, they come back as they are, bit for bit.

        Args:
            pixel_values: `[..., channels, height, width]` float.
        """
        if self.is_raw:
            return pixel_values
        return (pixel_values * self._std.to(pixel_values) + self._mean.to(pixel_values)) / self._scale

    def from_raw(self, raw: torch.Tensor) -> torch.Tensor:
        """
        `pixel_values` of raw pixels, the inverse of [`to_raw`].

        Args:
            raw: `[..., channels, height, width]` float in [0, 1].
        """
        if self.is_raw:
            return raw
        return (raw * self._scale - self._mean.to(raw)) / self._std.to(raw)

    def check(
        self, pixel_values: torch.Tensor, epsilon: float, norm: str = "linf", *, where: str = "the batch"
    ) -> None:
        """
        Raise a `ValueError` that says what is wrong with images or radius. Waits for the device once.

        Args:
            pixel_values: `[batch, ..., channels, height, width]` float.
            epsilon: radius in raw pixels.
            norm: of the ball: an L∞ radius of 1 already holds every image.
            where: what the rows are those of, for the message.

        Raises:
            ValueError: not a float tensor, another number of channels than the processor's, NaN, pixels outside the raw
                range, or a radius given in 255ths; wrong pixels are named by their rows.
        """
        check_epsilon(epsilon, norm)
        if not isinstance(pixel_values, torch.Tensor) or not pixel_values.is_floating_point():
            kind = getattr(pixel_values, "dtype", type(pixel_values).__name__)
            raise ValueError(
                f"`pixel_values` is {kind}: give a float tensor, of raw pixels in [0, 1] (bytes divided by 255) or as the "
                "image processor returns it."
            )
        shape = tuple(pixel_values.shape)
        if len(shape) < 4 or shape[-3] != self.channels:
            raise ValueError(
                f"`pixel_values` has shape {shape}: expected [batch, {self.channels}, height, width], with one mean and std "
                "of the image processor for each channel."
            )
        raw = self.to_raw(pixel_values.detach().float())
        check_raw(raw, raw, is_raw=self.is_raw, dtype=pixel_values.dtype, where=where)


def normalisation(processor: Any) -> dict[str, Any] | None:
    """
    Mean and std of an image processor, in this order, by the names of its attributes; `None` where it does not normalise.

    Args:
        processor: image processor of transformers. That of timm's models has them in `data_config`, after [0, 1].
    """
    config = getattr(processor, "data_config", None)
    if isinstance(config, Mapping) and {"mean", "std"} <= config.keys() and not _tells_scale(processor):
        return {f"data_config[{name!r}]": config[name] for name in ("mean", "std")}
    if getattr(processor, "do_normalize", False):
        return {name: getattr(processor, name, None) for name in ("image_mean", "image_std")}
    return None


def _tells_scale(processor: Any) -> bool:
    return any(getattr(processor, name, None) is not None for name in ("do_normalize", "do_rescale"))


def image_channels(config: Any) -> int:
    """
    Channels of the images that a model sees.

    Args:
        config: of the model, or `None`. Default where it does not tell: 3.
    """
    for part in (config, getattr(config, "vision_config", None)):
        channels = getattr(part, "num_channels", None)
        if isinstance(channels, int):
            return channels
    return 3


def with_channels(image: Any, channels: int) -> Any:
    """
    A picture in grey, in colours or with a palette with as many channels as a model sees.

    Args:
        image: PIL image; anything else (an array) comes back as it is.
        channels: of the model.

    Raises:
        ValueError: no pictures have so many channels.
    """
    if not hasattr(image, "convert"):
        return image
    if channels not in _MODES:
        raise ValueError(
            f"The model sees images of {channels} channels (`config.num_channels`); pictures can have 1, 3 or 4: give arrays "
            "or `pixel_values`."
        )
    return image if image.mode == _MODES[channels] else image.convert(_MODES[channels])


def check_raw(
    raw: torch.Tensor,
    parts: Sequence[torch.Tensor] | torch.Tensor,
    *,
    is_raw: bool,
    dtype: torch.dtype,
    where: str,
    rows: Sequence[int] | None = None,
) -> None:
    """
    Raise a `ValueError` unless raw pixels are finite and in [0, 1]. Waits for the device once.

    Args:
        raw: pixels, float32, of any shape.
        parts: the same pixels image by image, looked at for the message alone.
        is_raw: whether `pixel_values` are raw themselves.
        dtype: of `pixel_values`, which are allowed its rounding.
        where: what the rows are those of, for the message.
        rows: row of each image. Default: a row holds one.
    """
    if raw.numel() == 0:
        return
    # Half precision rounds normalised pixels by this much
    slack = max(1e-3, 2 * torch.finfo(dtype).eps)
    smallest, largest = torch.stack([*raw.aminmax()]).tolist()
    if -slack <= smallest and largest <= 1 + slack:  # NaN fails both
        return
    numbers = range(len(parts)) if rows is None else rows
    broken = [row for row, part in zip(numbers, parts, strict=True) if not bool(part.isfinite().all())]
    if broken:
        raise ValueError(
            f"`pixel_values` holds NaN or infinite pixels in {_places(broken)} of {where}: look for a broken image or "
            "augmentation."
        )
    outside = [row for row, part in zip(numbers, parts, strict=True) if part.min() < -slack or part.max() > 1 + slack]
    remedy = (
        "Divide bytes by 255."
        if largest > 10
        else "If they are normalised, pass the `image_processor` that normalised them."
        if is_raw
        else "Pass the `image_processor` that made them; raw pixels must go through it first."
    )
    raise ValueError(
        f"`pixel_values` lies in [{smallest:.4g}, {largest:.4g}] in raw pixels, outside [0, 1], in {_places(outside)} of "
        f"{where}. {remedy}"
    )


def _places(rows: Sequence[int]) -> str:
    shown = list(dict.fromkeys(rows))
    return f"rows {shown[:8]}{'…' if len(shown) > 8 else ''}"


def check_epsilon(epsilon: float, norm: str = "linf") -> None:
    """
    Raise a `ValueError` unless a radius can be one of raw [0, 1] pixels.

    Args:
        epsilon: radius.
        norm: `"linf"`, `"l2"` or `"l1"`.
    """
    check_at_least("epsilon", epsilon, 0, "Give it in raw pixels, such as 8/255; 0 switches the attack off.")
    if norm == "linf" and epsilon > 1:
        raise ValueError(
            f"`epsilon={epsilon!r}` is in raw pixels, which lie in [0, 1], so that 1 already allows any image: "
            f"write {epsilon:g}/255 for {epsilon:g} grey levels."
        )


def check_step_size(argument: str, step_size: float, norm: str = "linf") -> None:
    """
    Raise a `ValueError` unless a length can be that of a step in raw [0, 1] pixels.

    Args:
        argument: name of the argument as the user wrote it.
        step_size: length of a step.
        norm: `"linf"`, `"l2"` or `"l1"`.
    """
    check_at_least(argument, step_size, 0, "Give the length of a step in raw pixels, such as 2/255.")
    if norm == "linf" and step_size > 1:
        raise ValueError(
            f"`{argument}={step_size!r}` is in raw pixels, which lie in [0, 1]: write {step_size:g}/255 for {step_size:g} grey "
            "levels."
        )
