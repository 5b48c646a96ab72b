"""AdvUnlearnTrainer: against loops written out by hand, against itself cut into other batches, and what it refuses."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from hf_robust import AdvUnlearnConfig  # noqa: E402
from hf_robust.attacks.diffusion.concept_embedding import ConceptEmbeddingAttack  # noqa: E402
from hf_robust.diffusion import DiffusionModel, TextTokenSite  # noqa: E402
from hf_robust.trainers.advunlearn_prompts import ErasedPrompts  # noqa: E402
from hf_robust.trainers.latent_bank import LatentPool, draw_seed  # noqa: E402
from tests.advunlearn_data import CELLS, RETAIN, SAMPLING, advunlearn_trainer, run_cell  # noqa: E402
from tests.diffusion_helpers import tiny_pipeline, tiny_sdxl_pipeline  # noqa: E402
from tests.trainer_data import logged, max_difference, train, weights  # noqa: E402

ROOT = Path(__file__).parents[1]
TOLERANCE = 1e-5


# ---- Against a loop by hand ----


class HandESD:
    """ESD, written out on a plain pipeline: latents, targets and updates; rows and retain prompts are told what to be."""

    def __init__(self, part: str, eta: float, gamma: float):
        self.pipeline = tiny_pipeline()
        self.part, self.eta, self.gamma = part, eta, gamma
        self.unet, self.encoder = self.pipeline.unet.requires_grad_(False), self.pipeline.text_encoder
        self.encoder.requires_grad_(False)
        self.first_unet, self.first_encoder = copy.deepcopy(self.unet), copy.deepcopy(self.encoder)
        if part == "text_encoder":
            chosen = [p for n, p in self.encoder.named_parameters() if "embed" not in n]
        else:
            chosen = [p for n, p in self.unet.named_parameters() if ".attn2." in n]
        for parameter in chosen:
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.SGD(chosen, lr=1.0)

    def tell(self, encoder: Any, prompt: str) -> torch.Tensor:
        ids = self.pipeline.tokenizer(prompt, padding="max_length", max_length=12, return_tensors="pt").input_ids
        return encoder(ids).last_hidden_state

    @torch.no_grad()
    def latent(self, pool: str, prompt: str, item: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """DDIM by the formula, with guidance 3, from the item's seed; stopped at its step."""
        seed = draw_seed(42, pool, 0, *item)  # 42: default seed of TrainingArguments
        generator = torch.Generator().manual_seed(draw_seed(seed, "time"))
        stop = int(torch.randint(SAMPLING, (1,), generator=generator))
        z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        told, empty = self.tell(self.first_encoder, prompt), self.tell(self.first_encoder, "")
        alphas = self.pipeline.scheduler.alphas_cumprod
        for step in range(stop):
            t = (SAMPLING - 1 - step) * 250 + 1
            plain, prompted = (self.unet(z, t, encoder_hidden_states=h).sample for h in (empty, told))
            noise = plain + 3.0 * (prompted - plain)
            now, after = alphas[t], alphas[t - 250] if t > 250 else alphas[0]
            clean = (z - (1 - now).sqrt() * noise) / now.sqrt()
            z = after.sqrt() * clean + (1 - after).sqrt() * noise
        low = (SAMPLING - 1 - stop) * 250
        return z, low + torch.randint(250, (1,), generator=generator)

    def error(self, pool: str, prompts: list[str], items: list[tuple[int, int]]) -> torch.Tensor:
        errors = []
        for item in items:
            prompt = prompts[item[0]]
            z, t = self.latent(pool, prompt, item)
            with torch.no_grad():
                told, empty = self.tell(self.first_encoder, prompt), self.tell(self.first_encoder, "")
                target = self.first_unet(z, t, encoder_hidden_states=told).sample
                if pool == "concept":
                    unconditional = self.first_unet(z, t, encoder_hidden_states=empty).sample
                    target = unconditional - self.eta * (target - unconditional)
            found = self.unet(z, t, encoder_hidden_states=self.tell(self.encoder, prompt)).sample
            errors.append(((found - target) ** 2).mean())
        return torch.stack(errors).mean()

    def step(self, concepts: list[str], items: list[tuple[int, int]], retained: list[tuple[int, int]]) -> float:
        loss = self.error("concept", concepts, items)
        if retained:
            loss = loss + self.gamma * self.error("retain", RETAIN, retained)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


