"""The networks that ship: their cards' digests, and that the real libraries load and use them."""

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file
from segment_anything import SamPredictor

from flows.recipes import load_recipe
from models.build import build_segmenter
from models.config import MINIATURE_DIR, DecoderConfig, EncoderConfig, SegmenterConfig
from models.miniature import materials, sam_lessons
from models.miniature.renderer import render
from models.miniature.sam_network import build_sam, read_sizes
from models.painter import load_painter
from models.refiner import build_refiner
from stages import write_prompts
from stages.labels import load_labelspace
from stages.measure_miniature import _judge
from stages.model_cards import CARD_NAME, card_digests
from stages.shards import file_digest
from tests.tiny import Told, stage_config

NETWORKS = {name: MINIATURE_DIR / name for name in ("clip", "sam", "writer", "painter")}
CLIP, SAM, WRITER, PAINTER = NETWORKS.values()


def shipped(name: str) -> None:
    if not (NETWORKS[name] / "README.md").exists():
        pytest.skip(f"no {name} has passed its gate yet: models/miniature/{name} is empty")


@pytest.fixture(scope="module")
def clip():
    shipped("clip")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{CLIP}")
    return model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{CLIP}")


@pytest.fixture(scope="module")
def sam():
    shipped("sam")
    network = build_sam(read_sizes(SAM))
    network.load_state_dict(load_file(SAM / "sam.safetensors"))
    return SamPredictor(network)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_files_are_those_of_the_card(name):
    shipped(name)
    stated = card_digests(NETWORKS[name])
    folder = NETWORKS[name]
    files = {p for p in folder.rglob("*") if p.is_file() and p.name != CARD_NAME}
    assert {path.relative_to(folder).as_posix() for path in files} == set(stated)
    for path in files:
        assert stated[path.relative_to(folder).as_posix()] == (
            path.stat().st_size,
            file_digest(path),
        )


def test_all_networks_together_are_small():
    weights = MINIATURE_DIR.rglob("*.safetensors")
    assert sum(path.stat().st_size for path in weights) <= 25_000_000


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_weights_are_half_precision_and_finite(name):
    shipped(name)
    for path in NETWORKS[name].rglob("*.safetensors"):
        for tensor_name, tensor in load_file(path).items():
            assert tensor.dtype in (torch.float16, torch.int64), tensor_name
            assert torch.isfinite(tensor.float()).all(), tensor_name


def test_clip_tells_captions_of_crops_apart(clip):
    model, preprocess, tokenizer = clip
    pairs = {
        "road": (materials.ROAD, (slice(40, 64), slice(40, 88))),
        "sky": (materials.SKY, (slice(0, 24), slice(40, 88))),
    }
    from PIL import Image

    hits, total = 0, 0
    with torch.no_grad():
        texts = model.encode_text(tokenizer([f"a photo of {word}" for word in pairs]))
        texts = torch.nn.functional.normalize(texts, dim=-1)
        for seed in range(30):
            picture = render("web", seed=10_000_000 + seed)
            for index, (label, window) in enumerate(pairs.values()):
                if (picture.label_ids_HW[window] == label).mean() < 0.7:
                    continue
                crop = Image.fromarray(picture.image_HW3[window])
                found = model.encode_image(preprocess(crop)[None])
                hits += int((found @ texts.T).argmax()) == index
                total += 1
    assert total >= 10
    assert hits / total > 0.8


def test_class_texts_do_not_collapse(clip):
    model, _, tokenizer = clip
    names = load_labelspace("miniature").names
    with torch.no_grad():
        texts = model.encode_text(tokenizer([f"a photo of a {name}" for name in names]))
    texts = torch.nn.functional.normalize(texts, dim=-1)
    cosines = (texts @ texts.T)[~torch.eye(len(names), dtype=torch.bool)]
    assert cosines.max() < 0.95


def test_segmenter_is_built_on_the_shipped_tower(clip):
    model, *_ = clip
    config = SegmenterConfig(
        encoder=EncoderConfig(name=f"local-dir:{CLIP}", weights=str(CLIP)),
        decoder=DecoderConfig(kind="light", width=16, group_norm=4),
    )
    segmenter = build_segmenter(config, class_names=("a", "b")).eval()
    image = torch.from_numpy(render("web", seed=1).image_HW3).permute(2, 0, 1)[None]
    with torch.no_grad():
        padded, _ = segmenter.prepare(image)
        ours = segmenter.encoder(padded)[-1]
        tower = model.visual
        theirs = tower.layer4(tower.layer3(tower.layer2(tower.layer1(tower.stem(padded)))))
    assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("kind", sam_lessons.PROMPT_TYPES)
def test_sam_improves_on_prompts(sam, kind):
    pairs = []
    for seed in range(16):
        picture = render("web", seed=20_000_000 + seed)
        sam.set_image(picture.image_HW3)
        generator = np.random.default_rng(seed)
        lesson = sam_lessons.make_lesson(picture, generator, num_prompts=4, kind=kind, clean=False)
        pairs += _judge(sam, lesson)
    own, ours = np.mean(pairs, axis=0)
    assert ours > own + 0.05


def test_pipeline_loads_the_shipped_sam():
    shipped("sam")
    refiner = build_refiner("config", "builtin:sam")
    assert not refiner.untrained


def test_write_prompts_takes_the_shipped_writer_and_needs_the_bank_for_few(tmp_path):
    shipped("writer")
    torch.set_num_threads(1)
    labelspace = tmp_path / "labelspace"
    labelspace.mkdir()
    load_labelspace("miniature").save(labelspace)
    recipe = load_recipe("miniature", ["write_prompts.model=builtin:writer"])
    summary = write_prompts.run(
        stage_config(recipe, "write_prompts"),
        out=tmp_path,
        progress=Told(),
        labelspace=labelspace,
    )
    assert summary.numbers["from_bank"] == 0
    assert summary.numbers["replies"] <= 1.2 * summary.numbers["prompts"]


def test_pipeline_loads_the_shipped_painter_and_night_is_darker_than_day():
    shipped("painter")
    painter = load_painter("builtin:painter")
    prompts = ["a photo of a city street at night"] * 4
    prompts += ["a photo of a city street in daylight under a clear sky"] * 4
    pictures = painter.paint(
        prompts, seeds=list(range(8)), height=64, width=128, steps=8, guidance=3.0
    )
    assert np.mean(pictures[:4]) < np.mean(pictures[4:]) - 20
    sky = np.mean([picture[:16] for picture in pictures[4:]])
    assert sky > np.mean([picture[40:] for picture in pictures[4:]])
