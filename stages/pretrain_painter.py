"""Train the miniature's painter on rendered streets and sentences about them.

python flows/miniature.py --stage pretrain_painter
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from models.config import weights_path
from models.miniature import painter_lessons as lessons
from models.miniature import painter_network as network
from models.miniature.painter_lessons import Scene
from models.miniature.painter_network import PatchBasis
from models.miniature.renderer import render
from models.painter import load_painter
from stages.config import StageConfig
from stages.contracts import Progress, Summary
from stages.pretrain_config import PainterDecoderConfig, PretrainPainterConfig
from stages.pretraining import pretrain
from stages.shards import item_seed, write_json

SHARD_PICTURES = 500
"""Rendered pictures that are stored together, and not rendered again after an interruption."""
BASIS_PICTURES = 2000
"""Pictures whose patches give the latents' basis."""
LARGEST_FILE = "6MB"
"""Tensors of one file of weights."""
ENCODED_AT_ONCE = 100
PIPELINE_NAME = "model_index.json"
"""The file that every painter's folder has."""


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Rendered pictures and what they show."""

    images_BHW3: np.ndarray
    scenes: list[Scene]


@dataclass(frozen=True, kw_only=True)
class Pupil:
    """What learns to paint."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DPMSolverMultistepScheduler

    def both(self) -> nn.ModuleDict:
        """The networks as one module."""
        return nn.ModuleDict({"unet": self.unet, "text_encoder": self.text_encoder})


def run(config: StageConfig, *, out: Path, progress: Progress) -> Summary:
    """Train, and leave a folder that diffusers loads.

    Args:
        config: section `pretrain_painter`.
        out: the artifact; an interrupted attempt goes on from its `state/`.
        progress: told every step.

    Raises:
        TrainingError: the training diverged.
    """
    section, seed = config.pretrain_painter, config.seed
    # 1. Pictures, once.
    gallery = render_gallery(section, out / "state" / "pictures", seed=seed, progress=progress)

    # 2. From latents to pictures.
    decoder_found = {"cpu_s": 0.0}
    if section.start is None:
        basis = PatchBasis.of(gallery.images_BHW3[:BASIS_PICTURES])
        autoencoder, decoder_found = train_autoencoder(
            gallery,
            basis,
            section.decoder,
            seed=seed,
            out=out / "state" / "decoder",
            progress=progress,
        )
        torch.manual_seed(seed)
        pupil = new_pupil(gallery, seed=seed)
    else:
        autoencoder, pupil = begin_with(section.start)

    # 3. From sentences to latents.
    latents_BVCFG = encode_gallery(gallery, autoencoder)
    found = pretrain(
        pupil.both().train(),
        lambda step: _losses(
            pupil,
            gallery.scenes,
            latents_BVCFG,
            section,
            step,
            seed=seed,
            bf16=config.precision == "bf16",
        ),
        section,
        seed=seed,
        out=out,
        progress=progress,
    )
    save_painter(pupil, autoencoder, out)
    pictures = int(found["steps"]) * section.batch_size
    cpu_s = found["cpu_s"] + decoder_found["cpu_s"]
    return Summary(
        text=f"{found['steps']:.0f} steps, {pictures} pictures, loss {found['total']:.3f}",
        numbers={"pictures": pictures, **found, "cpu_s": cpu_s}
        | {f"decoder_{name}": value for name, value in decoder_found.items()},
    )


def save_painter(pupil: Pupil, autoencoder: AutoencoderTiny, folder: Path) -> None:
    """Write the pipeline with fp16 weights, as `StableDiffusionPipeline.from_pretrained` reads.

    Weights beyond `LARGEST_FILE` come in several files and an index: the repository has no large
    ones.
    """
    pipeline = network.assemble(
        autoencoder=autoencoder.half(),
        unet=pupil.unet.half(),
        text_encoder=pupil.text_encoder.half(),
        tokenizer=pupil.tokenizer,
    )
    pipeline.save_pretrained(folder, max_shard_size=LARGEST_FILE)


