"""The miniature's pre-trainings: resumable to the bit; losses against plain computations."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models.miniature import clip_lessons, clip_network, sam_lessons
from models.miniature.clip_lessons import PatchHeads
from models.miniature.renderer import render
from models.miniature.sam_network import SIZES, TINY_SIZES, build_sam
from stages import pretrain_sam
from stages.config import StageConfig
from stages.pretrain_config import PretrainRecipe

ROOT = Path(__file__).resolve().parents[1]


class Quiet:
    """Progress that can stop a training after some steps, as a kill would."""

    def __init__(self, stop_after: int | None = None):
        self.left = stop_after

    def start(self, total, unit, *, done=0):
        self.done = done

    def advance(self, count=1, **metrics):
        if self.left is not None:
            self.left -= count
            if self.left < 0:
                raise KeyboardInterrupt

    def note(self, text):
        pass


def sam_config(**section) -> StageConfig:
    section = {"steps": 3, "batch_size": 2, "num_prompts": 2, "log_every": 1} | section
    recipe = PretrainRecipe(pretrain_sam=section)
    return StageConfig(recipe, stage="pretrain_sam", sections=("pretrain_sam",))


def test_interrupted_training_ends_with_the_same_bits(tmp_path):
    torch.set_num_threads(1)
    config = sam_config(checkpoint_every=1, second_round=1.0)
    pretrain_sam.run(config, out=tmp_path / "straight", progress=Quiet())
    with pytest.raises(KeyboardInterrupt):
        pretrain_sam.run(config, out=tmp_path / "cut", progress=Quiet(stop_after=2))
    resumed = Quiet()
    pretrain_sam.run(config, out=tmp_path / "cut", progress=resumed)
    assert resumed.done == 2
    straight, cut = (load_file(tmp_path / name / "sam.safetensors") for name in ("straight", "cut"))
    assert all(torch.equal(straight[name], cut[name]) for name in straight)
    rows = (tmp_path / "cut" / "logs" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3]


def test_lessons_are_a_function_of_seed_and_step():
    section = sam_config().pretrain_sam
    first, again, other = (
        pretrain_sam.lessons_of_step(section, step, seed=seed)
        for step, seed in ((5, 0), (5, 0), (5, 1))
    )
    assert len(first) == section.kinds
    for one, two in zip(
        *([one for group in step for one in group] for step in (first, again)), strict=True
    ):
        assert one.kind == two.kind
        assert np.array_equal(one.targets_PHW, two.targets_PHW)
        assert np.array_equal(one.hints_PHW, two.hints_PHW)
    assert not np.array_equal(first[0][0].image_HW3, other[0][0].image_HW3)


def test_spoiled_masks_are_wrong_but_not_hopeless():
    ious = []
    for seed in range(12):
        generator = np.random.default_rng(seed)
        picture = render("web", seed=seed)
        lesson = sam_lessons.make_lesson(picture, generator, num_prompts=6, kind="mask")
        pairs = zip(lesson.hints_PHW, lesson.targets_PHW, strict=True)
        ious += [(hint & target).sum() / (hint | target).sum() for hint, target in pairs]
    assert 0.4 < np.mean(ious) < 0.7
    assert min(ious) > 0.15
    assert max(ious) < 1.0


@pytest.mark.parametrize("kind", sam_lessons.PROMPT_TYPES)
def test_prompts_hint_at_their_region(kind):
    picture = render("web", seed=4)
    generator = np.random.default_rng(0)
    lesson = sam_lessons.make_lesson(picture, generator, num_prompts=5, kind=kind, clean=True)
    for index, target in enumerate(lesson.targets_PHW):
        if lesson.points_PN2 is not None:
            columns, rows = lesson.points_PN2[index].astype(int).T
            assert target[rows, columns].all()
        if lesson.boxes_P4 is not None:
            left, top, right, bottom = lesson.boxes_P4[index]
            rows, columns = np.nonzero(target)
            inside = (columns > left - 1) & (columns < right) & (rows > top - 1) & (rows < bottom)
            assert inside.mean() > 0.5
        if lesson.masks_PHW is not None:
            assert np.array_equal(lesson.masks_PHW[index] > 0, lesson.hints_PHW[index])


def test_regions_are_connected_entities_or_classes():
    picture = render("source", seed=3)
    found = sam_lessons.regions(picture)
    assert len(found) > 5
    assert all(region.sum() >= sam_lessons.AREA_MIN_PX for region in found)
    assert len({region.tobytes() for region in found}) == len(found)
    labels = picture.labels_HW
    assert all(len(np.unique(labels[region])) == 1 for region in found)


def test_mask_loss_prefers_the_better_mask_and_iou_counts_pixels():
    target = torch.zeros(1, 8, 16, dtype=torch.bool)
    target[0, 2:6, 4:12] = True
    right = torch.where(target, 6.0, -6.0)[:, None]
    shifted = torch.roll(right, 2, dims=-1)
    losses = sam_lessons.mask_losses(torch.cat([right, shifted, -right], 1), target)[0]
    assert losses[0] < losses[1] < losses[2]
    found = sam_lessons.iou(torch.cat([right, shifted], 1) > 0, target[:, None])[0]
    assert found.tolist() == pytest.approx([1.0, 24 / 40])


def test_cropping_before_enlarging_is_what_sam_does_away_from_the_padding():
    sam = build_sam(SIZES)
    low = torch.randn(2, 1, 64, 64)
    theirs = sam.postprocess_masks(low, (64, 128), (64, 128))
    ours = sam_lessons.enlarge(low[..., :32, :], torch.zeros(2, 64, 128))
    assert torch.allclose(ours[..., :-1, :], theirs[..., :-1, :], atol=1e-5)


@pytest.mark.parametrize("kind", sam_lessons.PROMPT_TYPES)
def test_prompts_of_several_pictures_decode_as_segment_anything_decodes_them_one_by_one(kind):
    torch.manual_seed(0)
    sam = build_sam(SIZES)
    lessons = [
        sam_lessons.make_lesson(
            render("web", seed=seed), np.random.default_rng(seed), num_prompts=3, kind=kind,
            num_points=2,
        )
        for seed in (1, 2)
    ]  # fmt: skip
    with torch.inference_mode():
        embeddings = sam_lessons.embed_images(sam, lessons)
        _, together, iou = sam_lessons.decode(sam, embeddings, lessons)
        for index, lesson in enumerate(lessons):
            one = embeddings[index : index + 1]
            points = None
            if lesson.points_PN2 is not None:
                points = [torch.from_numpy(lesson.points_PN2)]
                points.append(torch.from_numpy(lesson.point_labels_PN))
            boxes = None if lesson.boxes_P4 is None else torch.from_numpy(lesson.boxes_P4)
            masks = None
            if lesson.masks_PHW is not None:
                masks = sam_lessons.mask_grid(torch.from_numpy(lesson.masks_PHW), 128, 128)
            sparse, dense = sam.prompt_encoder(points=points, boxes=boxes, masks=masks)
            expected, expected_iou = sam.mask_decoder.predict_masks(
                image_embeddings=one,
                image_pe=sam.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
            )
            own = slice(3 * index, 3 * index + 3)
            assert torch.allclose(together[own], expected, atol=1e-4)
            assert torch.allclose(iou[own], expected_iou, atol=1e-5)


def test_leaving_the_padding_out_changes_only_the_last_row_of_the_embedding():
    torch.manual_seed(0)
    sam = build_sam(SIZES)
    torch.nn.init.normal_(sam.image_encoder.pos_embed)  # it begins at nought
    for block in sam.image_encoder.blocks:  # they begin as identity
        torch.nn.init.normal_(block.attn.proj.weight, std=0.05)
    lesson = sam_lessons.make_lesson(
        render("web", seed=3), np.random.default_rng(0), num_prompts=2, kind="box"
    )
    with torch.inference_mode():
        whole = sam_lessons.embed_images(sam, [lesson])
        filled = sam_lessons.embed_images(sam, [lesson], rows=16)
        masks, grid, _ = sam_lessons.decode(sam, filled, [lesson])
    assert whole.shape[-2:] == (32, 32)
    assert torch.allclose(filled[..., :15, :], whole[..., :15, :], atol=1e-5)
    assert masks.shape[-2:] == (64, 128)
    assert grid.shape[-2:] == (64, 128)


@pytest.mark.parametrize("patch_size", [4, 8])
def test_stem_gives_one_embedding_per_patch(patch_size):
    sam = build_sam(SIZES | {"patch_size": patch_size})
    patches = sam.image_encoder.patch_embed(torch.zeros(1, 3, 128, 128))
    assert patches.shape == (1, 128 // patch_size, 128 // patch_size, SIZES["vit_embed_dim"])
    with pytest.raises(ValueError, match="patch_size 16, not 4 or 8"):
        build_sam(SIZES | {"patch_size": 16})


def test_training_begins_with_the_tensors_of_an_earlier_sam_that_fit(tmp_path):
    torch.manual_seed(1)
    early = build_sam(TINY_SIZES)
    pretrain_sam.save_sam(early, tmp_path / "early")
    torch.manual_seed(2)
    sam = build_sam(SIZES)
    taken = pretrain_sam.begin_with(sam, str(tmp_path / "early"))
    own, theirs = sam.state_dict(), early.state_dict()
    fitting = [name for name in own if name in theirs and own[name].shape == theirs[name].shape]
    assert taken == len(fitting) < len(own)
    assert all(torch.allclose(own[name], theirs[name], atol=1e-3) for name in fitting)


@pytest.mark.parametrize("start", ["erly", "local-dir:erly", "builtin:writer"])
def test_a_sam_to_begin_with_that_is_none_is_told(start):
    with pytest.raises(FileNotFoundError, match=f"pretrain_sam.start: '{start}'"):
        pretrain_sam.begin_with(build_sam(TINY_SIZES), start)


def test_affinity_head_reads_entities_of_neighbours():
    head = sam_lessons.AffinityHead(8)
    picture = render("source", seed=2)
    lesson = sam_lessons.make_lesson(picture, np.random.default_rng(0), num_prompts=2)
    with torch.no_grad():
        head.project.weight.zero_()
        head.project.bias.fill_(20.0)
    says_same = float(head(torch.zeros(1, 8, 16, 16), [lesson]).detach())
    cells = picture.entities_HW[1::2, 1::2].astype(int)  # a grid of 64 for 128 pixels
    differ = [
        (cells[: 32 - down, : 64 - right] != cells[down:, right:]).mean()
        for down, right in sam_lessons.NEIGHBOURS
    ]
    assert says_same == pytest.approx(20 * np.mean(differ), rel=1e-3)


def test_word_losses_equal_a_loop_over_regions():
    torch.manual_seed(0)
    heads = PatchHeads(width=2, dim=6)
    words = torch.nn.functional.normalize(torch.randn(4, 6), dim=-1)
    patches = [torch.nn.functional.normalize(torch.randn(2, 6, 4, 8), dim=1) for _ in range(3)]
    named = [torch.rand(2, 2, 4, 4) > 0.4 for _ in range(3)]
    found, chosen = clip_lessons.word_losses(patches, words, named, heads)
    found_each, chosen_each = [], []
    for index in range(3):
        scale, bias = heads.log_scale[index].exp(), heads.bias[index]
        found_here, chosen_here = [], []
        for b in range(2):
            for row in range(2):
                for column in range(4):
                    window = patches[index][
                        b, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2
                    ]
                    scores = scale * window.flatten(1).T @ words.T
                    truth = named[index][b, row, column]
                    pooled = scores.exp().mean(0).log() + bias
                    found_here.append(
                        torch.nn.functional.binary_cross_entropy_with_logits(pooled, truth.float())
                    )
                    if truth.any():
                        shares = scores.softmax(-1)[:, truth].sum(-1)
                        chosen_here.append(-shares.log())
        found_each.append(torch.stack(found_here).mean())
        chosen_each.append(torch.cat(chosen_here).mean())
    assert float(found) == pytest.approx(float(torch.stack(found_each).mean()), rel=1e-4)
    assert float(chosen) == pytest.approx(float(torch.stack(chosen_each).mean()), rel=1e-4)


def test_crops_are_told_only_what_they_show():
    picture = render("web", seed=9)
    for view in clip_lessons.crop_views(picture, random.Random(1), 4):
        assert view.image_HW3.shape == (64, 64, 3)
        ids = set(np.unique(view.label_ids_HW).tolist())
        named = {label for label, on in zip(clip_lessons.LABELS, view.named_L, strict=True) if on}
        assert named <= ids


def test_tokenizer_ends_with_its_highest_id_and_knows_the_words():
    tokenizer = clip_network.train_tokenizer(["a photo of a red car", "a traffic light"] * 9)
    ids = clip_network.tokenize(tokenizer, ["a photo of a car", "zebra"])
    assert ids.shape == (2, clip_network.CONTEXT_LENGTH)
    assert (ids.max(dim=1).values == tokenizer.eos_token_id).all()
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    assert "zebra" in tokenizer.decode(ids[1], skip_special_tokens=True)


def test_plan_of_the_flow_needs_no_torch(tmp_path):
    code = (
        "import sys; from flows.miniature import main; "
        f"code = main(['plan', '--artifacts', {str(tmp_path)!r}]); "
        "sys.exit(code or int('torch' in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    from flows.miniature import CONTRACTS

    assert done.stdout.count("RUN") == len(CONTRACTS)


def test_flow_names_a_wrong_setting(tmp_path, capsys):
    from flows.miniature import main

    assert main(["plan", "--set", "pretrain_sam.stepz=3", "--artifacts", str(tmp_path)]) == 2
    assert "steps" in capsys.readouterr().err
