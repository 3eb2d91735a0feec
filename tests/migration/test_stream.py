# SPDX-License-Identifier: GPL-2.0-or-later
"""Streams whose flush state was cut or altered: refused with a message, in bounded memory.

QEMU must not be ended by a signal: its core dump contains the guest's memory. See
vmstate_spapr_nvdimm_states and spapr_nvdimm_flush_post_load in QEMU's hw/ppc/spapr_nvdimm.c.
"""

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from paprscm.errors import GuestLostError
from paprscm.hcall.bare_metal import BareMachine
from paprscm.hcall.judge import ScmJudge, request
from paprscm.hcall.mailbox import Call
from paprscm.migration.handover import save_awake
from paprscm.migration.stream import DimmState, FlushState, read_states, rewrite, without
from paprscm.migration.transfer import LoadError, load
from paprscm.papr import Hcall, drc_index
from paprscm.testcase import QemuTest
from paprscm.vm.dimms import PMEM_OFF, SMALL
from paprscm.vm.machine import Machine

FLUSH = Hcall.H_SCM_FLUSH
DRC = drc_index(0)
# The machine has 8 slots. Linux's and QEMU's DRC type 8 is a block of regular memory.
NO_DRC, LMB_DRC = drc_index(31), 0x80000000 | 4
MANY = 100_000


@dataclass(frozen=True)
class Change:
    """A change of one DIMM's state, which has tokens 1 and 2 completed and 3 and 4 pending."""

    name: str
    apply: Callable[[DimmState], DimmState]


def pending(*flushes: FlushState) -> Callable[[DimmState], DimmState]:
    """The state with these pending flushes instead of its own."""
    return lambda state: replace(state, pending=flushes)


def result(code: int) -> Callable[[DimmState], DimmState]:
    """The state with this result of each completed flush."""
    return lambda state: replace(
        state, completed=tuple(replace(flush, result=code) for flush in state.completed)
    )


CHANGES = (
    Change("a pending token twice", pending(FlushState(3, 0, DRC), FlushState(3, 0, DRC))),
    Change("a token pending and completed", pending(FlushState(1, 0, DRC))),
    Change("token 0", pending(FlushState(0, 0, DRC))),
    Change("a token after the last one", pending(FlushState(99, 0, DRC))),
    Change("the largest last token", lambda state: replace(state, last_token=(1 << 64) - 1)),
    Change("a DRC index that does not exist", pending(FlushState(3, 0, NO_DRC))),
    Change("the DRC index of an empty slot", pending(FlushState(3, 0, drc_index(5)))),
    Change("the DRC index of regular memory", pending(FlushState(3, 0, LMB_DRC))),
    Change("the DRC index of another DIMM", pending(FlushState(3, 0, drc_index(1)))),
    Change("a result that the hcall does not have", result(1234)),
    Change("the result long-busy", result(9901)),
    Change(
        f"{MANY} pending flushes",
        pending(*(FlushState(token, 0, DRC) for token in range(3, 3 + MANY))),
    ),
)


