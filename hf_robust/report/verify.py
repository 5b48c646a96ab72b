"""What a model card claims, measured again with the card's own settings."""

import logging
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_robust.data.behavior import Behavior
from hf_robust.data.redaction import redacted
from hf_robust.report.card import DATA_OF, without_none
from hf_robust.report.claims import Claim, ModelFiles, read_claims
from hf_robust.report.rebuild import load_model, read_as_digest, rebuild_attack
from hf_robust.report.report import Measurement
from hf_robust.report.table import METRIC_NAMES, align

logger = logging.getLogger(__name__)

HOLDS, FAILS, UNCHECKED = "holds", "FAILS", "not checkable"

# More is better for users and for whoever wants harmful requests refused; of everything else less is better.
_HIGHER_IS_BETTER = ("refusal", "utility", "accuracy", "robust_accuracy", "worst_class_accuracy")
_CHECKED = (
    "attack_success_rate", "attack_success_rate_any", "pre_attack_success_rate", "refusal", "over_refusal", "utility",
    "perplexity", "membership_inference",
)  # fmt: skip
# Best at 0.5, chance: above it members are found, below it they stick out as forgotten
_BEST_AT_CHANCE = ("membership_inference",)

# Cards round to four places
_ROUNDING = 5e-5
# A perplexity has no interval; other hardware moves it by far less than this
_PERPLEXITY_MARGIN = 0.01


@dataclass(frozen=True)
class ClaimCheck:
    """
    A claim beside what was measured.

    Attributes:
        claim: as the card has it.
        measured: the same figure measured again; `None` if it was not.
        status: `"holds"`, `"FAILS"` or `"not checkable"`.
        reason: why a claim is not checkable; empty otherwise.
    """

    claim: Claim
    measured: Measurement | None
    status: str
    reason: str = ""


