"""A report as a model card that the Hub reads."""

from typing import Any

from hf_robust.report.report import Report
from hf_robust.report.table import METRIC_NAMES, format_table


def model_card(report: Report, *, plot: str | None = None, peft: bool = True) -> str:
    """
    Text of a README.md: metadata with every figure, what was trained how, the table, what was not run, and limits.

    Args:
        report: the report.
        plot: file name of the plot beside the card, if there is one.
        peft: whether the saved model is an adapter.

    Returns:
        Markdown with a YAML header.
    """
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="hf_robust",
            dataset_name=f"{m.split} ({m.count} prompts)",
            metric_type=m.metric,
            metric_name=f"{METRIC_NAMES.get(m.metric, m.metric)} under {m.attack}",
            metric_value=round(m.value, 4),
            metric_args={
                "attack": m.attack,
                "interval_95": [round(m.low, 4), round(m.high, 4)],
                **report.attacks.get(m.attack, {}),
            },
        )
        for m in report.measurements
        if m.subject == "after"
    ]
    data = ModelCardData(
        library_name="peft" if peft else "transformers",
        tags=["hf_robust", report.method.get("name", "").lower(), "adversarial-training"],
        pipeline_tag="text-generation",
        model_name=report.title,
        eval_results=results or None,
    )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {report.title}",
        f"Base model: {report.base_model}. Method: {report.method.get('name')} "
        f"({report.method.get('paper')}), trained with hf_robust.",
        "## Threat model and training",
        _settings(report.training),
        "## Figures",
        "Shares of prompts with 95 % Wilson intervals. *Control* judges the same texts against shuffled answers; the "
        "*oracle* never knew the withheld answers, so what it scores is chance.",
        format_table(report, markdown=True),
        f"![before and after]({plot})" if plot else "",
        "## Attacks that were run",
        "\n".join(f"- **{name}**: {_inline(settings)}" for name, settings in report.attacks.items()) or "None.",
        "Not run: " + ("; ".join(report.not_run) or "nothing else was considered") + ". Robustness against these is "
        "unknown.",
        "## Data",
        _settings(report.data),
        "## Limits",
        "These figures hold for the attacks, budgets and prompts above and for nothing else: a stronger or different "
        "attack may succeed where these failed.",
        "## Environment",
        _settings(
            {
                **report.environment.get("packages", {}),
                **{k: v for k, v in report.environment.items() if k != "packages"},
            }
        ),
        report.method.get("citation") and f"## Citation\n\n```bibtex\n{report.method['citation']}\n```",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _inline(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _settings(settings: dict[str, Any]) -> str:
    return "\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in settings.items())
