# SPDX-License-Identifier: GPL-2.0-or-later
"""Statuses and reasons of tests: `check`, `expect`, `require_…`, and later exceptions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from paprscm.build.vmlinux import Kernel
from paprscm.checks import at_least
from paprscm.emulator.binary import Qemu
from paprscm.errors import (
    CapabilityError,
    ContractError,
    GuestLostError,
    HostError,
    KilledError,
)
from paprscm.guest.environment import Environment
from paprscm.map_sync.verdict import STATX_ATTR_DAX, FileFacts, MapSyncReport, Statx, Verdict
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import OVERRIDE, PMEM_OFF, PMEM_ON

Body = Callable[[PaprScmTest], None]
KERNEL = Kernel(Path("x"), "6.12.1", 65536, {"KPROBES": "y"}, "built in", True, 1, 1)
TABLE = """\
2 differences:
         found  expected
  syncs  1      at least 2
  fsync  'EIO'  0"""


def run(body: Body, folder: Path, *, kernel: Kernel = KERNEL) -> SimpleNamespace:
    """Run a test; return its status, its reason and the class of its exception."""

    class Example(PaprScmTest):
        def find_qemu(self) -> Qemu:
            self.environment = cast(Environment, SimpleNamespace(kernel=kernel))
            return cast(Qemu, SimpleNamespace(path="qemu", has_pmem=True, has_pmem_override=False))

        def test(self) -> None:
            body(self)

    example = cast(Any, Example)("test", base_logdir=str(folder))
    example.run_avocado()
    return SimpleNamespace(
        status=example.status, reason=str(example.fail_reason), kind=example.fail_class
    )


def two_differences(test: PaprScmTest) -> None:
    assert not test.check("syncs", 1, at_least(2))
    assert test.check("hcalls", 2, at_least(2))
    assert not test.check("fsync", "EIO", 0)


def test_no_difference_is_a_pass(tmp_path: Path) -> None:
    assert run(lambda test: None, tmp_path).status == "PASS"


def test_differences_are_one_table_at_the_end(tmp_path: Path) -> None:
    reached = []

    def body(test: PaprScmTest) -> None:
        two_differences(test)
        reached.append(True)

    end = run(body, tmp_path)
    assert (end.status, end.kind, end.reason) == (
        "FAIL",
        "ContractError",
        TABLE,
    )
    assert reached


@pytest.mark.parametrize("fs_type", [0x58465342, 0x01021994])
def test_a_verdict_requires_its_file_system(tmp_path: Path, fs_type: int) -> None:
    """A file on the tmpfs below a mount point would be "not DAX", too."""
    file = FileFacts(
        type="regular",
        size_bytes=1,
        statx=Statx(attributes=0, attributes_mask=STATX_ATTR_DAX, dax=False),
        statx_errno=None,
        statx_errno_name=None,
        fs_type=fs_type,
        fs_block_bytes=4096,
    )
    report = cast(
        MapSyncReport,
        SimpleNamespace(file=file, mapping="mapped", control=None, path="/mnt/x", page_size=4096),
    )

    def body(test: PaprScmTest) -> None:
        test.check_map_sync("x", report, Verdict.NOT_DAX, fstype="xfs")

    end = run(body, tmp_path)
    if fs_type == 0x58465342:
        assert end.status == "PASS"
    else:
        assert end.reason == "x: file system of /mnt/x: 'tmpfs', expected 'xfs'"
    end = run(lambda test: test.check_map_sync("x", report, Verdict.REFUSED), tmp_path)
    assert end.reason.startswith("x: 'not DAX', expected 'MAP_SYNC refused' (statx reports no DAX")


def test_expect_ends_the_test_with_all_differences(tmp_path: Path) -> None:
    def body(test: PaprScmTest) -> None:
        test.check("syncs", 1, at_least(2))
        test.expect("hcalls", 2, 2)
        test.expect("fsync", "EIO", 0)
        raise HostError("not reached")

    end = run(body, tmp_path)
    assert (end.status, end.reason) == ("FAIL", TABLE)


def test_a_checkpoint_ends_the_test_only_after_a_difference(tmp_path: Path) -> None:
    def body(test: PaprScmTest) -> None:
        test.checkpoint()
        test.check("syncs", 1, 2)
        test.checkpoint()
        raise HostError("not reached")

    end = run(body, tmp_path)
    assert (end.status, end.reason) == ("FAIL", "syncs: 1, expected 2")


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (ContractError("it lied", hint="look"), "FAIL", "ContractError"),
        (GuestLostError("it lied", hint="look"), "FAIL", "GuestLostError"),
        (HostError("it lied", hint="look"), "ERROR", "HostError"),
        (KilledError("it lied", hint="look"), "ERROR", "KilledError"),
        (CapabilityError("it lied", hint="look"), "FAIL", "ContractError"),
        (ValueError("it lied (look)"), "ERROR", "HostError"),
        (AssertionError("it lied (look)"), "ERROR", "HostError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
def test_differences_before_an_exception_are_reported_with_it(
    tmp_path: Path, error: Exception, status: str, kind: str
) -> None:
    def body(test: PaprScmTest) -> None:
        two_differences(test)
        raise error

    end = run(body, tmp_path)
    assert (end.status, end.kind) == (status, kind)
    assert "it lied (look)" in end.reason
    assert end.reason.endswith(f"before that, {TABLE}")


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (ContractError("it lied"), "FAIL", "ContractError"),
        (GuestLostError("it lied"), "FAIL", "GuestLostError"),
        (CapabilityError("it lied"), "CANCEL", "TestCancel"),
        (ValueError("it lied"), "ERROR", "ValueError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
def test_an_exception_alone_keeps_its_class(
    tmp_path: Path, error: Exception, status: str, kind: str
) -> None:
    def body(test: PaprScmTest) -> None:
        raise error

    end = run(body, tmp_path)
    assert (end.status, end.kind, end.reason) == (status, kind, "it lied")


def test_a_bare_assert_is_a_host_error(tmp_path: Path) -> None:
    def body(test: PaprScmTest) -> None:
        assert test is None, "nothing there"

    end = run(body, tmp_path)
    assert (end.status, end.kind) == ("ERROR", "HostError")
    assert "test_testcase.py, line" in end.reason
    assert "assert test is None" in end.reason


def test_unittest_s_assertions_are_contract_errors(tmp_path: Path) -> None:
    end = run(lambda test: test.assertEqual(1, 2), tmp_path)
    assert (end.status, end.kind) == ("FAIL", "ContractError")


def test_a_known_issue_does_not_hide_a_difference(tmp_path: Path) -> None:
    def body(test: PaprScmTest) -> None:
        test.remark("unusual")
        test.check("syncs", 1, 2)

    assert run(body, tmp_path).status == "FAIL"
    assert run(lambda test: test.remark("unusual"), tmp_path).status == "WARN"


def test_a_difference_is_reported_with_the_end_of_a_guest(tmp_path: Path) -> None:
    """The guest's last messages are judged when it ends, after the test's own code."""

    def panic() -> None:
        raise GuestLostError("Kernel panic")

    def body(test: PaprScmTest) -> None:
        test.leave.callback(panic)
        two_differences(test)

    end = run(body, tmp_path)
    assert (end.status, end.kind) == ("FAIL", "GuestLostError")
    assert end.reason == f"Kernel panic\nbefore that, {TABLE}"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda test: test.require_cpus(2), None),
        (lambda test: test.require_cpus(3), "the test needs 3 vCPUs, not 2 (smp=3)"),
        (lambda test: test.require_kernel("CONFIG_KPROBES"), None),
        (
            lambda test: test.require_kernel("CONFIG_KPROBES", "CONFIG_KASAN", hint="-p kernel=x"),
            "the kernel 6.12.1 was built without CONFIG_KASAN (-p kernel=x)",
        ),
        (lambda test: test.require_qemu(PMEM_OFF, PMEM_ON), None),
        (
            lambda test: test.require_qemu(PMEM_ON, OVERRIDE),
            "qemu has no pmem-override (qemu=debian:trixie fetches one that has it)",
        ),
    ],
)
def test_requirements_cancel_with_a_hint(tmp_path: Path, body: Body, reason: str | None) -> None:
    end = run(body, tmp_path)
    expected = ("PASS", "None") if reason is None else ("CANCEL", reason)
    assert (end.status, end.reason) == expected


def test_an_unknown_configuration_cancels(tmp_path: Path) -> None:
    unknown = dataclasses.replace(KERNEL, config=None)
    end = run(lambda test: test.require_kernel("CONFIG_KPROBES"), tmp_path, kernel=unknown)
    assert end.status == "CANCEL"
    assert "CONFIG_KPROBES is unknown (build it with CONFIG_IKCONFIG=y" in end.reason
