"""Stage write_prompts, with the bank and with a real (tiny, random) language model."""

import json
from collections import Counter

import pytest
import torch

from models.writer import Reply, Writer, load_writer, save_random_writer
from prompts.loader import load_bank
from stages import write_prompts
from stages.labels import load_labelspace
from stages.shards import read_jsonl, write_jsonl
from tests.interruptions import digests
from tests.tiny import Told, stage_config, tiny_recipe

torch.set_num_threads(1)


@pytest.fixture
def labelspace(tmp_path):
    folder = tmp_path / "labelspace"
    folder.mkdir()
    load_labelspace("cityscapes19").save(folder)
    return folder


def config(seed: int = 0, round_: int = 0, **section):
    recipe = tiny_recipe(write_prompts=section, seed=seed)
    return stage_config(recipe, "write_prompts", round=round_)


def written(
    out, labelspace, *, sources=None, labelled=None, told=None, seed=0, round_=0, **section
):
    out.mkdir(exist_ok=True)
    summary = write_prompts.run(
        config(seed, round_, **section),
        out=out,
        progress=told or Told(),
        labelspace=labelspace,
        sources=sources,
        labelled=labelled,
    )
    statistics = json.loads((out / "statistics.json").read_text())
    return read_jsonl(out / "prompts.jsonl"), statistics, summary


RANDOM = {"model": "random", "num_prompts": 4, "max_attempts": 1, "max_new_tokens": 8}


def test_the_bank_gives_distinct_prompts_and_says_so(tmp_path, labelspace):
    told = Told()
    rows, statistics, summary = written(tmp_path / "out", labelspace, num_prompts=40, told=told)
    assert [row["id"] for row in rows] == [f"p{number:05d}" for number in range(40)]
    assert len({row["text"] for row in rows}) == 40
    assert {row["model"] for row in rows} == {"bank"}
    assert statistics["from_bank"] == 40
    assert told.started == [(40, "prompts", 0)]
    assert told.advanced == 40
    assert summary.text == "40 prompts, 40 from the shipped bank"


def test_forty_prompts_of_the_bank_name_every_class(tmp_path, labelspace):
    rows, statistics, _ = written(tmp_path / "out", labelspace, num_prompts=40)
    named = Counter(name for row in rows for name in row["classes"])
    assert min(named[name] for name in statistics["classes"]) >= 3
    assert {name: entry["named"] for name, entry in statistics["classes"].items()} == dict(named)


def test_the_whole_bank_can_be_asked_for_and_not_more(tmp_path, labelspace):
    rows, _, _ = written(tmp_path / "out", labelspace, num_prompts=len(load_bank()))
    assert {row["text"] for row in rows} == {prompt.text for prompt in load_bank()}
    with pytest.raises(ValueError, match=f"bank holds {len(load_bank())}"):
        written(tmp_path / "more", labelspace, num_prompts=len(load_bank()) + 1)


def test_an_untrained_writer_is_asked_again_and_the_bank_fills_the_gap(tmp_path, labelspace):
    rows, statistics, summary = written(tmp_path / "out", labelspace, **RANDOM)
    assert statistics["replies"]["asked"] == 8
    assert statistics["replies"]["valid"] == 0
    assert sum(statistics["replies"]["refused"].values()) == 8
    assert statistics["from_bank"] == len(rows) == 4
    assert "0 of 8 replies valid" in summary.text
    assert not (tmp_path / "out" / "state").exists()


def test_prompts_depend_on_seed_and_round_and_on_nothing_else(tmp_path, labelspace):
    for name, how in {
        "one": {},
        "same": {},
        "seed": {"seed": 1},
        "round": {"round_": 2},
    }.items():
        written(tmp_path / name, labelspace, num_prompts=6, **how)
    one, same, seed, round_ = (digests(tmp_path / n) for n in ("one", "same", "seed", "round"))
    assert one == same
    assert one["prompts.jsonl"] not in (seed["prompts.jsonl"], round_["prompts.jsonl"])


def test_an_interrupted_run_asks_for_no_reply_twice_and_ends_the_same(
    tmp_path, labelspace, monkeypatch
):
    section = RANDOM | {"batch_size": 2}
    written(tmp_path / "undisturbed", labelspace, **section)
    calls = []
    write = Writer.write

    def write_until_stopped(self, conversations, **how):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(how["seeds"])
        return write(self, conversations, **how)

    monkeypatch.setattr(Writer, "write", write_until_stopped)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "out", labelspace, **section)
    assert len(list((tmp_path / "out" / "state").iterdir())) == 3

    def write_and_count(self, conversations, **how):
        calls.append(how["seeds"])
        return write(self, conversations, **how)

    monkeypatch.setattr(Writer, "write", write_and_count)
    written(tmp_path / "out", labelspace, **section)
    assert len(calls) == len({tuple(seeds) for seeds in calls}) == 4
    assert digests(tmp_path / "out") == digests(tmp_path / "undisturbed")


