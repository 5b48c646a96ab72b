"""What the card of an erased diffusion model claims, measured again."""

import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_robust.attacks.budget import Budget
from hf_robust.data.behavior import Behavior
from hf_robust.report.card import without_none
from hf_robust.report.claims import Claim
from hf_robust.report.verify import Plan

# Settings of a judge that change no verdict: where its classifier lies, and how many pictures it sees at once
_NO_MATTER = ("model", "batch_size")


class DiffusionPlan(Plan):
    """
    Attacks, classifier and prompts rebuilt from the claims of an evaluation of pictures.

    The classifier has to be given; it is told by a digest of its weights. Attacks that compare with the model before
    erasing need it as `base_model`; few-image fine-tuning cannot be run again, as no card holds its pictures.
    """

    shared = ("judge", "num_inference_steps", "guidance_scale", "original", "batch_size")
    needs_tokenizer = False

    def _rebuild(self, settings: dict[str, Any], none: Sequence[str]) -> Any:
        return rebuild_diffusion_attack(settings, none)

    def _read(self, path: Path, digest: str) -> list[Behavior]:
        from hf_robust.data.behaviors_file import read_behaviors
        from hf_robust.report.diffusion_evaluation import prompts_digest
        from hf_robust.report.diffusion_records import as_prompts

        found = as_prompts(read_behaviors(path, conversational=False), path.name)
        if prompts_digest(found) != digest:
            raise ValueError(f"{path.name} does not hold the prompts and seeds of the card (their digests differ)")
        return found

    def _rebuild_judge(self, judge: Any) -> Any:
        from hf_robust.report.diffusion_evaluation import describe_judge

        stated = self._first.get("judge")
        stated = stated if isinstance(stated, dict) else {}
        if judge is None:
            self._problems["judge"] = "pictures are judged by a classifier that no card holds; give it as `judge`"
            return None
        given = without_none(describe_judge(judge))
        pairs = [(given.get("name"), stated.get("name"))]
        settings = given.get("settings") or {}, stated.get("settings") or {}
        keys = {*settings[0], *settings[1]} - {*_NO_MATTER}
        pairs += [(settings[0].get(key), settings[1].get(key)) for key in keys]
        if any(first != second for first, second in pairs):
            raise ValueError(
                f"`judge` is {given.get('name')!r} with {settings[0]}, the card names {stated.get('name')!r} with "
                f"{settings[1]}: give the judge of the card."
            )
        return judge

    def reason(self, claim: Claim) -> str | None:
        found = super().reason(claim) or self._problems.get("judge")
        if found is not None:
            return found
        if claim.metric == "utility" and "utility" in (self._first.get("judge") or {}):
            return "utility was judged by another classifier than the attacks"
        names = [claim.attack] if claim.attack != "any" else [str(name) for name in claim.args.get("attacks") or []]
        return next((text for text in map(self._lacks, names) if text is not None), None)

    def _lacks(self, name: str) -> str | None:
        """Why a rebuilt attack cannot run here."""
        attack = self._attacks.get(name)
        needs = getattr(attack, "needs_original", False) or getattr(attack, "needs_target_images", False)
        if needs and self._base_model is None:
            return f"{name} compares with the model before erasing; give it as `base_model`"
        return None

    def load(self, name: str, revision: str | None) -> tuple[Any, Any]:
        return load_diffusion_model(name, self._first.get("dtype"), revision), None

    def run(self, model: Any, tokenizer: Any, output_dir: Any, progress: bool) -> Any:
        from hf_robust.report.diffusion_evaluation import evaluate_diffusion
        from hf_robust.report.evaluation_plan import fingerprint

        original = None
        if self._base_model is not None:
            original = load_diffusion_model(self._base_model, self._first.get("dtype"))
        stated = self._first.get("original")
        if original is not None and stated is not None and fingerprint(original)["weights"] != stated:
            raise ValueError(
                f"`base_model={self._base_model!r}` is not the model before erasing that the card names (the digests of their "
                "weights differ)."
            )
        data = {name: rows[: self._limit] for name, rows in self._data.items()}
        return evaluate_diffusion(
            model,
            prompts=data["behaviors"],
            utility_prompts=None if "utility" in (self._first.get("judge") or {}) else data.get("utility"),
            attacks={name: attack for name, attack in self._attacks.items() if self._lacks(name) is None},
            judge=self._judge,
            concept=str(self._first.get("concept") or ""),
            original=original,
            output_dir=Path(output_dir),
            progress=progress,
            **{
                key: self._first[key]
                for key in ("num_inference_steps", "batch_size")
                if isinstance(self._first.get(key), int)
            },
            guidance_scale=self._first.get("guidance_scale"),
        )


def rebuild_diffusion_attack(settings: Mapping[str, Any], none: Sequence[str] = ()) -> Any:
    """
    The attack on diffusion models that settings of a report or card describe.

    Args:
        settings: with `attack`, its name on the command line; further names that its constructor does not know are left
            out.
        none: names of settings that are `None`, which a card's metadata cannot hold.

    Raises:
        ValueError: the attack has no such name, is unknown, or needs pictures that no card holds.
        TypeError: a required setting is missing.
    """
    from hf_robust.report.diffusion_weight_attacks import all_diffusion_attacks

    attacks, name = all_diffusion_attacks(), settings.get("attack")
    if name not in attacks:
        raise ValueError(f"{name or settings.get('class')!r} is no attack of this library")
    if "images_digest" in settings:
        raise ValueError("it trains on pictures that no card holds")
    known = inspect.signature(attacks[name]).parameters
    arguments: dict[str, Any] = {key: None for key in none if key in known}
    for key, value in settings.items():
        if key not in known:
            continue
        if isinstance(value, Mapping) and key == "budget":
            value = Budget(**value)
        arguments[key] = math.inf if value == "inf" else value
    return attacks[name](**{**arguments, **({"progress": False} if "progress" in known else {})})


def load_diffusion_model(name: str, dtype: str | None = None, revision: str | None = None) -> Any:
    """
    A pipeline in evaluation mode, on the accelerator if there is one.

    Args:
        name: pipeline folder or Hub id.
        dtype: of the weights, `"float32"` by default.
        revision: of the Hub repository.
    """
    from hf_robust.diffusion import DiffusionModel

    kwargs = {} if revision is None else {"revision": revision}
    model = DiffusionModel.from_pretrained(name, dtype=getattr(torch, dtype or "float32"), **kwargs)
    accelerator = torch.accelerator.current_accelerator()
    return (model if accelerator is None else model.to(accelerator)).eval()
