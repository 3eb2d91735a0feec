# SPDX-License-Identifier: GPL-2.0-or-later
"""Check hcall results of a bare-metal machine against the model."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from paprscm.device.bare_metal import BareMachine
from paprscm.device.hcall_model import (
    BRANCHES,
    Branch,
    Expected,
    ModelDimm,
    ScmModel,
    describe_answer,
)
from paprscm.device.mailbox import Answer, Call
from paprscm.errors import ConfigError, ContractError
from paprscm.papr import SCM_BLOCK_SIZE, Hcall, ReturnCode, drc_index
from paprscm.vm.machine import Nvdimm


class Request(NamedTuple):
    """One call to make: which, and its arguments from r4 on."""

    call: Hcall
    arguments: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.call.name}({', '.join(map(_number, self.arguments))})"


def request(call: Hcall, *arguments: int) -> Request:
    """One call to make."""
    return Request(call, arguments)


def unbind_wraps(made: Request) -> bool:
    """Return True if this H_SCM_UNBIND_MEM ends beyond 2^64, which aborts QEMU.

    See known_issues/qemu-unbind-mem-aborts.md.
    """
    _drc, start, count, token = (word % (1 << 64) for word in made.arguments)
    size = count * SCM_BLOCK_SIZE
    aligned = start % SCM_BLOCK_SIZE == 0
    return not token and aligned and 0 < size < 1 << 64 and start + size > 1 << 64


def known_bug(allowed: Sequence[Expected]) -> tuple[str, Expected] | None:
    """Return the name of a known issue and the answer of a QEMU with it; None: it answers rightly.

    Args:
        allowed: the answers that the model allows.
    """
    right = allowed[0]
    if right.branch == (Hcall.H_SCM_READ_METADATA, ReturnCode.H_SUCCESS, "4 bytes"):
        value, *rest = right.outputs
        if value >= 1 << 31:
            extended = value | 0xFFFFFFFF << 32
            wrong = Expected(right.code, (extended, *rest), right.branch)
            return "qemu-read-metadata-sign-extends", wrong
    return None


class ScmJudge:
    """Makes calls on a machine, and compares each answer with the model's.

    Args:
        bare: the machine; nothing was called there yet.
        nvdimms: its DIMMs.

    Attributes:
        model: what the machine must be like.
        calls: how many were judged.
        known_wrong: what was answered as a known bug answers, by the known issue's name; the first
            example of each. It does not fail: the test of that issue reports it once.
    """

    def __init__(self, bare: BareMachine, nvdimms: Iterable[Nvdimm]) -> None:
        self.bare = bare
        self.calls = 0
        self.known_wrong: dict[str, str] = {}
        self.model = ScmModel(_dimms(bare, nvdimms))

    def make(self, *requests: Request) -> list[Answer]:
        """Make the calls in one go and judge each; their answers.

        Raises:
            ContractError: answers differ from the contract; names the first ten.
            GuestLostError: QEMU ended during a call.
        """
        calls = [Call(made.call, made.arguments) for made in requests]
        answers = self.bare.batch(calls)
        self.judge(requests, answers)
        return answers

    def judge(self, requests: Sequence[Request], answers: Sequence[Answer]) -> None:
        """Compare answers, in the order in which they were given, with the model's.

        Raises:
            ContractError: as for `make()`.
        """
        wrong = []
        for made, answer in zip(requests, answers, strict=True):
            self.calls += 1
            wanted = self.model.allowed(made.call, made.arguments)
            found = [e for e in wanted if (e.code, e.outputs) == (answer.code, answer.outputs)]
            text = f"{made} {describe_answer(answer.code, answer.outputs, wanted)}"
            known = known_bug(wanted)
            if found:
                self.model.observe(found[0], made.arguments)
            elif known and (known[1].code, known[1].outputs) == (answer.code, answer.outputs):
                self.known_wrong.setdefault(known[0], text)
                self.model.observe(known[1], made.arguments)
            else:
                wrong.append(text)
        if wrong:
            more = f"\n  … and {len(wrong) - 10} more" if len(wrong) > 10 else ""
            raise ContractError(
                f"{len(wrong)} of {len(requests)} calls are not answered as they must be:\n  "
                + "\n  ".join(wrong[:10])
                + more
            )

    def poll_to_the_end(self, *slots: int, limit: int = 100_000) -> None:
        """Poll every outstanding flush of these DIMMs until its end is reported.

        Args:
            slots: all DIMMs if none is given.
            limit: how often one flush is polled, 100 µs apart, before it counts as endless.
        """
        for slot, dimm in self.model.dimms.items():
            if slots and slot not in slots:
                continue
            tokens = sorted(dimm.outstanding)
            polls = [
                Call(Hcall.H_SCM_FLUSH, (drc_index(slot), token), limit, True, 100)
                for token in tokens
            ]
            answers = self.bare.batch(polls, timeout_s=60)
            requests = [Request(Hcall.H_SCM_FLUSH, poll.args) for poll in polls]
            for made, answer in zip(requests, answers, strict=True):
                self.model.covered[_GOES_ON] += answer.busy
                if answer.code == ReturnCode.H_LONG_BUSY_ORDER_10_MSEC:
                    raise ContractError(f"{made} has not ended after {answer.made} polls")
            self.judge(requests, answers)

    def missing(self, calls: Iterable[Hcall], *, without: Iterable[str] = ()) -> set[str]:
        """The branches of these calls that were not taken yet, in words.

        Args:
            calls: which calls to look at.
            without: reasons of branches that cannot be taken on this machine.
        """
        looked_at, left_out = set(calls), set(without)
        return {
            f"{call.name} {code.name} ({why})"
            for call, code, why in BRANCHES - set(self.model.covered)
            if call in looked_at and why not in left_out
        }


_GOES_ON: Branch = next(
    branch for branch in BRANCHES if branch[0] is Hcall.H_SCM_FLUSH and branch[2] == "goes on"
)


def branch_counts(covered: Counter[Branch]) -> dict[str, int]:
    """Count how often each branch was taken, by name."""
    return {
        f"{call.name} {code.name} ({why})": covered[call, code, why]
        for call, code, why in sorted(BRANCHES)
    }


def count_branches(results: Path) -> Counter[Branch]:
    """Sum over the tests of a job how often each branch was taken.

    Args:
        results: the job's folder, such as results/latest.

    Raises:
        ConfigError: there are no such results.
    """
    names = {f"{call.name} {code.name} ({why})": (call, code, why) for call, code, why in BRANCHES}
    total: Counter[Branch] = Counter()
    boards = list(results.glob("test-results/*/whiteboard"))
    if not boards:
        raise ConfigError(f"{results} holds no results", hint="avocado run -t hcall tests/")
    for board in boards:
        for name, count in json.loads(board.read_text() or "{}").get("branches", {}).items():
            total[names[name]] += count
    return total


def branch_table(covered: Counter[Branch]) -> Table:
    """The branches by call and return code, for a terminal."""
    taken = sum(1 for branch in BRANCHES if covered[branch])
    title = f"{taken} of {len(BRANCHES)} branches taken"
    shown = Table(title=title, title_justify="left", box=None)
    for name in ("answer", "because", "times"):
        shown.add_column(name, justify="right" if name == "times" else "left", no_wrap=True)
    for call, branches in itertools.groupby(sorted(BRANCHES), key=lambda branch: branch[0]):
        shown.add_row(call.name, style="bold")
        for branch in branches:
            _call, code, why = branch
            shown.add_row(f"  {code.name}", why, f"{covered[branch]:,}" if covered[branch] else "-")
    return shown


def _dimms(bare: BareMachine, nvdimms: Iterable[Nvdimm]) -> list[ModelDimm]:
    """The model of each DIMM; where QEMU has put it is asked of the monitor."""
    devices = bare.qmp.execute("query-memory-devices")
    addresses = {device["data"]["slot"]: int(device["data"]["addr"]) for device in devices}
    found = []
    for nvdimm in nvdimms:
        with bare.file(nvdimm.slot).open("rb") as file:
            file.seek(nvdimm.size_bytes)
            label = bytearray(file.read(nvdimm.label_bytes))
        found.append(
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
    return found


def _number(value: int) -> str:
    return str(value) if 0 <= value < 10 else f"{value % (1 << 64):#x}"
