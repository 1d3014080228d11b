"""Stage select: which pictures are kept, and why."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from stages import select
from stages.config import SelectConfig
from stages.picture_scores import PictureScore
from stages.select import FLAGGED, judge
from stages.shards import read_jsonl, write_json, write_jsonl
from tests.interruptions import digests
from tests.tiny import Told, stage_config, street, tiny_recipe

torch.set_num_threads(1)
CONFIDENCES = {"a": 0.9, "b": 0.4, "c": 0.7, "d": 0.7, "e": 0.1}


def artifact(folder, rows, files=None):
    shard = folder / "shard-00000"
    shard.mkdir(parents=True)
    for name, pixels in (files or {}).items():
        Image.fromarray(pixels).save(shard / name)
    write_jsonl(shard / "index.jsonl", rows)
    write_json(shard / "shard.json", {"num_items": len(rows), "files": {}})
    return folder


@pytest.fixture
def inputs(tmp_path):
    """Pictures: a street, another one, the first recoloured, a blank one, a third street."""
    streets = [street(number)[0] for number in range(3)]
    again = np.clip(streets[0].astype(int) + 6, 0, 255).astype(np.uint8)
    images = [streets[0], streets[1], again, np.full_like(again, 90), streets[2]]
    pictures = artifact(
        tmp_path / "pictures",
        [{"id": name, "file": f"{name}.png", "prompt": f"scene {name}"} for name in CONFIDENCES],
        {f"{name}.png": image for name, image in zip(CONFIDENCES, images, strict=True)},
    )
    sure = np.zeros(images[0].shape[:2], np.uint8)
    sure[: len(sure) // 4] = 240
    labels = artifact(
        tmp_path / "labels",
        [
            {
                "id": name,
                "mean_confidence": value,
                "classes": {"0": 9, "2": 5} if name != "e" else {"0": 14},
                "confidence": f"{name}.confidence.png",
            }
            for name, value in CONFIDENCES.items()
        ],
        {f"{name}.confidence.png": sure for name in CONFIDENCES},
    )
    return pictures, labels


def selected(out, inputs, **section):
    out.mkdir()
    summary = select.run(
        stage_config(tiny_recipe(select=section), "select", round=1),
        out=out,
        progress=Told(),
        pictures=inputs[0],
        labels=inputs[1],
    )
    return read_jsonl(out / "selection.jsonl"), summary


def kept(rows) -> str:
    return "".join(row["id"] for row in rows if row["kept"])


def test_rule_all_keeps_everything_with_its_score(tmp_path, inputs):
    rows, summary = selected(tmp_path / "out", inputs, min_confidence=0.99, keep_share=0.1)
    assert [(row["id"], row["kept"], row["reasons"]) for row in rows] == [
        (name, True, []) for name in CONFIDENCES
    ]
    assert rows[1]["scores"] == {"mean_confidence": 0.4}
    assert summary.text == "5 of 5 pictures kept (rule all)"


@pytest.mark.parametrize(
    ("section", "expected"),
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
def test_rule_confidence_keeps_the_surest(section, expected):
    scores = [PictureScore(id=k, mean_confidence=v) for k, v in CONFIDENCES.items()]
    rows = judge(scores, SelectConfig(rule="confidence", **section))
    assert kept(rows) == expected
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


OFF = {"min_contrast": 0.0, "twin_bits": None}


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (OFF, "abcde"),
        (OFF | {"min_contrast": 0.02}, "abce"),
        (OFF | {"twin_bits": 6}, "abde"),
        (OFF | {"min_classes": 2}, "abcd"),
        (OFF | {"sure_above": 0.9, "min_sure_share": 0.25}, "abcde"),
        (OFF | {"min_confidence": 0.5}, "acd"),
        ({"min_contrast": 0.02, "twin_bits": 6, "min_classes": 2}, "ab"),
    ],
)
def test_rule_checks_drops_by_every_threshold_that_is_set(tmp_path, inputs, section, expected):
    rows, _ = selected(tmp_path / "out", inputs, rule="checks", **section)
    assert kept(rows) == expected
    assert rows[0]["scores"]["sure_share"] == pytest.approx(0.25)


@pytest.mark.parametrize(("sure_above", "share"), [(0.9, 0.3), (0.95, 0.01)])
def test_too_few_sure_pixels_are_a_reason(tmp_path, inputs, sure_above, share):
    how = OFF | {"sure_above": sure_above, "min_sure_share": share}
    with pytest.raises(ValueError, match=f"5 less than {share:.0%} sure pixels"):
        selected(tmp_path / "out", inputs, rule="checks", **how)


@pytest.mark.parametrize(("other", "kept_ids"), [(0b1111, "a"), (0b11111, "ab")])
def test_a_twin_differs_in_at_most_the_bits_allowed(other, kept_ids):
    scores = [
        PictureScore(
            id=name, mean_confidence=0.5, sure_share=1.0, num_classes=3, contrast=0.3, hash=value
        )
        for name, value in {"a": 0, "b": other}.items()
    ]
    assert kept(judge(scores, SelectConfig(rule="checks", twin_bits=4))) == kept_ids


def checked(name: str, value: int, **fields: object) -> PictureScore:
    """A picture with this hash that passes all other checks."""
    passes = {"mean_confidence": 0.5, "sure_share": 1.0, "num_classes": 3, "contrast": 0.3}
    return PictureScore(id=name, hash=value, **(passes | fields))


def test_a_picture_is_compared_with_few_of_the_others(monkeypatch):
    compared = 0

    def counted(values):
        nonlocal compared
        compared += np.size(values)
        return count(values)

    count = np.bitwise_count
    hashes = np.random.default_rng(0).integers(0, 2**63, 1500, dtype=np.uint64)
    monkeypatch.setattr(np, "bitwise_count", counted)
    judge([checked(str(h), int(h)) for h in hashes], SelectConfig(rule="checks"))
    assert 0 < compared < 1500 * 1500 / 2 / 100


class CountedPrompt(str):
    """A prompt's id that counts how often it is compared."""

    num_compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        CountedPrompt.num_compared += 1
        return str.__eq__(self, other)


