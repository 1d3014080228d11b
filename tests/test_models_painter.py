"""The painter: a real (tiny, random) Stable Diffusion through diffusers."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from models.painter import known_schedulers, load_painter, save_random_painter
from tests.small_painters import save_checked_painter

HOW = {"height": 64, "width": 128, "steps": 2, "guidance": 1.0}
PROMPTS = ["A street at dusk.", "A foggy road with a bus."]


@pytest.fixture(scope="module")
def painter():
    torch.set_num_threads(1)
    return load_painter("random", seed=3)


def difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other).max())


def test_pictures_are_rgb_bytes_of_the_size_asked_for(painter):
    pictures = painter.paint(PROMPTS, seeds=[1, 2], **HOW)
    assert [(picture.shape, picture.dtype) for picture in pictures] == [
        ((64, 128, 3), np.uint8)
    ] * 2
    assert all(picture.std() > 1 for picture in pictures)


@pytest.mark.parametrize("scheduler", [None, "EulerAncestralDiscreteScheduler"])
def test_a_picture_depends_on_its_own_seed_and_not_on_its_batch_mates(scheduler):
    painter = load_painter("random", seed=3, scheduler=scheduler)
    together = painter.paint(PROMPTS, seeds=[1, 2], **HOW)
    (alone,) = painter.paint(PROMPTS[1:], seeds=[2], **HOW)
    assert difference(alone, together[1]) <= 1  # rounding, by batch size
    swapped = painter.paint(PROMPTS[::-1], seeds=[2, 1], **HOW)
    assert difference(swapped[0], together[1]) <= 1


def test_the_same_seed_paints_the_same_and_another_seed_another(painter):
    one, same = (painter.paint(PROMPTS, seeds=[1, 2], **HOW) for _ in range(2))
    other = painter.paint(PROMPTS, seeds=[1, 3], **HOW)
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert difference(one[1], other[1]) > 10


def test_the_negative_prompt_matters_under_guidance(painter):
    how = HOW | {"guidance": 9.0}
    (plain,) = painter.paint(PROMPTS[:1], seeds=[1], **how)
    (other,) = painter.paint(PROMPTS[:1], seeds=[1], negative_prompt="blurred cars", **how)
    assert difference(plain, other) > 0


def test_prompts_longer_than_the_text_tower_reads_are_told(painter):
    long = "a street " * 60
    assert painter.longer_than_read(["a street", long]) == [long]


def test_a_scheduler_is_chosen_by_its_class_name(painter):
    assert painter.scheduler == "DDIMScheduler"
    chosen = load_painter("random", scheduler="DPMSolverMultistepScheduler")
    assert chosen.scheduler == "DPMSolverMultistepScheduler"
    assert {"DDIMScheduler", "DPMSolverMultistepScheduler"} <= set(known_schedulers())


def test_an_unknown_scheduler_is_refused_with_the_nearest_names():
    with pytest.raises(ValueError, match=r"'DDIMSheduler'; nearest: DDIMScheduler"):
        load_painter("random", scheduler="DDIMSheduler")


def test_a_folder_is_loaded_as_random_is_and_has_no_safety_checker(tmp_path, painter):
    save_random_painter(tmp_path, seed=3)
    loaded = load_painter(str(tmp_path))
    assert isinstance(loaded.pipeline, StableDiffusionPipeline)
    assert loaded.pipeline.safety_checker is None
    assert painter.untrained
    assert not loaded.untrained
    ours, theirs = (p.paint(PROMPTS, seeds=[1, 2], **HOW) for p in (painter, loaded))
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("asked", [False, True])
def test_the_models_safety_checker_looks_only_where_it_is_asked_for(tmp_path, asked):
    """This one flags whatever it is shown."""
    painter = load_painter(str(save_checked_painter(tmp_path)), safety_checker=asked)
    assert (painter.pipeline.safety_checker is not None) is asked
    painted = painter.paint_checked(PROMPTS, seeds=[1, 2], **HOW)
    assert [one.flagged for one in painted] == [asked, asked]
    assert [bool(one.image_HW3.any()) for one in painted] == [not asked, not asked]


def test_a_checker_asked_of_a_model_that_has_none_is_refused(tmp_path):
    save_random_painter(tmp_path, seed=0)
    for reference in ("random", str(tmp_path)):
        with pytest.raises(ValueError, match=r"safety_checker is on, but .* has none .*to false"):
            load_painter(reference, safety_checker=True)


def test_a_folder_without_a_pipeline_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model_index\.json is missing"):
        load_painter(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("unet/diffusion_pytorch_model.safetensors", b"cut off"),
        ("vae/diffusion_pytorch_model.safetensors", None),
        ("model_index.json", b"{"),
    ],
)
def test_files_that_are_missing_or_damaged_are_told_in_one_line(tmp_path, name, content):
    save_random_painter(tmp_path, seed=0)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"^synthesize\.model: .*(them again|Is it whole)"):
        load_painter(str(tmp_path))


def test_an_unknown_hub_id_is_refused_and_says_what_to_fetch():
    with pytest.raises(FileNotFoundError, match="hf download clouds-nobody/none"):
        load_painter("clouds-nobody/none")


@pytest.mark.parametrize("name", ["no such folder", "a/b/c"])
def test_what_is_neither_folder_nor_hub_id_is_refused(name):
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub id"):
        load_painter(name)


def test_numbers_that_are_not_finite_are_an_error_and_no_black_picture():
    painter = load_painter("random", seed=1)
    with torch.no_grad():
        painter.pipeline.vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="precision=fp32"):
        painter.paint(PROMPTS, seeds=[1, 2], **HOW)


@pytest.mark.parametrize(("guidance", "minds"), [(1.0, False), (3.0, True)])
def test_a_negative_prompt_needs_guidance(painter, guidance, minds):
    assert painter.minds_negative_prompt(guidance) is minds


def save_tiny_xl(folder) -> None:
    """A tiny Stable Diffusion XL: two text encoders, size conditioning, no safety checker."""
    save_random_painter(folder / "small", seed=0)
    small = StableDiffusionPipeline.from_pretrained(folder / "small", safety_checker=None)
    text = small.text_encoder.config
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * 6 + 32,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=small.vae,
        text_encoder=small.text_encoder,
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=small.tokenizer,
        tokenizer_2=small.tokenizer,
        unet=unet,
        scheduler=small.scheduler,
    )
    pipeline.save_pretrained(folder / "xl")


def test_stable_diffusion_xl_is_loaded_by_the_same_call(tmp_path):
    torch.manual_seed(0)
    save_tiny_xl(tmp_path)
    painter = load_painter(str(tmp_path / "xl"), scheduler="EulerDiscreteScheduler")
    assert isinstance(painter.pipeline, StableDiffusionXLPipeline)
    with pytest.raises(ValueError, match="names no safety_checker"):
        load_painter(str(tmp_path / "xl"), safety_checker=True)
    how = HOW | {"guidance": 3.0}
    together = painter.paint(PROMPTS, seeds=[1, 2], negative_prompt="fog", **how)
    (alone,) = painter.paint(PROMPTS[1:], seeds=[2], negative_prompt="fog", **how)
    assert together[0].shape == (64, 128, 3)
    assert difference(alone, together[1]) <= 1


def tiny_parts(folder) -> dict:
    """What SD3 and FLUX share: an autoencoder with a shift, a flow's scheduler, CLIP and T5."""
    save_random_painter(folder / "small", seed=0)
    small = StableDiffusionPipeline.from_pretrained(folder / "small", safety_checker=None)
    shape = ("block_out_channels", "down_block_types", "up_block_types", "norm_num_groups")
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyzA."]
    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    long = T5Tokenizer(vocab=marks + letters, model_max_length=512)
    sizes = {"d_model": 64, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return {
        "vae": AutoencoderKL(
            **{name: small.vae.config[name] for name in shape},
            latent_channels=4,
            shift_factor=0.1,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "text": small.text_encoder.config,
        "tokenizer": small.tokenizer,
        "long_encoder": T5EncoderModel(T5Config(vocab_size=len(long), **sizes)),
        "long_tokenizer": long,
    }


def save_tiny_sd3(folder) -> None:
    """A tiny Stable Diffusion 3: a transformer, two CLIP towers and T5."""
    parts = tiny_parts(folder)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=64,
        pooled_projection_dim=64,
    )
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=parts["scheduler"],
        vae=parts["vae"],
        text_encoder=CLIPTextModelWithProjection(parts["text"]),
        tokenizer=parts["tokenizer"],
        text_encoder_2=CLIPTextModelWithProjection(parts["text"]),
        tokenizer_2=parts["tokenizer"],
        text_encoder_3=parts["long_encoder"],
        tokenizer_3=parts["long_tokenizer"],
    ).save_pretrained(folder / "model")