def render_gallery(
    config: PretrainPainterConfig, folder: Path, *, seed: int, progress: Progress
) -> Gallery:
    """Render the pictures of the training, or take those that an earlier attempt rendered."""
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, config.num_pictures, SHARD_PICTURES)
    progress.start(config.num_pictures, "pictures")
    images, scenes = [], []
    for start in starts:
        path = folder / f"pictures-{start // SHARD_PICTURES:03d}.npz"
        count = min(SHARD_PICTURES, config.num_pictures - start)
        if not path.exists():
            _render_shard(path, [item_seed(seed, "painter", start + i) for i in range(count)])
        with np.load(path) as shard:
            images.append(shard["images"])
            scenes += [Scene.from_json(row) for row in json.loads(shard["scenes"].tobytes())]
        progress.advance(count)
    return Gallery(images_BHW3=np.concatenate(images), scenes=scenes)


def _render_shard(path: Path, seeds: list[int]) -> None:
    pictures = [render("web", seed=picture_seed) for picture_seed in seeds]
    scenes = json.dumps([Scene.of(picture).to_json() for picture in pictures]).encode()
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.savez(
            file,
            images=np.stack([picture.image_HW3 for picture in pictures]),
            scenes=np.frombuffer(scenes, dtype=np.uint8),
        )
    temporary.replace(path)


@torch.inference_mode()
def encode_gallery(gallery: Gallery, autoencoder: AutoencoderTiny) -> torch.Tensor:
    """Latents [B, V, C, F, G] float16 of each picture as it is and mirrored (V = 2).

    They are scaled as the pipeline scales them: the denoiser's own.
    """
    encoded = []
    for start in range(0, len(gallery.scenes), ENCODED_AT_ONCE):
        images_BHW3 = gallery.images_BHW3[start : start + ENCODED_AT_ONCE]
        images_B3HW = torch.from_numpy(images_BHW3).permute(0, 3, 1, 2) / 127.5 - 1
        views = [autoencoder.encode(view).latents for view in (images_B3HW, images_B3HW.flip(-1))]
        encoded.append((torch.stack(views, dim=1) * autoencoder.config.scaling_factor).half())
    return torch.cat(encoded)


def train_autoencoder(
    gallery: Gallery,
    basis: PatchBasis,
    config: PainterDecoderConfig,
    *,
    seed: int,
    out: Path,
    progress: Progress,
) -> tuple[AutoencoderTiny, dict[str, float]]:
    """An autoencoder of the basis with a trained decoder, or what an earlier attempt trained."""
    torch.manual_seed(seed)
    autoencoder = network.build_autoencoder(basis)
    weights, numbers = out / "decoder.safetensors", out / "decoder.json"
    if not numbers.exists():
        decoder = autoencoder.decoder.train()
        found = pretrain(
            decoder,
            lambda step: _decoder_losses(decoder, gallery, basis, config, step, seed=seed),
            config,
            seed=seed,
            out=out,
            progress=progress,
        )
        save_file(decoder.state_dict(), weights)
        write_json(numbers, found)
    autoencoder.decoder.load_state_dict(load_file(weights))
    return autoencoder.eval(), json.loads(numbers.read_text(encoding="utf-8"))


def _decoder_losses(
    decoder: nn.Module,
    gallery: Gallery,
    basis: PatchBasis,
    config: PainterDecoderConfig,
    step: int,
    *,
    seed: int,
) -> dict[str, torch.Tensor]:
    generator = np.random.default_rng(item_seed(seed, "painter decoder", step))
    images_BHW3 = lessons.cut(gallery.images_BHW3, generator, config.batch_size)
    latents_BCFG = torch.from_numpy(basis.encode(images_BHW3))
    noise_B111 = torch.rand(len(latents_BCFG), 1, 1, 1) * config.noise
    latents_BCFG = latents_BCFG + noise_B111 * torch.randn_like(latents_BCFG)
    targets_B3HW = torch.from_numpy(images_BHW3).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        painted_B3HW = decoder(latents_BCFG / network.LATENT_SCALE)
    return lessons.picture_losses(
        painted_B3HW.float(), targets_B3HW, edge_weight=config.edge_weight
    )


