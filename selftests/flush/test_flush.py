# SPDX-License-Identifier: GPL-2.0-or-later
"""Flushes as data: strict parsing of reports, checks of order, protocol and counts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paprscm.errors import CapabilityError, ContractError, HostError
from paprscm.flush import trace
from paprscm.flush.accounts import FlushAccounts
from paprscm.flush.durability import ClockOffset, expect_durable
from paprscm.flush.load import DurableCall, FlushLoadReport
from paprscm.flush.trace import FlushHcall, FlushTrace, TracedFlush, expect_protocol
from paprscm.guest.report import ProbeError, read_report
from paprscm.papr import ReturnCode
from paprscm.vm.shim_layout import Injected, Operation
from paprscm.vm.sync_shim import Counts, Record

BUSY = int(ReturnCode.H_LONG_BUSY_ORDER_10_MSEC)
DRC = 0x90000000

# --- reports ---------------------------------------------------------------------------------


def report(**changes: Any) -> dict[str, Any]:
    return {
        "tool": "flush",
        "version": 1,
        "verb": "load",
        "seed": 1,
        "threads": 2,
        "targets": 1,
        "duration_ns": 2_000_000_000,
        "calls": [[0, "fsync", 5, 9, 0], [1, "deep_flush", 6, 7, 5]],
        **changes,
    }


def test_a_report() -> None:
    load_report = read_report(FlushLoadReport, json.dumps(report()), 0)
    assert load_report.duration_s == 2
    assert load_report.calls == (
        DurableCall(0, "fsync", 5, 9, 0),
        DurableCall(1, "deep_flush", 6, 7, 5),
    )


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"tool": "faults"}, r"\$\.tool"),
        ({"version": 2}, r"\$\.version"),
        ({"verb": "clock"}, r"\$\.verb"),
        ({"more": 1}, "unknown field `more`"),
        ({"calls": [[0, "fsync", 5, 9]]}, r"at least length 5, got 4 - at `\$\.calls\[0\]`"),
        ({"calls": [[0, "fsync", 5, 9, 0, 0]]}, "at most length 5"),
        ({"calls": [[0, "fsync", 5, 9, True]]}, r"got `bool` - at `\$\.calls\[0\]\[4\]`"),
        ({"calls": [[0, "fsync", 5, -9, 0]]}, ">= 0"),
        ({"calls": [[0, "fsync", 5, 9.0, 0]]}, "got `float`"),
        ({"calls": [[0, "fsync", 5, None, 0]]}, "got `null`"),
        ({"calls": [7]}, "got `int`"),
        ({"calls": [[0, "sync", 5, 9, 0]]}, "'sync'"),
        ({"calls": [[0, "fsync", 9, 5, 0]]}, "ended before it began"),
        ({"calls": [[2, "fsync", 5, 9, 0]]}, "unknown thread"),
        ({"targets": 0}, "no target"),
    ],
)
def test_a_contradictory_report(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(ProbeError, match=what):
        read_report(FlushLoadReport, json.dumps(report(**changes)), 0)


def test_a_report_with_another_status() -> None:
    with pytest.raises(ProbeError, match="status 4"):
        read_report(FlushLoadReport, json.dumps(report()), 4)


# --- order -----------------------------------------------------------------------------------


def sync(begin: int, end: int | None, result: int | None = 0) -> Record:
    # The last two are the bytes that it covers.
    injected = Injected(0)
    return Record(0, Path("file"), Operation.FDATASYNC, begin, end, result, injected, 0.0, 1, 0, 1)


def call(begin: int, end: int, errno: int = 0) -> DurableCall:
    return DurableCall(0, "fsync", begin, end, errno)


@pytest.mark.parametrize(
    ("syncs", "holds"),
    [
        ([sync(1100, 1190)], True),
        ([sync(1100, 1200)], True),
        ([sync(1100, 1201)], False),
        ([sync(1099, 1190)], False),
        ([sync(1110, None, None)], False),
        ([sync(1110, 1150, 5)], False),
        ([], False),
        # Any sync counts, also a later one that ends earlier.
        ([sync(1100, 1300), sync(1120, 1130)], True),
        ([sync(1000, 1110), sync(1190, 1210)], False),
    ],
)
def test_a_call_waits_for_a_sync(syncs: list[Record], holds: bool) -> None:
    calls, offset = [call(100, 200)], ClockOffset(1000, 1000)
    if holds:
        expect_durable(calls, syncs, offset)
    else:
        with pytest.raises(ContractError, match="1 of 1 calls returned before"):
            expect_durable(calls, syncs, offset)


def test_the_uncertainty_of_the_clocks_is_tolerated() -> None:
    expect_durable([call(100, 200)], [sync(1100, 1250)], ClockOffset(1000, 1050))
    with pytest.raises(ContractError, match=r"ended 0\.000 ms too late"):
        expect_durable([call(100, 200)], [sync(1100, 1251)], ClockOffset(1000, 1050))


def test_a_failed_call_promises_nothing() -> None:
    expect_durable([call(100, 200, errno=5)], [], ClockOffset(0, 0))


def test_clocks_that_drift() -> None:
    assert ClockOffset(0, 10).narrowed(ClockOffset(5, 20)) == ClockOffset(5, 10)
    with pytest.raises(HostError, match="drift"):
        ClockOffset(0, 10).narrowed(ClockOffset(11, 20))


# --- protocol --------------------------------------------------------------------------------


def hcall(sent: int, token: int, code: int, begin: int = 0, drc: int = DRC) -> FlushHcall:
    return FlushHcall(7, drc, sent, token, code, begin, begin + 10)


def flush(*calls: FlushHcall) -> TracedFlush:
    return TracedFlush(calls)


GOOD = flush(hcall(0, 5, BUSY), hcall(5, 5, BUSY, 20_000), hcall(5, 0, 0, 40_000))


def test_the_protocol_kept() -> None:
    expect_protocol([GOOD])
    other = flush(hcall(0, 5, BUSY, drc=DRC + 1), hcall(5, 0, 0, 40_000, drc=DRC + 1))
    expect_protocol([GOOD, other])
    assert GOOD.waits_us == [19_990, 19_990]


@pytest.mark.parametrize(
    ("flushes", "what"),
    [
        ([flush(hcall(4, 5, BUSY), hcall(5, 0, 0))], "begins with a token"),
        ([flush(hcall(0, 5, 0))], "ended with its first call"),
        ([flush(hcall(0, 0, BUSY), hcall(0, 0, 0))], "token 0 is 0 or not unique"),
        ([GOOD, GOOD], "token 5 is 0 or not unique"),
        ([flush(hcall(0, 5, BUSY), hcall(6, 0, 0))], "another token or drc"),
        ([flush(hcall(0, 5, BUSY), hcall(5, 0, 0, drc=DRC + 1))], "another token or drc"),
        ([flush(hcall(0, 5, BUSY), hcall(5, 0, -1))], "H_HARDWARE"),
    ],
)
def test_the_protocol_broken(flushes: list[TracedFlush], what: str) -> None:
    with pytest.raises(ContractError, match=what):
        expect_protocol(flushes)


def waited(us: int, n: int) -> list[TracedFlush]:
    return [flush(hcall(0, token, BUSY), hcall(token, 0, 0, 10 + us)) for token in range(1, n + 1)]


def test_the_wait_between_polls() -> None:
    expect_protocol(waited(10_000, 20))
    # A few waits can be short on a slow host.
    expect_protocol(waited(4_000, 19))
    with pytest.raises(ContractError, match=r"waited 9999.* us .*at least 10000 us"):
        expect_protocol(waited(9_999, 20))


# --- trace and accounts ----------------------------------------------------------------------


BUFFER = 0xC00000000A1B2C00
HEAD = "           flush-{}   [000] d....  "


def answer(pid: int, us: int, token: int, code: int, buffer: int = BUFFER, drc: int = DRC) -> str:
    return (
        f"{HEAD.format(pid)}12.{us:06}: answer: (papr_scm_pmem_flush+0x6c/0x124 <- plpar_hcall) "
        f"buffer={buffer:#x} drc={drc:#x} token={token} code={code}"
    )


def lines(pid: int, us: int, sent: int, token: int, code: int, drc: int = DRC) -> list[str]:
    head = HEAD.format(pid)
    return [
        f"{head}12.{us:06}: call: (plpar_hcall+0x8/0x60) op=1100 buffer={BUFFER:#x} drc={drc:#x} "
        f"sent={sent}",
        answer(pid, us + 9, token, code),
    ]


class Guest:
    """Answers the commands of the trace like a kernel."""

    def __init__(self) -> None:
        self.status = 0
        self.pending: list[str] = []
        self.flushes = self.hcalls = self.missed = 0
        self.done = dict.fromkeys(Operation, 0)
        self.begun = 0
        self.vm = SimpleNamespace(syncs=lambda _slot: self)

    def run(self, _command: str) -> Any:
        return SimpleNamespace(status=self.status, stderr="why")

    def succeed(self, _command: str) -> str:
        printed = [*self.pending, f"hcalls {100 + self.hcalls}"]
        self.pending = []
        return "\n".join([*printed, f"probe flush {self.flushes} {self.missed}", "probe call 9 0"])

    def counts(self, operation: Operation | None = None) -> Counts:
        ended = sum(self.done.values()) if operation is None else self.done[operation]
        return Counts(ended + self.begun, ended, 0, 0)

    def flush(self, token: int, *, syncs: int = 1, hcalls: int = 2, calls: int = 1) -> None:
        self.pending += lines(50, 1000, 0, token, BUSY) + lines(50, 13_000, token, 0, 0)
        self.flushes += calls
        self.hcalls += hcalls
        self.done[Operation.FDATASYNC] += syncs


@pytest.fixture
def guest() -> Guest:
    return Guest()


def new_accounts(guest: Guest) -> FlushAccounts:
    return FlushAccounts(guest, [0])  # type: ignore[arg-type]


def test_three_counts_agree(guest: Guest) -> None:
    guest.flush(1)
    guest.pending = []
    guest.flushes = 0
    accounts = new_accounts(guest)
    guest.flush(2)
    guest.flush(3)
    account = accounts.take(limit_s=0)
    account.expect({0: 2})
    expect_protocol(account.all())
    assert (account.count, account.calls) == (2, 4)
    assert account.all()[0].calls[1].begin_us == 12_013_000
    accounts.take(limit_s=0).expect({})


def test_counts_that_were_not_expected(guest: Guest) -> None:
    accounts = new_accounts(guest)
    guest.flush(2)
    account = accounts.take(limit_s=0)
    with pytest.raises(ContractError, match=r"flushes by slot: \{0: 1\}, expected \{0: 2\}"):
        account.expect({0: 2})
    with pytest.raises(ContractError, match=r"slot 0 1 by fdatasync, expected slot 0 1 by pmem"):
        account.expect({0: 1}, Operation.PMEM_PERSIST)


@pytest.mark.parametrize(
    "lie", [{"syncs": 0}, {"syncs": 2}, {"hcalls": 3}, {"calls": 2}, {"calls": 0}]
)
def test_counts_that_differ(guest: Guest, lie: dict[str, int]) -> None:
    accounts = new_accounts(guest)
    guest.flush(2, **lie)
    with pytest.raises(ContractError, match="the counts differ: papr_scm_pmem_flush was called"):
        accounts.take(limit_s=0)


def test_take_waits_for_flushes_in_flight(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    accounts = new_accounts(guest)
    guest.flush(2)
    guest.begun = 1

    def sleep(_s: float) -> None:
        guest.begun = 0

    monkeypatch.setattr("time.sleep", sleep)
    accounts.take().expect({0: 1})
    assert guest.begun == 0


def test_a_flush_that_has_not_ended(guest: Guest) -> None:
    accounts = new_accounts(guest)
    guest.flush(2)
    guest.pending = guest.pending[:3]
    with pytest.raises(ContractError, match="began 1 flushes and ended 0, in 1 calls"):
        accounts.take(limit_s=0)


def test_a_flush_of_no_dimm(guest: Guest) -> None:
    accounts = FlushAccounts(guest, [1])  # type: ignore[arg-type]
    guest.flush(2)
    with pytest.raises(ContractError, match="drc 0x90000000, which is not a DIMM"):
        accounts.take(limit_s=0)


CALL = lines(3, 0, 0, 0, 0)[0]


@pytest.mark.parametrize(
    ("traced", "what"),
    [
        (["CPU:0 [LOST 5 EVENTS]"], "cannot be parsed"),
        ([CALL, CALL], "was not traced"),
        ([CALL, answer(3, 9, 5, BUSY, buffer=BUFFER + 8)], "with other arguments"),
        ([CALL, answer(3, 9, 5, BUSY, drc=DRC + 1)], "with other arguments"),
    ],
)
def test_a_trace_with_holes(guest: Guest, traced: list[str], what: str) -> None:
    trace = FlushTrace(guest)  # type: ignore[arg-type]
    guest.pending = traced
    with pytest.raises(HostError, match=what):
        trace.read()


def test_the_answer_to_another_hcall_on_a_dimm(guest: Guest) -> None:
    trace = FlushTrace(guest)  # type: ignore[arg-type]
    guest.pending = [answer(3, 9, 0, 0)]
    assert trace.read().traced == (0, 0)


def test_a_flush_of_no_dimms_type(guest: Guest) -> None:
    trace = FlushTrace(guest)  # type: ignore[arg-type]
    guest.pending = lines(3, 0, 0, 5, BUSY, drc=7)
    with pytest.raises(ContractError, match="drc 0x7, which is not a DIMM's"):
        trace.read()


def test_a_probe_that_missed(guest: Guest) -> None:
    guest.missed = 1
    with pytest.raises(HostError, match="the probe flush missed 1 calls"):
        FlushTrace(guest)  # type: ignore[arg-type]


@pytest.mark.parametrize("status", sorted(trace._LACKING))
def test_a_kernel_that_cannot_be_probed(guest: Guest, status: int) -> None:
    guest.status = status
    with pytest.raises(CapabilityError):
        FlushTrace(guest)  # type: ignore[arg-type]


def test_tracing_that_does_not_work(guest: Guest) -> None:
    guest.status = 10
    with pytest.raises(HostError, match="cannot be traced: why"):
        FlushTrace(guest)  # type: ignore[arg-type]