def verify(
    model_id: str | os.PathLike[str],
    *,
    behaviors: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    model: Any = None,
    tokenizer: Any = None,
    base_model: str | None = None,
    judge: Any = None,
    revision: str | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> list[ClaimCheck]:
    """
    Measure a card's claims again, with the attacks, judge, seeds and prompts that the card names.

    A claim **fails** when it says more for the model than the new measurement allows: where less is better (attack success,
    over-refusal), the claimed value lies below the 95 % interval measured now; where more is better (refusal of harmful
    requests, utility), above it; where 0.5 is best (membership inference), nearer to 0.5 than all of it. A perplexity, which
    has no interval, fails when the new one is more than 1 % higher.
    Otherwise it **holds**. What cannot be run again is **not checkable** and never counts as holding: figures of other
    programs, costs, attacks that are not in this library or need another model, a judge that is a function or a model of
    somebody's own (unless it is given as `judge`), prompts that are missing or whose digest is not the card's, and an attack
    that now fails on more behaviours than it did.

    The fewer prompts, the wider the interval and the weaker the check.

    Args:
        model_id: folder or Hub id with the card (`README.md`) and, unless `model` is given, the model or adapter.
        behaviors: file of the attacked behaviours. Default: `behaviors.jsonl` beside the card. Of an image model: the dataset,
            a folder or Hub id with the columns `image` and `label` (or `question` and `answer`).
        limit: use the first `limit` prompts of each list only.
        model: model to measure, a folder or Hub id of one, or a loaded model. Default: the one beside the card.
        tokenizer: of a loaded `model`.
        base_model: folder or Hub id of an adapter's base. Default: the one that the adapter names. Of an erased diffusion
            pipeline: the pipeline before erasing, which some attacks need.
        judge: the judge that the card names, where it cannot be rebuilt from its name.
        revision: of the Hub repository.
        output_dir: where records and report of the new evaluation go; an interrupted check goes on there. Default: a
            temporary folder.
        progress: whether to show a progress bar.

    Returns:
        One check for each claim of the card, in the card's order.

    Raises:
        FileNotFoundError: there is no card.
        ValueError: the card's metadata cannot be read, `limit` is below 1, or `judge` is not the one the card names.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit={limit!r}` must be at least 1, or None for all prompts.")
    source = ModelFiles(model_id, revision)
    claims = read_claims(source)
    from hf_robust.report.vision_verify import VISION_TASKS, VisionPlan

    kind: type[Plan] = Plan
    if any(claim.args.get("task") == "text-to-image" for claim in claims):
        from hf_robust.report.diffusion_verify import DiffusionPlan

        kind = DiffusionPlan
    elif any(claim.args.get("task") in VISION_TASKS for claim in claims):
        kind = VisionPlan
    elif any(claim.args.get("evaluation") == "unlearning" for claim in claims):
        from hf_robust.report.unlearning_verify import UnlearningPlan

        kind = UnlearningPlan
    plan = kind(claims, source, behaviors, limit, judge, base_model)
    if not any(plan.reason(claim) is None for claim in claims):
        return [ClaimCheck(claim, None, UNCHECKED, plan.reason(claim) or "") for claim in claims]
    if model is None or isinstance(model, str | os.PathLike):
        name = str(model_id) if model is None else str(model)
        model, tokenizer = plan.load(name, revision)
    elif tokenizer is None and plan.needs_tokenizer:
        raise ValueError("`tokenizer=None` with a loaded `model`: give its tokenizer too.")
    report, problem = None, ""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            report = plan.run(model, tokenizer, scratch if output_dir is None else output_dir, progress)
        except ValueError as error:
            # Attacks of the card that cannot run here say nothing about the model
            logger.warning("The card's evaluation could not be run again: %s", error)
            problem = f"the evaluation failed: {error}"
    checks = []
    for claim in claims:
        reason = plan.reason(claim) or problem
        if reason or report is None:
            checks.append(ClaimCheck(claim, None, UNCHECKED, reason))
            continue
        measured = report.find("model", claim.metric, claim.split, claim.attack)
        failed = next((run.failures for run in report.runs if run.name == claim.attack), 0)
        if measured is None:
            checks.append(ClaimCheck(claim, None, UNCHECKED, "none of the prompts used now is of this kind"))
        elif failed > int(claim.args.get("failures") or 0):
            checks.append(ClaimCheck(claim, measured, UNCHECKED, f"{failed} behaviours failed under this attack"))
        else:
            checks.append(ClaimCheck(claim, measured, judge_claim(claim, measured)))
    return checks


def judge_claim(claim: Claim, measured: Measurement) -> str:
    """
    Whether a claim survives a new measurement: see [`verify`] for the rule.

    Args:
        claim: with a finite value.
        measured: the same figure, measured again.

    Returns:
        `"holds"` or `"FAILS"`.
    """
    low, high = measured.low, measured.high
    if low is None or high is None:
        low, high = measured.value * (1 - _PERPLEXITY_MARGIN), measured.value * (1 + _PERPLEXITY_MARGIN)
    if claim.metric in _BEST_AT_CHANCE:
        least = abs(min(max(0.5, low), high) - 0.5)
        return FAILS if abs(claim.value - 0.5) < least - _ROUNDING else HOLDS
    if claim.metric in _HIGHER_IS_BETTER:
        return FAILS if claim.value > high + _ROUNDING else HOLDS
    return FAILS if claim.value < low - _ROUNDING else HOLDS


def format_checks(checks: Sequence[ClaimCheck]) -> str:
    """
    Claim, new value and interval side by side, as a text table.

    Args:
        checks: from [`verify`].
    """
    lines = [["prompts", "attack", "figure", "claimed", "measured", "n", "result"]]
    for check in checks:
        claim, m = check.claim, check.measured
        claimed = f"{claim.value:.4g}" if isinstance(claim.value, int | float) else str(claim.value)
        if claim.interval is not None:
            claimed += f" [{claim.interval[0]:.2f}, {claim.interval[1]:.2f}]"
        value = "–" if m is None else f"{m.value:.4g}"
        if m is not None and m.low is not None and m.high is not None:
            value += f" [{m.low:.2f}, {m.high:.2f}]"
        counts = f"{claim.args.get('count', '?')} → {m.count}" if m is not None else str(claim.args.get("count", "?"))
        result = check.status + (f": {check.reason}" if check.reason else "")
        name = METRIC_NAMES.get(claim.metric, claim.metric)
        lines.append([claim.split.replace("_", " "), claim.attack, name, claimed, value, counts, result])
    return align(lines)


# What to run ----------------------------------------------------------------------------------------------------------


class Plan:
    """Attacks, judge and data rebuilt from the claims; why a claim cannot be checked."""

    #: Settings of the evaluation that all claims which are checked share.
    shared: Sequence[str] = ("judge", "max_new_tokens")
    needs_tokenizer = True

    def __init__(
        self,
        claims: Sequence[Claim],
        source: ModelFiles,
        behaviors: str | os.PathLike[str] | None,
        limit: int | None,
        judge: Any,
        base_model: str | None,
    ):
        self._limit, self._base_model = limit, base_model
        self._attacks: dict[str, Any] = {}
        self._settings: dict[str, Any] = {}
        self._digests: dict[str, Any] = {}
        self._problems: dict[str, str] = {}
        self._data: dict[str, list[Behavior]] = {}
        ours = [claim for claim in claims if claim.ours]
        for claim in ours:
            self._take_attack(claim)
            self._take_data(claim, source, behaviors)
        self._first = ours[0].args if ours else {}
        self._judge = self._rebuild_judge(judge)

    def _take_attack(self, claim: Claim) -> None:
        settings = claim.args.get("settings")
        if isinstance(settings, dict) and claim.attack not in self._settings:
            self._settings[claim.attack] = settings
            try:
                self._attacks[claim.attack] = self._rebuild(settings, claim.args.get("settings_none") or [])
            except Exception as error:  # a card may state anything
                self._problems[f"attack {claim.attack}"] = f"the attack cannot be rebuilt: {error}"

    def _take_data(self, claim: Claim, source: ModelFiles, behaviors: str | os.PathLike[str] | None) -> None:
        name = DATA_OF.get(claim.metric, "behaviors")
        if name in self._digests:
            return
        self._digests[name] = claim.args.get("data_digest")
        path = (
            Path(behaviors).expanduser()
            if name == "behaviors" and behaviors is not None
            else source.file(f"{name}.jsonl")
        )
        if path is None or not path.is_file():
            self._problems[f"data {name}"] = f"{name}.jsonl is missing beside the card" + (
                "; give it with `behaviors`" if name == "behaviors" else ""
            )
            return
        try:
            self._data[name] = self._read(path, str(claim.args.get("data_digest")))
        except ValueError as error:
            self._problems[f"data {name}"] = str(error)

    def _rebuild(self, settings: dict[str, Any], none: Sequence[str]) -> Any:
        """An attack from its settings."""
        return rebuild_attack(settings, none)

    def _read(self, path: Path, digest: str) -> list[Behavior]:
        """The prompts of a file, if they are the card's."""
        return read_as_digest(path, digest)

    def _rebuild_judge(self, judge: Any) -> Any:
        from hf_robust.metrics.judges import ExactJudge, StringJudge, as_judge

        stated = self._first.get("judge")
        stated = stated if isinstance(stated, dict) else {}
        name, settings = stated.get("name"), stated.get("settings") or {}
        if judge is not None:
            judge = as_judge(judge)
            given = without_none(redacted(judge.settings))
            keys = {*given, *settings} - {"batch_size"}
            if judge.name != name or any(given.get(key) != settings.get(key) for key in keys):
                raise ValueError(
                    f"`judge` is {judge.name!r} with {given}, the card names {name!r} with {settings}: give the judge of the "
                    "card."
                )
            return judge
        try:
            return {cls.name: cls for cls in (ExactJudge, StringJudge)}[str(name)](**settings)
        except (KeyError, TypeError):
            self._problems["judge"] = f"the judge {name!r} cannot be rebuilt from its name; give it as `judge`"
            return None

    def load(self, name: str, revision: str | None) -> tuple[Any, Any]:
        """A model, its weights held as they were, and its tokenizer."""
        precision = {key: self._first.get(key) for key in ("dtype", "bits")}
        return load_model(name, self._base_model, revision, **precision)

    def reason(self, claim: Claim) -> str | None:
        """Why a claim cannot be checked; `None` if it can."""
        if not claim.ours:
            return "the card does not state what it takes to measure this again"
        if claim.metric not in _CHECKED:
            return "no claim about robustness with an interval"
        if isinstance(claim.value, bool) or not isinstance(claim.value, int | float) or not math.isfinite(claim.value):
            return f"the value {claim.value!r} is no number"
        if claim.metric == "perplexity" and self._limit is not None:
            return "a perplexity over some of the texts is not that over all"
        same = (
            all(claim.args.get(name) == self._first.get(name) for name in self.shared)
            and claim.args.get("data_digest") == self._digests[DATA_OF.get(claim.metric, "behaviors")]
            and claim.args.get("settings") == self._settings.get(claim.attack)
        )
        if not same:
            return "of another evaluation than the card's first figure: its judge, prompts or settings differ"
        # Nothing runs without behaviours
        for name in dict.fromkeys(["behaviors", DATA_OF.get(claim.metric, "behaviors")]):
            if f"data {name}" in self._problems:
                return self._problems[f"data {name}"]
            if name not in self._data:
                return f"the card makes no claim over {name}.jsonl that names its digest"
        if claim.metric in DATA_OF:
            return None
        names = [claim.attack] if claim.attack not in ("none", "any") else []
        if claim.attack == "any":
            names = [str(name) for name in claim.args.get("attacks") or []] or ["any"]
        for name in names:
            if name not in self._attacks:
                return self._problems.get(f"attack {name}", f"the card does not state the settings of {name}")
            if self._limit is not None and getattr(self._attacks[name], "needs_all_behaviors", False):
                return f"{name} searches over all behaviours at once: leave `limit` out"
        return self._problems.get("judge")

    def run(self, model: Any, tokenizer: Any, output_dir: str | os.PathLike[str], progress: bool) -> Any:
        """The new evaluation's report."""
        from hf_robust.metrics.judges import StringJudge
        from hf_robust.report.evaluation import evaluate_robustness

        data: dict[str, Any] = {name: rows[: self._limit] for name, rows in self._data.items()}
        sizes = {name: self._first.get(name) for name in ("batch_size", "max_new_tokens")}
        data |= {name: size for name, size in sizes.items() if isinstance(size, int)}
        return evaluate_robustness(
            model,
            tokenizer,
            # Without a judge no attack can be checked; what users get needs none
            attacks=self._attacks if self._judge is not None else {},
            judge=self._judge if self._judge is not None else StringJudge(),
            output_dir=Path(output_dir),
            subject="model",
            progress=progress,
            **data,
        )
