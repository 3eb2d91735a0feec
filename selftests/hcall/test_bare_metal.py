# SPDX-License-Identifier: GPL-2.0-or-later
"""A bare machine makes the requested hcalls, and returns their results."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from paprscm.emulator.binary import Qemu
from paprscm.errors import ConfigError, ContractError, GuestLostError, HostError, KilledError
from paprscm.hcall.bare_metal import FREE, BareMachine, compile_program
from paprscm.hcall.mailbox import MAX_CALLS, TIMEBASE_HZ, Answer, Call
from paprscm.host.cache import Cache
from paprscm.papr import BIND_ANY_ADDRESS, Hcall, Health, ReturnCode, drc_index
from paprscm.vm.machine import MIB, Machine, Nvdimm

UNKNOWN = Hcall.H_SCM_QUERY_BLOCK_MEM_BINDING
# Real mode calls of QEMU's spapr_hcall.c.
H_PAGE_INIT, H_ZERO_PAGE = 0x2C, 1 << (63 - 48)
ENDLESS = Call(UNKNOWN, (1, 2), times=1 << 62)

Start = Callable[..., BareMachine]


@pytest.fixture(scope="module")
def hcalls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_program(Cache(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def start(qemu: Qemu, hcalls: Path, tmp_path: Path) -> Iterator[Start]:
    """Start a machine that ends with the test."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    folders = (tmp_path / f"qemu{number}" for number in itertools.count())
    with ExitStack() as stack:

        def start_one(*nvdimms: Nvdimm, smp: int = 1, cpu: str = "POWER9") -> BareMachine:
            machine = Machine(memory_mib=256, smp=smp, cpu=cpu, nvdimms=nvdimms)
            return stack.enter_context(
                BareMachine(qemu, hcalls, machine, folder=next(folders), scratch_dir=scratch)
            )

        yield start_one
    assert list(scratch.iterdir()) == []


