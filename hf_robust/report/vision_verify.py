"""What the card of an image model claims, measured again."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_robust.data.behavior import Behavior
from hf_robust.report.card import DATA_OF
from hf_robust.report.claims import Claim, ModelFiles
from hf_robust.report.verify import Plan

# Tasks of cards that are about image models
VISION_TASKS = ("image-classification", "zero-shot-image-classification", "image-text-to-text")
_KINDS = {
    "image-classification": "classifier", "zero-shot-image-classification": "clip", "image-text-to-text": "vlm",
}  # fmt: skip
_COLUMNS = {
    "image-classification": {"image": "image", "label": "label"},
    "zero-shot-image-classification": {"image": "image", "label": "label"},
    "image-text-to-text": {"image": "image", "answer": "answer", "question": "question"},
}


class VisionPlan(Plan):
    """
    Attacks rebuilt from the claims of an evaluation of an image model; the images are those of `behaviors`, a dataset, which
    are told by their digest.

    Of a CLIP model, the card has the templates of the class texts, and the names of the classes unless these are many: then
    the dataset must have them.
    """

    shared = ("judge", "images", "classes_digest", "batch_size", "max_new_tokens")
    needs_tokenizer = False

    def __init__(
        self,
        claims: Sequence[Claim],
        source: ModelFiles,
        behaviors: Any,
        limit: int | None,
        judge: Any,
        base_model: str | None,
    ):
        self._dataset, self._processor, self._source = behaviors, None, source
        super().__init__(claims, source, None, limit, judge, base_model)
        # The attacks that were claims; the others are the sanity checks of one of them
        whole = [claim.attack for claim in claims if claim.metric == "robust_accuracy" and claim.split == "all"]
        self._main = {name: attack for name, attack in self._attacks.items() if name in whole}

    @property
    def _task(self) -> str:
        return str(self._first.get("task"))

    def _take_data(self, claim: Claim, source: ModelFiles, behaviors: Any) -> None:
        if DATA_OF.get(claim.metric) == "images":
            self._digests["images"] = claim.args.get("data_digest")

    def _rebuild(self, settings: dict[str, Any], none: Sequence[str]) -> Any:
        return settings, list(none)  # built with the model's processor, which is not there yet

    def _rebuild_judge(self, judge: Any) -> Any:
        return None

    def reason(self, claim: Claim) -> str | None:
        if not claim.ours:
            return "the card does not state what it takes to measure this again"
        if claim.metric not in ("accuracy", "robust_accuracy", "worst_class_accuracy"):
            return "no claim about robustness with an interval"
        if isinstance(claim.value, bool) or not isinstance(claim.value, int | float):
            return f"the value {claim.value!r} is no number"
        if self._task not in _COLUMNS:
            return f"a task {self._task!r} is none of images"
        if _KINDS[self._task] == "clip" and not self._first.get("templates"):
            return "its class texts are not in the card"
        if self._dataset is None:
            return "no card holds the images; give the dataset with `behaviors`"
        if self._limit is not None:
            return "the digest is that of all images: leave `limit` out"
        if any(claim.args.get(name) != self._first.get(name) for name in self.shared):
            return "of another evaluation than the card's first figure"
        if claim.attack not in self._attacks and claim.attack != "none" and not claim.attack.startswith("any"):
            return f"the card does not state the settings of {claim.attack}"
        for name in (claim.attack, *self._main):
            settings = self._settings.get(name)
            if settings is not None and not settings.get("attack"):
                return f"{name} is no attack of this library"
        return None

    def load(self, name: str, revision: str | None) -> tuple[Any, Any]:
        from hf_robust.report.vision_loading import load_vision_model

        model, self._processor = load_vision_model(
            name, _KINDS[self._task], dtype=str(self._first.get("dtype") or "float32"), revision=revision
        )
        return model, None

    def run(self, model: Any, tokenizer: Any, output_dir: Any, progress: bool) -> Any:
        from hf_robust.report.vision_evaluation import evaluate_vision
        from hf_robust.report.vision_language import evaluate_vlm
        from hf_robust.report.vision_loading import load_vision_model, read_images
        from hf_robust.report.vision_tasks import ZeroShotClassifier
        from hf_robust.trainers.labels import names_of, numbered_as

        kind, processor = _KINDS[self._task], self._processor
        if processor is None:  # a loaded model
            _, processor = load_vision_model(self._source.name, kind)
        dataset, names = read_images(str(self._dataset), _COLUMNS[self._task], limit=self._first.get("images"))
        if kind == "classifier":
            dataset = numbered_as(dataset, "label", names_of(model.config))
        attacks = {
            name: rebuild_vision_attack(settings, none, processor) for name, (settings, none) in self._main.items()
        }
        options: dict[str, Any] = {
            "dataset": dataset, "attacks": attacks, "output_dir": Path(output_dir), "progress": progress,
            "batch_size": int(self._first.get("batch_size") or 32),
            "sanity_images": int(self._first.get("sanity_images") or 0),
        }  # fmt: skip
        if kind == "clip":
            names = self._first.get("class_names") or names
            if not names:
                raise ValueError("neither card nor `behaviors` names the classes")
            model = ZeroShotClassifier(model, processor, names, self._first["templates"])
        report = (
            evaluate_vlm(model, processor, max_new_tokens=int(self._first.get("max_new_tokens") or 32), **options)
            if kind == "vlm"
            else evaluate_vision(model, image_processor=processor, **options)
        )
        if report.data["images_digest"] != self._digests.get("images"):
            raise ValueError("`behaviors` does not hold the images of the card (their digests differ)")
        if kind == "clip" and report.data["classes_digest"] != self._first.get("classes_digest"):
            raise ValueError("the class texts are not those of the card (their digests differ)")
        return report

    def _read(self, path: Path, digest: str) -> list[Behavior]:
        raise NotImplementedError("images come from a dataset")


def rebuild_vision_attack(settings: Mapping[str, Any], none: Sequence[str], image_processor: Any) -> Any:
    """
    The attack on pixels that settings of a report or card describe.

    Args:
        settings: with `attack`, its name on the command line; names that its constructor does not know are left out.
        none: names of settings that are `None`, which a card's metadata cannot hold.
        image_processor: of the model; the card tells its scale only.

    Raises:
        ValueError: the attack has no such name, or was made for a model whose pixels are raw.
    """
    from hf_robust.report.vision_attacks import vision_attacks

    attacks, name = vision_attacks(), settings.get("attack")
    if name not in attacks:
        raise ValueError(f"{name or settings.get('class')!r} is no attack of this library")
    known = inspect.signature(attacks[str(name)]).parameters
    arguments = {key: None for key in none if key in known}
    arguments |= {key: value for key, value in settings.items() if key in known}
    arguments["image_processor"] = image_processor if settings.get("image_processor") else None
    return attacks[str(name)](**arguments)
