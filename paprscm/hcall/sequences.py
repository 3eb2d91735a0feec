# SPDX-License-Identifier: GPL-2.0-or-later
"""Random sequences of hcalls on one machine after another, each call compared with the model.

Hypothesis generates the sequences and shrinks a failing one to the shortest that fails. All run on
one machine: the state that a sequence leaves (labels, outstanding flushes) is removed before the
next; the last token cannot be reset, so arguments are relative to it.
"""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.errors import Flaky

from paprscm.errors import CapabilityError, ContractError, Error
from paprscm.hcall.judge import Request, ScmJudge, unbind_wraps
from paprscm.hcall.mailbox import Call
from paprscm.papr import BIND_ANY_ADDRESS, SCM_BLOCK_SIZE, Hcall, ReturnCode, drc_index
from paprscm.vm.dimms import PLAIN, PMEM_OFF, PMEM_ON, SMALL
from paprscm.vm.machine import Nvdimm

DIMMS: Final = (
    PMEM_OFF.at(0, SMALL),
    Nvdimm(slot=1, size_bytes=2 * SMALL, label_bytes=256 << 10),
    PMEM_ON.at(2, SMALL),
    PLAIN.at(3, SMALL),
    Nvdimm(slot=4, size_bytes=SMALL, unarmed=True),
)
"""The DIMMs of the machine; flushes of the first two have syncs on the host."""
FLUSHED: Final = (0, 1)
"""Their slots."""
MOST_HELD = 16
"""Limit of hanging flushes in a sequence; QEMU syncs in up to 64 threads."""


# Time limit for the search for a shorter sequence that fails, s.
_SHRINK_LIMIT_S = 60.0


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
    st.sampled_from(FLUSHED),
)
steps = st.integers(0, len(KINDS) + 3).flatmap(
    lambda number: KINDS[number] if number < len(KINDS) else controls
)


def sequences_of(
    some: st.SearchStrategy[Any], longest: int = 20
) -> st.SearchStrategy[list[list[Any]]]:
    """Sequences of steps; a list of lists is longer than a list on average, and shrinks as well."""
    return st.lists(st.lists(some, min_size=1, max_size=20), min_size=1, max_size=longest)


