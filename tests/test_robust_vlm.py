"""RobustVLMTrainer on tiny LLaVAs, and what a perturbation of images means for patches and tiles."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from trl import SFTConfig, SFTTrainer

from hf_robust import RobustVLMConfig
from hf_robust.cli import main
from hf_robust.sites.image_layout import ImageLayout
from hf_robust.trainers.robust_vlm_attack import VLMAttack
from tests.helpers import tiny_model
from tests.trainer_data import logged, max_difference, settings, tiny_tokenizer, train, utility_rows, weights
from tests.vlm_data import (
    answered_images,
    image_processor,
    llava_processor,
    picture,
    qwen_processor,
    tiny_llava,
    tiny_qwen,
    vlm_trainer,
)

EPSILON = 0.1
STD = torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
MEAN = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)
STATISTICS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]}


def batch_of(trainer: Any, rows: int = 4) -> tuple[dict[str, Any], torch.Tensor]:
    batch = dict(trainer.data_collator([trainer.train_dataset[i] for i in range(rows)]))
    return batch, batch.pop("image_counts")


# ---- Layouts ----


def test_patches_of_a_perturbed_image_are_those_the_processor_makes():
    processor = qwen_processor().image_processor
    images = [picture(0, 8, 12), picture(1, 4, 8)]
    inputs = processor(images=images, return_tensors="pt")
    layout = ImageLayout(processor, inputs)
    assert layout.shapes == [(3, 8, 12), (3, 4, 8)] and layout.originals is not None
    for image, raw in zip(images, layout.originals, strict=True):
        assert np.allclose(np.asarray(image).transpose(2, 0, 1) / 255, raw, atol=1e-6)
    # Other pictures are reached by their difference
    others = [picture(2, 8, 12), picture(3, 4, 8)]
    deltas = [
        torch.from_numpy((np.asarray(b).astype(np.float32) - np.asarray(a)) / 255).permute(2, 0, 1)
        for a, b in zip(images, others, strict=True)
    ]
    expected = processor(images=others, return_tensors="pt")["pixel_values"]
    assert torch.allclose(layout.place(deltas), expected, atol=1e-5)


def test_free_patches_are_no_images():
    processor = qwen_processor().image_processor
    inputs = processor(images=[picture(0, 8, 8)], return_tensors="pt")
    layout = ImageLayout(processor, inputs, as_images=False)
    assert layout.shapes == [tuple(inputs["pixel_values"].shape)]
    delta = torch.zeros(layout.shapes[0])
    delta[0, 0] = 0.1  # one of the two copies of one pixel
    moved = (layout.place([delta]) - inputs["pixel_values"]).abs() > 1e-6
    assert moved.sum() == 1
    image = ImageLayout(processor, inputs)
    one = torch.zeros(image.shapes[0])
    one[0, 0, 0] = 0.1
    assert ((image.place([one]) - inputs["pixel_values"]).abs() > 1e-6).sum() == 2


@pytest.mark.parametrize("size", [(8, 8), (12, 20), (21, 10)])
def test_tiles_of_a_perturbed_image_are_those_the_processor_makes(size: tuple[int, int]):
    """Up to rounding: the processor resizes bytes."""
    side = {"height": 8, "width": 8}
    processor = LlavaNextImageProcessorPil(
        size=side, crop_size=side, image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]], **STATISTICS
    )
    # Smooth pictures in the middle of the range, so that bicubic resizing does not overshoot it
    y, x = np.mgrid[: size[0], : size[1]]
    first = np.stack([110 + 2 * x, 120 + 2 * y, 130 + x + y], axis=-1)
    second = first + np.stack([x - y, 2 * y, 3 * x], axis=-1)
    inputs, expected = (processor(images=[image.astype(np.uint8)], return_tensors="pt") for image in (first, second))
    layout = ImageLayout(processor, inputs)
    assert layout.shapes == [(3, *size)] and layout.originals is None
    delta = torch.from_numpy((second - first) / 255).permute(2, 0, 1).float()
    found = layout.place([delta])
    assert (found - expected["pixel_values"]).abs().mul(STD).max() < 2.5 / 255
    assert torch.equal(layout.place([torch.zeros_like(delta)]), inputs["pixel_values"])
    leaf = torch.zeros_like(delta, requires_grad=True)
    (gradient,) = torch.autograd.grad(layout.place([leaf]).sum() + 0 * leaf.sum(), leaf)
    assert torch.isfinite(gradient).all()


def test_unknown_layouts():
    with pytest.raises(ValueError, match="`pixel_values` of shape"):
        ImageLayout(image_processor(), {"pixel_values": torch.zeros(3, 8, 8)})


# ---- The attack ----


@pytest.mark.parametrize("perturbation", ["pixels", "embeddings", "both"])
def test_the_attack_stays_in_its_balls_and_raises_the_loss(perturbation: str, tmp_path: Path):
    trainer = vlm_trainer(
        tiny_llava(), tmp_path, {"train_dataset": answered_images(4, images=[1, 2])}, perturbation=perturbation,
        pixel_epsilon=EPSILON, embedding_epsilon=0.2, attack_steps=4,
    )  # fmt: skip
    inputs, counts = batch_of(trainer)
    assert counts.tolist() == [1, 2, 1, 2]
    state = torch.get_rng_state()
    found = trainer.vlm_attack.search(trainer.model, inputs, counts)
    assert torch.equal(state, torch.get_rng_state())
    assert (found.result.last_loss < found.result.first_loss).all()  # minus the cross-entropy
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    if perturbation == "embeddings":
        assert not found.inputs
    else:
        moved = found.inputs["pixel_values"]
        raw = (moved - inputs["pixel_values"]) * STD
        assert 0.9 * EPSILON < raw.abs().max() <= EPSILON + 1e-6
        assert (moved * STD + MEAN).min() >= -1e-6 and (moved * STD + MEAN).max() <= 1 + 1e-6
        assert (raw.abs().flatten(1).amax(dim=1) > 0).all()  # every image of every row
    if perturbation == "pixels":
        assert found.embeddings is None
    else:
        assert found.embeddings is not None
        radius = 0.2 * trainer.model.get_input_embeddings().weight.norm(dim=-1).mean()
        assert found.embeddings.norm(dim=-1).max() <= radius * (1 + 1e-5)
        assert found.embeddings[inputs["labels"] != -100].abs().max() == 0
        assert found.embeddings[inputs["attention_mask"] == 0].abs().max() == 0
        assert found.embeddings[inputs["input_ids"] == 27].abs().max() > 0


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "weights"])
@pytest.mark.parametrize("perturbation", ["pixels", "both"])
def test_bf16(perturbation: str, autocast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A step as in float32 up to the rounding of half precision, with perturbations in float32."""
    found: list[Any] = []
    search = VLMAttack.search
    monkeypatch.setattr(VLMAttack, "search", lambda *args, **kwargs: found.append(search(*args, **kwargs)) or found[-1])
    losses = []
    for half in (False, True):
        model = tiny_llava().to(torch.bfloat16 if half and not autocast else torch.float32)
        before = weights(model)
        args = {"pixel_epsilon": EPSILON, "embedding_epsilon": 0.2, "bf16": half and autocast, "max_steps": 1}
        trainer = vlm_trainer(model, tmp_path, perturbation=perturbation, **args)
        after = train(trainer)
        assert all(value.isfinite().all() for value in after.values()) and max_difference(before, after) > 0
        losses += logged(trainer, "loss")
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert {each.result.delta.dtype for each in found} == {torch.float32}


