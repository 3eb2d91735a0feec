# SPDX-License-Identifier: GPL-2.0-or-later
"""Lasting changes and comparisons of metrics on the pages of a site."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from site_pages import data, text_of
from sites import write_many


@pytest.fixture(scope="module")
def long_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """34 runs in each environment; with the newest 7.2 kernel, times are 20 % longer."""
    return write_many(tmp_path_factory.mktemp("long") / "site", runs=204, tests=12)


def test_a_planted_change_is_on_the_overview_and_its_page(long_site: Path) -> None:
    overview = text_of(long_site / "index.html")
    _, _, changes = overview.partition("Lasting changes of metrics ")
    changes, _, newest = changes.partition(" Environments ")[0].partition(" Newest versions ")
    # Those with changes come first.
    assert re.search(r"^(Linux 7.2.*?8 worse of 8 metrics ?){2}Linux 6.12", newest)
    assert newest.count("no change found in 8 metrics") == 3
    assert changes.count("Linux 7.2, QEMU") == changes.count("Linux 7.2.11 → 7.2.13") == 2
    assert changes.count("worse +") == 6 and changes.count("and 5 more: 5 worse") == 2
    assert "better" not in changes and "6.12" not in changes
    (file,) = long_site.glob("tests/*test_case_0_pmem_off-*.html")
    page = text_of(file)
    assert page.count("worse +") == 4
    sentence = (
        r"call_median fstype=xfs: worse \+\d\d\.\d % \(95 %: \+\d+\.\d % to \+\d+\.\d %\) from"
    )
    assert len(re.findall(sentence, page)) == 2
    (quiet,) = long_site.glob("tests/*test_case_1_pmem_off-*.html")
    assert "Lasting changes" not in text_of(quiet)


def test_a_plot_has_the_changes_of_its_environment(long_site: Path) -> None:
    index = data(long_site / "data/index.js")
    key = next(key for name, key, _ in index["tests"] if name.endswith("test_case_0_pmem_off"))
    found = data(long_site / f"data/{key}.js")
    counts = {}
    for metric in found["metrics"]:
        for one in metric["series"]:
            changes = one.get("changes", [])
            counts[metric["label"], found["places"][one["place"]]] = len(changes)
            for before, after, sentence in changes:
                assert {before, after} <= set(one["runs"]) and before < after
                moved = [run for run in one["runs"] if "7.2.13" in index["runs"][run][3]]
                assert before < moved[0] <= after
                assert sentence.startswith("worse: +")
            levels = one.get("levels", [])
            assert len(levels) == (len(changes) + 1 if changes else 0)
            if changes:
                assert levels[1][2] / levels[0][2] == pytest.approx(1.2, abs=0.06)
    expected = {
        (f"call_median fstype={fs}", f"Linux 7.2, QEMU {qemu}"): 1
        for fs in ("ext4", "xfs")
        for qemu in ("7.2", "10.0")
    }
    assert {place: count for place, count in counts.items() if count} == expected


def test_the_comparison_of_the_newest_versions(long_site: Path) -> None:
    page = text_of(long_site / "compare.html")
    assert page.count("Linux 7.2.11 → 7.2.13: 8 worse of 8 metrics") == 2
    assert page.count("no change found in 8 metrics") == 4
    assert page.count("with a probability of 80 %") == 6
    assert page.count("all runs of one version are before those of the other") == 6
    assert page.count("paprscm compare 00000") == 6


def test_few_runs_are_not_compared(tmp_path: Path) -> None:
    site = write_many(tmp_path / "site", runs=24, tests=6)
    page = text_of(site / "compare.html")
    assert "not comparable noise unknown: " in page and "metrics compared" not in page
    assert "Lasting changes" not in text_of(site / "index.html")
