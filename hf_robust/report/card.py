"""A report as a model card that the Hub reads and that `hf-robust verify` can re-run."""

import os
import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from hf_robust.report.compare import subject_of
from hf_robust.report.report import Report
from hf_robust.report.table import METRIC_NAMES, format_table

_LIMITS = (
    "These figures hold for the attacks, budgets and prompts above and for nothing else: a stronger or different attack may "
    "succeed where these failed."
)
_UNLEARNED = (
    "Success is an answer from the forget set. *original*: the model before unlearning, the ceiling. *oracle*: a model that "
    "never saw the forget set, the floor: what it answers, under attack too, is guessed or taught by the attack. Relearning "
    "trains on one part of the forget set and asks for the other. Forget quality is the p-value of a test that the model and "
    "the oracle are not told apart (near 1 is good); recovery is the share of what was forgotten that an attack brings back; "
    "membership inference, an AUC, tells forget questions from questions that no model saw (0.5: not told apart)."
)
# Pipeline tag and library of each kind of model; a report of another kind than text names it in its data
_TEXT, _IMAGES = "text-generation", "text-to-image"
# Methods that train against an attack
_ADVERSARIAL = ("cat", "capo")

# What of the data decides on a figure, besides the prompts
_STATED = (
    "batch_size", "max_new_tokens", "dtype", "bits", "task", "concept", "num_inference_steps", "guidance_scale", "original",
    "classes_digest", "class_names", "templates", "sanity_images", "images", "evaluation",
)  # fmt: skip