@pytest.mark.parametrize(("perturbation", "times"), [("embeddings", 1), ("both", 5)])
def test_the_tower_runs_once_where_no_pixel_moves(perturbation: str, times: int, tmp_path: Path):
    trainer = vlm_trainer(tiny_llava(), tmp_path, perturbation=perturbation, attack_steps=4)
    inputs, counts = batch_of(trainer)
    calls: list[None] = []
    trainer.model.model.vision_tower.embeddings.register_forward_hook(lambda *_: calls.append(None))
    trainer.vlm_attack.search(trainer.model, inputs, counts)
    assert len(calls) == times


def test_rows_do_not_depend_on_their_companions(tmp_path: Path):
    trainer = vlm_trainer(tiny_llava(), tmp_path, perturbation="both", pixel_norm="l2", pixel_epsilon=0.5)
    together, counts = batch_of(trainer, 3)
    alone, one = batch_of(trainer, 1)
    found = [trainer.vlm_attack.search(trainer.model, *given) for given in ((together, counts), (alone, one))]
    left, right = (each.inputs["pixel_values"][0] for each in found)
    assert torch.allclose(left, right, atol=1e-4)
    assert ((left - together["pixel_values"][0]) * STD).norm() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("space", ["image", "pixel_values"])
def test_patches_of_qwen(space: str, tmp_path: Path):
    """The attack on a Qwen-VL: in image space both copies of a pixel move together."""
    processor, model = qwen_processor().image_processor, tiny_qwen()
    inputs = dict(processor(images=[picture(0, 8, 8), picture(1, 4, 8)], return_tensors="pt"))
    rows = [[29] + [27] * 4 + [30, 6, 7, 20, 21, 3], [29] + [27] * 2 + [30, 6, 7, 20, 21, 3, 1, 1]]
    ids = torch.tensor(rows)
    inputs |= {"input_ids": ids, "attention_mask": (ids != 1).long(), "mm_token_type_ids": (ids == 27).long()}
    labels = ids.masked_fill((ids < 20) | (ids > 26), -100)
    config = RobustVLMConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", pixel_space=space, pixel_epsilon=EPSILON, attack_steps=3,
        perturbation="both",
    )  # fmt: skip
    attack = config.build_attack(image_processor=processor)
    found = attack.search(model, {**inputs, "labels": labels}, torch.tensor([1, 1]))
    assert (found.result.last_loss < found.result.first_loss).all()
    moved = (found.inputs["pixel_values"] - inputs["pixel_values"]).unflatten(1, (3, 2, 4))
    apart = (moved[:, :, 0] - moved[:, :, 1]).abs().max()
    assert (apart < 1e-5) == (space == "image")
    assert (moved.transpose(1, 0).flatten(1).abs().amax(dim=1) * STD.flatten()).max() <= EPSILON + 1e-6