@pytest.mark.parametrize("gamma", [0.0, 0.5])
@pytest.mark.parametrize(("part", "bank"), [("text_encoder", 0), ("text_encoder", 12), ("xattn", None)])
def test_without_attack_it_is_esd_by_hand(
    part: str, bank: int | None, gamma: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    taken: dict[str, list[list[tuple[int, int]]]] = {"concept": [], "retain": []}
    take = LatentPool.take

    def spy(pool: LatentPool, items: list[tuple[int, int]], **models: Any) -> Any:
        taken[pool.name].append(list(items))
        return take(pool, items, **models)

    monkeypatch.setattr(LatentPool, "take", spy)
    trainer = advunlearn_trainer(
        tmp_path, attack="none", retain_weight=gamma, train_parts=[part], latent_bank_size=bank, negative_guidance=1.5
    )
    found = train(trainer)
    hand = HandESD(part, 1.5, gamma)
    retained = taken["retain"] or [[]] * 3
    losses = [hand.step(trainer.args.concepts, *step) for step in zip(taken["concept"], retained, strict=True)]
    assert [len(items) for items in taken["concept"]] == [2, 2, 2]  # two rows a step
    assert [len(items) for items in taken["retain"]] == ([4, 4, 4] if gamma else [])
    assert logged(trainer, "loss") == pytest.approx(losses, abs=1e-4)
    expected = weights(DiffusionModel(hand.pipeline))
    start = weights(DiffusionModel(tiny_pipeline()))
    assert max_difference(found, expected) < TOLERANCE
    assert max_difference(found, start) > 100 * TOLERANCE


# ---- The attack ----


def attacked_prompt(model: DiffusionModel, position: str = "prefix") -> ErasedPrompts:
    rows = [{"text": "a vangogh house", "concept": "vangogh"}]
    return ErasedPrompts(model, rows, position=position, count=2)


def draws(count: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(1, 4, 8, 8, generator=generator),
            torch.randint(1000, (1,), generator=generator),
            torch.randn(1, 4, 8, 8, generator=generator),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("compat", [False, True])
def test_adam_attack_is_the_loop_by_hand(compat: bool):
    model = DiffusionModel(tiny_pipeline()).requires_grad_(False)
    ids, mask = attacked_prompt(model).random_starts([0], [torch.Generator().manual_seed(1)])
    material = draws(4)
    attack = ConceptEmbeddingAttack(steps=4, step_size=0.01, reference_compat=compat)
    found, result = attack.search(model, input_ids=ids, mask=mask, draw=material.__getitem__)

    site = TextTokenSite(model)
    embedding = site.lookup(ids)[mask].clone().requires_grad_(True)
    optimizer = torch.optim.Adam([embedding], lr=0.01)
    before = embedding
    for latents, timesteps, target in material:
        before = embedding.detach().clone()
        with site.replace(site.lookup(ids).masked_scatter(mask.unsqueeze(-1), embedding), mask):
            loss = (model(latents, timesteps, ids) - target).pow(2).mean()
        if not compat:
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # The released loop takes the embedding from before its last step
    expected = before if compat else embedding.detach()
    assert torch.allclose(found[mask], expected, atol=1e-5)
    assert torch.equal(found[~mask], site.lookup(ids)[~mask])
    assert result.num_forwards == (3 if compat else 4)


@pytest.mark.parametrize(("method", "share"), [("pgd", 0.25), ("fast", 1.0)])
def test_bounded_attacks_stay_in_the_ball(method: str, share: float):
    model = DiffusionModel(tiny_pipeline()).requires_grad_(False)
    ids, mask = attacked_prompt(model).random_starts([0], [torch.Generator().manual_seed(1)])
    start = TextTokenSite(model).lookup(ids)
    attack = ConceptEmbeddingAttack(method=method, steps=8, step_size=0.25, epsilon=0.3)
    found, result = attack.search(model, input_ids=ids, mask=mask, draw=lambda k: draws(1)[0])
    moved = (found - start).norm(dim=-1)[mask] / start.norm(dim=-1)[mask]
    assert (moved <= 0.3 + 1e-5).all() and (moved > 0.1).all()
    assert result.num_forwards == (1 if method == "fast" else 8)
    if method == "fast":
        assert torch.allclose(moved, torch.tensor(0.3))
    else:
        assert result.last_loss < result.first_loss


def test_the_attack_leaves_no_trace():
    model = DiffusionModel(tiny_pipeline()).train()
    state, before = torch.get_rng_state(), weights(model)
    ids, mask = attacked_prompt(model).random_starts([0], [torch.Generator().manual_seed(1)])
    ConceptEmbeddingAttack(steps=2).search(model, input_ids=ids, mask=mask, draw=draws(2).__getitem__)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.unet.training and max_difference(weights(model), before) == 0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for encoder in model.text_encoders for module in encoder.modules())


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        ("prefix", "? ? a van gogh house"),
        ("suffix", "a van gogh house ? ?"),
        ("replace", "a ? ? house"),
        ("insert", "a ? ? van gogh house"),
        ("per_word", "? a van ? gogh house"),  # before every two tokens
    ],
)
def test_places_of_the_attacked_tokens_with_a_concept_of_two(position: str, expected: str):
    model = DiffusionModel(tiny_pipeline())
    prompts = attacked_prompt(model, position)
    ids, mask = prompts.random_starts([0], [torch.Generator().manual_seed(0)])
    tokenizer = model.tokenizers[0]
    words = [
        "?" if room else token.removesuffix("</w>")
        for token, room in zip(tokenizer.convert_ids_to_tokens(ids[0][0].tolist()), mask[0].tolist(), strict=True)
    ]
    assert words[0] == tokenizer.bos_token
    assert " ".join(words[1 : words.index(tokenizer.eos_token)]) == expected
    assert not set(ids[0][mask].tolist()) & set(tokenizer.all_special_ids)


