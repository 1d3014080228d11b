"""The command line as a user meets it: what it prints, its exit codes, and mistakes explained."""

import errno
import json
import re
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image

from flows.check import look
from flows.cli import main
from flows.engine import Engine
from flows.recipes import load_recipe
from flows.store import Store

RECIPE = """
description: two streets
data:
  sources: [{{name: streets, layout: cityscapes, root: {root}, split: train}}]
  targets: [{{name: held_back, layout: cityscapes, root: {root}, split: val}}]
"""


def write_sample(root, split, stem, label=7, size=(64, 32)):
    image = root / "leftImg8bit" / split / "town" / f"{stem}_leftImg8bit.png"
    labels = root / "gtFine" / split / "town" / f"{stem}_gtFine_labelIds.png"
    for path in (image, labels):
        path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(stem))
    Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(image)
    Image.fromarray(np.full((32, 64), label, dtype=np.uint8)).save(labels)
    return image, labels


@pytest.fixture
def streets(tmp_path):
    """A small data set and a recipe for it; returns (data set's root, arguments)."""
    root = tmp_path / "data"
    for split in ("train", "val"):
        for number in range(2):
            write_sample(root, split, f"town_{number:06d}_000000")
    recipe = tmp_path / "streets.yaml"
    recipe.write_text(RECIPE.format(root=root))
    return root, ["--recipe", str(recipe), "--artifacts", str(tmp_path / "artifacts")]


def prepare(arguments, *more):
    return main([*arguments, "--stage", "prepare", *more])


def test_prepare_runs_once_and_its_record_can_be_shown(streets, capsys, tmp_path):
    root, arguments = streets
    assert prepare(arguments) == 0
    assert "2 sources" in capsys.readouterr().out
    assert prepare(arguments) == 0
    assert "nothing to do" in capsys.readouterr().out
    store = ["--artifacts", str(tmp_path / "artifacts")]
    assert main(["status", *store]) == 0
    assert "prepare" in capsys.readouterr().out
    assert main(["show", "prepare", *store]) == 0
    shown = capsys.readouterr().out
    assert "digest" in shown
    assert "nothing yet" in shown
    assert main(["verify", "--full", *store]) == 0
    assert main(["plan", *arguments, "--stage", "prepare"]) == 0
    capsys.readouterr()
    assert main(["plan", *arguments, "--json"]) == 3
    plan = json.loads(capsys.readouterr().out)
    assert plan[0] | {"key": "", "folder": ""} == {
        "instance": "prepare",
        "action": "SKIP",
        "reason": "done",
        "changes": [],
        "key": "",
        "folder": "",
        "resumes": None,
        "held_by": None,
        "last_seconds": None,
        "estimate_s": None,
        "estimate_bytes": None,
    }
    write_sample(root, "train", "town_000009_000000")
    main(["plan", *arguments])
    assert "files of streets changed" in capsys.readouterr().out


def test_moved_data_does_not_rerun_what_was_made_of_it(streets, tmp_path):
    root, arguments = streets
    prepare(arguments)
    first = Store(tmp_path / "artifacts").newest("prepare")
    shutil.move(root, tmp_path / "elsewhere")
    override = ["--set", f"data.sources.0.root={tmp_path / 'elsewhere'}"]
    override += ["--set", f"data.targets.0.root={tmp_path / 'elsewhere'}"]
    assert prepare(arguments, *override) == 0
    second = Store(tmp_path / "artifacts").newest("prepare")
    assert first["key"] != second["key"]
    assert first["digest"] == second["digest"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--recipe", "miniatur"], "did you mean 'miniature'"),
        (["--set", "evaluate.batch_sise=3"], "did you mean 'batch_size'"),
        (["--stage", "refin"], "did you mean 'refine'"),
        (["--set", "data.labels=cityscapes"], "cityscapes19"),
        (["--set", "data.sources.0.root=/nowhere"], "/nowhere"),
        (["--set", "data.sources.0.split=trian"], "trian"),
        (["--set", "refine.weights=builtin:nothing"], "builtin:nothing"),
        (["--stage", "evaluate"], "--stage prepare"),
        (["--force", "refind"], "did you mean 'refine'"),
    ],
)
def test_mistakes_stop_before_any_work(streets, capsys, tmp_path, more, said):
    _, arguments = streets
    assert main([*arguments, *more]) == 2
    assert said in capsys.readouterr().err
    assert not list(Store(tmp_path / "artifacts").artifacts())