@pytest.mark.parametrize("perturbation", ["pixels", "embeddings"])
def test_bad_pixels_of_any_batch_are_refused(perturbation: str, tmp_path: Path):
    trainer = vlm_trainer(
        tiny_llava(), tmp_path, {"train_dataset": answered_images(4, images=[1, 2])}, perturbation=perturbation
    )
    for value, part in ((float("nan"), "NaN"), (9.0, "outside")):
        inputs, counts = batch_of(trainer)
        inputs["pixel_values"][2, 1, 3, 3] = value  # the second image of row 1
        if perturbation == "embeddings" and part == "outside":
            trainer.vlm_attack.search(trainer.model, inputs, counts)
            continue
        rows = r"rows \[1\]" if perturbation == "pixels" else "pixels"
        with pytest.raises(ValueError, match=f"{part}.*{rows}.* step 3"):
            trainer.vlm_attack.search(trainer.model, inputs, counts, where="the batch at step 3")


# ---- Training ----


@pytest.mark.parametrize("off", [{"attack_steps": 0}, {"pixel_epsilon": 0.0}], ids=["steps-0", "epsilon-0"])
def test_without_attack_is_sft_bit_for_bit(off: dict[str, Any], tmp_path: Path):
    given = {"train_dataset": answered_images(), "processing_class": llava_processor()}
    expected = train(SFTTrainer(tiny_llava(), SFTConfig(**settings(tmp_path)), **given))
    found = train(vlm_trainer(tiny_llava(), tmp_path, **off))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_without_attack_qwen_is_sft_bit_for_bit(tmp_path: Path):
    given = {"train_dataset": answered_images(8, images=[1, 2]), "processing_class": qwen_processor()}
    expected = train(SFTTrainer(tiny_qwen(), SFTConfig(**settings(tmp_path)), **given))
    found = train(vlm_trainer(tiny_qwen(), tmp_path, given, pixel_epsilon=0.0))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("perturbation", ["pixels", "both"])
