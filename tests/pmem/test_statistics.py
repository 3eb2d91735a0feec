# SPDX-License-Identifier: GPL-2.0-or-later
"""Statistics of a DIMM, and its performance monitor: H_SCM_PERFORMANCE_STATS, which QEMU lacks.

The hypervisor's part is played by paprscm/hcall/interposer.py. The interface is that of
Documentation/arch/powerpc/papr_hcalls.rst, Documentation/ABI/testing/sysfs-bus-papr-pmem and
sysfs-bus-nvdimm; the layout of the buffer is that of struct papr_scm_perf_stats (papr_scm.c).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from paprscm.channel.kmsg import SLEEPS, has_frame, traces
from paprscm.checks import at_least, other_than
from paprscm.driver.dimm_commands import (
    Answer,
    Reading,
    Step,
    errno_name,
    health,
    read_health,
    send,
)
from paprscm.driver.dimm_oracle import ND
from paprscm.driver.hypervisor import (
    EYE_CATCHER,
    REPORTED,
    STATISTIC,
    STATISTICS_HEADER,
    Hypervisor,
    count_event,
    set_driver,
    statistics,
)
from paprscm.driver.removal import PLATFORM, platform_device
from paprscm.errors import ContractError, GuestLostError
from paprscm.guest.guest import Guest
from paprscm.hcall.interposer import Answer as Choice
from paprscm.hcall.interposer import Call, Reply
from paprscm.papr import Hcall, ReturnCode
from paprscm.pmem.regions import wait_for_region
from paprscm.testcase import PaprScmTest
from paprscm.vm.dimms import PMEM_OFF, SMALL
from paprscm.vm.machine import Machine

DIMM = PMEM_OFF.at(3, SMALL)
STATISTICS, READ = Hcall.H_SCM_PERFORMANCE_STATS, Hcall.H_SCM_READ_METADATA
GAUGE = "MemLife "
# Documentation/ABI/testing/sysfs-bus-papr-pmem; the last one is of no kernel so far.
NAMES = (
    *("CtlResCt", "CtlResTm", "PonSecs ", GAUGE, "CritRscU", "HostLCnt", "HostSCnt", "HostSDur"),
    *("HostLDur", "MedRCnt ", "MedWCnt ", "MedRDur ", "MedWDur ", "CchRHCnt", "CchWHCnt"),
    *("FastWCnt", "NewStat "),
)
GAUGE_VALID = 1
TRUSTS = "linux-papr-scm-trusts-statistics"
SLEEPS_ISSUE = "linux-papr-scm-monitor-sleeps"
OUTLIVES = "linux-nvdimm-monitor-outlives-driver"
# What a debug kernel reports about linux-papr-scm-monitor-sleeps.
SLEEPING = (
    SLEEPS.pattern,
    r"WARNING: .*__might_sleep",
    "WARNING: inconsistent lock state",
    "WARNING: possible",
)
MONITOR = ("papr_scm_pmu_add", "papr_scm_pmu_read", "papr_scm_pmu_get_value")
OOPS = re.compile(r"(BUG: )?(Unable to handle kernel|Kernel NULL pointer)|Oops: ")
# mm/slub.c overwrites freed objects with it (POISON_FREE).
FREED = "0x6b6b6b6b6b6b6b6"


class StatisticsTest(PaprScmTest):
    """
    Base of the tests of statistics.

    :avocado: disable
    """

    def start(self, size: int, *cmdline: str, allowed: Iterable[str] = ()) -> Guest:
        """Boot a guest, and bind the driver to a DIMM whose statistics have this size, bytes."""
        machine = Machine(nvdimms=(DIMM,), cmdline=cmdline)
        guest = self.boot(machine, allowed=[REPORTED, *allowed])
        self.hypervisor = Hypervisor(guest, "nd_ioctl", "nd_pmu")
        self.rebind(guest, size)
        return guest

    def rebind(self, guest: Guest, size: int) -> None:
        """Bind the driver anew to a DIMM whose statistics have this size."""
        set_driver(guest, DIMM.slot, "unbind")
        with self.hypervisor.answers(
            always(Reply(code=0, outputs=(size,))), until=READ
        ) as interposer:
            set_driver(guest, DIMM.slot, "bind")
            region = wait_for_region(guest, DIMM.slot)
        (asked,) = interposer.made(STATISTICS)
        found = asked.call.arguments[:3]
        self.check("DRC, buffer and size of the first question", found, (DIMM.drc, 0, 0))
        if region.dimm is None:
            raise ContractError(f"{region.name} has no DIMM")
        self.nmem = region.dimm.name

    def statistics(self, values: Mapping[str, int]) -> Choice:
        """Answers with the statistics that the driver asks for by name, or with all."""

        def answer(call: Call) -> Reply | None:
            if call.hcall is not STATISTICS:
                return None
            address, size = call.arguments[1:3]
            buffer = call.read(address, size)
            eye, _version, count = STATISTICS_HEADER.unpack_from(buffer)
            self.requests.append((eye, count, size))
            names = list(values)
            if count:
                entries = STATISTIC.iter_unpack(buffer[STATISTICS_HEADER.size :])
                names = [name.decode() for name, _value in entries][:count]
            return Reply(
                code=0, memory={address: statistics({name: values[name] for name in names})}
            )

        self.requests: list[tuple[bytes, int, int]] = []
        return answer

    def ask(self, guest: Guest, answer: Choice) -> tuple[Answer, Answer]:
        """Query the health, and read papr/perf_stats."""
        steps: list[Step] = [health().build(), Reading(f"{ND}/{self.nmem}/papr/perf_stats")]
        with self.hypervisor.answers(answer):
            first, second = send(guest, f"/dev/{self.nmem}", steps)
        return first, second


def always(reply: Reply) -> Choice:
    """The same answer to each query of statistics."""

    def answer(call: Call) -> Reply | None:
        return reply if call.hcall is STATISTICS else None

    return answer


def size_of(count: int) -> int:
    """Size of the buffer for this number of statistics, bytes."""
    return STATISTICS_HEADER.size + count * STATISTIC.size


class Statistics(StatisticsTest):
    """
    papr/perf_stats and the fuel gauge.

    :avocado: tags=pmem
    """

    def test_values(self) -> None:
        """papr/perf_stats and the fuel gauge have the values of the hypervisor.

        The driver asks for the fuel gauge by its name.
        """
        guest = self.start(size_of(len(NAMES)))
        draw = self.random()
        for _ in range(3):
            values = {name: draw.getrandbits(64) for name in NAMES}
            values[GAUGE] = draw.randrange(101)
            answer, listing = self.ask(guest, self.statistics(values))
            found = read_health(answer)
            flag = found.extension_flags & GAUGE_VALID
            self.check("fuel gauge", (flag, found.fuel_gauge), (1, values[GAUGE]))
            lines = [f"{name} = 0x{value:016X}" for name, value in values.items()]
            self.check("papr/perf_stats", listing.text.splitlines(), lines)
            expected = [(EYE_CATCHER, 1, size_of(1)), (EYE_CATCHER, 0, size_of(len(NAMES)))]
            self.check("requests", self.requests, expected)

    def test_errors(self) -> None:
        """Statistics that cannot be queried are an error, and the health has no fuel gauge."""
        guest = self.start(size_of(len(NAMES)))
        for code in (
            *(ReturnCode.H_HARDWARE, ReturnCode.H_PARAMETER, ReturnCode.H_AUTHORITY),
            *(ReturnCode.H_UNSUPPORTED, ReturnCode.H_PRIVILEGE, 5, ReturnCode.H_BUSY),
        ):
            answer, listing = self.ask(guest, always(Reply(code=code)))
            self.check(
                f"{code}: errno of papr/perf_stats", errno_name(listing.errno), other_than("0")
            )
            found = read_health(answer)
            self.check(f"{code}: fuel gauge", found.extension_flags & GAUGE_VALID, 0)

    def test_more_than_fit(self) -> None:
        """No more statistics are read than fit into the buffer, whatever their number claims."""
        guest = self.start(size_of(4))
        count: int | None = None

        def answer(call: Call) -> Reply | None:
            if call.hcall is not STATISTICS:
                return None
            fit = (call.arguments[2] - STATISTICS_HEADER.size) // STATISTIC.size
            data = statistics(dict.fromkeys(NAMES[:fit], 7), count=count)
            return Reply(code=0, memory={call.arguments[1]: data})

        _answer, listing = self.ask(guest, answer)
        self.expect("lines with the true number", len(listing.text.splitlines()), 4)
        count = 100
        _answer, listing = self.ask(guest, answer)
        lines = listing.data.decode(errors="replace").splitlines()
        self.known_issue(
            TRUSTS,
            shows=len(lines) > 4,
            found=f"papr/perf_stats has {len(lines)} lines from a buffer for 4",
        )

    def test_small_buffer(self) -> None:
        """The driver writes nothing behind a buffer of the size that the hypervisor asks for.

        A hypervisor that asks for 0 bytes has no statistics.
        """
        guest = self.start(0)
        _answer, listing = self.ask(guest, lambda _call: None)
        self.check("errno without statistics", errno_name(listing.errno), "ENOENT")
        # The buffer of 12 bytes is in an object of 16, so that nothing else is damaged.
        for size in (size_of(1), 12):
            self.rebind(guest, size)
            given: list[bytes] = []

            def answer(call: Call, size: int = size, given: list[bytes] = given) -> Reply | None:
                if call.hcall is not STATISTICS:
                    return None
                if call.arguments[2] == size:
                    given.append(call.read(call.arguments[1], STATISTICS_HEADER.size))
                return Reply(code=ReturnCode.H_HARDWARE)

            self.ask(guest, answer)
            written = [header for header in given if header.startswith(EYE_CATCHER)]
            if size > STATISTICS_HEADER.size:
                self.expect("requests with a large buffer", len(written), at_least(1))
            else:
                self.known_issue(
                    TRUSTS,
                    shows=bool(written),
                    found=f"a header of {STATISTICS_HEADER.size} bytes in a buffer of {size}",
                )


class Monitor(StatisticsTest):
    """
    The performance monitor, which a DIMM with statistics has.

    :avocado: tags=pmem
    """

    def counting(self, name: str, answered: list[int]) -> Choice:
        """Answers with a value of one statistic that grows with each query."""

        def answer(call: Call) -> Reply | None:
            if call.hcall is not STATISTICS:
                return None
            answered.append((answered or [1000])[-1] + self.draw.randrange(1, 1 << 40))
            return Reply(code=0, memory={call.arguments[1]: statistics({name: answered[-1]})})

        return answer

    def test_counts(self) -> None:
        """An event counts from its opening on, as the statistic of its name does."""
        guest = self.start(size_of(len(NAMES)), allowed=SLEEPING)
        self.draw = self.random()
        for event in self.draw.sample(range(1, 17), 4):
            name = NAMES[event - 1]
            answered: list[int] = []
            with self.hypervisor.answers(self.counting(name, answered)) as interposer:
                report = count_event(guest, self.nmem, event, "read", "read", "close")
            errnos, counts = zip(*report.results, strict=True)
            self.check(f"{name}: errnos", errnos, (0, 0, 0, 0))
            first, second = counts[1:3]
            growth = {value - answered[0] for value in answered}
            self.check(f"{name}: counts that no answer explains", {first, second} - growth, set())
            self.check(f"{name}: the count grows", 0 < first < second, True)
            sizes = {one.call.arguments[2] for one in interposer.made(STATISTICS)}
            self.check(f"{name}: sizes of the buffers", sizes, {size_of(1)})

    def test_errors(self) -> None:
        """An event whose statistic cannot be queried, or that does not exist, is refused."""
        guest = self.start(size_of(len(NAMES)), allowed=SLEEPING)
        for event in (0, 1 << 20, (1 << 63) + 4):
            report = count_event(guest, self.nmem, event)
            self.check(f"event {event:#x}", errno_name(report.results[0][0]), "EINVAL")
        failing = always(Reply(code=ReturnCode.H_HARDWARE))
        with self.hypervisor.answers(failing) as interposer:
            report = count_event(guest, self.nmem, 4, "read", "close")
        self.check("queries of a statistic", len(interposer.made(STATISTICS)), at_least(1))
        # perf_event_open(2) reports no error of the counter; it has the state ERROR, and reads 0.
        self.check("count after an error", {count for _errno, count in report.results}, {0})

    def test_context(self) -> None:
        """The driver does not sleep where an event is added or read: interrupts are off there."""
        self.require_kernel("CONFIG_DEBUG_ATOMIC_SLEEP", hint="-p kernel=debug")
        guest = self.start(size_of(len(NAMES)), allowed=SLEEPING)
        with self.hypervisor.answers(self.statistics(dict.fromkeys(NAMES, 5))):
            count_event(guest, self.nmem, 4, "read", "close")
        guest.check()
        found = [
            trace for trace in traces(guest.console.lines, SLEEPS) if has_frame(trace, *MONITOR)
        ]
        self.known_issue(SLEEPS_ISSUE, shows=bool(found), found="an event that is opened and read")

    def test_unbind(self) -> None:
        """The driver can go while one of its events is open.

        The kernel overwrites freed memory with 0x6b, so that a use of it is a fault.
        """
        self.require_kernel("CONFIG_SLUB_DEBUG")
        guest = self.start(size_of(len(NAMES)), "slub_debug=P", allowed=SLEEPING)
        write = f"write={PLATFORM}/unbind={platform_device(DIMM.slot)}"
        found = ""
        try:
            with self.hypervisor.answers(self.statistics(dict.fromkeys(NAMES, 5))):
                count_event(guest, self.nmem, 4, "read", write, "read", "close")
            guest.check()
        except (ContractError, GuestLostError):
            # The interposer delays the lines that follow the first one.
            guest.console.settle(2.0, 20.0)
            oopses = [oops for oops in traces(guest.console.lines, OOPS) if FREED in oops]
            if not oopses:
                raise
            found = "an Oops at an address in freed memory"
        self.known_issue(OUTLIVES, shows=bool(found), found=found or "no use of freed memory")