def damage_picture(root):
    image = next(root.glob("leftImg8bit/train/*/*.png"))
    image.write_bytes(image.read_bytes()[:100])
    return image.name


def damage_label(root):
    label = next(root.glob("gtFine/train/*/*.png"))
    Image.fromarray(np.full((32, 64), 77, dtype=np.uint8)).save(label)
    return label.name


def damage_size(root):
    return write_sample(root, "train", "town_000005_000000", size=(32, 32))[0].name


@pytest.mark.parametrize("damage", [damage_picture, damage_label, damage_size])
def test_a_bad_file_is_named_and_the_error_kept(streets, capsys, tmp_path, damage):
    root, arguments = streets
    name = damage(root)
    assert prepare(arguments) == 1
    said = capsys.readouterr().err
    assert name.split("_gtFine")[0].split("_leftImg8bit")[0] in said
    assert "Traceback" not in said
    assert main(["status", "--artifacts", str(tmp_path / "artifacts")]) == 0
    assert "failed" in capsys.readouterr().out


def test_a_corrupt_picture_is_left_out_only_if_asked(streets, capsys):
    root, arguments = streets
    damage_picture(root)
    assert prepare(arguments, "--set", "prepare.on_corrupt=skip") == 0
    assert "1 sources" in capsys.readouterr().out


def test_an_empty_folder_says_what_it_expected(streets, capsys):
    root, arguments = streets
    for path in root.glob("leftImg8bit/train/*/*.png"):
        path.unlink()
    assert prepare(arguments) == 2
    said = capsys.readouterr().err
    assert "leftImg8bit" in said
    assert "streets" in said


def test_damage_is_told_by_verify(streets, capsys, tmp_path):
    _, arguments = streets
    prepare(arguments)
    store = Store(tmp_path / "artifacts")
    folder = store.folder("prepare", store.newest("prepare")["key"])
    index = folder / "sources" / "streets.jsonl"
    index.write_text(index.read_text().replace("town", "toxn", 1))
    capsys.readouterr()
    assert main(["verify", "--artifacts", str(tmp_path / "artifacts")]) == 1
    assert "sources/streets.jsonl is altered" in capsys.readouterr().out
    assert prepare(arguments) == 0
    assert main(["verify", "--full", "--artifacts", str(tmp_path / "artifacts")]) == 0


def test_adopted_prompts_and_pictures_stand_in_until_undone(streets, capsys, tmp_path):
    _, arguments = streets
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A street in the rain.\nA road at noon.\n")
    assert main(["adopt", "write_prompts", str(prompts), *arguments]) == 0
    pictures = tmp_path / "pictures"
    shutil.copytree(tmp_path / "data" / "leftImg8bit", pictures)
    assert main(["adopt", "synthesize", str(pictures), *arguments]) == 0
    capsys.readouterr()
    main(["plan", *arguments])
    out = capsys.readouterr().out
    assert out.count("adopted from") == 2
    store = Store(tmp_path / "artifacts")
    lines = (
        store.folder("write_prompts", store.pins()["write_prompts"]) / "prompts.jsonl"
    ).read_text()
    assert json.loads(lines.splitlines()[0])["text"] == "A street in the rain."
    assert main(["adopt", "synthesize", "--undo", *arguments]) == 0
    capsys.readouterr()
    main(["plan", *arguments])
    assert capsys.readouterr().out.count("adopted from") == 1


def test_pictures_that_would_share_an_id_are_not_adopted(streets, capsys, tmp_path):
    _, arguments = streets
    picture = next((tmp_path / "data").rglob("*_leftImg8bit.png"))
    pictures = tmp_path / "pictures"
    (pictures / "a").mkdir(parents=True)
    shutil.copyfile(picture, pictures / "a" / "b.png")
    shutil.copyfile(picture, pictures / "a__b.png")
    assert main(["adopt", "synthesize", str(pictures), *arguments]) == 2
    assert "would both be 'a__b'" in capsys.readouterr().err


def test_damage_to_what_was_adopted_is_named_with_a_way_out(streets, capsys, tmp_path):
    _, arguments = streets
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A street in the rain.\n")
    assert main(["adopt", "write_prompts", str(prompts), *arguments]) == 0
    store = Store(tmp_path / "artifacts")
    folder = store.folder("write_prompts", store.pins()["write_prompts"])
    (folder / "prompts.jsonl").unlink()
    capsys.readouterr()
    assert main(["plan", *arguments]) == 2
    said = capsys.readouterr().err
    assert "prompts.jsonl is missing" in said
    undone = said.partition("count: python flows/clouds.py ")[2]
    assert main(shlex.split(undone)) == 0
    assert main(["plan", *arguments]) == 3


