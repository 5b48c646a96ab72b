import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainingArguments

from hf_robust.robust_finetuning import (
    RiFTPoint,
    adversarial_batches,
    interpolate_weights,
    module_robust_criticality,
    rift,
    scale_adapter,
)
from hf_robust.robust_finetuning.criticality import classification_loss, weight_modules
from hf_robust.robust_finetuning.rift import best_point
from tests.helpers import tiny_batch, tiny_model


class Classifier(nn.Module):
    """Two layers on 4 pixels with BatchNorm between them, an identity, and a frozen layer that is an identity."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.identity = nn.Identity()
        self.frozen = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.frozen.requires_grad_(False)
        with torch.no_grad():
            self.frozen.weight.copy_(torch.eye(8))
            self.frozen.bias.zero_()

    def forward(self, pixel_values, labels=None):
        hidden = self.frozen(self.identity(self.norm(self.first(pixel_values.flatten(1))).relu()))
        logits = self.head(hidden)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits} if labels is not None else logits


class Sign:
    """One signed gradient step, as attacks are called."""

    epsilon = 0.1

    def perturb(self, model, *, pixel_values, labels):
        pixels = pixel_values.clone().requires_grad_(True)
        loss = nn.functional.cross_entropy(model(pixels), labels)
        return self.epsilon * torch.autograd.grad(loss, pixels)[0].sign()


def data(count=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centres = torch.tensor([[0.2, 0.2, 0.8, 0.8], [0.8, 0.2, 0.2, 0.8], [0.2, 0.8, 0.8, 0.2]])
    pixels = centres[labels] + 0.05 * torch.randn(count, 4, generator=generator)
    return [{"pixel_values": x.view(1, 2, 2), "labels": int(y)} for x, y in zip(pixels, labels, strict=True)]


def batches(count=30, size=10):
    rows = data(count)
    return [
        {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows[start : start + size]]),
            "labels": torch.tensor([row["labels"] for row in rows[start : start + size]]),
        }
        for start in range(0, count, size)
    ]


# Criticality ----------------------------------------------------------------------------------------------------------


def test_criticality_of_what_cannot_move_is_zero():
    found = module_robust_criticality(
        Classifier().eval(), batches(), modules=["identity", "frozen", "unused", "first", "head"]
    )
    assert found["identity"] == found["frozen"] == found["unused"] == 0.0
    assert found["first"] > 0 and found["head"] > 0


def test_criticality_against_the_exact_maximum():
    """Loss linear in the weights: it rises by radius · ‖w‖ · ‖gradient‖ and no further."""

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 1, bias=False)

    model = Linear()
    given = [{"x": torch.tensor([[3.0, 0.0, 0.0, 4.0]]), "labels": torch.tensor([0])}]
    found = module_robust_criticality(
        model, given, modules=["layer"], radius=0.2, loss=lambda m, batch: m.layer(batch["x"]).mean()
    )
    assert found["layer"] == pytest.approx(0.2 * float(model.layer.weight.detach().norm()) * 5.0, rel=1e-4)


def test_criticality_does_not_depend_on_the_batches_and_leaves_no_trace():
    model = Classifier().train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    small = module_robust_criticality(model, batches(30, 10))
    large = module_robust_criticality(model, batches(30, 30))
    assert small.keys() == large.keys() == {"first", "unused", "head"} == set(weight_modules(model))
    assert all(small[name] == pytest.approx(large[name], rel=1e-4) for name in small)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_criticality_grows_with_the_radius():
    model = Classifier().eval()
    values = [module_robust_criticality(model, batches(), modules=["head"], radius=r)["head"] for r in (0, 0.05, 0.2)]
    assert values[0] == 0.0 < values[1] < values[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules": ["heads"]}, "'heads', which is no module"),
        ({"radius": -1}, "`radius=-1`"),
        ({"steps": 0}, "`steps=0`"),
    ],
)
def test_criticality_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        module_robust_criticality(Classifier(), batches(), **options)


def test_criticality_without_examples():
    with pytest.raises(ValueError, match="`batches` is empty"):
        module_robust_criticality(Classifier(), [])


# Interpolation --------------------------------------------------------------------------------------------------------


def test_the_ends_are_the_two_models_bit_for_bit():
    a, b = Classifier(), Classifier()
    with torch.no_grad():
        b.first.weight[0, 0] = math.inf  # 0 · inf would be NaN
    b.norm.num_batches_tracked += 7
    for alpha, end in ((0, a), (0.0, a), (1, b), (1.0, b)):
        found = interpolate_weights(a, b, alpha)
        assert found.keys() == end.state_dict().keys()
        assert all(torch.equal(tensor, end.state_dict()[name]) for name, tensor in found.items())
    assert found["first.weight"].data_ptr() != b.first.weight.data_ptr()


def test_between_the_ends():
    a = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)}
    b = {"w": torch.tensor([3.0, 6.0]), "n": torch.tensor(5)}
    found = interpolate_weights(a, b, 0.25)
    assert found["w"].tolist() == [1.5, 3.0] and found["n"] == 3
    assert interpolate_weights(a, b, 0.75)["n"] == 5


def test_half_precision_is_mixed_in_float32():
    a, b = {"w": torch.tensor([1.0]).bfloat16()}, {"w": torch.tensor([2.0]).bfloat16()}
    found = interpolate_weights(a, b, 1 / 3)["w"]
    assert found.dtype == torch.bfloat16 and found == torch.tensor(4 / 3).bfloat16()


def test_interpolation_of_trainers_and_folders(tmp_path):
    class Result:  # what a Trainer looks like here
        def __init__(self, model):
            self.model = model

    a, b = tiny_model(seed=0), tiny_model(seed=1)
    a.save_pretrained(tmp_path / "a")
    wanted = interpolate_weights(a, b, 0.5)
    found = interpolate_weights(Result(a), Result(b), 0.5)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    saved = interpolate_weights(tmp_path / "a", tmp_path / "a", 0)
    assert all(torch.equal(tensor, a.state_dict()[name]) for name, tensor in saved.items())


@pytest.mark.parametrize(
    ("a", "b", "alpha", "message"),
    [
        ({"w": torch.zeros(2)}, {"v": torch.zeros(2)}, 0.5, r"\(v, w\)"),
        ({"w": torch.zeros(2)}, {"w": torch.zeros(3)}, 0.5, r"\(w\)"),
        ({"w": torch.zeros(2)}, {"w": torch.zeros(2)}, 1.5, "`alpha=1.5` must be at most 1"),
        ({"w": torch.zeros(2)}, {"w": torch.zeros(2)}, -0.5, "`alpha=-0.5`"),
        ({"x.lora_B.default.weight": torch.zeros(2)}, {"x.lora_B.default.weight": torch.ones(2)}, 0.5, "scale_adapter"),
    ],
)
def test_interpolation_refuses(a, b, alpha, message):
    with pytest.raises(ValueError, match=message):
        interpolate_weights(a, b, alpha)


def test_interpolation_of_what_has_no_weights(tmp_path):
    with pytest.raises(TypeError, match="holds no weights"):
        interpolate_weights(3, 4, 0.5)
    with pytest.raises(FileNotFoundError, match="holds no model"):
        interpolate_weights(tmp_path, tmp_path, 0.5)


# LoRA -----------------------------------------------------------------------------------------------------------------


def lora(**options):
    model = get_peft_model(tiny_model().eval(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    return model.eval()


def test_scaling_an_adapter_is_interpolating_the_merged_weights():
    model, batch = lora(), tiny_batch()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        whole = model(**inputs).logits
        with model.disable_adapter():
            base = model(**inputs).logits
    own = scale_adapter(model, 1.0)
    assert own and all("lora_B" in name for name in own)
    logits = {}
    for alpha in (0.0, 0.5, 1.0):
        scaled = copy.deepcopy(model)
        result = scaled.load_state_dict(scale_adapter(model, alpha), strict=False)
        assert not result.unexpected_keys
        with torch.no_grad():
            logits[alpha] = scaled(**inputs).logits
    assert torch.equal(logits[0.0], base) and torch.equal(logits[1.0], whole)
    merged = copy.deepcopy(model).merge_and_unload()
    plain = tiny_model().eval()
    plain.load_state_dict(interpolate_weights(plain, merged, 0.5))
    with torch.no_grad():
        assert torch.allclose(plain(**inputs).logits, logits[0.5], atol=1e-5)


def test_a_scaled_adapter_is_saved_and_read_back(tmp_path):
    from peft import PeftModel

    model, ids = lora(), tiny_batch()["input_ids"]
    model.load_state_dict(scale_adapter(model, 0.3), strict=False)
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(tiny_model().eval(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(back(input_ids=ids).logits, model(input_ids=ids).logits)


def test_scaling_refuses():
    with pytest.raises(ValueError, match="`adapter_name='other'` is no adapter"):
        scale_adapter(lora(), 0.5, "other")
    with pytest.raises(ValueError, match="is no adapter of the model"):
        scale_adapter(tiny_model(), 0.5)
    with pytest.raises(ValueError, match="use_dora"):
        scale_adapter(lora(use_dora=True), 0.5)
    with pytest.raises(ValueError, match="lm_head"):
        scale_adapter(lora(modules_to_save=["lm_head"]), 0.5)
    with pytest.raises(ValueError, match="trainable_token_indices"):
        scale_adapter(lora(trainable_token_indices={"embed_tokens": [0, 1]}), 0.5)


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "pissa", "pissa_niter_2", "olora"])
def test_only_inits_that_leave_the_base_alone_are_scaled(init):
    ids, base = tiny_batch()["input_ids"], tiny_model().eval()
    model = lora(init_lora_weights=init)
    if str(init).startswith(("pissa", "olora")):
        with pytest.raises(ValueError, match=f"init_lora_weights='{init}'"):
            scale_adapter(model, 0)
        return
    model.load_state_dict(scale_adapter(model, 0), strict=False)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)


@pytest.mark.parametrize("changes", [{"init_lora_weights": "corda"}, {"init_lora_weights": "loftq"},
                                     {"init_lora_weights": "lora_ga"}, {"kasa_config": object()}])  # fmt: skip
def test_inits_that_need_data_are_refused_by_their_name(changes):
    model = lora()
    vars(model.peft_config["default"]).update(changes)
    with pytest.raises(ValueError, match=next(iter(changes))):
        scale_adapter(model, 0)
    with pytest.raises(ValueError, match="`alpha=2`"):
        scale_adapter(lora(), 2)


# RiFT -----------------------------------------------------------------------------------------------------------------


def test_best_point_holds_robustness():
    curve = [RiFTPoint(0.0, 0.5, 0.4), RiFTPoint(0.5, 0.7, 0.3), RiFTPoint(0.7, 0.8, 0.2), RiFTPoint(1.0, 0.6, 0.4)]
    assert best_point(curve, 0.0).alpha == 1.0
    assert best_point(curve, 0.1).alpha == 0.5
    assert best_point(curve, 0.2).alpha == 0.7
    assert best_point([RiFTPoint(0.0, 0.5, 0.4), RiFTPoint(0.5, 0.5, 0.4)], 0.0).alpha == 0.0


def test_rift_finetunes_one_module_and_keeps_robustness(tmp_path):
    model = Classifier().train()
    before = copy.deepcopy(model.state_dict())
    args = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        max_steps=5,
        learning_rate=0.05,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    result = rift(model, args, train_dataset=data(), attack=Sign(), modules=["first", "head"], alphas=(0.5, 1.0))
    assert set(result.criticality) == {"first", "head"}
    assert result.module == min(result.criticality, key=result.criticality.__getitem__)
    assert [point.alpha for point in result.curve] == [0.0, 0.5, 1.0]
    kept = best_point(result.curve, 0.001)
    assert kept.alpha == result.alpha and kept.robust_accuracy >= result.curve[0].robust_accuracy - 0.0011
    for name, tensor in model.state_dict().items():
        if not name.startswith(f"{result.module}.") and not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, before[name]), name
    assert model.training and model.first.weight.requires_grad and not model.frozen.weight.requires_grad


def test_rift_fine_tunes_at_all(tmp_path):
    model = Classifier().train()
    before = model.head.weight.detach().clone()
    args = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        max_steps=5,
        learning_rate=0.05,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    # Any loss of robustness is allowed, and the end is the only other point
    result = rift(model, args, train_dataset=data(), attack=Sign(), modules=["head"], alphas=(1.0,), tolerance=1.0)
    assert result.curve[1].accuracy > result.curve[0].accuracy and result.alpha == 1.0
    assert not torch.equal(model.head.weight, before)


def test_rift_refuses(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="`held_out=0.001` of the 60 rows"):
        rift(Classifier(), args, train_dataset=data(), attack=Sign(), held_out=0.001)
    with pytest.raises(ValueError, match="`alphas"):
        rift(Classifier(), args, train_dataset=data(), attack=Sign(), alphas=(2.0,))
    for modules in ([], ["frozen", "identity"]):
        with pytest.raises(ValueError, match="`modules=.*` has no module with trainable weights"):
            rift(Classifier(), args, train_dataset=data(), attack=Sign(), modules=modules)
    adapted = get_peft_model(Classifier(), LoraConfig(r=2, target_modules=["first", "head"]))
    before = copy.deepcopy(adapted.state_dict())
    with pytest.raises(ValueError, match="`model` has LoRA adapters.*merge_and_unload"):
        rift(adapted, args, train_dataset=data(), attack=Sign())
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapted.state_dict().items())


def test_frozen_modules_are_no_candidates(tmp_path, caplog):
    """Their criticality is 0, the lowest there is."""
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=1, report_to=[], save_strategy="no", disable_tqdm=True
    )
    result = rift(
        Classifier().train(), args, train_dataset=data(), attack=Sign(), modules=["frozen", "head"], alphas=(1.0,)
    )
    assert result.module == "head" and set(result.criticality) == {"head"} and "frozen" in caplog.text


def test_adversarial_batches_cost_accuracy():
    torch.manual_seed(0)
    model = Classifier().train()
    clean = batches()
    statistics = model.norm.running_mean.clone()
    found = adversarial_batches(model, Sign(), clean)
    assert model.training and torch.equal(model.norm.running_mean, statistics)
    model.eval()
    with torch.no_grad():
        for before, after in zip(clean, found, strict=True):
            assert (after["pixel_values"] - before["pixel_values"]).abs().max() <= 0.1 + 1e-6
            assert classification_loss(model, after) > classification_loss(model, before)
