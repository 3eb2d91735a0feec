# SPDX-License-Identifier: GPL-2.0-or-later
"""H_SCM_FLUSH as the guest's kernel makes it: every call with its token, its answer, its times.

Read from kprobes on plpar_hcall (arch/powerpc/platforms/pseries/hvCall.S), through which all
hypervisor calls with results go, so nothing of it depends on what papr_scm says of itself; and
counted by HCALL_STATS (hvCall_inst.c), which shares no code with kprobes.

The probes stay traps: a probe that the kernel has turned into a branch corrupts a kernel that
preempts itself (known_issues/linux-kprobe-restores-paca.md).
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
# Absent without CONFIG_OPTPROBES. The probe on which all kretprobes return is optimized at boot.
[ ! -e $O ] || echo 0 > $O || exit 10
I=$T/instances/paprscm
mkdir $I || exit 10
# Behind the entry, which is ftrace's where it is compiled in; 16 bytes is as far as that goes
# (kprobe_lookup_name in arch/powerpc/kernel/kprobes.c). The function has not even a frame there.
echo 'p:paprscm/flush papr_scm_pmem_flush+16' > $T/kprobe_events || exit 13
# Numbers of registers, not names of arguments: a function written in assembler has none.
fields='op=%gpr3:u64 buffer=%gpr4:x64 drc=%gpr5:x64 sent=%gpr6:u64'
echo "p:paprscm/call plpar_hcall $fields" >> $T/kprobe_events || exit 14
# With HCALL_STATS plpar_hcall saves its arguments in its caller's frame (HCALL_INST_PRECALL).
# They are there on return as well, but for the first, and Linux before 6.9 has them nowhere else.
# Threads can be preempted between the two probes, so more of them than CPUs.
fields='buffer=+40(%gpr1):x64 drc=+48(%gpr1):x64 token=+0(+40(%gpr1)):u64 code=$retval:s64'
echo "r256:paprscm/answer plpar_hcall $fields" >> $T/kprobe_events || exit 14
echo mono_raw > $I/trace_clock || exit 10
echo 4096 > $I/buffer_size_kb || exit 10
echo 'op == {_FLUSH}' > $I/events/paprscm/call/filter || exit 10
echo 'drc >= {_DRCS.start} && drc < {_DRCS.stop}' > $I/events/paprscm/answer/filter || exit 10
echo 1 > $I/events/paprscm/enable || exit 10
! grep 'OPTIMIZED\\|FTRACE' $D/kprobes/list >&2 || exit 10
"""

# The pipe's readers take what they read, so nothing is read twice. dd ends at EAGAIN.
_READ = f"""
T=/sys/kernel/tracing D=/sys/kernel/debug
dd if=$T/instances/paprscm/trace_pipe iflag=nonblock bs=65536 status=none 2> /dev/null
cat $D/hcall_inst/cpu* | awk '$1 == {_FLUSH} {{ n += $2 }} END {{ print "hcalls", n + 0 }}'
awk '{{ print "probe", $1, $2, $3 }}' $T/kprobe_profile
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
        pid: of the thread that made it.
        drc: the DRC index that it named.
        sent: the continue token that it took along, 0 for a new flush.
        token: the one that it came back with.
        code: what it answered.
        begin_us, end_us: when, by the guest's CLOCK_MONOTONIC_RAW, us.
    """

    pid: int
    drc: int
    sent: int
    token: int
    code: int
    begin_us: int
    end_us: int


@dataclass(frozen=True)
class TracedFlush:
    """The calls of one flush: the first, and those that ask for its end."""

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
        """For how long the driver waited before each further call, us."""
        pairs = zip(self.calls, self.calls[1:], strict=False)
        return [later.begin_us - earlier.end_us for earlier, later in pairs]


