# SPDX-License-Identifier: GPL-2.0-or-later
"""papr_scm and answers of the hypervisor that QEMU never gives.

paprscm/hcall/interposer.py answers the calls of an unchanged kernel. The rules are those of
Documentation/arch/powerpc/papr_hcalls.rst and LoPAR, chapter "Storage Class Memory": a call that is
busy is continued with the token of its last answer, any other code but H_SUCCESS is an error, and
each bit of H_SCM_HEALTH counts only if it is valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from paprscm.checks import above, at_least
from paprscm.driver.dimm_commands import (
    CRITICAL,
    FATAL,
    HEALTHY,
    UNHEALTHY,
    Reading,
    Step,
    errno_name,
    health,
    read_health,
    send,
)
from paprscm.driver.dimm_commands import Health as Reported
from paprscm.driver.dimm_oracle import ND
from paprscm.driver.hypervisor import REPORTED, Hypervisor, set_driver
from paprscm.errors import ContractError
from paprscm.flush.syscalls import persist
from paprscm.guest.guest import Guest
from paprscm.hcall.interposer import Answer, Answered, Call, Interposer, Reply, busy, script
from paprscm.papr import BIND_ANY_ADDRESS, Hcall, Health, ReturnCode, UnbindScope
from paprscm.pmem.regions import Nmem, Region, wait_for_region
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import FOR_XFS, PMEM_OFF, SMALL
from paprscm.vm.machine import Machine, Nvdimm

# Two SCM blocks, so that the first and the last one differ.
DIMM, OTHER = PMEM_OFF.at(3, FOR_XFS), PMEM_OFF.at(1, SMALL)
BIND, UNBIND = Hcall.H_SCM_BIND_MEM, Hcall.H_SCM_UNBIND_ALL
HEALTH, READ = Hcall.H_SCM_HEALTH, Hcall.H_SCM_READ_METADATA
QUERY, FLUSH = Hcall.H_SCM_QUERY_BLOCK_MEM_BINDING, Hcall.H_SCM_FLUSH
# The first call of papr_scm_probe after the binding; the label area is read later.
STATISTICS = Hcall.H_SCM_PERFORMANCE_STATS
H_TOO_BIG, H_IN_USE = -64, -77
# Linux hvcall.h: neither success nor busy. Positive codes are errors, too.
ERRORS = (
    *(ReturnCode.H_HARDWARE, ReturnCode.H_FUNCTION, ReturnCode.H_PRIVILEGE, ReturnCode.H_PARAMETER),
    *(ReturnCode.H_NO_MEM, ReturnCode.H_AUTHORITY, ReturnCode.H_P2, ReturnCode.H_P5, H_TOO_BIG),
)
NO_SUCCESS = (2, 3, 5, 9, 14, 15, 18, 20, 9899, 9906, H_IN_USE, -999, 1 << 32)
LONG_BUSY = (
    ReturnCode.H_LONG_BUSY_ORDER_1_MSEC,
    ReturnCode.H_LONG_BUSY_ORDER_10_MSEC,
    ReturnCode.H_LONG_BUSY_ORDER_100_MSEC,
    ReturnCode.H_LONG_BUSY_ORDER_1_SEC,
)


class AnswersTest(PaprScmTest):
    """
    Base of the tests of answers.

    :avocado: disable
    """

    def start(self, *nvdimms: Nvdimm) -> Guest:
        """Boot a guest; the driver may report the errors of the hypervisor."""
        self.draw = self.random()
        guest = self.boot(Machine(nvdimms=nvdimms), allowed=[REPORTED])
        self.hypervisor = Hypervisor(guest, "persist", "nd_ioctl")
        return guest

    def token(self) -> int:
        """A token that no driver can guess."""
        return self.draw.getrandbits(64)


def tokens(calls: Sequence[Answered], place: int) -> list[int]:
    """The token that each call continues; `place` is its place in the arguments."""
    return [one.call.arguments[place] for one in calls]


class Binding(AnswersTest):
    """
    A DIMM that papr_scm binds and unbinds.

    :avocado: tags=pmem
    """

    def begin(self) -> tuple[Guest, Region, Answered]:
        """Bind once as QEMU answers; return the region, and the call of H_SCM_BIND_MEM."""
        guest = self.start(DIMM)
        region = wait_for_region(guest, DIMM.slot)
        with self.hypervisor.answers(lambda _call: None, until=STATISTICS) as usual:
            set_driver(guest, DIMM.slot, "unbind")
            self.check("bound again", set_driver(guest, DIMM.slot, "bind"), True)
        self.blocks = DIMM.size_bytes // (region.node.block_size or 1)
        (unbound,), (bound,) = usual.made(UNBIND), usual.made(BIND)
        self.check(
            "arguments of the unbind", unbound.call.arguments[:3], (UnbindScope.DRC, DIMM.drc, 0)
        )
        expected = (DIMM.drc, 0, self.blocks, BIND_ANY_ADDRESS, 0)
        self.check("arguments of the bind", bound.call.arguments[:5], expected)
        self.check("the bind's answer", bound.code, 0)
        self.address = bound.outputs[1]
        self.expect_region(guest, "after QEMU's answer")
        return guest, region, bound

    def expect_region(self, guest: Guest, when: str) -> None:
        """Check that the region is there, at the address that the hypervisor reported."""
        region = wait_for_region(guest, DIMM.slot)
        resource = int(guest.succeed(f"cat {region.device}/resource"), 16)
        found = (resource, region.size_bytes)
        self.check(
            f"{when}: address and size of the region", found, (self.address, DIMM.size_bytes)
        )
        (step,) = persist(guest, f"{region.device}/deep_flush", "dwrite=0:1:49")
        self.check(f"{when}: errno of a flush", step.errno, 0)

    def rebind(self, guest: Guest, answer: Answer) -> Interposer:
        """Unbind the driver, and bind it with these answers."""
        set_driver(guest, DIMM.slot, "unbind")
        with self.hypervisor.answers(answer, until=STATISTICS) as interposer:
            self.is_bound = set_driver(guest, DIMM.slot, "bind")
        return interposer

    def bound(self, code: int, token: int = 0) -> Reply:
        """An answer to H_SCM_BIND_MEM for the whole DIMM."""
        return Reply(code=code, outputs=(token, self.address, self.blocks))

    def test_bind_continues(self) -> None:
        """A bind that is busy is continued with the token of each answer, up to its end."""
        guest, _region, _ = self.begin()
        given = [self.token() for _ in range(4)]
        replies = [self.bound(ReturnCode.H_BUSY, token) for token in given]
        answer = script(H_SCM_BIND_MEM=[*replies, self.bound(ReturnCode.H_SUCCESS, self.token())])
        calls = self.rebind(guest, answer).made(BIND)
        self.check("tokens of the bind", tokens(calls, 4), [0, *given])
        self.expect_region(guest, "after a bind that was busy")

    def test_bind_overlaps(self) -> None:
        """A DIMM that is still bound is used where it is, if all of it is bound; else bound anew.

        papr_scm.c, drc_pmem_query_n_bind: after kexec, the hypervisor may still have it bound.
        """
        guest, region, _ = self.begin()
        block = region.node.block_size or 0
        last = self.address + (self.blocks - 1) * block
        overlap = self.bound(ReturnCode.H_OVERLAP)
        for what, replies, asks_anew in (
            ("all blocks are bound", [(0, self.address), (0, last)], False),
            ("no block is bound", [(ReturnCode.H_NOT_FOUND, 0)] * 2, True),
            ("the last block is not bound", [(0, self.address), (ReturnCode.H_NOT_FOUND, 0)], True),
            ("the last block is elsewhere", [(0, self.address), (0, last + block)], True),
            ("queries are not implemented", [(ReturnCode.H_FUNCTION, 0)] * 2, True),
        ):
            queries = [Reply(code=code, outputs=(address,)) for code, address in replies]
            answer = script(H_SCM_BIND_MEM=[overlap], H_SCM_QUERY_BLOCK_MEM_BINDING=queries)
            calls = self.rebind(guest, answer)
            self.expect_region(guest, what)
            later = [one.code for one in calls.made(BIND)[1:]]
            if asks_anew:
                self.check(f"{what}: unbinds", len(calls.made(UNBIND)), at_least(1))
                self.check(f"{what}: later binds", later, [ReturnCode.H_SUCCESS])
            for query in calls.made(QUERY):
                self.check(f"{what}: DRC of a query", query.call.arguments[0], DIMM.drc)

    def test_bind_fails(self) -> None:
        """A DIMM that is not bound has no region, whatever the reason; a later bind succeeds."""
        guest, _region, _ = self.begin()
        for code in self.draw.sample(ERRORS, 4):
            reply = Reply(code=code, outputs=(self.token(), self.address, 0))
            calls = self.rebind(guest, script(H_SCM_BIND_MEM=[reply]))
            what = f"bind with {int(code)}"
            self.check(f"{what}: answers", [one.code for one in calls.made(BIND)], [code])
            self.check(f"{what}: the driver is bound", self.is_bound, False)
        set_driver(guest, DIMM.slot, "bind")
        self.expect_region(guest, "after all errors")

    def test_unbind(self) -> None:
        """An unbind that is busy is continued with each token; after an error, too, it ends."""
        guest, _region, _ = self.begin()
        given = [self.token() for _ in range(5)]
        codes = (ReturnCode.H_BUSY, *LONG_BUSY[:3], ReturnCode.H_BUSY)
        replies = [busy(token, code) for token, code in zip(given, codes, strict=True)]
        for what, last in (("success", 0), ("H_IN_USE", H_IN_USE), ("H_HARDWARE", -1)):
            answer = script(H_SCM_UNBIND_ALL=[*replies, Reply(code=last)])
            with self.hypervisor.answers(answer) as interposer:
                self.check(
                    f"{what}: bound afterwards", set_driver(guest, DIMM.slot, "unbind"), False
                )
            calls = interposer.made(UNBIND)
            self.check(f"{what}: tokens", tokens(calls, 2), [0, *given])
            targets = {one.call.arguments[:2] for one in calls}
            self.check(f"{what}: scope and DRC", targets, {(UnbindScope.DRC, DIMM.drc)})
            self.check(f"{what}: bound again", set_driver(guest, DIMM.slot, "bind"), True)
            self.expect_region(guest, f"after {what}")


def reported(bitmap: int) -> Reported:
    """The answer to PAPR_PDSM_HEALTH that these valid bits require.

    The masks are those of include/linux/papr_scm.h; papr_pdsm.h orders the states.
    """
    unarmed = bitmap & (Health.UNARMED | Health.UNHEALTHY)
    states = ((Health.FATAL, FATAL), (Health.CRITICAL, CRITICAL), (Health.UNHEALTHY, UNHEALTHY))
    locked = bool(bitmap & Health.SCRUBBED_AND_LOCKED)
    return Reported(
        extension_flags=0,
        unarmed=bool(unarmed),
        bad_shutdown=bool(bitmap & Health.SHUTDOWN_DIRTY),
        bad_restore=bool(bitmap & Health.EMPTY),
        scrubbed=locked,
        locked=locked,
        encrypted=bool(bitmap & Health.ENCRYPTED),
        health=next((state for bit, state in states if bitmap & bit), HEALTHY),
        fuel_gauge=0,
        dirty_shutdowns=0,
    )


class HealthBits(AnswersTest):
    """
    H_SCM_HEALTH with other bits and codes.

    :avocado: tags=pmem
    """

    def judge(self, guest: Guest, dimm: Nmem, pairs: Sequence[tuple[int, int]]) -> None:
        """Let the driver query each pair of bitmap and valid bits, and check what it reports."""
        steps: list[Step] = []
        for _ in pairs:
            steps += [health().build(), Reading(f"{ND}/{dimm.name}/papr/flags")]
        replies = [Reply(code=0, outputs=pair) for pair in pairs]
        with self.hypervisor.answers(script(H_SCM_HEALTH=replies)) as interposer:
            answers = send(guest, f"/dev/{dimm.name}", steps)
        self.check("queries", len(interposer.made(HEALTH)), len(pairs))
        for (bitmap, valid), answer, flags in zip(pairs, answers[::2], answers[1::2], strict=True):
            what = f"bits {bitmap:016x}, valid {valid:016x}"
            expected = reported(bitmap & valid)
            found = replace(read_health(answer), extension_flags=0, dirty_shutdowns=0)
            self.check(what, found, expected)
            self.check(f"{what}: papr/flags", frozenset(flags.text.split()), expected.papr_flags)

    def dimm(self, guest: Guest) -> Nmem:
        """The DIMM's device."""
        region = wait_for_region(guest, DIMM.slot)
        if region.dimm is None:
            raise ContractError(f"{region.name} has no DIMM")
        return region.dimm

    def test_bits(self) -> None:
        """Each bit of the health has its meaning if it is valid, and none if it is not."""
        guest = self.start(DIMM)
        dimm = self.dimm(guest)
        every = (1 << 64) - 1
        pairs = [(1 << bit, 1 << bit) for bit in range(63, 50, -1)]
        pairs += [(every, every ^ 1 << bit) for bit in range(63, 50, -1)]
        pairs += [(every, 0), (0, every), (every, every), (every >> 10, every)]
        pairs += [(self.draw.getrandbits(64), self.draw.getrandbits(64)) for _ in range(20)]
        self.judge(guest, dimm, pairs)

    def test_errors(self) -> None:
        """A health that cannot be queried is an error, and not a healthy DIMM."""
        guest = self.start(DIMM)
        dimm = self.dimm(guest)
        codes = [code for code in (*ERRORS, *NO_SUCCESS) if code != ReturnCode.H_FUNCTION]
        bits = Health.FATAL | Health.SHUTDOWN_DIRTY
        replies = [Reply(code=code, outputs=(0, (1 << 64) - 1)) for code in codes]
        with self.hypervisor.answers(script(H_SCM_HEALTH=replies)):
            answers = send(guest, f"/dev/{dimm.name}", [health().build()] * len(codes))
        for code, answer in zip(codes, answers, strict=True):
            self.check(f"health after {int(code)}: refused", answer.refused, True)
        self.judge(guest, dimm, [(bits, bits)])

    def test_at_probe(self) -> None:
        """A region is read-only if its DIMM cannot persist data, and writable after other states.

        papr_scm_nvdimm_init: NDD_UNARMED; a health that cannot be queried does not count.
        """
        guest = self.start(DIMM)
        for what, code, bits in (
            ("unarmed", 0, Health.UNARMED),
            ("unhealthy", 0, Health.UNHEALTHY),
            ("fatal, dirty, encrypted", 0, Health.FATAL | Health.SHUTDOWN_DIRTY | Health.ENCRYPTED),
            ("an error", ReturnCode.H_HARDWARE, Health.UNARMED),
            ("healthy", 0, 0),
        ):
            set_driver(guest, DIMM.slot, "unbind")
            reply = Reply(code=code, outputs=(bits, bits))
            with self.hypervisor.answers(script(H_SCM_HEALTH=[reply]), until=READ):
                set_driver(guest, DIMM.slot, "bind")
                region = wait_for_region(guest, DIMM.slot)
            read_only = not code and bool(bits & (Health.UNARMED | Health.UNHEALTHY))
            self.check(f"{what}: the region is read-only", region.read_only, read_only)


