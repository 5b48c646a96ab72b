"""RobustCLIPTrainer on a tiny CLIP: its losses, what it leaves behind, and what it refuses."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    TrainingArguments,
)

from hf_robust import RobustCLIPConfig, RobustCLIPTrainer
from hf_robust.cli import main
from hf_robust.objectives import fare_loss, pmg_aft_loss, sim_clip_loss, similarity_logits, tecoa_loss
from tests.trainer_data import logged, max_difference, tiny_tokenizer, train, weights
from tests.vlm_data import image_processor, picture, tiny_llava, vision_config

NAMES = ["cake", "bomb", "flour"]
LOSSES = ["fare", "tecoa", "pmg_aft", "sim_clip"]
EPSILON = 0.05


def tiny_clip(seed: int = 0, **vision: Any) -> CLIPModel:
    text = CLIPTextConfig(
        vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, pad_token_id=1, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision_config(**vision).to_dict(), projection_dim=12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(config)
        for parameter in model.vision_model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)  # fresh weights hardly look at the picture
    return model.train()


def processor() -> CLIPProcessor:
    return CLIPProcessor(image_processor=image_processor(), tokenizer=tiny_tokenizer())


def pictures(count: int = 8) -> Dataset:
    rows = [{"image": picture(i), "labels": i % 3} for i in range(count)]
    return Dataset.from_list(rows, features=Features({"image": Image(), "labels": ClassLabel(names=NAMES)}))


def clip_trainer(model: Any, folder: Path | str, trainer: dict[str, Any] | None = None, **args: Any):
    given = {"train_dataset": pictures(), "processing_class": processor(), **(trainer or {})}
    settings = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
        "logging_steps": 1, "max_steps": 3, "per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 0.05,
        "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0.0, "weight_decay": 0.0,
        "attack_epsilon": EPSILON, "attack_steps": 2, "attack_step_size": None,
        "prompt_templates": ["a {} <eos>"],
    }  # fmt: skip
    return RobustCLIPTrainer(model, RobustCLIPConfig(**{**settings, **args}), **given)


def pixels_of(rows: Dataset) -> torch.Tensor:
    return image_processor()(images=list(rows["image"]), return_tensors="pt")["pixel_values"]


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj", "visual_projection"], **changes})


# ---- Losses ----


def test_fare_with_epsilon_0_keeps_the_tower_where_it_was(tmp_path: Path):
    clip = tiny_clip()
    before = weights(clip)
    trainer = clip_trainer(clip, tmp_path, attack_epsilon=0.0, optim="adamw_torch", learning_rate=1e-2)
    train(trainer)
    assert logged(trainer, "loss") == [0.0] * 3
    assert max_difference(before, weights(clip)) == 0


@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_and_update_without_attack_are_those_written_out(loss_type: str, tmp_path: Path):
    """Three full-batch steps of SGD; clean images, so that the frozen tower's distance starts at zero."""
    rows = pictures(6)
    args = {
        "loss_type": loss_type,
        "attack_steps": 0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
    }
    trainer = clip_trainer(tiny_clip(), tmp_path, {"train_dataset": rows}, **args)
    updated = train(trainer)
    clip, frozen = tiny_clip(), tiny_clip()
    pixels, labels = pixels_of(rows), torch.arange(6) % 3
    texts = tiny_tokenizer()([f"a {name} <eos>" for name in NAMES], return_tensors="pt")
    with torch.no_grad():
        classes = clip.get_text_features(**texts).pooler_output
        reference = frozen.get_image_features(pixel_values=pixels).pooler_output
    expected = []
    for _ in range(3):
        features = clip.get_image_features(pixel_values=pixels).pooler_output
        if loss_type == "fare":
            loss = fare_loss(features, reference)
        elif loss_type == "tecoa":
            loss = tecoa_loss(features, classes, labels)
        elif loss_type == "sim_clip":
            loss = sim_clip_loss(features, features)
        else:
            logits = [similarity_logits(each, classes) for each in (features, features, reference)]
            loss = pmg_aft_loss(*logits, labels)
        clip.zero_grad()
        loss.mean().backward()
        with torch.no_grad():
            for parameter in clip.vision_model.parameters():
                parameter -= 0.05 * (0 if parameter.grad is None else parameter.grad)
            clip.visual_projection.weight -= 0.05 * clip.visual_projection.weight.grad
        expected.append(loss.mean().item())
    assert logged(trainer, "loss") == pytest.approx(expected, abs=2e-4, rel=1e-4)
    tower = {f"vision_model.{name}": value for name, value in weights(clip.vision_model).items()}
    tower["visual_projection.weight"] = clip.visual_projection.weight.detach()
    # Cross-entropy at scale 100 has gradients of hundreds: rounding grows with them
    assert max_difference(updated, tower) < (1e-5 if loss_type in ("fare", "sim_clip") else 2e-3)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_training_under_attack(adapter: bool, loss_type: str, tmp_path: Path):
    clip = tiny_clip()
    texts = weights(clip.text_model)
    trainer = clip_trainer(clip, tmp_path, {"peft_config": lora()} if adapter else None, loss_type=loss_type)
    before = weights(trainer.model)
    after = train(trainer)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(torch.isfinite(value).all() for value in after.values())
    if adapter:
        assert all("lora_" in name for name in moved)
    assert max_difference(texts, weights(clip.text_model)) == 0
    assert all(logged(trainer, "attack_non_finite")[i] == 0 for i in range(3))
    first, last = logged(trainer, "attack_loss_first"), logged(trainer, "attack_loss_last")
    assert sum(last) > sum(first)  # of the loss that the adversary raises


