"""Training on source and painted pictures, end to end, small."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from models.checkpoints import describe_checkpoint
from stages import self_train, train_source
from stages.shards import read_jsonl, write_jsonl
from stages.training_config import OptimiserConfig
from tests.tiny import (
    SIZE,
    Told,
    stage_config,
    tiny_recipe,
    write_labels,
    write_labelspace,
    write_pictures,
    write_selection,
    write_sources,
)

STANDING_STILL = OptimiserConfig(lr=1e-30, weight_decay=0.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Everything that self-training gets, a teacher included."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("world")
    roles = {
        "sources": write_sources(folder / "sources", data=folder / "data"),
        "labelspace": write_labelspace(folder / "labelspace"),
    }
    config = stage_config(tiny_recipe(train_source={"steps": 3}), "train_source")
    train_source.run(config, out=folder / "teacher", progress=Told(), **roles)
    return roles | {
        "teacher": folder / "teacher",
        "pictures": write_pictures(folder / "pictures"),
        "labels": write_labels(folder / "labels"),
        "selection": write_selection(folder / "selection", kept=["p0", "p1", "p3"]),
    }


def train(world, out, **section):
    told = Told()
    config = stage_config(tiny_recipe(self_train=section), "self_train", round=1)
    return self_train.run(config, out=out, progress=told, **world), told


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


@pytest.mark.parametrize("labels", ["refined", "raw"])
def test_leaves_student_and_teacher(world, tmp_path, labels):
    summary, told = train(world, tmp_path, labels=labels)
    assert sorted(files(tmp_path)) == ["checkpoint.json", "ema.safetensors", "model.safetensors"]
    assert describe_checkpoint(tmp_path)["step"] == 3 + 4
    assert (summary.numbers["samples"], summary.numbers["painted"]) == (6, 3)
    assert labels in summary.text
    assert told.advanced == 4


def test_control_trains_on_the_source_alone(world, tmp_path):
    alone = {role: world[role] for role in ("sources", "labelspace", "teacher")}
    summary, told = train(alone, tmp_path / "control", labels="none")
    assert summary.numbers["painted"] == 0
    assert told.advanced == 4
    train(world, tmp_path / "given", labels="none")
    assert files(tmp_path / "control") == files(tmp_path / "given")


@pytest.mark.parametrize(
    "change",
    [
        {"painted_share": 0.25},
        {"painted_weight": 0.5},
        {"unlabelled": "negative"},
        {"start_from": "ema"},
        {"labels": "none"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_option_changes_the_student(world, tmp_path, change):
    plain = {"start_from": "model"}
    train(world, tmp_path / "one", **plain)
    train(world, tmp_path / "two", **(plain | change))
    one, two = (files(tmp_path / name)["model.safetensors"] for name in ("one", "two"))
    assert one != two


def test_dropped_pictures_are_not_trained_on(world, tmp_path):
    train(world, tmp_path / "one")
    (world["pictures"] / "shard-00000" / "p2.png").rename(tmp_path / "p2.png")
    try:
        train(world, tmp_path / "two")  # p2 is not kept, so it is not missed
    finally:
        (tmp_path / "p2.png").rename(world["pictures"] / "shard-00000" / "p2.png")
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.parametrize("which", ["model", "ema"])
def test_student_starts_from_the_teachers(world, tmp_path, which):
    train(world, tmp_path, start_from=which, optimiser=STANDING_STILL)
    student = load_file(tmp_path / "model.safetensors")
    start = load_file(world["teacher"] / f"{which}.safetensors")
    for name in start:
        torch.testing.assert_close(student[name], start[name], rtol=1e-6, atol=1e-9)


def test_student_starts_from_the_weights_of_a_teacher_without_average(world, tmp_path):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for name in ("model.safetensors", "checkpoint.json"):
        (teacher / name).write_bytes((world["teacher"] / name).read_bytes())
    _, told = train(world | {"teacher": teacher}, tmp_path / "out", start_from="ema")
    assert any("no average" in note for note in told.notes)


def test_second_round_draws_other_samples(world, tmp_path):
    train(world, tmp_path / "one", optimiser=STANDING_STILL)
    first, second = Told(), Told()
    for told, teacher in ((first, world["teacher"]), (second, tmp_path / "one")):
        config = stage_config(
            tiny_recipe(self_train={"optimiser": STANDING_STILL}), "self_train", round=1
        )
        roles = world | {"teacher": teacher}
        self_train.run(config, out=tmp_path / f"out{id(told)}", progress=told, **roles)
    assert [row["loss"] for row in first.metrics] != [row["loss"] for row in second.metrics]


# --- what cannot work ----------------------------------------------------------------------------

OTHER_CLASSES = {"road": (0, 0, 0), "tree": (0, 255, 0), "sky": (0, 0, 255), "car": (255, 0, 0)}


def test_teacher_with_other_classes_is_refused(world, tmp_path):
    other = write_labelspace(tmp_path / "labelspace", OTHER_CLASSES)
    with pytest.raises(ValueError, match=r"teacher .*differ in building, tree.*data\.labels"):
        train(world | {"labelspace": other}, tmp_path / "out")


def test_labels_with_other_classes_are_refused(world, tmp_path):
    other = write_labels(tmp_path / "labels", classes=OTHER_CLASSES)
    with pytest.raises(ValueError, match=r"made the labels .*differ in building, tree"):
        train(world | {"labels": other}, tmp_path / "out")


def test_labels_of_other_pictures_are_refused(world, tmp_path):
    fewer = write_labels(tmp_path / "labels", num_pictures=3)
    with pytest.raises(ValueError, match=r"have no label .*p3"):
        train(world | {"labels": fewer}, tmp_path / "out")


def test_selection_that_keeps_nothing_is_refused(world, tmp_path):
    none = write_selection(tmp_path / "selection", kept=[])
    with pytest.raises(ValueError, match=r"the selection keeps none.*self_train\.labels=none"):
        train(world | {"selection": none}, tmp_path / "out")


@pytest.mark.parametrize("absent", ["pictures", "labels"])
def test_missing_pictures_or_labels_are_told_with_the_command(world, tmp_path, absent):
    roles = {role: path for role, path in world.items() if role != absent}
    with pytest.raises(ValueError, match=r"clouds --until self_train"):
        train(roles, tmp_path / "out")


def test_crops_of_different_size_are_refused(world, tmp_path):
    other = tiny_recipe().self_train.painted_augment.model_copy(update={"crop_width": 96})
    with pytest.raises(ValueError, match=r"painted_augment"):
        train(world, tmp_path / "out", painted_augment=other)


def with_maps(folder, *, value):
    """Labels for the pictures, all of one value, with what an index tells of them."""
    labels = write_labels(folder)
    shard = labels / "shard-00000"
    rows = read_jsonl(shard / "index.jsonl")
    for row in rows:
        Image.fromarray(np.full(SIZE, value, np.uint8)).save(shard / row["label"])
        row["classes"] = {} if value == 255 else {str(value): SIZE[0] * SIZE[1]}
    write_jsonl(shard / "index.jsonl", rows)
    return labels


@pytest.mark.parametrize("unlabelled", ["negative", "ignore"])
@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("value", [255, 2])
def test_pictures_of_nothing_or_of_one_class_can_be_trained_on(
    world, tmp_path, unlabelled, share, value
):
    labels = with_maps(tmp_path / "labels", value=value)
    how = {"unlabelled": unlabelled, "painted_share": share, "steps": 2}
    summary, _ = train(world | {"labels": labels}, tmp_path / "out", **how)
    assert math.isfinite(summary.numbers["loss"])


def test_train_ids_beyond_the_label_space_are_refused(world, tmp_path):
    labels = with_maps(tmp_path / "labels", value=17)
    with pytest.raises(ValueError, match=r"picture p0 .*train id 17.*'tiny' has 4 classes"):
        train(world | {"labels": labels}, tmp_path / "out")
