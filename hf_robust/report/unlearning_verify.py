"""What the card of an unlearned model claims, measured again."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_robust.attacks.registry import ATTACKS
from hf_robust.data.behavior import Behavior
from hf_robust.report.claims import Claim
from hf_robust.report.rebuild import rebuild_attack
from hf_robust.report.unlearning_attacks import forgetting_attacks
from hf_robust.report.unlearning_rows import as_questions, is_trained, questions_digest
from hf_robust.report.verify import Plan


class UnlearningPlan(Plan):
    """
    Attacks, judge and questions rebuilt from the claims of an unlearning evaluation: those about the model alone.

    What compares with a retain-only model or with the original (forget quality, recovery, what is above the oracle) is not
    checked, nor what has no interval.
    """

    shared = ("judge", "max_new_tokens", "batch_size")

    def _rebuild(self, settings: dict[str, Any], none: Sequence[str]) -> Any:
        return rebuild_forgetting_attack(settings, none)

    def _read(self, path: Path, digest: str) -> list[Behavior]:
        from hf_robust.data.behaviors_file import read_behaviors

        # As they were asked, which may be messages in one list and passages in another; else a file of plain prompts
        for conversational in (None, True):
            try:
                found = as_questions(read_behaviors(path, conversational=conversational), path.name)
            except ValueError:
                continue
            if questions_digest(found) == digest:
                return found
        raise ValueError(f"{path.name} does not hold the questions of the card (their digests differ)")

    def reason(self, claim: Claim) -> str | None:
        found = super().reason(claim)
        if found is None and claim.metric == "membership_inference":
            if "utility" not in self._data:
                return self._problems.get(
                    "data utility", "the card makes no claim over utility.jsonl, which has the holdout"
                )
            if not any(row.category == "holdout" for row in self._data["utility"]):
                return "utility.jsonl has no questions of the holdout"
            return None
        if found is not None or claim.attack in ("none", "any") or claim.attack in self._attacks:
            return found
        return self._problems.get(f"attack {claim.attack}", f"the card does not state the settings of {claim.attack}")

    def run(self, model: Any, tokenizer: Any, output_dir: Any, progress: bool) -> Any:
        from hf_robust.report.unlearning_evaluation import evaluate_unlearning

        listed: dict[str, list[Behavior]] = {}
        for row in self._data.get("utility", []):
            listed.setdefault(str(row.category), []).append(row)
        if not listed.get("retain"):
            raise ValueError("utility.jsonl has no questions of the retain set")
        kept = {name: rows[: self._limit] for name, rows in listed.items()}
        forget, holdout = self._data["behaviors"][: self._limit], kept.pop("holdout", None)
        return evaluate_unlearning(
            model,
            tokenizer=tokenizer,
            forget=forget,
            retain=kept.pop("retain"),
            # Of the first rows all may be other phrasings, which are no members
            holdout=holdout if any(map(is_trained, forget)) else None,
            utility=kept,
            attacks=self._attacks,
            judge=self._judge,
            output_dir=Path(output_dir),
            progress=progress,
            **{
                name: self._first[name]
                for name in ("batch_size", "max_new_tokens")
                if isinstance(self._first.get(name), int)
            },
        )


def rebuild_forgetting_attack(settings: Mapping[str, Any], none: Sequence[str] = ()) -> Any:
    """
    The attack that settings of an unlearning report or card describe.

    Args:
        settings: with `attack`, its name on the command line; further names that its constructor does not know are left
            out.
        none: names of settings that are `None`, which a card's metadata cannot hold.

    Raises:
        ValueError: the attack has no such name, is unknown, or trains on rows that no card holds.
        TypeError: a required setting is missing.
    """
    name = settings.get("attack")
    if name in ATTACKS or name not in forgetting_attacks():
        return rebuild_attack(settings, none)
    if "rows_digest" in settings:
        raise ValueError("it trains on rows that no card holds")
    cls = forgetting_attacks()[str(name)]
    known = inspect.signature(cls).parameters
    return cls(**{key: value for key, value in settings.items() if key in known})