def test_warmup_and_logs(tmp_path: Path):
    trainer = advunlearn_trainer(tmp_path, attack_warmup_steps=2, per_device_train_batch_size=1)
    train(trainer)
    # One row: itself and two retain prompts, and from the third step on two attack steps
    assert logged(trainer, "unet_items") == [3, 3, 5]
    assert logged(trainer, "unet_backward_items") == [3, 3, 5]
    assert len(logged(trainer, "attack_loss_first")) == len(logged(trainer, "attack_loss_last")) == 1
    assert logged(trainer, "attack_non_finite") == [0]
    for name in ("erasure_loss", "retain_loss"):
        assert len(logged(trainer, name)) == 3
    (bank,) = logged(trainer, "latent_bank_unet_items")
    assert bank >= 30  # 20 predictions, 10 of them twice, and the sampling


def test_with_attack_the_weights_are_others(tmp_path: Path):
    found = [train(advunlearn_trainer(tmp_path, attack=attack)) for attack in ("adam", "none")]
    assert max_difference(*found) > 100 * TOLERANCE


# ---- The bank, other batches, resuming ----


def test_training_from_the_bank_is_training_without(tmp_path: Path):
    found = []
    for stored in (True, False):
        trainer = advunlearn_trainer(tmp_path)
        if not stored:  # the same items, computed as they are needed
            trainer.latent_bank = None
        found.append(train(trainer))
        items = logged(trainer, "unet_items")
        assert (max(items) <= 10) == stored
    assert max_difference(*found) < TOLERANCE


