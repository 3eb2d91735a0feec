# SPDX-License-Identifier: GPL-2.0-or-later
"""Check hcall results of a bare-metal machine against the model."""

from __future__ import annotations

import copy
import itertools
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from paprscm.errors import ConfigError, ContractError
from paprscm.hcall.bare_metal import BareMachine
from paprscm.hcall.mailbox import Answer, Call
from paprscm.hcall.model import (
    BRANCHES,
    Branch,
    Expected,
    ModelDimm,
    ScmModel,
    describe_answer,
)
from paprscm.papr import SCM_BLOCK_SIZE, Hcall, ReturnCode, drc_index
from paprscm.results.record import Test
from paprscm.vm.machine import Nvdimm


class Request(NamedTuple):
    """One call to make: opcode, and arguments from r4 on."""

    call: Hcall
    arguments: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.call.name}({', '.join(map(_number, self.arguments))})"


def request(call: Hcall, *arguments: int) -> Request:
    """One call to make."""
    return Request(call, arguments)


def unbind_wraps(unbind: Request) -> bool:
    """Return True if the range of this H_SCM_UNBIND_MEM ends beyond 2^64, which aborts QEMU.

    See known_issues/qemu-unbind-mem-aborts.md.
    """
    _drc, start, count, token = (word % (1 << 64) for word in unbind.arguments)
    size = count * SCM_BLOCK_SIZE
    aligned = start % SCM_BLOCK_SIZE == 0
    return not token and aligned and 0 < size < 1 << 64 and start + size > 1 << 64


def known_bug(allowed: Sequence[Expected]) -> tuple[str, Expected] | None:
    """Return the known issue of a call and the answer of a QEMU with it; None: no known issue.

    Args:
        allowed: the answers allowed by the model.
    """
    right = allowed[0]
    if right.branch == (Hcall.H_SCM_READ_METADATA, ReturnCode.H_SUCCESS, "4 bytes"):
        value, *rest = right.outputs
        if value >= 1 << 31:
            extended = value | 0xFFFFFFFF << 32
            wrong = Expected(right.code, (extended, *rest), right.branch)
            return "qemu-read-metadata-sign-extends", wrong
    return None


_WAITS = "qemu-thread-pool-waits-for-hung-request"


class ScmJudge:
    """Makes calls on a machine, and compares each answer with the model's.

    Args:
        bare: the machine, before its first call.
        nvdimms: its DIMMs.

    Attributes:
        bare: the machine.
        nvdimms: its DIMMs.
        model: the model of the machine.
        calls: number of judged calls.
        known_wrong: first answer according to each known issue, by its name. Such an answer does
            not fail here: the test of the issue reports it once.
    """

    def __init__(self, bare: BareMachine, nvdimms: Iterable[Nvdimm]) -> None:
        self.bare = bare
        self.nvdimms = tuple(nvdimms)
        self.calls = 0
        self.known_wrong: dict[str, str] = {}
        self.model = ScmModel(_dimms(bare, self.nvdimms))

    def follow(self, destination: BareMachine) -> ScmJudge:
        """Return a judge of the machine that this one has migrated to; this judge stays valid."""
        judge = copy.copy(self)
        judge.bare, judge.model = destination, copy.deepcopy(self.model)
        return judge

    def make(self, *requests: Request) -> list[Answer]:
        """Make the calls in one batch, judge each answer, and return the answers.

        Raises:
            ContractError: answers differ from the contract; with the first ten.
            GuestLostError: QEMU ended during a call.
        """
        calls = [Call(one.call, one.arguments) for one in requests]
        answers = self.bare.batch(calls)
        self.judge(requests, answers)
        return answers

    def judge(self, requests: Sequence[Request], answers: Sequence[Answer]) -> None:
        """Compare answers, in their order, with the model's.

        Raises:
            ContractError: as for `make()`.
        """
        wrong = []
        for one, answer in zip(requests, answers, strict=True):
            self.calls += 1
            allowed = self.model.allowed(one.call, one.arguments)
            matching = [e for e in allowed if (e.code, e.outputs) == (answer.code, answer.outputs)]
            text = f"{one} {describe_answer(answer.code, answer.outputs, allowed)}"
            bug = known_bug(allowed)
            if matching:
                self.model.observe(matching[0], one.arguments)
            elif bug and (bug[1].code, bug[1].outputs) == (answer.code, answer.outputs):
                self.known_wrong.setdefault(bug[0], text)
                self.model.observe(bug[1], one.arguments)
            else:
                wrong.append(text)
        if wrong:
            more = f"\n  … and {len(wrong) - 10} more" if len(wrong) > 10 else ""
            raise ContractError(
                f"{len(wrong)} of {len(requests)} calls have wrong answers:\n  "
                + "\n  ".join(wrong[:10])
                + more
            )

    def hold(self, *slots: int) -> None:
        """Hold the syncs of these DIMMs that begin from now on; requires a shim."""
        for slot in slots:
            self.bare.vm.syncs(slot).hang()
            self.model.dimms[slot].held = True

    def release(self, *slots: int) -> None:
        """Release the syncs of these DIMMs."""
        for slot in slots:
            self.bare.vm.syncs(slot).release()
            self.model.release(slot)

    def wait_completed(self, slot: int, count: int, limit_s: float = 60.0) -> None:
        """Wait until `count` syncs of a DIMM have ended, and QEMU has taken note of it.

        A worker thread reports the end of a sync to QEMU's main loop shortly after the shim has
        counted it; then it sleeps or ends.

        Raises:
            ContractError: they have not ended in time.
        """
        syncs, tasks = self.bare.vm.syncs(slot), Path(f"/proc/{self.bare.process.pid}/task")
        syncs.wait_ended(count, limit_s)
        deadline = time.monotonic() + limit_s
        for thread in {record.thread for record in syncs.records()}:
            while _runs(tasks / str(thread)) and time.monotonic() < deadline:
                # A thread that falls asleep causes no event.
                time.sleep(0.001)
        # The main loop has run once when it answers.
        self.bare.qmp.execute("query-status")

    def poll_to_the_end(self, *slots: int, limit: int = 100_000) -> None:
        """Poll every outstanding flush of these DIMMs until it ends.

        While a flush of another DIMM is held, one may wait behind it in QEMU's queue, which is a
        known issue. The next flush of the DIMM starts a thread, and ends that.

        Args:
            slots: slots of the DIMMs; none: all DIMMs.
            limit: maximum number of polls of one flush, 100 µs apart.
        """
        for slot in slots or self.model.dimms:
            if not (busy := self._poll(slot, limit)):
                continue
            others = [dimm for dimm in self.model.dimms.values() if dimm.slot != slot]
            if not any(dimm.held and dimm.outstanding for dimm in others):
                raise ContractError(f"{busy[0]} has not ended after {limit} polls")
            self.known_wrong.setdefault(_WAITS, f"{busy[0]} waits for a held flush")
            self.make(Request(Hcall.H_SCM_FLUSH, (drc_index(slot), 0)))
            if busy := self._poll(slot, limit):
                raise ContractError(
                    f"{busy[0]} has not ended after {limit} polls, and {limit} more"
                )

    def _poll(self, slot: int, limit: int) -> list[Request]:
        """Poll the outstanding flushes of a DIMM; return those that have not ended."""
        tokens = sorted(self.model.dimms[slot].outstanding)
        polls = [
            Call(Hcall.H_SCM_FLUSH, (drc_index(slot), token), limit, True, 100) for token in tokens
        ]
        answers = self.bare.batch(polls, timeout_s=60)
        requests = [Request(Hcall.H_SCM_FLUSH, poll.args) for poll in polls]
        self.model.covered[_GOES_ON] += sum(answer.busy for answer in answers)
        self.judge(requests, answers)
        busy = ReturnCode.H_LONG_BUSY_ORDER_10_MSEC
        return [one for one, answer in zip(requests, answers, strict=True) if answer.code == busy]

    def missing(self, calls: Iterable[Hcall], *, without: Iterable[str] = ()) -> set[str]:
        """Names of the branches of these calls that were not taken yet.

        Args:
            calls: the calls.
            without: reasons of branches that are impossible on this machine.
        """
        selected, impossible = set(calls), set(without)
        return {
            _branch_name(branch)
            for branch in BRANCHES - set(self.model.covered)
            if branch[0] in selected and branch[2] not in impossible
        }


