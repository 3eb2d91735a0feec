# SPDX-License-Identifier: GPL-2.0-or-later
"""Model of the device, row by row; the rows are from the contract, not from the model."""

from __future__ import annotations

import itertools
import re

import pytest

from paprscm.hcall.judge import known_bug
from paprscm.hcall.model import BRANCHES, ModelDimm, ScmModel, describe_answer
from paprscm.papr import BIND_ANY_ADDRESS, Hcall, ReturnCode

MIB, GIB = 1 << 20, 1 << 30
ALL_ONES = (1 << 64) - 1
DRC, PMEM, PLAIN, UNARMED, EMPTY = 0x90000000, 0x90000001, 0x90000002, 0x90000003, 0x90000004
BUSY = ReturnCode.H_LONG_BUSY_ORDER_10_MSEC


def model() -> ScmModel:
    """Four DIMMs: one that needs flushes, a persistent one, a plain nvdimm, an unarmed one."""
    label = bytearray(128 << 10)
    label[0:8] = bytes.fromhex("8081828384858687")
    return ScmModel(
        [
            ModelDimm(slot=0, address=GIB, size_bytes=512 * MIB, label=label),
            ModelDimm(
                slot=1, address=2 * GIB, size_bytes=256 * MIB, label=bytearray(1), flushes=False
            ),
            ModelDimm(
                slot=2, address=3 * GIB, size_bytes=256 * MIB, label=bytearray(1), spapr=False
            ),
            ModelDimm(
                slot=3,
                address=4 * GIB,
                size_bytes=256 * MIB,
                label=bytearray(8),
                unarmed=True,
                read_only=True,
            ),
        ]
    )


READ, WRITE = Hcall.H_SCM_READ_METADATA, Hcall.H_SCM_WRITE_METADATA
BIND, UNBIND, ALL = Hcall.H_SCM_BIND_MEM, Hcall.H_SCM_UNBIND_MEM, Hcall.H_SCM_UNBIND_ALL
HEALTH, FLUSH = Hcall.H_SCM_HEALTH, Hcall.H_SCM_FLUSH

