"""Attack an erased diffusion model, judge its pictures, see what is left for its users: one report, resumed if interrupted."""

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_robust.data.behavior import Behavior
from hf_robust.data.behaviors_file import behaviors_digest, write_behaviors
from hf_robust.data.redaction import describe_error, redacted
from hf_robust.metrics.image_judges import as_uint8
from hf_robust.report.diffusion_figures import attack_rates, pre_attack_rates, utility_rate
from hf_robust.report.diffusion_flags import find_diffusion_flags
from hf_robust.report.diffusion_records import Pictures, as_prompts, judge_pictures, picture_of, row_of, seeds_of
from hf_robust.report.diffusion_results import save_grids, save_labels
from hf_robust.report.evaluation import Stage, run_stages, silent
from hf_robust.report.evaluation_figures import problem, summary
from hf_robust.report.evaluation_plan import check_plan, fingerprint, model_name, settings_of
from hf_robust.report.evaluation_records import Records, Row
from hf_robust.report.report import Report, describe_environment
from hf_robust.sites import quiet
from hf_robust.threats import check_at_least

if TYPE_CHECKING:
    from hf_robust.attacks.diffusion.results import DiffusionAttackResult
    from hf_robust.diffusion import DiffusionModel

logger = logging.getLogger(__name__)

TASK = "text-to-image"
# Names in a report that mean something else than an attack or the model under test
_RESERVED = ("none", "any")
_CONTROLS = ("original", "oracle")
_SHOWN_LABELS = 20


