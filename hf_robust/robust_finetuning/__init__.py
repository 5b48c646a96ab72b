"""What can be done with the weights of a robust model after training: RiFT, interpolation, scaling an adapter."""

from hf_robust.robust_finetuning.criticality import module_robust_criticality
from hf_robust.robust_finetuning.interpolation import interpolate_weights, scale_adapter
from hf_robust.robust_finetuning.rift import RiFTPoint, RiFTResult, adversarial_batches, rift

__all__ = [
    "RiFTPoint",
    "RiFTResult",
    "adversarial_batches",
    "interpolate_weights",
    "module_robust_criticality",
    "rift",
    "scale_adapter",
]
