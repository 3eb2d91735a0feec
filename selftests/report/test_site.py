# SPDX-License-Identifier: GPL-2.0-or-later
"""Files of a site: complete, harmless, small, and written as a whole. No browser is needed."""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from many_records import many
from records import make_record, make_test
from site_pages import Page, data
from sites import HOSTILE, write_hostile, write_many

from paprscm.errors import ConfigError, HostError
from paprscm.paths import ROOT
from paprscm.report import folder as report_folder
from paprscm.report.site import ASSETS, write_site

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action 'none'"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_many(tmp_path_factory.mktemp("site") / "site", runs=24, tests=90)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hostile(tmp_path_factory.mktemp("hostile") / "site")


@pytest.fixture(params=["site", "hostile"])
def each_site(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(request.param))


@functools.cache
def pages(site: Path) -> dict[str, Page]:
    return {str(f.relative_to(site)): Page(f.read_text()) for f in sorted(site.rglob("*.html"))}


def tree(site: Path) -> dict[str, bytes]:
    return {str(f.relative_to(site)): f.read_bytes() for f in site.rglob("*") if f.is_file()}


# --- pages


def test_each_page_allows_only_its_own_files(each_site: Path) -> None:
    found = pages(each_site)
    assert {"index.html", "runs.html", "compare.html", "issues.html"} < set(found)
    for name, page in found.items():
        policies = [a["content"] for _, a in page.elements if "http-equiv" in a]
        assert policies == [POLICY], name
        # Before all that it should hold for.
        assert [tag for tag, _ in page.elements].index("meta") < 4
        scripts = [attributes for tag, attributes in page.elements if tag == "script"]
        assert all(set(attributes) == {"src"} for attributes in scripts)
        assert not any(tag in ("style", "iframe", "object", "form") for tag, _ in page.elements)
        names = {attribute for _, attributes in page.elements for attribute in attributes}
        assert not any(attribute.startswith("on") or attribute == "style" for attribute in names)


def test_links_lead_to_files_and_places_of_the_site(each_site: Path) -> None:
    found = pages(each_site)
    ids = {name: page.values("id") for name, page in found.items()}
    for name, page in found.items():
        assert len(ids[name]) == len(set(ids[name])), name
        for link in [*page.values("href"), *page.values("src")]:
            path, _, place = link.partition("#")
            target = (each_site / name).parent / path if path else each_site / name
            file = target.resolve()
            assert file.is_file() and file.is_relative_to(each_site.resolve()), (name, link)
            if place and "=" not in place and file.suffix == ".html":
                assert unquote(place) in ids[str(file.relative_to(each_site.resolve()))], link


def test_every_page_can_be_reached(site: Path) -> None:
    reached, todo = set(), ["index.html"]
    found = pages(site)
    index = data(site / "data/index.js")
    drawn = {f"tests/{key}.html" for _, key, _ in index["tests"]}
    while todo:
        name = todo.pop()
        if name in reached:
            continue
        reached.add(name)
        links = {link.partition("#")[0] for link in found[name].values("href")} - {""}
        files = [((site / name).parent / link).resolve().relative_to(site) for link in links]
        todo += [str(file) for file in files if file.suffix == ".html"]
    assert reached | drawn == set(found)


def test_labels_of_controls_and_headings(site: Path) -> None:
    """What a screen reader needs; axe checks more in a browser."""
    for name, page in pages(site).items():
        tags = [tag for tag, _ in page.elements]
        assert page.elements[0] == ("html", {"lang": "en"}), name
        assert tags.count("h1") == tags.count("main") == tags.count("title") == 1
        levels = [int(tag[1]) for tag in tags if re.fullmatch(r"h\d", tag)]
        assert all(b - a <= 1 for a, b in itertools.pairwise(levels)), name
        assert tags.count("label") >= sum(tag in ("select", "input") for tag in tags)
        assert "width=device-width" in "".join(page.values("content"))


# --- hostile texts


def test_hostile_texts_do_not_change_a_page(hostile: Path, tmp_path: Path) -> None:
    """Pages have the same elements as with plain texts."""
    plain = write_hostile(tmp_path / "plain", tuple(f"plain{i}" for i in range(len(HOSTILE))))

    def shapes(site: Path) -> list[str]:
        return sorted(" ".join(tag for tag, _ in p.elements) for p in pages(site).values())

    assert shapes(hostile) == shapes(plain)


def test_hostile_characters_are_in_no_file(hostile: Path) -> None:
    for file in hostile.rglob("*"):
        if file.is_dir() or file.name.startswith("uPlot"):
            continue
        found = re.findall(
            "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]",
            file.read_text(encoding="utf-8"),
        )
        assert found == [], file
        assert file.stat().st_size < 400_000, file


def test_a_text_of_10_mb_is_cut(tmp_path: Path) -> None:
    text = "<b>\x1b[1m" + "x" * 10_000_000
    failing = make_test("x", "FAIL", reason=text, contract=text, hint=text, command=text)
    write_site([make_record(failing)], tmp_path / "site", console=lambda *_: [text])
    files = tree(tmp_path / "site")
    assert max(map(len, files.values())) < 100_000
    assert any(b"&lt;b&gt;xxx" in content for content in files.values())