def evaluate_diffusion(
    model: "DiffusionModel",
    *,
    prompts: Sequence[Any],
    attacks: Mapping[str, Any],
    judge: Callable[[torch.Tensor], Any],
    concept: str | Sequence[str],
    seeds: Sequence[int] | None = None,
    utility_prompts: Sequence[Any] | None = None,
    utility_seeds: Sequence[int] | None = None,
    utility_judge: Any = None,
    original: "DiffusionModel | None" = None,
    oracle: "DiffusionModel | None" = None,
    num_inference_steps: int = 50,
    guidance_scale: float | None = 7.5,
    output_dir: str | Path | None = None,
    overwrite: bool = False,
    subject: str = "model",
    batch_size: int = 8,
    progress: bool = True,
) -> Report:
    """
    How well a diffusion model has forgotten a concept: how often it draws it without attack (pre-ASR), how often attacks
    bring it back (ASR), and what it still draws for its users (utility).

    **ASR includes the successes before any attack**: a prompt that draws the concept as it is needs none, is not attacked,
    and counts as a success of every attack. Pictures are judged as 8-bit PNG files hold them. With `output_dir`, pictures and
    records of each finished batch are kept there, and the same call after an interruption goes on where it was. A prompt
    that fails is recorded with its error and belongs to no share; one that cannot be drawn is not attacked. An attack that
    fails on every prompt is recorded in `runs` and flagged, and the others go on; the same call tries it again.

    Args:
        model: the erased model, unwrapped. It is the same afterwards.
        prompts: what is attacked: texts, behaviours, or mappings with `prompt` and, optionally, `id`, `seed` (or
            `evaluation_seed`) and `category`.
        attacks: by the name that the report gives them: of [`hf_robust.attacks.diffusion`], or
            [`~hf_robust.report.diffusion_weight_attacks`]. Progress bars of their own are switched off.
        judge: float pictures `[N, 3, H, W]` in [0, 1] → a bool each, whether the concept is in them; usually an
            [`~hf_robust.metrics.image_judges.ImageJudge`].
        concept: name of the erased concept, or its names.
        seeds: of the prompts' pictures. Default: a row's own, or its place in the list.
        utility_prompts: prompts of other things, as `prompts`, each with the `label` (or `answer`) that its picture is to
            show.
        utility_seeds: as `seeds`, of the utility prompts.
        utility_judge: object whose `labels` names what each picture shows. Default: `judge`.
        original: the model before erasing. Measured without attack as the subject `"original"`, the ceiling; attacks get
            its pictures of the same prompts and seeds as their targets.
        oracle: a model retrained without the concept. Attacked in the same way as the subject `"oracle"`, the floor, which
            doubles the cost.
        num_inference_steps: DDIM steps of every picture without attack; 50 is the published evaluations' number. An attack
            has its own.
        guidance_scale: classifier-free guidance of these pictures, 7.5 as in Stable Diffusion's pipelines; `None` or 1: none.
        output_dir: folder of `report.json`, `plan.json`, `behaviors.jsonl`, `utility.jsonl`, `utility_labels.jsonl` (the
            label of each utility picture), `records/`, `images/` and the grids `images_before_after.png` and
            `images_utility.png`. `None`: nothing is written.
        overwrite: discard what another evaluation left in `output_dir` instead of raising.
        subject: what the report calls the model.
        batch_size: prompts in a batch, the unit of work that is kept; also the pictures drawn together.
        progress: whether to show a progress bar.

    Returns:
        The report: `pre_attack_success_rate`, `attack_success_rate` of each attack (all prompts and by category),
        `attack_success_rate_any`, `cost_per_success` in UNet items, `utility`; `runs`, whose forwards and backwards are UNet
        items; `flags`.

    Raises:
        ValueError: no prompts, ids given twice, a utility prompt without label or with one that the judge does not know, an
            output folder of another evaluation, or a model that can draw none of the prompts.
        TypeError: the judge or an attack cannot be called.
    """
    check_at_least("batch_size", batch_size, 1, "Give the number of prompts of a batch.")
    check_at_least("num_inference_steps", num_inference_steps, 1, "50 is usual.")
    attacked = as_prompts(prompts, "prompts", seeds)
    concepts = [concept] if isinstance(concept, str) else list(concept)
    users = None
    if utility_prompts is not None:
        utility_judge = judge if utility_judge is None else utility_judge
        users = _checked_users(as_prompts(utility_prompts, "utility_prompts", utility_seeds), utility_judge)
    _check(attacks, judge, subject)

    models = {subject: model, "original": original, "oracle": oracle}
    given = {name: one for name, one in models.items() if one is not None}
    stages = {
        **{(name, "none"): f"_{name} before attack" for name in given},
        **({(name, "utility"): f"_{name} utility" for name in given} if users is not None else {}),
        **{(name, attack): attack if name == subject else f"{name}: {attack}"
           for name in (subject, "oracle") if name in given for attack in attacks},
    }  # fmt: skip
    settings = {name: attack_settings_of(attack) for name, attack in attacks.items()}
    data = {
        "task": TASK, "concept": ", ".join(concepts), "subject": subject,
        "behaviors": len(attacked), "behaviors_digest": prompts_digest(attacked),
        **({} if users is None else {"utility": len(users), "utility_digest": prompts_digest(users)}),
        "batch_size": batch_size, "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale,
        "dtype": str(next(model.unet.parameters()).dtype).removeprefix("torch."),
        **{name: fingerprint(given[name])["weights"] for name in _CONTROLS if name in given},
    }  # fmt: skip
    description = describe_judge(judge)
    if users is not None and utility_judge is not judge:
        description["utility"] = describe_judge(utility_judge)
    folder = None if output_dir is None else Path(output_dir)
    records = Records(None if folder is None else folder / "records", list(stages.values()))
    if folder is not None:
        if overwrite:
            records.discard()
            (folder / "plan.json").unlink(missing_ok=True)
        plan = {"model": fingerprint(model), "data": data, "attacks": settings, "judge": description}
        check_plan(folder / "plan.json", plan)
        write_behaviors(folder / "behaviors.jsonl", attacked)
        if users is not None:
            write_behaviors(folder / "utility.jsonl", users)

    work = _Work(judge, Pictures(folder, records), num_inference_steps, guidance_scale, batch_size)
    with contextlib.ExitStack() as stack:
        for one in {id(one): one for one in given.values()}.values():
            stack.enter_context(quiet(one))
        stack.enter_context(silent(list(attacks.values())))
        drawing = []
        for name, one in given.items():
            stage = stages[name, "none"]
            drawing.append(Stage(stage, attacked, batch_size, work.drawing(stage, one, attacked, judge)))
            if users is not None:
                stage = stages[name, "utility"]
                drawing.append(Stage(stage, users, batch_size, work.drawing(stage, one, users, utility_judge)))
        rows, seconds = run_stages(drawing, records, progress)
        attacking = []
        for (name, attack), stage in stages.items():
            if attack in attacks:
                size = len(attacked) if _takes_all(attacks[attack]) else batch_size
                before, target = (rows.get(stages.get((one, "none"), ""), []) for one in (name, "original"))
                run = work.attacking(stage, attacks[attack], given[name], attacked, before, original, target)
                attacking.append(Stage(stage, attacked, size, run, required=False))
        found, more = run_stages(attacking, records, progress)
    rows, seconds = {**rows, **found}, {**seconds, **more}

    by_key = {key: rows[stage] for key, stage in stages.items()}
    measurements = []
    for name in given:
        measurements += pre_attack_rates(name, attacked, by_key[name, "none"])
        measurements += attack_rates(name, attacked, {a: by_key[name, a] for a in attacks if (name, a) in by_key})
        if users is not None:
            measurements += utility_rate(name, users, by_key[name, "utility"])
    under_attack = {name: by_key[subject, name] for name in attacks}
    report = Report(
        title=f"Erasure of {', '.join(map(repr, concepts))} in {Path(model_name(model)).name}",
        method={},
        base_model=model_name(model),
        attacks=settings,
        not_run=_not_run(settings),
        data=data,
        measurements=measurements,
        costs={
            **{f"seconds: {stage.lstrip('_')}": round(value, 3) for stage, value in seconds.items()},
            **{f"UNet items: {stage.lstrip('_')}": float(_items(rows[stage])) for stage in stages.values()},
        },
        environment=_environment(),
        runs=[summary(name, settings[name], under_attack[name]) for name in attacks],
        judge=description,
    )
    report.flags = find_diffusion_flags(
        report, under_attack, subject=subject, concept=concepts, utility_prompts=users or ()
    )
    if folder is not None:
        save_grids(folder, subject, ", ".join(concepts), attacked, users, by_key, list(attacks), work.pictures)
        if users is not None:
            save_labels(folder / "utility_labels.jsonl", users, {name: by_key[name, "utility"] for name in given})
        report.save(folder / "report.json")
    return report


