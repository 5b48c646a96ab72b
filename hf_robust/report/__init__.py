"""What was measured, as JSON, table, plot and model card."""

from typing import TYPE_CHECKING, Any

from hf_robust.report.card import evaluation_card, model_card
from hf_robust.report.evaluation import evaluate_robustness
from hf_robust.report.evaluation_plots import plot_evaluation
from hf_robust.report.flags import find_flags
from hf_robust.report.plots import plot_report
from hf_robust.report.report import AttackSummary, Flag, Measurement, Report
from hf_robust.report.table import format_table

if TYPE_CHECKING:
    from hf_robust.report.diffusion_evaluation import evaluate_diffusion
    from hf_robust.report.diffusion_weight_attacks import (
        FewImageFinetuning,
        SwapBack,
        few_image_finetuning,
        swap_back,
    )

# Loaded on first use: they bring the attacks on diffusion models along
_DIFFUSION = {
    "FewImageFinetuning": "diffusion_weight_attacks",
    "SwapBack": "diffusion_weight_attacks",
    "evaluate_diffusion": "diffusion_evaluation",
    "few_image_finetuning": "diffusion_weight_attacks",
    "swap_back": "diffusion_weight_attacks",
}

__all__ = [
    "AttackSummary",
    "FewImageFinetuning",
    "Flag",
    "Measurement",
    "Report",
    "SwapBack",
    "evaluate_diffusion",
    "evaluate_robustness",
    "evaluation_card",
    "few_image_finetuning",
    "find_flags",
    "format_table",
    "model_card",
    "plot_evaluation",
    "plot_report",
    "swap_back",
]


def __getattr__(name: str) -> Any:
    if name in _DIFFUSION:
        import importlib

        return getattr(importlib.import_module(f"{__name__}.{_DIFFUSION[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
