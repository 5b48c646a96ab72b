import copy
import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_robust.attacks.vision import APGD, PGD
from hf_robust.metrics import class_accuracies, load, wilson_interval
from hf_robust.report import (
    PyAutoAttack,
    RandomNoise,
    Report,
    ZeroShotClassifier,
    epsilon_curve,
    evaluate_vision,
    evaluate_vlm,
    evaluation_card,
    format_table,
    plot_evaluation,
)
from hf_robust.report.vision_attacks import radius_text, sanity_variants, vary
from hf_robust.report.vision_plots import epsilon_series
from hf_robust.testbeds.vlm_language import build_processor
from tests.trainer_data import tiny_tokenizer
from tests.vision_data import CLASSES, Nearest, Normalised, Processor, exact_robust, images, rows
from tests.vlm_data import llava_processor, picture, qwen_processor, tiny_llava, tiny_qwen

NAMES = [f"class {number}" for number in range(CLASSES)]
EPSILON = 0.12


def evaluate(model=None, attacks=None, count=40, **options):
    attacks = {"pgd": PGD(epsilon=EPSILON, steps=10)} if attacks is None else attacks
    settings = {"class_names": NAMES, "progress": False, "sanity_images": 0, **options}
    return evaluate_vision(Nearest() if model is None else model, dataset=rows(count), attacks=attacks, **settings)


def value(report, metric, attack="none", split="all"):
    return report.find("model", metric, split, attack).value


# Classes --------------------------------------------------------------------------------------------------------------


def test_class_accuracies_by_hand():
    found = class_accuracies([1, 0, 1, 1, None, 0], ["a", "a", "b", "b", "b", "c"])
    assert {name: part["value"] for name, part in found["classes"].items()} == {"a": 0.5, "b": 1.0, "c": 0.0}
    assert found["worst_class"] == "c" and found["disparity"] == 1.0
    assert found["classes"]["b"]["count"] == 2 and found["classes"]["b"]["missing"] == 1
    assert (found["classes"]["a"]["low"], found["classes"]["a"]["high"]) == wilson_interval(1, 2)
    nothing = class_accuracies([None], [3])
    assert nothing["worst_class"] is None and nothing["disparity"] is None
    with pytest.raises(ValueError, match="`labels` has 1 entries for 2 rows"):
        class_accuracies([1, 0], [1])


def test_robust_accuracy_metric_by_class():
    metric = load("robust_accuracy")
    given = {"predictions": [[0, 0], [0, 1], [1, 1], [1, 1]], "references": [0, 0, 1, 1]}
    found = metric.compute(**given, per_class=True)
    assert found["robust_accuracy"] == 0.75 and found["worst_class"] == 0 and found["disparity"] == 0.5
    assert found["classes"][1]["value"] == 1.0
    assert "classes" not in load("robust_accuracy").compute(**given)


# Figures --------------------------------------------------------------------------------------------------------------


def test_no_attack_goes_below_the_exact_robust_accuracy_and_targeted_apgd_reaches_it():
    model, (pixels, labels) = Nearest(), images()
    exact = exact_robust(model, pixels, labels, EPSILON).float().mean().item()
    attacks = {
        "pgd": PGD(epsilon=EPSILON, steps=20),
        "apgd": APGD(epsilon=EPSILON, steps=30),
        "targeted": APGD(epsilon=EPSILON, steps=20, loss="targeted_dlr"),
        "noise": RandomNoise(epsilon=EPSILON, samples=20),
    }
    report = evaluate(model, attacks)
    assert 0 < exact < 1
    for name in attacks:
        assert value(report, "robust_accuracy", name) >= exact
    assert value(report, "robust_accuracy", "targeted") == pytest.approx(exact)
    assert value(report, "robust_accuracy", "any") == pytest.approx(exact)
    assert value(report, "robust_accuracy", "noise") > value(report, "robust_accuracy", "pgd")


def test_figures_have_intervals_and_classes():
    report = evaluate()
    robust = report.find("model", "robust_accuracy", "all", "pgd")
    assert (robust.low, robust.high) == wilson_interval(robust.value * 40, 40) and robust.count == 40
    by_class = [value(report, "robust_accuracy", "pgd", f"class:{name}") for name in NAMES]
    assert sum(by_class) / CLASSES == pytest.approx(robust.value)
    assert value(report, "worst_class_accuracy", "pgd") == min(by_class)
    assert value(report, "disparity", "pgd") == pytest.approx(max(by_class) - min(by_class))
    assert value(report, "accuracy") >= robust.value and value(report, "accuracy") > 0.9
    assert report.runs[0].backwards > 0 and len(report.runs[0].mean_losses) > 5


def test_many_classes_have_no_lines_of_their_own():
    data = [{**row, "labels": row["labels"] + 12} for row in rows(20)]
    model = Nearest()
    model.layer = torch.nn.Linear(48, 22)
    with torch.no_grad():
        model.layer.weight[12:].copy_(Nearest().layer.weight)
        model.layer.bias[:12] = -100.0
        model.layer.bias[12:].copy_(Nearest().layer.bias)
    names = [str(n) for n in range(22)]
    attacks = {"pgd": PGD(epsilon=0.05, steps=2)}
    report = evaluate_vision(model, dataset=data, class_names=names, attacks=attacks, progress=False, sanity_images=0)
    assert len([m for m in report.measurements if m.split.startswith("class:")]) == 20  # ten classes are there
    assert [m.split for m in report.measurements if m.split.startswith("class:")][:2] == ["class:12", "class:13"]
    assert value(report, "accuracy") > 0.9


