"""Stage select: which pictures are kept, and why."""

import json

import pytest

from stages import select
from stages.config import SelectConfig
from stages.select import judge
from stages.shards import read_jsonl, write_json, write_jsonl
from tests.interruptions import digests
from tests.tiny import Told, stage_config, tiny_recipe

CONFIDENCES = {"a": 0.9, "b": 0.4, "c": 0.7, "d": 0.7, "e": 0.1}


def artifact(folder, rows):
    shard = folder / "shard-00000"
    shard.mkdir(parents=True)
    write_jsonl(shard / "index.jsonl", rows)
    write_json(shard / "shard.json", {"num_items": len(rows), "files": {}})
    return folder


@pytest.fixture
def inputs(tmp_path):
    pictures = artifact(tmp_path / "pictures", [{"id": name} for name in CONFIDENCES])
    rows = [{"id": name, "mean_confidence": value} for name, value in CONFIDENCES.items()]
    return pictures, artifact(tmp_path / "labels", rows)


def selected(out, inputs, **section):
    out.mkdir()
    recipe = tiny_recipe(select=section)
    summary = select.run(
        stage_config(recipe, "select", round=1),
        out=out,
        progress=Told(),
        pictures=inputs[0],
        labels=inputs[1],
    )
    return read_jsonl(out / "selection.jsonl"), summary


def test_rule_all_keeps_everything_with_its_score(tmp_path, inputs):
    rows, summary = selected(tmp_path / "out", inputs, min_confidence=0.99, keep_share=0.1)
    assert [(row["id"], row["kept"], row["reasons"]) for row in rows] == [
        (name, True, []) for name in CONFIDENCES
    ]
    assert rows[1]["scores"] == {"mean_confidence": 0.4}
    assert summary.text == "5 of 5 pictures kept (rule all)"


@pytest.mark.parametrize(
    ("section", "kept"),
    [
        ({}, "abcde"),
        ({"keep_share": 0.6}, "acd"),
        ({"keep_share": 0.4}, "ac"),
        ({"keep_share": 0.01}, "a"),
        ({"min_confidence": 0.7}, "acd"),
        ({"min_confidence": 0.71}, "a"),
        ({"min_confidence": 0.5, "keep_share": 0.8}, "acd"),
    ],
)
def test_rule_confidence_keeps_the_surest(section, kept):
    rows = judge(list(CONFIDENCES), CONFIDENCES, SelectConfig(rule="confidence", **section))
    assert "".join(row["id"] for row in rows if row["kept"]) == kept
    assert all(bool(row["reasons"]) is not row["kept"] for row in rows)


def test_reasons_are_told_and_counted(tmp_path, inputs):
    rows, _ = selected(
        tmp_path / "out", inputs, rule="confidence", min_confidence=0.2, keep_share=0.6
    )
    assert rows[4]["reasons"] == ["mean confidence below 0.2", "not among the best 60%"]
    statistics = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert statistics == {
        "num_pictures": 5,
        "num_kept": 3,
        "reasons": {"mean confidence below 0.2": 1, "not among the best 60%": 2},
    }


def test_two_runs_leave_the_same(tmp_path, inputs):
    for name in ("one", "two"):
        selected(tmp_path / name, inputs, rule="confidence", keep_share=0.5)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_keeping_none_is_an_error_with_the_best_score(tmp_path, inputs):
    with pytest.raises(ValueError, match=r"none of 5.*0\.900.*min_confidence 0\.95"):
        selected(tmp_path / "out", inputs, rule="confidence", min_confidence=0.95)


@pytest.mark.parametrize("extra", ["pictures", "labels"])
def test_pictures_and_labels_that_do_not_pair_are_refused(tmp_path, inputs, extra):
    stray = [{"id": "stray", "mean_confidence": 0.5}]
    rows = [{"id": name, "mean_confidence": value} for name, value in CONFIDENCES.items()]
    changed = artifact(tmp_path / "changed", rows + stray)
    pair = (changed, inputs[1]) if extra == "pictures" else (inputs[0], changed)
    with pytest.raises(ValueError, match=r"do not pair .*stray"):
        selected(tmp_path / "out", pair)
