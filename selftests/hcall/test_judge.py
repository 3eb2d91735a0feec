# SPDX-License-Identifier: GPL-2.0-or-later
"""The judge reports each wrong hcall result, and no right one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from records import make_test

from paprscm.errors import ConfigError, ContractError
from paprscm.hcall.judge import ScmJudge, branch_table, count_branches, counts_by_name, request
from paprscm.hcall.mailbox import Answer, Call
from paprscm.hcall.model import BRANCHES
from paprscm.papr import Hcall
from paprscm.vm.machine import MIB, Nvdimm

DIMM = Nvdimm(slot=0, size_bytes=256 * MIB)
HEALTH = request(Hcall.H_SCM_HEALTH, DIMM.drc)
FLUSH = request(Hcall.H_SCM_FLUSH, DIMM.drc, 0)


class Answers:
    """A bare machine that returns prepared answers."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.next: list[tuple[int, tuple[int, ...]]] = []
        self.asked: list[Call] = []

    @property
    def qmp(self) -> Answers:
        return self

    def execute(self, command: str) -> list[dict[str, Any]]:
        assert command == "query-memory-devices"
        return [{"type": "nvdimm", "data": {"slot": 0, "addr": 1 << 30}}]

    def file(self, slot: int) -> Path:
        assert slot == 0
        return self._file

    def batch(self, calls: list[Call], *, timeout_s: float = 10) -> list[Answer]:
        del timeout_s
        self.asked += calls
        answers = [self.next.pop(0) for _ in calls]
        return [Answer(code, (*out, *[0] * (9 - len(out))), 1, 0, 0, 1) for code, out in answers]


@pytest.fixture
def machine(tmp_path: Path) -> Answers:
    file = tmp_path / "dimm"
    with file.open("wb") as opened:
        opened.truncate(DIMM.file_bytes)
        opened.seek(DIMM.size_bytes)
        opened.write(b"\x80\x00\x00\x01")
    return Answers(file)


def judge(machine: Answers) -> ScmJudge:
    return ScmJudge(machine, [DIMM])  # type: ignore[arg-type]


def test_right_answers_pass_and_are_counted(machine: Answers) -> None:
    machine.next = [(0, (0, 1 << 63)), (9901, (1, 0))]
    scm_judge = judge(machine)
    scm_judge.make(HEALTH, FLUSH)
    assert (scm_judge.calls, scm_judge.model.dimms[0].last_token) == (2, 1)
    assert [call.opcode for call in machine.asked] == [0x400, 0x44C]


def test_the_label_area_is_read_after_the_data(machine: Answers) -> None:
    assert judge(machine).model.dimms[0].label[:5] == b"\x80\x00\x00\x01\x00"


@pytest.mark.parametrize(
    ("code", "outputs"),
    [
        (-4, (DIMM.drc,)),
        (0, (0, 0)),
        (0, (1, 1 << 63)),
        (0, (0, 1 << 63, 7)),
    ],
)
def test_a_wrong_code_or_register_is_named(
    machine: Answers, code: int, outputs: tuple[int, ...]
) -> None:
    machine.next = [(code, outputs)]
    with pytest.raises(ContractError, match=r"1 of 1 calls .*\n  H_SCM_HEALTH\(0x9"):
        judge(machine).make(HEALTH)


def test_ten_of_many_wrong_answers_are_shown(machine: Answers) -> None:
    machine.next = [(-1, ())] * 25
    with pytest.raises(ContractError, match="and 15 more") as caught:
        judge(machine).make(*[HEALTH] * 25)
    assert caught.value.message.count("H_SCM_HEALTH(") == 10


def test_a_known_bug_is_separate(machine: Answers) -> None:
    read = request(Hcall.H_SCM_READ_METADATA, DIMM.drc, 0, 4)
    machine.next = [(0, (0xFFFFFFFF80000001, 0, 4)), (0, (0x80000001, 0, 4))]
    scm_judge = judge(machine)
    scm_judge.make(read, read)
    assert list(scm_judge.known_wrong) == ["qemu-read-metadata-sign-extends"]
    machine.next = [(0, (0xFFFF80000001, 0, 4))]
    with pytest.raises(ContractError, match="expected H_SUCCESS r4=0x80000001"):
        scm_judge.make(read)


def test_a_flush_polled_to_its_end_is_removed(machine: Answers) -> None:
    machine.next = [(9901, (1, 0)), (9901, (2, 0)), (0, (DIMM.drc, 1)), (0, (DIMM.drc, 2))]
    scm_judge = judge(machine)
    scm_judge.make(FLUSH, FLUSH)
    scm_judge.poll_to_the_end()
    assert scm_judge.model.dimms[0].outstanding == {}
    assert [call.args[1] for call in machine.asked[2:]] == [1, 2]
    assert all(call.poll for call in machine.asked[2:])


def test_a_flush_that_never_ends_is_reported(machine: Answers) -> None:
    machine.next = [(9901, (1, 0)), (9901, (1, 1))]
    scm_judge = judge(machine)
    scm_judge.make(FLUSH)
    # The contract allows any number of long-busy answers, but not as the last one.
    with pytest.raises(ContractError, match=r"H_SCM_FLUSH\(0x90000000, 1\) has not ended"):
        scm_judge.poll_to_the_end()


def test_missing_branches_are_named(machine: Answers) -> None:
    scm_judge = judge(machine)
    machine.next = [(0, (0, 1 << 63))]
    scm_judge.make(HEALTH)
    assert scm_judge.missing([Hcall.H_SCM_HEALTH]) == {
        "H_SCM_HEALTH H_PARAMETER (no such nvdimm)",
        "H_SCM_HEALTH H_SUCCESS (unarmed)",
    }
    assert not scm_judge.missing([Hcall.H_SCM_HEALTH], without=["unarmed", "no such nvdimm"])


def test_the_tests_of_a_job_are_added_up() -> None:
    first, second = sorted(BRANCHES)[:2]
    tests = [
        make_test("a", facts={"branches": counts_by_name(Counter(counts))})
        for counts in ({first: 3, second: 0}, {first: 4})
    ]
    total = count_branches([*tests, make_test("killed")])
    assert (total[first], total[second]) == (7, 0)
    assert branch_table(total).title == f"1 of {len(BRANCHES)} branches taken"


def test_a_job_without_hcalls_is_refused() -> None:
    with pytest.raises(ConfigError, match="no test of this job has recorded branches"):
        count_branches([make_test("a")])
