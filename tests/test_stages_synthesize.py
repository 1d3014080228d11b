"""Stage synthesize: painting with a real (tiny, random) Stable Diffusion, and collecting."""

import json

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import Decoder
from PIL import Image

from models.painter import Painter
from stages import synthesize
from stages.prompt_files import read_prompts
from stages.shards import item_seed, read_index, shard_folders, write_json, write_jsonl
from stages.synthesize import commission
from tests.interruptions import Interrupted, Interrupting, digests
from tests.small_painters import save_checked_painter
from tests.tiny import Told, stage_config, street, tiny_recipe

torch.set_num_threads(1)
PAINT = {
    "num_images": 7,
    "model": "random",
    "height": 32,
    "width": 64,
    "steps": 1,
    "guidance": 1.0,
    "batch_size": 2,
    "shard_size": 3,
}


@pytest.fixture
def prompts(tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    texts = ["A street at dusk.", "A foggy road.", "A bridge in the rain, 20 °C."]
    rows = [{"id": f"p{number}", "text": text} for number, text in enumerate(texts)]
    write_jsonl(folder / "prompts.jsonl", rows)
    return folder


def unlabelled(folder, *, count: int = 5, suffix: str = ".png"):
    """Part `unlabelled` of a `prepare` artifact with pictures of two data sets."""
    data = folder / "data"
    data.mkdir(parents=True)
    for name in ("day", "night"):
        rows = []
        for number in range(count):
            picture = street(number)[0]
            Image.fromarray(picture).save(data / f"{name}{number}{suffix}")
            rows.append(
                {
                    "id": f"{name}/{number:02d}",
                    "image": f"{name}{number}{suffix}",
                    "label": None,
                    "height": picture.shape[0],
                    "width": picture.shape[1],
                }
            )
        write_jsonl(folder / f"{name}.jsonl", rows)
        write_json(folder / f"{name}.json", {"label_map": None})
    write_json(folder / "roots.json", {"day": str(data), "night": str(data)})
    return folder


def made(out, *, progress=None, seed=0, round_=0, prompts=None, pictures=None, **section):
    out.mkdir(exist_ok=True)
    recipe = tiny_recipe(synthesize=PAINT | section, seed=seed)
    summary = synthesize.run(
        stage_config(recipe, "synthesize", round=round_),
        out=out,
        progress=progress or Told(),
        prompts=prompts,
        unlabelled=pictures,
    )
    return list(read_index(out)), summary


def test_pictures_are_spread_evenly_over_the_prompts():
    rows = [{"id": name, "text": name} for name in "abc"]
    ids = [picture.id for picture in commission(rows, num_images=7, seed=0, round_=0)]
    assert ids == ["a-000", "b-000", "c-000", "a-001", "b-001", "c-001", "a-002"]


def test_every_picture_has_a_seed_of_its_own_from_seed_round_prompt_and_number():
    rows = [{"id": name, "text": name} for name in "ab"]
    pictures = commission(rows, num_images=4, seed=5, round_=2)
    assert len({picture.seed for picture in pictures}) == 4
    assert pictures[2].seed == item_seed(5, "synthesize", 2, "a", 1)
    other = commission(rows, num_images=4, seed=5, round_=1)
    assert {p.seed for p in pictures}.isdisjoint(p.seed for p in other)


def test_painted_pictures_carry_how_they_were_made(tmp_path, prompts):
    rows, summary = made(tmp_path / "out", prompts=prompts)
    assert [folder.name for folder in shard_folders(tmp_path / "out")] == [
        "shard-00000",
        "shard-00001",
        "shard-00002",
    ]
    assert len(rows) == 7
    for row in rows:
        with Image.open(row["folder"] / row["file"]) as picture:
            assert picture.size == (64, 32)
            assert picture.text["prompt"] == row["prompt"]
            assert picture.text["seed"] == str(row["seed"])
            assert (picture.text["model"], picture.text["steps"]) == ("random", "1")
        assert row["untrained"] is True
    assert {row["prompt_id"] for row in rows} == {"p0", "p1", "p2"}
    assert "untrained model" in summary.text


def test_jpeg_pictures_carry_the_same_in_their_comment(tmp_path, prompts):
    rows, _ = made(tmp_path / "out", prompts=prompts, num_images=3, format="jpg")
    with Image.open(rows[2]["folder"] / rows[2]["file"]) as picture:
        told = json.loads(picture.info["comment"])
    assert (told["prompt"], told["seed"]) == (rows[2]["prompt"], rows[2]["seed"])


@pytest.mark.parametrize("after", [2, 3, 5])
def test_an_interrupted_run_keeps_finished_shards_and_ends_the_same(tmp_path, prompts, after):
    made(tmp_path / "undisturbed", prompts=prompts)
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        made(out, prompts=prompts, progress=Interrupting(after=after))
    finished = [f for f in shard_folders(out) if (f / "shard.json").is_file()]
    stamps = {f.name: f.stat().st_mtime_ns for f in finished}
    told = Told()
    made(out, prompts=prompts, progress=told)
    assert told.started == [(7, "pictures", 3 * len(finished))]
    assert {f.name: f.stat().st_mtime_ns for f in finished} == stamps
    assert digests(out) == digests(tmp_path / "undisturbed")


def test_a_truncated_picture_is_painted_again(tmp_path, prompts):
    rows, _ = made(tmp_path / "out", prompts=prompts)
    before = digests(tmp_path / "out")
    victim = rows[4]["folder"] / rows[4]["file"]
    victim.write_bytes(victim.read_bytes()[:100])
    made(tmp_path / "out", prompts=prompts)
    assert digests(tmp_path / "out") == before


def test_other_seeds_paint_other_pictures(tmp_path, prompts):
    one, _ = made(tmp_path / "one", prompts=prompts)
    other, _ = made(tmp_path / "other", prompts=prompts, seed=1)
    assert {row["seed"] for row in one}.isdisjoint(row["seed"] for row in other)


def test_a_batch_that_does_not_fit_into_memory_is_halved_and_recorded(
    tmp_path, prompts, monkeypatch
):
    paint, sizes = Painter.paint_checked, []

    def paint_little(self, texts, **how):
        sizes.append(len(texts))
        if len(texts) > 1:
            raise torch.OutOfMemoryError("not enough")
        return paint(self, texts, **how)

    monkeypatch.setattr(Painter, "paint_checked", paint_little)
    told = Told()
    rows, _ = made(tmp_path / "out", prompts=prompts, num_images=3, batch_size=3, progress=told)
    assert sizes == [3, 3, 2, 1, 1, 1]
    assert [row["batch_size"] for row in rows] == [1, 1, 1]
    assert told.notes == [
        "out of memory with 3 pictures at once: decoded one by one",
        "out of memory with 3 pictures at once: 2 instead",
        "out of memory with 2 pictures at once: 1 instead",
    ]


class SmallMemory:
    """Lets the real decoder run out of memory for more than so many pictures, or so wide ones."""

    def __init__(self, *, pictures: int, width: int) -> None:
        self.pictures, self.width = pictures, width
        self.forward = Decoder.forward

    def __call__(self, latents_BCHW, *args, **how):
        if len(latents_BCHW) > self.pictures or latents_BCHW.shape[-1] > self.width:
            raise torch.OutOfMemoryError("not enough")
        return self.forward(self.decoder, latents_BCHW, *args, **how)

    def __get__(self, decoder, _owner):
        self.decoder = decoder
        return self


def test_where_only_decoding_lacks_memory_pictures_are_decoded_one_by_one(
    tmp_path, prompts, monkeypatch
):
    plain, _ = made(tmp_path / "plain", prompts=prompts, num_images=2)
    monkeypatch.setattr(Decoder, "forward", SmallMemory(pictures=1, width=99))
    told = Told()
    rows, _ = made(tmp_path / "out", prompts=prompts, num_images=2, progress=told)
    assert told.notes == ["out of memory with 2 pictures at once: decoded one by one"]
    assert all("batch_size" not in row and "tiled" not in row for row in rows)
    for one, other in zip(plain, rows, strict=True):
        pictures = [
            np.asarray(Image.open(row["folder"] / row["file"]), int) for row in (one, other)
        ]
        assert np.abs(pictures[0] - pictures[1]).max() <= 1  # rounding, by batch size


def test_a_picture_too_large_to_decode_is_decoded_in_tiles_and_that_is_recorded(
    tmp_path, prompts, monkeypatch
):
    monkeypatch.setattr(Decoder, "forward", SmallMemory(pictures=1, width=8))
    told = Told()
    rows, _ = made(tmp_path / "out", prompts=prompts, num_images=2, progress=told)
    assert told.notes[-1] == "out of memory with a single picture: decoded in tiles"
    assert all(row["tiled"] for row in rows)


def test_tiles_can_be_asked_for(tmp_path, prompts):
    rows, _ = made(tmp_path / "out", prompts=prompts, num_images=1, vae_tiling=True)
    assert rows[0]["tiled"]


def test_spare_pictures_come_last_and_change_no_other(tmp_path, prompts):
    rows, summary = made(tmp_path / "out", prompts=prompts, num_images=4, spare=0.3)
    plain, _ = made(tmp_path / "plain", prompts=prompts, num_images=4)
    assert [row["id"] for row in rows] == [
        "p0-000",
        "p1-000",
        "p2-000",
        "p0-001",
        "p1-001",
        "p2-001",
    ]
    assert [row.get("spare", False) for row in rows] == [False] * 4 + [True] * 2
    assert [row["seed"] for row in rows[:4]] == [row["seed"] for row in plain]
    assert summary.text.startswith("6 pictures painted")


def test_what_the_safety_checker_flags_is_black_recorded_and_told(tmp_path, prompts):
    how = {"prompts": prompts, "num_images": 3, "model": str(tmp_path / "model")}
    save_checked_painter(tmp_path / "model")
    plain, summary = made(tmp_path / "plain", **how)
    assert not any(row.keys() & {"safety_checker", "flagged"} for row in plain)
    assert "flagged" not in summary.text
    like = plain[1]["folder"] / plain[1]["file"]
    save_checked_painter(tmp_path / "model", like=like)
    rows, summary = made(tmp_path / "out", **how, safety_checker=True)
    assert [row.get("flagged", False) for row in rows] == [False, True, False]
    assert [row["safety_checker"] for row in rows] == [True] * 3
    for row, before in zip(rows, plain, strict=True):
        with (
            Image.open(row["folder"] / row["file"]) as picture,
            Image.open(before["folder"] / before["file"]) as unchecked,
        ):
            assert picture.text["safety_checker"] == "True"
            seen = np.asarray(picture)
            assert np.array_equal(seen, 0 * seen if "flagged" in row else np.asarray(unchecked))
    assert summary.text.endswith("1 flagged by the safety checker")
    assert summary.numbers["flagged"] == 1


def test_collected_pictures_have_no_painter_to_check_them():
    with pytest.raises(ValueError, match=r"safety_checker is on, .*collect paints nothing"):
        tiny_recipe(synthesize={"mode": "collect", "safety_checker": True})


def test_spare_pictures_cannot_be_collected():
    with pytest.raises(ValueError, match=r"synthesize\.spare is 0\.5.*paints nothing"):
        tiny_recipe(synthesize={"mode": "collect", "spare": 0.5})


def test_a_single_picture_that_does_not_fit_is_an_error_with_a_way_out(
    tmp_path, prompts, monkeypatch
):
    def paint_nothing(self, texts, **how):
        raise torch.OutOfMemoryError("not enough")

    monkeypatch.setattr(Painter, "paint_checked", paint_nothing)
    with pytest.raises(MemoryError, match="smaller size"):
        made(tmp_path / "out", prompts=prompts)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"id": "a", "text": "A road."}', '{"id": "b", "text": '], "line 2: not JSON"),
        (['{"id": "a", "text": "A road."}', '{"id": "b"}'], "line 2: 'text' must be"),
        (['{"id": "a", "text": " "}'], "line 1: 'text' must be"),
        (['{"text": "A road."}'], "line 1: 'id' must be"),
        (['{"id": "a", "text": "x"}', '{"id": "a", "text": "y"}'], "used in line 1"),
        (['{"id": "../a", "text": "x"}'], "becomes a file name"),
        (["[1, 2]"], "expected a JSON object"),
        ([], "holds no prompts"),
        (
            ["", '{"id": "a", "text": "x"}', "", "{", "7"],
            r"line 4: not JSON[^\n]*\n  line 5: expected",
        ),
        (["{"] * 8, "line 5: .*\n  and 3 more"),
    ],
)
def test_broken_prompts_are_named_by_their_line(tmp_path, lines, message):
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "prompts.jsonl")


