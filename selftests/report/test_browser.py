# SPDX-License-Identifier: GPL-2.0-or-later
"""A site in Debian's Chromium, read from files. `make browser` installs what these tests need."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sites import write_hostile, write_many

CHROMIUM = Path("/usr/bin/chromium")
HOW = "`make browser` installs it"

playwright = pytest.importorskip("playwright.sync_api", reason=f"no playwright: {HOW}")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason=f"no axe: {HOW}")
if not CHROMIUM.exists():
    pytest.skip(f"no {CHROMIUM}: {HOW}", allow_module_level=True)

WIDE, PHONE = (1300, 900), (390, 844)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as api:
        # Root has no sandbox; the pages are our own.
        started = api.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_many(tmp_path_factory.mktemp("site") / "site", runs=48, tests=90)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hostile(tmp_path_factory.mktemp("hostile") / "site")


class Tab:
    """A page of a site, and all that the browser complained about."""

    def __init__(self, browser: Any, size: tuple[int, int] = WIDE, scheme: str = "light") -> None:
        viewport = {"width": size[0], "height": size[1]}
        self.context = browser.new_context(viewport=viewport, color_scheme=scheme)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.on("requestfailed", self._failed)

    def _failed(self, request: Any) -> None:
        # A page that is left before it has its icon aborts the request.
        if request.failure != "net::ERR_ABORTED":
            self.complaints.append(f"{request.url}: {request.failure}")

    def open(self, file: Path, fragment: str = "") -> Any:
        # Another fragment alone does not load the page again.
        self.page.goto("about:blank")
        self.page.goto(file.as_uri() + fragment)
        return self.page


@pytest.fixture
def tab(browser: Any) -> Iterator[Tab]:
    opened = Tab(browser)
    yield opened
    opened.context.close()
    assert opened.complaints == []


def kinds(site: Path) -> dict[str, Path]:
    """One page of each kind; the test is one that is broken and has metrics."""
    broken = re.search(r'href="(tests/[^"]+test_case_81_[^"]+)"', (site / "index.html").read_text())
    return {
        **{name: site / f"{name}.html" for name in ("index", "runs", "compare", "issues")},
        "run": max((site / "runs").iterdir()),
        "test": site / broken[1] if broken else min((site / "tests").iterdir()),
    }


def rows(page: Any) -> list[str]:
    return [str(text) for text in page.locator(".grid-names > *").all_inner_texts()]


def line(page: Any) -> str:
    return str(page.locator(".grid-line").inner_text())


# --- every page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_every_kind_of_page(
    browser: Any,
    site: Path,
    long_site: Path,
    tmp_path: Path,
    size: tuple[int, int],
    scheme: str,
) -> None:
    """No message on the console, nothing wider than the screen, no violation that axe finds."""
    tab = Tab(browser, size, scheme)
    # With lasting changes and comparisons of metrics.
    (changed,) = long_site.glob("tests/*test_case_0_*.html")
    long = {f"long-{name}": long_site / f"{name}.html" for name in ("index", "compare")}
    for name, file in {**kinds(site), **long, "long-test": changed}.items():
        page = tab.open(file)
        page.wait_for_timeout(100)
        page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
        page.screenshot(path=tmp_path / f"{name}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
        # With `preload`, axe would fetch the style sheets, which the policy forbids.
        violations = axe.Axe().run(page, options={"preload": False}).response["violations"]
        assert [(v["id"], v["nodes"][0]["html"]) for v in violations] == [], name
    tab.context.close()
    assert tab.complaints == []


def test_hostile_texts_do_nothing(tab: Tab, hostile: Path) -> None:
    """No script of a text runs, no element of a text exists, and nothing is loaded for it."""
    requests: list[str] = []
    tab.page.on("request", lambda request: requests.append(request.url))
    # Of the tests' pages there are many of the same kind; each text has some.
    files = [
        *hostile.glob("*.html"),
        *sorted(hostile.glob("runs/*"))[::15],
        *sorted(hostile.glob("tests/*"))[::5],
    ]
    for file in files:
        page = tab.open(file)
        assert page.locator("img, iframe, object, form").count() == 0
        assert page.locator("script:not([src]), [onmouseover], [onerror]").count() == 0
    page = tab.open(hostile / "index.html")
    page.locator("canvas").focus()
    for _ in range(len(rows(page))):
        page.keyboard.press("ArrowDown")
    page.locator("#q").fill("</script><img src=x onerror=alert(1)>")
    assert requests and all(url.startswith(("file:", "about:")) for url in requests)


def test_the_policy_is_in_force(browser: Any, site: Path) -> None:
    tab = Tab(browser)
    page = tab.open(site / "index.html")
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "document.title = 'run'";
            document.body.append(script);
            document.body.setAttribute("onclick", "document.title = 'run'");
            document.body.click();
        }"""
    )
    assert page.title().startswith("Overview")
    assert any("Content Security Policy" in complaint for complaint in tab.complaints)
    tab.context.close()


