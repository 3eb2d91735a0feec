# SPDX-License-Identifier: GPL-2.0-or-later
"""Console watcher: it detects every kind of kernel trouble, and none in a healthy boot."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from paprscm.channel.console import Console
from paprscm.channel.kmsg import classify, faults_in

DATA = Path(__file__).parents[1] / "data"

TROUBLE = [
    ("panic", "[    2.1] x", None),
    (
        "panic",
        '[    1.853212] Kernel panic - not syncing: VFS: Unable to mount root fs on "/dev/vda"',
        True,
    ),
    ("oops", "[    5.123456] Oops: Exception in kernel mode, sig: 4 [#1]", False),
    ("oops", "[    5.123456] BUG: Unable to handle kernel data access at 0xdeadbeef", False),
    ("oops", "[    5.123456] Unable to handle kernel paging request for data", False),
    ("bug", "[    5.123456] kernel BUG at mm/slub.c:1234!", False),
    ("bug", "[    5.123456] BUG: sleeping function called from invalid context at x.c:1", False),
    ("bug", "[    5.123456] BUG: scheduling while atomic: dd/77/0x00000002", False),
    ("bug", "[    5.123456] [ BUG: Invalid wait context ]", False),
    ("bug", "[    5.123456][   T77] [ BUG: Invalid wait context ]", False),
    ("bug", "[    5.123456] BUG: KFENCE: use-after-free read in papr_scm_remove+0x1c/0x80", False),
    ("bug", "[    5.123456] BUG: MAX_LOCKDEP_ENTRIES too low!", False),
    ("warning", "[    5.123456] WARNING: possible circular locking dependency detected", False),
    ("warning", "[    5.123456] WARNING: inconsistent lock state", False),
    ("warning", "[    5.123456] WARNING: lock held when returning to user space!", False),
    ("warning", "[    5.123456] WARNING: suspicious RCU usage", False),
    ("lockdep", "[    5.123456] INFO: trying to register non-static key.", False),
    ("list", "[    5.123456] list_add corruption. prev->next should be next (c01)", False),
    ("list", "[    5.123456] list_del corruption, c01->next is LIST_POISON1 (c02)", False),
    ("leak", "[    5.123456] kmemleak: 3 new suspected memory leaks (see /sys/x)", False),
    ("sysfs", "[    5.123456] sysfs: cannot create duplicate filename '/bus/nd/x'", False),
    ("warning", "[    5.123456] WARNING: CPU: 1 PID: 77 at drivers/nvdimm/bus.c:12 f+0x1", False),
    ("warning", "[    5.123456][   T77] WARNING: possible recursive locking detected", False),
    ("soft lockup", "[   25.123456] watchdog: BUG: soft lockup - CPU#0 stuck for 22s!", False),
    ("hard lockup", "[   25.123456] watchdog: CPU 1 self-detected hard LOCKUP @ x+0x1", False),
    ("hung task", "[  125.123456] INFO: task fio:88 blocked for more than 120 seconds.", False),
    # Linux 7.2.
    (
        "hung task",
        "[ 9.123456] INFO: task fio:88 blocked in I/O wait for more than 9 seconds.",
        False,
    ),
    ("warning", "[    5.123456] WARNING: drivers/nvdimm/bus.c:12 at f+0x1, CPU#1: fio/77", False),
    ("rcu stall", "[   25.123456] rcu: INFO: rcu_sched self-detected stall on CPU", False),
    ("sanitizer", "[    5.123456] UBSAN: array-index-out-of-bounds in x.c:1:2", False),
    ("bug", "[    5.123456] BUG: KASAN: slab-use-after-free in papr_scm_pmem_flush", False),
    (
        "driver",
        "[    5.123456] papr_scm ibm,persistent-memory:ibm,pmemory@90000000: flush error: -1",
        False,
    ),
    ("xmon", "cpu 0x1: Vector: 300 (Data Access) at [c00000000587f8b0]", True),
    ("xmon", "cpu 0x1: Vector: 0  at [c00000000508b828]", True),
    # Without PRINTK_TIME.
    ("warning", "WARNING: CPU: 1 PID: 77 at drivers/nvdimm/bus.c:12 f+0x1", False),
]


@pytest.mark.parametrize(("kind", "line", "fatal"), TROUBLE)
def test_trouble_is_detected(kind: str, line: str, fatal: bool | None) -> None:
    trouble = classify(line)
    if fatal is None:
        assert trouble is None
    else:
        assert trouble is not None
        assert (trouble.kind, trouble.fatal) == (kind, fatal)


STATS = (
    "[    1.1{0}] papr_scm ibm,persistent-memory:ibm,pmemory@90000000: "
    "Failed to query performance stats, Err:{1}"
)


def test_the_messages_of_every_boot_are_allowed_and_nothing_broader() -> None:
    assert classify(STATS.format("23456", -2)) is None
    assert classify(STATS.format("23456", -2) + " and more") is not None
    assert classify(STATS.format("23456", -1)) is not None
    pmu = STATS.partition("Failed")[0].format("23456") + "nvdimm pmu didn't register rc="
    assert classify(pmu + "-2") is None
    assert classify(pmu + "-22") is not None
    nvram = "[    0.463491] WARNING: nvram corruption detected: 0-length partition"
    assert classify(nvram) is None
    assert classify(nvram.replace("0-length", "broken")) is not None


@pytest.mark.parametrize(
    "line",
    [
        "Lock dependency validator: Copyright (c) 2006 Red Hat, Inc., Ingo Molnar",
        "kfence: initialized - using 33554432 bytes for 255 objects at 0x(____ptrval____)",
        "kmemleak: Kernel memory leak detector initialized (mem pool available: 15612)",
        "INFO: lockdep is turned off.",
        "FAULT_INJECTION: forcing a failure.",
    ],
)
def test_a_debug_kernel_s_start_messages_are_not_trouble(line: str) -> None:
    assert classify(f"[    0.123456] {line}") is None


def test_an_announced_message_is_allowed() -> None:
    line = "[    5.123456] papr_scm ibm,persistent-memory:ibm,pmemory@90000000: flush error: -1"
    assert classify(line, [re.compile("flush error: -1$")]) is None
    assert classify(line, [re.compile("flush error: -2$")]) is not None


def test_text_inside_a_program_s_line_is_not_trouble() -> None:
    assert classify("echo: Oops: not mine") is None


def test_a_recorded_healthy_boot_has_no_trouble() -> None:
    lines = (DATA / "boot-6.12-two-dimms.log").read_text().splitlines()
    assert len(lines) > 100
    assert sum("Failed to query performance stats" in line for line in lines) == 2
    assert [line for line in lines if classify(line)] == []


class Wire:
    """A console whose output comes from this test."""

    def __init__(self) -> None:
        ours, self.theirs = socket.socketpair()
        self.events = threading.Semaphore(0)
        self.console = Console(ours, on_event=self.events.release)

    def say(self, text: str) -> None:
        self.theirs.sendall(text.encode())


@pytest.fixture
def wire() -> Iterator[Wire]:
    wire = Wire()
    yield wire
    wire.theirs.close()
    wire.console.close()


MARKS = {"ready": re.compile("^paprscm: ready")}


def test_a_mark_is_found_even_if_it_came_before(wire: Wire) -> None:
    wire.say("hello\r\npaprscm: re")
    wire.say("ady\r\n")
    match = wire.console.wait_for(MARKS, timeout_s=5, silence_s=5)
    assert match is not None
    assert match[:2] == ("ready", "paprscm: ready")
    assert wire.console.wait_for(MARKS, timeout_s=5, silence_s=5) == match


def test_silence_ends_the_wait_long_before_the_limit(wire: Wire) -> None:
    wire.say("hello\n")
    started = time.monotonic()
    assert wire.console.wait_for(MARKS, timeout_s=60, silence_s=0.2) is None
    assert time.monotonic() - started < 5


def test_a_guest_that_prints_is_not_silent(wire: Wire) -> None:
    def talk() -> None:
        for _ in range(8):
            wire.say(".\n")
            time.sleep(0.1)
        wire.say("paprscm: ready\n")

    talker = threading.Thread(target=talk)
    talker.start()
    assert wire.console.wait_for(MARKS, timeout_s=30, silence_s=0.6) is not None
    talker.join()


def test_the_silence_of_a_stopped_machine_does_not_count(wire: Wire) -> None:
    wire.say("hello\n")
    assert wire.console.wait_for(MARKS, timeout_s=60, silence_s=0.3) is None
    assert wire.console.line_count == 1
    talker = threading.Timer(0.1, wire.say, ["paprscm: ready\n"])
    talker.start()
    wire.console.restart_silence()
    assert wire.console.wait_for(MARKS, timeout_s=60, silence_s=5, start=1) is not None
    talker.join()


def test_trouble_ends_the_wait_and_is_reported_once(wire: Wire) -> None:
    wire.say("[    1.000000] WARNING: CPU: 0 PID: 1 at a.c:1\n[    1.000000] BUG: b\n")
    assert wire.console.wait_for(MARKS, timeout_s=30, silence_s=30) is None
    assert wire.console.trouble is not None
    assert wire.console.trouble.text.startswith("WARNING")
    assert wire.events.acquire(timeout=5)
    assert not wire.events.acquire(timeout=0.2)


def test_the_end_of_qemu_ends_the_wait(wire: Wire) -> None:
    wire.say("unfinished line")
    wire.theirs.close()
    assert wire.console.wait_for(MARKS, timeout_s=30, silence_s=30) is None
    assert wire.console.closed
    assert wire.console.lines == ["unfinished line"]
    assert wire.events.acquire(timeout=5)


def test_control_characters_do_not_reach_a_report(wire: Wire) -> None:
    wire.say("a\x1b[2Jb\nparpscm\n")
    wire.console.wait_for({"x": re.compile("parpscm")}, timeout_s=5, silence_s=5)
    assert wire.console.lines[0] == "a\ufffd[2Jb"


OOPS = """BUG: Kernel NULL pointer dereference on read at 0x00000008
NIP:  c00000000056a7d8 LR: c00000000056a7c4 CTR: c00000000056a920
NIP [c00000000056a7d8] check_vma+0x24/0x16c
LR [c00000000056a7c4] check_vma+0x10/0x16c
Call Trace:
[c000000002fbf990] [c00000000056a980] dax_mmap+0x60/0xdc
NIP:  00007ffff7d4addc LR: 00007ffff7d4addc CTR: 0000000000000000
NIP [00007ffff7d4addc] 0x7ffff7d4addc"""


@pytest.mark.parametrize(
    ("functions", "expected"),
    [(("check_vma",), True), (("other", "check_vma"), True), (("dax_mmap",), False), ((), False)],
)
def test_an_oops_is_told_by_the_function_that_faulted(
    functions: tuple[str, ...], expected: bool
) -> None:
    assert faults_in(OOPS, *functions) is expected
    assert not faults_in(OOPS.replace("NIP [", "LR ["), *functions)