def test_qwen_takes_a_step_on_images(perturbation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What it was trained on are patches of images near the clean ones: equal copies, in ball and box."""
    given = {"train_dataset": answered_images(4, images=[1, 2]), "processing_class": qwen_processor()}
    args = {"perturbation": perturbation, "pixel_epsilon": EPSILON, "attack_steps": 3, "max_steps": 1}
    trainer = vlm_trainer(tiny_qwen(), tmp_path, {**given, "eval_dataset": given["train_dataset"]}, **args)
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    search = VLMAttack.search

    def spy(self: Any, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        found = search(self, model, inputs, *rest, **more)
        pairs.append((inputs["pixel_values"], found.inputs["pixel_values"]))
        return found

    monkeypatch.setattr(VLMAttack, "search", spy)
    before = weights(trainer.model)
    after = train(trainer)
    for part in ("visual.blocks", "visual.merger", "language_model"):
        assert any(not torch.equal(before[name], after[name]) for name in before if part in name), part
    (clean, moved), std = pairs[0], STD.view(3, 1, 1, 1)
    images = [x.unflatten(1, (3, 2, 2, 2)) * std + MEAN.view(3, 1, 1, 1) for x in (clean, moved)]
    assert torch.allclose(images[1][:, :, 0], images[1][:, :, 1], atol=1e-6)
    assert 0.9 * EPSILON < (images[1] - images[0]).abs().max() <= EPSILON + 1e-6
    assert images[1].min() >= -1e-6 and images[1].max() <= 1 + 1e-6
    assert logged(trainer, "attack_loss_last")[0] > logged(trainer, "attack_loss_first")[0]
    metrics = trainer.evaluate()
    assert metrics["eval_adversarial_loss"] > metrics["eval_loss"]


def test_accumulation_does_not_matter_and_the_attack_does(tmp_path: Path):
    args = {"perturbation": "both", "pixel_epsilon": EPSILON, "embedding_epsilon": 0.3, "max_steps": 2}
    found = [
        train(
            vlm_trainer(
                tiny_llava(), tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, **args
            )
        )
        for size in (8, 2)
    ]
    assert max_difference(*found) < 1e-4
    off = train(vlm_trainer(tiny_llava(), tmp_path, per_device_train_batch_size=8, max_steps=2, attack_steps=0))
    assert max_difference(found[0], off) > 1e-3


def test_resume_is_uninterrupted_training(tmp_path: Path):
    def make(folder: str) -> Any:
        args = {"pixel_epsilon": EPSILON, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
        return vlm_trainer(tiny_llava(), tmp_path / folder, **args)

    whole, resumed = make("whole"), make("resumed")
    expected = train(whole)
    found = train(resumed, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert max_difference(expected, found) < 1e-6
    assert logged(resumed, "loss") == pytest.approx(logged(whole, "loss"), abs=1e-5)


def test_evaluation_measures_clean_and_attacked_rows(tmp_path: Path):
    rows = {"eval_dataset": answered_images(3)}
    args = {"pixel_epsilon": 0.5, "eval_attack_steps": 5, "per_device_eval_batch_size": 2}
    trainer = vlm_trainer(tiny_llava(), tmp_path, rows, **args)
    metrics = trainer.evaluate()
    parent = SFTTrainer(
        tiny_llava(), SFTConfig(**settings(tmp_path, per_device_eval_batch_size=2)),
        train_dataset=answered_images(), processing_class=llava_processor(), **rows,
    ).evaluate()  # fmt: skip
    assert metrics["eval_loss"] == pytest.approx(parent["eval_loss"], abs=1e-6)
    assert metrics["eval_adversarial_loss"] > metrics["eval_loss"]
    assert 0 <= metrics["eval_adversarial_token_accuracy"] <= 1
    assert trainer.evaluate()["eval_adversarial_loss"] == metrics["eval_adversarial_loss"]


# ---- Rates ----


def test_projector_and_tower_learn_at_their_own_rates(tmp_path: Path):
    args = {"projector_learning_rate": 0.01, "vision_learning_rate": 0.001, "max_steps": 1, "attack_steps": 0}
    trainer = vlm_trainer(tiny_llava(), tmp_path, **args)
    before, plain = weights(trainer.model), train(vlm_trainer(tiny_llava(), tmp_path, max_steps=1, attack_steps=0))
    after = train(trainer)
    for name, share in (("language_model", 1.0), ("multi_modal_projector", 0.1), ("vision_tower", 0.01)):
        moved, full = (
            torch.cat([(end[key] - before[key]).flatten() for key in before if name in key]) for end in (after, plain)
        )
        assert full.abs().max() > 0
        assert moved.norm() == pytest.approx(share * full.norm().item(), rel=1e-2), name


def test_rate_0_freezes(tmp_path: Path):
    trainer = vlm_trainer(tiny_llava(), tmp_path, vision_learning_rate=0.0, max_steps=1)
    before = weights(trainer.model)
    after = train(trainer)
    assert all(torch.equal(before[key], after[key]) for key in before if "vision_tower" in key)
    assert any(not torch.equal(before[key], after[key]) for key in before if "projector" in key)


def test_lora_with_the_projector_in_full(tmp_path: Path):
    adapter = LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", modules_to_save=["multi_modal_projector"])
    trainer = vlm_trainer(tiny_llava(), tmp_path, {"peft_config": adapter}, projector_learning_rate=0.01)
    before = weights(trainer.model)
    after = train(trainer)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert all("lora_" in key or "modules_to_save" in key for key in moved)
    assert any("modules_to_save" in key for key in moved)
    rates = {group["initial_lr"] for group in trainer.optimizer.param_groups if group["params"]}
    assert rates == {0.1, 0.01}


# ---- What is refused ----


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ({"perturbation": "pixel"}, ["`perturbation='pixel'`", "'pixels'"]),
        ({"pixel_epsilon": 8}, ["`pixel_epsilon=8`", "8/255"]),
        ({"pixel_epsilon": -1.0}, ["`pixel_epsilon=-1.0`"]),
        ({"pixel_step_size": 2}, ["`pixel_step_size=2`", "2/255"]),
        ({"pixel_norm": "l1"}, ["`pixel_norm='l1'`", "linf"]),
        ({"pixel_space": "images"}, ["`pixel_space='images'`", "'image'"]),
        ({"attack_steps": -1}, ["`attack_steps=-1`"]),
        ({"eval_attack_steps": 1.5}, ["`eval_attack_steps=1.5`", "whole"]),
        ({"embedding_epsilon": -0.1}, ["`embedding_epsilon=-0.1`"]),
        ({"vision_learning_rate": -1.0}, ["`vision_learning_rate=-1.0`"]),
        ({"completion_only_loss": False}, ["`completion_only_loss=False`", "answer"]),
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
            ["use_reentrant': True", "use_reentrant': False"],
        ),
    ],
)
def test_settings(args: dict[str, Any], parts: list[str], tmp_path: Path):
    with pytest.raises(ValueError) as error:
        vlm_trainer(tiny_llava(), tmp_path, **args)
    assert all(part in str(error.value) for part in parts), error.value


def test_data_and_models(tmp_path: Path):
    def refused(match: str, model: Any = None, given: dict[str, Any] | None = None, **args: Any) -> None:
        with pytest.raises((ValueError, TypeError), match=match):
            vlm_trainer(tiny_llava() if model is None else model, tmp_path, given, **args)

    refused("no `image` or `images`", given={"train_dataset": utility_rows()})
    refused("`train_dataset` must be a `Dataset`", given={"train_dataset": None})
    refused("0 rows", given={"eval_dataset": answered_images().select([])})
    messages = answered_images().map(lambda row: {"messages": row["prompt"] + row["completion"]})
    refused("assistant_only_loss", given={"train_dataset": messages.remove_columns(["prompt", "completion"])})
    refused("no image processor", given={"processing_class": tiny_tokenizer()})
    refused("no image tower", model=tiny_model())
    adapter = {"peft_config": LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj")}
    refused("`vision_learning_rate=0.01`: nothing", given=adapter, vision_learning_rate=0.01)


# ---- Command line ----


def test_command_line(tmp_path: Path):
    model = tiny_llava()
    model.save_pretrained(tmp_path / "llava")
    llava_processor().save_pretrained(tmp_path / "llava")
    answered_images(4).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "config.yaml").write_text(
        f"""model_name_or_path: {tmp_path / "llava"}
dataset_name: {tmp_path / "rows.parquet"}
output_dir: {tmp_path / "out"}
use_cpu: true
bf16: false
gradient_checkpointing: false
report_to: none
max_steps: 1
attack_steps: 1
per_device_train_batch_size: 2
use_peft: true
lora_r: 2
lora_target_modules: ['.*language_model.*\\.(q|k|v|o)_proj']
lora_modules_to_save: [multi_modal_projector]
projector_learning_rate: 1.0e-4
""",
        encoding="utf-8",
    )
    assert main(["vlm", "--config", str(tmp_path / "config.yaml")]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert "raw [0, 1] pixels" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("length", [2, 4])
def test_images_that_are_cut_off_are_refused(length: int, tmp_path: Path):
    trainer = vlm_trainer(tiny_llava(), tmp_path, max_length=length)
    with pytest.raises(ValueError, match=f"`max_length={length}` cuts image tokens off row 0 .* 1 images: raise it"):
        trainer.train()
