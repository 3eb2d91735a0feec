# SPDX-License-Identifier: GPL-2.0-or-later
"""Trace of the guest kernel's H_SCM_FLUSH calls, each with token, return code and times.

The source are kprobes on plpar_hcall (arch/powerpc/platforms/pseries/hvCall.S), which makes all
hypervisor calls with outputs; so the trace does not depend on papr_scm. The calls are also counted
by HCALL_STATS (hvCall_inst.c), which shares no code with kprobes.

The probes are not optimized: a kprobe that became a branch corrupts a preemptible kernel
(known_issues/linux-kprobe-restores-paca.md).
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from paprscm.errors import CapabilityError, ContractError, HostError
from paprscm.guest.guest import Guest
from paprscm.papr import LONG_BUSY_MS, MAX_SLOTS, Hcall, ReturnCode, drc_index, return_code_name

_FLUSH = int(Hcall.H_SCM_FLUSH)
_DRCS = range(drc_index(0), drc_index(MAX_SLOTS - 1) + 1)
_BUSY = {int(ReturnCode.H_BUSY), *map(int, LONG_BUSY_MS)}

_ENOUGH_WAITS = 20

_PREPARE = f"""
T=/sys/kernel/tracing D=/sys/kernel/debug O=/proc/sys/debug/kprobes-optimization
[ -d $T/events ] || mount -t tracefs tracefs $T || exit 10
[ -d $D/hcall_inst ] || exit 11
[ -e $T/kprobe_events ] || exit 12
# Absent without CONFIG_OPTPROBES. The probe that all kretprobes return to is optimized at boot.
[ ! -e $O ] || echo 0 > $O || exit 10
I=$T/instances/paprscm
mkdir $I || exit 10
# After the entry, which ftrace uses if it is compiled in, at most 16 bytes (kprobe_lookup_name in
# arch/powerpc/kernel/kprobes.c). The function has no stack frame yet at that point.
echo 'p:paprscm/flush papr_scm_pmem_flush+16' > $T/kprobe_events || exit 13
# Register numbers, because an assembler function has no argument names.
fields='op=%gpr3:u64 buffer=%gpr4:x64 drc=%gpr5:x64 sent=%gpr6:u64'
echo "p:paprscm/call plpar_hcall $fields" >> $T/kprobe_events || exit 14
# With HCALL_STATS plpar_hcall saves its arguments in its caller's frame (HCALL_INST_PRECALL).
# Except for the first they are still there on return; Linux before 6.9 has them nowhere else.
# Threads can be preempted between the two probes, so 256 instances instead of one a CPU.
fields='buffer=+40(%gpr1):x64 drc=+48(%gpr1):x64 token=+0(+40(%gpr1)):u64 code=$retval:s64'
echo "r256:paprscm/answer plpar_hcall $fields" >> $T/kprobe_events || exit 14
echo mono_raw > $I/trace_clock || exit 10
echo 4096 > $I/buffer_size_kb || exit 10
echo 'op == {_FLUSH}' > $I/events/paprscm/call/filter || exit 10
echo 'drc >= {_DRCS.start} && drc < {_DRCS.stop}' > $I/events/paprscm/answer/filter || exit 10
echo 1 > $I/events/paprscm/enable || exit 10
! grep 'OPTIMIZED\\|FTRACE' $D/kprobes/list >&2 || exit 10
"""

# Reading trace_pipe consumes the events, so none is read twice. dd ends at EAGAIN.
_READ = f"""
T=/sys/kernel/tracing D=/sys/kernel/debug
dd if=$T/instances/paprscm/trace_pipe iflag=nonblock bs=65536 status=none 2> /dev/null
awk 'FILENAME ~ /kprobe_profile/ {{ print "probe", $1, $2, $3; next }}
$1 == {_FLUSH} {{ n += $2 }} END {{ print "hcalls", n + 0 }}' $D/hcall_inst/cpu* $T/kprobe_profile
"""

_LACKING = {
    11: "no HCALL_STATS: the guest's kernel does not count its hcalls",
    12: "no KPROBE_EVENTS: the guest's kernel cannot be probed",
    13: "the guest's kernel has no papr_scm_pmem_flush to probe",
    14: "the guest's kernel has no plpar_hcall to probe",
}

_COUNT = f"""
cd /sys/kernel/debug/hcall_inst || exit 11
cat cpu* | awk '$1 == {_FLUSH} {{ n += $2 }} END {{ print n + 0 }}'
"""

_LINE = re.compile(
    r" *.*-(?P<pid>\d+) +\[\d+\] +\S+ +(?P<seconds>\d+)\.(?P<us>\d{6}): (?P<event>\w+): \(.*?\)"
    r"(?P<fields>(?: \w+=\S+)*)"
)


@dataclass(frozen=True)
class FlushHcall:
    """One H_SCM_FLUSH.

    Attributes:
        pid: process id of its thread.
        drc: its DRC index.
        sent_token: continue token in its arguments; 0 for a new flush.
        token: continue token in its outputs.
        code: its return code.
        begin_us, end_us: its times by the guest's CLOCK_MONOTONIC_RAW, us.
    """

    pid: int
    drc: int
    sent_token: int
    token: int
    code: int
    begin_us: int
    end_us: int


@dataclass(frozen=True)
class TracedFlush:
    """The calls of one flush: the first, and the polls for its end."""

    calls: tuple[FlushHcall, ...]

    @property
    def drc(self) -> int:
        """The DRC index of the DIMM."""
        return self.calls[0].drc

    @property
    def code(self) -> int:
        """Return code of the last hcall."""
        return self.calls[-1].code

    @property
    def waits_us(self) -> list[int]:
        """The driver's waits before each further call, us."""
        pairs = zip(self.calls, self.calls[1:], strict=False)
        return [later.begin_us - earlier.end_us for earlier, later in pairs]