def new_pupil(gallery: Gallery, *, seed: int) -> Pupil:
    """Fresh networks, and a tokenizer that knows the sentences."""
    rng = random.Random(item_seed(seed, "painter sentences"))
    sentences = [lessons.wording(scene, rng) for scene in gallery.scenes[:BASIS_PICTURES]]
    tokenizer = network.train_tokenizer(sentences + lessons.vocabulary())
    return _pupil(network.build_unet(), network.build_text_encoder(tokenizer), tokenizer)


def _pupil(
    unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> Pupil:
    # Of small attention in bf16 on CPUs, the backward of matrices is 4 times as fast as the fused.
    unet.set_attn_processor(AttnProcessor())
    text_encoder.set_attn_implementation("eager")
    return Pupil(
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=network.build_scheduler(),
    )


def begin_with(start: str) -> tuple[AutoencoderTiny, Pupil]:
    """An earlier painter's autoencoder, and its other parts to learn on.

    Raises:
        FileNotFoundError: there is no painter.
        ValueError: it is a painter of other parts than ours.
    """
    folder = weights_path(start)
    if folder is None or not (folder / PIPELINE_NAME).is_file():
        raise FileNotFoundError(
            f"pretrain_painter.start: {start!r} is no folder with {PIPELINE_NAME}; name a folder "
            "that pretrain_painter left, or builtin:painter."
        )
    # the whole path: a folder's bare name could be a word that load_painter knows
    pipeline = load_painter(str(folder.resolve())).pipeline
    earlier = getattr(pipeline, "unet", None)
    unet = network.build_unet()
    if earlier is None or _shapes(earlier) != _shapes(unet):
        raise ValueError(
            f"pretrain_painter.start: {start} is no painter of the miniature's (its denoiser has "
            "other sizes); name a folder that pretrain_painter left, or builtin:painter."
        )
    unet.load_state_dict(earlier.state_dict())
    pipeline.vae.register_to_config(_name_or_path="")  # what is saved shall name no folder
    return pipeline.vae.eval(), _pupil(unet, pipeline.text_encoder, pipeline.tokenizer)


def _shapes(part: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in part.state_dict().items()}


def sentences_of_step(
    scenes: list[Scene], config: PretrainPainterConfig, step: int, *, seed: int
) -> tuple[list[int], list[int], list[str]]:
    """Pictures of an update, which view of each (1: mirrored), and a sentence for each."""
    rng = random.Random(item_seed(seed, "painter lesson", step))
    chosen = [rng.randrange(len(scenes)) for _ in range(config.batch_size)]
    views, sentences = [], []
    for index in chosen:
        views.append(rng.randrange(2))
        silent = rng.random() < config.silent_share
        sentences.append("" if silent else lessons.wording(scenes[index], rng))
    return chosen, views, sentences


def _losses(
    pupil: Pupil,
    scenes: list[Scene],
    latents_BVCFG: torch.Tensor,
    config: PretrainPainterConfig,
    step: int,
    *,
    seed: int,
    bf16: bool,
) -> dict[str, torch.Tensor]:
    chosen, views, sentences = sentences_of_step(scenes, config, step, seed=seed)
    latents_BCFG = latents_BVCFG[chosen, views].float()
    tokens = pupil.tokenizer(
        sentences,
        padding="max_length",
        truncation=True,
        max_length=network.CONTEXT_LENGTH,
        return_tensors="pt",
    ).input_ids
    times_B = torch.randint(pupil.scheduler.config.num_train_timesteps, (len(chosen),))
    noise_BCFG = torch.randn_like(latents_BCFG)
    alphas_B = pupil.scheduler.alphas_cumprod[times_B]
    noisy_BCFG = lessons.mix(latents_BCFG, noise_BCFG, alphas_B)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        said = pupil.text_encoder(tokens).last_hidden_state
        predicted_BCFG = pupil.unet(noisy_BCFG, times_B, said).sample
    loss = lessons.velocity_loss(predicted_BCFG.float(), latents_BCFG, noise_BCFG, alphas_B)
    return {"total": loss}
