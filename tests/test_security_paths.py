"""No path that a manifest, an index or something adopted names leads out of its folder."""

import json
import shutil
from pathlib import Path

import pytest

from flows.digests import digest_of
from flows.outputs import StoreError, problems_of
from flows.recipes import ConfigError
from flows.steps import StageError
from flows.store import Store
from stages.adoption import adopt
from stages.readers import load_index
from stages.shards import (
    ShardJob,
    is_plain_name,
    read_index,
    shard_problem,
    stays_inside,
    write_json,
    write_jsonl,
    write_shards,
)
from tests import toy_pipeline
from tests.tiny import Told, write_sources

OUTSIDE = ["../secret.txt", "/etc/hostname", "a/../../secret.txt", "..", "..\\secret.txt", "", 7]
"""Names that an index must not give (a plain name has no slash either)."""


@pytest.mark.parametrize("path", OUTSIDE)
def test_what_leads_outside_is_neither_a_plain_name_nor_inside(path):
    assert not is_plain_name(path)
    assert not stays_inside(path)


def test_what_stays_inside_is_taken():
    assert all(map(is_plain_name, ("a.png", "..a", "a..b", "ä b+c.label.png")))
    assert all(map(stays_inside, ("a.png", "a/b/c.png", "..a/b")))
    assert not is_plain_name("a/b")


# The store


@pytest.fixture
def made(tmp_path):
    """A toy pipeline that ran; gives its store."""
    engine = toy_pipeline.engine(tmp_path / "artifacts")
    engine.store.open()
    for instance in engine.instances.values():
        engine.run_one(instance, listener=toy_pipeline.Ears(), execute=toy_pipeline.in_process)
    (tmp_path / "secret.txt").write_text("secret")
    return engine.store


def artifact(store: Store, name: str) -> Path:
    return store.folder(name, store.newest(name)["key"])


def rewrite_manifest(folder: Path, **changes) -> None:
    """Change a manifest and seal it again, as one would who knows how."""
    whole = json.loads((folder / "manifest.json").read_text()) | changes
    del whole["seal"]
    write_json(folder / "manifest.json", whole | {"seal": digest_of(whole)})


@pytest.mark.parametrize("path", ["../secret.txt", "/etc/hostname", "a/../../secret.txt"])
def test_a_manifest_that_names_a_file_outside_is_unsafe(made, path):
    folder = artifact(made, "sum")
    entry = {"bytes": 6, "digest": "x", "mtime_ns": 0}
    rewrite_manifest(folder, outputs={path: entry})
    (problem,) = problems_of(folder, made.manifest(folder), full=True)
    assert (problem.path, problem.state) == (path, "unsafe")


def test_a_link_on_the_way_to_an_output_is_unsafe(made, tmp_path):
    folder = artifact(made, "sum")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(folder / "sum.txt", elsewhere)
    (folder / "part").symlink_to(elsewhere)
    manifest = made.manifest(folder)
    outputs = {f"part/{path}": entry for path, entry in manifest["outputs"].items()}
    rewrite_manifest(folder, outputs=outputs)
    states = {str(problem) for problem in problems_of(folder, made.manifest(folder))}
    assert "part/sum.txt is unsafe" in states


def test_a_link_in_a_shard_is_unsafe_and_the_shard_is_made_again(made, tmp_path):
    folder = artifact(made, "numbers")
    shard = next(folder.glob("shard-*"))
    victim = next(path for path in shard.iterdir() if path.suffix == ".jsonl")
    victim.rename(tmp_path / "moved")
    victim.symlink_to(tmp_path / "moved")
    (problem,) = problems_of(folder, made.manifest(folder))
    assert problem.state.startswith("unsafe")
    assert shard_problem(shard) == f"{shard.name}/{victim.name} is missing"
    engine = toy_pipeline.engine(made.root)
    ears = toy_pipeline.Ears()
    numbers = engine.instances["numbers"]
    engine.run_one(numbers, listener=ears, execute=toy_pipeline.in_process)
    assert ears.ran == ["numbers"]
    assert not any(path.is_symlink() for path in folder.rglob("*"))