def test_a_text_is_readable_where_it_belongs(hostile: Path) -> None:
    texts = ["".join(page.texts) for page in pages(hostile).values()]
    for text in ("</script><script>alert(1)</script>", "{{ 7 * 7 }}{% raw %}", "NUL\ufffdBEL"):
        assert sum(text in page for page in texts) > 5, text
    assert any("Console" in text and "\ufffdoverride" in text for text in texts)


# --- data


def test_data_are_ascii_without_markup(each_site: Path) -> None:
    files = sorted((each_site / "data").iterdir())
    assert len(files) > 20 and all(data(file) for file in files)


def test_the_picture_has_the_verdicts_of_the_records(site: Path) -> None:
    index = data(site / "data/index.js")
    records = list(many(24, 90))
    tests = {name: cells for (name, *_), cells in zip(index["tests"], index["cells"], strict=True)}
    for number, record in enumerate(records):
        for test in record.tests:
            assert index["statuses"][tests[test.name][number]] == test.status
    broken = {index["tests"][position][0] for position in index["broken"]}
    page = "".join(Page((site / "index.html").read_text()).texts)
    assert broken and all(name in page for name in broken)
    assert [run[1] for run in index["runs"]] == sorted(run[1] for run in index["runs"])


def test_a_run_links_to_all_of_its_tests(site: Path) -> None:
    for run in (site / "runs").iterdir():
        links = Page(run.read_text()).values("href")
        assert len({link for link in links if link.startswith("../tests/")}) == 90


def test_metrics_are_those_of_the_records(site: Path) -> None:
    index = data(site / "data/index.js")
    name, key, _ = next(test for test in index["tests"] if test[0].endswith("test_case_0_pmem_off"))
    metrics = {one["label"]: one for one in data(site / f"data/{key}.js")["metrics"]}
    expected = [
        metric.value
        for record in many(24, 90)
        for test in record.tests
        for metric in test.metrics
        if test.name == name and metric.dimensions == {"fstype": "xfs"}
    ]
    found = [
        pair
        for one in metrics["call_median fstype=xfs"]["series"]
        for pair in zip(one["runs"], one["values"], strict=True)
    ]
    assert [value for _, value in sorted(found)] == expected
    assert metrics["call_median fstype=xfs"]["unit"] == "us"


def test_a_failure_has_its_reason_console_and_command(site: Path) -> None:
    (file,) = site.glob("tests/*test_case_40_pmem_off-*.html")
    text = "".join(Page(file.read_text()).texts)
    assert "fsync returned 0, 4096 bytes are not in the file" in text
    assert "the last line" in text and "avocado run tests/pmem/test_pmem_1.py" in text
    assert "Linux 6.12.113 → 6.12.115" in text or "Linux 6.12.115 → 6.12.117" in text


def test_equal_records_give_equal_files(site: Path, tmp_path: Path) -> None:
    chance = random.Random(3)  # noqa: S311
    records = [
        replace(record, tests=tuple(chance.sample(record.tests, len(record.tests))))
        for record in many(24, 90)
    ]
    chance.shuffle(records)
    write_site(records, tmp_path / "again", console=lambda *_: ["a line", "the last line"])
    assert tree(tmp_path / "again") == tree(site)


def test_the_first_page_of_many_runs_is_small(tmp_path: Path) -> None:
    many_runs = write_many(tmp_path / "site")
    first = Page((many_runs / "index.html").read_text())
    names = [link for link in first.values("href") if link.startswith("assets/")]
    files = ["index.html", *names, *first.values("src")]
    assert sum((many_runs / name).stat().st_size for name in files) < 300_000
    assert sum(len(content) for content in tree(many_runs).values()) < 30_000_000


def test_the_dark_scheme_has_all_colours() -> None:
    """Without those of texts on a status, which do not change."""
    style = (ROOT / "paprscm/report/assets/site.css").read_text()
    light, dark = re.findall(r":root \{\n(.*?)\}", style, re.DOTALL)
    names = [
        set(re.findall(r"^ +(--[a-z-]+): #[0-9a-f]{3,6};$", own, re.M)) for own in (light, dark)
    ]
    assert names[0] - names[1] == {"--on-light", "--on-dark"} and not names[1] - names[0]
    used = set(re.findall(r"var\((--[a-z-]+)\)", style))
    assert used <= names[0]


def test_vendored_files_are_those_of_the_digests() -> None:
    vendor = ROOT / "paprscm/report/vendor"
    lines = (vendor / "SHA256SUMS").read_text().splitlines()
    digests = {name: digest for digest, name in map(str.split, lines)}
    assert set(digests) == {asset.name for asset in ASSETS if asset.parent == vendor}
    for name, digest in digests.items():
        assert hashlib.sha256((vendor / name).read_bytes()).hexdigest() == digest


# --- the folder