# --- the overview


def test_filters_and_their_place_in_the_address(tab: Tab, site: Path) -> None:
    page = tab.open(site / "index.html")
    everything = rows(page)
    assert len(everything) == 90
    page.locator("#q").fill("CASE_8 pmem_off")
    assert len(rows(page)) == 11 and all("case_8" in name for name in rows(page))
    page.locator("#subject").select_option("flush")
    assert [name.partition("/")[0] for name in rows(page)] == ["flush", "flush"]
    assert "q=CASE_8+pmem_off&subject=flush" in page.url
    assert page.locator("#count").inner_text() == "2 of 90 tests, 48 of 48 runs"
    again = tab.open(site / "index.html", page.url[page.url.index("#") :])
    assert len(rows(again)) == 2 and again.locator("#subject").input_value() == "flush"
    again.locator("#q").fill("")
    again.locator("#subject").select_option("")
    assert rows(again) == everything


def test_broken_tests_are_shown_and_sorted_first(tab: Tab, site: Path) -> None:
    page = tab.open(site / "index.html")
    listed = page.locator("ol.broken a.name").all_inner_texts()
    worst = rows(page)[: len(listed)]
    page.locator("#show").select_option("broken")
    assert sorted(rows(page)) == sorted(worst) and len(listed) == len(worst) == 2
    page.locator("#sort").select_option("name")
    assert [re.sub(r"\W?test_|\.py", "", name) for name in sorted(listed)] == [
        name.replace("/", "", 1).replace(".case", "case") for name in rows(page)
    ]


def test_one_environment(tab: Tab, site: Path) -> None:
    page = tab.open(site / "index.html")
    page.locator("tbody th a").first.click()
    assert page.locator("#count").inner_text() == "90 of 90 tests, 8 of 48 runs"
    assert page.locator("#track").input_value() == "0"
    assert page.evaluate("scrollY") > 0


def test_the_picture_by_keyboard(tab: Tab, site: Path) -> None:
    page = tab.open(site / "index.html", "#sort=name&runs=time")
    page.locator("canvas").focus()
    first = line(page)
    assert first.startswith("PASS device/") and "Linux 7.2.13, QEMU 10.0.13" in first
    page.keyboard.press("ArrowLeft")
    assert "QEMU 7.2.22" in line(page)
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")
    assert "2026-10-01 03:00" in line(page)
    page.keyboard.press("End")
    assert "2026-10-08 23:00" in line(page)
    for _ in range(20):
        page.keyboard.press("PageDown")
    assert rows(page)[-1].rpartition(".")[2] in line(page)
    box, cursor = page.locator(".grid").bounding_box(), page.locator(".cursor").bounding_box()
    assert box["y"] < cursor["y"] and cursor["y"] + cursor["height"] <= box["y"] + box["height"]
    page.keyboard.press("Enter")
    page.wait_for_url("**/tests/*.html")
    assert page.locator("h1").inner_text().endswith("pmem_off")


def test_the_picture_by_mouse_and_its_pixels(tab: Tab, site: Path) -> None:
    """The colour under the mouse is that of the status that the line describes."""
    page = tab.open(site / "index.html")
    page.locator(".grid").scroll_into_view_if_needed()
    points = [(row, share) for row in range(12) for share in (0.1, 0.5, 0.99)]
    statuses = []
    for row, share in points:
        box = page.locator("canvas").bounding_box()
        page.mouse.move(box["x"] + box["width"] * share, box["y"] + 18 * row + 9)
        statuses.append(line(page).split()[0])
    # The middle of a row within the width of a cell; gaps between cells are transparent.
    pixels = page.evaluate(
        """(points) => {
            const canvas = document.querySelector("canvas");
            const { data, width } = canvas
                .getContext("2d", { willReadFrequently: true })
                .getImageData(0, 0, canvas.width, 12 * 18);
            return points.map(([row, share]) => {
                const cell = [];
                for (let x = Math.round(width * share) - 12; x < width * share + 12; x++) {
                    cell.push(data.slice(((row * 18 + 9) * width + x) * 4).slice(0, 4).join());
                }
                return cell;
            });
        }""",
        points,
    )
    colours: dict[str, list[set[str]]] = {}
    for status, cell in zip(statuses, pixels, strict=True):
        colours.setdefault(status, []).append(set(cell) - {"0,0,0,0"})
    assert {"FAIL", "PASS", "WARN"} <= set(colours)
    common = {status: set.intersection(*found) for status, found in colours.items()}
    for one, other in itertools.combinations(("FAIL", "PASS", "WARN"), 2):
        assert common[one] and common[other] and common[one] != common[other]


# --- other pages