def test_the_attack_stays_in_the_ball_and_box_and_raises_fare(tmp_path: Path):
    trainer = clip_trainer(tiny_clip(), tmp_path, attack_steps=5)
    inputs = {"pixel_values": pixels_of(pictures())}
    moved, reference = trainer._attacked(trainer.model, inputs, trainer.pixel_attack)
    std, mean = torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)
    raw = (moved - inputs["pixel_values"]) * std
    assert EPSILON * 0.9 < raw.abs().max() <= EPSILON + 1e-6
    assert (moved * std + mean).min() >= -1e-6 and (moved * std + mean).max() <= 1 + 1e-6
    assert reference is not None
    random = inputs["pixel_values"] + EPSILON * (2 * torch.rand_like(raw) - 1) / std
    with torch.no_grad():
        far, near = (fare_loss(trainer.model(pixel_values=x).image_embeds, reference) for x in (moved, random))
    assert (far > near).float().mean() > 0.8
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_batches_and_accumulation_do_not_matter(tmp_path: Path):
    """Random starts belong to images, not to places in a batch."""
    found = [
        train(
            clip_trainer(
                tiny_clip(), tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=8 // batch
            )
        )
        for batch in (8, 2)
    ]
    assert max_difference(*found) < 1e-5
    off = train(clip_trainer(tiny_clip(), tmp_path, per_device_train_batch_size=8, attack_epsilon=0.0))
    assert max_difference(found[0], off) > 1e-3


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_resume_is_uninterrupted_training(adapter: bool, tmp_path: Path):
    def make(folder: str):
        given = {"peft_config": lora()} if adapter else None
        return clip_trainer(tiny_clip(), tmp_path / folder, given, save_strategy="steps", save_steps=1)

    whole, resumed = make("whole"), make("resumed")
    expected = train(whole)
    found = train(resumed, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert max_difference(expected, found) < 1e-6
    assert logged(resumed, "loss") == pytest.approx(logged(whole, "loss"), abs=1e-5)


def test_the_teacher_is_the_adapter_switched_off(tmp_path: Path):
    trainer = clip_trainer(tiny_clip(), tmp_path, {"peft_config": lora()}, learning_rate=0.5)
    train(trainer)
    pixels = pixels_of(pictures())
    with torch.no_grad():
        before = tiny_clip().get_image_features(pixel_values=pixels).pooler_output
        now = trainer.model(pixel_values=pixels).image_embeds
    assert torch.allclose(trainer._frozen(trainer.model, pixels), before, atol=1e-6)
    assert (now - before).abs().max() > 1e-4


# ---- Evaluation ----


def test_evaluation_attacks_too(tmp_path: Path):
    rows = {"eval_dataset": pictures(7)}
    args = {"loss_type": "tecoa", "per_device_eval_batch_size": 3, "eval_strategy": "epoch"}
    trainer = clip_trainer(tiny_clip(), tmp_path, rows, eval_attack_steps=5, attack_epsilon=0.2, **args)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > metrics["eval_clean_loss"]
    assert 0 <= metrics["eval_robust_accuracy"] <= metrics["eval_accuracy"] <= 1
    again = trainer.evaluate()
    assert again["eval_loss"] == metrics["eval_loss"]
    clip, pixels = tiny_clip(), pixels_of(pictures(7))
    texts = tiny_tokenizer()([f"a {name} <eos>" for name in NAMES], return_tensors="pt")
    with torch.no_grad():
        answers = clip(pixel_values=pixels, **texts).logits_per_image.argmax(dim=1)
    assert metrics["eval_accuracy"] == pytest.approx((answers == torch.arange(7) % 3).float().mean().item())


def test_best_model_by_robust_accuracy(tmp_path: Path):
    trainer = clip_trainer(
        tiny_clip(), tmp_path, {"eval_dataset": pictures(4)}, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_robust_accuracy",
    )  # fmt: skip
    train(trainer)
    assert trainer.state.best_metric == max(logged(trainer, "eval_robust_accuracy"))


# ---- What it leaves behind ----


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_the_tower_drops_into_a_llava(adapter: bool, tmp_path: Path):
    clip = tiny_clip()
    trainer = clip_trainer(clip, tmp_path / "run", {"peft_config": lora()} if adapter else None)
    train(trainer)
    trainer.save_vision_tower(tmp_path / "tower")
    tower, report = CLIPVisionModel.from_pretrained(tmp_path / "tower", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert (tmp_path / "tower" / "preprocessor_config.json").is_file()
    llava = tiny_llava().eval()
    inputs = {
        "input_ids": torch.tensor([[4, 27, 27, 27, 27, 6, 7]]), "pixel_values": pixels_of(pictures(1)),
    }  # fmt: skip
    with torch.no_grad():
        plain = llava(**inputs).logits
        llava.model.vision_tower = tower.eval()
        robust = llava(**inputs).logits
        # What the language model sees is what the trained tower sees
        states = trainer.model(pixel_values=inputs["pixel_values"], output_hidden_states=True).hidden_states[-1]
        features = llava.model.multi_modal_projector(states[:, 1:])
        seen = llava.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
    assert torch.allclose(torch.stack(list(seen)), features, atol=1e-5)
    assert (plain - robust).abs().max() > 1e-5
    # The whole VLM is saved and loaded with it
    llava.save_pretrained(tmp_path / "llava")
    loaded = type(llava).from_pretrained(tmp_path / "llava").eval()
    with torch.no_grad():
        assert torch.allclose(loaded(**inputs).logits, robust, atol=1e-6)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_the_whole_clip_is_saved(adapter: bool, tmp_path: Path):
    clip = tiny_clip()
    trainer = clip_trainer(clip, tmp_path / "run", {"peft_config": lora()} if adapter else None)
    train(trainer)
    trainer.save_clip(tmp_path / "clip")
    loaded = CLIPModel.from_pretrained(tmp_path / "clip").eval()
    pixels = pixels_of(pictures(2))
    with torch.no_grad():
        expected = trainer.model(pixel_values=pixels).image_embeds
        assert torch.allclose(loaded.get_image_features(pixel_values=pixels).pooler_output, expected, atol=1e-5)
        assert (expected - tiny_clip().get_image_features(pixel_values=pixels).pooler_output).abs().max() > 1e-5
    assert max_difference(weights(loaded.text_model), weights(tiny_clip().text_model)) == 0


def test_saved_model_and_adapter_load_by_their_usual_ways(tmp_path: Path):
    pixels = pixels_of(pictures(2))
    full = clip_trainer(tiny_clip(), tmp_path / "full")
    train(full)
    full.save_model()
    loaded = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "full").eval()
    plain = CLIPVisionModel.from_pretrained(tmp_path / "full").eval()
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values=pixels).image_embeds, full.model(pixel_values=pixels).image_embeds)
        assert torch.equal(
            plain(pixel_values=pixels).last_hidden_state, full.model(pixel_values=pixels).last_hidden_state
        )
    adapter = clip_trainer(tiny_clip(), tmp_path / "lora", {"peft_config": lora()})
    train(adapter)
    adapter.save_model()
    base = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "full")
    base.load_state_dict(clip_trainer(tiny_clip(), tmp_path).model.state_dict())
    again = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    with torch.no_grad():
        expected = adapter.model.eval()(pixel_values=pixels).image_embeds
        assert torch.allclose(again(pixel_values=pixels).image_embeds, expected, atol=1e-6)


