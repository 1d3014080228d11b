"""The refiner: a real (tiny, random) Sam against SamPredictor used as its documentation says."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from segment_anything import SamPredictor

from models.refiner import (
    Prompts,
    Refiner,
    build_refiner,
    from_large_to_small,
    point_prompts,
)

SIZES = [(96, 61), (64, 128)]


@pytest.fixture(scope="module")
def refiner() -> Refiner:
    torch.set_num_threads(1)
    return build_refiner("tiny", None, seed=1)


def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


def prompts_for(size: tuple[int, int], count: int, *, seed: int = 0) -> Prompts:
    rng = np.random.default_rng(seed)
    height, width = size
    points = [rng.integers(0, (width, height), (5, 2)).astype(np.float32) for _ in range(count)]
    return point_prompts(points)


def predicted(refiner: Refiner, image: np.ndarray, prompts: Prompts):
    predictor = SamPredictor(refiner.sam)
    predictor.set_image(image)
    found = []
    for number in range(len(prompts)):
        box = None if prompts.boxes_P4 is None else prompts.boxes_P4[number]
        found.append(
            predictor.predict(
                point_coords=prompts.points_PN2[number],
                point_labels=prompts.labels_PN[number],
                box=box,
                multimask_output=True,
            )[:2]
        )
    return np.stack([masks for masks, _ in found]), np.stack([iou for _, iou in found])


@pytest.mark.parametrize("with_boxes", [False, True])
def test_masks_equal_those_of_sam_predictor_one_by_one(refiner, with_boxes):
    images = pictures()
    prompts = [prompts_for(size, 3) for size in SIZES]
    if with_boxes:
        prompts = [
            Prompts(
                points_PN2=own.points_PN2,
                labels_PN=own.labels_PN,
                boxes_P4=np.array([[2, 3, 40, 50], [10, 0, 20, 60], [0, 0, 9, 9]], np.float32),
            )
            for own in prompts
        ]
    found = refiner.masks(images, prompts)
    for image, own, ours in zip(images, prompts, found, strict=True):
        masks, iou = predicted(refiner, image, own)
        assert ours.masks_PCHW.shape == (3, 3, *image.shape[:2])
        assert np.array_equal(ours.masks_PCHW.numpy(), masks)
        np.testing.assert_allclose(ours.iou_PC.numpy(), iou, rtol=1e-4, atol=1e-6)


def test_stability_is_the_iou_of_masks_cut_above_and_below_the_threshold(refiner):
    image, own = pictures()[0], prompts_for(SIZES[0], 3)
    (found,) = refiner.masks([image], [own], stability=True, prompt_batch=2)
    predictor = SamPredictor(refiner.sam)
    predictor.set_image(image)
    for number in range(3):
        logits = predictor.predict(
            point_coords=own.points_PN2[number],
            point_labels=own.labels_PN[number],
            multimask_output=True,
            return_logits=True,
        )[0]
        wide = (logits > -1).sum((1, 2))
        expected = (logits > 1).sum((1, 2)) / np.maximum(wide, 1)
        np.testing.assert_allclose(found.stability_PC[number].numpy(), expected, atol=2e-3)
    (plain,) = refiner.masks([image], [own])
    assert plain.stability_PC is None


def test_a_rough_mask_prompts_as_sam_predictor_takes_it(refiner):
    image, size = pictures()[1], SIZES[1]
    rough = np.zeros((2, *size), bool)
    rough[0, 10:40, 20:70] = True
    rough[1, :, 100:] = True
    own = prompts_for(size, 2)
    prompts = point_prompts(list(own.points_PN2), masks_PHW=rough)
    (found,) = refiner.masks([image], [prompts])
    predictor = SamPredictor(refiner.sam)
    predictor.set_image(image)
    for number in range(2):
        grid = np.full((1, 64, 64), -8.0, np.float32)
        grid[0, :32] = rough[number].reshape(32, 2, 64, 2).mean((1, 3)) * 16 - 8
        masks, iou, _ = predictor.predict(
            point_coords=own.points_PN2[number],
            point_labels=own.labels_PN[number],
            mask_input=grid,
            multimask_output=True,
        )
        assert np.array_equal(found.masks_PCHW[number].numpy(), masks)
        np.testing.assert_allclose(found.iou_PC[number].numpy(), iou, rtol=1e-4, atol=1e-6)
    (plain,) = refiner.masks([image], [own])
    assert not torch.allclose(plain.iou_PC, found.iou_PC)


def test_best_only_is_the_candidate_of_the_highest_score(refiner):
    images, prompts = pictures(), [prompts_for(size, 4) for size in SIZES]
    everything = refiner.masks(images, prompts)
    for whole, best in zip(
        everything, refiner.masks(images, prompts, candidates="best"), strict=True
    ):
        index = whole.iou_PC.argmax(1)
        assert torch.equal(best.index_PC[:, 0], index)
        assert torch.equal(best.masks_PCHW[:, 0], whole.masks_PCHW[torch.arange(4), index])
        assert torch.equal(best.iou_PC[:, 0], whole.iou_PC.amax(1))


def test_the_single_mask_is_that_of_sam_predictor(refiner):
    image, own = pictures()[0], prompts_for(SIZES[0], 2)
    (found,) = refiner.masks([image], [own], candidates="single")
    predictor = SamPredictor(refiner.sam)
    predictor.set_image(image)
    for number in range(2):
        masks, _, _ = predictor.predict(
            own.points_PN2[number], own.labels_PN[number], multimask_output=False
        )
        assert np.array_equal(found.masks_PCHW[number].numpy(), masks)


def test_automatic_masks_pass_their_thresholds(refiner):
    how = {"points_per_side": 4, "crop_layers": 0}
    masks = refiner.everything(pictures()[1], min_iou=0.0, min_stability=0.0, **how)
    assert len(masks) > 0
    assert masks.shape[1:] == SIZES[1]
    for thresholds in ({"min_iou": 1.0}, {"min_stability": 1.0}, {"min_area_px": 10_000}):
        off = {"min_iou": 0.0, "min_stability": 0.0, "min_area_px": 0} | thresholds
        assert refiner.everything(pictures()[1], **off, **how).shape == (0, *SIZES[1])


@pytest.mark.parametrize("crop_layers", [0, 1])
def test_a_picture_in_which_nothing_is_found_has_no_masks(refiner, crop_layers):
    masks = refiner.everything(
        pictures()[1], points_per_side=2, crop_layers=crop_layers, min_iou=2.0
    )
    assert masks.shape == (0, *SIZES[1])


def test_automatic_masks_stand_from_large_to_small_in_an_order_of_their_own():
    records = []
    for rows, columns in ((2, 3), (5, 6), (6, 5), (1, 2), (5, 6)):
        mask = np.zeros((16, 16), bool)
        offset = len(records)
        mask[offset : offset + rows, offset : offset + columns] = True
        records.append(
            {
                "segmentation": mask,
                "area": int(mask.sum()),
                "bbox": [offset, offset, columns, rows],
                "point_coords": [[0.5, 0.5]],
            }
        )
    masks = from_large_to_small(records, min_area_px=6, size=(16, 16))
    assert masks.reshape(4, -1).sum(1).tolist() == [30, 30, 30, 6]
    again = from_large_to_small(records[::-1], min_area_px=6, size=(16, 16))
    assert np.array_equal(masks, again)


def test_the_number_of_prompts_per_decoder_call_does_not_matter(refiner):
    images, prompts = pictures()[:1], [prompts_for(SIZES[0], 5)]
    (one,) = refiner.masks(images, prompts, prompt_batch=2)
    (other,) = refiner.masks(images, prompts, prompt_batch=64)
    assert torch.equal(one.masks_PCHW, other.masks_PCHW)
    torch.testing.assert_close(one.iou_PC, other.iou_PC)


def test_a_picture_without_prompts_has_no_masks(refiner):
    none = point_prompts([])
    found = refiner.masks(pictures(), [none, prompts_for(SIZES[1], 2)], candidates="best")
    assert found[0].masks_PCHW.shape == (0, 1, *SIZES[0])
    assert len(found[1].masks_PCHW) == 2
    assert refiner.masks(pictures(), [none, none])[1].masks_PCHW.shape == (0, 3, *SIZES[1])


def test_missing_points_are_padding_to_sam(refiner):
    short = point_prompts([np.array([[3, 4]], np.float32), np.ones((3, 2), np.float32)])
    assert short.labels_PN.tolist() == [[1, -1, -1], [1, 1, 1]]
    (found,) = refiner.masks(pictures()[:1], [short])
    masks, _ = predicted(refiner, pictures()[0], short)
    assert np.array_equal(found.masks_PCHW.numpy(), masks)


def test_it_stays_frozen_and_in_eval_mode(refiner):
    refiner.train()
    torch.nn.Sequential(refiner).train()
    assert not any(module.training for module in refiner.modules())
    assert not any(parameter.requires_grad for parameter in refiner.parameters())


def test_bf16_is_near_fp32(refiner):
    images, prompts = pictures()[:1], [prompts_for(SIZES[0], 3)]
    (exact,) = refiner.masks(images, prompts)
    (rounded,) = refiner.masks(images, prompts, bf16=True)
    assert rounded.iou_PC.dtype == torch.float32
    torch.testing.assert_close(rounded.iou_PC, exact.iou_PC, rtol=0.1, atol=0.05)
    assert (rounded.masks_PCHW == exact.masks_PCHW).float().mean() > 0.9


def test_automatic_masks_in_bf16_are_near_those_in_fp32(refiner):
    off = {"min_iou": 0.0, "min_stability": 0.0, "min_area_px": 0}
    exact, rounded = (
        refiner.everything(pictures()[1], points_per_side=1, crop_layers=0, bf16=bf16, **off)
        for bf16 in (False, True)
    )
    assert len(exact) == len(rounded) > 0
    assert (exact == rounded).mean() > 0.9


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_checkpoint_gives_back_its_masks(tmp_path, refiner, suffix):
    file = tmp_path / f"weights{suffix}"
    state = {name: value.contiguous() for name, value in refiner.sam.state_dict().items()}
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    loaded = build_refiner("tiny", str(file), seed=2)
    prompts = [prompts_for(size, 2) for size in SIZES]
    for ours, theirs in zip(
        loaded.masks(pictures(), prompts), refiner.masks(pictures(), prompts), strict=True
    ):
        assert torch.equal(ours.masks_PCHW, theirs.masks_PCHW)
    assert refiner.untrained
    assert not loaded.untrained


def test_random_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    one, same, other = (build_refiner("tiny", None, seed=seed) for seed in (1, 1, 2))
    key = "sam.mask_decoder.iou_token.weight"
    assert torch.equal(one.state_dict()[key], same.state_dict()[key])
    assert not torch.equal(one.state_dict()[key], other.state_dict()[key])


def test_weights_of_another_size_are_refused_and_named(tmp_path):
    file = tmp_path / "sam.safetensors"
    save_file({"image_encoder.pos_embed": torch.zeros(1, 64, 64, 768)}, file)
    with pytest.raises(ValueError, match=r"does not fit refine\.model=tiny.*looks like vit_b"):
        build_refiner("tiny", str(file))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_checkpoint_that_is_cut_off_is_refused(tmp_path, refiner, suffix):
    file = tmp_path / f"weights{suffix}"
    state = {name: value.contiguous() for name, value in refiner.sam.state_dict().items()}
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        build_refiner("tiny", str(file))


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    file = tmp_path / "weights.pth"
    torch.save({"image_encoder.pos_embed": SamPredictor}, file)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        build_refiner("tiny", str(file))


@pytest.mark.parametrize(
    ("model", "weights", "error", "message"),
    [
        ("vit_x", None, ValueError, "known are vit_b, vit_l, vit_h"),
        ("config", None, ValueError, "set refine.weights"),
        ("vit_b", "nowhere/sam.pth", FileNotFoundError, "official checkpoints"),
        ("config", "nowhere", FileNotFoundError, r"has no nowhere|has no"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_way_out(model, weights, error, message):
    with pytest.raises(error, match=message):
        build_refiner(model, weights)


def test_points_and_labels_must_agree():
    with pytest.raises(ValueError, match="expected"):
        Prompts(points_PN2=np.zeros((2, 3, 2), np.float32), labels_PN=np.zeros((2, 4)))
