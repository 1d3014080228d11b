"""Online self-training: teacher and SAM inside training, by the functions of the stages."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flows.keys import ingredients
from flows.pipeline import build, select
from flows.recipes import ConfigError, load_recipe
from flows.store import Store
from models.checkpoints import load_segmenter
from models.ema import Ema
from stages import pseudo_label, refine, self_train, train_source
from stages.devices import device_for
from stages.online import OnlineTeacher
from stages.readers import load_painted
from stages.shards import read_index
from tests.interruptions import Interrupted, Interrupting
from tests.tiny import (
    Told,
    stage_config,
    tiny_recipe,
    write_labelspace,
    write_pictures,
    write_selection,
    write_sources,
)

ONLINE = {"mode": "online", "steps": 4, "optimiser": {"lr": 1e-2, "clip_norm": 1.0}}
REFINE = {"model": "tiny", "min_area": 60, "batch_size": 2, "shard_size": 5, "min_iou": 0.0}
LABEL = {"batch_size": 5, "shard_size": 5}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
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
    }


def recipe_of(*, rule: str = "released", **section):
    return tiny_recipe(
        pseudo_label=LABEL, refine=REFINE | {"rule": rule}, self_train=ONLINE | section
    )


def train(world, out, *, progress=None, rule: str = "released", **section):
    config = stage_config(recipe_of(rule=rule, **section), "self_train", round=1)
    told = progress or Told()
    return self_train.run(config, out=out, progress=told, **world), told


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def online_maps(world, **options):
    """What the teacher inside training says before the first step, from the average's weights."""
    config = stage_config(recipe_of(**options), "self_train", round=1)
    student = load_segmenter(world["teacher"]).train()
    ema = Ema(student)
    average = load_file(world["teacher"] / "ema.safetensors")
    ema.load_state_dict({name: average[name] for name in ema.shadow})
    teacher = OnlineTeacher(config, student, ema, device=device_for("cpu", precision="fp32"))
    samples = load_painted(world["pictures"], None)
    fresh = teacher(samples, [sample.read_image() for sample in samples])
    assert student.training
    return {s.stem: each.label_HW for s, each in zip(samples, fresh, strict=True)}


def stage_maps(world, out, *, labels, rule="released"):
    """What the stages write for the same teacher."""
    recipe = recipe_of(rule=rule)
    progress = Told()
    config = stage_config(recipe, "pseudo_label", round=1)
    made = {"pictures": world["pictures"], "labels": out / "labels"}
    made["labels"].mkdir(parents=True)
    pseudo_label.run(
        config,
        out=made["labels"],
        progress=progress,
        pictures=world["pictures"],
        teacher=world["teacher"],
    )
    if labels == "refined":
        kept = [f"p{number}" for number in range(5)]
        (out / "refined").mkdir()
        refine.run(
            stage_config(recipe, "refine", round=1),
            out=out / "refined",
            progress=progress,
            selection=write_selection(out / "selection", kept=kept),
            **made,
        )
    folder = out / ("refined" if labels == "refined" else "labels")
    return {
        row["id"]: np.asarray(Image.open(row["folder"] / row["label"]))
        for row in read_index(folder)
    }


@pytest.mark.parametrize(
    "how", [("raw", "released"), ("refined", "released"), ("refined", "agreement")]
)
def test_labels_are_those_of_the_stages_for_the_same_teacher(world, tmp_path, how):
    labels, rule = how
    online = online_maps(world, labels=labels, rule=rule)
    offline = stage_maps(world, tmp_path, labels=labels, rule=rule)
    assert online.keys() == offline.keys()
    for name, label_HW in online.items():
        assert np.array_equal(label_HW, offline[name])
    if labels == "refined":
        raw = online_maps(world, labels="raw")
        assert any((raw[name] != offline[name]).any() for name in raw)


def test_takes_steps_and_ends_the_same_after_an_interruption(world, tmp_path):
    summary, told = train(world, tmp_path / "whole", rule="agreement", mixing="classmix")
    assert told.advanced == 4
    assert "5 painted (refined labels, made online)" in summary.text
    assert any("SAM has seeded random weights" in note for note in told.notes)
    with pytest.raises(Interrupted):
        train(
            world,
            tmp_path / "cut",
            progress=Interrupting(after=3),
            rule="agreement",
            mixing="classmix",
        )
    train(world, tmp_path / "cut", rule="agreement", mixing="classmix")
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_the_teacher_follows_the_student(world, tmp_path):
    """With an average that stands still, and one that moves, the labels and students differ."""
    still, moving = {"decay": 0.999999, "every": 100}, {"decay": 0.0}
    for name, ema in (("still", still), ("moving", moving)):
        train(world, tmp_path / name, labels="raw", ema=ema, steps=4, weighting="confidence")
    students = [files(tmp_path / name)["model.safetensors"] for name in ("still", "moving")]
    assert students[0] != students[1]


def test_pictures_are_still_missed_by_name(world, tmp_path):
    roles = {role: path for role, path in world.items() if role != "pictures"}
    with pytest.raises(ValueError, match="clouds --until self_train"):
        train(roles, tmp_path / "out")


# --- what the plan knows -------------------------------------------------------------------------


def roles_of(instances, name):
    return {entry.role for entry in instances[name].inputs}


def test_online_needs_no_labels_and_leaves_their_stages_out():
    instances = build(load_recipe("tiny", ["self_train.mode=online"]))
    assert "pictures" in roles_of(instances, "self_train@1#refined")
    for name in ("self_train@1#refined", "self_train@1#raw"):
        assert not {"labels", "selection", "evidence"} & roles_of(instances, name)
    chosen = {instance.stage for instance in select(instances)}
    assert not {"pseudo_label", "select", "refine"} & chosen
    assert {"synthesize", "self_train", "evaluate"} <= chosen


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ("refine.points=3", {"self_train@1#refined"}),
        ("pseudo_label.flip=true", {"self_train@1#refined", "self_train@1#raw"}),
        ("select.keep_share=0.5", set()),
    ],
)
def test_what_makes_the_labels_counts_in_the_key_of_online_training_alone(
    tmp_path, change, changed
):
    store = Store(tmp_path)

    def keyed(*overrides):
        instances = build(load_recipe("tiny", ["rounds.count=1", *overrides]))
        return {
            name: ingredients(instance, {}, store)
            for name, instance in instances.items()
            if instance.stage == "self_train"
        }

    online = "self_train.mode=online"
    before, after = keyed(online), keyed(online, change)
    assert {name for name in before if before[name] != after[name]} == changed
    assert keyed() == keyed(change)
    assert "refine.weights" in before["self_train@1#refined"]["weights"]
    assert "weights" not in before["self_train@1#raw"]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("ema: null", r"ema is null, but the average is the teacher"),
        ("data_workers: 2", r"data_workers read ahead.*self_train\.data_workers=0"),
        ("drop_noise: 1.25", r"drop_noise needs the mean losses.*or mode=offline"),
    ],
)
def test_what_online_training_cannot_do_is_said_at_once(tmp_path, section, said):
    path = tmp_path / "mine.yaml"
    path.write_text(f"self_train: {{mode: online, {section}}}")
    with pytest.raises(ConfigError, match=said):
        load_recipe(str(path))
    path.write_text(f"self_train: {{mode: online, labels: none, {section}}}")
    load_recipe(str(path))