@pytest.fixture(scope="module")
def bare(
    qemu: Qemu, hcalls: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[BareMachine]:
    """A machine for tests that do not change it."""
    folder = tmp_path_factory.mktemp("bare")
    nvdimms = (Nvdimm(slot=0), Nvdimm(slot=1, unarmed=True))
    machine = Machine(memory_mib=256, smp=4, nvdimms=nvdimms)
    with BareMachine(qemu, hcalls, machine, folder=folder, scratch_dir=folder) as one:
        one.start_cpus(4)
        yield one


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def health(bare: BareMachine, slot: int) -> tuple[int, int, int]:
    answer = bare.call(Hcall.H_SCM_HEALTH, drc_index(slot))
    return answer.code, answer.outputs[0], answer.outputs[1]


def test_registers_go_in_and_come_out(bare: BareMachine) -> None:
    patterns = tuple(0x0123456789ABCDEF * factor & (1 << 64) - 1 for factor in range(1, 10))
    answer = bare.call(UNKNOWN, *patterns)
    assert (answer.code, answer.outputs) == (ReturnCode.H_FUNCTION, patterns)
    assert (answer.count, answer.busy) == (1, 0)
    assert 0 < answer.begin_ticks < answer.end_ticks
    # A missing argument is 0; a negative one is taken modulo 2^64.
    assert bare.call(UNKNOWN, -2).outputs == ((1 << 64) - 2, 0, 0, 0, 0, 0, 0, 0, 0)


def test_the_device_answers(bare: BareMachine) -> None:
    unarmed = Health.UNARMED
    assert health(bare, 0) == (ReturnCode.H_SUCCESS, 0, unarmed)
    assert health(bare, 1) == (ReturnCode.H_SUCCESS, unarmed, unarmed)
    assert bare.call(Hcall.H_SCM_HEALTH, drc_index(2)).code == ReturnCode.H_PARAMETER
    (address,) = (
        device["data"]["addr"]
        for device in bare.qmp.execute("query-memory-devices")
        if device["data"]["id"] == "nv1"
    )
    bound = bare.call(Hcall.H_SCM_BIND_MEM, drc_index(1), 0, 2, BIND_ANY_ADDRESS, 0)
    assert (bound.code, *bound.outputs[1:3]) == (ReturnCode.H_SUCCESS, address, 2)


def test_long_batches_are_answered_in_order(bare: BareMachine) -> None:
    count = 2 * MAX_CALLS + 7
    answers = bare.batch([Call(UNKNOWN, (number,)) for number in range(count)])
    assert [answer.outputs[0] for answer in answers] == list(range(count))
    assert all(
        a.begin_ticks <= a.end_ticks <= b.begin_ticks for a, b in itertools.pairwise(answers)
    )
    assert bare.batch([]) == []


def test_a_call_is_repeated(bare: BareMachine) -> None:
    once, often = bare.batch([Call(UNKNOWN), Call(UNKNOWN, (5,), times=2000)])
    assert (once.count, often.count, often.busy, often.outputs[0]) == (1, 2000, 0, 5)
    assert often.duration_s > once.duration_s
    # Each repetition begins a new flush.
    flush = Call(Hcall.H_SCM_FLUSH, (drc_index(0), 0), times=3)
    (answer,) = bare.batch([flush])
    assert (answer.code, answer.count, answer.busy) == (9901, 3, 3)


def test_a_poll_continues_with_the_token_until_the_end(bare: BareMachine) -> None:
    flush = (drc_index(0), 0)
    pause_us = 3000.0
    first, whole, other = bare.batch(
        [
            Call(Hcall.H_SCM_FLUSH, flush, times=1, poll=True),
            Call(Hcall.H_SCM_FLUSH, flush, times=1000, poll=True, pause_us=pause_us),
            Call(UNKNOWN, times=1000, poll=True),
        ]
    )
    assert (first.code, first.count, first.busy) == (9901, 1, 1)
    assert (whole.code, whole.busy) == (ReturnCode.H_SUCCESS, whole.count - 1)
    assert 2 <= whole.count < 1000
    assert whole.end_ticks - whole.begin_ticks >= whole.busy * pause_us * TIMEBASE_HZ / 1e6
    assert (other.code, other.count) == (ReturnCode.H_FUNCTION, 1)


def test_vcpus_work_concurrently(bare: BareMachine) -> None:
    work = {cpu: [Call(UNKNOWN, (cpu,), times=300_000)] for cpu in range(4)}
    answers = {cpu: found[0] for cpu, found in bare.together(work).items()}
    assert {cpu: answer.outputs[0] for cpu, answer in answers.items()} == {n: n for n in range(4)}
    assert max(a.begin_ticks for a in answers.values()) < min(a.end_ticks for a in answers.values())


def test_a_long_batch_does_not_wait_for_another_vcpu(bare: BareMachine) -> None:
    slow = [Call(UNKNOWN, times=1_000_000)]
    answers = bare.together({0: slow, 1: [Call(UNKNOWN)] * (MAX_CALLS + 1)})
    assert answers[1][-1].end_ticks < answers[0][0].end_ticks


def test_the_gate_holds_until_it_is_opened(bare: BareMachine) -> None:
    box = bare._boxes[2]
    box.begin([Call(UNKNOWN, (1,))], gate=1 << 40)
    wait_until(lambda: box.is_at_gate)
    time.sleep(0.02)
    assert not box.advance()
    bare._boxes[0].open_gate(1 << 40)
    assert [answer.outputs[0] for answer in bare.finish(2)] == [1]


def test_an_idle_machine_wakes_up(bare: BareMachine) -> None:
    for pause_s in (0.0002, 0.002, 0.02, 0.2):
        time.sleep(pause_s)
        assert all(bare.batch([Call(UNKNOWN, (7,))], cpu=cpu)[0].outputs[0] == 7 for cpu in (0, 3))


def test_wrong_arguments(bare: BareMachine) -> None:
    for wrong in (
        lambda: Call(1 << 64),
        lambda: Call(UNKNOWN, tuple(range(10))),
        lambda: Call(UNKNOWN, (1 << 64,)),
        lambda: Call(UNKNOWN, (-(1 << 63) - 1,)),
        lambda: Call(UNKNOWN, times=0),
        lambda: Call(UNKNOWN, pause_us=-1),
        lambda: bare.batch([Call(UNKNOWN)], cpu=4),
        lambda: bare.start_cpus(5),
        lambda: bare.finish(),
        lambda: bare.in_progress(),
        lambda: bare.together({0: [Call(UNKNOWN)], 1: []}),
        lambda: bare.read(256 * MIB - 1, 2),
        lambda: bare.write(-1, b"x"),
    ):
        with pytest.raises(ValueError):
            wrong()
    assert bare.call(UNKNOWN, 3).outputs[0] == 3


@pytest.mark.parametrize("cpu", ["POWER8", "POWER9", "POWER10"])
def test_processors(start: Start, qemu: Qemu, cpu: str) -> None:
    if cpu.lower() not in {model.lower() for model in qemu.cpu_models}:
        pytest.skip(f"this QEMU has no {cpu}")
    bare = start(Nvdimm(), smp=2, cpu=cpu)
    bare.start_cpus(2)
    time.sleep(0.01)
    assert bare.together({n: [Call(UNKNOWN, (n,))] for n in range(2)})[1][0].outputs[0] == 1
    assert health(bare, 0)[0] == ReturnCode.H_SUCCESS
    assert 0 < bare.ready_s < bare.first_answer_s


def test_a_dimm_is_plugged(start: Start) -> None:
    bare = start()
    assert health(bare, 3)[0] == ReturnCode.H_PARAMETER
    bare.plug(Nvdimm(slot=3))
    # The program has not enabled the interrupt that the hotplug sends.
    time.sleep(0.02)
    assert health(bare, 3)[0] == ReturnCode.H_SUCCESS
    assert bare.file(3).stat().st_size == Nvdimm().file_bytes


def test_a_reset_ends_calls_in_progress(start: Start) -> None:
    bare = start(Nvdimm(), smp=2)
    bare.start_cpus(2)
    bare.write(FREE.start, b"stays")
    bare.start([ENDLESS])
    bare.start([ENDLESS], cpu=1)
    bare.reset()
    assert bare.call(UNKNOWN, 4).outputs[0] == 4
    assert bare.read(FREE.start, 5) == b"stays"
    with pytest.raises(ValueError, match="vCPU 1 does not run"):
        bare.batch([Call(UNKNOWN)], cpu=1)
    bare.start_cpus(2)
    generation = bare._boxes[1].generation
    bare.start_cpus(2)
    assert bare._boxes[1].generation == generation
    assert bare.batch([Call(UNKNOWN, (5,))], cpu=1)[0].outputs[0] == 5


def test_the_call_that_killed_qemu_is_named(start: Start) -> None:
    bare = start(Nvdimm(), smp=2)
    bare.start_cpus(2)
    bare.start([Call(Hcall.H_SCM_HEALTH, (drc_index(0),)), ENDLESS])
    bare.start([Call(UNKNOWN), Call(0x7FF, (9,), times=1 << 62)], cpu=1)
    wait_until(lambda: bare.in_progress(0) == bare.in_progress(1) == 1)
    os.kill(bare.process.pid, signal.SIGSEGV)
    message = (
        r"QEMU ended, killed by SIGSEGV, while it executed "
        r"H_SCM_QUERY_BLOCK_MEM_BINDING\(0x1, 0x2\) on vCPU 0 and "
        r"hypervisor call 0x7ff \(0x9\) on vCPU 1; it said"
    )
    with pytest.raises(GuestLostError, match=message):
        bare.finish()
    with pytest.raises(GuestLostError, match=message):
        bare.call(UNKNOWN)


def test_the_death_of_an_idle_qemu_is_detected(start: Start) -> None:
    bare = start()
    assert bare.call(UNKNOWN).code == ReturnCode.H_FUNCTION
    os.kill(bare.process.pid, signal.SIGSEGV)
    bare.process.wait(10)
    with pytest.raises(GuestLostError, match="SIGSEGV, while it had no call to execute; it said"):
        bare.call(UNKNOWN)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGKILL, "was killed by SIGKILL from outside: the OOM killer's count "),
        (signal.SIGTERM, "was ended from outside by signal 15 from pid {pid} "),
    ],
)
def test_a_qemu_ended_from_outside_is_not_a_failure(
    qemu: Qemu, hcalls: Path, tmp_path: Path, number: int, said: str
) -> None:
    """In a call it is a KilledError, also for a caller that handles GuestLostError."""
    said = said.format(pid=os.getpid())
    machine = Machine(memory_mib=256, smp=1)
    began = BareMachine(qemu, hcalls, machine, folder=tmp_path / "qemu", scratch_dir=tmp_path)
    with pytest.raises(KilledError, match=said), began as bare:
        os.kill(bare.process.pid, number)
        with pytest.raises(KilledError, match=said):
            bare.batch([ENDLESS])
        with pytest.raises(GuestLostError):
            bare.qmp.execute("query-status")