class Altered(QemuTest):
    """
    :avocado: tags=hcall,flush,migration,hostile
    """

    def source(self) -> tuple[BareMachine, bytes]:
        """A machine with completed and pending flushes of its first DIMM, and its stream."""
        dimms = self.keep(PMEM_OFF.at(0, SMALL), PMEM_OFF.at(1, SMALL)).nvdimms()
        self.machine = Machine(nvdimms=dimms, smp=1, memory_mib=256)
        bare = self.bare(self.machine, shim=self.shim())
        judge = ScmJudge(bare, dimms)
        judge.make(*[request(FLUSH, DRC, 0)] * 2)
        judge.wait_completed(0, 2)
        judge.hold(0)
        judge.make(*[request(FLUSH, DRC, 0)] * 2)
        return bare, save_awake(bare)

    def try_load(self, source: BareMachine, stream: bytes) -> tuple[str, str]:
        """Load a stream in a new QEMU and use it; return "refused" or what happens, and details."""
        # Syncs are held, as long as the shim does not let them end.
        shim = self.shim()
        destination = self.bare(self.machine, shim=shim, source=source)
        for slot in (0, 1):
            destination.vm.syncs(slot).hang()
        try:
            load(destination.vm, stream)
            destination.adopt()
            # It may end meanwhile, because of the stream.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                self.metric("memory_of_destination", resident_mib(destination.process.pid), "MiB")
            destination.batch([Call(FLUSH, (DRC, token)) for token in (*range(5), 99)])
            for slot in (0, 1):
                destination.vm.syncs(slot).release()
            if len(stream) < self.size + 1000:
                destination.batch([Call(FLUSH, (DRC, token)) for token in range(1, 5)])
            return "accepted", ""
        except LoadError as error:
            if error.is_refusal:
                return "refused", error.text
            return error.how, error.text
        except GuestLostError as error:
            return f"accepted, then {error.message.splitlines()[0]}", ""
        finally:
            destination.close()

    def test_altered(self) -> None:
        """A flush state that no QEMU can have sent is refused with a message."""
        source, stream = self.source()
        self.size = len(stream)
        state = read_states(stream)[0]
        self.expect("completed", sorted(flush.token for flush in state.completed), [1, 2])
        self.expect("pending", sorted(flush.token for flush in state.pending), [3, 4])
        unchanged, text = self.try_load(source, rewrite(stream, [state]))
        self.expect(f"the stream without a change ({text})", unchanged, "accepted")
        outcomes = {}
        for change in CHANGES:
            outcomes[change.name], _text = self.try_load(
                source, rewrite(stream, [change.apply(state)])
            )
            self.log.info("%s: %s", change.name, outcomes[change.name])
        self.measure("outcomes", outcomes)
        wrong = [f"{name}: {outcome}" for name, outcome in outcomes.items() if outcome != "refused"]
        self.known_issue("qemu-flush-state-unchecked", shows=bool(wrong), found="; ".join(wrong))

    def test_not_well_formed(self) -> None:
        """A section that is missing, twice, or has a wrong length, is refused with a message.

        The section of a DIMM that has never been flushed is needed, too: it has the flag by which
        the destination's backend is checked.
        """
        source, stream = self.source()
        self.size = len(stream)
        first, second = read_states(stream)
        end = first.span[1]
        altered = {
            "a byte less": stream[: end - 1] + stream[end:],
            "a byte more": stream[:end] + b"\0" + stream[end:],
            "two sections of one DIMM": stream.replace(
                section(stream, second), section(stream, first)
            ),
        }
        for name, bytes_ in altered.items():
            self.check(name, self.try_load(source, bytes_)[0], "refused")
        missing, _text = self.try_load(source, without(stream, first))
        self.known_issue(
            "qemu-flush-state-may-be-missing",
            shows=missing != "refused",
            found=f"a stream without the section of a DIMM with pending flushes: {missing}",
        )

    def test_cut(self) -> None:
        """A stream that ends early, as when the source is killed, is refused, wherever it ends."""
        source, stream = self.source()
        self.size = len(stream)
        state = read_states(stream)[0]
        # Section header, fields, footer.
        start, end = state.span[0] - 33, state.span[1] + 5
        inside = list(range(start, end + 1))
        count = int(self.params.get("cuts", default=8))
        generator = self.random()
        before = [generator.randrange(1, start) for _ in range(max(1, count // 4))]
        # Also between two sections, where no footer is missing.
        picked = inside if count >= len(inside) else [start, end, *generator.sample(inside, count)]
        for length in itertools.chain(picked, before):
            outcome, text = self.try_load(source, stream[:length])
            self.check(
                f"a stream of {length} bytes, {length - start} of the section", outcome, "refused"
            )
            self.check(f"message about {length} bytes", bool(text), True)
        self.metric("cuts", len(picked) + len(before), "cuts")


def section(stream: bytes, state: DimmState) -> bytes:
    """A DIMM's section with its header, without its footer."""
    return stream[state.span[0] - 33 : state.span[1]]


def resident_mib(pid: int) -> int:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 >> 20