def test_card(tmp_path: Path):
    trainer = clip_trainer(tiny_clip(), tmp_path, max_steps=1)
    train(trainer)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "2402.12336" in card and "raw [0, 1] pixels" in card and "robust-clip" in card


def test_a_tower_alone_with_plain_arguments(tmp_path: Path):
    """No projection, no texts; the parent's configuration is taken over."""
    tower = CLIPVisionModel(vision_config())
    before = copy.deepcopy(weights(tower))
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", max_steps=1, learning_rate=0.1, disable_tqdm=True
    )
    rows = Dataset.from_list([{"pixel_values": torch.rand(3, 8, 8).tolist()} for _ in range(4)])
    trainer = RobustCLIPTrainer(tower, args, train_dataset=rows)
    assert isinstance(trainer.args, RobustCLIPConfig) and trainer.args.attack_epsilon == 2 / 255
    assert max_difference(before, train(trainer)) > 0
    with pytest.raises(ValueError, match="save_clip"):
        trainer.save_clip(tmp_path / "clip")


# ---- What is refused ----


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ({"loss_type": "fair"}, ["`loss_type='fair'`", "fare"]),
        ({"attack_epsilon": 8}, ["`attack_epsilon=8", "8/255"]),
        ({"attack_epsilon": -0.1}, ["`attack_epsilon=-0.1`"]),
        ({"attack_step_size": 2}, ["`attack_step_size=2`", "2/255"]),
        ({"attack_steps": -1}, ["`attack_steps=-1`"]),
        ({"eval_attack_steps": -1}, ["`eval_attack_steps=-1`"]),
        ({"attack_norm": "linfty"}, ["`attack_norm='linfty'`", "linf"]),
        ({"attack_keep": "bset"}, ["`attack_keep='bset'`", "best"]),
        ({"attack_random_start": False}, ["`attack_random_start=False`", "zero"]),
        ({"prompt_templates": ["a photo"]}, ["`prompt_templates`", "'a photo'"]),
        ({"prompt_templates": []}, ["`prompt_templates=[]`"]),
        ({"logit_scale": 0.0}, ["`logit_scale=0.0`", "100"]),
        ({"pmg_clean_weight": -1.0}, ["`pmg_clean_weight=-1.0`"]),
    ],
)
def test_settings(args: dict[str, Any], parts: list[str], tmp_path: Path):
    with pytest.raises(ValueError) as error:
        clip_trainer(tiny_clip(), tmp_path, **args)
    assert all(part in str(error.value) for part in parts), error.value