# call, arguments, code, registers whose value differs from the argument.
ROWS = [
    (READ, (EMPTY, 0, 8), "H_PARAMETER", {}),
    (READ, (DRC | 1 << 32, 0, 1), "H_SUCCESS", {4: 0x80}),
    (READ, (DRC, 0, 2), "H_SUCCESS", {4: 0x8081}),
    (READ, (DRC, 0, 4), "H_SUCCESS", {4: 0x80818283}),
    (READ, (DRC, 0, 8), "H_SUCCESS", {4: 0x8081828384858687}),
    (READ, (DRC, 3, 2), "H_SUCCESS", {4: 0x8384}),
    (READ, (DRC, 0x20000 - 8, 8), "H_SUCCESS", {4: 0}),
    (READ, (DRC, 0x20000 - 7, 8), "H_P2", {}),
    (READ, (DRC, 0, 0), "H_P3", {}),
    (READ, (DRC, 0, 3), "H_P3", {}),
    (READ, (DRC, 0, 1 << 32 | 8), "H_P3", {}),
    (READ, (DRC, ALL_ONES, 1), "H_P2", {}),
    (READ, (DRC, ALL_ONES, 16), "H_P3", {}),
    (WRITE, (EMPTY, 0, 0, 8), "H_PARAMETER", {}),
    (WRITE, (DRC, 0, 0, 16), "H_P4", {}),
    (WRITE, (DRC, 0x20000, 0, 1), "H_P2", {}),
    (WRITE, (DRC, ALL_ONES - 6, 0, 8), "H_P2", {}),
    (WRITE, (DRC, 0, 1 << 8, 1), "H_P2", {}),
    (WRITE, (DRC, 0, 1 << 16, 2), "H_P2", {}),
    (WRITE, (DRC, 0, 1 << 32, 4), "H_P2", {}),
    (WRITE, (UNARMED, 0, 0, 8), "H_P2", {}),
    (WRITE, (DRC, 0, 0xFF, 1), "H_SUCCESS", {}),
    (WRITE, (DRC, 0, 0xFFFF, 2), "H_SUCCESS", {}),
    (WRITE, (DRC, 0, 0xFFFFFFFF, 4), "H_SUCCESS", {}),
    (WRITE, (DRC, 0, ALL_ONES, 8), "H_SUCCESS", {}),
    (BIND, (EMPTY, 0, 1, ALL_ONES, 0), "H_PARAMETER", {}),
    (BIND, (DRC, 0, 2, ALL_ONES, 0), "H_SUCCESS", {5: GIB, 6: 2}),
    (BIND, (DRC, 1, 1, ALL_ONES, 0), "H_SUCCESS", {5: GIB + 256 * MIB, 6: 1}),
    (BIND, (DRC, 2, 0, ALL_ONES, 0), "H_SUCCESS", {5: GIB + 512 * MIB, 6: 0}),
    (BIND, (DRC, 3, 0, ALL_ONES, 0), "H_P2", {}),
    (BIND, (DRC, 1, 2, ALL_ONES, 0), "H_P3", {}),
    (BIND, (DRC, 1, ALL_ONES, ALL_ONES, 0), "H_P3", {}),
    (BIND, (DRC, 9, 9, GIB, 0), "H_OVERLAP", {}),
    (BIND, (DRC, 9, 9, GIB, 1), "H_P5", {}),
    (UNBIND, (EMPTY, GIB, 1, 0), "H_PARAMETER", {}),
    (UNBIND, (DRC, GIB, 2, 0), "H_SUCCESS", {5: 2}),
    (UNBIND, (DRC, GIB, 3, 0), "H_P3", {}),
    (UNBIND, (DRC, GIB - 256 * MIB, 1, 0), "H_P3", {}),
    (UNBIND, (DRC, GIB, 0, 0), "H_P3", {}),
    (UNBIND, (DRC, GIB, 1 << 36, 0), "H_P3", {}),
    (UNBIND, (DRC, -256 * MIB, 2, 0), "H_P3", {}),
    (UNBIND, (DRC, GIB + 1, 0, 0), "H_P2", {}),
    (UNBIND, (DRC, GIB + 1, 0, 1), "H_P4", {}),
    (ALL, (1, 0, 0), "H_SUCCESS", {5: 5}),
    (ALL, (2, DRC, 0), "H_SUCCESS", {5: 2}),
    (ALL, (2, PLAIN, 0), "H_SUCCESS", {5: 1}),
    (ALL, (2, EMPTY, 0), "H_P2", {}),
    (ALL, (3, DRC, 0), "H_PARAMETER", {}),
    (ALL, (3, DRC, 1), "H_P4", {}),
    (HEALTH, (DRC,), "H_SUCCESS", {4: 0, 5: 1 << 63}),
    (HEALTH, (UNARMED,), "H_SUCCESS", {4: 1 << 63, 5: 1 << 63}),
    (HEALTH, (EMPTY,), "H_PARAMETER", {}),
    (FLUSH, (EMPTY, 0), "H_PARAMETER", {}),
    (FLUSH, (PLAIN, 0), "H_PARAMETER", {}),
    (FLUSH, (PLAIN, 1), "H_PARAMETER", {}),
    (FLUSH, (PMEM, 0), "H_UNSUPPORTED", {}),
    (FLUSH, (PMEM, 1), "H_P2", {}),
    (FLUSH, (DRC, 0), "H_LONG_BUSY_ORDER_10_MSEC", {4: 1}),
    (FLUSH, (DRC, 1), "H_P2", {}),
    (Hcall.H_SCM_QUERY_BLOCK_MEM_BINDING, (DRC, 0), "H_FUNCTION", {}),
    (Hcall.H_SCM_QUERY_LOGICAL_MEM_BINDING, (GIB,), "H_FUNCTION", {}),
    (Hcall.H_SCM_PERFORMANCE_STATS, (DRC, 0, 0), "H_FUNCTION", {}),
]


@pytest.mark.parametrize(("call", "arguments", "code", "outputs"), ROWS)
def test_a_machine_at_its_start(
    call: Hcall, arguments: tuple[int, ...], code: str, outputs: dict[int, int]
) -> None:
    (expected,) = model().allowed(call, arguments)
    registers = dict(enumerate((n % (1 << 64) for n in arguments), 4)) | outputs
    assert expected.code.name == code
    assert dict(enumerate(expected.outputs, 4)) == dict.fromkeys(range(4, 13), 0) | registers
    assert expected.branch in BRANCHES


def one(scm: ScmModel, call: Hcall, *arguments: int) -> tuple[ReturnCode, str]:
    """Make a call with only one allowed answer; return its code and branch."""
    (expected,) = scm.allowed(call, arguments)
    scm.observe(expected, arguments)
    return expected.code, expected.branch[2]


def test_written_bytes_are_read() -> None:
    scm = model()
    one(scm, WRITE, DRC, 4, 0xCAFE, 2)
    one(scm, WRITE, DRC, 0x1FFFF, 0x7F, 1)
    (expected,) = scm.allowed(READ, (DRC, 0, 8))
    assert expected.outputs[0] == 0x80818283CAFE8687
    (expected,) = scm.allowed(READ, (DRC, 0x1FFFE, 2))
    assert expected.outputs[0] == 0x007F


def test_refused_bytes_are_not_written() -> None:
    scm = model()
    before = bytes(scm.dimms[0].label)
    one(scm, WRITE, DRC, 0, 1 << 8, 1)
    one(scm, WRITE, UNARMED, 0, 1, 1)
    assert (bytes(scm.dimms[0].label), bytes(scm.dimms[3].label)) == (before, bytes(8))