def test_a_call_that_does_not_return_is_named(start: Start) -> None:
    bare = start()
    with pytest.raises(ContractError, match=r"MEM_BINDING\(0x1, 0x2\) on vCPU 0, call 2 of 3"):
        bare.batch([Call(UNKNOWN), ENDLESS, Call(UNKNOWN)], timeout_s=0.1)
    with pytest.raises(ValueError, match="vCPU 0 has a batch already"):
        bare.call(UNKNOWN)


def test_a_vcpu_reads_memory(start: Start) -> None:
    bare = start()
    bare.write(FREE.start, bytes(range(8)))
    read = Call(0, (FREE.start,), reads=True)
    assert str(read) == f"read of {FREE.start:#x}"
    (answer,) = bare.batch([read])
    assert (answer.code, answer.outputs[0]) == (0, 0x0001020304050607)


def test_an_exception_in_the_machine_is_our_fault(start: Start) -> None:
    bare = start()
    # QEMU itself clears the program's page, so that it notices the changed code.
    page = bare._boxes[0].entry & ~0xFFF
    message = (
        rf"vCPU 0 took exception 0x700 \(SRR0 0x{page >> 12:x}[0-9a-f]{{3}}, "
        r".* hypervisor call 0x2c"
    )
    with pytest.raises(HostError, match=message):
        bare.call(H_PAGE_INIT, H_ZERO_PAGE, page)