@pytest.mark.parametrize(
    ("stage", "content", "said"),
    [
        ("write_prompts", b"", "no prompts"),
        ("write_prompts", b'{"text": "a"}\n\n{"txt": 1}\n{\n', "line 3: 'text' must be"),
        ("write_prompts", b'{"text": "a", "id": "a/b"}\n', "becomes a file name"),
        (
            "write_prompts",
            b'{"text": "a"}\n{"text": "Stra\xdfe"}\n',
            "line 2: not UTF-8 (byte 0xdf)",
        ),
        ("synthesize", b"x", "no folder"),
        ("train_source", b"x", "cannot adopt"),
        ("report", b"x", "cannot be adopted"),
    ],
)
def test_what_is_no_output_of_the_stage_is_not_adopted(
    streets, capsys, tmp_path, stage, content, said
):
    _, arguments = streets
    path = tmp_path / "thing.jsonl"
    path.write_bytes(content)
    assert main(["adopt", stage, str(path), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert Store(tmp_path / "artifacts").pins() == {}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("weights.pth", "A street in the rain.", "prompts come as .txt"),
        ("folder.txt", None, "cannot adopt"),
        ("list.txt", "A street in the rain.\nhello\n", "prompt 2 ('hello') is a single word"),
        ("files.txt", "models/clip/model.pth\n", "single word"),
        ("table.txt", "0.31 17 22 4\n", "signs rather than words"),
        ("bytes.txt", "A street\x00 in the rain", "control characters"),
        ("page.txt", "A street in the rain. " * 200, "has 4399 characters"),
        ("rows.jsonl", '{"text": "hello"}\n', "prompt 1 ('hello') is a single word"),
    ],
)
def test_what_does_not_look_like_prompts_is_not_adopted(
    streets, capsys, tmp_path, name, content, said
):
    _, arguments = streets
    path = tmp_path / name
    path.mkdir() if content is None else path.write_text(content)
    assert main(["adopt", "write_prompts", str(path), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert Store(tmp_path / "artifacts").pins() == {}


def test_prompts_of_any_language_are_adopted_without_the_editor_s_mark(streets, tmp_path):
    _, arguments = streets
    texts = ["Eine Straße im Regen, nachts", "雨の夜の街並み", "Улица под дождём", "two cars"]
    path = tmp_path / "prompts.TXT"
    path.write_bytes(("\ufeff" + "\r\n".join(texts)).encode())
    assert main(["adopt", "write_prompts", str(path), *arguments]) == 0
    store = Store(tmp_path / "artifacts")
    rows = store.folder("write_prompts", store.pins()["write_prompts"]) / "prompts.jsonl"
    assert [json.loads(row)["text"] for row in rows.read_text().splitlines()] == texts


def test_check_looks_at_everything_and_fails_with_what_is_missing(streets, capsys):
    root, arguments = streets
    assert main(["check", *arguments, "--set", "synthesize.model=random"]) == 0
    out = capsys.readouterr().out
    assert "2 samples" in out
    assert "memory" in out
    damage_label(root)
    assert main(["check", *arguments]) == 1
    assert "77" in capsys.readouterr().out


def test_config_show_prints_what_can_be_read_again(streets, capsys, tmp_path):
    _, arguments = streets
    assert main(["config", "show", *arguments[:2], "--set", "seed=5"]) == 0
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out)
    assert main(["config", "validate", "--recipe", str(again)]) == 0
    assert main(["config", "schema"]) == 0
    assert "train_source" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plna"], "unknown command 'plna'; did you mean 'plan'"),
        (["show", "/etc"], "no artifact '/etc'"),
        (["show", "../numbers"], "no artifact '../numbers'"),
    ],
)
def test_words_that_mean_nothing_are_explained(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.setenv("CLOUDS_ARTIFACTS", str(tmp_path))
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_a_disk_that_refuses_is_told_without_a_traceback(streets, capsys, monkeypatch):
    _, arguments = streets

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("flows.store.Store.commit", full)
    assert prepare(arguments) == 1
    assert "No space left on device" in capsys.readouterr().err


def test_status_of_nothing_says_so(tmp_path, capsys):
    assert main(["status", "--artifacts", str(tmp_path / "none")]) == 2
    assert "no artifacts folder" in capsys.readouterr().err


def test_the_version_is_said_with_its_revision_and_only_when_asked(streets, capsys, monkeypatch):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert re.fullmatch(r"clouds \S+( \([0-9a-f]{12}\+?\))?\n", capsys.readouterr().out)
    monkeypatch.setattr("flows.provenance.facts", None)
    _, arguments = streets
    assert main(["plan", *arguments]) == 3


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "examples:" in capsys.readouterr().out


def test_a_lost_manifest_is_named_and_latest_is_no_artifact(streets, capsys, tmp_path):
    _, arguments = streets
    prepare(arguments)
    store = Store(tmp_path / "artifacts")
    (folder,) = store.artifacts()
    store.point_latest("model", folder)
    capsys.readouterr()
    assert main(["verify", "--artifacts", str(tmp_path / "artifacts")]) == 0
    assert "all 1 artifacts are whole" in capsys.readouterr().out
    (folder / "manifest.json").unlink()
    assert main(["verify", "--artifacts", str(tmp_path / "artifacts")]) == 1
    assert "manifest.json is missing" in capsys.readouterr().out


def test_a_plan_of_what_lacks_its_needs_is_blocked_and_names_both_ways_out(streets, capsys):
    _, arguments = streets
    assert main(["plan", *arguments, "--stage", "evaluate"]) == 3
    out = capsys.readouterr().out
    assert "BLOCKED" in out
    assert "--stage prepare" in out
    assert "--until evaluate" in out


@pytest.mark.parametrize("command", ["plan", "check", "run"])
def test_an_artifacts_path_that_is_a_file_is_refused(streets, capsys, tmp_path, command):
    _, arguments = streets
    (tmp_path / "file").write_text("")
    assert main([command, *arguments[:2], "--artifacts", str(tmp_path / "file")]) == 2
    assert "--artifacts DIR" in capsys.readouterr().err


def test_check_says_what_is_unused_or_empty(streets, capsys):
    root, arguments = streets
    extra = f"data.unlabelled=[{{name: mine, layout: folder, root: {root}/leftImg8bit}}]"
    main(["check", *arguments, "--set", extra, "--set", "synthesize.model=random"])
    assert "synthesize.mode=collect" in capsys.readouterr().out
    assert main(["check", *arguments, "--set", "data.sources=[]"]) == 1
    assert "at least one labelled" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("synthesize.safety_checker=true", "'random' has none"),
        ("pseudo_label.class_thresholds={raod: 0.5}", "'raod' is no class .*did you mean 'road'"),
    ],
)
def test_check_refuses_what_would_stop_a_stage_later(streets, capsys, setting, said):
    _, arguments = streets
    more = ["--set", "synthesize.model=random", "--set", setting]
    assert main(["check", *arguments, *more]) == 1
    assert re.search(said, " ".join(capsys.readouterr().out.split()))