def unlabelled() -> Dataset:
    return pictures().remove_columns("labels")


def test_data_and_models(tmp_path: Path):
    def refused(match: str, model: Any = None, **args: Any) -> None:
        given = {k: args.pop(k) for k in ("train_dataset", "processing_class", "eval_dataset") if k in args}
        with pytest.raises((ValueError, TypeError), match=match):
            clip_trainer(tiny_clip() if model is None else model, tmp_path, given, **args)

    refused("`train_dataset` is required", train_dataset=None)
    refused("`train_dataset` must be a `Dataset`", train_dataset=[{"image": picture(0)}])
    refused("0 rows", train_dataset=pictures().select([]))
    refused("none of which holds images", train_dataset=pictures().remove_columns("image"))
    refused("no labels", train_dataset=unlabelled(), loss_type="tecoa", class_names=NAMES)
    refused("`class_names`", train_dataset=unlabelled(), loss_type="tecoa")
    refused("label 2 in row 2", loss_type="tecoa", class_names=NAMES[:2])
    refused("`eval_dataset` has 0 rows", eval_dataset=pictures().select([]))
    refused("`processing_class` is missing", processing_class=None)
    refused("CLIPProcessor", processing_class=image_processor(), loss_type="tecoa")
    refused("whole CLIPModel", model=CLIPVisionModel(vision_config()), loss_type="pmg_aft")
    refused("is no CLIP", model=tiny_llava())
    raw = Dataset.from_list([{"pixel_values": (255 * torch.rand(3, 8, 8)).tolist()} for _ in range(4)])
    refused("outside", train_dataset=raw, processing_class=None)
    wrong = image_processor()
    wrong.image_mean = [0.5]
    refused("channels", processing_class=CLIPProcessor(image_processor=wrong, tokenizer=tiny_tokenizer()))


@pytest.mark.parametrize(("value", "part"), [(float("nan"), "NaN"), (3.0, "outside")])
def test_bad_pixels_of_any_batch_are_refused_with_their_rows_and_step(value: float, part: str, tmp_path: Path):
    pixels = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pixels[6, 0, 1, 2] = value
    given = {"train_dataset": Dataset.from_dict({"pixel_values": pixels.tolist()}), "processing_class": None}
    trainer = clip_trainer(tiny_clip(), tmp_path, given, train_sampling_strategy="sequential")
    with pytest.raises(ValueError, match=rf"{part}.*rows \[2\].*step 2"):
        trainer.train()