def test_two_machines_have_nothing_in_common(start: Start) -> None:
    one, other = start(), start(Nvdimm())
    one.write(FREE.start, b"one")
    assert other.read(FREE.start, 3) == bytes(3)
    one.start([ENDLESS])
    assert health(other, 0)[0] == ReturnCode.H_SUCCESS


def test_nothing_is_left(start: Start, qemu: Qemu, hcalls: Path, tmp_path: Path) -> None:
    def resources() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text()
        return len([*Path("/proc/self/fd").iterdir()]), maps.count("paprscm-memory")

    before = resources()
    machine = Machine(memory_mib=256, smp=1)
    with BareMachine(qemu, hcalls, machine, folder=tmp_path / "q", scratch_dir=tmp_path) as bare:
        pid = bare.process.pid
        assert resources() != before
    assert resources() == before
    assert not Path(f"/proc/{pid}").exists()


def test_a_machine_on_which_the_program_cannot_run(qemu: Qemu, tmp_path: Path) -> None:
    for machine, message in (
        (Machine(memory_mib=128), "128 MiB are not enough"),
        (Machine(memory_mib=256, smp=33), "33 vCPUs are too many"),
    ):
        with pytest.raises(ConfigError, match=message):
            BareMachine(qemu, tmp_path / "none", machine, folder=tmp_path, scratch_dir=tmp_path)


def test_a_program_that_does_not_start(
    qemu: Qemu, hcalls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paprscm.hcall.bare_metal._START_LIMIT_S", 0.5)
    broken = tmp_path / "broken"
    data = bytearray(hcalls.read_bytes())
    # `li r3, 0` at the beginning becomes a branch to itself.
    place = data.index(bytes.fromhex("38600000 38800001"))
    data[place : place + 4] = bytes.fromhex("48000000")
    broken.write_bytes(data)
    machine = Machine(memory_mib=256, smp=1)
    with (
        pytest.raises(HostError, match="broken does not start on vCPU 0: nothing happens"),
        BareMachine(qemu, broken, machine, folder=tmp_path / "q", scratch_dir=tmp_path),
    ):
        pass


def test_the_program_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path)
    built = compile_program(cache)
    when = built.stat().st_mtime_ns
    assert compile_program(cache) == built
    assert built.stat().st_mtime_ns == when
    monkeypatch.setenv("PATH", "")
    with pytest.raises(HostError, match="gcc-powerpc64le-linux-gnu"):
        compile_program(cache)


def test_calls_and_answers_as_text() -> None:
    unbind = Call(Hcall.H_SCM_UNBIND_MEM, (drc_index(0), -1 << 28, 2, 0))
    assert str(unbind) == "H_SCM_UNBIND_MEM(0x90000000, 0xfffffffff0000000, 0x2, 0x0)"
    answer = Answer(
        -4, (0, 0x10, *[0] * 7), count=3, busy=0, begin_ticks=0, end_ticks=TIMEBASE_HZ // 2
    )
    assert str(answer) == "H_PARAMETER, 0x0, 0x10 (call 3)"
    assert answer.duration_s == 0.5