def save_tiny_flux(folder) -> None:
    """A tiny FLUX: a transformer that takes guidance as a number, one CLIP tower and T5."""
    parts = tiny_parts(folder)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    )
    FluxPipeline(
        transformer=transformer,
        scheduler=parts["scheduler"],
        vae=parts["vae"],
        text_encoder=CLIPTextModel(parts["text"]),
        tokenizer=parts["tokenizer"],
        text_encoder_2=parts["long_encoder"],
        tokenizer_2=parts["long_tokenizer"],
    ).save_pretrained(folder / "model")


@pytest.mark.parametrize(
    ("save", "kind", "minds"),
    [
        (save_tiny_sd3, StableDiffusion3Pipeline, True),
        (save_tiny_flux, FluxPipeline, False),
    ],
)
def test_transformers_that_paint_are_loaded_by_the_same_call(tmp_path, save, kind, minds):
    torch.manual_seed(0)
    save(tmp_path)
    painter = load_painter(str(tmp_path / "model"))
    assert isinstance(painter.pipeline, kind)
    how = HOW | {"guidance": 3.0}
    together = painter.paint(PROMPTS, seeds=[1, 2], negative_prompt="fog", **how)
    (alone,) = painter.paint(PROMPTS[1:], seeds=[2], negative_prompt="fog", **how)
    assert together[0].shape == (64, 128, 3)
    assert difference(alone, together[1]) <= 1  # rounding, by batch size
    assert painter.minds_negative_prompt(3.0) is minds
    clip_long, too_long = "a " * 90, "a " * 600
    assert painter.longer_than_read([clip_long, too_long]) == [too_long]
