"""The input of the language model inside a vision-language model as a perturbation site."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hf_robust.sites.embeddings import EmbeddingSite


def language_model(model: nn.Module) -> nn.Module | None:
    """
    The language model inside a vision-language model; `None` for a model of text alone.

    Args:
        model: a transformers or PEFT model, unwrapped.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()
    config = getattr(base, "config", None)
    if getattr(config, "vision_config", None) is None or getattr(config, "text_config", None) is None:
        return None
    with contextlib.suppress(AttributeError, NotImplementedError):
        decoder = base.get_decoder()
        # A model that does not find its decoder returns itself
        if isinstance(decoder, nn.Module) and decoder is not base and decoder is not base.base_model:
            return decoder
    return None


class LanguageInputSite(EmbeddingSite):
    """
    What the language model of a vision-language model reads: the embeddings of the text with the images' features in place.

    A hook on the input embeddings reaches no image: the features overwrite what stands at the images' positions, so that the
    gradient there is zero. This one is on the language model itself, behind that. Of models that feed image features into
    deeper layers too (Qwen3-VL's DeepStack), those stay as they are.

    Radii in mean embedding norms refer to the rows of the embedding table ([`EmbeddingSite.mean_row_norm`]), for image
    positions too.

    Args:
        model: a vision-language model of transformers, or a PEFT model around one, not wrapped by DDP.

    Raises:
        ValueError: the model has no input embeddings, or no language model of its own inside.
    """

    def __init__(self, model: nn.Module):
        super().__init__(model)
        found = language_model(model)
        if found is None:
            raise ValueError(
                f"`model` ({type(model).__name__}) holds no language model behind an image tower: `get_decoder()` must return "
                "it. For a model of text alone use `EmbeddingSite`."
            )
        self.decoder = found

    @contextlib.contextmanager
    def add(self, delta: torch.Tensor) -> Iterator[None]:
        """
        Add `delta` to what the language model reads in every forward inside the context.

        Args:
            delta: `[batch, length, hidden]`, image positions included; cast to the dtype of the embeddings when added.
                Gradients flow to it.

        Raises:
            ValueError: in the forward, when the language model is given no embeddings, or some of another shape.
        """

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            states = kwargs.get("inputs_embeds")
            if states is None or states.shape != delta.shape:
                shape = None if states is None else tuple(states.shape)
                raise ValueError(
                    f"`delta` has shape {tuple(delta.shape)} but the language model reads embeddings of shape {shape}: "
                    "perturb with the same `input_ids` as the forward's."
                )
            return args, {**kwargs, "inputs_embeds": states + delta.to(device=states.device, dtype=states.dtype)}

        handle = self.decoder.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def input_site(model: nn.Module) -> EmbeddingSite:
    """
    Where a perturbation of the prompt enters: what the language model reads, or the input embeddings of a text model.

    Args:
        model: a transformers or PEFT model, unwrapped.
    """
    return EmbeddingSite(model) if language_model(model) is None else LanguageInputSite(model)
