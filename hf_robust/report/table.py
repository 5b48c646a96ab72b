"""A report as a text table: one line for each figure, one column for each model."""

from collections.abc import Sequence

from hf_robust.report.report import Measurement, Report

METRIC_NAMES = {
    "affirmative": "affirmative prefix",
    "exact": "withheld answer, exact",
    "graded": "withheld answer, share of words",
    "refusal": "refused",
    "over_refusal": "over-refusal",
    "utility": "utility",
    "attack_success_rate": "attack success",
    "attack_success_rate_any": "attack success, any attack",
    "pre_attack_success_rate": "success before any attack",
    "perplexity": "perplexity",
    "cost_per_success": "cost per success",
    "accuracy": "accuracy",
    "robust_accuracy": "robust accuracy",
    "worst_class_accuracy": "accuracy of the worst class",
    "disparity": "disparity",
    "rouge": "answer recalled (ROUGE-L)",
    "answer_probability": "probability of the answer",
    "extraction_strength": "extraction strength",
    "truth_ratio": "truth ratio",
    "forget_quality": "forget quality",
    "model_utility": "model utility",
    "membership_inference": "membership inference",
    "recovery": "recovery",
    "above_oracle": "recalled above the oracle",
    "relearned": "recalled after relearning",
    "relearned_utility": "utility after relearning",
    "layer_probability": "probability of the answer",
}


def rows_of(report: Report) -> tuple[list[str], list[tuple[str, str, str, dict[str, Measurement]]]]:
    """
    Figures grouped for reading.

    Args:
        report: the report.

    Returns:
        The subjects in order, and a list of (split, attack, metric, {subject: measurement}) in order of appearance.
    """
    subjects = list(dict.fromkeys(m.subject for m in report.measurements))
    grouped: dict[tuple[str, str, str], dict[str, Measurement]] = {}
    for m in report.measurements:
        grouped.setdefault((m.split, m.attack, m.metric), {})[m.subject] = m
    return subjects, [(*key, cells) for key, cells in grouped.items()]


def format_table(report: Report, *, markdown: bool = False, intervals: bool = True) -> str:
    """
    All figures of a report.

    Args:
        report: the report.
        markdown: pipes for a model card, aligned columns for a terminal otherwise.
        intervals: whether to print the 95 % interval behind each value.
    """
    subjects, rows = rows_of(report)

    def cell(measurement: Measurement | None) -> str:
        if measurement is None:
            return "–"
        text = (
            f"{measurement.value:.2f}" if measurement.unit == "share" else f"{measurement.value:.4g} {measurement.unit}"
        )
        if intervals and measurement.low is not None and measurement.high is not None:
            places = ".2f" if measurement.unit == "share" else ".4g"
            text += f" [{measurement.low:{places}}, {measurement.high:{places}}]"
        if measurement.control is not None:
            text += f" (control {measurement.control:.2f})"
        return text

    lines = [["prompts", "attack", "figure", "n", *subjects]]
    for split, attack, metric, cells in rows:
        count = str(next(iter(cells.values())).count)
        name = METRIC_NAMES.get(metric, metric)
        lines.append([split.replace("_", " "), attack, name, count, *(cell(cells.get(s)) for s in subjects)])
    if markdown:
        head, *body = (f"| {' | '.join(line)} |" for line in lines)
        return "\n".join([head, "|" + "---|" * len(lines[0]), *body])
    return align(lines)


def align(lines: Sequence[Sequence[str]]) -> str:
    """
    Cells as columns for a terminal, a rule below the first line.

    Args:
        lines: the head and the rows, all of the same length.
    """
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([text[0], "  ".join("-" * width for width in widths), *text[1:]])