def test_missing_prompts_name_the_command_that_makes_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="--stage write_prompts"):
        read_prompts(tmp_path / "prompts.jsonl")
    with pytest.raises(ValueError, match="--stage write_prompts"):
        made(tmp_path / "out")


def test_missing_weights_stop_the_stage_before_any_work(tmp_path, prompts):
    told = Told()
    with pytest.raises(FileNotFoundError, match="hf download"):
        made(tmp_path / "out", prompts=prompts, model="clouds-nobody/none", progress=told)
    assert told.started == []
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("suffix", "saved"), [(".png", ".png"), (".jpg", ".jpg"), (".bmp", ".png")]
)
def test_collected_pictures_are_the_originals_evenly_spaced(tmp_path, suffix, saved):
    pictures = unlabelled(tmp_path / "unlabelled", suffix=suffix)
    rows, summary = made(tmp_path / "out", pictures=pictures, mode="collect", num_images=4)
    assert [row["id"] for row in rows] == ["day/00", "day/02", "night/00", "night/02"]
    assert [row["file"] for row in rows] == [
        f"{name}{saved}" for name in ("day+00", "day+02", "night+00", "night+02")
    ]
    assert summary.text == "4 pictures collected in 2 shards"
    for row in rows:
        name, number = row["id"].split("/")
        original = pictures / "data" / f"{name}{int(number)}{suffix}"
        copy = row["folder"] / row["file"]
        assert np.array_equal(np.asarray(Image.open(copy)), np.asarray(Image.open(original)))
        assert (copy.read_bytes() == original.read_bytes()) is (suffix == saved)
        assert row["prompt"] is None
        assert row["collected"] is True


def test_collecting_more_than_there_is_takes_all_and_says_so(tmp_path):
    told = Told()
    rows, _ = made(
        tmp_path / "out",
        pictures=unlabelled(tmp_path / "unlabelled", count=2),
        mode="collect",
        num_images=50,
        progress=told,
    )
    assert len(rows) == 4
    assert told.notes == ["synthesize.num_images is 50; data.unlabelled has 4"]


def test_an_interrupted_collection_ends_the_same(tmp_path):
    pictures = unlabelled(tmp_path / "unlabelled")
    made(tmp_path / "undisturbed", pictures=pictures, mode="collect")
    with pytest.raises(Interrupted):
        made(tmp_path / "out", pictures=pictures, mode="collect", progress=Interrupting(after=4))
    made(tmp_path / "out", pictures=pictures, mode="collect")
    assert digests(tmp_path / "out") == digests(tmp_path / "undisturbed")


def test_collecting_without_pictures_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data\.unlabelled"):
        made(tmp_path / "out", mode="collect")
    empty = tmp_path / "unlabelled"
    empty.mkdir()
    write_json(empty / "roots.json", {})
    with pytest.raises(FileNotFoundError, match="found no picture"):
        made(tmp_path / "out", pictures=empty, mode="collect")