def test_worst_cases_are_kept_apart_by_threat_model():
    attacks = {
        "a": PGD(epsilon=0.1, steps=3),
        "b": PGD(epsilon=0.1, steps=3, loss="dlr"),
        "c": PGD(epsilon=EPSILON, steps=3),
    }
    report = evaluate(attacks=attacks)
    assert value(report, "robust_accuracy", "any, linf 0.1") <= min(
        value(report, "robust_accuracy", name) for name in "ab"
    )
    assert report.find("model", "robust_accuracy", "all", "any") is None


def test_normalised_pixels_give_the_same():
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (Processor.image_mean, Processor.image_std))
    data = [{**row, "pixel_values": (row["pixel_values"] - mean) / std} for row in rows()]
    attack = PGD(epsilon=EPSILON, steps=10, random_start=False, image_processor=Processor())
    report = evaluate_vision(
        Normalised(), dataset=data, image_processor=Processor(), class_names=NAMES, attacks={"pgd": attack},
        progress=False, sanity_images=16,
    )  # fmt: skip
    raw = evaluate(attacks={"pgd": PGD(epsilon=EPSILON, steps=10, random_start=False)})
    assert value(report, "robust_accuracy", "pgd") == value(raw, "robust_accuracy", "pgd")
    assert not [flag for flag in report.flags if flag.code == "outside_threat_model"]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_every_norm_is_checked_and_passes(norm):
    epsilon = {"linf": 0.12, "l2": 1.0, "l1": 5.0}[norm]
    attacks = {
        "pgd": PGD(epsilon=epsilon, norm=norm, steps=20),
        "apgd": APGD(epsilon=epsilon, norm=norm, steps=20),
        "noise": RandomNoise(epsilon=epsilon, norm=norm, samples=5),
    }
    report = evaluate(attacks=attacks, sanity_images=20)
    assert not {flag.code for flag in report.flags} & {
        "outside_threat_model",
        "failures",
        "accuracy_left_at_any_epsilon",
    }
    assert value(report, "robust_accuracy", "apgd") < value(report, "accuracy")