# What is asked for ----------------------------------------------------------------------------------------------------


def prompts_digest(behaviors: Sequence[Behavior]) -> str:
    """
    Fingerprint of prompts with their seeds: see [`~hf_robust.data.behaviors_file.behaviors_digest`].

    Args:
        behaviors: of [`~hf_robust.report.diffusion_records.as_prompts`].
    """
    return behaviors_digest([dataclasses.replace(b, id=f"{b.id} with seed {b.metadata['seed']}") for b in behaviors])


def attack_settings_of(attack: Any) -> dict[str, Any]:
    """
    Settings of an attack as JSON values: see [`~hf_robust.report.evaluation_plan.settings_of`]. `attack` is its name on the
    command line.

    Args:
        attack: any attack on diffusion models.
    """
    found = settings_of(attack)
    name = _known_attacks().get(type(attack))
    return found if name is None else {"class": found.pop("class"), "attack": name, **found}


def _known_attacks() -> dict[type, str]:
    from hf_robust.report.diffusion_weight_attacks import all_diffusion_attacks

    return {cls: name for name, cls in all_diffusion_attacks().items()}


def describe_judge(judge: Any) -> dict[str, Any]:
    """
    Name and settings of a judge of pictures as JSON values; of a classifier also a digest of its weights.

    Args:
        judge: see [`evaluate_diffusion`].
    """
    name = getattr(judge, "name", None) or getattr(judge, "__qualname__", type(judge).__qualname__)
    settings = dict(redacted(getattr(judge, "settings", {})))
    if isinstance(getattr(judge, "model", None), torch.nn.Module):
        settings["weights"] = fingerprint(judge.model)["weights"]
    return {"name": str(name), "settings": settings}