def test_plots(tab: Tab, site: Path) -> None:
    """Each metric has a plot with pixels; another environment has other ones."""
    (file,) = site.glob("tests/*test_case_81_*.html")
    page = tab.open(file)
    page.wait_for_selector(".uplot canvas")
    labels = page.locator("figcaption b").all_inner_texts()
    assert labels == ["duration of the test", "call_median fstype=ext4", "call_median fstype=xfs"]
    script = """() => [...document.querySelectorAll(".uplot canvas")].map(canvas =>
        new Uint8Array(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height)
            .data.buffer).reduce((sum, byte) => sum + byte, 0))"""
    before = page.evaluate(script)
    assert len(before) == 3 and all(before)
    page.locator("#place").select_option(index=1)
    page.wait_for_timeout(200)
    assert page.evaluate(script) != before
    assert "place=1" in page.url


@pytest.fixture(scope="module")
def long_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As in test_site.py: two of six environments have a lasting change."""
    return write_many(tmp_path_factory.mktemp("long") / "site", runs=204, tests=12)


MARKED = """() => [...document.querySelectorAll(".uplot canvas")].map(canvas => {
    const { data, width } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    const columns = {};
    // Amber has more red than blue; all else is blue or grey.
    for (let i = 0; i < data.length; i += 4) {
        const x = (i / 4) % width;
        if (data[i] > data[i + 2] + 60 && data[i + 3] > 60) columns[x] = (columns[x] ?? 0) + 1;
    }
    const counts = Object.values(columns);
    return [counts.length / width, counts.filter((count) => count > canvas.height / 2).length];
})"""
"""For each plot: share of columns with amber, and number of columns that are amber mostly."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_lasting_change_is_marked_and_described(
    browser: Any, long_site: Path, scheme: str
) -> None:
    tab = Tab(browser, scheme=scheme)
    (file,) = long_site.glob("tests/*test_case_0_*.html")
    page = tab.open(file)
    page.wait_for_selector(".uplot canvas")
    for place, is_changed in (("Linux 7.2, QEMU 10.0", True), ("Linux 6.12, QEMU 10.0", False)):
        page.locator("#place").select_option(label=place)
        page.wait_for_timeout(200)
        duration, *metrics = page.evaluate(MARKED)
        assert duration == [0, 0]
        for share, columns in metrics:
            # The dashes of both levels, with gaps; and the band between two runs or more.
            assert (share > 0.4, columns >= 5) == (is_changed, is_changed), place
            assert columns == 0 or is_changed
        described = page.locator("figure [role=img]").evaluate_all(
            "boxes => boxes.map(box => box.getAttribute('aria-label').includes('worse: +'))"
        )
        assert described == [False, is_changed, is_changed]
        assert page.locator("figure p").count() == 2 * is_changed
    tab.context.close()
    assert tab.complaints == []


def test_metrics_of_two_sets(tab: Tab, long_site: Path) -> None:
    """The statistics are those of the command, which the page prints."""
    runs = sorted(file.stem for file in (long_site / "runs").iterdir())
    note = "#metrics-of-sets"
    for sizes, text in (
        ((4, 4), "paprscm compare 00000000 00000010 00000020 00000030 -- 00000c80"),
        ((3, 5), "paprscm compare 00000000 00000010 00000020 -- 00000c70"),
        ((8, 2), "paprscm compare 00000000"),
        ((3, 4), "not comparable, at least 4 + 4"),
        ((7, 2), "not comparable"),
        ((1, 1), "not comparable"),
    ):
        a, b = ",".join(runs[: sizes[0]]), ",".join(runs[-sizes[1] :])
        page = tab.open(long_site / "compare.html", f"#a={a}&b={b}")
        assert text in page.locator(note).inner_text(), sizes
    page = tab.open(long_site / "compare.html", f"#a={a}&b={a}")
    assert "a run is in both sets" in page.locator(note).inner_text()


def test_a_comparison(tab: Tab, site: Path) -> None:
    runs = sorted(file.stem for file in (site / "runs").iterdir())
    page = tab.open(site / "compare.html", f"#a={runs[0]},{runs[6]}&b={runs[-1]}")
    count = page.locator("#count").inner_text()
    assert count.startswith("2 runs against 1 run, 90 tests in both: 1 worse, 0 better")
    row = page.locator("#result details").first
    assert row.locator("summary").inner_text() == "Worse: 1"
    assert "test_case_81" in row.locator("tbody th").inner_text()
    assert row.locator("td").all_inner_texts() == ["PASS 2", "FAIL"]
    page.locator("#b").select_option(runs[0])
    assert "0 worse, 0 better" in page.locator("#count").inner_text()
    assert f"b={runs[0]}" in page.url


def test_many_runs_are_drawn_at_once(tab: Tab, tmp_path: Path) -> None:
    """200 runs of 300 tests are one canvas and a few thousand elements."""
    page = tab.open(write_many(tmp_path / "site") / "index.html")
    assert len(rows(page)) == 300
    assert page.locator("canvas").count() == 1
    assert page.evaluate("document.querySelectorAll('*').length") < 2000
    data = "document.querySelector('canvas').getContext('2d').getImageData(0, 0, 400, 400).data"
    assert page.evaluate(f"{data}.some(Boolean)")
