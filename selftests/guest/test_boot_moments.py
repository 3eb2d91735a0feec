# SPDX-License-Identifier: GPL-2.0-or-later
"""A boot is stopped at each moment, in order; one that is not reached is named."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from paprscm.emulator.gdbstub import NotReachedError
from paprscm.errors import CapabilityError, GuestLostError
from paprscm.guest import boot_moments
from paprscm.guest.boot_moments import Moment, reachable, visit

FIRST = Moment("first instruction")
FIRMWARE = Moment("firmware", prints="SLOF")
EARLY = Moment("early", "prom_init", before_move=True)
LATE = Moment("late", "free_initmem")
INIT = Moment("init", prints="paprscm: init")
ENTRIES = {
    "start_kernel": 0xC000000001003560,
    "prom_init": 0xC000000001001260,
    "free_initmem": 0xC00000000004F968,
}


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The functions of the vmlinux."""
    functions = dict(ENTRIES)
    monkeypatch.setattr(
        boot_moments,
        "entry_points",
        lambda _file, names: {name: functions[name] for name in names if name in functions},
    )
    return functions


def test_addresses_before_and_after_the_kernel_has_moved(entries: dict[str, int]) -> None:
    del entries["free_initmem"]
    assert reachable([FIRST, EARLY, LATE, INIT], Path("vmlinux")) == {
        FIRST: 0,
        EARLY: 0x1401260,
        INIT: 0,
    }


def test_a_vmlinux_without_symbols_is_a_missing_capability(entries: dict[str, int]) -> None:
    entries.clear()
    with pytest.raises(CapabilityError, match="has no symbol table"):
        reachable([FIRST], Path("vmlinux"))


class FakeConsole:
    """A console that has printed some lines."""

    line_count = 7

    def __init__(self, events: list[str], printed: str) -> None:
        self._events, self._printed = events, printed

    def wait_for(self, marks: dict[str, re.Pattern[str]], **limits: Any) -> object:
        ((name, pattern),) = marks.items()
        assert limits["start"] == 7
        self._events.append(f"wait for {name}")
        return (name, "", 0.0) if pattern.search(self._printed) else None

    def tail(self) -> str:
        return "    last line"


class FakeGuest:
    """A guest whose machine reaches all addresses but some."""

    def __init__(
        self, printed: str = "SLOF\npaprscm: init\n", unreached: tuple[int, ...] = ()
    ) -> None:
        self.events: list[str] = []
        self.console = FakeConsole(self.events, printed)
        self.qmp = None
        self.vm = type("Vm", (), {"scratch": Path("/scratch")})
        self.unreached = unreached

    def check(self) -> None:
        self.events.append("check")

    @contextmanager
    def of(self, _qmp: object, path: Path) -> Iterator[FakeGuest]:
        assert path == Path("/scratch/gdb")
        yield self
        self.events.append("detach")

    def run_to(self, address: int, *, meanwhile: Callable[[], object], **_limits: Any) -> None:
        self.events.append(f"run to {address:#x}")
        meanwhile()
        if address in self.unreached:
            raise NotReachedError("no vCPU has executed it")


def boot(guest: FakeGuest, monkeypatch: pytest.MonkeyPatch, *moments: Moment) -> list[str]:
    """Boot the guest, and return the events."""
    monkeypatch.setattr(boot_moments, "Gdb", guest)
    found = reachable(moments, Path("vmlinux"))
    visit(guest, found, lambda one: guest.events.append(f"at {one}"), limit_s=5)  # type: ignore[arg-type]
    return guest.events


@pytest.mark.usefixtures("entries")
def test_order_of_a_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    assert boot(FakeGuest(), monkeypatch, FIRST, FIRMWARE, EARLY, LATE, INIT) == [
        "at first instruction",
        "run to 0x1401260",
        "wait for firmware",
        "at firmware",
        "at early",
        "run to 0xc00000000004f968",
        "at late",
        "detach",
        "wait for init",
        "at init",
    ]


@pytest.mark.usefixtures("entries")
def test_a_function_that_does_not_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = FakeGuest(unreached=(0x1401260,))
    with pytest.raises(GuestLostError, match="does not reach the moment 'early': no vCPU"):
        boot(guest, monkeypatch, FIRST, EARLY, LATE)
    assert guest.events[-1] == "check"


@pytest.mark.usefixtures("entries")
def test_a_line_that_is_not_printed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = FakeGuest(printed="SLOF\n")
    with pytest.raises(GuestLostError, match="has not printed 'paprscm: init' within 5 s"):
        boot(guest, monkeypatch, FIRMWARE, EARLY, INIT)