def test_the_frozen_unet_takes_no_gradient(tmp_path: Path):
    trainer = advunlearn_trainer(tmp_path)
    found = train(trainer)
    start = weights(DiffusionModel(tiny_pipeline()))
    changed = {name for name in found if not torch.equal(found[name], start[name])}
    assert changed and all(name.startswith("text_encoders.0.") and "embed" not in name for name in changed)
    assert all(parameter.grad is None for parameter in trainer.model.unet.parameters())


def test_first_layers_only(tmp_path: Path):
    found = train(advunlearn_trainer(tmp_path, text_encoder_layers=2, max_steps=1))
    start = weights(DiffusionModel(tiny_pipeline()))
    changed = {name.split("layers.")[-1][0] for name in found if not torch.equal(found[name], start[name])}
    assert changed == {"0", "1"}


def test_a_refreshed_bank_has_other_latents(tmp_path: Path):
    found = [
        train(advunlearn_trainer(tmp_path, latent_bank_refresh_steps=every, latent_bank_size=8)) for every in (0, 2)
    ]
    assert max_difference(*found) > TOLERANCE


@pytest.mark.parametrize("args", [{}, {"latent_bank_size": 0}, {"train_parts": ["noxattn"]}], ids=str)
def test_accumulation(args: dict[str, Any], tmp_path: Path):
    found = [
        train(
            advunlearn_trainer(
                tmp_path, per_device_train_batch_size=4 // cut, gradient_accumulation_steps=cut, max_steps=2, **args
            )
        )
        for cut in (1, 4)
    ]
    assert max_difference(*found) < TOLERANCE


@pytest.mark.parametrize("args", [{"latent_bank_refresh_steps": 3}, {"train_parts": ["xattn"]}], ids=str)
def test_resumed_is_uninterrupted(args: dict[str, Any], tmp_path: Path):
    settings = {**args, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    expected = train(advunlearn_trainer(tmp_path, **settings))
    resumed = advunlearn_trainer(tmp_path, **settings)
    found = train(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert max_difference(found, expected) < TOLERANCE


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two_processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "advunlearn_data.py"), str(folder)],
        cwd=folder,
        env=env,
        timeout=400,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("cell", CELLS)
def test_two_processes_are_one(cell: str, of_two_processes: list[dict[str, Any]]):
    first, second = (found[cell] for found in of_two_processes)
    assert (first["num_processes"], first["wrapper"]) == (2, "DistributedDataParallel")
    one = run_cell(cell, 4)
    assert one["num_processes"] == 1
    assert max_difference(first["weights"], second["weights"]) == 0
    assert max_difference(one["weights"], first["weights"]) < TOLERANCE
    for alone, shared in zip(one["logged"][:-1], first["logged"][:-1], strict=True):
        for name in alone.keys() & {"erasure_loss", "retain_loss", "attack_loss_last"}:
            assert shared[name] == pytest.approx(alone[name], abs=1e-4)
        assert shared["unet_items"] == alone["unet_items"]


def test_retaining_in_turns(tmp_path: Path):
    trainer = advunlearn_trainer(tmp_path, retain_mode="step", max_steps=4, attack_warmup_steps=1)
    train(trainer)
    history = trainer.state.log_history[:4]
    assert ["erasure_loss" in entry for entry in history] == [True, False, True, False]
    assert ["retain_loss" in entry for entry in history] == [False, True, False, True]
    # An iteration is two steps: the second erasing one is the first with an attack
    assert ["attack_loss_last" in entry for entry in history] == [False, False, True, False]


# ---- Models and folders ----


