# SPDX-License-Identifier: GPL-2.0-or-later
"""Random sequences of hcalls on several DIMMs, compared with the model call by call.

Hypothesis generates the sequences and shrinks a failing one to the shortest that fails. All run on
one machine: the state that a sequence leaves (labels, outstanding flushes) is removed before the
next; the last token cannot be reset, so arguments are relative to it.
"""

from __future__ import annotations

import errno
from collections import Counter
from typing import NamedTuple

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.errors import Flaky

from paprscm.device.hcall_judge import Request, ScmJudge, counts_by_name, unbind_wraps
from paprscm.device.mailbox import Call
from paprscm.errors import ContractError, Error
from paprscm.papr import BIND_ANY_ADDRESS, SCM_BLOCK_SIZE, Hcall, ReturnCode, drc_index
from paprscm.testcase import QemuTest
from paprscm.vm.dimms import PLAIN, PMEM_OFF, PMEM_ON, SMALL
from paprscm.vm.machine import Machine, Nvdimm

DIMMS = (
    PMEM_OFF.at(0, SMALL),
    Nvdimm(slot=1, size_bytes=2 * SMALL, label_bytes=256 << 10),
    PMEM_ON.at(2, SMALL),
    PLAIN.at(3, SMALL),
    Nvdimm(slot=4, size_bytes=SMALL, unarmed=True),
)
MOST_HELD = 16
"""Limit of hanging flushes in a sequence; QEMU syncs in up to 64 threads."""


class Token(NamedTuple):
    """A token relative to the last one of this DIMM or another."""

    slot: int
    back: int


class Address(NamedTuple):
    """A guest address: blocks from the start of the DIMM, plus some bytes."""

    blocks: int
    more: int


class Make(NamedTuple):
    """A call; each argument is a number, or relative to a token or an address."""

    call: Hcall
    slot: int
    arguments: tuple[Value, ...]


class Control(NamedTuple):
    """An action on the machine: "hold", "release", "fail", "clear", "reset"."""

    verb: str
    slot: int


Value = int | Token | Address


def weighed(*choices: tuple[int, st.SearchStrategy[Value]]) -> st.SearchStrategy[Value]:
    """Choose one of the strategies by weight; one_of() would drop repetitions."""
    picks = [strategy for weight, strategy in choices for _ in range(weight)]
    return st.integers(0, len(picks) - 1).flatmap(lambda number: picks[number])


slots = st.sampled_from([0, 0, 1, 1, 2, 3, 4, 5])
words = st.one_of(st.integers(0, 16), st.integers(0, (1 << 64) - 1))
# Limits of registers and of the DIMMs' label areas.
edges = st.sampled_from([128 << 10, 256 << 10, 1 << 64])
offsets = weighed(
    # A small range, so that reads often hit earlier writes.
    (3, st.integers(0, 16)),
    (1, st.integers(0, (256 << 10) + 16)),
    (2, edges.flatmap(lambda edge: st.integers(edge - 9, edge - 1))),
)
lengths = weighed((5, st.sampled_from([1, 2, 4, 8])), (1, words))
data = st.one_of(st.integers(0, 255), st.integers(0, 65535), st.integers(0, (1 << 32) - 1), words)
zero = weighed((9, st.just(0)), (1, words))
blocks = weighed((6, st.integers(0, 3)), (1, words), (1, st.sampled_from([1 << 36, (1 << 64) - 1])))
addresses = st.builds(Address, st.integers(-1, 3), st.sampled_from([*[0] * 6, 1, 4096]))
anywhere = weighed((6, st.just(BIND_ANY_ADDRESS)), (1, words), (1, addresses))
tokens = weighed(
    (4, st.just(0)), (5, st.builds(Token, st.integers(0, 4), st.integers(-1, 5))), (1, words)
)


def call(which: Hcall, *arguments: st.SearchStrategy[Value]) -> st.SearchStrategy[Make]:
    """Calls of one kind on any DIMM."""
    return st.builds(Make, st.just(which), slots, st.tuples(*arguments))


# Flushes have most of the state, so most calls are flushes.
KINDS = [
    *[call(Hcall.H_SCM_FLUSH, tokens)] * 6,
    *[call(Hcall.H_SCM_READ_METADATA, offsets, lengths)] * 2,
    *[call(Hcall.H_SCM_WRITE_METADATA, offsets, data, lengths)] * 2,
    *[call(Hcall.H_SCM_BIND_MEM, blocks, blocks, anywhere, zero)] * 2,
    *[call(Hcall.H_SCM_UNBIND_MEM, weighed((5, addresses), (1, words)), blocks, zero)] * 2,
    call(Hcall.H_SCM_UNBIND_ALL, zero),
    call(Hcall.H_SCM_HEALTH),
    call(Hcall.H_SCM_PERFORMANCE_STATS, words),
]
controls = st.builds(
    Control,
    # A reset takes longer than a thousand calls.
    st.sampled_from([*["hold", "release", "fail", "clear"] * 16, "reset"]),
    st.integers(0, 1),
)
steps = st.integers(0, len(KINDS) + 3).flatmap(
    lambda number: KINDS[number] if number < len(KINDS) else controls
)
# A list of lists generates longer sequences than a list, and shrinks as well.
sequences = st.lists(st.lists(steps, min_size=1, max_size=20), min_size=1, max_size=20)


