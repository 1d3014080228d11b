"""`prepare`: the index, what it refuses and how, and that interruption changes nothing."""

import json
import shutil

import numpy as np
import pytest

from stages import prepare
from stages.config import Recipe, StageConfig
from stages.contracts import CONTRACTS
from stages.readers import load_index
from tests import small_datasets

CONTRACT = next(contract for contract in CONTRACTS if contract.name == "prepare")


class Heard:
    """Keeps what a stage tells, and may stop it after so many units."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.started, self.units, self.notes, self.stop_after = None, 0, [], stop_after

    def start(self, total, unit, *, done=0):
        self.started = (total, unit, done)

    def advance(self, count=1, **metrics):
        self.units += count
        if self.stop_after is not None and self.units >= self.stop_after:
            raise KeyboardInterrupt

    def note(self, text):
        self.notes.append(text)


def prepared(out, root, *, heard=None, world=None, prepare_section=None, **data):
    recipe = Recipe(data={"root": str(root), **data}, prepare=prepare_section or {})
    config = StageConfig(recipe, stage="prepare", sections=CONTRACT.sections)
    out.mkdir(exist_ok=True)
    arguments = {} if world is None else {"world": world}
    return prepare.run(config, out=out, progress=heard or Heard(), **arguments)


def files(out):
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "roots.json"
    }


GTA = {"name": "gta", "layout": "gta5", "root": "gta"}
CITY = {"name": "city", "root": "city"}


@pytest.fixture
def root(tmp_path):
    small_datasets.gta5(tmp_path / "data" / "gta", count=5)
    small_datasets.cityscapes(tmp_path / "data" / "city", first=50)
    return tmp_path / "data"


def test_the_index_holds_what_the_files_hold(tmp_path, root):
    heard = Heard()
    summary = prepared(tmp_path / "out", root, heard=heard, sources=[GTA], targets=[CITY])
    assert summary.numbers["sources"] == 5
    assert summary.numbers["targets"] == 3
    assert heard.started == (8, "samples", 0)
    assert heard.units == 8
    samples = load_index(tmp_path / "out" / "sources")
    assert [sample.id for sample in samples] == [f"gta/0000{n}" for n in range(1, 6)]
    for number, sample in enumerate(samples, start=1):
        assert (sample.read_image() == small_datasets.picture(number)).all()
        labels = sample.read_label()
        assert labels.shape == small_datasets.SIZE
        values, counts = np.unique(labels[labels != 255], return_counts=True)
        assert sample.classes == dict(zip(values.tolist(), counts.tolist(), strict=True))
    card = json.loads((tmp_path / "out" / "sources" / "gta.json").read_text())
    assert card["label_map"]["name"] == "gta5"
    assert card["class_pixels"]["car"] == sum(sample.classes.get(13, 0) for sample in samples) > 0
    assert (tmp_path / "out" / "labelspace" / "labelspace.json").is_file()
    assert load_index(tmp_path / "out" / "unlabelled") == []
    assert not (tmp_path / "out" / "state").exists()


@pytest.mark.parametrize(
    ("write", "layout", "label_map"),
    [
        (small_datasets.synthia, "synthia", None),
        (small_datasets.bdd100k, "bdd100k", None),
        (small_datasets.mapillary, "mapillary", None),
        (small_datasets.mapillary, "mapillary", "mapillary_r"),
        (small_datasets.acdc, "acdc", None),
        (small_datasets.urbansyn, "urbansyn", None),
    ],
)
def test_every_released_layout_is_read_through_its_map(tmp_path, write, layout, label_map):
    write(tmp_path / "data")
    dataset = {"name": "x", "layout": layout, "root": "data", "label_map": label_map}
    prepared(tmp_path / "out", tmp_path, targets=[dataset])
    samples = load_index(tmp_path / "out" / "targets")
    classes = set().union(*(sample.classes for sample in samples))
    expected = {
        "synthia": {10, 0, 13, 3},
        "bdd100k": {0, 2, 10, 13, 18},
        "mapillary": {0, 2, 13} if label_map is None else {0, 2, 5, 13},
        "acdc": {0, 2, 10},
        "urbansyn": {0, 2, 18},
    }[layout]
    assert classes == expected
    assert all(sample.read_label().shape == small_datasets.SIZE for sample in samples)


def test_the_artifact_does_not_depend_on_place_or_number_of_workers(tmp_path, root):
    prepared(tmp_path / "one", root, sources=[GTA], prepare_section={"workers": 0})
    moved = tmp_path / "elsewhere"
    shutil.copytree(root, moved)
    prepared(tmp_path / "two", moved, sources=[GTA], prepare_section={"workers": 3})
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert str(tmp_path) not in b"".join(files(tmp_path / "one").values()).decode()


def test_an_interrupted_run_continues_and_ends_the_same(tmp_path, root, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK", 2)
    prepared(tmp_path / "whole", root, sources=[GTA], targets=[CITY])
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path / "cut", root, heard=Heard(stop_after=7), sources=[GTA], targets=[CITY])
    heard = Heard()
    prepared(tmp_path / "cut", root, heard=heard, sources=[GTA], targets=[CITY])
    assert heard.started == (8, "samples", 5)
    assert heard.units == 3
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_data_set_of_the_rendered_world_is_found_in_the_artifact(tmp_path):
    small_datasets.gta5(tmp_path / "world" / "source")
    dataset = GTA | {"root": "@render_world/source"}
    out, world = tmp_path / "store" / "out", tmp_path / "store" / "world"
    out.parent.mkdir()
    (tmp_path / "world").rename(world)
    summary = prepared(out, tmp_path, world=world, sources=[dataset])
    assert summary.numbers["sources"] == 3
    out.parent.rename(tmp_path / "moved")
    samples = load_index(tmp_path / "moved" / "out" / "sources")
    assert (samples[0].read_image() == small_datasets.picture(1)).all()


def test_classes_of_ones_own_come_from_a_file_of_ones_own(tmp_path, root):
    (tmp_path / "three.yaml").write_text(
        "name: three\n"
        "classes:\n"
        "  - {id: 0, name: ground, colour: [128, 64, 128]}\n"
        "  - {id: 1, name: moving, colour: [0, 0, 142], thing: true}\n"
        "  - {id: 2, name: rest, colour: [70, 70, 70]}\n"
        "maps:\n"
        "  cityscapes: {ids: {7: 0, 8: 0, 24: 1, 26: 1, 11: 2, 21: 2, 23: 2}, ignored: [0-6]}\n"
    )
    labels = str(tmp_path / "three.yaml")
    prepared(tmp_path / "out", root, labels=labels, sources=[GTA], targets=[CITY])
    for part in ("sources", "targets"):
        for sample in load_index(tmp_path / "out" / part):
            assert set(np.unique(sample.read_label())) <= {0, 1, 2, 255}
    card = json.loads((tmp_path / "out" / "sources" / "gta.json").read_text())
    assert set(card["class_pixels"]) == {"ground", "moving", "rest"}
    assert min(card["class_pixels"].values()) > 0


def test_unlabelled_folders_have_no_labels(tmp_path, root):
    dataset = {"name": "web", "layout": "folder", "root": "gta/images"}
    prepared(tmp_path / "out", root, unlabelled=[dataset])
    samples = load_index(tmp_path / "out" / "unlabelled")
    assert len(samples) == 5
    assert all(sample.label is None and sample.classes is None for sample in samples)


def test_corrupt_files_are_named_or_skipped_and_counted(tmp_path, root):
    (root / "gta" / "images" / "00002.png").write_bytes(b"no picture")
    label = root / "gta" / "labels" / "00004.png"
    label.write_bytes(label.read_bytes()[:70])
    with pytest.raises(ValueError, match=r"(?s)2 of 5 samples.*images/00002.*labels/00004.*=skip"):
        prepared(tmp_path / "out", root, sources=[GTA])
    heard = Heard()
    skip = {"on_corrupt": "skip"}
    summary = prepared(tmp_path / "skip", root, heard=heard, sources=[GTA], prepare_section=skip)
    assert "2 left out" in summary.text
    assert "2 samples left out" in heard.notes[0]
    stems = [sample.stem for sample in load_index(tmp_path / "skip" / "sources")]
    assert stems == ["00001", "00003", "00005"]
    card = json.loads((tmp_path / "skip" / "sources" / "gta.json").read_text())
    assert [entry["id"] for entry in card["refused"]] == ["gta/00002", "gta/00004"]
    assert card["refused"][0]["why"].startswith("images/00002.png")


def test_values_outside_the_map_name_file_values_and_map(tmp_path, root):
    raw = small_datasets.raw_label(3)
    raw[0, :3] = (77, 78, 77)
    small_datasets.save(root / "gta" / "labels" / "00003.png", raw, palette=True)
    message = r"(?s)labels/00003\.png: values 77, 78 are not in label map 'gta5'.*`ignored`"
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path / "out", root, sources=[GTA], prepare_section={"on_corrupt": "skip"})


def test_coloured_labels_are_refused(tmp_path, root):
    small_datasets.save(root / "gta" / "labels" / "00001.png", small_datasets.picture(0))
    with pytest.raises(ValueError, match=r"00001\.png: a label must hold one class value"):
        prepared(tmp_path / "out", root, sources=[GTA])


def test_size_mismatch_stops_skips_or_resizes_as_asked(tmp_path, root):
    small = small_datasets.raw_label(2)[::2, ::2]
    small_datasets.save(root / "gta" / "labels" / "00002.png", small)
    with pytest.raises(ValueError, match=r"(?s)the label is 10x16, its picture 20x32.*=skip"):
        prepared(tmp_path / "error", root, sources=[GTA])
    skip = {"on_size_mismatch": "skip"}
    prepared(tmp_path / "skip", root, sources=[GTA], prepare_section=skip)
    assert len(load_index(tmp_path / "skip" / "sources")) == 4
    resize = {"on_size_mismatch": "resize_label"}
    heard = Heard()
    prepared(tmp_path / "resize", root, heard=heard, sources=[GTA], prepare_section=resize)
    sample = load_index(tmp_path / "resize" / "sources")[1]
    assert sample.read_label().shape == small_datasets.SIZE
    assert sum(sample.classes.values()) == np.count_nonzero(sample.read_label() != 255)
    assert "1 labels resized" in heard.notes[0]


def test_everything_skipped_is_an_error(tmp_path, root):
    for path in (root / "gta" / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="all 5 samples were left out"):
        prepared(tmp_path / "out", root, sources=[GTA], prepare_section={"on_corrupt": "skip"})


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"sources": [GTA, GTA]}, ValueError, "two data sets are called 'gta'"),
        (
            {"sources": [GTA], "targets": [CITY | {"name": "gta"}]},
            ValueError,
            r"called 'gta' \(data.sources and data.targets\)",
        ),
        ({"sources": [GTA | {"root": "nowhere"}]}, FileNotFoundError, "nowhere does not exist"),
        ({"labels": "cityscape19"}, FileNotFoundError, "nearest: cityscapes19"),
        (
            {"sources": [GTA | {"label_map": "gta"}]},
            ValueError,
            r"needs the label map 'gta'.*nearest: gta5",
        ),
        ({"sources": [GTA | {"root": "@render_world/x"}]}, ValueError, "render_world"),
    ],
)
def test_wrong_data_sections_are_refused(tmp_path, root, data, error, message):
    with pytest.raises(error, match=message):
        prepared(tmp_path / "out", root, **data)


def test_pictures_that_are_in_source_and_target_are_told(tmp_path, root):
    shutil.copytree(root / "gta", root / "copy")
    heard = Heard()
    target = GTA | {"name": "copy", "root": "copy", "limit": 2}
    prepared(tmp_path / "out", root, heard=heard, sources=[GTA], targets=[target])
    card = json.loads((tmp_path / "out" / "targets" / "copy.json").read_text())
    assert card["also_in_sources"] == ["copy/00001", "copy/00003"]
    assert any("2 pictures are also among the sources" in note for note in heard.notes)


def test_a_validation_set_that_holds_pictures_of_a_target_is_refused(tmp_path, root):
    shutil.copytree(root / CITY["root"], root / "copied")
    copy = CITY | {"name": "copy", "root": "copied"}
    with pytest.raises(ValueError, match=r"3 validation pictures are also targets .*copy/.* is"):
        prepared(tmp_path / "out", root, targets=[CITY], validation=[copy])
    small_datasets.cityscapes(root / "others", count=2, first=10)
    others = copy | {"root": "others"}
    summary = prepared(tmp_path / "new", root, targets=[CITY], validation=[others])
    assert summary.numbers["validation"] == 2


def test_sources_without_a_single_labelled_pixel_are_refused_and_targets_told(tmp_path, root):
    for place in ("gta/labels", "city/gtFine"):
        for path in (root / place).rglob("*.png"):
            small_datasets.save(path, np.zeros(small_datasets.SIZE, np.uint8))  # "unlabeled"
    with pytest.raises(
        ValueError, match=r"none of the 5 labels has a pixel.*map 'gta5'.*label_map"
    ):
        prepared(tmp_path / "a", root, sources=[GTA])
    heard = Heard()
    prepared(tmp_path / "b", root, heard=heard, targets=[CITY])
    assert any("nothing can be judged" in note for note in heard.notes)


def test_the_labelled_share_and_labels_without_pictures_are_told(tmp_path, root):
    (root / "gta" / "images" / "00002.png").unlink()
    heard = Heard()
    summary = prepared(tmp_path / "out", root, heard=heard, sources=[GTA])
    samples = load_index(tmp_path / "out" / "sources")
    share = np.mean([(sample.read_label() != 255).mean() for sample in samples])
    assert summary.numbers["labelled_share"] == pytest.approx(share, abs=1e-4)
    assert f"{share:.1%} of the sources' pixels have a class" in summary.text
    assert heard.notes == [
        "data set 'gta' (data.sources): 1 label files have no picture and are not used (the first: "
        "labels/00002.png)"
    ]