class SequenceRunner:
    """Runs sequences on a machine.

    Args:
        start: starts a machine with the DIMMs; returns its judge.

    Attributes:
        judge: the judge of the current machine.
        done: the steps of the last sequence, for a report.
        hcalls: number of judged calls of earlier machines.
        sequences: number of sequences.
    """

    def __init__(self, start: Callable[[], ScmJudge]) -> None:
        self._start = start
        self.judge = start()
        self.done: list[str] = []
        self.hcalls = self.sequences = 0

    def run_all(
        self, sequences: st.SearchStrategy[Any], *, count: int, first: int, folder: Path
    ) -> None:
        """Run random sequences.

        Args:
            sequences: lists of lists of steps.
            count: number of sequences.
            first: seed of the random numbers.
            folder: scratch folder for Hypothesis.

        Raises:
            ContractError: an answer differs from the model's; with the shortest sequence found.
            CapabilityError: this QEMU cannot run such sequences.
            GuestLostError: QEMU ended.
        """
        failure, shortest = ContractError(""), self.done
        inability: CapabilityError | None = None
        failed: dict[str, ContractError] = {}
        deadline = math.inf

        @seed(first)
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            print_blob=False,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        )
        @given(sequences)
        def run(sequence: list[list[Any]]) -> None:
            nonlocal failure, shortest, deadline, inability
            if inability is not None:
                return
            if known := failed.get(repr(sequence)):
                raise known
            # A failure may take a minute to show: then do not look for a shorter sequence.
            if time.monotonic() > deadline:
                return
            self.sequences += 1
            try:
                self.run([step for part in sequence for step in part])
            except CapabilityError as error:
                # Hypothesis would look for a shorter sequence.
                inability = error
            except ContractError as error:
                failed[repr(sequence)] = failure = error
                shortest = self.done
                deadline = min(deadline, time.monotonic() + _SHRINK_LIMIT_S)
                self._recover()
                raise

        # Hypothesis stores its constants there.
        set_hypothesis_home_dir(folder)
        try:
            run()
        except (ContractError, Flaky) as error:
            # A race does not fail in each run: then this is the last sequence that failed.
            flaky = " (it does not fail in each run)" if isinstance(error, Flaky) else ""
            steps_taken = "\n  ".join(shortest)
            raise ContractError(
                f"{failure.message}\n  the shortest sequence{flaky}:\n  {steps_taken}"
            ) from None
        finally:
            self.hcalls += self.judge.calls
        if inability is not None:
            raise inability

    def _recover(self) -> None:
        """Bring the machine back into a known state, or start a new one."""
        old = self.judge
        self.hcalls += old.calls
        try:
            for slot in old.model.dimms:
                old.bare.vm.syncs(slot).clear()
            old.bare.reset()
            self.judge = ScmJudge(old.bare, old.nvdimms)
            for slot, dimm in self.judge.model.dimms.items():
                (begun,) = old.bare.batch([Call(Hcall.H_SCM_FLUSH, (drc_index(slot), 0))])
                if begun.code == ReturnCode.H_LONG_BUSY_ORDER_10_MSEC:
                    dimm.last_token = begun.outputs[0]
            old.bare.reset()
        except Error:
            old.bare.close()
            self.judge = self._start()

    def run(self, sequence: Sequence[Any]) -> None:
        """Run one sequence; consecutive calls are made in one batch."""
        self._clean()
        self.done = []
        waiting: list[Request] = []
        for step in sequence:
            if isinstance(step, Make):
                call_request = self._request(step)
                if call_request is None:
                    continue
                waiting.append(call_request)
                self.done.append(str(call_request))
                # The arguments of a later step may depend on the token that this call returns.
                if step.call is not Hcall.H_SCM_FLUSH:
                    continue
            self.judge.make(*waiting)
            waiting = []
            if not isinstance(step, Make):
                self.control(step)
        self.judge.make(*waiting)
        for slot in FLUSHED:
            self.control(Control("release", slot))
        self.judge.poll_to_the_end()

    def _clean(self) -> None:
        """Bring the machine into its initial state: empty labels, no shim rules, no flushes."""
        judge = self.judge
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

    def _request(self, step: Make) -> Request | None:
        """Request with absolute numbers; None if too many flushes would hang, or a range wraps.

        Nor is a whole DIMM bound while it has flushes.
        """
        judge = self.judge

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
        # Only the next kernel binds it again: QEMU may forget the flushes of the one before.
        again = dimm is not None and dimm.outstanding and arguments[:2] == (0, dimm.blocks)
        if again and step.call is Hcall.H_SCM_BIND_MEM:
            return None
        held = dimm is not None and dimm.held and len(dimm.outstanding) >= MOST_HELD
        return None if held and step.call is Hcall.H_SCM_FLUSH else call_request

    def control(self, step: Any) -> None:
        """Apply an action to the machine and to the model."""
        judge = self.judge
        dimm, syncs = judge.model.dimms[step.slot], judge.bare.vm.syncs(step.slot)
        if step.verb in ("fail", "clear"):
            # The result of a flush in flight cannot be predicted.
            if dimm.held:
                return
            judge.poll_to_the_end(step.slot)
            dimm.failing = step.verb == "fail"
            syncs.fail(errno.EIO) if dimm.failing else syncs.clear()
        elif step.verb == "hold":
            judge.hold(step.slot)
        elif step.verb == "release":
            judge.release(step.slot)
        else:
            # QEMU waits for every flush before it resets.
            for slot in FLUSHED:
                self.control(Control("release", slot))
            judge.bare.reset()
            judge.model.reset()
        self.done.append(f"{step.verb} slot {step.slot}" if step.verb != "reset" else "reset")
