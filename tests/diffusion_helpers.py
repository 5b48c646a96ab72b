"""Tiny Stable Diffusion pipelines from configs, for tests: random weights, nothing is downloaded.

The tokenizer knows whole words (one token each) and one word of two tokens, `two_token_word`; text is 12 tokens long at
most, images are 16 x 16 and latents 8 x 8 unless told otherwise. A forward of the UNet takes milliseconds.
"""

from typing import Any

import torch

WORDS = "a photo of the red blue green circle square star cat dog house in on style".split()
TWO_TOKEN_WORD = "vangogh"  # the two tokens "van" and "gogh</w>"
MAX_LENGTH = 12


def tiny_tokenizer(max_length: int = MAX_LENGTH, pad_token: str = "<|endoftext|>") -> Any:
    """
    A CLIP tokenizer over `WORDS` and `TWO_TOKEN_WORD`; anything else becomes the unknown token.

    Real CLIP vocabularies pad with the end token (Stable Diffusion 1.x, the first of SDXL) or with "!" (2.x, the second of
    SDXL): both are possible here.
    """
    from transformers import CLIPTokenizer

    words = [*WORDS, "vangogh"]
    letters = sorted({letter for word in words for letter in word})
    tokens = ["!", *letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in [*WORDS, "gogh"]:
        _learn([*word[:-1], word[-1] + "</w>"], tokens, merges)
    _learn([*"van"], tokens, merges)
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: place for place, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=max_length)


def _learn(symbols: list[str], tokens: list[str], merges: list[tuple[str, str]]) -> None:
    """Add the merges that join `symbols` from left to right."""
    joined = symbols[0]
    for symbol in symbols[1:]:
        if (joined, symbol) not in merges:
            merges.append((joined, symbol))
        joined += symbol
        tokens.append(joined)


def tiny_text_encoder(tokenizer: Any, *, hidden_size: int = 16, layers: int = 3, projection: int | None = None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        projection_dim=projection or hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=3.0,  # prompts are told apart, where 1.0 leaves them almost equal at this width
    )
    model = CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)
    return model.eval()


def _unet(image_size: int, **kwargs: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=image_size // 2,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        **kwargs,
    ).eval()


def _vae(image_size: int) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=image_size,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    ).eval()


def _scheduler(prediction_type: str) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip


def tiny_pipeline(seed: int = 0, *, image_size: int = 16, prediction_type: str = "epsilon") -> Any:
    """
    A `StableDiffusionPipeline` with random weights: text width 16, 3 text layers, UNet of 2 blocks, VAE of factor 2.

    The caller's random state is left alone.
    """
    from diffusers import StableDiffusionPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        unet = _unet(
            image_size,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
        )
        pipeline = StableDiffusionPipeline(
            vae=_vae(image_size),
            text_encoder=tiny_text_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=unet,
            scheduler=_scheduler(prediction_type),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_sdxl_pipeline(seed: int = 0, *, image_size: int = 16, prediction_type: str = "epsilon") -> Any:
    """A `StableDiffusionXLPipeline` with random weights: text widths 16 and 8, pooled width 6; see [`tiny_pipeline`]."""
    from diffusers import StableDiffusionXLPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, second = tiny_tokenizer(), tiny_tokenizer(pad_token="!")
        unet = _unet(
            image_size,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=24,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 6,
        )
        pipeline = StableDiffusionXLPipeline(
            vae=_vae(image_size),
            text_encoder=tiny_text_encoder(first),
            text_encoder_2=tiny_text_encoder(second, hidden_size=8, projection=6),
            tokenizer=first,
            tokenizer_2=second,
            unet=unet,
            scheduler=_scheduler(prediction_type),
            add_watermarker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
