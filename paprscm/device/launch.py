# SPDX-License-Identifier: GPL-2.0-or-later
"""One attempt to make a machine: does QEMU take the command line, and what did it make of it?

The machine is stopped (-S) and asked through its monitor; no guest code runs. `-machine dumpdtb=`
would do on 7.2, but is broken on pseries since (known_issues/qemu-pseries-dumpdtb-option).
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

from paprscm.errors import ContractError, HostError
from paprscm.host.process import Process, describe_status
from paprscm.log import quoted
from paprscm.vm.argv import TCG_CAPS
from paprscm.vm.binary import Qemu


@dataclass(frozen=True)
class Attempt:
    """Result of one command line.

    Attributes:
        status: QEMU's exit status; negative for the signal that killed it.
        text: what QEMU said on stderr, without its own name in front of each line.
        answers: what the monitor answered to each command, {"return": …} or {"error": …}; none
            when the machine was refused.
        tree: the device tree blob, as it stands at the guest's start; None when refused.
        duration_s: from start to end, s.
    """

    status: int
    text: str
    answers: tuple[Mapping[str, Any], ...]
    tree: bytes | None
    duration_s: float

    @property
    def accepted(self) -> bool:
        """QEMU made the machine, and wrote its tree."""
        return self.status == 0 and self.tree is not None

    @property
    def refused(self) -> bool:
        """QEMU said no in an orderly way: status 1 and a reason, not a signal."""
        return self.status == 1 and bool(self.text)

    def returned(self, number: int) -> Any:
        """Return the result of the command of that number (from 0).

        Raises:
            ContractError: the machine was refused, or the command.
        """
        if not self.accepted:
            raise ContractError(f"the machine was not made: {self}")
        answer = self.answers[number]
        if "return" not in answer:
            raise ContractError(f"QEMU refuses command {number}: {answer['error']['desc']}")
        return answer["return"]

    def __str__(self) -> str:
        how = "accepted" if self.accepted else describe_status(self.status)
        return f"{how}; QEMU said:\n{quoted(self.text)}"


def attempt(
    qemu: Qemu,
    words: Sequence[str],
    *,
    machine: str = "",
    commands: Sequence[tuple[str, Mapping[str, Any]]] = (),
    cwd: Path | None = None,
    timeout_s: float = 20.0,
) -> Attempt:
    """Let QEMU make a pseries machine, ask it, and end it; 50 ms.

    Args:
        qemu: the QEMU under test.
        words: the rest of the command line: -m, -numa, -object, -device, …
        machine: machine options to add, such as "nvdimm=off"; later ones win.
        commands: QMP commands with their arguments; asked one after the other before the tree.
        cwd: where QEMU runs.
        timeout_s: how long it may take.

    Raises:
        HostError: QEMU cannot be started, or does not end in time.
    """
    with tempfile.TemporaryDirectory(prefix="paprscm-attempt-") as folder:
        tree, said, heard = (Path(folder) / name for name in ("tree", "said", "heard"))
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
        asked = [("qmp_capabilities", {}), *commands, ("dumpdtb", {"filename": str(tree)})]
        began = time.monotonic()
        with said.open("wb") as errors, heard.open("wb") as output:
            theirs, ours = os.pipe()
            try:
                process = Process(
                    argv,
                    cwd=cwd,
                    stdin=theirs,
                    stdout=output.fileno(),
                    stderr=errors.fileno(),
                    scratch=Path(folder),
                    output_file=said,
                )
            finally:
                os.close(theirs)
            try:
                with os.fdopen(ours, "w", encoding="utf-8") as monitor:
                    for name, arguments in (*asked, ("quit", {})):
                        monitor.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
                status = process.wait(timeout_s)
            except BrokenPipeError:
                status = process.wait(timeout_s)
            finally:
                process.kill()
        duration_s = time.monotonic() - began
        # QEMU puts the name that it was called by in front of its own messages, not of GLib's.
        text = "\n".join(
            line.removeprefix(f"{qemu.path.name}: ")
            for line in said.read_text(errors="replace").splitlines()
        )
        if status is None:
            raise HostError(f"QEMU did not end within {timeout_s:g} s; it said:\n{quoted(text)}")
        return Attempt(
            status=status,
            text=text,
            answers=_answers(heard)[1 : len(commands) + 1],
            tree=tree.read_bytes() if tree.exists() else None,
            duration_s=duration_s,
        )


def _answers(heard: Path) -> tuple[Mapping[str, Any], ...]:
    """The monitor's answers in order, without its greeting and its events."""
    found: list[Mapping[str, Any]] = []
    for line in heard.read_text(errors="replace").splitlines():
        try:
            message = json.loads(line)
        except ValueError:
            # A QEMU that was killed may leave half a line.
            continue
        if "return" in message or "error" in message:
            found.append(message)
    return tuple(found)
