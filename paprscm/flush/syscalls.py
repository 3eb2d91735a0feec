# SPDX-License-Identifier: GPL-2.0-or-later
"""guest_tools/persist.c in the guest: what each system call on a file answered, and when.

And how often the guest's kernel asked the hypervisor, to compare with what the host saw.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Final

from paprscm.errors import ContractError, HostError
from paprscm.guest.guest import Guest
from paprscm.guest.report import Fields, MalformedError, load_line, unbelievable
from paprscm.guest.tools import build

STEPS: Final = (
    *("open", "write", "dwrite", "store", "msync", "fsync", "fdatasync", "syncfs", "read"),
    "await",
)
"""What can be done; FILE is opened first, without being asked."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One system call.

    Attributes:
        step: which; see guest_tools/persist.c.
        offset, length: of its range in the file, bytes; 0 where it has none.
        byte: what was written; what all bytes that were read are, or None if they differ.
        result: what it returned; None: it failed.
        errno: with which number; 0: it did not.
        error: its name, "EIO"; "" when it did not fail.
        begin_ns, end_ns: by the guest's CLOCK_MONOTONIC, ns.
    """

    step: str
    offset: int
    length: int
    byte: int | None
    result: int | None
    errno: int
    error: str
    begin_ns: int
    end_ns: int

    @property
    def duration_s(self) -> float:
        """How long it took, s."""
        return (self.end_ns - self.begin_ns) / 1e9

    def __str__(self) -> str:
        answer = f"{self.error} ({self.errno})" if self.error else str(self.result)
        return f"{self.step}: {answer}"


def persist(
    guest: Guest, path: str, *steps: str, timeout_s: float | None = None
) -> tuple[Step, ...]:
    """Make system calls on one file of the guest, in one round trip; what each answered.

    Args:
        guest: where.
        path: the file; made if it is not there.
        steps: as guest_tools/persist.c wants them: "write=0:65536:7", "fsync", …
        timeout_s: of all together; the setting command_limit_s when None.

    Raises:
        ProbeError: the program does not build, or gave no report that can be believed.
        ContractError: the file cannot be opened.
    """
    tool = build(guest, "persist")
    result = guest.run(shlex.join([str(tool), path, *steps]), timeout_s=timeout_s)
    return parse_persist(result.stdout, result.status, steps, result.stderr)


class HeldFile:
    """A program in the guest that has made its steps up to "await", and keeps its file open.

    Args:
        guest: where it runs.
        path: the file; created if it does not exist.
        steps: as for `persist`, with one "await" among them.

    Raises:
        ProbeError: the program does not compile in the guest.
    """

    def __init__(self, guest: Guest, path: str, *steps: str) -> None:
        self._guest, self._steps = guest, steps
        words = shlex.join([str(build(guest, "persist")), path, *steps])
        # The end of the program releases the lock; "await", or its end, closes "ready".
        self._folder = guest.succeed(
            "folder=$(mktemp -d) && cd $folder && mkfifo go ready && echo $folder\n"
            f"flock --no-fork lock {words} <>go >out 2>err 3>ready &\n"
            "echo $! > pid\n"
            "cat ready"
        )

    def go(self) -> None:
        """Let it go on behind "await"; returns at once."""
        self._guest.succeed(f"cd {self._folder} && echo 1<>go")

    def wait_blocked(self) -> bool:
        """Wait until it sleeps in the kernel or has ended; return True for the former.

        Raises:
            HostError: neither within 30 s.
        """
        found = self._guest.run(
            f"pid=$(cat {self._folder}/pid)\n"
            "for _ in $(seq 1500); do\n"
            "    case $(grep State: /proc/$pid/status 2>&1) in\n"
            '        *"(disk sleep)"*) exit 0 ;;\n'
            '        *"(zombie)"* | *"No such"*) exit 1 ;;\n'
            "    esac\n"
            "    sleep 0.02\n"
            "done\n"
            "exit 2"
        )
        if found.status > 1:
            raise HostError(f"{shlex.join(self._steps)} neither blocks nor ends within 30 s")
        return not found.status

    def result(self) -> tuple[Step, ...]:
        """Let it go on unless it has, wait for its end, and return all its steps.

        Raises:
            ProbeError: it gave no valid report.
            ContractError: the file could not be opened.
        """
        wait = "echo 1<>go; flock lock cat out && cat err >&2"
        result = self._guest.run(f"cd {self._folder} && {wait}")
        return parse_persist(result.stdout, result.status, self._steps, result.stderr)


def parse_persist(
    stdout: str, status: int, asked: tuple[str, ...], stderr: str = ""
) -> tuple[Step, ...]:
    """Parse a report; nothing in it may be missing, unknown or contradictory.

    Args:
        stdout: what it printed, one line of JSON.
        status: its exit status.
        asked: the steps that it was given.
        stderr: for the message.

    Raises:
        ProbeError: with what is wrong.
        ContractError: the file could not be opened.
    """
    try:
        fields = load_line(stdout)
        fields.require(fields.take("tool", str) == "persist", "not of persist")
        fields.require(fields.take("version", int) == 1, "of another version")
        done = [_step(raw) for raw in fields.take("steps", list)]
        fields.done()
        fields.require(status == 0, f"status {status}")
        wanted = ["open", *(word.partition("=")[0] for word in asked)]
        if done and done[0].error:
            wanted = wanted[:1]
        did = [step.step for step in done]
        fields.require(did == wanted, f"{did} is not what was asked, {wanted}")
    except MalformedError as error:
        raise unbelievable("persist", error, stdout, status, stderr) from error
    opened, *made = done
    if opened.error:
        raise ContractError(f"the file cannot be opened: {opened.error}")
    return tuple(made)


def _step(raw: object) -> Step:
    fields = Fields(raw, "step")
    step = Step(
        step=fields.take("step", str),
        offset=fields.take("offset", int),
        length=fields.take("length", int),
        byte=fields.optional("byte", int),
        result=fields.optional("result", int),
        errno=fields.take("errno", int),
        error=fields.take("error", str),
        begin_ns=fields.take("begin_ns", int),
        end_ns=fields.take("end_ns", int),
    )
    fields.done()
    fields.require(step.step in STEPS, f"a step {step.step!r}")
    fields.require(
        (step.result is None) == bool(step.errno) == bool(step.error),
        f"{step.step} has result {step.result} and errno {step.errno} ({step.error!r})",
    )
    fields.require(step.begin_ns <= step.end_ns, "ends before it begins")
    return step