def test_spares_find_their_place_without_comparing_all_with_all(monkeypatch):
    monkeypatch.setattr(CountedPrompt, "num_compared", 0)
    scores = [
        PictureScore(
            id=f"{number}{spare}",
            mean_confidence=0.9 if spare else 0.1,
            prompt_id=CountedPrompt(number),
            spare=spare,
        )
        for spare in (False, True)
        for number in range(300)
    ]
    rows = judge(scores, SelectConfig(rule="confidence", min_confidence=0.5))
    assert rows[-1]["replaces"] == "299False"
    assert CountedPrompt.num_compared < 3000


def test_a_near_copy_names_its_original_and_only_kept_pictures_have_copies(tmp_path, inputs):
    rows, _ = selected(tmp_path / "one", inputs, rule="checks", twin_bits=6)
    assert (rows[2]["reasons"], rows[2]["twin"]) == (["near copy of another picture"], "a")
    scores = [
        PictureScore(
            id=name, mean_confidence=v, sure_share=1.0, num_classes=3, contrast=0.3, hash=5
        )
        for name, v in {"low": 0.1, "high": 0.9, "next": 0.8}.items()
    ]
    rows = judge(scores, SelectConfig(rule="checks", min_confidence=0.5))
    assert kept(rows) == "high"
    assert rows[2]["twin"] == "high"


def test_pictures_that_do_not_fit_their_prompt_are_dropped():
    scores = [
        PictureScore(
            id=name,
            mean_confidence=0.5,
            sure_share=1.0,
            num_classes=3,
            contrast=0.3,
            hash=place,
            similarity=value,
        )
        for place, (name, value) in enumerate({"a": 0.3, "b": 0.1, "c": None}.items())
    ]
    rows = judge(scores, SelectConfig(rule="checks", twin_bits=None, min_similarity=0.2))
    assert kept(rows) == "ac"
    assert rows[1]["reasons"] == ["similarity to the prompt below 0.2"]


def spare_scores():
    """Two prompts twice, then spares of a third, the second and the first prompt; a low one."""
    asked = {"a": ("p0", 0.9), "b": ("p1", 0.2), "c": ("p0", 0.1), "d": ("p1", 0.8)}
    spares = {"x": ("p2", 0.7), "y": ("p1", 0.7), "z": ("p0", 0.3), "w": ("p0", 0.6)}
    return [
        PictureScore(id=name, mean_confidence=value, prompt_id=prompt, spare=name in spares)
        for name, (prompt, value) in (asked | spares).items()
    ]


def test_spares_stand_in_for_dropped_pictures_of_their_own_prompt_first():
    rows = judge(spare_scores(), SelectConfig(rule="confidence", min_confidence=0.5))
    assert kept(rows) == "adyw"
    assert {row["id"]: row["replaces"] for row in rows if "replaces" in row} == {"y": "b", "w": "c"}
    reasons = {row["id"]: row["reasons"] for row in rows if not row["kept"]}
    assert reasons["x"] == ["spare and not needed"]
    assert reasons["z"] == ["mean confidence below 0.5"]


