"""`hf-robust evaluate` for image classifiers, CLIP and vision-language models: accuracy under attack on the pixels."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from hf_robust.cli.evaluate_forms import asked_attacks, check_required, given_options, listed, run_form
from hf_robust.report.vision_loading import load_vision_model, model_kind, read_images
from hf_robust.threats import check_at_least, check_choice

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_ATTACKS = ("pgd", "apgd", "autoattack", "random_noise")
_KINDS = {"classifier": "image classifier", "clip": "CLIP model", "vlm": "vision-language model"}


@dataclass
class EvaluateVisionArguments:
    """
    Options of `hf-robust evaluate` for models of images.

    Parameters:
        model_name_or_path (`str`):
            Folder or Hub id of an image classifier, a CLIP model or a vision-language model. Its configuration tells which.
        dataset (`str`):
            Images with labels, or with questions and answers: a folder that `save_to_disk` wrote, a folder of images (one
            folder for each class, or a `metadata.jsonl`), a parquet file, or a Hub id.
        output_dir (`str`):
            Folder of the report and of the finished work that an interrupted evaluation goes on from.
        attacks (`list[str]`):
            Names, separated by spaces or commas. Of a vision-language model all but autoattack.
        epsilon (`list[str]`, defaults to `8/255`):
            Radii in raw [0, 1] pixels, as numbers or fractions. With several, every attack runs at each, and a curve is
            drawn.
        norm (`str`, defaults to `"linf"`):
            Of the perturbations.
        steps (`int`, defaults to `20`):
            Of PGD. APGD has 100, as in its paper; see `attack_settings`.
        attack_settings (`str`, *optional*):
            YAML or JSON file of settings by attack. A name that is no attack's needs an entry with `attack`, so that one
            attack may run twice.
        dataset_split (`str`, defaults to `"test"`):
            Split of the dataset.
        image_column (`str`, defaults to `"image"`):
            Its images.
        label_column (`str`, defaults to `"label"`):
            Its labels, for classifiers and CLIP: numbers or names.
        question_column (`str`, defaults to `"question"`):
            Its questions, for vision-language models. Where it is missing, captions are asked for.
        answer_column (`str`, defaults to `"answer"`):
            Its right answers.
        adapter (`str`, *optional*):
            Folder or Hub id of a PEFT adapter to put on the model.
        class_names (`list[str]`, *optional*):
            Of CLIP's classes, in the labels' order, separated by commas. Default: the dataset's.
        templates (`list[str]`, *optional*):
            Texts with `{}` in the place of the class name, for CLIP.
        max_new_tokens (`int`, defaults to `32`):
            Length of a vision-language model's answer at most.
        sanity_images (`int`, defaults to `64`):
            Images of the sanity checks; 0 for none.
        limit (`int`, *optional*):
            The first so many images.
        seed (`int`, defaults to `0`):
            Of every attack.
        batch_size (`int`, defaults to `32`):
            Images in a batch, the unit of work that is kept.
        dtype (`str`, defaults to `"float32"`):
            Of the weights.
        model_revision (`str`, *optional*):
            Branch, tag or commit of the model on the Hub.
        overwrite (`bool`, defaults to `False`):
            Discard another evaluation's work in `output_dir`.
        no_progress (`bool`, defaults to `False`):
            No progress bar.
    """

    model_name_or_path: str = field(default="", metadata={"help": "Image classifier, CLIP or vision-language model."})
    dataset: str = field(default="", metadata={"help": "save_to_disk folder, folder of images, parquet, or Hub id."})
    output_dir: str = field(
        default="", metadata={"help": "Folder of the report and of finished work, from which a rerun goes on."}
    )
    attacks: list[str] = field(default_factory=lambda: ["pgd"], metadata={"help": f"Of {', '.join(_ATTACKS)}."})
    epsilon: list[str] = field(
        default_factory=lambda: ["8/255"], metadata={"help": "Radii in raw [0, 1] pixels, such as 4/255 8/255."}
    )
    norm: str = field(default="linf", metadata={"help": "linf, l2 or l1."})
    steps: int = field(default=20, metadata={"help": "Of PGD."})
    attack_settings: str | None = field(
        default=None, metadata={"help": 'YAML or JSON file of settings by attack: {"pgd": {"restarts": 5}}.'}
    )
    dataset_split: str = field(default="test", metadata={"help": "Split of the dataset."})
    image_column: str = field(default="image", metadata={"help": "Its images."})
    label_column: str = field(default="label", metadata={"help": "Its labels, numbers or names."})
    question_column: str = field(default="question", metadata={"help": "Its questions; captions where missing."})
    answer_column: str = field(default="answer", metadata={"help": "Its right answers."})
    adapter: str | None = field(default=None, metadata={"help": "Folder or Hub id of a PEFT adapter."})
    class_names: list[str] = field(default_factory=list, metadata={"help": "Of CLIP's classes, separated by commas."})
    templates: list[str] = field(default_factory=list, metadata={"help": "Texts with {} for the class name (CLIP)."})
    max_new_tokens: int = field(default=32, metadata={"help": "Length of an answer at most."})
    sanity_images: int = field(default=64, metadata={"help": "Images of the sanity checks; 0 for none."})
    limit: int | None = field(default=None, metadata={"help": "The first so many images."})
    seed: int = field(default=0, metadata={"help": "Seed of every attack."})
    batch_size: int = field(default=32, metadata={"help": "Images in a batch, the unit of work that is kept."})
    dtype: str = field(default="float32", metadata={"help": f"Of the weights: {', '.join(_DTYPES)}."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    overwrite: bool = field(default=False, metadata={"help": "Discard another evaluation's work in output_dir."})
    no_progress: bool = field(default=False, metadata={"help": "No progress bar."})

    def check(self) -> None:
        """
        Raise a `ValueError` for what can be known to be wrong without loading anything.

        Raises:
            ValueError: a required option is missing, or a value is out of range.
        """
        check_required(self, ("model_name_or_path", "dataset", "output_dir"))
        if self.limit is not None:
            check_at_least("--limit", self.limit, 1, "Leave it out for all images.")
        check_choice("--dtype", self.dtype, _DTYPES)
        check_choice("--norm", self.norm, ("linf", "l2", "l1"))
        self.radii()

    def radii(self) -> list[float]:
        """
        The radii asked for.

        Raises:
            ValueError: none, or one that is no number or fraction.
        """
        found = []
        for text in listed(self.epsilon):
            try:
                found.append(float(Fraction(text.replace(" ", ""))))
            except (ValueError, ZeroDivisionError) as error:
                raise ValueError(
                    f"`--epsilon {text}` is no number or fraction: give radii in raw pixels, such as 8/255."
                ) from error
        if not found:
            raise ValueError("`--epsilon` is empty: give a radius in raw pixels, such as 8/255.")
        return list(dict.fromkeys(found))

    def build_attacks(self, image_processor: Any, num_classes: int | None) -> dict[str, Any]:
        """
        The attacks asked for, by the names that the report gives them. What is not the standard set of AutoAttack is called by
        its parts. Where two would have the same name, the second has the one it was asked for by in brackets.

        Args:
            image_processor: of the model.
            num_classes: of a classifier; `None` for a model that answers in text.

        Raises:
            ValueError: an unknown attack or setting, settings of an attack that does not run, two attacks of one name, or
                AutoAttack on a model that answers in text.
        """
        from hf_robust.attacks.registry import build_from, settings_of
        from hf_robust.report.vision_attacks import radius_text, vision_attacks

        known = vision_attacks()
        radii, attacks = self.radii(), {}
        for name, (kind, own) in asked_attacks(self.attacks, self.attack_settings, known).items():
            if kind == "autoattack" and num_classes is None:
                raise ValueError("`--attacks autoattack` needs a classifier: for answers in text use pgd or apgd.")
            common: dict[str, Any] = {"norm": self.norm, "seed": self.seed, "image_processor": image_processor}
            if kind == "pgd":
                common["steps"] = self.steps
            takes = settings_of(known, kind)
            shared = {key: value for key, value in common.items() if key in takes}
            for epsilon in [own.pop("epsilon")] if "epsilon" in own else radii:
                attack = build_from(known, kind, {**shared, "epsilon": epsilon, **own})
                radius = f" {radius_text(epsilon)}" if len(radii) > 1 else ""
                shown = name
                if kind == "autoattack" and "autoattack" in name.lower():
                    shown = attack.name(num_classes)
                    if shown + radius in attacks:
                        # What is not the standard set may not be called AutoAttack in brackets either
                        own_name = name if shown == "AutoAttack" else re.sub("(?i)autoattack", "", name).strip(" _-")
                        shown += f" ({own_name or attack.norm})"
                if shown + radius in attacks:
                    raise ValueError(
                        f"`--attacks`, `--epsilon`: two attacks have the name {shown + radius!r}. Leave one out, or give it "
                        "a name of its own (an entry of `--attack_settings` with `attack`)."
                    )
                attacks[shown + radius] = attack
        return attacks


def is_wanted(arguments: Sequence[str]) -> bool:
    """
    Whether a command line of `hf-robust evaluate` is about images: it has the option `dataset`, or its model is an image
    classifier or a CLIP model.

    Args:
        arguments: command line after `hf-robust evaluate`; options may be in the file of `--config`.
    """
    given = given_options(arguments, ("model_name_or_path", "dataset", "behaviors", "model_revision"))
    if given["dataset"]:
        return True
    if not given["model_name_or_path"] or given["behaviors"]:
        return False
    return model_kind(str(given["model_name_or_path"]), given["model_revision"]) in ("classifier", "clip")


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Evaluate a model with [`~hf_robust.report.evaluate_vision`] or [`~hf_robust.report.evaluate_vlm`].

    Args:
        arguments: command line after `hf-robust evaluate`.

    Returns:
        Exit status: 0; 2 where the options, files or folder do not allow an evaluation; 130 after an interruption.
    """
    return run_form(EvaluateVisionArguments, _evaluate, arguments)