def test_a_shards_own_list_cannot_lead_outside(made):
    folder = artifact(made, "numbers")
    shard = next(folder.glob("shard-*"))
    listed = json.loads((shard / "shard.json").read_text())
    listed["files"]["../../secret.txt"] = {"bytes": 6, "digest": "x"}
    write_json(shard / "shard.json", listed)
    problems = problems_of(folder, made.manifest(folder), full=True)
    assert problems
    assert shard_problem(shard) is not None


def test_another_artifacts_manifest_is_refused(made):
    folder = artifact(made, "sum")
    rewrite_manifest(folder, key="../../elsewhere")
    with pytest.raises(StoreError, match="another artifact"):
        made.manifest(folder)


@pytest.mark.parametrize(
    "pins", [{"sum": "../../elsewhere"}, {"../sum": "0" * 20}, {"sum": "/etc"}, {"sum": 7}]
)
def test_a_pin_cannot_lead_outside(made, pins):
    write_json(made.root / "adopted.json", pins)
    with pytest.raises(StoreError, match=r"adopted\.json names"):
        made.pins()


def test_a_stage_cannot_leave_a_link_in_a_shard(tmp_path):
    engine = toy_pipeline.engine(tmp_path)
    engine.store.open()

    def with_link(spec, progress, lock):
        summary = toy_pipeline.in_process(spec, progress, lock)
        shard = next(Path(spec["out"]).glob("shard-*"))
        (shard / "link.txt").symlink_to("/etc/hostname")
        return summary

    numbers = engine.instances["numbers"]
    with pytest.raises((StoreError, StageError), match="is a link"):
        engine.run_one(numbers, listener=toy_pipeline.Ears(), execute=with_link)
    assert not list(engine.store.artifacts())


# Indexes


@pytest.mark.parametrize("field", ["file", "label", "confidence"])
@pytest.mark.parametrize("name", [*OUTSIDE, "deeper/a.png"])
def test_an_index_cannot_name_a_file_outside_its_shard(tmp_path, field, name):
    job = ShardJob(
        items=["a"],
        shard_size=1,
        unit="pictures",
        open=lambda _: lambda items, folder: [{"id": "a", field: name}],
    )
    write_shards(tmp_path, job, progress=Told())
    with pytest.raises(ValueError, match=rf"index\.jsonl: '{field}' of 'a' is .* no file of its"):
        list(read_index(tmp_path))


@pytest.mark.parametrize("field", ["id", "image", "label"])
@pytest.mark.parametrize("path", ["../secret.png", "/etc/hostname", "a/../../secret.png"])
def test_a_data_sets_index_cannot_lead_out_of_it(tmp_path, field, path):
    part = write_sources(tmp_path / "sources", data=tmp_path / "data")
    (index,) = part.glob("*.jsonl")
    rows = [json.loads(line) for line in index.read_text().splitlines()]
    rows[0][field] = path
    write_jsonl(index, rows)
    with pytest.raises(ValueError, match="leads out of the data set's folder"):
        load_index(part)


# Adoption


def test_a_picture_that_is_a_link_to_elsewhere_is_not_adopted(tmp_path):
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    out.mkdir()
    (tmp_path / "private.png").write_bytes(b"private")
    (pictures / "a.png").symlink_to("../private.png")
    with pytest.raises(ValueError, match=r"a\.png is a link to .*private\.png, which is not below"):
        adopt("synthesize", pictures, labels="cityscapes19", out=out, progress=Told())
    assert not list(out.iterdir())


def test_a_prompt_whose_id_would_lead_outside_is_not_painted(tmp_path):
    from stages.synthesize import read_prompts

    write_jsonl(tmp_path / "prompts.jsonl", [{"id": "../../x", "text": "A street."}])
    with pytest.raises(ValueError, match="becomes a file name"):
        read_prompts(tmp_path / "prompts.jsonl")


@pytest.mark.parametrize("name", ["../x", "a/b", "/x", ""])
def test_a_leg_cannot_be_named_by_a_path(tmp_path, name):
    from flows.recipes import validate
    from stages.config import Recipe

    with pytest.raises(ConfigError, match="letters, digits and _ only"):
        validate({"name": "x", "legs": {name: {}}}, model=Recipe, place="recipe 'x'")