def test_a_site_is_replaced_as_a_whole(tmp_path: Path) -> None:
    site = write_many(tmp_path / "site", runs=3, tests=4)
    old = tree(site)
    write_many(site, runs=2, tests=2)
    assert len(list((site / "runs").iterdir())) == 2 and set(old) - set(tree(site))
    assert [file.name for file in tmp_path.iterdir()] == ["site"]
    assert (site.stat().st_mode & 0o777) == 0o755


@pytest.mark.parametrize("kind", ["file", "folder", "record"])
def test_a_folder_that_is_not_a_site_is_refused(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "mine"
    if kind == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / ("record.json" if kind == "record" else "x")).write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match="is not a"):
        write_site(many(1, 1), target)
    assert tree(tmp_path) == before


def test_an_empty_folder_and_a_link_to_one_are_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    write_site(many(1, 1), tmp_path / "link")
    assert (tmp_path / "empty/index.html").is_file() and (tmp_path / "link").is_symlink()


def test_no_record_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run"):
        write_site([], tmp_path / "site")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("earlier", [False, True])
def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool
) -> None:
    site = tmp_path / "site"
    if earlier:
        write_many(site, runs=2, tests=2)
    before = tree(tmp_path)
    write, left = Path.write_text, itertools.count(8, -1)

    def limited(file: Path, text: str, **options: Any) -> int:
        if next(left) == 0:
            write(file, text[: len(text) // 2], **options)
            raise OSError(28, "No space left on device", str(file))
        return write(file, text, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", limited)
        with pytest.raises(HostError, match="site was not written: No space left on device"):
            write_site(many(3, 5), site)
    assert tree(tmp_path) == before
    assert [file.name for file in tmp_path.iterdir()] == ["site"] * earlier


def test_an_interrupted_report_leaves_the_earlier_site(tmp_path: Path) -> None:
    site = write_many(tmp_path / "site", runs=2, tests=2)
    before = tree(tmp_path)
    failing = make_record(make_test("x", "FAIL"))

    def console(*_: object) -> list[str]:
        raise SystemExit(143)

    with pytest.raises(SystemExit):
        write_site([failing], site, console=console)
    assert tree(tmp_path) == before


def test_a_rename_that_fails_puts_the_earlier_site_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = write_many(tmp_path / "site", runs=2, tests=2)
    before = tree(tmp_path)
    rename, calls = Path.rename, itertools.count()

    def failing(file: Path, target: Path) -> Path:
        # The first call finds the earlier site, the second moves it aside.
        if next(calls) == 2:
            raise OSError(5, "Input/output error")
        return rename(file, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(HostError, match="Input/output error"):
        write_site(many(3, 5), site)
    assert tree(tmp_path) == before


def test_reports_at_once_leave_one_whole_site(tmp_path: Path) -> None:
    sources = {runs: list(many(runs, 3)) for runs in (1, 2, 3, 4)}
    wanted = {}
    for runs, records in sources.items():
        write_site(records, tmp_path / f"{runs}")
        wanted[runs] = tree(tmp_path / f"{runs}")
        shutil.rmtree(tmp_path / f"{runs}")
    problems: list[BaseException] = []

    def report(runs: int) -> None:
        try:
            for _ in range(4):
                write_site(sources[runs], tmp_path / "site")
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=report, args=(runs,)) for runs in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert tree(tmp_path / "site") in wanted.values()
    assert [file.name for file in tmp_path.iterdir()] == ["site"]


def test_a_site_that_appears_meanwhile_is_replaced(tmp_path: Path) -> None:
    """The other report's renames happen between this one's check and its own."""
    target = tmp_path / "site"
    with report_folder.replacement(target) as part:
        (part / "x").write_text("new")
        write_many(target, runs=1, tests=1)
    assert (target / "x").read_text() == "new" and not (target / "index.html").exists()


def test_a_site_that_another_report_moves_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between this report's check and its rename, the other one has moved the earlier site."""
    target = write_many(tmp_path / "site", runs=1, tests=1)
    checks = itertools.count()

    def check(site: Path) -> None:
        if next(checks) == 1:
            site.rename(tmp_path / "moved")

    monkeypatch.setattr(report_folder, "check", check)
    with report_folder.replacement(target) as part:
        (part / "x").write_text("new")
    assert (target / "x").read_text() == "new"


def test_a_site_that_another_report_moves_during_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in the way of the other one, which moves it between two looks at it."""
    target = write_many(tmp_path / "site", runs=1, tests=1)
    looks = itertools.count()
    is_file = Path.is_file

    def look(file: Path) -> bool:
        if next(looks) == 0:
            target.rename(tmp_path / "moved")
            (tmp_path / "moved" / report_folder.MARK).unlink()
            write_many(target, runs=1, tests=1)
            (tmp_path / "moved" / "index.html").unlink()
            return False
        return is_file(file)

    monkeypatch.setattr(Path, "is_file", look)
    report_folder.check(target)
    assert next(looks) > 1


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "site"
    with pytest.raises(ConfigError, match="not a site"), report_folder.replacement(target):
        target.mkdir()
        (target / "mine").write_text("mine")
    assert tree(tmp_path) == {"site/mine": b"mine"}