class Flushing(AnswersTest):
    """
    H_SCM_FLUSH with other answers.

    :avocado: tags=flush
    """

    def flush(
        self, guest: Guest, region: Region, replies: Sequence[Reply], count: int
    ) -> tuple[list[str], list[int]]:
        """Flush a region several times; return the errnos, and the tokens of all calls."""
        with self.hypervisor.answers(script(H_SCM_FLUSH=replies)) as interposer:
            steps = persist(guest, f"{region.device}/deep_flush", *["dwrite=0:1:49"] * count)
        calls = interposer.made(FLUSH)
        self.check("DRCs", {one.call.arguments[0] for one in calls}, {region.drc})
        return [errno_name(step.errno) for step in steps], tokens(calls, 1)

    def test_continues(self) -> None:
        """A flush that is busy is continued with the token of each answer; a new one begins with 0.

        The code of each answer, and so the pause that it asks for, changes.
        """
        guest = self.start(DIMM)
        region = wait_for_region(guest, DIMM.slot)
        codes = (ReturnCode.H_BUSY, *LONG_BUSY, ReturnCode.H_BUSY)
        replies, expected = [], []
        for last in (0, 0, -1, 0):
            given = [self.token() for _ in codes]
            replies += [busy(token, code) for token, code in zip(given, codes, strict=True)]
            # The token of the last answer means nothing.
            replies.append(Reply(code=last, outputs=(self.token(),)))
            expected += [0, *given]
        errnos, found = self.flush(guest, region, replies, 4)
        self.check("tokens of four flushes", found, expected)
        self.check("errnos", errnos, ["0", "0", "EIO", "0"])

    def test_fails(self) -> None:
        """A flush succeeds only with H_SUCCESS: any code that is neither that nor busy is EIO."""
        guest = self.start(DIMM)
        region = wait_for_region(guest, DIMM.slot)
        codes = (*ERRORS, *NO_SUCCESS)
        replies, expected = [], []
        for code in codes:
            token = self.token()
            replies += [busy(token), Reply(code=code, outputs=(self.token(),))]
            expected += [0, token]
        errnos, found = self.flush(guest, region, replies, len(codes) + 1)
        self.check("tokens", found[: len(expected)], expected)
        for code, number in zip(codes, errnos, strict=False):
            self.check(f"errno of a flush that ends with {int(code)}", number, "EIO")
        self.check("errno of the flush that QEMU answers", errnos[-1], "0")
        self.check("its calls", len(found) - len(expected), above(0))

    def test_two_dimms(self) -> None:
        """Each of two flushes that overlap is continued with its own tokens."""
        guest = self.start(DIMM, OTHER)
        regions = [wait_for_region(guest, nvdimm.slot) for nvdimm in (DIMM, OTHER)]
        given: dict[int, list[int]] = {region.drc: [] for region in regions}
        begun: set[int] = set()
        left = dict.fromkeys(given, 8)

        def answer(call: Call) -> Reply | None:
            drc = call.arguments[0]
            begun.add(drc)
            # Both are busy until both have begun, and then a little longer.
            left[drc] -= len(begun) == len(given)
            if left[drc] < 0:
                return Reply(code=0)
            given[drc].append(self.token())
            return busy(given[drc][-1])

        paths = [f"{region.device}/deep_flush" for region in regions]
        with self.hypervisor.answers(answer) as interposer:
            guest.succeed(
                f"echo 1 > {paths[0]} & first=$!; echo 1 > {paths[1]} & wait $first && wait $!"
            )
        for drc, sequence in given.items():
            calls = [one for one in interposer.made(FLUSH) if one.call.arguments[0] == drc]
            self.check(f"tokens of {drc:#x}", tokens(calls, 1), [0, *sequence])
