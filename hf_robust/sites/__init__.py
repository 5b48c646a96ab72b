"""Where a perturbation enters a model: context managers that add it by hook and always clean up."""

from hf_robust.sites.adapter import adapter_off, same_trained
from hf_robust.sites.embeddings import EmbeddingSite
from hf_robust.sites.hidden_states import HiddenStateSite, decoder_layers, record_hidden_states
from hf_robust.sites.label_head import LabelIndex, gather_head, label_logits
from hf_robust.sites.language_input import LanguageInputSite, images_seen_once, input_site, language_model
from hf_robust.sites.pixels import PixelUnits
from hf_robust.sites.quiet import check_not_reentrant, keep_differentiable, quiet
from hf_robust.sites.weights import WeightSite, perturbed_weights

__all__ = [
    "EmbeddingSite",
    "HiddenStateSite",
    "LabelIndex",
    "PixelUnits",
    "LanguageInputSite",
    "WeightSite",
    "adapter_off",
    "check_not_reentrant",
    "decoder_layers",
    "images_seen_once",
    "input_site",
    "keep_differentiable",
    "gather_head",
    "label_logits",
    "language_model",
    "perturbed_weights",
    "quiet",
    "record_hidden_states",
    "same_trained",
]
