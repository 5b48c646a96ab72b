"""The latent bank: what it holds is what would be computed anew, and what plain diffusers computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

pytest.importorskip("diffusers")

from hf_robust.diffusion import DiffusionModel  # noqa: E402
from hf_robust.trainers.latent_bank import (  # noqa: E402
    LatentBank,
    LatentItems,
    LatentPool,
    draw_seed,
    weights_digest,
)
from tests.diffusion_helpers import tiny_pipeline, tiny_sdxl_pipeline  # noqa: E402

PROMPTS = ["a red circle", "vangogh", "a cat"]
STEPS = 4


def make_pool(model: DiffusionModel, **changes: Any) -> LatentPool:
    with torch.no_grad():
        told, empty = model.encode(model.tokenize(PROMPTS)), model.unconditional()
    settings = {"seed": 3, "steps": STEPS, "guidance": 3.0, "paired": True, **changes}
    return LatentPool("concept", PROMPTS, told, empty, **settings)


def fill(bank: LatentBank, model: DiffusionModel, **kwargs: Any) -> bool:
    return bank.fill(Accelerator(cpu=True), sampler=model, original=model, **kwargs)


def difference(left: LatentItems, right: LatentItems) -> float:
    assert left.tensors().keys() == right.tensors().keys()
    return max(float((value - right.tensors()[name]).abs().max()) for name, value in left.tensors().items())


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sdxl_pipeline], ids=["sd", "sdxl"])
def test_bank_is_what_would_be_computed(make: Any):
    model = DiffusionModel(make())
    bank = LatentBank([make_pool(model, size=8)], chunk=3)
    assert fill(bank, model)
    (pool,) = bank.pools
    assert [pool.serials(prompt) for prompt in range(3)] == [3, 3, 2]
    items = [(prompt, serial) for prompt in range(3) for serial in range(pool.serials(prompt))]
    taken = pool.take(items, sampler=model, original=model)
    # One by one, by a pool without a bank
    alone = make_pool(model)
    direct = LatentItems.cat([alone.take([item], sampler=model, original=model) for item in items])
    assert difference(taken, direct) < 1e-5
    assert len(set(taken.timesteps.tolist())) > 1 and taken.latents.std() > 0.1


def test_items_are_those_of_plain_diffusers():
    """The latents of a pipeline's own DDIM loop, stopped; predictions of the UNet and text encoder themselves."""
    pipeline = tiny_pipeline()
    model = DiffusionModel(pipeline)
    pool = make_pool(model)
    for item in [(0, 0), (1, 5), (2, 11)]:
        found = pool.compute([item], sampler=model, original=model)
        seed = draw_seed(3, "concept", 0, *item)
        generator = torch.Generator().manual_seed(draw_seed(seed, "time"))
        stop = int(torch.randint(STEPS, (1,), generator=generator))
        seen = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))]
        pipeline(
            PROMPTS[item[0]],
            num_inference_steps=STEPS,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            callback_on_step_end=lambda p, step, t, values, seen=seen: seen.append(values["latents"].clone()) or values,
        )
        assert torch.allclose(found.latents, seen[stop], atol=1e-4)
        level = pipeline.scheduler.timesteps[stop]  # where the sampling would go on
        assert 0 <= found.timesteps.item() // 250 == level // 250 < 4
        for prompt, expected in ((PROMPTS[item[0]], found.prediction), ("", found.unconditional)):
            ids = pipeline.tokenizer(prompt, padding="max_length", max_length=12, return_tensors="pt").input_ids
            with torch.no_grad():
                told = pipeline.text_encoder(ids).last_hidden_state
                output = pipeline.unet(found.latents, found.timesteps, encoder_hidden_states=told).sample
            assert torch.allclose(expected, output, atol=1e-5)


def test_timesteps_cover_all_windows():
    model = DiffusionModel(tiny_pipeline())
    found = make_pool(model, paired=False).compute([(0, i) for i in range(40)], sampler=model, original=model)
    assert found.unconditional is None
    assert set((found.timesteps // 250).tolist()) == {0, 1, 2, 3}
    assert len(set(found.timesteps.tolist())) > 20


def test_draws_stay_inside_the_bank_and_do_not_repeat_prompts():
    model = DiffusionModel(tiny_pipeline())
    pool = make_pool(model, size=2)
    generator = torch.Generator().manual_seed(0)
    assert pool.available == 2
    for _ in range(20):
        prompts = pool.draw_prompts(2, generator)
        assert sorted(prompts) == [0, 1]
        assert all(serial == 0 for _, serial in pool.draw(prompts, generator))
    endless = make_pool(model)
    drawn = {endless.draw([1], generator)[0][1] for _ in range(20)}
    assert len(drawn) == 20


def test_nothing_is_computed_when_the_bank_is_asked():
    model = DiffusionModel(tiny_pipeline())
    bank = LatentBank([make_pool(model, size=4)])
    fill(bank, model)
    assert model.unet_items > 0
    model.reset_unet_items()
    bank.pools[0].take([(0, 0), (2, 0)], sampler=model, original=model)
    assert model.unet_items == 0


def test_weights_take_no_gradient_and_modes_stay():
    model = DiffusionModel(tiny_pipeline()).train()
    fill(LatentBank([make_pool(model, size=4)]), model)
    assert model.unet.training and all(parameter.grad is None for parameter in model.parameters())


def test_another_generation_is_another_bank():
    model = DiffusionModel(tiny_pipeline())
    bank = LatentBank([make_pool(model, size=4)])
    fill(bank, model)
    before = bank.pools[0].stored
    fill(bank, model, generation=1)
    assert difference(before, bank.pools[0].stored) > 0.1
    fill(bank, model, generation=0)
    assert difference(before, bank.pools[0].stored) == 0


def test_disk(tmp_path: Path):
    model = DiffusionModel(tiny_pipeline())
    digest = weights_digest(model.unet, *model.text_encoders)

    def make(**changes: Any) -> LatentBank:
        retain = make_pool(model, size=3, paired=False)
        retain.name = "retain"
        return LatentBank([make_pool(model, size=4, **changes), retain], digest=digest, folder=tmp_path)

    first = make()
    assert fill(first, model)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    model.reset_unet_items()
    second = make()
    assert not fill(second, model)  # read
    assert model.unet_items == 0
    for left, right in zip(first.pools, second.pools, strict=True):
        assert difference(left.stored, right.stored) == 0
    assert fill(make(guidance=5.0), model)  # another file
    assert len(list(tmp_path.iterdir())) == 2


def test_a_bank_of_other_weights_is_not_read(tmp_path: Path):
    for seed in (0, 1):
        model = DiffusionModel(tiny_pipeline(seed))
        bank = LatentBank(
            [make_pool(model, size=2)], digest=weights_digest(model.unet, *model.text_encoders), folder=tmp_path
        )
        assert fill(bank, model)


def test_a_file_that_lacks_items_is_an_error(tmp_path: Path):
    from safetensors.torch import save_file

    model = DiffusionModel(tiny_pipeline())
    bank = LatentBank([make_pool(model, size=2)], folder=tmp_path)
    save_file({"concept.latents": torch.zeros(2, 4, 8, 8)}, bank.path)
    with pytest.raises(ValueError, match="lacks concept.timesteps"):
        fill(bank, model)


def test_seeds_differ_and_do_not_change():
    assert len({draw_seed(0, step, row) for step in range(30) for row in range(30)}) == 900
    assert draw_seed(0, "concept", 0, 1, 2) == draw_seed(0, "concept", 0, 1, 2) < 2**63
