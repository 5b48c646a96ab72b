"""Our DDIM against diffusers' own, and images that depend on nothing but their row and seed."""

import pytest
import torch

from hf_robust.diffusion import Conditioning, DiffusionModel, ddim_timesteps, draw_noise, generate, sample_latents
from tests.diffusion_helpers import tiny_pipeline, tiny_sdxl_pipeline

PROMPTS = ["a photo of a cat", "a red square", "vangogh style house"]
SEEDS = [3, 14, 15]
CASES = {
    "sd": tiny_pipeline,
    "sd_v": lambda: tiny_pipeline(prediction_type="v_prediction"),
    "sdxl": tiny_sdxl_pipeline,
}


@pytest.fixture(scope="module", params=CASES)
def pipeline(request):
    return CASES[request.param]()


@pytest.fixture(scope="module")
def model(pipeline):
    return DiffusionModel(pipeline)


def reference(pipeline, guidance_scale: float, output_type: str, steps: int = 6) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return pipeline(
        PROMPTS, num_inference_steps=steps, guidance_scale=guidance_scale, generator=generators, output_type=output_type,
        eta=0.0,
    ).images  # fmt: skip


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_latents_are_those_of_diffusers(pipeline, model, guidance_scale) -> None:
    conditioning = model.encode(model.tokenize(PROMPTS))
    latents = sample_latents(model, conditioning, steps=6, guidance_scale=guidance_scale, seeds=SEEDS)
    torch.testing.assert_close(latents, reference(pipeline, guidance_scale, "latent"), atol=1e-5, rtol=1e-5)


def test_images_are_those_of_diffusers(pipeline, model) -> None:
    images = generate(model, PROMPTS, seeds=SEEDS, steps=6, guidance_scale=3.0, progress=False)
    assert images.shape == (3, 3, 16, 16) and images.dtype == torch.float32
    torch.testing.assert_close(images, reference(pipeline, 3.0, "pt"), atol=1e-5, rtol=1e-5)
    assert images.std() > 0.01  # not a constant, which any sampler would match


@pytest.mark.parametrize("name", ["PNDMScheduler", "EulerDiscreteScheduler", "DDPMScheduler"])
def test_schedulers_of_published_pipelines(name) -> None:
    """Latents are never clipped, whatever DDIM's default for a config that says nothing of it."""
    import diffusers

    pipeline = tiny_pipeline()
    config = {k: v for k, v in pipeline.scheduler.config.items() if k != "clip_sample"}
    expected = reference(pipeline, 2.0, "latent")
    pipeline.scheduler = getattr(diffusers, name).from_config(config)
    model = DiffusionModel(pipeline)
    latents = sample_latents(model, model.encode(model.tokenize(PROMPTS)), steps=6, guidance_scale=2.0, seeds=SEEDS)
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)


def test_results_do_not_depend_on_the_batch(model) -> None:
    images = generate(model, PROMPTS, seeds=SEEDS, steps=4, guidance_scale=3.0, batch_size=3, progress=False)
    for batch_size in (1, 2):
        again = generate(
            model, PROMPTS, seeds=SEEDS, steps=4, guidance_scale=3.0, batch_size=batch_size, progress=False
        )
        torch.testing.assert_close(again, images, atol=1e-5, rtol=0)
    last = generate(model, PROMPTS[2:], seeds=SEEDS[2:], steps=4, guidance_scale=3.0, progress=False)
    torch.testing.assert_close(last, images[2:], atol=1e-5, rtol=0)


def test_encoded_prompts_instead_of_prompts(model) -> None:
    images = generate(model, PROMPTS, seeds=SEEDS, steps=2, progress=False, batch_size=2)
    conditioning = model.encode(model.tokenize(PROMPTS))
    assert conditioning.hidden.requires_grad
    again = generate(model, None, conditioning=conditioning, seeds=SEEDS, steps=2, progress=False, batch_size=2)
    torch.testing.assert_close(again, images, atol=1e-5, rtol=0)
    assert not again.requires_grad


def test_stopping_early(model) -> None:
    """Each image's way is that of the whole one, and images that are done cost nothing."""
    conditioning = model.encode(model.tokenize(PROMPTS)).detach()
    options = dict(steps=4, guidance_scale=2.0, seeds=SEEDS)
    assert torch.equal(sample_latents(model, conditioning, stop_after=0, **options), draw_noise(model, SEEDS))
    ways = [sample_latents(model, conditioning, stop_after=k, **options) for k in range(5)]
    torch.testing.assert_close(ways[4], sample_latents(model, conditioning, **options))
    model.reset_unet_items()
    mixed = sample_latents(model, conditioning, stop_after=torch.tensor([1, 4, 0]), **options)
    assert model.unet_items == 2 * (1 + 4 + 0)
    expected = torch.stack([ways[1][0], ways[4][1], ways[0][2]])
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-5)


