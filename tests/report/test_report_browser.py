"""Reports in a real Chromium, headless: no error, no request, and what a reader does with them by pointer, by keys and on a phone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report_results import PARADIGMS, landscape, layers

from reports import HOSTILE, doctor_result, suite_results
from thetau.report import page_of, write
from thetau.report.doctors import doctor_page
from thetau.report.suites import suite_page

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (found := shutil.which(name))), None
)
WHERE = "Install it with `apt-get install chromium`, or `python -m playwright install chromium` and set CHROMIUM to its path."
pytestmark = pytest.mark.filterwarnings("default::ResourceWarning")  # playwright leaves a pipe of its driver to the collector


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright: pip install playwright")
    path = os.environ.get("CHROMIUM") or CHROMIUM
    with api.sync_playwright() as started:
        if path is None and not Path(started.chromium.executable_path).exists():
            pytest.skip(f"no Chromium is here. {WHERE}")
        opened = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    write(suite_page(suite_results(methods=8, tasks=5, memory=True)), folder / "suite.html")
    write(suite_page(suite_results(methods=3, tasks=2)), folder / "small.html")
    write(doctor_page(doctor_result(3)), folder / "doctor.html")
    layers("sst2", "mnli").save(folder / "layers.json")
    landscape("sst2", "mnli", "qnli").save(folder / "landscape.json")
    for name in ("layers", "landscape"):
        write(page_of(folder / f"{name}.json"), folder / f"{name}.html")
    write(page_of(PARADIGMS), folder / "paradigms.html")
    write(suite_page(suite_results(methods=11, tasks=11, names=HOSTILE)), folder / "hostile.html")
    write(doctor_page(doctor_result(11, names=HOSTILE)), folder / "hostile-doctor.html")
    return folder


class Seen:
    """What a page complained of, and what it asked for."""

    def __init__(self, page: Any) -> None:
        self.page, self.problems, self.requests = page, [], []
        page.on("console", lambda message: self.problems.append(message.text))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("dialog", lambda dialog: (self.problems.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: self.requests.append(request.url))


def visit(browser: Any, path: Path, **options: Any) -> Seen:
    seen = Seen(browser.new_context(**options).new_page())
    seen.page.goto(path.as_uri())
    return seen


def column(page: Any, table: str, place: int) -> list[str]:
    return page.eval_on_selector_all(
        f"#{table} tbody tr:not([hidden])", "(rows, place) => rows.map((row) => row.cells[place].textContent)", place
    )


def test_tables_sort_and_filter(browser: Any, pages: Path) -> None:
    seen = visit(browser, pages / "suite.html")
    page = seen.page
    before = column(page, "accuracy-1", 0)
    heading = page.locator("#accuracy-1 thead th", has_text="average").get_by_role("button")
    heading.click()
    values = [float(text) for text in column(page, "accuracy-1", 2)]
    assert values == sorted(values, reverse=True)
    heading.press("Enter")
    assert [float(text) for text in column(page, "accuracy-1", 2)] == sorted(values)
    assert page.locator("#accuracy-1 thead th[aria-sort=ascending]").count() == 1
    assert page.locator("#said").text_content() == "Sorted by average, ascending"
    page.locator("#accuracy-1 thead th").first.get_by_role("button").click()
    assert column(page, "accuracy-1", 0) == sorted(before)
    box = page.locator("#accuracy .filter input").first
    box.fill("METHOD 3")
    assert column(page, "accuracy-1", 0) == ["method 3"] and page.locator("#accuracy .count").first.text_content() == "1 of 10"
    box.fill("")
    assert len(column(page, "accuracy-1", 0)) == 10
    differences = page.locator("#differences-1 thead th", has_text="points").get_by_role("button")
    differences.click()
    leads = [float(text.split()[0].replace("−", "-")) for text in column(page, "differences-1", 2)]
    assert leads == sorted(leads, reverse=True) and len(leads) == 28
    assert not seen.problems and seen.requests == [(pages / "suite.html").as_uri()]


def test_charts_say_what_is_pointed_at_and_follow_the_keys(browser: Any, pages: Path) -> None:
    seen = visit(browser, pages / "suite.html")
    page, tip = seen.page, seen.page.locator("#tip")
    page.locator("#cost-1 circle").first.hover()
    assert tip.is_visible() and "% normalised" in tip.text_content() and "GB" in tip.text_content()
    chart = page.locator("#cost-1 .drawn")
    chart.focus()
    chart.press("ArrowRight")
    first = page.locator("#said").text_content()
    chart.press("ArrowRight")
    assert first and page.locator("#said").text_content() not in (first, "")
    chart.press("Escape")
    assert tip.is_hidden()
    cells = page.locator("#accuracy-3 .drawn")
    cells.scroll_into_view_if_needed()
    cells.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        cells.press(key)
    own = column(page, "accuracy-1", 4)[1].split(" ")[0]
    assert page.locator("#said").text_content() == f"individual × task1: {own}"
    box = page.locator("#accuracy-3 .cursor").bounding_box()
    page.mouse.move(0, 0)
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert tip.text_content() == f"individual × task1: {own}"
    assert not seen.problems


def test_the_theme_is_the_systems_until_it_is_switched(browser: Any, pages: Path) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    light = visit(browser, pages / "doctor.html", color_scheme="light").page
    dark = visit(browser, pages / "doctor.html", color_scheme="dark").page
    grounds = (light.evaluate(colour), dark.evaluate(colour))
    assert grounds[0] != grounds[1]
    switch = light.get_by_role("button", name="Dark", exact=True)
    assert switch.get_attribute("aria-pressed") == "false"
    switch.click()
    assert light.evaluate(colour) == grounds[1] and switch.get_attribute("aria-pressed") == "true"
    switch.click()
    assert light.evaluate(colour) == grounds[0]
    dark.emulate_media(media="print", color_scheme="dark")
    assert dark.evaluate(colour) == grounds[0], "paper is white"
    dark.set_viewport_size({"width": 718, "height": 1000})  # A4 at 96 dots an inch, with the usual margins
    assert dark.evaluate("document.documentElement.scrollWidth") <= 718, "no column is off the paper"
    assert dark.locator("#theme").is_hidden() and dark.locator("h2").first.is_visible()


@pytest.mark.parametrize("name", ["suite", "doctor"])
def test_a_phone_shows_all_of_it(browser: Any, pages: Path, name: str) -> None:
    seen = visit(browser, pages / f"{name}.html", viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= 360, "the page itself never scrolls sideways"
    assert seen.page.evaluate("[...document.querySelectorAll('button')].every((one) => one.getBoundingClientRect().height >= 20)")
    assert not seen.problems


@pytest.mark.parametrize("name", ["hostile", "hostile-doctor"])
def test_nothing_in_a_name_runs(browser: Any, pages: Path, name: str) -> None:
    seen = visit(browser, pages / f"{name}.html")
    page = seen.page
    assert page.evaluate("document.querySelectorAll('script:not([type])').length") == 1
    assert page.evaluate("document.querySelectorAll('img, iframe, object, embed, link, base, form').length") == 0
    for chart in page.locator(".drawn").all()[:4]:
        chart.focus()
        chart.press("ArrowRight")
    page.locator("thead button").first.click()
    assert not seen.problems and len(seen.requests) == 1
    refused = page.evaluate("fetch('https://example.org').then(() => 'went out', () => 'refused')")
    assert refused == "refused", "the page's own policy lets nothing out"


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("small", "light"), ("doctor", "dark"), ("layers", "light"), ("landscape", "dark"), ("paradigms", "light")],
)
def test_axe_finds_nothing_serious(browser: Any, pages: Path, name: str, scheme: str) -> None:
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="accessibility needs axe: pip install axe-playwright-python"
    )
    page = visit(browser, pages / f"{name}.html", color_scheme=scheme).page
    found = axe.Axe().run(page).response["violations"]
    assert [
        (one["id"], one["nodes"][0]["html"][:200]) for one in found if one["impact"] in ("serious", "critical", "moderate")
    ] == []
