"""The report: what the page says, what it shows, and that it says so from the artifacts alone."""

import base64
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages import report, report_page, report_scores
from stages.charts import line_chart, short, smoothed, thinned, ticks
from stages.config import Recipe, ReportConfig, StageConfig
from stages.report_changes import measure
from stages.report_lineage import BOX_HEIGHT, BOX_WIDTH, draw, read_instances, state_of
from stages.report_pictures import chain_for, error_uri, evenly, label_space
from stages.report_scores import judge, read_scores
from stages.report_words import duration, moment, percent, plain, signed, size_of, tone
from stages.shards import write_json
from tests.report_artifacts import SPACE, TARGETS, Quiet, build, street, worsened

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source"}


def make(folder: Path, artifacts: dict[str, Path], **fields: object) -> tuple[str, dict]:
    """Run the stage; the page and its numbers."""
    recipe = Recipe(report=ReportConfig(**fields))
    config = StageConfig(recipe, stage="report", sections=("report",))
    folder.mkdir()
    report.run(config, out=folder, progress=Quiet(), artifacts=artifacts)
    page = (folder / "report.html").read_text(encoding="utf-8")
    return page, json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build(tmp_path_factory.mktemp("artifacts"))


@pytest.fixture(scope="module")
def made(artifacts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    return make(tmp_path_factory.mktemp("report") / "out", artifacts)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three rounds of three legs."""
    return build(tmp_path_factory.mktemp("many"), rounds=3, pictures=1, steps=20)


class Outline(HTMLParser):
    """Checks that tags nest, and keeps ids, links and pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.problems: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag not in VOID and tag not in ("path", "rect", "line"):
            self.open.append(tag)
        self.ids += [found["id"]] if found.get("id") else []
        if tag == "a" and (found.get("href") or "").startswith("#"):
            self.targets.append(found["href"][1:])
        if tag == "img":
            self.pictures.append(found)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("path", "rect", "line"):
            return
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> at {self.getpos()}")


def outline(page: str) -> Outline:
    found = Outline()
    found.feed(page)
    return found


def text_of(page: str) -> str:
    """What a reader sees: no tags, single spaces."""
    body = re.sub(r"<(style|script)\b.*?</\1>", " ", page, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


def test_the_page_is_whole_html_with_links_that_lead_somewhere(made: tuple[str, dict]) -> None:
    found = outline(made[0])
    assert found.problems == []
    assert found.open == []
    assert len(found.ids) == len(set(found.ids))
    assert set(found.targets) <= set(found.ids)


def test_every_picture_is_inside_the_page_and_has_an_alt_text(made: tuple[str, dict]) -> None:
    pictures = outline(made[0]).pictures
    assert len(pictures) > 30
    assert all(one["src"].startswith("data:image/") for one in pictures)
    assert all("alt" in one for one in pictures)
    own = [one for one in pictures if "picture" in (one.get("class") or "")]
    assert all(one["alt"] for one in own if "faint" not in one["class"])


def test_nothing_is_fetched_from_anywhere(made: tuple[str, dict]) -> None:
    page = re.sub(r"data:image/[a-z]+;base64,[A-Za-z0-9+/=]+", "data:", made[0])
    assert not re.search(r"(src|href)=\"(?!#|data:)", page)
    assert "://" not in page
    assert "url(" not in page.replace("url(#tip)", "")
    assert "default-src 'none'" in page


def test_the_headline_is_the_refined_leg_of_the_last_round_against_its_control(
    made: tuple[str, dict], artifacts: dict[str, Path]
) -> None:
    def mean(name: str) -> float:
        return json.loads((artifacts[name] / "results.json").read_text())["miou_mean"]

    page, results = made
    assert results["headline"] == "evaluate@1#refined"
    difference = mean("evaluate@1#refined") - mean("evaluate@1#control")
    row = next(one for one in results["models"] if one["instance"] == "evaluate@1#refined")
    assert row["compared_with"] == "evaluate@1#control"
    assert row["difference"] == pytest.approx(difference)
    seen = text_of(page)
    assert f"{100 * mean('evaluate@1#refined'):.1f} mIoU on 2 targets" in seen
    assert f"scores {signed(difference)} points against the control" in seen


def test_every_models_score_on_every_target_is_in_the_table(
    made: tuple[str, dict], artifacts: dict[str, Path]
) -> None:
    table = re.search(r'<table class="scores">.*?</table>', made[0], flags=re.S)[0]
    rows = [text_of(row) for row in table.split("<tr")[2:]]
    for name, label in (("evaluate@0", "source model"), ("evaluate@1#raw", "round 1 · raw")):
        sets = json.loads((artifacts[name] / "results.json").read_text())["sets"]
        row = next(row for row in rows if label in row)
        for target in TARGETS:
            assert percent(sets[target]["miou"]) in row


def test_the_page_tells_the_protocol_and_the_prompts(made: tuple[str, dict]) -> None:
    seen = text_of(made[0])
    assert "absent cityscapes" in seen
    assert "a dashcam photo of street 3, a car, a pole" in seen


def test_provenance_leads_from_a_picture_to_prompt_seed_models_and_keys(
    made: tuple[str, dict], artifacts: dict[str, Path]
) -> None:
    card = next(part for part in made[0].split('<article class="card"') if "pic2</p>" in part)
    seen = text_of(card)
    for fact in ("seed 102", "prompt id p2", "weather rain", "model toy", "train_source"):
        assert fact in seen
    for name in ("write_prompts", "synthesize", "pseudo_label@1", "refine@1"):
        assert artifacts[name].name[:16] in seen


def test_what_a_prompt_says_is_shown_and_never_run(tmp_path: Path) -> None:
    evil = '<script>alert(1)</script><img src=x onerror="alert(2)"> & "quotes" \'single\''
    page, _ = make(tmp_path / "out", build(tmp_path / "a", prompt=lambda n: f"{evil} {n}"))
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert outline(page).problems == []


def test_untrained_painters_are_called_noise_and_trained_ones_not(
    tmp_path: Path, made: tuple[str, dict]
) -> None:
    page, results = make(tmp_path / "out", build(tmp_path / "a", untrained=True))
    assert "the painted pictures are noise" in text_of(page)
    assert any("noise" in notice for notice in results["notices"])
    assert "pictures are noise" not in text_of(made[0])


def test_random_sam_weights_and_missing_pretraining_are_said(made: tuple[str, dict]) -> None:
    assert any("SAM has seeded random weights" in notice for notice in made[1]["notices"])
    assert any("No pre-trained weights" in notice for notice in made[1]["notices"])


def test_a_target_that_shares_pictures_with_the_sources_is_called_out(tmp_path: Path) -> None:
    artifacts = build(tmp_path / "a", legs=("refined",))
    path = artifacts["evaluate@1#refined"] / "results.json"
    results = json.loads(path.read_text())
    results["sets"]["dusk"]["num_also_in_sources"] = 2
    path.write_text(json.dumps(results))
    _, told = make(tmp_path / "out", artifacts)
    assert any("2 pictures of target dusk" in notice for notice in told["notices"])


def test_collected_pictures_are_not_called_painted(tmp_path: Path) -> None:
    artifacts = build(tmp_path / "a", legs=(None,), pictures=3)
    path = artifacts["synthesize"] / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["config"]["synthesize"]["mode"] = "collect"
    path.write_text(json.dumps(manifest))
    for shard in artifacts["synthesize"].glob("shard-*"):
        rows = [json.loads(line) for line in (shard / "index.jsonl").read_text().splitlines()]
        for row in rows:
            row["prompt"] = row["prompt_id"] = None
        (shard / "index.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page, _ = make(tmp_path / "out", artifacts)
    seen = text_of(page)
    assert "Collected pictures" in seen
    assert "Painted pictures" not in seen


@pytest.mark.parametrize(
    "kept",
    [
        (),
        ("prepare", "train_source"),
        ("prepare", "train_source", "evaluate@0"),
        ("write_prompts", "synthesize"),
        ("prepare", "train_source", "write_prompts", "synthesize", "pseudo_label@1"),
        ("evaluate@1#refined",),
    ],
)
def test_whatever_is_there_makes_a_page(
    kept: tuple[str, ...], artifacts: dict[str, Path], tmp_path: Path
) -> None:
    page, results = make(tmp_path / "out", {name: artifacts[name] for name in kept})
    found = outline(page)
    assert found.problems == []
    assert set(found.targets) <= set(found.ids)
    assert (results["headline"] is None) == (not any(name.startswith("evaluate") for name in kept))


def test_artifacts_without_manifests_still_show(tmp_path: Path) -> None:
    artifacts = build(tmp_path / "a")
    for folder in artifacts.values():
        (folder / "manifest.json").unlink()
    page, results = make(tmp_path / "out", artifacts)
    assert "has no manifest" in text_of(page)
    assert len(results["models"]) == 4
    assert outline(page).problems == []


def test_predictions_without_pictures_and_truths_still_show(tmp_path: Path) -> None:
    artifacts = build(tmp_path / "a", legs=("refined",))
    for name in ("evaluate@0", "evaluate@1#refined"):
        index = artifacts[name] / "predictions" / "index.jsonl"
        rows = [json.loads(line) for line in index.read_text().splitlines()]
        kept = [{key: row[key] for key in ("dataset", "id", "file")} for row in rows]
        index.write_text("\n".join(map(json.dumps, kept)))
    page, results = make(tmp_path / "out", artifacts)
    assert len(results["predictions"]) == 6
    assert results["predictions"][0]["wrong_share"]["evaluate@0"] is None
    assert "<figcaption>truth" not in page


def test_the_numbers_are_the_same_every_time_and_hold_no_time_and_no_path(
    artifacts: dict[str, Path], tmp_path: Path
) -> None:
    texts = []
    for name in ("one", "two"):
        make(tmp_path / name, dict(sorted(artifacts.items(), reverse=name == "two")))
        texts.append((tmp_path / name / "results.json").read_text())
    assert texts[0] == texts[1]
    assert "2026-03-01" not in texts[0]
    assert str(next(iter(artifacts.values())).parent) not in texts[0]


def test_a_page_that_grows_too_large_shows_smaller_and_then_fewer_pictures(
    artifacts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = make(tmp_path / "whole", artifacts)
    without, _ = make(tmp_path / "without", artifacts, num_pictures=0)
    limit = (len(whole.encode()) + len(without.encode())) // 2
    monkeypatch.setattr(report, "PAGE_BYTES_MAX", limit)
    page, results = make(tmp_path / "out", artifacts)
    assert len(page.encode()) <= limit
    assert 0 < len(results["pictures"]) < 6
    monkeypatch.setattr(report, "PAGE_BYTES_MAX", 1000)
    with pytest.raises(ValueError, match="exceeds 1000 bytes"):
        make(tmp_path / "never", artifacts)


@pytest.mark.parametrize(
    ("name", "message"), [("paint@1", "expected stage"), ("refine@x", "expected stage")]
)
def test_unknown_instances_are_refused_by_name(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make(tmp_path / "out", {name: tmp_path})
    assert repr(name) in str(caught.value)


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    artifacts = build(tmp_path / "a", legs=(None,), pictures=2)
    path = next(artifacts["refine@1"].glob("shard-*/pic1.label.png"))
    path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        make(tmp_path / "out", artifacts)


def test_a_manifest_that_is_no_json_is_named_with_the_way_out(tmp_path: Path) -> None:
    artifacts = build(tmp_path / "a", legs=(None,), pictures=2)
    path = artifacts["refine@1"] / "manifest.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="clouds --force refine@1") as caught:
        make(tmp_path / "out", artifacts)
    assert str(path) in str(caught.value)


def test_prompts_of_a_random_writer_are_called_chance_words(tmp_path: Path) -> None:
    artifacts = build(tmp_path / "a", legs=(None,), pictures=2)
    told = {"num_prompts": 2, "from_bank": 1, "from_random_writer": 1}
    (artifacts["write_prompts"] / "statistics.json").write_text(json.dumps(told))
    _, results = make(tmp_path / "out", artifacts)
    assert any("1 of 2 prompts" in notice for notice in results["notices"])


def test_each_leg_is_compared_with_its_own_source_model(tmp_path: Path) -> None:
    artifacts = build(tmp_path / "a", legs=("frozen", "tuned"))
    artifacts["evaluate@0#frozen"] = artifacts["evaluate@0"]
    artifacts["evaluate@0#tuned"] = artifacts.pop("evaluate@0")
    _, results = make(tmp_path / "out", artifacts)
    compared = {one["instance"]: one["compared_with"] for one in results["models"]}
    assert compared["evaluate@1#tuned"] == "evaluate@0#tuned"
    assert compared["evaluate@1#frozen"] == "evaluate@0#frozen"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "another leg’s artifact" in page


def test_changes_count_each_pixel_once(artifacts: dict[str, Path]) -> None:
    instances = read_instances(artifacts)
    models = read_scores(instances)
    chain = chain_for(instances, judge(models).model.instance)
    changes = measure(chain, label_space(instances, models))
    raw = [worsened(street(n)[1], n, 0.3) for n in range(6)]
    refined = [worsened(street(n)[1], n, 0.1) for n in range(6)]
    before, after = np.stack(raw), np.stack(refined)
    assert changes.changed_share == pytest.approx((before != after).mean())
    car = next(one for one in changes.classes if one.name == "car")
    assert car.before == (before == 13).sum()
    assert car.after == (after == 13).sum()
    assert car.gained == ((after == 13) & (before != 13)).sum()
    assert car.moved + car.dropped == ((before == 13) & (after != 13)).sum()
    largest = changes.flows[0]
    pair = (before == SPACE.names.index(largest.source)) & (
        after == SPACE.names.index(largest.target)
    )
    assert largest.pixels == pair.sum()


def with_counts(folder: Path, **classes: dict[str, dict[str, float]]) -> dict[str, Path]:
    """Artifacts whose labels' and refinement's statistics hold these counts per train id."""
    artifacts = build(folder, pictures=1, steps=20)
    for stage, counts in classes.items():
        write_json(artifacts[f"{stage}@1"] / "statistics.json", {"classes": counts})
    return artifacts


def cells_of(page: str, class_name: str) -> list[str]:
    """The numbers in a class's row of the table of changes."""
    table = page[page.index('id="changes"') :]
    row = next(row for row in table.split("<tr>") if f"</span>{class_name}</th>" in row)
    return re.findall(r'<td class="num">(?:<b>)?([^<]*)', row)


def test_the_page_shows_components_and_the_teachers_confidence_per_class(tmp_path: Path) -> None:
    artifacts = with_counts(
        tmp_path / "a",
        refine={"0": {"components": 1234}, "13": {"components": 0}},
        pseudo_label={"0": {"mean_confidence": 0.9318}},
    )
    page, _ = make(tmp_path / "out", artifacts)
    assert "<i>Components</i>" in page
    assert "<i>Confidence</i>" in page
    assert cells_of(page, "road")[-2:] == ["1 234", "93.2"]
    assert cells_of(page, "car")[-2:] == ["0", "–"]


def test_rules_that_ask_about_no_component_have_no_column_of_them(tmp_path: Path) -> None:
    artifacts = with_counts(
        tmp_path / "a",
        refine={"0": {"components": 0}},
        pseudo_label={"0": {"mean_confidence": 0.5}},
    )
    page, _ = make(tmp_path / "out", artifacts)
    assert "<i>Components</i>" not in page
    assert cells_of(page, "road")[-1] == "50.0"
    assert len(cells_of(page, "road")) == 4


def test_the_drawing_has_every_instance_once_and_no_two_boxes_touch(many: dict[str, Path]) -> None:
    instances = read_instances(many)
    drawing = draw(instances)
    assert sorted(box.instance.name for box in drawing.boxes) == sorted(instances)
    for number, one in enumerate(drawing.boxes):
        assert 0 <= one.x <= drawing.width - BOX_WIDTH
        assert 0 <= one.y <= drawing.height - BOX_HEIGHT
        for other in drawing.boxes[number + 1 :]:
            apart = abs(one.x - other.x) >= BOX_WIDTH or abs(one.y - other.y) >= BOX_HEIGHT
            assert apart, (one.instance.name, other.instance.name)


def test_no_line_of_the_drawing_runs_through_a_box(many: dict[str, Path]) -> None:
    drawing = draw(read_instances(many))
    for path in drawing.lines:
        ends = [tuple(map(int, one.split())) for one in re.findall(r"[ML](-?\d+ -?\d+)", path)]
        turns = re.findall(r"Q-?\d+ -?\d+ (-?\d+ -?\d+)", path)
        starts = [ends[0], *(tuple(map(int, one.split())) for one in turns)]
        for (x0, y0), (x1, y1) in zip(starts, ends[1:], strict=True):
            for box in drawing.boxes:
                inside_x = min(x0, x1) < box.x + BOX_WIDTH and max(x0, x1) > box.x
                inside_y = min(y0, y1) < box.y + BOX_HEIGHT and max(y0, y1) > box.y
                assert not (inside_x and inside_y), (path, box.instance.name)


def test_a_connection_that_a_longer_way_shows_is_left_out(artifacts: dict[str, Path]) -> None:
    instances = read_instances(artifacts)
    drawing = draw({name: instances[name] for name in ("synthesize", "pseudo_label@1", "select@1")})
    assert len(drawing.lines) == 2


def test_states_follow_from_the_run_that_made_each_artifact(artifacts: dict[str, Path]) -> None:
    instances = read_instances(artifacts)
    states = {name: state_of(one, instances.values()) for name, one in instances.items()}
    assert states["synthesize"] == "cached"
    assert states["refine@1"] == "ran"


def test_wrong_pixels_are_marked_and_unjudged_ones_are_dark(tmp_path: Path) -> None:
    wrong = np.array([[True, False, False]])
    judged = np.array([[True, True, False]])
    uri = error_uri(wrong, judged, (3, 1))
    path = tmp_path / "errors.png"
    path.write_bytes(base64.b64decode(uri.partition(",")[2]))
    pixels = np.asarray(Image.open(path).convert("RGBA"))[0]
    assert pixels[0, 0] > 200
    assert pixels[0, 3] > 150
    assert pixels[1, 3] == 0
    assert pixels[2, :3].max() < 80
    assert pixels[2, 3] > 150


def test_rounds_are_compared_in_a_chart_once_there_are_two(
    many: dict[str, Path], made: tuple[str, dict], tmp_path: Path
) -> None:
    page, results = make(tmp_path / "out", many)
    assert "mIoU by round" in page
    assert results["headline"] == "evaluate@3#refined"
    assert "The labels are those of round 3." in text_of(page)
    assert "mIoU by round" not in made[0]


def test_dark_and_light_and_phones_have_styles() -> None:
    style = (Path(report_page.__file__).parent / "templates" / "report.css").read_text()
    assert "prefers-color-scheme: dark" in style
    assert "max-width: 720px" in style
    assert "prefers-reduced-motion" in style


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 5, 10]),
        (0, 1, [0, 0.5, 1]),
        (0.2, 0.9, [0.2, 0.6, 1.0]),
        (3, 3, [1, 2, 3, 4, 5]),
        (0, 0, [-0.5, 0, 0.5]),
        (1e-5, 9e-5, [0, 2e-5, 4e-5, 6e-5, 8e-5, 1e-4]),
    ],
)
def test_ticks_are_round_and_cover_the_range(low: float, high: float, expected: list) -> None:
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 3 <= len(found) <= 8
    assert len({round(b - a, 12) for a, b in itertools.pairwise(found)}) == 1
    assert set(expected) <= set(found)


def test_a_chart_keeps_the_mean_of_a_long_line_and_every_point_inside() -> None:
    points = [(step, (step * 37) % 11) for step in range(5000)]
    thin = thinned(points)
    assert len(thin) == 160
    assert thin[-1][0] == 4999
    mean = sum(value for _, value in points) / len(points)
    assert sum(value for _, value in thin) / len(thin) == pytest.approx(mean, rel=0.02)
    chart = line_chart("loss", {"a": points, "b": [(0, 3.0)]}, {"a": 2})
    for curve in chart.curves:
        for x, y in re.findall(r"([\d.]+) ([\d.]+)", curve.path):
            assert chart.left <= float(x) <= chart.right
            assert chart.top <= float(y) <= chart.bottom


def test_smoothing_keeps_lines_straight_and_their_ends() -> None:
    line = [(step, 2.0 * step) for step in range(100)]
    assert np.allclose(smoothed(line), line)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (percent(0.4321), "43.2"),
        (percent(None), "–"),
        (signed(0.0123), "+1.2"),
        (signed(-0.0123), "−1.2"),
        (signed(0.0001), "±0.0"),
        (tone(-0.01), "down"),
        (tone(0.0001), "same"),
        (duration(3.21), "3.2 s"),
        (duration(59.7), "1 min 0 s"),
        (duration(3725), "1 h 2 min"),
        (duration(3599.8), "1 h 0 min"),
        (size_of(1_234_567), "1.2 MB"),
        (moment("2026-03-01T12:30:05+01:00"), "2026-03-01 11:30 UTC"),
        (moment("yesterday"), "yesterday"),
        (plain({"b": [1, 2.5], "a": None}), "a none, b 1, 2.5"),
        (short(0.00012), "1.2e-4"),
        (short(25000), "25k"),
        (evenly(list(range(10)), 3), [1, 5, 8]),
        (evenly([1, 2], 5), [1, 2]),
    ],
)
def test_words(said: object, expected: object) -> None:
    assert said == expected


def test_finer_numbers_stand_beside_the_result():
    part = {"miou": 0.5}
    acdc = {"miou": 0.4, "miou_mean_of_conditions": 0.45, "conditions": {"fog": part, "night": {}}}
    results = {
        "sets": {"acdc": acdc, "city": {"miou_by_classes": {"19": 0.3, "16": 0.35, "13": None}}},
        "rpd": 0.849,
        "training_domain": "city",
    }
    by_classes, by_condition, rpd = report_scores._details(results)
    assert by_classes == "city, mean over so many classes: 19: 30.0, 16: 35.0, 13: –"
    assert "fog 50.0, night –; together (one matrix) 40.0, mean of the conditions 45.0" in (
        by_condition
    )
    assert "84.9 % of the mIoU on city" in rpd
    assert list(report_scores._details({})) == []