def test_saved_folder_draws_the_same_picture_in_plain_diffusers(tmp_path: Path):
    from diffusers import StableDiffusionPipeline

    trainer = advunlearn_trainer(tmp_path)
    train(trainer)
    trainer.save_model()
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    pictures = []
    for pipeline in (trainer.model.pipeline(), loaded, tiny_pipeline()):
        pipeline.set_progress_bar_config(disable=True)
        call = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
        with torch.no_grad():
            pictures.append(pipeline("vangogh", **call).images)
    assert torch.equal(pictures[0], pictures[1])
    assert not torch.equal(pictures[0], pictures[2])
    assert (tmp_path / "text_encoder" / "model.safetensors").is_file()
    assert not list(tmp_path.rglob("*.bin")) or {p.name for p in tmp_path.rglob("*.bin")} == {"training_args.bin"}


def test_a_saved_text_encoder_that_lacks_a_key_is_an_error(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    trainer = advunlearn_trainer(tmp_path, max_steps=1)
    train(trainer)
    trainer.save_model()
    path = tmp_path / "text_encoder" / "model.safetensors"
    state = load_file(path)
    state["other." + sorted(state)[0]] = state.pop(sorted(state)[0])
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="does not hold the weights"):
        DiffusionModel(tiny_pipeline()).load_weights(tmp_path, ["text_encoder"])


def test_sdxl(tmp_path: Path):
    trainer = advunlearn_trainer(tmp_path, tiny_sdxl_pipeline(), concepts=["vangogh"], attack_position="insert")
    found = train(trainer)
    start = weights(DiffusionModel(tiny_sdxl_pipeline()))
    changed = {name[:15] for name in found if not torch.equal(found[name], start[name])}
    assert changed == {"text_encoders.0", "text_encoders.1"}
    assert len(logged(trainer, "attack_loss_last")) == 2


def test_v_prediction(tmp_path: Path):
    trainer = advunlearn_trainer(tmp_path, tiny_pipeline(prediction_type="v_prediction"), max_steps=2)
    train(trainer)
    assert all(value > 0 for value in logged(trainer, "erasure_loss"))


@pytest.mark.parametrize("where", ["text_encoder", "unet"])
def test_adapters(where: str, tmp_path: Path):
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig

    modules = {"text_encoder": ["q_proj", "v_proj"], "unet": ["to_q", "to_v"]}[where]
    trainer = advunlearn_trainer(
        tmp_path,
        trainer={"peft_config": {where: LoraConfig(r=2, target_modules=modules, init_lora_weights="gaussian")}},
        latent_bank_size=None,
    )
    assert (trainer.latent_bank is None) == (where == "unet")
    before = weights(trainer.model)
    found = train(trainer)
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    assert changed and all("lora_" in name for name in changed)
    trainer.save_model()
    assert (tmp_path / "adapters" / where / "adapter_model.safetensors").is_file()
    StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)


def test_card_and_prompts(tmp_path: Path):
    trainer = advunlearn_trainer(tmp_path, max_steps=1)
    train(trainer)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Defensive Unlearning" in card and "vangogh" in card and "Adam steps" in card
    assert (tmp_path / "training_prompts.json").is_file()


@pytest.mark.parametrize(
    ("weight", "attack", "method"),
    [(0.3, "none", "ESD with a retain term"), (0.0, "none", "ESD (the attack is off)"), (0.3, "adam", None)],
)
def test_the_card_tells_esd_from_esd_with_a_retain_term(weight: float, attack: str, method: str | None, tmp_path: Path):
    trainer = advunlearn_trainer(tmp_path, retain_weight=weight, attack=attack)
    assert trainer._training_settings(None).get("method", "").startswith(method or "") and (
        ("ESD" in str(trainer._training_settings(None))) == (method is not None)
    )