def _not_run(settings: Mapping[str, dict[str, Any]]) -> list[str]:
    # The pictures before any attack are those of no_attack
    run = {"no_attack", *(values.get("attack") for values in settings.values())}
    return [name for name in _known_attacks().values() if name not in run]


def _environment() -> dict[str, Any]:
    found = describe_environment()
    found["packages"]["diffusers"] = version("diffusers")
    return found


def _check(attacks: Mapping[str, Any], judge: Any, subject: str) -> None:
    if not callable(judge):
        raise TypeError(f"`judge={judge!r}` cannot be called: give an ImageJudge, or a function of pictures.")
    if subject in (*_CONTROLS, *_RESERVED) or not subject:
        raise ValueError(f"`subject={subject!r}` stands for something else in a report: choose another name.")
    for name, attack in attacks.items():
        if not callable(getattr(attack, "attack", None)) or isinstance(attack, type):
            raise TypeError(
                f"`attacks[{name!r}]={attack!r}` is no attack: give an object with a method `attack`, such as "
                "hf_robust.attacks.diffusion.UnlearnDiffAtk()."
            )
        if name in (*_RESERVED, "utility"):
            raise ValueError(
                f"`attacks` has the name {name!r}, which stands for something else in a report: rename it."
            )


def _checked_users(behaviors: list[Behavior], judge: Any) -> list[Behavior]:
    """Utility prompts, their labels by name."""
    if not callable(getattr(judge, "labels", None)):
        raise TypeError(
            f"`utility_judge={judge!r}` has no method `labels`, which names what each picture shows: give an ImageJudge."
        )
    without = [behavior.id for behavior in behaviors if behavior.answer is None]
    if without:
        raise ValueError(
            f"`utility_prompts` without `label`: {', '.join(without[:8])}. Name what the picture of each is to show."
        )
    names = getattr(judge, "label_names", None)
    if names is None:
        return behaviors
    known, found = list(names.values()), []
    for behavior in behaviors:
        label = str(behavior.answer)
        if label not in known and label.isdecimal() and int(label) in names:
            label = names[int(label)]
        if label not in known:
            shown = ", ".join(map(repr, known[:_SHOWN_LABELS])) + (", …" if len(known) > _SHOWN_LABELS else "")
            raise ValueError(
                f"`utility_prompts` has the label {label!r} ({behavior.id}), which the judge does not know; it has: {shown}."
            )
        found.append(dataclasses.replace(behavior, answer=label))
    return found


