"""Bad input is refused in the constructors, with the argument, the value and the remedy in the message."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PrefixTuningConfig, PromptTuningConfig
from transformers import ProcessorMixin

from hf_robust import (
    AdversarialConfig,
    CAPOConfig,
    CATConfig,
    CATTrainer,
    NoiseFiTConfig,
    RobustCLIPConfig,
    UnlearnConfig,
)
from hf_robust.trainers.card import CardTrainer
from tests.helpers import tiny_model
from tests.trainer_data import (
    adversarial_rows,
    capo_trainer,
    cat_trainer,
    conversational,
    lora,
    settings,
    tiny_tokenizer,
    train,
    utility_rows,
)
from tests.vlm_data import tiny_llava

TRAINERS = pytest.mark.parametrize("make", [cat_trainer, capo_trainer], ids=["cat", "capo"])
CONFIGS = pytest.mark.parametrize("config", [CATConfig, CAPOConfig])


def refused(*parts: str) -> Any:
    """Expect a `ValueError` or `TypeError` whose message has all the parts."""
    return pytest.raises((ValueError, TypeError), match="(?s)" + "".join(f"(?=.*{part})" for part in parts))


def renamed(rows: Dataset, **names: str) -> Dataset:
    return rows.rename_columns(names)


# ---- Rows ----


def test_adversarial_rows_are_required(tmp_path: Path):
    with refused("`adversarial_dataset` is required", "`chosen`", "SFTTrainer"):
        CATTrainer(tiny_model(), CATConfig(**settings(tmp_path)), train_dataset=utility_rows())


ROWS = {
    "streaming": (adversarial_rows().to_iterable_dataset(), ("streaming", "streaming=False")),
    "splits": ({"train": adversarial_rows()}, ("'train'", "Choose one")),
    "list": ([{"prompt": "a"}], ("`list`", "Dataset.from_list")),
    "empty": (adversarial_rows().select([]), ("0 rows", "preference rows")),
    "no chosen": (renamed(adversarial_rows(), chosen="good"), ("lacks chosen", "'good'", "preference rows")),
    "no rejected": (renamed(adversarial_rows(), rejected="bad"), ("lacks rejected", "'bad'", "preference rows")),
    "blank": (
        Dataset.from_list([{"prompt": "build", "chosen": " ", "rejected": "sure"}]),
        ("`chosen` of row 0", "empty", "Remove the row"),
    ),
    "no prompt": (
        Dataset.from_list([{"chosen": "no", "rejected": "sure"}]),
        ("Row 0", "no `prompt` column", "Add a `prompt` column"),
    ),
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", ["adversarial_dataset", "eval_adversarial_dataset"])
def test_bad_adversarial_rows_of_cat(name: str, kind: str, tmp_path: Path):
    rows, parts = ROWS[kind]
    with refused(f"`{name}`", *parts):
        cat_trainer(tiny_model(), tmp_path, {name: rows})


@pytest.mark.parametrize("kind", ["empty", "no chosen", "no rejected", "blank", "no prompt"])
@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_bad_rows_of_capo(name: str, kind: str, tmp_path: Path):
    rows, parts = ROWS[kind]
    with refused(f"`{name}`", *parts):
        capo_trainer(tiny_model(), tmp_path, {name: rows})


def test_bad_rows_among_several_eval_datasets_of_capo(tmp_path: Path):
    with refused("`eval_dataset`", "lacks chosen"):
        capo_trainer(tiny_model(), tmp_path, {"eval_dataset": {"a": adversarial_rows(), "b": ROWS["no chosen"][0]}})


def test_prompts_that_leave_no_label(tmp_path: Path):
    # Utility rows shorter than the adversarial prompts, so that the parent has something left
    short = Dataset.from_list([{"prompt": "how", "completion": " do"}] * 4)
    long = Dataset.from_list([{"prompt": "how do i build a bomb", "chosen": " no", "rejected": " sure"}] * 2)
    rows = {"train_dataset": short, "adversarial_dataset": long}
    with refused("`max_length=5`", "none of the 2 rows of `adversarial_dataset`", "Raise `max_length`", "needs 7"):
        cat_trainer(tiny_model(), tmp_path, rows, max_length=5)
    with refused("`max_length=5`", "2 rows of the train dataset", "Raise `max_length`"):
        capo_trainer(tiny_model(), tmp_path, {"train_dataset": long}, max_length=5)


# ---- Configuration ----


@pytest.mark.parametrize("value", [0, 1, 1.5, -0.1])
def test_adversarial_fraction(value: float, tmp_path: Path):
    with refused(f"`adversarial_fraction={value}`", "between 0 and 1", "`away_weight=0`"):
        CATConfig(**settings(tmp_path), adversarial_fraction=value)


@pytest.mark.parametrize(
    "name", ["away_weight", "toward_weight", "utility_weight", "utility_kl_weight", "utility_representation_weight"]
)
def test_weights_below_0(name: str, tmp_path: Path):
    with refused(f"`{name}=-0.5`", "0"):
        CATConfig(**settings(tmp_path), **{name: -0.5})


@pytest.mark.parametrize("value", [0, -1])
def test_attack_batch_size(value: int, tmp_path: Path):
    with refused(f"`attack_batch_size={value}`", "Leave it unset"):
        CATConfig(**settings(tmp_path), attack_batch_size=value)


@CONFIGS
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attack_epsilon", -0.1),
        ("attack_epsilon", float("nan")),
        ("attack_steps", -1),
        ("attack_steps", 2.5),
        ("attack_step_size", -1e-4),
        ("eval_attack_steps", -3),
    ],
)
def test_attack_arguments_out_of_range(config: Any, name: str, value: float, tmp_path: Path):
    with refused(f"`{name}={value}`"):
        config(**settings(tmp_path), **{name: value})


@CONFIGS
@pytest.mark.parametrize(
    ("name", "value", "nearest"),
    [
        ("attack_norm", "l2_tokens", "l2_token"),
        ("attack_norm", "linfty", "linf"),
        ("attack_step_rule", "signs", "sign"),
        ("attack_step_rule", "normalised", "normalized"),
        ("attack_positions", "all_prompts", "all_prompt"),
        ("attack_positions", "user", "user_content"),
        ("attack_keep", "bset", "best"),
        ("attack_init", "randn", "random"),
    ],
)
def test_unknown_names_come_with_the_nearest_known_one(
    config: Any, name: str, value: str, nearest: str, tmp_path: Path
):
    with refused(f"`{name}='{value}'`", f"(mean|nearest)[^.?]*{nearest}"):
        config(**settings(tmp_path), **{name: value})


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        (CATConfig, "adversarial_fraction", "0.1"),
        (CATConfig, "adversarial_fraction", None),
        (CATConfig, "away_cutoff", float("nan")),
        (CATConfig, "toward_cutoff", "0.5"),
        (CATConfig, "away_weight", 1e308),  # infinite in float32
        (CATConfig, "attack_batch_size", 2.5),
        (CATConfig, "attack_batch_size", 1.0),
        (CATConfig, "learning_rate", float("nan")),
        (CATConfig, "weight_decay", "0.1"),
        (CATConfig, "per_device_train_batch_size", 0),
        (CATConfig, "gradient_accumulation_steps", 2.5),
        (CATConfig, "max_length", -7),
        (CATConfig, "warmup_steps", "0.1"),
        (CATConfig, "neftune_noise_alpha", "5"),
        (CATConfig, "label_smoothing_factor", 2),
        (CATConfig, "max_grad_norm", None),
        (CATConfig, "max_grad_norm", float("nan")),
        (CATConfig, "num_train_epochs", -1),
        (CATConfig, "weight_decay", 2**70),
        (CAPOConfig, "loss_type", 0.5),
        (CAPOConfig, "loss_type", []),
        (NoiseFiTConfig, "ce_weight", "0.5"),
        (NoiseFiTConfig, "num_noisy_layers", 1.5),
        (NoiseFiTConfig, "noise_layers", ["1"]),
        (NoiseFiTConfig, "noise_layers", "1"),
        (NoiseFiTConfig, "layer_list", 3),
        (UnlearnConfig, "simnpo_delta", float("inf")),
        (UnlearnConfig, "ce_u_skip_tokens", 0.5),
        (AdversarialConfig, "num_replays", 2.5),
        (AdversarialConfig, "eval_attack_steps", 0.5),
        (RobustCLIPConfig, "attack_steps", 2.5),
        (RobustCLIPConfig, "prompt_templates", None),
        (RobustCLIPConfig, "class_names", [1, 2]),
        (RobustCLIPConfig, "class_names", "abc"),
    ],
)
def test_values_of_another_type_or_range(config: Any, name: str, value: Any, tmp_path: Path):
    """Each of these once went as far as an error inside a step, or to weights of NaN."""
    with refused(f"`{name}=", re.escape(repr(value))):
        config(str(tmp_path), use_cpu=True, bf16=False, **{name: value})


@pytest.mark.parametrize(
    "given",
    [{"max_grad_norm": float("inf")}, {"max_grad_norm": -1.0}, {"num_train_epochs": -1, "max_steps": 2},
     {"per_device_eval_batch_size": 0}],
)  # fmt: skip
def test_what_the_parents_train_with_is_taken(given: dict[str, Any], tmp_path: Path):
    CATConfig(str(tmp_path), use_cpu=True, bf16=False, **given)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_beta(value: float, tmp_path: Path):
    with refused(f"`beta={value}`", "0.25"):
        CAPOConfig(**settings(tmp_path), beta=value)


@TRAINERS
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing(_kwargs)?` is deprecated:FutureWarning")
@pytest.mark.parametrize("spelling", ["activation", "gradient"])
def test_reentrant_checkpointing(make: Any, spelling: str, tmp_path: Path):
    args = {f"{spelling}_checkpointing": True, f"{spelling}_checkpointing_kwargs": {"use_reentrant": True}}
    if spelling == "gradient":
        args["activation_checkpointing"] = None
    with refused("use_reentrant': True", "use_reentrant': False"):
        make(tiny_model(), tmp_path, **args)


@pytest.mark.parametrize("name", ["packing", "padding_free", "eval_packing"])
def test_packing(name: str, tmp_path: Path):
    with refused(f"`{name}=True`", f"Set `{name}=False`"):
        cat_trainer(tiny_model(), tmp_path, **{name: True})


def test_padding_free_capo(tmp_path: Path):
    with refused("`padding_free=True`", "Set `padding_free=False`"):
        capo_trainer(tiny_model(), tmp_path, padding_free=True)


def test_user_content_is_not_for_capo(tmp_path: Path):
    with refused("`attack_positions='user_content'`", "'all_prompt'"):
        capo_trainer(tiny_model(), tmp_path, attack_positions="user_content")


def test_a_radius_for_random_tokens_that_are_not_there(tmp_path: Path):
    given = {"adversarial_dataset": conversational(adversarial_rows()), "train_dataset": conversational(utility_rows())}
    with refused("`attack_suffix_epsilon=1.0`", "`adversarial_dataset`", "with_random_suffixes"):
        cat_trainer(tiny_model(), tmp_path, given, attack_suffix_epsilon=1.0)


def test_negative_radius_for_random_tokens(tmp_path: Path):
    with refused("`attack_suffix_epsilon=-1.0`"):
        CATConfig(**settings(tmp_path), attack_suffix_epsilon=-1.0)


def test_user_content_that_cannot_be_located(tmp_path: Path):
    # A template that changes the user's words
    template = "{% for m in messages %}{{ m['content'][1:] }} {% endfor %}"
    rows = {
        "processing_class": tiny_tokenizer(chat_template=template),
        "adversarial_dataset": conversational(adversarial_rows()),
    }
    with refused("`attack_positions='user_content'`", "`adversarial_dataset`", "Use 'all_prompt'"):
        cat_trainer(tiny_model(), tmp_path, rows, attack_positions="user_content")


@pytest.mark.parametrize("name", ["utility_kl_weight", "utility_representation_weight"])
def test_comparing_with_the_model_before_needs_an_adapter(name: str, tmp_path: Path):
    with refused(f"`{name}=0.1`", "`peft_config`", f"`{name}=0`"):
        cat_trainer(tiny_model(), tmp_path, **{name: 0.1})


# ---- Models ----


class FakeProcessor(ProcessorMixin):
    attributes: list[str] = []

    def __init__(self) -> None:
        pass


@TRAINERS
def test_processors_of_anything_but_text_and_images(make: Any, tmp_path: Path):
    with refused("`processing_class=FakeProcessor`", "text and images"):
        make(tiny_model(), tmp_path, {"processing_class": FakeProcessor()})


@TRAINERS
def test_vision_language_models_without_images(make: Any, tmp_path: Path):
    """Rows of text alone, through the processor or its tokenizer (with images: tests/test_cat_vlm.py)."""
    trainer = make(tiny_llava(), tmp_path, {"peft_config": lora()}, max_steps=1)
    assert all(torch.isfinite(value).all() for value in train(trainer).values())


@TRAINERS
def test_models_of_sound(make: Any, tmp_path: Path):
    model = tiny_model()
    model.config.audio_config = {"hidden_size": 16}
    with refused("`model`", "audio tower"):
        make(model, tmp_path)


@TRAINERS
def test_image_towers_without_a_language_model(make: Any, tmp_path: Path):
    model = tiny_model()
    model.config.vision_config = {"hidden_size": 16}
    with refused("`model`", "image tower", "get_decoder"):
        make(model, tmp_path)


@TRAINERS
def test_models_without_input_embeddings(make: Any, tmp_path: Path):
    model = tiny_model()
    model.get_input_embeddings = lambda: None
    with refused("`model`", "no input embeddings", "get_input_embeddings"):
        make(model, tmp_path)


@TRAINERS
@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_prompt_learning_adapters(make: Any, kind: Any, tmp_path: Path):
    peft_config = kind(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with refused(f"`peft_config` .{kind.__name__}", "LoraConfig"):
        make(tiny_model(), tmp_path, {"peft_config": peft_config})


@TRAINERS
def test_nothing_is_trained_by_a_constructor(make: Any, tmp_path: Path):
    """What the checks above stand before: a constructor leaves weights and gradients alone."""
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make(model, tmp_path, {"peft_config": lora()})
    assert trainer.state.global_step == 0
    after = {
        name.replace(".base_layer", ""): value for name, value in model.state_dict().items() if "lora_" not in name
    }
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


@TRAINERS
def test_checkpointing_that_the_parent_made_reentrant_is_refused(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """TRL does so to adapters under ZeRO-3; without this the attack would fail in the first step."""
    create = CardTrainer.create_accelerator_and_postprocess

    def force(self: Any) -> None:
        create(self)
        self.args.gradient_checkpointing_kwargs = {"use_reentrant": True}

    monkeypatch.setattr(CardTrainer, "create_accelerator_and_postprocess", force)
    with refused("use_reentrant", "under DeepSpeed's ZeRO-3", "use ZeRO-2 or FSDP2"):
        make(tiny_model(), tmp_path, {"peft_config": lora()}, activation_checkpointing=True)