@dataclass(frozen=True)
class TraceReading:
    """Totals since tracing started; only `flushes` is reset by read().

    Attributes:
        flushes: flushes that ended since the last reading, in the order of their ends.
        ended: number of ended flushes.
        traced: number of traced calls with token 0, and of all traced calls.
        entered: number of calls of papr_scm_pmem_flush.
        hcalls: number of H_SCM_FLUSH counted by HCALL_STATS.
    """

    flushes: tuple[TracedFlush, ...]
    ended: int
    traced: tuple[int, int]
    entered: int
    hcalls: int


class FlushTrace:
    """The flushes of one guest from now on.

    Raises:
        CapabilityError: its kernel cannot be probed.
        HostError: tracing cannot be set up.
    """

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._pending: dict[int, tuple[int, dict[str, int]]] = {}
        self._flushes: dict[int, list[FlushHcall]] = defaultdict(list)
        self._first = self._calls = self._ended = 0
        result = guest.run(_PREPARE)
        if reason := _LACKING.get(result.status):
            raise CapabilityError(reason, hint="the options are in images/kernel.config")
        if result.status:
            raise HostError(f"the guest's kernel cannot be traced: {result.stderr}")
        self._hcalls_before = 0
        self._hcalls_before = self.read().hcalls

    def read(self) -> TraceReading:
        """Read the trace, in one round trip.

        Raises:
            HostError: an event was lost, or a line cannot be parsed.
        """
        ended, hits, hcalls = [], {}, None
        for line in self._guest.succeed(_READ).splitlines():
            if match := re.fullmatch(r"probe (\w+) (\d+) (\d+)", line):
                if int(match[3]):
                    raise HostError(f"the probe {match[1]} missed {match[3]} calls")
                hits[match[1]] = int(match[2])
            elif match := re.fullmatch(r"hcalls (\d+)", line):
                hcalls = int(match[1])
            elif flush := self._event(line):
                ended.append(flush)
        if hcalls is None or "flush" not in hits:
            raise HostError("the guest's trace has no count of hcalls or probes")
        self._ended += len(ended)
        return TraceReading(
            flushes=tuple(ended),
            ended=self._ended,
            traced=(self._first, self._calls),
            entered=hits["flush"],
            hcalls=hcalls - self._hcalls_before,
        )

    def _event(self, line: str) -> TracedFlush | None:
        """The flush that ends with this event, if one does."""
        match = _LINE.fullmatch(line)
        if match is None:
            raise HostError(f"the guest's trace cannot be parsed: {line!r}")
        pid, us = int(match["pid"]), int(match["seconds"]) * 1_000_000 + int(match["us"])
        if match["event"] == "flush":
            return None
        fields = {k: int(v, 0) for k, v in (f.split("=") for f in match["fields"].split())}
        if match["event"] == "call":
            if fields["drc"] not in _DRCS:
                raise ContractError(f"H_SCM_FLUSH of drc {fields['drc']:#x}, which is not a DIMM's")
            if pid in self._pending:
                raise HostError(f"the return of the hcall before this one was not traced: {line!r}")
            self._pending[pid] = us, fields
            return None
        if pid not in self._pending:
            return None  # the return of another hcall on a DIMM
        begin_us, arguments = self._pending.pop(pid)
        if any(fields[name] != arguments[name] for name in ("buffer", "drc")):
            raise HostError(f"the return of an hcall with other arguments, {arguments}: {line!r}")
        call = FlushHcall(
            pid=pid,
            drc=arguments["drc"],
            sent_token=arguments["sent"],
            token=fields["token"],
            code=fields["code"],
            begin_us=begin_us,
            end_us=us,
        )
        self._first += call.sent_token == 0
        self._calls += 1
        self._flushes[pid].append(call)
        if call.code in _BUSY:
            return None
        return TracedFlush(tuple(self._flushes.pop(pid)))


