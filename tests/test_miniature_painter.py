"""The miniature's painter: its latents, sentences and losses, its training, and its exam."""

import json
import random
import re

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file

from models.build import build_segmenter
from models.miniature import materials as m
from models.miniature import painter_lessons as lessons
from models.miniature import painter_network as network
from models.miniature.painter_lessons import Scene
from models.miniature.painter_network import PatchBasis
from models.miniature.renderer import render
from models.painter import load_painter, save_random_painter
from stages import measure_painter, pretrain_painter
from stages.config import StageConfig
from stages.labels import load_labelspace
from stages.model_cards import CARD_NAME, card_digests, write_card
from stages.pretrain_config import MeasurePainterConfig, PretrainRecipe
from stages.probes import probe_config
from stages.shards import file_digest
from tests.tiny import Told

PICTURES = [render("web", seed=seed) for seed in range(24)]
IMAGES = np.stack([picture.image_HW3 for picture in PICTURES])


class Killed(Told):
    """Progress that ends a training after so many pictures and steps, as a kill would."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def advance(self, count: int = 1, **metrics: float) -> None:
        super().advance(count, **metrics)
        if self.advanced > self.after:
            raise KeyboardInterrupt


def painter_config(**section) -> StageConfig:
    decoder = {"steps": 2, "batch_size": 2, "log_every": 1, "checkpoint_every": 1}
    settings = {"steps": 3, "batch_size": 2, "num_pictures": 6, "log_every": 1}
    settings |= {"checkpoint_every": 1, "decoder": decoder} | section
    recipe = PretrainRecipe(pretrain_painter=settings)
    return StageConfig(recipe, stage="pretrain_painter", sections=("pretrain_painter",))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("painter")
    summary = pretrain_painter.run(painter_config(), out=folder, progress=Told())
    return folder, summary


def test_latents_are_projections_with_unit_variance_that_come_back():
    basis = PatchBasis.of(IMAGES)
    latents = basis.encode(IMAGES)
    assert latents.shape == (len(IMAGES), network.LATENT_CHANNELS, 8, 16)
    assert latents.mean((0, 2, 3)) == pytest.approx(np.zeros(network.LATENT_CHANNELS), abs=1e-4)
    assert latents.var((0, 2, 3)).mean() == pytest.approx(1, abs=0.01)
    product = basis.synthesis_CP @ basis.analysis_PC
    assert np.allclose(product, np.eye(network.LATENT_CHANNELS), atol=1e-5)
    error = (basis.decode(latents).astype(float) - IMAGES) / 255
    assert -10 * np.log10((error**2).mean()) > 24


def test_all_components_give_every_byte_back():
    basis = PatchBasis.of(IMAGES, channels=192)
    assert np.array_equal(basis.decode(basis.encode(IMAGES[:2])), IMAGES[:2])


def test_the_autoencoders_convolutions_are_the_basis():
    basis = PatchBasis.of(IMAGES)
    autoencoder = network.build_autoencoder(basis)
    values = torch.from_numpy(IMAGES).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        found = autoencoder.encode(values).latents * autoencoder.config.scaling_factor
    assert np.allclose(found.numpy(), basis.encode(IMAGES), atol=1e-4)


def test_tokenizer_is_the_same_every_time_and_knows_the_sentences():
    rng = random.Random(0)
    sentences = [lessons.wording(Scene.of(picture), rng) for picture in PICTURES]
    first, again = (
        network.train_tokenizer(sentences + lessons.vocabulary(), 900).get_vocab() for _ in range(2)
    )
    assert first == again
    assert {"sidewalk</w>", "street</w>", "night</w>"} <= set(first)


def test_scenes_survive_their_file():
    for picture in PICTURES:
        scene = Scene.of(picture)
        assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene


@pytest.mark.parametrize("label", [m.BUS, m.TRUCK, m.FENCE, m.MOTORCYCLE])
def test_sentences_name_only_what_is_there(label):
    words = "|".join(m.WORDS[label] + lessons.MORE_WORDS[label])
    pattern = re.compile(rf"\b({words})(e?s)?\b(?! rider)")
    rng = random.Random(label)
    named = {True: 0, False: 0}
    for picture in PICTURES:
        scene = Scene.of(picture)
        for _ in range(20):
            named[label in scene.counts] += bool(pattern.search(lessons.wording(scene, rng)))
    assert named[True] > 0
    assert named[False] == 0


def test_sentences_vary_and_most_fit_the_context():
    rng = random.Random(1)
    scene = Scene.of(PICTURES[3])
    sentences = [lessons.wording(scene, rng) for _ in range(50)]
    assert len(set(sentences)) > 45
    tokenizer = network.train_tokenizer(sentences + lessons.vocabulary())
    lengths = [len(tokenizer(sentence).input_ids) for sentence in sentences]
    assert np.mean(np.array(lengths) <= network.CONTEXT_LENGTH) > 0.7


def test_mixing_and_velocity_are_those_of_the_scheduler():
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(5, 16, 8, 16, generator=generator) for _ in range(2))
    times = torch.tensor([0, 100, 500, 900, 999])
    plain = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    alphas = network.build_scheduler().alphas_cumprod[times]
    noisy = lessons.mix(latents, noise, alphas)
    assert torch.allclose(noisy, plain.add_noise(latents, noise, times), atol=1e-5)
    velocity = plain.get_velocity(latents, noise, times)
    assert lessons.velocity_loss(velocity, latents, noise, alphas) < 1e-9
    assert lessons.velocity_loss(velocity + 0.1, latents, noise, alphas) == pytest.approx(0.01)


def test_the_solver_paints_what_a_perfect_denoiser_knows():
    scheduler = network.build_scheduler()
    scheduler.set_timesteps(14)
    target = torch.randn(1, 16, 8, 16, generator=torch.Generator().manual_seed(1))
    sample = torch.randn(1, 16, 8, 16, generator=torch.Generator().manual_seed(2))
    for time in scheduler.timesteps:
        alpha = scheduler.alphas_cumprod[time]
        noise = (sample - alpha.sqrt() * target) / (1 - alpha).sqrt()
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * target
        sample = scheduler.step(velocity, time, sample).prev_sample
    assert torch.allclose(sample, target, atol=0.02)


def test_lessons_are_a_function_of_seed_and_step():
    scenes = [Scene.of(picture) for picture in PICTURES]
    section = painter_config(batch_size=12, silent_share=0.5).pretrain_painter
    first, again, other = (
        pretrain_painter.sentences_of_step(scenes, section, step, seed=0) for step in (5, 5, 6)
    )
    assert first == again != other
    assert "" in first[2]
    assert set(first[1]) == {0, 1}


@pytest.mark.parametrize("after", [7, 9])
def test_interrupted_training_ends_with_the_same_bits(trained, tmp_path, after):
    """Killed in the decoder's training and in the denoiser's."""
    with pytest.raises(KeyboardInterrupt):
        pretrain_painter.run(painter_config(), out=tmp_path, progress=Killed(after))
    pretrain_painter.run(painter_config(), out=tmp_path, progress=Told())
    paths = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.safetensors"))
    assert len(paths) == 4  # the denoiser's come in two files
    for path in paths:
        straight, resumed = load_file(trained[0] / path), load_file(tmp_path / path)
        assert all(torch.equal(straight[name], resumed[name]) for name in straight), path
    assert not (tmp_path / "state").exists()


def test_what_is_left_loads_and_paints(trained):
    folder, summary = trained
    painter = load_painter(str(folder))
    pictures = painter.paint(
        ["a street", "a street"], seeds=[1, 2], height=64, width=128, steps=2, guidance=2.0
    )
    assert pictures[0].shape == (64, 128, 3)
    assert not np.array_equal(*pictures)
    assert summary.numbers["pictures"] == 6
    weights = [
        tensor for path in folder.rglob("*.safetensors") for tensor in load_file(path).values()
    ]
    assert {tensor.dtype for tensor in weights} == {torch.float16}


def test_large_weights_come_in_several_files_that_load_as_one(trained):
    folder, _ = trained
    shards = [load_file(path) for path in sorted((folder / "unet").glob("*.safetensors"))]
    assert len(shards) > 1
    assert max(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 8_000_000
    loaded = load_painter(str(folder)).pipeline.unet.state_dict()
    assert sum(len(shard) for shard in shards) == len(loaded)
    for name, tensor in (pair for shard in shards for pair in shard.items()):
        assert torch.equal(loaded[name].half(), tensor), name


def test_training_begins_with_an_earlier_painter_and_names_no_folder_of_it(trained, tmp_path):
    folder, _ = trained
    config = painter_config(start=str(folder), steps=1, lr=1e-12)
    pretrain_painter.run(config, out=tmp_path, progress=Told())
    before, after = load_painter(str(folder)).pipeline, load_painter(str(tmp_path)).pipeline
    for name in ("vae", "unet", "text_encoder"):
        earlier = getattr(before, name).state_dict()
        for key, value in getattr(after, name).state_dict().items():
            torch.testing.assert_close(value, earlier[key], atol=1e-3, rtol=1e-3, msg=key)
    for path in tmp_path.rglob("*.json"):
        assert str(folder) not in path.read_text(encoding="utf-8"), path


def test_a_painter_to_begin_with_that_is_none_is_told(tmp_path):
    save_random_painter(tmp_path, seed=0)
    with pytest.raises(ValueError, match=r"pretrain_painter.start.*no painter of the miniature"):
        pretrain_painter.begin_with(str(tmp_path))


@pytest.mark.parametrize("start", ["erly", "local-dir:erly", "builtin:writer", "random"])
def test_a_start_that_leads_to_no_painter_is_told(start):
    with pytest.raises(FileNotFoundError, match=f"pretrain_painter.start: '{start}'"):
        pretrain_painter.begin_with(start)


def test_an_untrained_painter_fails_its_exam(trained, tmp_path):
    section = {"num_train": 4, "head_steps": 2, "batch_size": 2, "num_prompts": 60}
    section |= {"paint_steps": 1, "guidance": 1.0}
    recipe = PretrainRecipe(measure_painter=section)
    config = StageConfig(recipe, stage="measure_painter", sections=("measure_painter",))
    measure_painter.run(config, out=tmp_path, progress=Told(), painter=trained[0])
    gates = json.loads((tmp_path / "gates.json").read_text())["painter"]
    assert gates["passed"] is False
    assert gates["psnr_db"] < MeasurePainterConfig().psnr
    assert set(gates["classes"]["car"]) == {"rendered", "painted", "shuffled"}


def test_rates_equal_counting_by_hand():
    named = np.array([[1, 0], [1, 0], [0, 0], [0, 0]], dtype=bool)
    found = np.array([[1, 1], [0, 0], [1, 0], [0, 0]], dtype=bool)
    rates = measure_painter.class_rates(named, found)
    assert [rates[key][0] for key in ("precision", "recall", "false_alarms")] == [0.5, 0.5, 0.5]
    assert np.isnan(rates["recall"][1])
    assert rates["false_alarms"][1] == 0.25


def test_rendered_pictures_are_judged_alike_whoever_made_them():
    names = load_labelspace("miniature").names
    judge = build_segmenter(
        probe_config("builtin:clip", weights=True, trained=False), class_names=names
    ).eval()
    section = MeasurePainterConfig(num_prompts=24)
    gates = measure_painter.judge_pictures(judge, PICTURES, IMAGES, section, 0, least_captions=3)
    for row in (gates["informedness"], gates["variety"], gates["dark_minus_bright"]):
        assert row["painted"] == row["rendered"]
    assert "person" in gates["counted_classes"]
    assert "sky" not in gates["counted_classes"]
    same = np.repeat(IMAGES[:1], len(IMAGES), axis=0)
    gates = measure_painter.judge_pictures(judge, PICTURES, same, section, 0, least_captions=3)
    assert gates["variety"]["painted"] == pytest.approx(0, abs=1e-3)
    assert gates["informedness"]["painted"] == pytest.approx(0, abs=1e-6)


def test_card_states_files_in_folders_and_figures(trained):
    folder, summary = trained
    rates = {"precision": 0.5, "recall": 0.5, "false_alarms": None}
    gates = {
        "classes": {"road": {case: rates for case in ("rendered", "painted", "shuffled")}},
        "counted_classes": ["road"],
        "informedness": {"rendered": 0.9, "painted": 0.5, "shuffled": 0.0},
        "variety": {"rendered": 0.1, "painted": 0.1},
        "dark_minus_bright": {"rendered": -50.0, "painted": -40.0},
        "psnr_db": 27.5,
        "num_prompts": 8,
        "paint_steps": 14,
        "guidance": 3.0,
        "passed": True,
    }
    section = painter_config().pretrain_painter.model_dump(mode="json")
    manifest = {
        "summary": {"numbers": dict(summary.numbers)},
        "config": {"pretrain_painter": section},
        "stage": "pretrain_painter",
        "seed": 0,
        "precision": "bf16",
    }
    write_card(folder, "painter", manifest=manifest, gates=gates)
    stated = card_digests(folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    files = [path for path in files if path.name != CARD_NAME and path.parent.name != "logs"]
    assert "unet/diffusion_pytorch_model.safetensors.index.json" in stated
    assert stated == {
        path.relative_to(folder).as_posix(): (path.stat().st_size, file_digest(path))
        for path in files
    }
    card = (folder / "README.md").read_text()
    assert "27.50 dB" in card
    assert "They began with fresh weights." in card
    assert "decoder {" in card
    section["start"] = "builtin:painter"
    write_card(folder, "painter", manifest=manifest, gates=gates)
    card = (folder / "README.md").read_text()
    assert "They began with those of an earlier painter (`pretrain_painter.start`" in card
    assert "decoder {" not in card, "it was not trained"
    assert "start builtin:painter" in card
