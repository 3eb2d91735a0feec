# SPDX-License-Identifier: GPL-2.0-or-later
"""Sockets that a guest keeps when it moves from QEMU to QEMU; here QEMU is a shell."""

from __future__ import annotations

import re
import threading
from pathlib import Path

from paprscm.guest.channels import Channels
from paprscm.host.process import Process


def writer(channels: Channels, script: str) -> Process:
    """A process that has QEMU's ends; its script writes to $1, the console."""
    console = channels.wiring(Path("/")).console_fd
    argv = ["bash", "-c", script, "bash", str(console)]
    return Process(argv, pass_fds=channels.pass_fds)


def lines(channels: Channels, last: str) -> list[str]:
    mark = {"last": re.compile(last)}
    assert channels.console.wait_for(mark, timeout_s=20, silence_s=20)
    return channels.console.lines


def test_the_console_goes_on_with_the_next_qemu() -> None:
    ended = threading.Event()
    words = ["one", "two", "three"]
    with Channels(on_event=ended.set) as channels:
        old: Process | None = None
        for number, word in enumerate(words, 1):
            new = writer(channels, f"echo {word} >&$1; read -r _ <&$1")
            channels.follow(new)
            if old is not None:
                old.kill()
            assert lines(channels, word) == words[:number]
            assert not ended.wait(0.2), "the console ended before the last QEMU"
            old = new
        new.kill()
        assert ended.wait(20), "the console did not end with the last QEMU"
        assert channels.console.closed


def test_without_a_next_qemu_the_console_ends_with_the_first() -> None:
    ended = threading.Event()
    with Channels(on_event=ended.set) as channels:
        process = writer(channels, "echo one >&$1; read -r _ <&$1")
        channels.let_go()
        assert lines(channels, "one") == ["one"]
        process.kill()
        assert ended.wait(20)