def test_costs(model) -> None:
    conditioning = model.encode(model.tokenize(PROMPTS)).detach()
    for guidance_scale, items in ((None, 3 * 4), (1.0, 3 * 4), (2.0, 2 * 3 * 4)):
        model.reset_unet_items()
        sample_latents(model, conditioning, steps=4, guidance_scale=guidance_scale, seeds=SEEDS)
        assert (model.unet_items, model.unet_backward_items) == (items, 0)


def test_timesteps_are_those_of_the_scheduler(pipeline, model) -> None:
    pipeline.scheduler.set_timesteps(7)
    assert torch.equal(ddim_timesteps(model, 7), pipeline.scheduler.timesteps)


def test_another_unet() -> None:
    first, second = DiffusionModel(tiny_pipeline(0)), DiffusionModel(tiny_pipeline(1))
    told = first.encode(first.tokenize(PROMPTS)).detach()
    empty = first.unconditional()
    options = dict(steps=2, guidance_scale=2.0, seeds=SEEDS)
    ours = sample_latents(first, told, empty, unet_model=second, **options)
    torch.testing.assert_close(ours, sample_latents(second, told, empty, **options))
    assert first.unet_items == 0
    assert not torch.allclose(ours, sample_latents(first, told, empty, **options))


def test_dropout_and_random_state_are_left_alone() -> None:
    model = DiffusionModel(tiny_pipeline())
    expected = generate(model, PROMPTS, seeds=SEEDS, steps=2, progress=False)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    for layer in model.text_encoders[0].encoder.layers:
        layer.self_attn.dropout = 0.5
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    assert torch.equal(generate(model, PROMPTS, seeds=SEEDS, steps=2, progress=False), expected)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training and model.unet.training and not model.vae.training


def test_refused() -> None:
    model = DiffusionModel(tiny_pipeline())
    told = model.encode(model.tokenize(PROMPTS)).detach()
    with pytest.raises(ValueError, match="`seeds` has 1 entries for 3 prompts"):
        generate(model, PROMPTS, seeds=[1])
    with pytest.raises(ValueError, match="either `prompts` or `conditioning`"):
        generate(model, PROMPTS, conditioning=told, seeds=SEEDS)
    with pytest.raises(ValueError, match="`batch_size=0`"):
        generate(model, PROMPTS, seeds=SEEDS, batch_size=0)
    with pytest.raises(ValueError, match="has 14 tokens"):
        generate(model, ["a " * 12], seeds=[0])
    with pytest.raises(ValueError, match="`seeds` has 2 entries for 3 rows"):
        sample_latents(model, told, seeds=[1, 2])
    with pytest.raises(ValueError, match="`unconditional` has 2 rows"):
        sample_latents(model, told, told.select([0, 1]), seeds=SEEDS)
    with pytest.raises(ValueError, match="`stop_after` runs from 0 to 9"):
        sample_latents(model, told, seeds=SEEDS, steps=5, stop_after=torch.tensor([0, 9, 1]))
    with pytest.raises(ValueError, match="`steps=0`"):
        sample_latents(model, told, seeds=SEEDS, steps=0)
    assert model.unet_items == 0
    assert generate(model, [], seeds=[], progress=False).shape == (0, 3, 16, 16)


def test_conditioning_rows() -> None:
    told = Conditioning(torch.arange(6.0).view(3, 1, 2), torch.arange(3.0).view(3, 1), torch.zeros(3, 6))
    assert len(told) == 3
    assert told.select([2, 0]).pooled.flatten().tolist() == [2, 0]
    assert told.select(torch.tensor([False, True, False])).hidden.tolist() == [[[2, 3]]]
    assert told.select(slice(1, 3)).pooled.flatten().tolist() == [1, 2]
    assert told.repeat(2).pooled.flatten().tolist() == [0, 1, 2, 0, 1, 2]
    assert Conditioning.cat([told, told.select([1])]).pooled.flatten().tolist() == [0, 1, 2, 1]
    for parts in ([], [told, Conditioning(told.hidden)]):
        with pytest.raises(ValueError, match="`parts`"):
            Conditioning.cat(parts)
