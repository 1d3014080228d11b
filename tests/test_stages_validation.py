"""Stopping by validation sets: the best step's weights stay, also through an interruption."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from flows.pipeline import build
from flows.recipes import ConfigError, load_recipe
from models.checkpoints import describe_checkpoint, load_segmenter
from stages import self_train, train_source
from stages.devices import device_for
from stages.judging import mean_miou
from stages.judging_config import ValidationConfig
from stages.readers import load_index
from stages.training import Trainer, trained_tensors
from stages.training_config import OptimiserConfig
from stages.validation import Validation
from tests.tiny import (
    Told,
    stage_config,
    tiny_recipe,
    write_labels,
    write_labelspace,
    write_pictures,
    write_selection,
    write_sources,
)

CPU = device_for("cpu", precision="fp32")
STEPS = 12
SCORES = {2: 0.3, 4: 0.5, 6: 0.4, 8: 0.5, 10: 0.45, 12: 0.2}
"""What a judgement after each step says: 4 is best, and 8 only equals it."""


class Interrupt(Exception):
    pass


def trained(out, *, stop_at=None, patience=None, every=2):
    """Train a small network under a judge with given scores; states at every step are kept."""
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 2))
    states = {}

    def objective(model, step, share):
        states[step] = {k: v.clone() for k, v in trained_tensors(model).items()}
        if step == stop_at:
            raise Interrupt
        yield {"total": model(torch.ones(3, 6)).square().sum()}

    validation = Validation(judge=lambda: SCORES[max(states) + 1], every=every, patience=patience)
    trainer = Trainer(
        network,
        groups=[{"params": list(network.parameters()), "lr": 0.01, "weight_decay": 0.0}],
        objective=objective,
        steps=STEPS,
        optimiser=OptimiserConfig(lr=0.01, clip_norm=1.0),
        device=CPU,
        seed=0,
        out=out,
        batch_size=3,
        validation=validation,
        checkpoint_every=5,
        log_every=1,
    )
    told = Told()
    trainer.run(told)
    return trainer, states, told


def equal(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


def test_the_first_of_the_best_steps_stays(tmp_path):
    trainer, states, told = trained(tmp_path)
    assert (trainer.kept_step, trainer.validation.best_miou) == (4, 0.5)
    assert equal(trained_tensors(trainer.model), states[4])  # before update 5, after update 4
    assert told.advanced == STEPS
    rows = [json.loads(line) for line in (tmp_path / "logs" / "metrics.jsonl").open()]
    judged = {row["step"]: row["miou"] for row in rows if "miou" in row}
    assert judged == pytest.approx(SCORES)


def test_patience_ends_the_training_after_judgements_without_a_better_one(tmp_path):
    trainer, _, told = trained(tmp_path, patience=3)
    assert told.advanced == 10
    assert any("stops after step 10 of 12" in note for note in told.notes)
    assert trainer.kept_step == 4


def test_the_last_step_is_judged_even_between_the_intervals(tmp_path):
    trainer, _, _ = trained(tmp_path, every=10)
    assert trainer.kept_step == 10
    rows = [json.loads(line) for line in (tmp_path / "logs" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows if "miou" in row] == [10, 12]


@pytest.mark.parametrize("stop_at", [3, 5, 7, 11])
@pytest.mark.parametrize("patience", [None, 3])
def test_an_interrupted_training_chooses_the_same_step(tmp_path, stop_at, patience):
    whole, _, _ = trained(tmp_path / "whole", patience=patience)
    try:
        trained(tmp_path / "cut", stop_at=stop_at, patience=patience)
    except Interrupt:
        second, _, told = trained(tmp_path / "cut", patience=patience)
        assert told.started == [(STEPS, "steps", stop_at // 5 * 5)]
        assert second.validation.to_json() == whole.validation.to_json()
        assert equal(trained_tensors(second.model), trained_tensors(whole.model))
    else:
        assert patience is not None  # it had ended before the interruption


# --- the trainings ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("world")
    return {
        "sources": write_sources(folder / "sources", data=folder / "data"),
        "labelspace": write_labelspace(folder / "labelspace"),
        "validation": write_sources(folder / "validation", data=folder / "seen", num_samples=3),
    }


DATA = {"validation": [{"name": "streets", "root": "streets"}]}


def source_model(world, out, **section):
    recipe = tiny_recipe(train_source={"validation": {"every": 1}} | section, data=DATA)
    told = Told()
    summary = train_source.run(
        stage_config(recipe, "train_source"), out=out, progress=told, **world
    )
    return summary, recipe


@pytest.mark.parametrize("weights", ["model", "ema"])
def test_a_training_leaves_the_weights_that_judge_best(world, tmp_path, weights):
    validation = ValidationConfig(every=1, weights=weights)
    summary, _ = source_model(world, tmp_path, steps=6, validation=validation)
    rows = [json.loads(line) for line in (tmp_path / "logs" / "metrics.jsonl").open()]
    judged = {row["step"]: row["miou"] for row in rows if "miou" in row}
    assert sorted(judged) == [1, 2, 3, 4, 5, 6]
    best = max(judged, key=lambda step: (judged[step], -step))
    card = describe_checkpoint(tmp_path)
    assert card["step"] == best == summary.numbers["kept_step"]
    assert card["extra"]["validation"] == {"step": best, "miou": judged[best]}
    segmenter = load_segmenter(tmp_path, which=weights)
    samples = load_index(world["validation"])
    assert mean_miou(segmenter, samples, validation, CPU) == pytest.approx(judged[best], abs=1e-6)


def test_judging_changes_no_update(world, tmp_path):
    source_model(world, tmp_path / "judged", steps=4, validation={"every": 4, "weights": "ema"})
    source_model(world, tmp_path / "plain", steps=4, validation=None)
    for name in ("model.safetensors", "ema.safetensors"):
        judged, plain = (load_file(tmp_path / kind / name) for kind in ("judged", "plain"))
        assert equal(judged, plain)


def test_self_training_is_judged_by_the_same_code(world, tmp_path):
    source_model(world, tmp_path / "teacher", steps=3, validation=None)
    recipe = tiny_recipe(self_train={"validation": {"every": 2}}, data=DATA)
    summary = self_train.run(
        stage_config(recipe, "self_train", round=1),
        out=tmp_path / "student",
        progress=Told(),
        teacher=tmp_path / "teacher",
        pictures=write_pictures(tmp_path / "pictures"),
        labels=write_labels(tmp_path / "labels"),
        selection=write_selection(tmp_path / "selection", kept=["p0", "p1"]),
        **world,
    )
    kept = summary.numbers["kept_step"]
    assert kept in (2, 4)
    assert describe_checkpoint(tmp_path / "student")["step"] == 3 + kept
    assert f"step {kept} kept (validation mIoU" in summary.text


# --- what cannot work ----------------------------------------------------------------------------

WEB = "{name: web, root: web_val}"


@pytest.mark.parametrize(
    ("target", "validation"),
    [
        ("{name: web, root: web_val}", WEB),
        ("{name: other, root: web_val}", WEB),
        ("{name: other, root: web_val/, split: val}", WEB),
        ("{name: web, root: elsewhere}", WEB),
    ],
)
def test_a_target_cannot_be_a_validation_set(tmp_path, target, validation):
    path = tmp_path / "mine.yaml"
    path.write_text(f"data: {{targets: [{target}], validation: [{validation}]}}")
    with pytest.raises(ConfigError, match=r"validation set 'web' is also the target '(web|other)'"):
        load_recipe(str(path))
    path.write_text("data: {targets: [{name: a, root: a}], validation: [{name: b, root: b}]}")
    load_recipe(str(path))


@pytest.mark.parametrize("stage", ["train_source", "self_train"])
def test_what_validation_lacks_is_named(tmp_path, stage):
    path = tmp_path / "mine.yaml"
    path.write_text(f"{stage}: {{validation: {{every: 5}}}}")
    with pytest.raises(ConfigError, match=rf"{stage}\.validation is set, but data\.validation"):
        load_recipe(str(path))
    path.write_text(f"{stage}: {{ema: null, validation: {{every: 5, weights: ema}}}}")
    with pytest.raises(ConfigError, match=rf"{stage}\.ema is null: there is no average"):
        load_recipe(str(path))


def test_only_a_training_that_validates_needs_the_validation_sets():
    plain = build(load_recipe("tiny"))
    sets = ["data.validation=[{name: web, layout: cityscapes, root: '@render_world/web_val'}]"]
    judged = build(load_recipe("tiny", [*sets, "self_train.validation.every=2"]))

    def roles(instances, name):
        return {entry.role for entry in instances[name].inputs}

    for name in ("self_train@1#raw", "self_train@1#control"):
        assert "validation" not in roles(plain, name)
        assert "validation" in roles(judged, name)
    assert "validation" not in roles(judged, "train_source")


def test_an_empty_validation_index_is_refused(world, tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "roots.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no validation sample.*data\.validation"):
        source_model(world | {"validation": tmp_path / "none"}, tmp_path / "out")