@pytest.mark.parametrize(
    ("rule", "needs"),
    [("all", "it needs select.rule=checks and a CLIP"), ("checks", "it needs a CLIP")],
)
def test_a_threshold_that_chooses_nothing_is_said(tmp_path, rule, needs):
    recipe = load_recipe("tiny", [f"select.rule={rule}", "select.min_similarity=0.9"])
    engine = Engine(recipe=recipe, store=Store(tmp_path))
    found = look(list(engine.instances.values()), store=engine.store)
    told = next(finding for finding in found if finding.what == "select.min_similarity")
    assert told.state == "warning"
    assert needs in told.text


def test_judging_an_average_that_nobody_keeps_stops_before_the_run(tmp_path, capsys):
    options = ["--recipe", "tiny", "--artifacts", str(tmp_path), "--set", "evaluate.weights=ema"]
    assert main(["run", *options]) == 2
    said = capsys.readouterr().err
    assert "evaluate@0" in said
    assert "set evaluate.weights=model, or train_source.ema.decay=0.999" in said
    assert not list(tmp_path.glob("train_source*"))
    recipe = load_recipe("tiny", ["evaluate.weights=ema", "train_source.ema.decay=0.99"])
    engine = Engine(recipe=recipe, store=Store(tmp_path))
    found = look(list(engine.instances.values()), store=engine.store)
    assert not [finding for finding in found if "evaluate.weights" in finding.what]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gc", "--older", "x"], "x: 0 or more days"),
        (["gc", "--keep-runs", "x"], "x: 1 or more runs"),
        (["study", "ablation", "--seeds", "0,x"], "'0,x': write numbers with commas"),
    ],
)
def test_a_word_in_place_of_a_number_is_explained(capsys, words, said):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