def test_the_default_bank_holds_an_item_of_every_prompt(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr("hf_robust.trainers.advunlearn_config._BANK_SIZE", 6)
    rows = [
        {"text": f"a photo of vangogh in the {word}", "concept": "vangogh"} for word in ("red", "blue", "house", "star")
    ]
    trainer = advunlearn_trainer(tmp_path, None, {"train_dataset": rows}, latent_bank_size=None, max_steps=1)
    assert trainer._concept_pool.size == trainer._retain_pool.size == 4
    train(trainer)
    few = advunlearn_trainer(tmp_path, None, {"train_dataset": rows[:2]}, latent_bank_size=None)
    assert few._concept_pool.size == 3


def test_another_schedule_is_another_bank_file(tmp_path: Path):
    def path(**changes: Any) -> Path:
        pipeline = tiny_pipeline()
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **changes)
        trainer = advunlearn_trainer(tmp_path, pipeline, latent_bank_dir=str(tmp_path))
        assert trainer.latent_bank is not None and trainer.latent_bank.path is not None
        return trainer.latent_bank.path

    assert path() == path()
    assert len({path(), path(beta_end=0.02), path(beta_schedule="linear"), path(num_train_timesteps=500)}) == 4


# ---- What is refused ----


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"concepts": None}, "`concepts` is missing"),
        ({"concepts": ["vangogh", " "]}, "holds an empty one"),
        ({"retain_prompts": []}, "retain_weight=0"),
        ({"retain_prompts": ["a cat"]}, "`retain_batch_size=2` with 1 retain prompts"),
        ({"attack": "pdg"}, "`attack='pdg'` is unknown.*Did you mean 'pgd'"),
        ({"attack_position": "front"}, "`attack_position='front'` is unknown"),
        ({"attack_steps": -1}, "`attack_steps=-1`"),
        ({"attack_tokens": 0}, "`attack_tokens=0`"),
        ({"attack_tokens": 11}, "attack_tokens"),
        ({"latent_bank_size": 3}, "`latent_bank_size=3` is too small"),
        ({"train_parts": ["xattn"], "latent_bank_size": 64}, "`latent_bank_size=64` with the UNet in training"),
        ({"train_parts": ["text"]}, "text_encoder"),
        ({"text_encoder_layers": 9}, "between 1 and 3"),
        ({"caption_dropout": 0.5}, "no meaning in AdvUnlearn"),
        ({"retain_mode": "step", "retain_weight": 0.0}, "without a loss"),
        ({"retain_mode": "other"}, "`retain_mode='other'` is unknown"),
        ({"sampling_steps": 0}, "`sampling_steps=0`"),
        ({"sampling_steps": 1.0}, "`sampling_steps=1.0` must be a whole number"),
        ({"max_steps": "3"}, "`max_steps='3'` must be a whole number"),
        ({"latent_bank_batch_size": None}, "`latent_bank_batch_size=None` must be a whole number"),
        ({"concepts": 5}, "`concepts=5` has to be a list of strings"),
        ({"retain_prompts": [0]}, r"`retain_prompts=\[0\]` has to be a list of strings"),
        ({"retain_exclude_words": True}, "`retain_exclude_words=True`"),
    ],
)
def test_bad_settings(args: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        advunlearn_trainer(tmp_path, **args)


@pytest.mark.parametrize(("row", "message"), [(5, "row 0 is 5"), ({"text": "vangogh", "concept": 5}, "`concept=5`")])
def test_rows_of_another_kind(row: Any, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        advunlearn_trainer(tmp_path, trainer={"train_dataset": [row]})


def test_a_refused_model_trains_what_it_did(tmp_path: Path):
    pipeline = tiny_pipeline()
    frozen = pipeline.unet.conv_in.weight.requires_grad_(False)
    for refused in ({"latent_bank_size": 3}, {"train_parts": ["text"]}):
        with pytest.raises(ValueError):
            advunlearn_trainer(tmp_path, pipeline, **refused)
        trained = [p for part in (pipeline.unet, pipeline.text_encoder) for p in part.parameters() if p.requires_grad]
        whole = [p for part in (pipeline.unet, pipeline.text_encoder) for p in part.parameters()]
        assert not frozen.requires_grad and len(trained) == len(whole) - 1


def test_bad_rows(tmp_path: Path):
    rows = [{"text": "a vangogh house"}, {"text": "a red house"}]
    for position in ("replace", "insert"):
        with pytest.raises(ValueError, match="'a red house' .*none of the `concepts`"):
            advunlearn_trainer(
                tmp_path, trainer={"train_dataset": rows}, attack_position=position, concepts=["vangogh"]
            )
    with pytest.raises(ValueError, match="'a red house' does not hold the concept.*`attack_position='replace'`"):
        given = [{"text": "a red house", "concept": "vangogh"}]
        advunlearn_trainer(tmp_path, trainer={"train_dataset": given}, attack_position="replace", concepts=None)
    with pytest.raises(ValueError, match="shorten it"):
        given = [{"text": "a photo of the vangogh house in the style"}]
        advunlearn_trainer(tmp_path, trainer={"train_dataset": given}, attack_tokens=3)
    with pytest.raises(ValueError, match="row 0 has `text=None`"):
        advunlearn_trainer(tmp_path, trainer={"train_dataset": [{"prompt": "x"}]})
    with pytest.raises(ValueError, match="is empty"):
        advunlearn_trainer(tmp_path, trainer={"train_dataset": []})
    with pytest.raises(ValueError, match="`eval_dataset`"):
        advunlearn_trainer(tmp_path, trainer={"eval_dataset": rows})


def test_a_pipeline_without_a_part_is_refused(tmp_path: Path):
    pipeline = tiny_pipeline()
    pipeline.text_encoder = None
    with pytest.raises(ValueError, match="lacks text_encoder"):
        advunlearn_trainer(tmp_path, pipeline)


def test_defaults_are_the_published_ones():
    args = AdvUnlearnConfig("x", use_cpu=True)
    assert (args.max_steps, args.learning_rate, args.per_device_train_batch_size) == (1000, 1e-5, 1)
    assert (args.attack, args.attack_steps, args.attack_warmup_steps, args.attack_tokens) == ("adam", 30, 200, 1)
    assert args.build_attack().step_size == 1e-3
    assert (args.sampling_steps, args.sampling_guidance, args.retain_batch_size) == (50, 3.0, 5)
    assert args.bank_size(False) == 1024 and args.bank_size(True) == 0


def test_command(tmp_path: Path):
    from hf_robust.cli import main

    folder = tmp_path / "pipeline"
    tiny_pipeline().save_pretrained(folder, safe_serialization=True)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a vangogh house\nvangogh\n", encoding="utf-8")
    command = ["advunlearn", "--config", str(ROOT / "examples" / "advunlearn.yaml")]
    command += ["--model_name_or_path", str(folder), "--output_dir", str(tmp_path / "erased"), "--use_cpu", "true"]
    command += ["--report_to", "none", "--disable_tqdm", "true", "--max_steps", "1", "--latent_bank_size", "12"]
    command += ["--sampling_steps", "2", "--concepts", "vangogh", "--prompts", str(prompts)]
    command += ["--retain_prompts", *RETAIN, "--attack_steps", "1", "--attack_warmup_steps", "0"]
    assert main(command) == 0
    erased = DiffusionModel.from_pretrained(tmp_path / "erased", safety_checker=None)
    assert max_difference(weights(erased), weights(DiffusionModel(tiny_pipeline()))) > 0


def test_the_example_says_what_is_published():
    import yaml

    settings = yaml.safe_load((ROOT / "examples" / "advunlearn.yaml").read_text(encoding="utf-8"))
    args = AdvUnlearnConfig("x", use_cpu=True, **settings)
    default = AdvUnlearnConfig("x", use_cpu=True)
    differs = {name for name in settings if getattr(args, name) != getattr(default, name)}
    written_out = {"train_parts", "attack_step_size", "latent_bank_size"}  # `None` is the same
    assert differs - written_out == {"concepts", "retain_exclude_words", "retain_weight", "logging_steps"}
    assert args.build_attack().step_size == default.build_attack().step_size
    assert args.bank_size(False) == default.bank_size(False)


def test_a_split_unet_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hf_robust.trainers.advunlearn.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="splits the UNet.*Use DDP"):
        advunlearn_trainer(tmp_path)
