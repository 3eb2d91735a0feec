# SPDX-License-Identifier: GPL-2.0-or-later
"""Migration of a judged machine, whose flush state is compared with the model on the way."""

from __future__ import annotations

import errno
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

from paprscm.errors import ContractError
from paprscm.hcall.bare_metal import BareMachine
from paprscm.hcall.judge import ScmJudge, request
from paprscm.migration.stream import DimmState, FlushState, read_states
from paprscm.migration.transfer import SHARED, Way, load, migrate, save
from paprscm.papr import Hcall, drc_index
from paprscm.vm.machine import Nvdimm
from paprscm.vm.shim_layout import FLUSHES, Operation
from paprscm.vm.vm import Vm


@dataclass(frozen=True, kw_only=True)
class Handover:
    """One migration of a judged machine.

    Attributes:
        judge: the judge of the destination.
        states: its flush states, one per spapr-nvdimm.
        load_ns: start of the load, by time.monotonic_ns().
    """

    judge: ScmJudge
    states: list[DimmState]
    load_ns: int

    @property
    def pending(self) -> int:
        """Number of flushes that the destination syncs again."""
        return sum(len(state.pending) for state in self.states)

    @property
    def completed(self) -> int:
        """Number of flushes whose result was migrated."""
        return sum(len(state.completed) for state in self.states)

    def finish(self) -> list[str]:
        """Poll each flush to its end and once more; return the differences of compare_syncs().

        Raises:
            ContractError: an answer differs from the model's.
        """
        dimms = self.judge.model.dimms
        outstanding = {slot: sorted(dimm.outstanding) for slot, dimm in dimms.items()}
        self.judge.poll_to_the_end()
        self.judge.make(
            *(
                request(Hcall.H_SCM_FLUSH, drc_index(slot), token)
                for slot, tokens in outstanding.items()
                for token in tokens
            )
        )
        return self.compare_syncs()

    def compare_syncs(self) -> list[str]:
        """Differences between the destination's syncs and the flushes that it has to execute.

        One sync for each flush that was pending in the stream or that began since, of its own file,
        covering the whole DIMM, begun after the load. No flush may be outstanding.
        """
        judge = self.judge
        wrong = []
        for nvdimm, state in zip(spapr_dimms(judge), self.states, strict=True):
            dimm = judge.model.dimms[nvdimm.slot]
            if not dimm.flushes:
                continue
            syncs = judge.bare.vm.syncs(nvdimm.slot)
            operation = Operation.PMEM_PERSIST if nvdimm.pmem else Operation.FDATASYNC
            begun = syncs.counts(operation).begun
            expected = len(state.pending) + dimm.last_token - state.last_token
            # A QEMU may also write back a persistent DIMM when it has loaded its content.
            if begun < expected or (begun > expected and not nvdimm.pmem):
                wrong.append(f"slot {nvdimm.slot}: {begun} syncs for {expected} flushes")
            early = sum(record.begin_ns < self.load_ns for record in syncs.records())
            if early:
                wrong.append(f"slot {nvdimm.slot}: {early} syncs began before the load")
            if partial := syncs.partial(nvdimm.size_bytes):
                wrong.append(f"slot {nvdimm.slot}: {len(partial)} syncs omit a part of the DIMM")
        return wrong


def hold_flushes(vm: Vm, slot: int) -> None:
    """Hold the flushes of a DIMM at a destination from the start.

    Not msync: QEMU may write back the content of a DIMM before it reports the end of the migration
    (migration/ram.c, ram_load_cleanup), and would not end it.
    """
    calls = [one for one in FLUSHES if one is not Operation.MSYNC]
    vm.syncs(slot).hang(operations=calls)


def spapr_dimms(judge: ScmJudge) -> list[Nvdimm]:
    """The DIMMs with a section in the stream, in the order of their instances."""
    return [nvdimm for nvdimm in judge.nvdimms if nvdimm.device == "spapr-nvdimm"]


def hand_over(
    judge: ScmJudge,
    destination: BareMachine,
    way: Way = SHARED,
    *,
    held: Collection[int] = (),
    failing: Collection[int] = (),
) -> Handover:
    """Migrate a judged machine.

    The flush states in the stream must be those of the model: the same tokens, each pending or
    with its result, under the DRC index of its DIMM. The source stays stopped; call its go_on() to
    continue it.

    Args:
        judge: the judge of the source.
        destination: a machine that waits for it.
        way: the way of the migration.
        held: slots whose syncs are held on the destination from the start.
        failing: slots whose syncs fail there.

    Raises:
        ContractError: the states differ.
        LoadError: the destination refuses the stream, or ends.
    """
    for slot in held:
        hold_flushes(destination.vm, slot)
    for slot in failing:
        destination.vm.syncs(slot).fail(errno.EIO)
    stream = save_awake(judge.bare, way)
    load_ns = time.monotonic_ns()
    load(destination.vm, stream, way)
    return _follow(judge, destination, read_states(stream), load_ns, held, failing)