_GOES_ON: Branch = next(
    branch for branch in BRANCHES if branch[0] is Hcall.H_SCM_FLUSH and branch[2] == "goes on"
)


def _branch_name(branch: Branch) -> str:
    call, code, reason = branch
    return f"{call.name} {code.name} ({reason})"


def counts_by_name(covered: Counter[Branch]) -> dict[str, int]:
    """Number of times each branch was taken, by name."""
    return {_branch_name(branch): covered[branch] for branch in sorted(BRANCHES)}


def count_branches(tests: Iterable[Test]) -> Counter[Branch]:
    """Number of times each branch was taken, summed over the tests of a job.

    Raises:
        ConfigError: no test has recorded its branches.
    """
    names = {_branch_name(branch): branch for branch in BRANCHES}
    total: Counter[Branch] = Counter()
    counts = [test.facts["branches"] for test in tests if "branches" in test.facts]
    if not counts:
        raise ConfigError(
            "no test of this job has recorded branches", hint="avocado run -t hcall tests/"
        )
    for name, count in itertools.chain.from_iterable(each.items() for each in counts):
        total[names[name]] += count
    return total


def branch_table(covered: Counter[Branch]) -> Table:
    """The branches by call and return code, for a terminal."""
    count = sum(1 for branch in BRANCHES if covered[branch])
    title = f"{count} of {len(BRANCHES)} branches taken"
    table = Table(title=title, title_justify="left", box=None)
    for name in ("answer", "because", "times"):
        table.add_column(name, justify="right" if name == "times" else "left", no_wrap=True)
    for call, branches in itertools.groupby(sorted(BRANCHES), key=lambda branch: branch[0]):
        table.add_row(call.name, style="bold")
        for branch in branches:
            _call, code, reason = branch
            table.add_row(
                f"  {code.name}", reason, f"{covered[branch]:,}" if covered[branch] else "-"
            )
    return table


def _dimms(bare: BareMachine, nvdimms: Iterable[Nvdimm]) -> list[ModelDimm]:
    """The model of each DIMM; its address comes from QEMU's monitor."""
    devices = bare.qmp.execute("query-memory-devices")
    addresses = {device["data"]["slot"]: int(device["data"]["addr"]) for device in devices}
    models = []
    for nvdimm in nvdimms:
        with bare.file(nvdimm.slot).open("rb") as file:
            file.seek(nvdimm.size_bytes)
            label = bytearray(file.read(nvdimm.label_bytes))
        models.append(
            ModelDimm(
                slot=nvdimm.slot,
                address=addresses[nvdimm.slot],
                size_bytes=nvdimm.size_bytes,
                label=label,
                spapr=nvdimm.device == "spapr-nvdimm",
                flushes=not nvdimm.pmem or nvdimm.pmem_override,
                unarmed=nvdimm.unarmed,
            )
        )
    return models


def _runs(task: Path) -> bool:
    """Return True if a thread (/proc/PID/task/TID) exists and does not sleep."""
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0] != "S"
    except OSError:
        return False


def _number(value: int) -> str:
    return str(value) if 0 <= value < 10 else f"{value % (1 << 64):#x}"