def test_nothing_is_left_behind():
    model = Nearest().train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    evaluate(model, sanity_images=8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("batch_size", [7, 40])
def test_figures_do_not_depend_on_the_batch(batch_size):
    assert value(evaluate(batch_size=batch_size), "robust_accuracy", "pgd") == value(
        evaluate(batch_size=16), "robust_accuracy", "pgd"
    )


# Resume ---------------------------------------------------------------------------------------------------------------


class Interrupted(PGD):
    """Breaks off in the second batch, once."""

    calls = 0

    def search(self, model, **inputs):
        type(self).calls += 1
        if type(self).calls == 2:
            raise KeyboardInterrupt
        return super().search(model, **inputs)


def without_times(report):
    measured = [m for m in report.measurements]
    return measured, report.flags, [(run.name, run.forwards, run.failures) for run in report.runs]


def test_an_interrupted_evaluation_goes_on(tmp_path):
    options = {"attacks": {"pgd": Interrupted(epsilon=EPSILON, steps=5)}, "batch_size": 10}
    with pytest.raises(KeyboardInterrupt):
        evaluate(output_dir=tmp_path, **options)
    done = sorted(path.name for path in (tmp_path / "records" / "pgd").iterdir())
    assert done == ["00000.json"]
    calls = Interrupted.calls
    report = evaluate(output_dir=tmp_path, **options)
    assert Interrupted.calls == calls + 3  # the first batch is not attacked again
    whole = evaluate(**options)
    assert without_times(report) == without_times(whole)
    assert Report.load(tmp_path / "report.json") == report
    assert len((tmp_path / "images.jsonl").read_text(encoding="utf-8").splitlines()) == 40


def test_a_folder_of_another_evaluation(tmp_path):
    evaluate(output_dir=tmp_path, count=10)
    with pytest.raises(ValueError, match=r"attacks.pgd.steps \(10 before, 3 now\)"):
        evaluate(output_dir=tmp_path, count=10, attacks={"pgd": PGD(epsilon=EPSILON, steps=3)})
    with pytest.raises(ValueError, match="images_digest"):
        evaluate(output_dir=tmp_path, count=20)
    report = evaluate(output_dir=tmp_path, count=10, attacks={"pgd": PGD(epsilon=0.1, steps=3)}, overwrite=True)
    assert report.attacks["pgd"]["epsilon"] == 0.1


# What is refused ------------------------------------------------------------------------------------------------------


def test_refusals():
    model, attack = Nearest(), PGD(epsilon=0.1, steps=2)
    good = {"class_names": NAMES, "attacks": {"pgd": attack}, "progress": False}
    pixels = rows(2)
    with pytest.raises(ValueError, match="must have rows"):
        evaluate_vision(model, dataset=[], **good)
    with pytest.raises(ValueError, match="need `image` or `pixel_values`"):
        evaluate_vision(model, dataset=[{"labels": 0}], **good)
    with pytest.raises(ValueError, match="`image_processor=None`"):
        evaluate_vision(model, dataset=[{"image": Image.new("RGB", (4, 4)), "labels": 0}], **good)
    with pytest.raises(ValueError, match="no `labels`"):
        evaluate_vision(model, dataset=[{"pixel_values": torch.zeros(3, 4, 4)}], **good)
    with pytest.raises(ValueError, match="label 10, but the model has 10 classes"):
        evaluate_vision(model, dataset=[{**pixels[0], "labels": 10}], **good)
    with pytest.raises(ValueError, match="id2label"):
        evaluate_vision(model, dataset=pixels, attacks={})
    with pytest.raises(ValueError, match="give `class_names`, one for each class"):
        evaluate_vision(model, dataset=pixels, **{**good, "class_names": NAMES[:5]})
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        evaluate_vision(model, dataset=[{**pixels[0], "pixel_values": torch.full((3, 4, 4), 200.0)}], **good)
    with pytest.raises(ValueError, match="NaN"):
        evaluate_vision(model, dataset=[{**pixels[0], "pixel_values": torch.full((3, 4, 4), torch.nan)}], **good)
    with pytest.raises(TypeError, match="is no attack on pixels"):
        evaluate_vision(model, dataset=pixels, **{**good, "attacks": {"pgd": PGD}})
    with pytest.raises(ValueError, match="stands for something else"):
        evaluate_vision(model, dataset=pixels, **{**good, "attacks": {"any": attack}})


@pytest.mark.parametrize("kind", [RandomNoise, PyAutoAttack])
def test_attacks_without_gradients_check_what_the_others_check(kind):
    options = {"parts": ["square"]} if kind is PyAutoAttack else {"samples": 2}
    if kind is PyAutoAttack:
        pytest.importorskip("pyautoattack")
    with pytest.raises(ValueError, match="epsilon=8.*write 8/255"):
        kind(epsilon=8, **options)
    kind(epsilon=8, norm="l2", **options)
    attack, model, (pixels, labels) = kind(epsilon=0.1, **options), Nearest(), images(4)
    for shifted, message in (
        (pixels * 255, "Divide bytes by 255"),
        (pixels * torch.nan, "NaN"),
        (pixels[0], "has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            attack.search(model, pixel_values=shifted, labels=labels)
    for wrong, message in (
        (labels + 10, "10 classes are 0 to 9"),
        (labels - 1, "`labels` has -1"),
        (labels + 0.7, "torch.float32 of shape"),
        (labels[:2], r"shape \(2,\) for 4 images"),
        (None, "`labels=None`"),
    ):
        with pytest.raises(ValueError, match=message):
            attack.search(model, pixel_values=pixels, labels=wrong)


@pytest.mark.parametrize("label", [None, 1.7, True, torch.tensor(1.5), float("nan"), 2**70])
def test_labels_that_are_no_classes_are_named_with_their_row(label):
    data = rows(3)
    data[2]["labels"] = label
    attacks = {"pgd": PGD(epsilon=0.1, steps=2)}
    with pytest.raises(
        ValueError, match=rf"`dataset\[2\]` has the label {re.escape(repr(label))}, but the model has 10"
    ):
        evaluate_vision(Nearest(), dataset=data, class_names=NAMES, attacks=attacks, progress=False)


@pytest.mark.parametrize("label", [1.0, torch.tensor(1.0), torch.tensor([1]), np.array([1])], ids=str)
def test_whole_numbers_of_other_types_are_classes(label):
    """As pandas and transforms give them."""
    data = rows(2)
    data[1]["labels"] = label
    report = evaluate_vision(
        Nearest(), dataset=data, class_names=NAMES, attacks={"pgd": PGD(epsilon=0.1, steps=1)}, progress=False
    )
    assert report is not None


def test_class_numbers_of_another_order_by_hand():
    import datasets

    from hf_robust.trainers.labels import numbered_as

    names = datasets.ClassLabel(names=["c", "a", "b"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    given = datasets.Dataset.from_dict({"text": list("cab??"), "label": [0, 1, 2, None, -1]}, features=features)
    # What has no class keeps none: -1 is not the last one
    assert list(numbered_as(given, "label", ["a", "b", "c"])["label"]) == [2, 0, 1, None, -1]
    for same in (["c", "a", "b"], ["x", "y", "z"], ["a", "b"], []):
        assert numbered_as(given, "label", same) is given


def test_pictures_have_the_channels_of_the_model():
    config = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    shades = [Image.new("RGB", (4, 4), (50 * i, 50 * i, 50 * i)) for i in range(4)]
    options = {"class_names": ["a", "b"], "progress": False, "sanity_images": 2}
    for channels, mode in ((1, "L"), (3, "RGB"), (4, "RGBA")):
        torch.manual_seed(0)
        vit = ViTConfig(image_size=4, patch_size=2, num_channels=channels, num_labels=2, **config)
        side, half = {"height": 4, "width": 4}, [0.5] * channels
        processor = ViTImageProcessor(size=side, image_mean=half, image_std=half)
        found = {}
        for kind in ("RGB", mode):
            data = [{"image": shade.convert(kind), "labels": i % 2} for i, shade in enumerate(shades)]
            attacks = {"pgd": PGD(epsilon=0.1, steps=2, image_processor=processor)}
            report = evaluate_vision(
                ViTForImageClassification(vit), dataset=data, image_processor=processor, attacks=attacks, **options
            )
            found[kind] = report.data["images_digest"]
            assert report.runs[0].failures == 0
        assert len(set(found.values())) == 1
    vit = ViTConfig(image_size=4, patch_size=2, num_channels=2, num_labels=2, **config)
    with pytest.raises(ValueError, match="2 channels.*1, 3 or 4"):
        evaluate_vision(
            ViTForImageClassification(vit), dataset=[{"image": shades[0], "labels": 0}], image_processor=processor,
            attacks={}, **options,
        )  # fmt: skip


# Variants and curves --------------------------------------------------------------------------------------------------


def test_variants():
    attack = PGD(epsilon=8 / 255, steps=10, step_size=2 / 255, restarts=2)
    found = vary(attack, epsilon=4 / 255)
    assert (found.epsilon, found.steps, found.step_size, found.restarts) == (4 / 255, 10, 2 / 255, 2)
    with pytest.raises(ValueError, match="`epsilons` is no setting of PGD"):
        vary(attack, epsilons=1)
    roles = sanity_variants(attack, 48)
    assert set(roles) == {"one_step", "half_steps", "half_epsilon", "whole_box", "black_box"}
    assert roles["whole_box"][1].epsilon == 1.0 and roles["one_step"][1].step_size is None
    assert sanity_variants(PGD(epsilon=1, norm="l2", steps=2), 49)["whole_box"][1].epsilon == 7.0
    assert sanity_variants(RandomNoise(epsilon=0.1), 48) == {}


def test_radii_as_people_write_them():
    assert [radius_text(e) for e in (8 / 255, 0.5 / 255, 0.1, 1.0, 3.0)] == ["8/255", "0.5/255", "0.1", "1", "3"]


def test_curve_over_epsilon(tmp_path):
    attacks = epsilon_curve("pgd", PGD(epsilon=0.1, steps=10), [16 / 255, 32 / 255, 64 / 255])
    assert list(attacks) == ["pgd 16/255", "pgd 32/255", "pgd 64/255"]
    report = evaluate(attacks=attacks, sanity_images=20)
    ((name, points),) = epsilon_series(report).items()
    assert [round(epsilon * 255) for epsilon, _ in points] == [0, 16, 32, 64]
    accuracies = [m.value for _, m in points]
    assert accuracies == sorted(accuracies, reverse=True) and "pgd (linf, 10 steps)" == name
    written = plot_evaluation(report, tmp_path)
    assert [path.name for path in written] == [
        "robust_accuracy.png", "epsilon_curve.png", "class_accuracy.png", "losses.png",
    ]  # fmt: skip
    assert all(Image.open(path).width > 300 for path in written)


def test_card_and_table(tmp_path):
    report = evaluate(output_dir=tmp_path, sanity_images=10)
    card = evaluation_card(report)
    assert "pipeline_tag: image-classification" in card and "raw pixels in [0, 1]" in card
    assert "images.jsonl" in card and report.data["images_digest"] in card
    assert "robust accuracy" in format_table(report) and "adaptive attacks" in card


def test_claims_of_a_card_are_checked(classifier_folder, tmp_path):
    """A card that says more than is true fails; without the dataset nothing is checked."""
    import shutil

    from hf_robust.cli import main
    from hf_robust.report.verify import verify

    arguments = [
        "evaluate", "--model_name_or_path", str(classifier_folder / "model"), "--dataset", str(classifier_folder / "data"),
        "--image_column", "picture", "--attacks", "pgd,apgd", "--steps", "3",
        "--attack_settings", str(tmp_path / "settings.json"),
        "--sanity_images", "2", "--output_dir", str(tmp_path / "out"), "--no_progress",
    ]  # fmt: skip
    (tmp_path / "settings.json").write_text('{"apgd": {"steps": 3}}', encoding="utf-8")
    assert main(arguments) == 0
    folder = tmp_path / "published"
    shutil.copytree(classifier_folder / "model", folder)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
    import datasets

    data = datasets.load_from_disk(str(classifier_folder / "data")).rename_column("picture", "image")
    data.save_to_disk(tmp_path / "renamed")
    checks = verify(folder, behaviors=tmp_path / "renamed", progress=False)
    by_status = {
        status: [c.claim.metric for c in checks if c.status == status] for status in {c.status for c in checks}
    }
    assert set(by_status) == {"holds", "not checkable"}, [c.reason for c in checks]
    assert set(by_status["not checkable"]) == {"disparity"}
    assert {"accuracy", "robust_accuracy", "worst_class_accuracy"} == set(by_status["holds"])
    assert all(check.status == "not checkable" for check in verify(folder, progress=False))
    # Other images
    data.select(range(5)).save_to_disk(tmp_path / "other")
    assert all(c.status == "not checkable" for c in verify(folder, behaviors=tmp_path / "other", progress=False))
    boasted = card.replace("      value: 0.0\n", "      value: 1.0\n")
    assert boasted != card
    (folder / "README.md").write_text(boasted, encoding="utf-8")
    assert any(check.status == "FAILS" for check in verify(folder, behaviors=tmp_path / "renamed", progress=False))


# AutoAttack -----------------------------------------------------------------------------------------------------------


def test_only_the_standard_set_is_called_autoattack():
    pytest.importorskip("pyautoattack")
    standard = PyAutoAttack(epsilon=EPSILON)
    assert standard.name(10) == PyAutoAttack(epsilon=1, norm="l2").name(1000) == "AutoAttack"
    reordered = PyAutoAttack(epsilon=EPSILON, parts=("square", "fab-t", "apgd-t", "apgd-ce"))
    assert reordered.name(10) == "AutoAttack"
    named = "apgd-ce + apgd-t + fab-t + square"
    assert standard.name(9) == PyAutoAttack(epsilon=5, norm="l1").name(10) == named
    assert PyAutoAttack(epsilon=EPSILON, parts=("apgd-ce", "square")).name(10) == "apgd-ce + square"
    for attack in (PyAutoAttack(epsilon=EPSILON, parts=("square",)), PGD(epsilon=EPSILON, steps=2)):
        for name in ("AutoAttack", "auto-attack 8/255"):
            with pytest.raises(ValueError, match="Name it by its parts"):
                evaluate(attacks={name: attack})


def test_autoattack_finds_the_exact_robust_accuracy_and_leaves_nothing_behind():
    pytest.importorskip("pyautoattack")
    model, (pixels, labels) = Nearest(), images(20)
    state = torch.get_rng_state()
    trace = sys.gettrace()
    attack = PyAutoAttack(epsilon=EPSILON, parts=("apgd-ce", "apgd-t", "fab-t"))
    report = evaluate(model, {"parts": attack}, count=20)
    exact = exact_robust(model, pixels, labels, EPSILON).float().mean().item()
    assert value(report, "robust_accuracy", "parts") == pytest.approx(exact)
    assert torch.equal(torch.get_rng_state(), state) and sys.gettrace() is trace
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert report.runs[0].forwards > 0 and report.runs[0].backwards > 0
    assert not [flag for flag in report.flags if flag.code in ("failures", "outside_threat_model")]


def test_autoattack_in_normalised_pixels():
    pytest.importorskip("pyautoattack")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (Processor.image_mean, Processor.image_std))
    pixels, labels = images(10)
    parts = ("apgd-ce",)
    raw = PyAutoAttack(epsilon=EPSILON, parts=parts).search(Nearest(), pixel_values=pixels, labels=labels)
    found = PyAutoAttack(epsilon=EPSILON, parts=parts, image_processor=Processor()).search(
        Normalised(), pixel_values=(pixels - mean) / std, labels=labels
    )
    assert torch.equal(found.hit, raw.hit)
    assert torch.allclose(found.delta * std, raw.delta, atol=1e-5)


def test_autoattack_warns_of_random_models():
    pytest.importorskip("pyautoattack")
    from tests.vision_data import Random

    pixels, labels = images(8)
    found = PyAutoAttack(epsilon=EPSILON, parts=("apgd-ce",)).search(Random(), pixel_values=pixels, labels=labels)
    assert any("randomized" in text for text in found.warnings)


def test_autoattack_refuses(monkeypatch):
    pytest.importorskip("pyautoattack")
    with pytest.raises(ValueError, match="`parts='square'`"):
        PyAutoAttack(epsilon=0.1, parts="square")
    with pytest.raises(ValueError, match="`parts='pgd'`"):
        PyAutoAttack(epsilon=0.1, parts=["pgd"])
    three = lambda pixels: Nearest()(pixels)[:, :3]  # noqa: E731
    pixels, labels = images(2)
    with pytest.raises(ValueError, match="'apgd-t', which needs 4 classes"):
        PyAutoAttack(epsilon=0.1).search(three, pixel_values=pixels, labels=labels % 3)
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ImportError, match=r"hf_robust\[eval\]"):
        PyAutoAttack(epsilon=0.1)


# CLIP -----------------------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer of class numbers."""

    def __call__(self, texts, **options):
        from transformers import BatchEncoding

        ids = [[1, 3 + sum(map(ord, text)) % 20, 2] for text in texts]
        return BatchEncoding({"input_ids": torch.tensor(ids), "attention_mask": torch.ones(len(ids), 3).long()})


def tiny_clip():
    text = CLIPTextConfig(
        vocab_size=24, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=4, patch_size=2
    )
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)).eval()


def test_zero_shot_logits_are_clips():
    clip, names = tiny_clip(), ["cat", "dog", "cow"]
    zero_shot = ZeroShotClassifier(clip, Words(), names, ["a {}"])
    pixels = images(5)[0]
    tokens = Words()([f"a {name}" for name in names])
    with torch.no_grad():
        wanted = clip(pixel_values=pixels, **tokens).logits_per_image
        assert torch.allclose(zero_shot(pixels), wanted, atol=1e-4)


def test_texts_of_siglip_are_padded_to_their_full_length():
    """It pools the last position: padded among themselves, texts would be read at another one than in training."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 64, "max_position_embeddings": 8, "pad_token_id": 1, "projection_size": 16, **sizes}
    torch.manual_seed(0)
    siglip = SiglipModel(
        SiglipConfig(text_config=text, vision_config={"image_size": 4, "patch_size": 2, **sizes})
    ).eval()
    tokenizer, names, pixels = tiny_tokenizer(), ["cake", "bake a cake", "flour"], images(5)[0]
    zero_shot = ZeroShotClassifier(siglip, tokenizer, names, ["mix {}"])
    tokens = tokenizer([f"mix {name}" for name in names], padding="max_length", max_length=8, return_tensors="pt")
    assert tokens["input_ids"].shape == (3, 8)
    given = {name: tokens[name] for name in ("input_ids", "attention_mask") if name in tokens}
    with torch.no_grad():
        wanted = siglip(pixel_values=pixels, **given).logits_per_image - siglip.logit_bias
        assert torch.allclose(zero_shot(pixels), wanted, atol=1e-4)


def test_zero_shot_robustness():
    zero_shot = ZeroShotClassifier(tiny_clip(), Words(), ["cat", "dog", "cow"], ["a {}", "the {}"])
    pixels = images(12)[0]
    with torch.no_grad():
        labels = zero_shot(pixels).argmax(dim=1)
    data = [{"pixel_values": x, "label": zero_shot.class_names[int(y)]} for x, y in zip(pixels, labels, strict=True)]
    attacks = {"pgd": PGD(epsilon=0.5, steps=10)}
    report = evaluate_vision(zero_shot, dataset=data, attacks=attacks, progress=False, sanity_images=4)
    assert value(report, "accuracy") == 1.0 and value(report, "robust_accuracy", "pgd") < 1
    assert report.data["task"] == "zero-shot-image-classification" and report.data["classes"] == 3
    with pytest.raises(TypeError, match="get_text_features"):
        ZeroShotClassifier(Nearest(), Words(), ["cat"])
    with pytest.raises(ValueError, match="`templates"):
        ZeroShotClassifier(tiny_clip(), Words(), ["cat"], ["a photo"])
    with pytest.raises(ValueError, match="`class_names"):
        ZeroShotClassifier(tiny_clip(), Words(), [])


# Vision-language models -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava():
    processor = build_processor()
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=2
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16, vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(3)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # untrained, it would not look at the image
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.mul_(60)
    return model.train(), processor


def questions(count=6):
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "image": Image.fromarray(torch.randint(0, 255, (8, 8, 3), generator=generator).byte().numpy()),
            "prompt": [{"role": "user", "content": "which digit is this"}],
            "completion": [{"role": "assistant", "content": "seven"}],
        }
        for _ in range(count)
    ]


def test_answers_under_attack(llava):
    from hf_robust.report.vision_language import AnswerTask

    model, processor = llava
    data = questions()
    task = AnswerTask(model, processor, data, 3)
    inputs = task.inputs(task.behaviors)
    said = [answer.said for answer in task.answers(inputs, inputs["pixel_values"])]
    assert all(said)
    data = [{**row, "completion": text} for row, text in zip(data, said, strict=True)]  # what it says is right
    state = torch.get_rng_state()
    report = evaluate_vlm(
        model, processor, dataset=data, attacks={"pgd": PGD(epsilon=0.5, steps=10, image_processor=processor)},
        max_new_tokens=3, sanity_images=2, batch_size=4, progress=False,
    )  # fmt: skip
    assert value(report, "accuracy") == 1.0
    assert value(report, "robust_accuracy", "pgd") < 1.0
    assert report.data["task"] == "image-text-to-text" and report.runs[0].failures == 0
    losses = report.runs[0].mean_losses
    assert losses[-1] < losses[0]
    assert model.training and all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def shown(count=4):
    """Questions about pictures of 8 × 12, in the words that the tiny tokenizer has."""
    return [
        {"image": picture(i, 8, 12), "question": "how do i bake a cake", "answer": "flour one"} for i in range(count)
    ]


def test_patches_are_attacked_as_the_image_they_are_cut_from():
    """Qwen2-VL: what the attack finds is an image, and the model answers to the patches that the processor cuts from it."""
    from hf_robust.report.vision_language import AnswerTask

    model, processor = tiny_qwen(), qwen_processor()
    data = shown()
    task = AnswerTask(model, processor, data, 3)
    inputs = task.inputs(task.behaviors)
    assert inputs["pixel_values"].shape == (4, 3, 8, 12)
    said = [answer.said for answer in task.answers(inputs, inputs["pixel_values"])]
    # Another picture is reached by its difference
    other = task.images.pixel_values(task.behaviors[1:2]).expand(4, -1, -1, -1)
    tokens = task._tokens([task._prompt(data[0]["question"])], [data[1]["image"]])
    patches = tokens["pixel_values"]
    assert torch.allclose(task._given(inputs, other), patches.repeat(4, 1), atol=1e-5)
    data = [{**row, "answer": text or "nothing"} for row, text in zip(data, said, strict=True)]
    options = {"max_new_tokens": 3, "sanity_images": 2, "batch_size": 2, "progress": False}
    attacks = {"pgd": PGD(epsilon=0.5, steps=10, image_processor=processor)}
    report = evaluate_vlm(model, processor, dataset=data, attacks=attacks, **options)
    assert report.runs[0].failures == 0 and report.runs[0].mean_losses[-1] < report.runs[0].mean_losses[0]
    assert value(report, "accuracy") == sum(map(bool, said)) / 4 > 0
    mixed = [*data, {**data[0], "image": picture(9, 12, 8)}]
    with pytest.raises(ValueError, match="2 sizes.*batch_size=1"):
        evaluate_vlm(model, processor, dataset=mixed, attacks=attacks, **{**options, "batch_size": 8})
    report = evaluate_vlm(model, processor, dataset=mixed, attacks=attacks, **{**options, "batch_size": 1})
    assert report.runs[0].failures == 0


def test_tiles_are_attacked_as_the_image_they_are_cut_from():
    """LLaVA-NeXT: the picture of the dataset is perturbed, in overview and tiles alike."""
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    from hf_robust.report.vision_language import AnswerTask

    side, shapes, plain = {"height": 8, "width": 8}, [[8, 16], [16, 8]], llava_processor()
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(size=side, crop_size=side, image_grid_pinpoints=shapes),
        tokenizer=plain.tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=plain.chat_template,
    )  # fmt: skip
    sizes = tiny_llava().config
    config = LlavaNextConfig(
        vision_config=sizes.vision_config, text_config=sizes.text_config, image_token_index=sizes.image_token_id,
        image_grid_pinpoints=shapes, vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(config).eval()
    for parameter in model.model.multi_modal_projector.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    data = shown(2)
    task = AnswerTask(model, processor, data, 3)
    inputs = task.inputs(task.behaviors)
    assert inputs["pixel_values"].shape == (2, 3, 8, 12)
    raw = task.units(3).to_raw(inputs["pixel_values"])
    assert torch.allclose(raw[1], torch.tensor(np.asarray(data[1]["image"])).permute(2, 0, 1) / 255, atol=1e-6)
    assert task.images.digest(task.behaviors, 2) == task.images.digest(task.behaviors, 1)
    attack = PGD(epsilon=0.5, steps=10, image_processor=processor)
    found = task.attack(attack, inputs)
    assert found.delta.shape == (2, 3, 8, 12) and (found.last_loss < found.first_loss).all()
    loss = task._losses(inputs, inputs["pixel_values"] + found.delta)
    assert torch.allclose(-loss, found.last_loss, atol=1e-4)
    assert all(answer.finite for answer in task.answers(inputs, inputs["pixel_values"] + found.delta))


def test_the_loss_is_that_of_the_answer_alone(llava):
    """Against a forward by hand, of one row without padding."""
    from hf_robust.report.vision_language import AnswerTask

    model, processor = llava
    task = AnswerTask(model.eval(), processor, questions(2), 3)
    inputs = task.inputs(task.behaviors)
    assert processor.tokenizer.decode(inputs["labels"][0][inputs["labels"][0] != -100]) == "seven"
    with torch.no_grad():
        found = task._losses(inputs, inputs["pixel_values"])
        text = task._prompt("which digit is this") + " seven"
        tokens = processor(images=[questions(1)[0]["image"]], text=[text], return_tensors="pt")
        logits = model(**tokens).logits[0]
    wanted = torch.nn.functional.cross_entropy(logits[-2], tokens["input_ids"][0, -1])
    assert found[0] == pytest.approx(float(wanted), rel=1e-4)
    model.train()


def test_answers_refuse(llava):
    model, processor = llava
    options = {"dataset": questions(1), "progress": False}
    with pytest.raises(TypeError, match="takes no `objective`"):
        pytest.importorskip("pyautoattack")
        evaluate_vlm(model, processor, attacks={"parts": PyAutoAttack(epsilon=0.1)}, **options)
    with pytest.raises(ValueError, match="no `answer`"):
        evaluate_vlm(model, processor, dataset=[{"image": Image.new("RGB", (8, 8))}], attacks={})
    with pytest.raises(ValueError, match="has no `image_processor`"):
        evaluate_vlm(model, processor.tokenizer, attacks={}, **options)


# Command line ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    config = ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=4, patch_size=2,
        num_labels=3, id2label={0: "cat", 1: "dog", 2: "cow"}, label2id={"cat": 0, "dog": 1, "cow": 2},
    )  # fmt: skip
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(folder / "model")
    ViTImageProcessor(size={"height": 4, "width": 4}).save_pretrained(folder / "model")
    import datasets

    generator = torch.Generator().manual_seed(0)
    pictures = [Image.fromarray(torch.randint(0, 255, (4, 4, 3), generator=generator).byte().numpy()) for _ in range(6)]
    found = datasets.Dataset.from_dict(
        {"picture": pictures, "labels": [0, 1, 2, 0, 1, 2]},
        features=datasets.Features(
            {"picture": datasets.Image(), "labels": datasets.ClassLabel(names=["cat", "dog", "cow"])}
        ),
    )
    found.save_to_disk(folder / "data")
    return folder


def test_the_command_evaluates_a_classifier(classifier_folder, tmp_path, capsys):
    from hf_robust.cli import main

    arguments = [
        "evaluate", "--model_name_or_path", str(classifier_folder / "model"), "--dataset", str(classifier_folder / "data"),
        "--image_column", "picture", "--attacks", "pgd,apgd", "--steps", "3", "--epsilon", "4/255,8/255",
        "--sanity_images", "2", "--output_dir", str(tmp_path / "out"), "--no_progress",
    ]  # fmt: skip
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "robust accuracy" in printed and "images.jsonl" in printed
    report = Report.load(tmp_path / "out" / "report.json")
    assert [name for name in report.attacks if "/" in name and "with" not in name and "random" not in name] == [
        "pgd 4/255", "pgd 8/255", "apgd 4/255", "apgd 8/255",
    ]  # fmt: skip
    assert report.attacks["pgd 4/255"]["image_processor"]["image_mean"] == [0.5, 0.5, 0.5]
    assert report.data["classes"] == 3 and (tmp_path / "out" / "epsilon_curve.png").is_file()
    assert main(arguments) == 0  # goes on from what is there


def test_the_command_evaluates_clip(tmp_path, capsys):
    import datasets

    from hf_robust.cli import main
    from hf_robust.report.verify import verify
    from hf_robust.testbeds.clip_training import CLIPRecipe, build_clip, build_processor

    processor = build_processor()
    build_clip(CLIPRecipe(vision_layers=1), processor.tokenizer).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    given = {"image": [row["image"] for row in questions(4)], "label": [0, 1, 0, 1]}
    for place, label in enumerate([datasets.ClassLabel(names=["zero", "one"]), datasets.Value("int64")]):
        features = datasets.Features({"image": datasets.Image(), "label": label})
        datasets.Dataset.from_dict(given, features=features).save_to_disk(tmp_path / f"data{place}")
    arguments = [
        "evaluate", "--model_name_or_path", str(tmp_path / "model"), "--dataset", str(tmp_path / "data0"), "--steps", "2",
        "--templates", "the number {}", "a handwritten {}", "--sanity_images", "0", "--output_dir", str(tmp_path / "out"),
        "--no_progress",
    ]  # fmt: skip
    assert main(arguments) == 0, capsys.readouterr().err
    report = Report.load(tmp_path / "out" / "report.json")
    assert report.data["task"] == "zero-shot-image-classification" and report.data["classes"] == 2
    data = str(tmp_path / "data1")  # the card has the names of the classes and the templates
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    checks = verify(tmp_path / "out", behaviors=data, model=str(tmp_path / "model"), progress=False)
    done = {check.claim.metric: check.status for check in checks if check.measured is not None}
    assert done.keys() >= {"accuracy", "robust_accuracy"} and set(done.values()) == {"holds"}
    (tmp_path / "out" / "README.md").write_text(card.replace("a handwritten {}", "a drawn {}"), encoding="utf-8")
    checks = verify(tmp_path / "out", behaviors=data, model=str(tmp_path / "model"), progress=False)
    assert all(check.measured is None for check in checks)
    assert any("class texts are not those of the card" in check.reason for check in checks)
    arguments[arguments.index("--dataset") + 1] = data
    assert main([*arguments, "--overwrite"]) == 2
    assert "`--class_names` is required" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--class_names", "zero,one"]) == 0


def test_the_command_evaluates_a_vision_language_model(llava, tmp_path, capsys):
    import datasets

    from hf_robust.cli import main

    model, processor = llava
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    rows_of_text = {
        "image": [row["image"] for row in questions(4)], "question": ["which digit is this"] * 4, "answer": ["seven"] * 4
    }  # fmt: skip
    features = datasets.Features(
        {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    datasets.Dataset.from_dict(rows_of_text, features=features).save_to_disk(tmp_path / "data")
    arguments = [
        "evaluate", "--model_name_or_path", str(tmp_path / "model"), "--dataset", str(tmp_path / "data"), "--steps", "2",
        "--max_new_tokens", "2", "--sanity_images", "0", "--output_dir", str(tmp_path / "out"), "--no_progress",
    ]  # fmt: skip
    assert main(arguments) == 0, capsys.readouterr().err
    report = Report.load(tmp_path / "out" / "report.json")
    assert report.data["task"] == "image-text-to-text" and value(report, "accuracy") in (0.0, 0.25, 0.5, 0.75, 1.0)
    assert main([*arguments, "--overwrite", "--attacks", "autoattack"]) == 2
    assert "needs a classifier" in capsys.readouterr().err


def test_names_of_the_dataset_in_another_order_than_the_model_s(classifier_folder, tmp_path):
    """The same images, their classes numbered otherwise: the same report, and its card holds on them."""
    import shutil

    import datasets

    from hf_robust.cli import main
    from hf_robust.report.verify import verify

    data = datasets.load_from_disk(str(classifier_folder / "data")).rename_columns(
        {"picture": "image", "labels": "label"}
    )
    data.save_to_disk(tmp_path / "model_order")
    names, own = ["cow", "cat", "dog"], data.features["label"].names
    labels = [names.index(own[label]) for label in data["label"]]
    other = data.remove_columns("label").add_column("label", labels)
    other.cast_column("label", datasets.ClassLabel(names=names)).save_to_disk(tmp_path / "other_order")
    model, reports = str(classifier_folder / "model"), []
    for order in ("model_order", "other_order"):
        arguments = ["--dataset", str(tmp_path / order), "--output_dir", str(tmp_path / "out" / order), "--no_progress"]
        assert (
            main(["evaluate", "--model_name_or_path", model, "--steps", "2", "--sanity_images", "0", *arguments]) == 0
        )
        reports.append(Report.load(tmp_path / "out" / order / "report.json"))
    assert reports[0].measurements == reports[1].measurements and reports[0].data == reports[1].data
    folder = tmp_path / "published"
    shutil.copytree(model, folder)
    shutil.copy(tmp_path / "out" / "other_order" / "README.md", folder / "README.md")
    checks = verify(folder, behaviors=tmp_path / "other_order", progress=False)
    assert any(check.status == "holds" for check in checks), [check.reason for check in checks]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--epsilon", "eight"], "is no number or fraction"),
        (["--epsilon", "8"], "8/255"),
        (["--attacks", "pdg"], "Did you mean 'pgd'"),
        (["--label_column", "target"], "--label_column"),
        (["--norm", "linff"], "Did you mean 'linf'"),
    ],
)
def test_the_command_refuses(classifier_folder, tmp_path, capsys, change, message):
    from hf_robust.cli import main

    given = {
        "--model_name_or_path": str(classifier_folder / "model"), "--dataset": str(classifier_folder / "data"),
        "--image_column": "picture", "--output_dir": str(tmp_path),
    }  # fmt: skip
    given[change[0]] = change[1]
    assert main(["evaluate", *[text for pair in given.items() for text in pair]]) == 2
    assert message in capsys.readouterr().err


def test_the_command_knows_models_by_their_configuration(classifier_folder, tmp_path, llava):
    from hf_robust.cli.evaluate_vision import is_wanted, model_kind
    from tests.helpers import tiny_model

    tiny_clip().save_pretrained(tmp_path / "clip")
    llava[0].save_pretrained(tmp_path / "llava")
    tiny_model().save_pretrained(tmp_path / "llama")
    vit = str(classifier_folder / "model")
    kinds = {name: model_kind(str(tmp_path / name)) for name in ("clip", "llava", "llama", "missing")}
    assert kinds == {"clip": "clip", "llava": "vlm", "llama": None, "missing": None} and model_kind(vit) == "classifier"
    assert is_wanted(["--model_name_or_path", vit]) and is_wanted(["--model_name_or_path", str(tmp_path / "clip")])
    # A vision-language model is attacked in text unless images are given
    assert not is_wanted(["--model_name_or_path", str(tmp_path / "llava")])
    assert is_wanted(["--model_name_or_path", str(tmp_path / "llava"), "--dataset", "x"])
    assert not is_wanted(["--model_name_or_path", str(tmp_path / "llama")])
    config = tmp_path / "config.yaml"
    config.write_text(f"dataset: {json.dumps(str(tmp_path))}\n", encoding="utf-8")
    assert is_wanted(["--config", str(config)])


def test_the_command_keeps_autoattacks_name_for_the_standard_set():
    pytest.importorskip("pyautoattack")
    from hf_robust.cli.evaluate_vision import EvaluateVisionArguments

    options = EvaluateVisionArguments(attacks=["autoattack"], epsilon=["8/255"])
    assert list(options.build_attacks(None, 10)) == ["AutoAttack"]
    assert list(options.build_attacks(None, 4)) == ["apgd-ce + apgd-t + fab-t + square"]
    with pytest.raises(ValueError, match="needs a classifier"):
        options.build_attacks(None, None)


def test_the_command_keeps_every_attack_that_is_asked_for(tmp_path):
    pytest.importorskip("pyautoattack")
    from hf_robust.cli.evaluate_vision import EvaluateVisionArguments
    from hf_robust.report.vision_evaluation import _check

    settings = tmp_path / "settings.json"
    settings.write_text('{"autoattack_l2": {"attack": "autoattack", "norm": "l2", "epsilon": 0.5}}', encoding="utf-8")
    names = ["autoattack", "autoattack_l2"]
    options = EvaluateVisionArguments(attacks=names, epsilon=["8/255"], attack_settings=str(settings))
    parts = "apgd-ce + apgd-t + fab-t + square"
    for classes, wanted in (
        (10, ["AutoAttack", "AutoAttack (autoattack_l2)"]),
        (4, [parts, f"{parts} (l2)"]),  # not the standard set: its name stays out
    ):
        attacks = options.build_attacks(None, classes)
        assert list(attacks) == wanted and [attack.norm for attack in attacks.values()] == ["linf", "l2"]
        _check(attacks, classes)  # an evaluation takes them
    options = EvaluateVisionArguments(attacks=["pgd"], epsilon=["0.100001", "0.100002"])
    with pytest.raises(ValueError, match="two attacks have the name 'pgd 0.1'"):
        options.build_attacks(None, 10)
