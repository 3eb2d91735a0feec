# SPDX-License-Identifier: GPL-2.0-or-later
"""Launch of a stopped machine, to check whether QEMU accepts a command line.

The machine is stopped (-S) and queried through its monitor; no guest code runs. `-machine dumpdtb=`
works on 7.2 only; later versions broke it on pseries (known_issues/qemu-pseries-dumpdtb-option).
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paprscm import timesheet
from paprscm.emulator.binary import Qemu
from paprscm.errors import ContractError, HostError
from paprscm.host.process import Process, describe_status
from paprscm.log import quoted
from paprscm.vm.argv import TCG_CAPS


@dataclass(frozen=True)
class Attempt:
    """Result of one command line.

    Attributes:
        status: QEMU's exit status; negative for the signal that killed it.
        text: QEMU's stderr, without its name at the beginning of each line.
        answers: the monitor's answer to each command, {"return": …} or {"error": …}; empty if the
            machine was refused.
        tree: the device tree blob at the guest's start; None if refused.
        duration_s: from start to end, s.
    """

    status: int
    text: str
    answers: tuple[Mapping[str, Any], ...]
    tree: bytes | None
    duration_s: float

    @property
    def accepted(self) -> bool:
        """QEMU created the machine, and wrote its device tree."""
        return self.status == 0 and self.tree is not None

    @property
    def refused(self) -> bool:
        """QEMU refused the machine with status 1 and a reason, not with a signal."""
        return self.status == 1 and bool(self.text)

    def returned(self, number: int) -> Any:
        """The result of a command, by its index.

        Raises:
            ContractError: the machine or the command was refused.
        """
        if not self.accepted:
            raise ContractError(f"QEMU did not create the machine: {self}")
        answer = self.answers[number]
        if "return" not in answer:
            raise ContractError(f"QEMU refuses command {number}: {answer['error']['desc']}")
        return answer["return"]

    def __str__(self) -> str:
        end = "accepted" if self.accepted else describe_status(self.status)
        return f"{end}; QEMU printed:\n{quoted(self.text)}"


@timesheet.during("starts")
def attempt(
    qemu: Qemu,
    words: Sequence[str],
    *,
    machine: str = "",
    commands: Sequence[tuple[str, Mapping[str, Any]]] = (),
    cwd: Path | None = None,
    timeout_s: float = 20.0,
) -> Attempt:
    """Start a stopped pseries machine, query it, and end it; takes 50 ms.

    Args:
        qemu: the QEMU under test.
        words: the rest of the command line: -m, -numa, -object, -device, …
        machine: machine options to add, such as "nvdimm=off"; later ones win.
        commands: QMP commands with their arguments, executed in order before the tree is dumped.
        cwd: QEMU's working directory.
        timeout_s: time limit.

    Raises:
        HostError: QEMU cannot be started, or does not end in time.
    """
    with tempfile.TemporaryDirectory(prefix="paprscm-attempt-") as folder:
        tree, stderr, replies = (Path(folder) / name for name in ("tree", "stderr", "replies"))
        kind = "pseries,x-vof=on" if qemu.has_vof else "pseries"
        kind += f",{TCG_CAPS}" + (f",{machine}" if machine else "")
        argv = [
            *qemu.argv_prefix,
            *("-machine", kind),
            *("-accel", "tcg"),
            *("-nodefaults", "-display", "none", "-S"),
            *("-qmp", "stdio"),
            *words,
        ]
        queries = [("qmp_capabilities", {}), *commands, ("dumpdtb", {"filename": str(tree)})]
        began = time.monotonic()
        with stderr.open("wb") as errors, replies.open("wb") as output:
            theirs, ours = os.pipe()
            try:
                process = Process(
                    argv,
                    cwd=cwd,
                    stdin=theirs,
                    stdout=output.fileno(),
                    stderr=errors.fileno(),
                    scratch=Path(folder),
                    output_file=stderr,
                )
            finally:
                os.close(theirs)
            try:
                with os.fdopen(ours, "w", encoding="utf-8") as monitor:
                    for name, arguments in (*queries, ("quit", {})):
                        monitor.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
                status = process.wait(timeout_s)
            except BrokenPipeError:
                status = process.wait(timeout_s)
            finally:
                process.kill()
        duration_s = time.monotonic() - began
        # QEMU's own messages begin with the name of the binary, GLib's do not.
        text = "\n".join(
            line.removeprefix(f"{qemu.path.name}: ")
            for line in stderr.read_text(errors="replace").splitlines()
        )
        if status is None:
            raise HostError(f"QEMU did not end within {timeout_s:g} s; it printed:\n{quoted(text)}")
        return Attempt(
            status=status,
            text=text,
            answers=_answers(replies)[1 : len(commands) + 1],
            tree=tree.read_bytes() if tree.exists() else None,
            duration_s=duration_s,
        )


def _answers(replies: Path) -> tuple[Mapping[str, Any], ...]:
    """The monitor's answers in order, without greeting and events."""
    answers: list[Mapping[str, Any]] = []
    for line in replies.read_text(errors="replace").splitlines():
        try:
            message = json.loads(line)
        except ValueError:
            # A QEMU that was killed may leave half a line.
            continue
        if "return" in message or "error" in message:
            answers.append(message)
    return tuple(answers)