def test_a_transform_does_not_hide_labels(tmp_path: Path):
    def renamed(batch: dict[str, list[Any]]) -> dict[str, Any]:
        return {"image": batch["image"], "labels": [label % 10 for label in batch["label"]]}

    def given(labels: list[int]) -> dict[str, Any]:
        rows = {"image": [picture(i) for i in range(8)], "label": labels}
        features = Features({"image": Image(), "label": Value("int64")})
        return {"train_dataset": Dataset.from_dict(rows, features=features).with_transform(renamed)}

    args = {"loss_type": "tecoa", "class_names": NAMES, "train_sampling_strategy": "sequential"}
    with pytest.raises(ValueError, match="label 7 in row 5.*3 `class_names`"):
        clip_trainer(tiny_clip(), tmp_path, given([0, 1, 2, 0, 1, 7, 0, 1]), **args)
    trainer = clip_trainer(tiny_clip(), tmp_path, given([0, 10, 2, 0, 1, 2, 17, 1]), **args)
    with pytest.raises(ValueError, match=r"`labels` holds \[7\] in rows \[2\] of the batch at step 2.*`class_names`"):
        trainer.train()


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "weights"])
@pytest.mark.parametrize("loss_type", ["fare", "pmg_aft"])
def test_bf16(loss_type: str, autocast: bool, tmp_path: Path):
    """A step as in float32 up to the rounding of half precision."""
    losses = []
    for half in (False, True):
        model = tiny_clip().to(torch.bfloat16 if half and not autocast else torch.float32)
        before = weights(model.vision_model)
        trainer = clip_trainer(model, tmp_path, loss_type=loss_type, bf16=half and autocast, max_steps=1)
        after = train(trainer)
        assert all(value.isfinite().all() for value in after.values())
        assert max_difference(before, weights(model.vision_model)) > 0
        losses += logged(trainer, "attack_loss_last")
    assert losses[1] == pytest.approx(losses[0], rel=0.2)


# ---- Command line ----


def test_command_line(tmp_path: Path):
    clip = tiny_clip()
    clip.save_pretrained(tmp_path / "clip")
    processor().save_pretrained(tmp_path / "clip")
    pictures().to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "config.yaml").write_text(
        f"""model_name_or_path: {tmp_path / "clip"}
dataset_name: {tmp_path / "rows.parquet"}
output_dir: {tmp_path / "out"}
use_cpu: true
report_to: none
max_steps: 1
attack_steps: 1
per_device_train_batch_size: 4
""",
        encoding="utf-8",
    )
    assert main(["clip", "--config", str(tmp_path / "config.yaml")]) == 0
    assert CLIPVisionModel.from_pretrained(tmp_path / "out" / "vision_tower")
    assert CLIPModel.from_pretrained(tmp_path / "out" / "clip")


def test_command_line_passes_on_what_loads_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clip = tiny_clip()
    clip.save_pretrained(tmp_path / "clip")
    processor().save_pretrained(tmp_path / "clip")
    pictures().to_parquet(tmp_path / "rows.parquet")
    arguments = (
        f"--model_name_or_path {tmp_path}/clip --dataset_name {tmp_path}/rows.parquet --output_dir {tmp_path}/out --use_cpu "
        "true --report_to none --max_steps 1 --attack_steps 1 --per_device_train_batch_size 4"
    ).split()
    seen: list[dict[str, Any]] = []
    load = AutoModel.from_pretrained

    def spy(name: str, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return load(name, **kwargs)

    monkeypatch.setattr(AutoModel, "from_pretrained", spy)
    loading = "--model_revision v2 --dtype bfloat16 --attn_implementation eager"
    lora = "--use_peft true --lora_target_modules q_proj v_proj"
    assert main(["clip", *arguments, *loading.split(), *lora.split()]) == 0
    expected = {"revision": "v2", "dtype": "bfloat16", "attn_implementation": "eager", "use_safetensors": True}
    assert seen == [expected]
    saved = CLIPModel.from_pretrained(tmp_path / "out" / "clip", dtype="auto")
    assert saved.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="`--load_in_4bit true`.*hf-robust clip"):
        main(["clip", *arguments, "--load_in_4bit", "true"])


@pytest.mark.parametrize("label", [[0, None], ["1", "cake"], [0.0, 0.5], [0.0, float("nan")]])
def test_labels_that_number_no_class(label: list[Any], tmp_path: Path):
    rows = Dataset.from_dict({"pixel_values": [[[[0.5] * 8] * 8] * 3] * 2, "labels": label})
    with pytest.raises(ValueError, match="`train_dataset` has the label .* in row [01] of `labels`"):
        clip_trainer(tiny_clip(), tmp_path, {"train_dataset": rows})


@pytest.mark.parametrize("pixels", [None, "cake.png", []])
def test_pixels_that_are_none(pixels: Any, tmp_path: Path):
    with pytest.raises(ValueError, match="`pixel_values`"):
        clip_trainer(tiny_clip(), tmp_path, {"train_dataset": Dataset.from_dict({"pixel_values": [pixels] * 2})})
