# SPDX-License-Identifier: GPL-2.0-or-later
"""State and batches of a bare machine at another QEMU."""

import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from paprscm.emulator.binary import Qemu
from paprscm.emulator.qmp import RefusedError
from paprscm.errors import CapabilityError, ContractError
from paprscm.hcall.bare_metal import FREE, BareMachine, compile_program
from paprscm.hcall.mailbox import Call
from paprscm.host.cache import Cache
from paprscm.migration import transfer
from paprscm.migration.handover import save_awake
from paprscm.migration.stream import read_states
from paprscm.migration.transfer import COPIED, SHARED, LoadError, Way, load, migrate, saving
from paprscm.papr import Hcall, ReturnCode, drc_index
from paprscm.vm.dimms import PMEM_OFF, SMALL
from paprscm.vm.machine import Machine
from paprscm.vm.vm import Vm

FLUSH, DRC = Hcall.H_SCM_FLUSH, drc_index(0)
UNKNOWN = Hcall.H_SCM_QUERY_BLOCK_MEM_BINDING

Start = Callable[..., BareMachine]


@pytest.fixture(scope="module")
def hcalls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_program(Cache(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def start(qemu: Qemu, hcalls: Path, tmp_path: Path) -> Iterator[Start]:
    """Start a machine with one DIMM, whose file a destination shares."""
    folders = (tmp_path / f"qemu{number}" for number in itertools.count())
    with ExitStack() as stack:

        def start_one(source: BareMachine | None = None, *, shares: bool = True) -> BareMachine:
            dimm = PMEM_OFF.at(0, SMALL)
            if source is not None and shares:
                dimm = replace(dimm, file=source.file(0))
            machine = Machine(memory_mib=256, smp=1, nvdimms=(dimm,))
            return stack.enter_context(
                BareMachine(
                    qemu,
                    hcalls,
                    machine,
                    folder=next(folders),
                    scratch_dir=tmp_path,
                    source=source,
                    shares_memory=shares,
                )
            )

        yield start_one


def test_a_destination_goes_on(start: Start) -> None:
    source = start()
    assert source.call(FLUSH, DRC).outputs[0] == 1
    stream = save_awake(source)
    (state,) = read_states(stream)
    assert (state.last_token, state.flush_required) == (1, True)
    destination = start(source)
    load(destination.vm, stream)
    destination.adopt()
    assert destination.call(FLUSH, DRC).outputs[0] == 2
    # A vCPU that sleeps wakes up: a poll pauses between two calls.
    (ended,) = destination.batch([Call(FLUSH, (DRC, 2), 100_000, True, 100)])
    assert ended.code == ReturnCode.H_SUCCESS


def test_a_qemu_that_waits_for_its_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is CANCEL; a QEMU that is slow although no sync hangs goes on, and a failure stays one."""
    released = threading.Event()

    def release() -> list[int]:
        released.set()
        return slots

    monkeypatch.setattr(transfer, "_PATIENCE_S", 0.01)
    qmp = SimpleNamespace(answers=lambda _limit_s: False)
    vm = cast("Vm", SimpleNamespace(qmp=qmp, release_syncs=release))
    slots = [3]
    with pytest.raises(CapabilityError, match="syncs of slots 3 did not hang"), saving(vm):
        assert released.wait(10)
    slots = []
    with saving(vm):
        assert released.wait(10)
    slots = [3]
    with pytest.raises(ContractError, match="no space"), saving(vm):
        assert released.wait(10)
        raise ContractError("no space")


def test_a_slow_qemu_that_answers_keeps_its_hanging_syncs(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_PATIENCE_S", 0.01)
    source, queries = start(), threading.Semaphore(0)
    real = source.qmp.answers

    def answers(limit_s: float) -> bool:
        queries.release()
        return real(limit_s)

    monkeypatch.setattr(source.qmp, "answers", answers)
    monkeypatch.setattr(source.vm, "release_syncs", lambda: [0])
    with saving(source.vm):
        assert all(queries.acquire(timeout=10) for _ in range(3))


def test_a_stopped_qemu_does_not_answer(start: Start) -> None:
    source = start()
    source.process.send_signal(signal.SIGSTOP)
    assert not source.qmp.answers(0.1)
    source.process.send_signal(signal.SIGCONT)
    assert source.qmp.answers(10)


def test_memory_is_copied(start: Start) -> None:
    source = start()
    source.write(FREE.start, b"content of the memory")
    with source.file(0).open("r+b") as file:
        file.write(b"content of the DIMM")
    destination = start(source, shares=False)
    assert destination.read(FREE.start, 7) == bytes(7)
    load(destination.vm, save_awake(source, COPIED), COPIED)
    destination.adopt()
    assert destination.read(FREE.start, 21) == b"content of the memory"
    assert destination.file(0).read_bytes()[:19] == b"content of the DIMM"


def test_a_batch_goes_on_at_the_destination(start: Start) -> None:
    source = start()
    source.start([Call(UNKNOWN, (1,), times=1 << 40), Call(UNKNOWN, (2,))])
    stream = save_awake(source)
    destination = start(source)
    load(destination.vm, stream)
    destination.adopt()
    assert destination.in_progress() == 0
    with pytest.raises(ContractError, match="did not return in time"):
        destination.finish(timeout_s=0.2)
    with pytest.raises(ValueError, match="has a batch already"):
        destination.call(UNKNOWN)


def test_a_source_does_not_make_the_calls_of_its_destination(start: Start) -> None:
    source = start()
    stream = save_awake(source)
    destination = start(source)
    load(destination.vm, stream)
    destination.adopt()
    assert [destination.call(FLUSH, DRC).outputs[0] for _ in range(3)] == [1, 2, 3]
    destination.start([Call(UNKNOWN, (1,), times=1 << 40)])
    destination.close()
    source.go_on()
    assert source.call(FLUSH, DRC).outputs[0] == 1


def test_a_stream_that_is_refused(start: Start) -> None:
    source = start()
    stream = save_awake(source)
    for bad in (b"no stream of QEMU", stream[: len(stream) // 2]):
        destination = start(source)
        with pytest.raises(LoadError, match="does not load the stream") as caught:
            load(destination.vm, bad)
        assert caught.value.is_refusal
        assert "load of migration failed" in caught.value.text or "Not a migration" in str(
            caught.value
        )
        destination.close()
    source.go_on()
    assert source.call(FLUSH, DRC).outputs[0] == 1


def test_a_way_sets_its_own_capabilities_only(start: Start) -> None:
    vm = start().vm

    def enabled() -> set[str]:
        states = vm.qmp.execute("query-migrate-capabilities")
        return {item["capability"] for item in states if item["state"]}

    Way(name="some", capabilities=("xbzrle", "auto-converge")).prepare(vm)
    assert enabled() == {"events", "x-ignore-shared", "xbzrle", "auto-converge"}
    SHARED.prepare(vm)
    assert enabled() == {"events", "x-ignore-shared"}
    COPIED.prepare(vm)
    assert enabled() == {"events"}


def test_an_unknown_way(start: Start) -> None:
    source = start()
    destination = start(source)
    with pytest.raises(RefusedError):
        migrate(source.vm, destination.vm, Way(name="no", scheme="unix", capabilities=("no",)))
    assert source.call(FLUSH, DRC).outputs[0] == 1


@pytest.mark.parametrize("scheme", ["unix", "exec"])
def test_schemes(start: Start, scheme: str) -> None:
    source = start()
    source.call(FLUSH, DRC)
    destination = start(source)
    source.keep_awake(True)
    assert migrate(source.vm, destination.vm, Way(name=scheme, scheme=scheme)) is None
    destination.adopt()
    assert destination.call(FLUSH, DRC).outputs[0] == 2