class Model(QemuTest):
    """
    :avocado: tags=hcall,stateful
    """

    timeout = 600

    def test_random_sequences(self) -> None:
        """For any sequence of calls, the machine returns the same results as the model."""
        count = int(self.params.get("sequences", default=500))
        machine = Machine(nvdimms=self.possible(DIMMS), smp=1, memory_mib=256)
        self.done: list[str] = []
        self.failure, self.shortest = ContractError(""), self.done
        self.judge = self.new_judge(machine)
        total: Counter[str] = Counter()

        @seed(self.random().getrandbits(64))
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            print_blob=False,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        )
        @given(sequences)
        def run(sequence: list[list[Make | Control]]) -> None:
            total["sequences"] += 1
            try:
                self.run_one([step for part in sequence for step in part])
            except ContractError as error:
                total["hcalls"] += self.judge.calls
                self.failure, self.shortest = error, self.done
                self.recover(machine)
                raise

        # Hypothesis stores its constants there.
        set_hypothesis_home_dir(self.workdir)
        try:
            run()
        except (ContractError, Flaky) as error:
            # A race does not fail in each run: then this is the last sequence that failed.
            flaky = " (it does not fail in each run)" if isinstance(error, Flaky) else ""
            steps_taken = "\n  ".join(self.shortest)
            raise ContractError(
                f"{self.failure.message}\n  the shortest sequence{flaky}:\n  {steps_taken}"
            ) from None
        finally:
            total["hcalls"] += self.judge.calls
            self.measure("sequences", total["sequences"])
            self.measure("hcalls", total["hcalls"])
            self.measure("branches", counts_by_name(self.judge.model.covered))
        self.log.info("%d hcalls in %d sequences", total["hcalls"], total["sequences"])

    def new_judge(self, machine: Machine) -> ScmJudge:
        """Start a machine for the sequences; return its judge."""
        return ScmJudge(self.bare(machine, shim=self.shim()), machine.nvdimms)

    def recover(self, machine: Machine) -> None:
        """Bring the machine back into a known state, or start a new one."""
        old = self.judge
        try:
            for slot in old.model.dimms:
                old.bare.vm.syncs(slot).clear()
            old.bare.reset()
            self.judge = ScmJudge(old.bare, machine.nvdimms)
            for slot, dimm in self.judge.model.dimms.items():
                (begun,) = old.bare.batch([Call(Hcall.H_SCM_FLUSH, (drc_index(slot), 0))])
                if begun.code == ReturnCode.H_LONG_BUSY_ORDER_10_MSEC:
                    dimm.last_token = begun.outputs[0]
            old.bare.reset()
        except Error:
            old.bare.close()
            self.judge = self.new_judge(machine)

    def run_one(self, sequence: list[Make | Control]) -> None:
        """Run one sequence; consecutive calls are made in one batch."""
        judge = self.judge
        self.clean(judge)
        self.done = []
        waiting: list[Request] = []
        for step in sequence:
            if isinstance(step, Make):
                call_request = self.request(judge, step)
                if call_request is None:
                    continue
                waiting.append(call_request)
                self.done.append(str(call_request))
                # The arguments of a later step may depend on the token that this call returns.
                if step.call is not Hcall.H_SCM_FLUSH:
                    continue
            judge.make(*waiting)
            waiting = []
            if isinstance(step, Control):
                self.control(judge, step)
        judge.make(*waiting)
        for slot in (0, 1):
            self.control(judge, Control("release", slot))
        judge.poll_to_the_end()

    def clean(self, judge: ScmJudge) -> None:
        """Bring the machine into its initial state: empty labels, no shim rules, no flushes."""
        for slot, dimm in judge.model.dimms.items():
            judge.bare.vm.syncs(slot).clear()
            judge.model.release(slot)
            dimm.failing = False
            if any(dimm.label):
                dimm.label[:] = bytes(len(dimm.label))
                with judge.bare.file(slot).open("r+b") as file:
                    file.seek(dimm.size_bytes)
                    file.write(dimm.label)
        judge.poll_to_the_end()

    def request(self, judge: ScmJudge, step: Make) -> Request | None:
        """Request with absolute numbers; None if too many flushes would hang, or a range wraps."""

        def number(value: Value) -> int:
            if isinstance(value, int):
                return value
            dimms = judge.model.dimms
            if isinstance(value, Token):
                dimm = dimms.get(value.slot)
                return max(0, dimm.last_token - value.back) if dimm else 0
            start = dimms[step.slot].address if step.slot in dimms else 0
            return max(0, start + value.blocks * SCM_BLOCK_SIZE + value.more)

        arguments = tuple(map(number, step.arguments))
        if step.call is Hcall.H_SCM_UNBIND_ALL:
            return Request(step.call, (1 + step.slot % 3, drc_index(step.slot), *arguments))
        call_request = Request(step.call, (drc_index(step.slot), *arguments))
        if step.call is Hcall.H_SCM_UNBIND_MEM and unbind_wraps(call_request):
            return None
        dimm = judge.model.dimms.get(step.slot)
        held = dimm is not None and dimm.held and len(dimm.outstanding) >= MOST_HELD
        return None if held and step.call is Hcall.H_SCM_FLUSH else call_request

    def control(self, judge: ScmJudge, step: Control) -> None:
        """Apply an action to the machine and to the model."""
        dimm, syncs = judge.model.dimms[step.slot], judge.bare.vm.syncs(step.slot)
        if step.verb in ("fail", "clear"):
            # The result of a flush in flight cannot be predicted.
            if dimm.held:
                return
            judge.poll_to_the_end(step.slot)
            dimm.failing = step.verb == "fail"
            syncs.fail(errno.EIO) if dimm.failing else syncs.clear()
        elif step.verb == "hold":
            syncs.hang()
            dimm.held = True
        elif step.verb == "release":
            syncs.release()
            judge.model.release(step.slot)
        else:
            # QEMU waits for every flush before it resets.
            for slot in (0, 1):
                self.control(judge, Control("release", slot))
            judge.bare.reset()
            judge.model.reset()
        self.done.append(f"{step.verb} slot {step.slot}" if step.verb != "reset" else "reset")