def test_the_end_of_a_flush_is_reported_once() -> None:
    scm = model()
    assert one(scm, FLUSH, DRC, 0) == (BUSY, "begun")
    busy, done = scm.allowed(FLUSH, (DRC, 1))
    assert (busy.code, busy.outputs[0]) == (BUSY, 1)
    assert (done.code, done.outputs[0]) == (ReturnCode.H_SUCCESS, DRC)
    scm.observe(busy, (DRC, 1))
    scm.observe(done, (DRC, 1))
    assert one(scm, FLUSH, DRC, 1) == (ReturnCode.H_P2, "unknown token")
    assert scm.allowed(FLUSH, (DRC, 0))[0].outputs[0] == 2


def test_a_held_flush_is_busy_until_it_is_released() -> None:
    scm = model()
    one(scm, FLUSH, DRC, 0)
    scm.dimms[0].held = True
    one(scm, FLUSH, DRC, 0)
    assert len(scm.allowed(FLUSH, (DRC, 1))) == 2
    assert one(scm, FLUSH, DRC, 2) == (BUSY, "goes on")
    scm.release(0)
    assert len(scm.allowed(FLUSH, (DRC, 2))) == 2


def test_a_failing_sync_ends_with_h_hardware() -> None:
    scm = model()
    scm.dimms[0].failing = True
    one(scm, FLUSH, DRC, 0)
    scm.dimms[0].failing = False
    _goes_on, ended = scm.allowed(FLUSH, (DRC, 1))
    assert (ended.code, ended.branch[2]) == (ReturnCode.H_HARDWARE, "failed")


def test_a_reset_forgets_flushes_but_not_the_last_token() -> None:
    scm = model()
    one(scm, FLUSH, DRC, 0)
    scm.reset()
    assert one(scm, FLUSH, DRC, 1) == (ReturnCode.H_P2, "unknown token")
    assert scm.allowed(FLUSH, (DRC, 0))[0].outputs[0] == 2


def test_a_migrated_flush_gets_the_result_of_its_new_sync() -> None:
    scm = model()
    for held in (False, True, True):
        scm.dimms[0].held = held
        one(scm, FLUSH, DRC, 0)
    scm.dimms[0].held, scm.dimms[0].failing = False, True
    assert scm.migrate(0, completed={1: ReturnCode.H_SUCCESS}, pending=[3, 2]) == []
    ends = [[a.code for a in scm.allowed(FLUSH, (DRC, token))] for token in (1, 2, 3)]
    assert ends == [
        [BUSY, ReturnCode.H_SUCCESS],
        [BUSY, ReturnCode.H_HARDWARE],
        [BUSY, ReturnCode.H_HARDWARE],
    ]


@pytest.mark.parametrize(
    ("completed", "pending", "message"),
    [
        ({}, [2], r"tokens \[2\] instead of \[1, 2\]"),
        ({}, [1, 2, 3], r"tokens \[1, 2, 3\] instead of \[1, 2\]"),
        ({1: 0}, [1, 2], r"tokens \[1, 1, 2\] instead of \[1, 2\]"),
        ({1: 0, 2: 0}, [], "token 2 has ended while its sync was held"),
        ({1: -1}, [2], "token 1 ended with H_HARDWARE, expected H_SUCCESS"),
    ],
)
def test_a_migrated_state_that_contradicts_the_model(
    completed: dict[int, int], pending: list[int], message: str
) -> None:
    scm = model()
    one(scm, FLUSH, DRC, 0)
    scm.dimms[0].held = True
    one(scm, FLUSH, DRC, 0)
    (wrong,) = scm.migrate(0, completed=completed, pending=pending)
    assert re.fullmatch(message, wrong)


def test_every_branch_can_be_reached() -> None:
    scm = model()
    for call, arguments, *_rest in ROWS:
        for expected in scm.allowed(call, arguments):
            scm.covered[expected.branch] += 1
    for failing in (False, True):
        scm.dimms[0].failing = failing
        one(scm, FLUSH, DRC, 0)
        for expected in scm.allowed(FLUSH, (DRC, scm.dimms[0].last_token)):
            scm.covered[expected.branch] += 1
    assert set(scm.covered) == BRANCHES


def test_the_known_bug_sets_the_upper_half() -> None:
    scm = model()
    known = known_bug(scm.allowed(READ, (DRC, 0, 4)))
    assert known is not None
    assert (known[0], known[1].outputs[0]) == (
        "qemu-read-metadata-sign-extends",
        0xFFFFFFFF80818283,
    )
    for offset, length in itertools.product((0, 9), (1, 2, 8)):
        assert known_bug(scm.allowed(READ, (DRC, offset, length))) is None
    assert known_bug(scm.allowed(READ, (DRC, 9, 4))) is None


def test_a_difference_is_reported_with_names() -> None:
    expected = model().allowed(BIND, (DRC, 0, 1, BIND_ANY_ADDRESS, 0))
    assert describe_answer(-55, (DRC, 0, 1), expected) == (
        "answered H_P2 r4=0x90000000 r5=0x0 r6=0x1, "
        "expected H_SUCCESS r4=0x90000000 r5=0x40000000 r6=0x1 (bound)"
    )