# The work -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Work:
    """Draws, attacks and judges batches of prompts, and keeps the pictures."""

    judge: Any
    pictures: Pictures
    num_inference_steps: int
    guidance_scale: float | None
    batch_size: int

    def drawing(
        self, stage: str, model: "DiffusionModel", behaviors: Sequence[Behavior], judge: Any
    ) -> Callable[[list[Behavior]], list[Row]]:
        """Makes the rows of a batch drawn as it is."""
        return lambda batch: self._rows(stage, behaviors, batch, self._draw(model, batch), judge)

    def attacking(
        self,
        stage: str,
        attack: Any,
        model: "DiffusionModel",
        behaviors: Sequence[Behavior],
        before: Sequence[Row],
        original: "DiffusionModel | None",
        targets: Sequence[Row],
    ) -> Callable[[list[Behavior]], list[Row]]:
        """Makes the rows of a batch under attack; what needs no attack gets none."""
        drawn, wanted = ({row["id"]: row for row in rows} for rows in (before, targets))

        def run(batch: list[Behavior]) -> list[Row]:
            done = {
                b.id: _skipped(drawn[b.id]) for b in batch if problem(drawn[b.id]) or drawn[b.id]["verdict"]["success"]
            }
            left = [b for b in batch if b.id not in done]
            if left:
                results = self._attack(attack, model, left, original, wanted, self.judge)
                done.update((row["id"], row) for row in self._rows(stage, behaviors, left, results, self.judge))
            return [done[b.id] for b in batch]

        return run

    def _draw(self, model: "DiffusionModel", batch: Sequence[Behavior]) -> "list[DiffusionAttackResult]":
        from hf_robust.attacks.diffusion import NoAttack

        plain = NoAttack(
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            batch_size=self.batch_size,
            progress=False,
        )
        return self._attack(plain, model, batch, None, {}, _no_judge)

    def _attack(
        self,
        attack: Any,
        model: "DiffusionModel",
        batch: Sequence[Behavior],
        original: "DiffusionModel | None",
        targets: Mapping[str, Row],
        judge: Any,
    ) -> "list[DiffusionAttackResult]":
        """One result for each prompt; where the batch fails, each prompt by itself, since none depends on the others."""
        from hf_robust.attacks.diffusion.results import DiffusionAttackResult

        names = [targets[b.id]["picture"] for b in batch if b.id in targets]
        wanted = None
        if len(names) == len(batch) and None not in names:
            wanted = torch.stack([self.pictures.get(name) for name in names]).float() / 255
        try:
            results = attack.attack(
                model,
                [b.prompt for b in batch],
                seeds=seeds_of(batch),
                judge=judge,
                original=original,
                target_images=wanted,
            )
            if len(results) != len(batch):
                raise TypeError(
                    f"the attack returned {len(results)} results for {len(batch)} prompts; it must return one each"
                )
            return results
        except (torch.OutOfMemoryError, MemoryError):
            raise  # says something about the machine, not about a prompt
        except Exception as error:
            if len(batch) > 1 and not _takes_all(attack):
                return [self._attack(attack, model, [b], original, targets, judge)[0] for b in batch]
            failed = describe_error(error)
            logger.warning("%s failed on %s: %s", type(attack).__name__, batch[0].id, failed)
            return [DiffusionAttackResult(b.prompt, int(b.metadata["seed"]), error=failed) for b in batch]

    def _rows(
        self,
        stage: str,
        behaviors: Sequence[Behavior],
        batch: Sequence[Behavior],
        results: "Sequence[DiffusionAttackResult]",
        judge: Any,
    ) -> list[Row]:
        """Judge what came out and keep it; the pictures first, so that no record names one that is not there."""
        place = {behavior.id: number for number, behavior in enumerate(behaviors)}
        results, images = [copy.copy(result) for result in results], {}
        for number, result in enumerate(results):
            if result.error is None and result.image is not None:
                try:
                    images[number] = picture_of(result.image)
                except ValueError as error:
                    result.error = f"ValueError: {error}"
        verdicts = (
            dict(zip(images, judge_pictures(judge, torch.stack(list(images.values()))), strict=True)) if images else {}
        )
        rows = []
        for number, (behavior, result) in enumerate(zip(batch, results, strict=True)):
            name = self.pictures.put(stage, place[behavior.id], images[number]) if number in images else None
            rows.append(row_of(behavior.id, result, verdicts.get(number), name))
        return rows


def _no_judge(images: torch.Tensor) -> torch.Tensor:
    """For pictures that are judged later, as they are kept; what is no picture is found here."""
    as_uint8(images)
    return torch.zeros(len(images), dtype=torch.bool)


def _takes_all(attack: Any) -> bool:
    """Whether an attack does once for all prompts what is not to be repeated for each batch: it learns from all of them."""
    return bool(getattr(attack, "needs_all_behaviors", False) or getattr(attack, "shared_target_images", False))


def _skipped(row: Row) -> Row:
    """The record of a prompt that needs no attack, or that the model cannot draw."""
    nothing = {"losses": [], "num_forwards": 0, "num_backwards": 0, "num_generations": 0, "seconds": 0.0}
    return {**row, "result": {**row["result"], **nothing, "skipped": True}}


def _items(rows: Sequence[Row]) -> int:
    return sum(row["result"]["num_forwards"] + row["result"]["num_backwards"] for row in rows)