class Scripted(Writer):
    """Answers every request as told, two of three times; stands for a trained writer."""

    def write(self, conversations, *, seeds, **how):
        return [self._reply(turns, seed) for turns, seed in zip(conversations, seeds, strict=True)]

    def _reply(self, turns, seed):
        if seed % 3 == 0:
            return Reply(text="Sure, here you are.", finished=True)
        marker = "named in the description: "
        request = next(t["content"] for t in reversed(turns) if marker in t["content"])
        classes = request.split(marker)[1].split(".")[0].replace(", ", " and a ")
        text = f"A street number {seed} with a {classes} of the {seed % 97}th day at the end."
        return Reply(text=text, finished=True)


def test_valid_replies_are_kept_with_their_seed_and_bad_ones_are_asked_again(
    tmp_path, labelspace, monkeypatch
):
    real = load_writer("random")
    scripted = Scripted(model=real.model, tokenizer=real.tokenizer)
    monkeypatch.setattr(write_prompts, "load_writer", lambda *args, **how: scripted)
    rows, statistics, _ = written(
        tmp_path / "out", labelspace, model="some/writer", num_prompts=12, max_attempts=30
    )
    assert statistics["from_bank"] == 0
    assert statistics["replies"]["valid"] == 12
    assert statistics["replies"]["asked"] == 12 + sum(statistics["replies"]["refused"].values())
    assert statistics["replies"]["refused"]
    for row in rows:
        assert row["model"] == "some/writer"
        assert f"number {row['seed']} " in row["text"]
        assert all(name in row["text"] for name in row["classes"])
        assert set(row["attributes"]) >= {"place", "time", "weather", "camera"}


def test_too_few_valid_replies_stop_the_stage_if_wanted(tmp_path, labelspace):
    with pytest.raises(ValueError, match=r"only 0 of 8 replies of 'random' are valid"):
        written(tmp_path / "out", labelspace, **RANDOM, min_valid_share=0.5)


def test_classes_rare_in_the_sources_are_asked_for_more_often(tmp_path, labelspace):
    sources = tmp_path / "sources"
    sources.mkdir()
    common = {str(train_id): 90_000 for train_id in range(19)}
    write_jsonl(sources / "day.jsonl", [{"id": "day/0", "classes": common | {"12": 100}}])
    _, statistics, _ = written(tmp_path / "out", labelspace, sources=sources, num_prompts=60)
    entries = statistics["classes"]
    assert entries["rider"]["weight"] == 3.0
    assert entries["car"]["weight"] == 1.0
    assert entries["rider"]["asked"] >= 2 * entries["car"]["asked"]


@pytest.mark.parametrize(("aim", "rider", "pole"), [(0.0, 1, 1), (0.5, 2, 1.5), (1.0, 3, 2)])
def test_the_plan_aims_at_what_was_rare_or_uncertain_in_the_round_before(
    tmp_path, labelspace, aim, rider, pole
):
    labelled = tmp_path / "labelled"
    labelled.mkdir()
    classes = {str(k): {"pixels": 4000, "mean_confidence": 0.5} for k in range(19) if k != 12}
    classes["5"] = {"pixels": 1000, "mean_confidence": 0.5}
    (labelled / "statistics.json").write_text(json.dumps({"classes": classes}))
    _, statistics, _ = written(
        tmp_path / "out", labelspace, labelled=labelled, num_prompts=10, aim=aim
    )
    weights = {name: entry["weight"] for name, entry in statistics["classes"].items()}
    assert (weights["rider"], weights["pole"], weights["car"]) == (rider, pole, 1)


def test_missing_weights_stop_the_stage_before_any_work(tmp_path, labelspace):
    told = Told()
    with pytest.raises(FileNotFoundError, match="hf download"):
        written(tmp_path / "out", labelspace, told=told, model="clouds-nobody/none")
    assert told.started == []
    assert list((tmp_path / "out").iterdir()) == []


def test_a_local_folder_of_a_writer_leaves_no_path_of_this_machine(tmp_path, labelspace):
    save_random_writer(tmp_path / "my-writer", seed=0)
    out = tmp_path / "out"
    written(out, labelspace, **RANDOM | {"model": str(tmp_path / "my-writer")})
    assert all(str(tmp_path) not in path.read_text() for path in out.rglob("*.json*"))