@dataclass(frozen=True)
class TraceReading:
    """Totals since tracing started; only `flushes` is reset by read().

    Attributes:
        flushes: those that ended since the last reading, in the order in which they ended.
        ended: all that ended so far.
        traced: calls with token 0, and all calls, that the probes saw.
        entered: how often papr_scm_pmem_flush was called.
        hcalls: how often HCALL_STATS counted H_SCM_FLUSH.
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
        HostError: tracing does not work as it should.
    """

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._begun: dict[int, tuple[int, dict[str, int]]] = {}
        self._flushes: dict[int, list[FlushHcall]] = defaultdict(list)
        self._first = self._calls = self._ended = 0
        result = guest.run(_PREPARE)
        if why := _LACKING.get(result.status):
            raise CapabilityError(why, hint="the options are in images/kernel.config")
        if result.status:
            raise HostError(f"the guest's kernel cannot be traced: {result.stderr}")
        self._hcalls_before = 0
        self._hcalls_before = self.read().hcalls

    def read(self) -> TraceReading:
        """Read the trace, in one round trip.

        Raises:
            HostError: an event was lost, or a line cannot be understood.
        """
        ended, hits, hcalls = [], {}, None
        for line in self._guest.succeed(_READ).splitlines():
            if found := re.fullmatch(r"probe (\w+) (\d+) (\d+)", line):
                if int(found[3]):
                    raise HostError(f"the probe {found[1]} missed {found[3]} calls")
                hits[found[1]] = int(found[2])
            elif found := re.fullmatch(r"hcalls (\d+)", line):
                hcalls = int(found[1])
            elif flush := self._event(line):
                ended.append(flush)
        if hcalls is None or "flush" not in hits:
            raise HostError("the guest's kernel does not say how often it was probed")
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
        found = _LINE.fullmatch(line)
        if found is None:
            raise HostError(f"the guest's trace cannot be understood: {line!r}")
        pid, us = int(found["pid"]), int(found["seconds"]) * 1_000_000 + int(found["us"])
        if found["event"] == "flush":
            return None
        fields = {k: int(v, 0) for k, v in (f.split("=") for f in found["fields"].split())}
        if found["event"] == "call":
            if fields["drc"] not in _DRCS:
                raise ContractError(f"H_SCM_FLUSH of drc {fields['drc']:#x}, which is not a DIMM's")
            if pid in self._begun:
                raise HostError(f"no answer was traced to the hcall before this one: {line!r}")
            self._begun[pid] = us, fields
            return None
        if pid not in self._begun:
            return None  # the answer to another hcall on a DIMM
        begin_us, sent = self._begun.pop(pid)
        if any(fields[name] != sent[name] for name in ("buffer", "drc")):
            raise HostError(f"the answer to an hcall with other arguments, {sent}: {line!r}")
        call = FlushHcall(
            pid=pid,
            drc=sent["drc"],
            sent=sent["sent"],
            token=fields["token"],
            code=fields["code"],
            begin_us=begin_us,
            end_us=us,
        )
        self._first += call.sent == 0
        self._calls += 1
        self._flushes[pid].append(call)
        if call.code in _BUSY:
            return None
        return TracedFlush(tuple(self._flushes.pop(pid)))


def count_hcalls(guest: Guest) -> int:
    """Count the guest's H_SCM_FLUSH calls since its start by HCALL_STATS, without a probe.

    Raises:
        CapabilityError: its kernel does not count its hcalls.
    """
    result = guest.run(_COUNT)
    if why := _LACKING.get(result.status):
        raise CapabilityError(why, hint="the options are in images/kernel.config")
    if result.status or not result.stdout.strip().isdecimal():
        raise HostError(f"the guest's count of hcalls cannot be read: {result}")
    return int(result.stdout)


def expect_protocol(flushes: Iterable[TracedFlush], *, code: int = ReturnCode.H_SUCCESS) -> None:
    """Assert that the driver and QEMU keep to PAPR's protocol of continue tokens.

    A flush begins with token 0, hands back the token that it was given until it has ended, and
    asks no more then; no two flushes of a DIMM have the same token. Before it asks again, the
    driver waits as long as the answer said (papr_scm.c:papr_scm_pmem_flush): the median of 20
    waits or more is not shorter. A single one can be: msleep counts jiffies, and where a vCPU had
    to wait for its host, jiffies are late when it begins and catch up before it ends.

    Args:
        flushes: in the order in which they ended.
        code: what they must end with.

    Raises:
        ContractError: with the calls of the first that does not.
    """
    waits: Mapping[int, list[int]] = defaultdict(list)
    tokens: Mapping[int, set[int]] = defaultdict(set)
    for flush in flushes:
        first, *polls = flush.calls
        wrong = []
        if first.sent:
            wrong.append("it begins with a token")
        if first.code not in _BUSY:
            wrong.append("it ended with its first call, though a flush takes a while")
        if first.token == 0 or first.token in tokens[flush.drc]:
            wrong.append(f"the token {first.token} is none of its own")
        tokens[flush.drc].add(first.token)
        if any(call.sent != first.token or call.drc != flush.drc for call in polls):
            wrong.append("a later call names another flush")
        for call, wait in zip(flush.calls, flush.waits_us, strict=False):
            waits[call.code].append(wait)
        if flush.code != code:
            wrong.append(f"it ended with {return_code_name(flush.code)}")
        if wrong:
            calls = "\n    ".join(map(str, flush.calls))
            raise ContractError(f"a flush: {'; '.join(wrong)}:\n    {calls}")
    for busy, found in waits.items():
        hint_us = 1000 * LONG_BUSY_MS.get(ReturnCode(busy), 0)
        if len(found) >= _ENOUGH_WAITS and (median := statistics.median(found)) < hint_us:
            raise ContractError(
                f"the driver waited {median} us after {return_code_name(busy)} (median of "
                f"{len(found)}), at least {hint_us} us are asked for"
            )
