# SPDX-License-Identifier: GPL-2.0-or-later
"""Sockets between this process and a guest: its console, its wake port, its agent."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from re import Pattern
from typing import TextIO

from paprscm.channel.agent import Agent
from paprscm.channel.console import Console
from paprscm.guest.snapshot import Port
from paprscm.host.lifetime import Lifetime
from paprscm.host.process import Process
from paprscm.vm.argv import Wiring


class Channels(Lifetime):
    """Both ends of a guest's sockets; QEMU inherits its ends.

    A guest that migrates keeps its sockets. The next QEMU inherits the same ends, so the output of
    both QEMUs arrives in the guest's order, and commands continue.

    Args:
        on_event, allowed, mirror: as for Console.

    Attributes:
        console: the guest's console.
        port: the port on which a restored guest waits.
        agent: the agent's port.
    """

    console: Console
    port: Port
    agent: Agent

    def __init__(
        self,
        *,
        on_event: Callable[[], None],
        allowed: Iterable[Pattern[str]] = (),
        mirror: TextIO | None = None,
    ) -> None:
        super().__init__()
        self._on_event = on_event
        self._allowed = allowed
        self._mirror = mirror
        self._ends: list[socket.socket] = []
        self._fds: tuple[int, ...] = ()
        self._process: Process | None = None

    @property
    def pass_fds(self) -> tuple[int, ...]:
        """QEMU's ends, as descriptors that it must inherit under the same numbers."""
        return self._fds

    def wiring(self, folder: Path) -> Wiring:
        """Return QEMU's ends for a command line, with console.log in `folder`."""
        console_fd, port_fd, agent_fd = self._fds
        return Wiring(
            console_fd=console_fd,
            port_fd=port_fd,
            agent_fd=agent_fd,
            console_log=folder / "console.log",
        )

    def let_go(self) -> None:
        """Close QEMU's ends here, so that the end of QEMU ends the console."""
        for end in self._ends:
            end.close()

    def follow(self, process: Process) -> None:
        """Keep QEMU's ends for a next QEMU, until this one ends without one."""
        self._process = process
        end = os.dup(process.fileno())

        def wait() -> None:
            poll = select.poll()
            poll.register(end, select.POLLIN)
            poll.poll()
            os.close(end)
            if self._process is process:
                self.let_go()

        threading.Thread(target=wait, name="follow", daemon=True).start()

    def _start(self) -> None:
        stack = self._resources
        self.console = Console(
            self._pair(), on_event=self._on_event, allowed=self._allowed, mirror=self._mirror
        )
        stack.callback(self.console.close)
        self.port = Port(self._pair())
        stack.callback(self.port.close)
        self.agent = Agent(self._pair())
        stack.callback(self.agent.close)
        # Before the others: the console's reader ends with them.
        stack.callback(self.let_go)
        self._fds = tuple(end.fileno() for end in self._ends)

    def _pair(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        self._ends.append(theirs)
        return ours