def test_spares_of_other_prompts_stand_in_where_there_is_none_of_the_own():
    scores = [score for score in spare_scores() if score.id != "w"]
    rows = judge(scores, SelectConfig(rule="confidence", min_confidence=0.5))
    assert {row["id"]: row["replaces"] for row in rows if "replaces" in row} == {"y": "b", "x": "c"}


@pytest.mark.parametrize("rule", ["all", "confidence"])
def test_no_spare_is_kept_where_nothing_is_dropped(rule):
    assert kept(judge(spare_scores(), SelectConfig(rule=rule))) == "abcd"


@pytest.mark.parametrize("rule", ["all", "confidence"])
def test_no_rule_keeps_a_flagged_picture_and_a_spare_stands_in(rule):
    scores = [replace(s, flagged=s.id in "ad", mean_confidence=0.9) for s in spare_scores()]
    rows = judge(scores, SelectConfig(rule=rule))
    assert [row["reasons"] for row in rows if row["id"] in "ad"] == [[FLAGGED]] * 2
    assert {row["replaces"] for row in rows if "replaces" in row} == {"a", "d"}


def test_flagged_pictures_take_no_place_among_the_best_and_are_counted(tmp_path, inputs):
    index = inputs[0] / "shard-00000" / "index.jsonl"
    marked = [row | ({"flagged": True} if row["id"] == "a" else {}) for row in read_jsonl(index)]
    write_jsonl(index, marked)
    rows, _ = selected(tmp_path / "out", inputs, rule="confidence", keep_share=0.4)
    assert kept(rows) == "cd"
    statistics = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert statistics["reasons"][FLAGGED] == 1


def with_spares(inputs, spares):
    """The artifact of pictures with some of them marked as spare."""
    index = inputs[0] / "shard-00000" / "index.jsonl"
    rows = [row | ({"spare": True} if row["id"] in spares else {}) for row in read_jsonl(index)]
    write_jsonl(index, rows)
    return inputs


def test_too_few_good_spares_are_said_and_counted(tmp_path, inputs):
    told, out = Told(), tmp_path / "out"
    out.mkdir()
    section = {"rule": "confidence", "min_confidence": 0.5, "min_kept_share": 0.6}
    summary = select.run(
        stage_config(tiny_recipe(select=section), "select", round=1),
        out=out,
        progress=told,
        pictures=with_spares(inputs, "e")[0],
        labels=inputs[1],
    )
    assert summary.text == "3 of 5 pictures kept (rule confidence), 0 of 1 spare ones used"
    assert told.notes == [
        "1 of 4 pictures are dropped and no good spare one is left: paint more (synthesize.spare), "
        "or loosen select"
    ]
    assert json.loads((out / "statistics.json").read_text())["spares"] == {"painted": 1, "used": 0}


def test_the_share_that_must_be_kept_is_of_the_pictures_asked_for(tmp_path, inputs):
    inputs = with_spares(inputs, "de")
    section = {"rule": "confidence", "min_confidence": 0.5}
    rows, _ = selected(tmp_path / "a", inputs, **section, min_kept_share=1.0)
    assert kept(rows) == "acd"
    with pytest.raises(ValueError, match=r"keeps 1 of 5 .*synthesize\.spare"):
        selected(tmp_path / "b", inputs, rule="confidence", min_confidence=0.8, min_kept_share=0.5)


def test_two_runs_leave_the_same(tmp_path, inputs):
    for name in ("one", "two"):
        selected(tmp_path / name, inputs, rule="checks")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_keeping_none_or_too_few_is_an_error_with_reasons(tmp_path, inputs):
    with pytest.raises(
        ValueError, match=r"keeps none of 5 pictures\. Why: 5 mean confidence below 0\.95.*0\.900"
    ):
        selected(tmp_path / "a", inputs, rule="confidence", min_confidence=0.95)
    with pytest.raises(ValueError, match=r"keeps 3 of 5 pictures, fewer than the 80% of .*\. Why"):
        selected(tmp_path / "b", inputs, rule="confidence", keep_share=0.6, min_kept_share=0.8)


@pytest.mark.parametrize("extra", ["pictures", "labels"])
def test_pictures_and_labels_that_do_not_pair_are_refused(tmp_path, inputs, extra):
    rows = [{"id": name, "mean_confidence": value} for name, value in CONFIDENCES.items()]
    changed = artifact(tmp_path / "changed", [*rows, {"id": "stray", "mean_confidence": 0.5}])
    pair = (changed, inputs[1]) if extra == "pictures" else (inputs[0], changed)
    with pytest.raises(ValueError, match=r"do not pair .*stray"):
        selected(tmp_path / "out", pair)
