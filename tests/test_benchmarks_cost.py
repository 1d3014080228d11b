"""The cost of a recipe: arithmetic counted rightly, extrapolated by it, and added up."""

import json

import pytest
import torch
from torch import nn

from flows.recipes import load_recipe
from stages.labels import load_labelspace
from tests.benchmarks.flops import (
    flops_of,
    inference_flops,
    official_flops,
    painting_flops,
    training_flops,
)
from tests.benchmarks.reading import training_pictures, wanted
from tests.benchmarks.recipe_cost import Bench, Cost, row_of
from tests.benchmarks.synthesize import networks_like_sd21


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def test_a_multiplication_and_an_addition_are_two_operations():
    layer = nn.Conv2d(4, 8, 3, padding=1, bias=False)
    assert flops_of(lambda: layer(torch.zeros(2, 4, 16, 16))) == 2 * 2 * 4 * 8 * 9 * 16 * 16


def test_sams_encoder_has_the_arithmetic_of_its_sizes():
    width, patches, padded, window = 1280, 64 * 64, 70 * 70, 14 * 14
    local, everywhere = 28, 4
    feed_forward = 8 * width**2 * patches
    multiplied = local * (feed_forward + 4 * width**2 * padded + 2 * width * padded * window)
    multiplied += everywhere * (feed_forward + 4 * width**2 * patches + 2 * width * patches**2)
    assert official_flops("vit_h") == pytest.approx(2 * multiplied, rel=0.02)


def test_painting_costs_a_pass_per_step_two_with_guidance_and_one_decoder():
    with torch.device("meta"):
        networks = networks_like_sd21(vocabulary=49408)

    def cost(steps: int, guidance: float) -> float:
        return painting_flops(networks["unet"], networks["vae"], (256, 256), steps, guidance)

    step = cost(2, 1.0) - cost(1, 1.0)
    decoder = cost(1, 1.0) - step
    assert 0 < step < decoder
    assert cost(1, 7.5) == cost(2, 1.0)
    assert cost(50, 7.5) == pytest.approx(100 * step + decoder)


def test_frozen_encoders_have_no_backward_pass():
    names = load_labelspace("cityscapes19").names
    frozen = load_recipe("clouds_rn50_gta5").segmenter
    tuning = frozen.tuning.model_copy(update={"kind": "full"})
    full = frozen.model_copy(update={"tuning": tuning})
    size = (128, 128)
    forward = inference_flops(frozen, size, names)
    assert forward < training_flops(frozen, size, 1, names) < 3 * forward
    assert (
        training_flops(full, size, 1, names) > training_flops(frozen, size, 1, names) + forward / 2
    )
    assert training_flops(frozen, size, 4, names) == 4 * training_flops(frozen, size, 1, names)


def test_what_is_measured_smaller_is_extrapolated_by_its_arithmetic():
    cost = Cost(seconds=2.0, measured="small", flops=6e12, measured_flops=1e12, extrapolated=True)
    row = row_of("train_source", cost, units=300, rate=3e12)
    assert row["ours"] == 1.0
    assert row["theirs"] == pytest.approx(300 * 2 / 3600, abs=1e-6)
    assert row["ratio"] == pytest.approx(1 / 6, abs=1e-3)


def test_a_small_recipe_is_measured_whole_and_added_up():
    rows = Bench(load_recipe("tiny"), "cpu", runs=1).rows()
    *parts, total = json.loads(json.dumps(rows))
    units = {row["name"]: row["units"] for row in parts}
    assert units == {
        "train_source": 8,
        "synthesize": 16,
        "pseudo_label": 16,
        "refine": 16,
        "self_train": 18,
    }
    assert not any(row["extrapolated"] for row in rows)
    assert total["ours"] == pytest.approx(sum(row["ours"] for row in parts), abs=1e-5)
    assert all(row["ours"] > 0 and row["theirs"] > 0 for row in parts)


def test_recipes_without_rounds_paint_nothing():
    recipe = load_recipe("tiny", ["rounds.count=0"])
    assert [row["name"] for row in Bench(recipe, "cpu", runs=1).rows()] == [
        "train_source",
        "recipe",
    ]


def test_reading_is_set_against_what_training_takes(tmp_path):
    recipe = load_recipe("clouds_convnext_l_gta5")
    assert training_pictures(recipe) == {"train_source": 320_000, "self_train": 320_000}
    rates = {"read_cityscapes": 10.0, "read_gta5": 12.0, "read_painted": 30.0}
    rows = [{"name": name, "ours": rate} for name, rate in rates.items()]
    measured = [
        {"name": "train_source", "unit_s": 0.1, "extrapolated": False},
        {"name": "self_train", "unit_s": 0.1, "extrapolated": True},
    ]
    (tmp_path / "costs.json").write_text(json.dumps(measured))
    source, mixed = wanted(recipe, rows, tmp_path / "costs.json", hours=2)
    assert (source["training_pictures_per_s"], source["training_cores"]) == (80.0, 8.0)
    assert mixed["training_cores"] is None, "an extrapolated rate is none"
    assert mixed["pictures_per_s_and_core"] == 12.0
    assert mixed["pace_pictures_per_s"] == 88.9