def hand_over_by(judge: ScmJudge, destination: BareMachine, way: Way) -> Handover:
    """Migrate a judged machine in a way that this process cannot see.

    Each of its outstanding flushes must be held or have ended; the destination holds them, too.

    Raises:
        as hand_over(); and RefusedError if a QEMU does not know this way.
    """
    for slot, dimm in judge.model.dimms.items():
        if dimm.held:
            hold_flushes(destination.vm, slot)

    def move() -> BareMachine:
        migrate(judge.bare.vm, destination.vm, way)
        return destination

    return hand_over_with(judge, move)


def hand_over_with(judge: ScmJudge, move: Callable[[], BareMachine]) -> Handover:
    """Migrate a judged machine with a function that returns the destination.

    Each of its outstanding flushes must be held or have ended; the destination holds them, too.

    Raises:
        ContractError: the machine does not continue.
    """
    judge.bare.keep_awake(True)
    held = [slot for slot, dimm in judge.model.dimms.items() if dimm.held]
    load_ns = time.monotonic_ns()
    destination = move()
    return _follow(judge, destination, predict_states(judge), load_ns, held, ())


def predict_states(judge: ScmJudge) -> list[DimmState]:
    """The states that the stream of a machine has to carry, if each unheld flush has ended."""
    states = []
    for instance, nvdimm in enumerate(spapr_dimms(judge)):
        dimm = judge.model.dimms[nvdimm.slot]
        flushes = {
            token: FlushState(token, 0 if flush.held else flush.end, nvdimm.drc)
            for token, flush in dimm.outstanding.items()
        }
        states.append(
            DimmState(
                section=0,
                instance=instance,
                flush_required=dimm.flushes,
                last_token=dimm.last_token,
                completed=tuple(f for t, f in flushes.items() if not dimm.outstanding[t].held),
                pending=tuple(f for t, f in flushes.items() if dimm.outstanding[t].held),
            )
        )
    return states


def _follow(
    judge: ScmJudge,
    destination: BareMachine,
    states: list[DimmState],
    load_ns: int,
    held: Collection[int],
    failing: Collection[int],
) -> Handover:
    """Compare the states with the model, and continue on the destination."""
    follower = judge.follow(destination)
    for nvdimm in spapr_dimms(judge):
        dimm = follower.model.dimms[nvdimm.slot]
        dimm.held, dimm.failing = nvdimm.slot in held, nvdimm.slot in failing
    if wrong := _compare(follower, states):
        raise ContractError("flush state in the migration stream: " + "; ".join(wrong))
    destination.adopt()
    return Handover(judge=follower, states=states, load_ns=load_ns)


def save_awake(bare: BareMachine, way: Way = SHARED) -> bytes:
    """Save a machine of hcalls, so that it can go on; raises as save()."""
    bare.keep_awake(True)
    stream = save(bare.vm, way)
    bare.remember()
    return stream


def _compare(judge: ScmJudge, states: list[DimmState]) -> list[str]:
    """Differences between the stream and the model; moves the model to the destination."""
    nvdimms = spapr_dimms(judge)
    if len(states) != len(nvdimms):
        return [f"{len(states)} sections for {len(nvdimms)} DIMMs"]
    wrong = []
    for nvdimm, state in zip(nvdimms, states, strict=True):
        dimm = judge.model.dimms[nvdimm.slot]
        found = (state.flush_required, state.last_token)
        if found != (dimm.flushes, dimm.last_token):
            wrong.append(
                f"slot {nvdimm.slot}: flush required and last token {found}, expected "
                f"{(dimm.flushes, dimm.last_token)}"
            )
        entries = (*state.completed, *state.pending)
        drcs = {flush.drc for flush in entries} - {nvdimm.drc}
        if drcs:
            wrong.append(f"slot {nvdimm.slot}: DRC indices {sorted(map(hex, drcs))}")
        doubles = [token for token, n in Counter(f.token for f in entries).items() if n > 1]
        if doubles:
            wrong.append(f"slot {nvdimm.slot}: tokens {doubles} occur twice")
        completed = {flush.token: flush.result for flush in state.completed}
        pending = [flush.token for flush in state.pending]
        differences = judge.model.migrate(nvdimm.slot, completed=completed, pending=pending)
        wrong += [f"slot {nvdimm.slot}: {text}" for text in differences]
    return wrong
