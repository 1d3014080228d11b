"""The report in a real browser: it moves, filters, reads by keyboard, and asks nobody anything."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages import report
from stages.config import Recipe, StageConfig
from tests.report_artifacts import Quiet, build

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install it")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with two rounds, an evil prompt, and everything else."""
    folder = tmp_path_factory.mktemp("report")
    config = StageConfig(Recipe(), stage="report", sections=("report",))
    evil = "a car & a bus <script>window.harmed = 1</script><img src=x onerror='window.harmed = 2'>"
    artifacts = build(
        tmp_path_factory.mktemp("artifacts"), rounds=2, prompt=lambda n: f"{evil} {n}"
    )
    report.run(config, out=folder, progress=Quiet(), artifacts=artifacts)
    return folder / "report.html"


class Visit:
    """One visit of the page; remembers what it complained of and asked for."""

    def __init__(self, browser: Any, page: Path, **context: Any) -> None:
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda told: self.complaints.append(f"{told.type}: {told.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda asked: self.requests.append(asked.url))
        self.page.goto(page.as_uri())


@pytest.fixture
def visit(browser: Any, made: Path) -> Iterator[Visit]:
    """A visit that ends with no complaint and no request beyond the file itself."""
    visit = Visit(browser, made, viewport={"width": 1200, "height": 900})
    yield visit
    assert visit.complaints == []
    assert [url for url in visit.requests if not url.startswith("data:")] == [made.as_uri()]
    assert visit.page.evaluate("window.harmed") is None
    visit.context.close()


def cut_of(page: Any, comparer: str) -> float:
    """Where the divider stands, in percent, as drawn."""
    handle = page.locator(f"{comparer} .handle").bounding_box()
    frame = page.locator(f"{comparer} .frame").bounding_box()
    return 100 * (handle["x"] + handle["width"] / 2 - frame["x"]) / frame["width"]


def test_the_divider_follows_pointer_and_arrow_keys(visit: Visit) -> None:
    page = visit.page
    page.locator("#featured").scroll_into_view_if_needed()
    frame = page.locator("#featured .frame").bounding_box()
    y = frame["y"] + frame["height"] / 2
    page.mouse.move(frame["x"] + frame["width"] / 2, y)
    page.mouse.down()
    page.mouse.move(frame["x"] + frame["width"] * 0.2, y, steps=5)
    page.mouse.up()
    assert cut_of(page, "#featured") == pytest.approx(20, abs=2)
    cut = page.locator("#featured .cut")
    cut.focus()
    for _ in range(5):
        cut.press("ArrowRight")
    assert cut_of(page, "#featured") == pytest.approx(25, abs=2)
    clip = page.locator("#featured .before").evaluate("one => getComputedStyle(one).clipPath")
    assert float(re.search(r"inset\(0px (?:calc\()?([\d.]+)%", clip)[1]) == pytest.approx(75, abs=2)


def test_the_gallery_filters_by_class_and_counts(visit: Visit) -> None:
    page = visit.page
    chips = page.locator("#pictures .chip")
    assert page.locator(".card:visible").count() == 6
    dropped = chips.filter(has_text="not selected")
    dropped.focus()
    page.keyboard.press("Enter")
    assert page.locator(".card:visible").count() == 1
    assert page.locator("#gallery-count").inner_text() == "1 picture"
    assert dropped.get_attribute("aria-pressed") == "true"
    chips.first.click()
    assert page.locator(".card:visible").count() == 6


def test_predictions_filter_by_target_and_switch_models(visit: Visit) -> None:
    page = visit.page
    page.locator("#predictions .chip").filter(has_text="fog").click()
    shown = page.locator(".predicted:visible")
    assert shown.count() == 3
    assert all("fog/" in text for text in shown.locator("h3").all_inner_texts())
    first = shown.first.locator(".view:visible")
    assert first.count() == 2
    before = first.first.locator("img").get_attribute("src")
    page.locator("input[name=model][value='evaluate@0']").check()
    after = shown.first.locator(".view:visible")
    assert after.count() == 2
    assert after.first.locator("img").get_attribute("src") != before
    assert "source model" in after.first.inner_text()


def test_the_viewer_opens_turns_and_closes_by_keyboard(visit: Visit) -> None:
    page = visit.page
    page.locator(".card .open").first.focus()
    page.keyboard.press("Enter")
    viewer = page.locator("#viewer")
    assert viewer.is_visible()
    assert page.locator("#viewer .place").inner_text() == "1 of 6"
    first = page.locator("#viewer .base").get_attribute("src")
    assert "write_prompts" in viewer.inner_text()
    page.keyboard.press("ArrowRight")
    assert page.locator("#viewer .place").inner_text() == "2 of 6"
    assert page.locator("#viewer .base").get_attribute("src") != first
    page.keyboard.press("Escape")
    assert not viewer.is_visible()


def test_a_key_in_the_viewer_leads_to_its_record(visit: Visit) -> None:
    page = visit.page
    page.locator(".card .open").first.click()
    page.locator("#viewer a", has_text="synthesize").first.click()
    record = page.locator("#made-synthesize")
    assert not page.locator("#viewer").is_visible()
    page.wait_for_function("document.getElementById('made-synthesize').open")
    assert record.locator("dl").first.is_visible()


def test_the_class_under_the_pointer_is_told(visit: Visit) -> None:
    page = visit.page
    page.locator("#featured").scroll_into_view_if_needed()
    frame = page.locator("#featured .frame").bounding_box()
    page.mouse.move(frame["x"] + frame["width"] / 2, frame["y"] + frame["height"] * 0.93)
    told = page.locator("#featured .readout").inner_text()
    names = r"(road|sidewalk|building|vegetation|car|sky|person|pole|no label)"
    assert re.search(rf"^{names}$|: {names} → .*: {names}$", told)


def test_curves_tell_values_and_hide_by_name(visit: Visit) -> None:
    page = visit.page
    chart = page.locator("#curves .chart").first
    chart.scroll_into_view_if_needed()
    box = chart.locator("svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    told = chart.locator(".values").inner_text()
    assert told.startswith("step ")
    assert "train_source" in told
    assert "self_train@1#raw" not in told
    page.locator("[data-training='train_source']").click()
    page.mouse.move(box["x"] + box["width"] / 2 + 3, box["y"] + box["height"] / 2)
    assert "train_source" not in chart.locator(".values").inner_text()


def test_one_target_of_the_class_table_at_a_time(visit: Visit) -> None:
    page = visit.page
    assert page.locator(".by-target:visible").count() == 1
    page.locator("input[name=target][value=fog]").check()
    assert page.locator(".by-target:visible caption").inner_text() == "fog"


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_never_scrolls_sideways(browser: Any, made: Path, width: int) -> None:
    visit = Visit(browser, made, viewport={"width": width, "height": 800})
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    visit.context.close()


def luminance(colour: str) -> float:
    """Relative luminance of a CSS rgb() colour (WCAG 2.1)."""
    channels = [int(float(one)) / 255 for one in re.findall(r"[\d.]+", colour)[:3]]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_light_and_dark(browser: Any, made: Path, scheme: str) -> None:
    visit = Visit(browser, made, color_scheme=scheme)
    paper = visit.page.locator("body").evaluate("one => getComputedStyle(one).backgroundColor")
    assert (luminance(paper) > 0.5) == (scheme == "light")
    for selector in ("body", ".hint", ".notices li", ".scores .up", ".prompt", "code"):
        colour = visit.page.locator(selector).first.evaluate("one => getComputedStyle(one).color")
        bright, dim = sorted((luminance(colour), luminance(paper)), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 4.5, (selector, colour, paper)
    visit.context.close()


def test_everything_is_there_to_read_without_script(browser: Any, made: Path) -> None:
    visit = Visit(browser, made, java_script_enabled=False)
    seen = visit.page.locator("body").inner_text()
    for words in ("Result", "Provenance", "mIoU", "What refinement changed", "road"):
        assert words in seen
    assert visit.page.locator(".by-target").count() == 2
    visit.context.close()