def count_hcalls(guest: Guest) -> int:
    """Number of the guest's H_SCM_FLUSH calls since its start, from HCALL_STATS, without a probe.

    Raises:
        CapabilityError: its kernel does not count its hcalls.
    """
    result = guest.run(_COUNT)
    if reason := _LACKING.get(result.status):
        raise CapabilityError(reason, hint="the options are in images/kernel.config")
    if result.status or not result.stdout.strip().isdecimal():
        raise HostError(f"the guest's count of hcalls cannot be read: {result}")
    return int(result.stdout)


def expect_protocol(flushes: Iterable[TracedFlush], *, code: int = ReturnCode.H_SUCCESS) -> None:
    """Assert that the driver and QEMU follow PAPR's protocol of continue tokens.

    A flush begins with token 0, and polls with its token until it has ended; the flushes of a DIMM
    have different tokens. Before a poll the driver waits as long as the return code demands
    (papr_scm.c:papr_scm_pmem_flush): the median of 20 waits or more is not shorter. A single wait
    may be shorter: msleep counts jiffies, and if the host delayed the vCPU, jiffies are late when
    it begins and catch up before it ends.

    Args:
        flushes: in the order of their ends.
        code: expected final return code.

    Raises:
        ContractError: a flush violates the protocol; with its calls.
    """
    waits: Mapping[int, list[int]] = defaultdict(list)
    tokens: Mapping[int, set[int]] = defaultdict(set)
    for flush in flushes:
        first, *polls = flush.calls
        wrong = []
        if first.sent_token:
            wrong.append("it begins with a token")
        if first.code not in _BUSY:
            wrong.append("it ended with its first call")
        if first.token == 0 or first.token in tokens[flush.drc]:
            wrong.append(f"token {first.token} is 0 or not unique")
        tokens[flush.drc].add(first.token)
        if any(call.sent_token != first.token or call.drc != flush.drc for call in polls):
            wrong.append("a later call has another token or drc")
        for call, wait in zip(flush.calls, flush.waits_us, strict=False):
            waits[call.code].append(wait)
        if flush.code != code:
            wrong.append(f"it ended with {return_code_name(flush.code)}")
        if wrong:
            calls = "\n    ".join(map(str, flush.calls))
            raise ContractError(f"a flush: {'; '.join(wrong)}:\n    {calls}")
    for busy, waits_us in waits.items():
        hint_us = 1000 * LONG_BUSY_MS.get(ReturnCode(busy), 0)
        if len(waits_us) >= _ENOUGH_WAITS and (median := statistics.median(waits_us)) < hint_us:
            raise ContractError(
                f"the driver waited {median} us after {return_code_name(busy)} (median of "
                f"{len(waits_us)}), at least {hint_us} us are required"
            )