def _evaluate(options: EvaluateVisionArguments) -> None:
    from hf_robust.cli.evaluate import show
    from hf_robust.report import evaluate_vision, evaluate_vlm

    kind = model_kind(options.model_name_or_path, options.model_revision)
    if kind is None:
        raise ValueError(
            f"`--model_name_or_path {options.model_name_or_path}` is none of: {', '.join(_KINDS.values())} (its config.json "
            "tells)."
        )
    dataset, names = _read(options, kind)
    folder = Path(options.output_dir)
    shared: dict[str, Any] = {
        "dataset": dataset, "sanity_images": options.sanity_images, "output_dir": folder, "overwrite": options.overwrite,
        "batch_size": options.batch_size, "progress": not options.no_progress,
    }  # fmt: skip
    model, processor = load_vision_model(
        options.model_name_or_path, kind, dtype=options.dtype, adapter=options.adapter, revision=options.model_revision
    )
    if kind == "vlm":
        attacks = options.build_attacks(processor, None)
        report = evaluate_vlm(model, processor, attacks=attacks, max_new_tokens=options.max_new_tokens, **shared)
    else:
        if kind == "clip":
            from hf_robust.report.vision_tasks import ZeroShotClassifier

            classes = listed(options.class_names) or names
            if not classes:
                raise ValueError("`--class_names` is required: the dataset does not name its classes.")
            templates = {"templates": options.templates} if options.templates else {}
            model = ZeroShotClassifier(model, processor, classes, **templates)
        else:
            from hf_robust.trainers.labels import names_of, numbered_as

            classes = names_of(model.config)
            shared["dataset"] = numbered_as(dataset, "label", classes)
        attacks = options.build_attacks(processor, len(classes))
        report = evaluate_vision(model, image_processor=processor, class_names=classes, attacks=attacks, **shared)
    show(report, folder, peft=options.adapter is not None)


def _read(options: EvaluateVisionArguments, kind: str) -> tuple[Any, list[str]]:
    """The dataset with the columns that an evaluation reads, and the names of its classes."""
    columns = {"image": options.image_column}
    if kind == "vlm":
        columns |= {"answer": options.answer_column, "question": options.question_column}
    else:
        columns |= {"label": options.label_column}
    return read_images(options.dataset, columns, split=options.dataset_split, limit=options.limit)