# Which list of prompts a figure is over, where it is not the behaviours
DATA_OF = {
    "over_refusal": "harmless", "utility": "utility", "perplexity": "perplexity_texts",
    "model_utility": "utility", "relearned_utility": "utility",
    "accuracy": "images", "robust_accuracy": "images", "worst_class_accuracy": "images", "disparity": "images",
}  # fmt: skip


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
    from huggingface_hub import EvalResult

    results = [
        EvalResult(
            task_type=_TEXT,
            dataset_type="hf_robust",
            dataset_name=f"{m.split} ({m.count} prompts)",
            dataset_split=m.split,
            metric_type=m.metric,
            metric_name=f"{METRIC_NAMES.get(m.metric, m.metric)} under {m.attack}",
            metric_value=round(m.value, 4),
            metric_args=without_none(
                {"attack": m.attack, "interval_95": _interval(m.low, m.high), **report.attacks.get(m.attack, {})}
            ),
        )
        for m in report.measurements
        if m.subject == "after"
    ]
    sections = [
        _header(report, results, peft),
        f"# {report.title}",
        _introduction(report),
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
        _LIMITS,
        *_closing(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def evaluation_card(
    report: Report,
    *,
    plots: Sequence[str | os.PathLike[str]] = (),
    peft: bool = False,
    subject: str | None = None,
) -> str:
    """
    Text of a README.md for an evaluated model: every figure as a claim that `hf-robust verify` can check, and everything
    that was not run.

    Each figure of the subject becomes a model-index result. Its `metric_args` hold the interval, the number of prompts, the
    attack with its settings, the judge and the digest of the behaviours: enough to rebuild the attack from the card alone.

    Args:
        report: of [`~hf_robust.report.evaluate_robustness`].
        plots: pictures beside the card; their file names are linked.
        peft: whether the model is an adapter.
        subject: model that the card is about. Default: the report's only one, or `"after"`.

    Returns:
        Markdown with a YAML header.

    Raises:
        ValueError: the report has several subjects, or none of the one given.
    """
    subject = subject_of(report, subject)
    results = eval_results(report, subject)
    missing = not_run(report)
    sections = [
        _header(report, results, peft),
        f"# {report.title}",
        _introduction(report),
        "Every figure below is in this card's metadata, with the settings it was measured with. To measure them again: "
        "`hf-robust verify THIS_MODEL`.",
        "## Threat model and training",
        _settings(report.training) or "The evaluation was told nothing of the training.",
        "## Figures",
        "Shares with 95 % Wilson intervals, where the figure is a share. Attack success: lower is better.",
        _UNLEARNED if report.data.get("evaluation") == "unlearning" else "",
        format_table(report, markdown=True),
        "\n\n".join(f"![{PurePath(plot).stem.replace('_', ' ')}]({PurePath(plot).name})" for plot in plots),
        "## Flags",
        "\n".join(f"- **{flag.code}**: {flag.message} *What to do: {flag.remedy}*" for flag in report.flags)
        or "None of the checks for evaluations that flatter a model found anything. That is no proof that all is well.",
        "## Attacks that were run",
        "\n".join(
            f"- **{name}**{f' ({threat(settings)})' if threat(settings) else ''}: {_inline(settings)}"
            for name, settings in report.attacks.items()
        )
        or "None: this card claims nothing about attacks.",
        f"Judge: {report.judge.get('name', 'unknown')}"
        + (f" ({_inline(report.judge['settings'])})" if report.judge.get("settings") else "")
        + ".",
        "Not run: " + ("; ".join(missing) or "nothing else was considered") + ". Robustness against these is unknown.",
        _costs(report),
        "## Data",
        _settings(report.data),
        "## Limits",
        _LIMITS + (" The flags above limit them further." if report.flags else ""),
        *_closing(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def training_card(report: Report, *, peft: bool = True) -> str:
    """
    Text of a README.md for a model that was trained and not measured: what was done, and that nothing is known of what it
    withstands.

    Args:
        report: what is known of the training, without any figure.
        peft: whether the model is an adapter.

    Returns:
        Markdown with a YAML header.
    """
    sections = [
        _header(report, [], peft),
        f"# {report.title}",
        "> **Nothing has been measured.** No attack has been run on this model, so its robustness is unknown: that it was "
        "trained against an attack is no evidence that it withstands one.",
        _introduction(report),
        "## Threat model and training",
        _settings(report.training),
        "## Attacks that were not run",
        "\n".join(f"- {name}" for name in not_run(report)),
        "## Data",
        _settings(report.data),
        *_closing(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def eval_results(report: Report, subject: str) -> list[Any]:
    """
    A model's figures as `huggingface_hub.EvalResult`s, which come back equal from the card's metadata.

    Args:
        report: the report.
        subject: whose figures.
    """
    from huggingface_hub import EvalResult

    failures = {run.name: run.failures for run in report.runs}
    results = []
    for m in report.measurements:
        if m.subject != subject:
            continue
        source = DATA_OF.get(m.metric, "behaviors")
        args: dict[str, Any] = {
            "attack": m.attack,
            "count": m.count,
            "unit": m.unit,
            "interval_95": _interval(m.low, m.high),
            "control": m.control,
            "failures": failures.get(m.attack),
            "judge": report.judge or None,
            "data_file": f"{source}.jsonl",
            "data_digest": report.data.get(f"{source}_digest"),
            **{name: report.data.get(name) for name in _STATED},
        }
        if m.attack == "any":
            args["attacks"] = list(report.attacks)
        if m.attack in report.attacks:
            settings = report.attacks[m.attack]
            args["settings"] = settings
            # A card's metadata cannot hold None: settings that are None are listed by name
            args["settings_none"] = [name for name, value in settings.items() if value is None] or None
        results.append(
            EvalResult(
                task_type=_task(report),
                dataset_type="hf_robust",
                dataset_name=m.split,
                dataset_split=m.split,
                metric_type=m.metric,
                metric_name=METRIC_NAMES.get(m.metric, m.metric)
                + (f" under {m.attack}" if m.attack in report.attacks else ""),
                metric_value=round(m.value, 4),
                metric_args=without_none(args),
            )
        )
    # The metadata groups results by split
    splits = list(dict.fromkeys(result.dataset_split for result in results))
    return sorted(results, key=lambda result: splits.index(result.dataset_split))


def not_run(report: Report) -> list[str]:
    """
    What a reader must not take for withstood: the report's own list, and every attack of this library that was not run.

    Args:
        report: the report.
    """
    from hf_robust.attacks.registry import ATTACKS

    if _task(report) == _IMAGES and not report.attacks:  # nothing was evaluated, so no evaluation has made the list
        from hf_robust.attacks.diffusion import DIFFUSION_ATTACKS

        return [name for name in DIFFUSION_ATTACKS if name != "no_attack"]
    if _task(report) != _TEXT:  # attacks on language models do not apply
        return list(dict.fromkeys(report.not_run))
    run = {settings.get("attack", name) for name, settings in report.attacks.items()}
    if report.data.get("evaluation") == "unlearning":  # asked without attack, too
        run.add("plain")
    known = [name for name in ATTACKS if name not in run]
    return list(dict.fromkeys([*report.not_run, *known]))


def threat(settings: dict[str, Any]) -> str:
    """
    An attack's threat model in words: ε with its unit and norm, steps with theirs.

    Args:
        settings: of the attack, as in a report.

    Returns:
        For instance `"ε 0.05 × mean embedding norm, norm l2_token, 10 gradient steps"`; empty for an attack without any.
    """
    if "images_digest" in settings:
        return f"{settings.get('num_steps')} training steps on {settings.get('num_images')} pictures of the concept"
    parts = []
    if settings.get("epsilon") is not None:
        absolute = (
            f"in {settings['space']}"
            if "space" in settings
            else f"in units of the {'hidden states' if settings.get('attack') == 'latent' else 'embeddings'}"
        )
        unit = "× mean embedding norm" if settings.get("epsilon_relative") else absolute
        norm = f", norm {settings['norm']}" if settings.get("norm") else ""
        parts.append(
            f"ε {settings['epsilon']} {unit}{norm}" if str(settings["epsilon"]) != "inf" else f"no bound{norm}"
        )
    steps = settings.get("steps", settings.get("num_steps"))
    if steps is not None:
        parts.append(f"{steps} {'gradient' if 'steps' in settings else 'search'} steps")
    if settings.get("step_size") is not None:
        parts.append(f"step size {settings['step_size']} {'× ε' if settings.get('step_size_relative') else 'absolute'}")
    if settings.get("suffix_length") is not None:
        parts.append(f"{settings['suffix_length']} suffix tokens")
    return ", ".join(parts)


def _task(report: Report) -> str:
    return str(report.data.get("task") or _TEXT)


def _header(report: Report, results: list[Any], peft: bool) -> str:
    from huggingface_hub import ModelCardData

    method = str(report.method.get("name") or "").lower()
    # The Hub takes ids only; without an owner they are lower-case ("gpt2"), which a model's class is not
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+|[a-z0-9.-]+", report.base_model) and not os.path.exists(report.base_model)
    data = ModelCardData(
        base_model=report.base_model if is_id else None,
        library_name="peft" if peft else "diffusers" if _task(report) == _IMAGES else "transformers",
        tags=[
            "hf_robust",
            *([method] if method else []),
            *(["adversarial-training"] if method in _ADVERSARIAL else []),
        ],
        pipeline_tag=_task(report),
        model_name=report.title,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _introduction(report: Report) -> str:
    name, paper = report.method.get("name"), report.method.get("paper")
    method = f"Method: {name}" + (f" ({paper})" if paper else "") + ", trained with hf_robust." if name else ""
    # Of a folder the name only: a card does not tell where somebody keeps his models
    base = PurePath(report.base_model).name if os.path.isdir(report.base_model) else report.base_model
    return f"Base model: {base}. {method}".strip()


def _closing(report: Report) -> list[str]:
    environment = {
        **report.environment.get("packages", {}),
        **{k: v for k, v in report.environment.items() if k != "packages"},
    }
    citation = report.method.get("citation")
    return ["## Environment", _settings(environment), f"## Citation\n\n```bibtex\n{citation}\n```" if citation else ""]


def _costs(report: Report) -> str:
    """What each attack spent, as a table."""
    if not report.runs:
        return ""
    head = ["attack", "behaviours", "failed", "forwards", "backwards", "answers generated", "cut answers"]
    if _task(report) == _IMAGES:
        head = ["attack", "prompts", "failed", "UNet items forward", "UNet items backward", "pictures judged"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for run in report.runs:
        cells = (run.name, run.count, run.failures, run.forwards, run.backwards, run.generations, run.truncated)
        lines.append(f"| {' | '.join(map(str, cells[: len(head)]))} |")
    return "\n".join(lines)


def _interval(low: float | None, high: float | None) -> list[float] | None:
    return None if low is None or high is None else [round(low, 4), round(high, 4)]


def without_none(value: Any) -> Any:
    """Without what the metadata would drop, so that a card read back equals the one written."""
    if isinstance(value, dict):
        return {name: without_none(item) for name, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_none(item) for item in value if item is not None]
    return value


def _inline(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)


def _settings(settings: dict[str, Any]) -> str:
    return "\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in settings.items())
