# SPDX-License-Identifier: GPL-2.0-or-later
"""Records of runs in the database."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from records import BARE, GUEST, KERNEL, example, make_record, make_test

from paprscm.errors import ConfigError
from paprscm.history.runs import Filter
from paprscm.history.store import History
from paprscm.results.record import Record


def run(hour: int, **changes: Any) -> Record:
    """A run at this hour."""
    start = f"2026-11-27T{hour:02}:00:00+00:00"
    return make_record(make_test("a"), **{"id": f"{hour:02}" * 20, "start": start, **changes})


def test_a_run_that_is_imported_twice_is_one_run(address: str) -> None:
    with History(address, create=True) as history:
        assert history.add(example(), "/a") == "added"
        assert history.add(example(), "/b") == "present"
        assert list(history.records()) == [example()]
        # --force-job-id gives two jobs one id.
        assert history.add(run(4, id=example().job.id), "/c") == "added"
    with History(address) as history:
        assert [one.source for one in history.runs()] == ["/a", "/c"]


def test_a_run_that_was_interrupted_is_replaced_by_its_end(address: str) -> None:
    tests = make_test("a"), make_test("b", "INTERRUPTED"), make_test("c", "INTERRUPTED")
    early = make_record(*tests, end=None)
    later = replace(early, tests=(tests[0], make_test("b"), tests[2]))
    whole = make_record(make_test("a"), make_test("b"), make_test("c"))
    with History(address, create=True) as history:
        assert history.add(early, "/a") == "added"
        assert history.add(later, "/b") == "replaced"
        assert history.add(early, "/c") == "present"
        assert history.add(whole, "/d") == "replaced"
        assert history.add(later, "/e") == "present"
        assert list(history.records()) == [whole]


def test_records_are_sorted_by_time_and_selected(address: str) -> None:
    old_kernel = replace(GUEST, kernel=replace(KERNEL, release="6.1.1_0"))
    one, two, three = run(1), run(2), run(3, start="2026-11-27T04:00:00+02:00")
    two = replace(two, environments={"guest": old_kernel, "bare": BARE})
    with History(address, create=True) as history:
        for record in (one, three, two):
            history.add(record, "")

        def selected(**conditions: object) -> list[Record]:
            return list(history.records(Filter(**conditions)))  # type: ignore[arg-type]

        # The third started at the same moment as the second.
        assert selected() == [one, two, three]
        start_s = history.runs()[1].started_s
        assert selected(since_s=start_s) == [two, three]
        assert selected(until_s=start_s) == [one]
        assert selected(kernel="6.1.1_") == [two]
        assert selected(kernel="6_1") == []
        assert selected(qemu="10.0") == [one, two, three]
        assert selected(host="EPYC") == [one, two, three]
        assert selected(host="POWER") == []
        assert selected(last=2) == [two, three]
        assert selected(last=1, kernel="6.12") == [three]


def test_a_run_is_found_by_the_beginning_of_its_id(address: str) -> None:
    with History(address, create=True) as history:
        history.add(run(1), "")
        history.add(run(1, start="2026-11-28T00:00:00+00:00"), "")
        history.add(run(2), "")
        assert history.find("02") == run(2)
        assert history.find("01" * 20 + "@2026-11-27") == run(1)
        with pytest.raises(ConfigError, match=r"several runs in .* begins with 0101"):
            history.find("0101")
        with pytest.raises(ConfigError, match=r"no run in .* begins with 0%"):
            history.find("0%")


def test_ids_and_texts_have_every_character(address: str) -> None:
    name = "x/\0\n\u202e\U0001f600'\"%_\\;--.py:X.a"
    record = make_record(replace(make_test("a"), name=name), id=f"1%_'\0{name}", folder="\0")
    with History(address, create=True) as history:
        assert history.add(record, "/x") == "added"
        assert history.add(record, "") == "present"
        assert list(history.records()) == [record]
        assert [test for test, _, _ in history.verdicts()] == [name.replace("\0", "\ufffd")]
        assert history.find("1%_'") == record


def test_a_run_without_tests(address: str) -> None:
    with History(address, create=True) as history:
        history.add(make_record(), "")
        assert list(history.records()) == [make_record()]
        assert list(history.verdicts()) == []


def test_verdicts_are_in_the_order_of_time(address: str) -> None:
    with History(address, create=True) as history:
        history.add(run(2, start="2026-11-27T02:00:00+00:00"), "")
        late = make_record(make_test("a", "FAIL"), id="3", start="2026-11-27T02:30:00+01:00")
        history.add(late, "")
        assert [status for _, _, status in history.verdicts()] == ["FAIL", "PASS"]
        assert [status for _, _, status in history.verdicts(Filter(last=1))] == ["PASS"]


def test_conditions_do_not_depend_on_paths(address: str) -> None:
    elsewhere = replace(GUEST, kernel=replace(KERNEL, path="/other"), snapshot=None)
    other = replace(GUEST, kernel=replace(KERNEL, build_id="1"))
    with History(address, create=True) as history:
        for hour, environment in enumerate((GUEST, elsewhere, other)):
            parameters = {"kernel": f"/{hour}"}
            record = run(hour, parameters=parameters)
            record = replace(record, environments={"guest": environment, "bare": BARE})
            history.add(record, "")
        history.add(run(3, parameters={"seed": "7"}), "")
        killed = replace(run(4), tests=(make_test("a"), make_test("b", environment=None)))
        history.add(killed, "")
        a, b, c, seed, d, e = [conditions for _, conditions, _ in history.verdicts()]
    assert a == b == d == e
    assert len({a, c, seed}) == 3
