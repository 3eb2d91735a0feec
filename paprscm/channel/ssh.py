# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands and files in the guest, over ssh on a loopback port."""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import time
from collections.abc import Callable
from pathlib import Path

import paramiko

from paprscm.channel.command import CommandResult, TimedOutError, indented, short
from paprscm.errors import GuestLostError

_CHUNK = 32768


class Ssh:
    """One ssh connection; commands may run concurrently, from several threads.

    Args:
        port: TCP port on 127.0.0.1, forwarded by QEMU.
        client_key: our private key, in OpenSSH's format.
        host_key: the guest's public key, "ssh-ed25519 AAAA…"; other guests are refused.
        timeout_s: time limit for all attempts to connect, s.
        alive: called before each attempt; raises if the guest is lost.

    Raises:
        GuestLostError: no connection within the limit, or it is not our guest.
    """

    def __init__(
        self,
        *,
        port: int,
        client_key: Path,
        host_key: str,
        timeout_s: float,
        alive: Callable[[], None],
    ) -> None:
        # A lost guest is expected here; paramiko would log a traceback.
        logging.getLogger("paramiko").setLevel(logging.CRITICAL)
        key = paramiko.Ed25519Key.from_private_key_file(str(client_key))
        expected = host_key.split()[:2]
        deadline = time.monotonic() + timeout_s
        while True:
            alive()
            try:
                self._transport = self._connect(port, key, expected, deadline)
                return
            except (OSError, EOFError, paramiko.SSHException) as error:
                if isinstance(error, paramiko.AuthenticationException) or (
                    time.monotonic() >= deadline
                ):
                    alive()
                    raise GuestLostError(
                        f"no ssh connection to the guest within {timeout_s:g} s: {error}"
                    ) from error
                # A server that begins to listen causes no event.
                time.sleep(0.02)

    def run(
        self, command: str, *, stdin: bytes = b"", timeout_s: float, alive: Callable[[], None]
    ) -> CommandResult:
        """Run a command by the guest's /bin/sh and wait for its end.

        Args:
            command: one or several lines of shell code.
            stdin: its standard input.
            timeout_s: time limit, s.
            alive: raises if the guest was lost meanwhile.

        Raises:
            TimedOutError: the command did not end in time.
            GuestLostError: the connection was lost.
        """
        started = time.monotonic()
        deadline = started + timeout_s
        out, err = bytearray(), bytearray()
        try:
            channel = self._transport.open_session(timeout=timeout_s)
        except (paramiko.SSHException, EOFError, OSError) as error:
            alive()
            raise GuestLostError(f"the guest accepts no more commands: {error}") from error
        with contextlib.closing(channel):
            try:
                # With a command after it the shell does not exec the last command, and so turns its
                # death by signal n into the status 128 + n.
                channel.exec_command(f"{command}\nexit $?")
                self._feed_and_read(channel, stdin, out, err, deadline)
            except TimeoutError as error:
                alive()
                raise TimedOutError(
                    f"`{short(command)}` did not end within {timeout_s:g} s; its output so far:\n"
                    f"{indented(out + err)}"
                ) from error
            except (paramiko.SSHException, EOFError, OSError) as error:
                alive()
                raise GuestLostError(f"lost the guest in `{short(command)}`: {error}") from error
            status = channel.recv_exit_status() if channel.exit_status_ready() else -1
        if status < 0:
            # The shell itself was killed: dropbear says "exit-signal", paramiko does not keep it.
            alive()
            if not self._transport.is_active():
                raise GuestLostError(f"lost the guest in `{short(command)}`")
            status = 255
        return CommandResult(
            command=command,
            status=status,
            stdout=out.decode(errors="replace"),
            stderr=err.decode(errors="replace"),
            stdout_bytes=bytes(out),
            duration_s=time.monotonic() - started,
        )

    def shell(self, term: str, columns: int, rows: int) -> paramiko.Channel:
        """Start an interactive shell on a pseudo terminal of the guest."""
        channel = self._transport.open_session()
        channel.get_pty(term, columns, rows)
        # Not invoke_shell(): root's shell is dash, which starts faster but has no line editing.
        channel.exec_command("exec bash -l")
        return channel

    def close(self) -> None:
        """Disconnect; callers that wait for the end of a command are woken."""
        self._transport.close()

    @staticmethod
    def _connect(
        port: int, key: paramiko.PKey, expected: list[str], deadline: float
    ) -> paramiko.Transport:
        left = max(0.1, deadline - time.monotonic())
        sock = socket.create_connection(("127.0.0.1", port), timeout=left)
        # QEMU accepts immediately, and disconnects again if the guest does not listen yet.
        transport = paramiko.Transport(sock)
        try:
            transport.banner_timeout = transport.auth_timeout = left
            transport.start_client(timeout=left)
            server = transport.get_remote_server_key()
            if [server.get_name(), server.get_base64()] != expected:
                raise paramiko.AuthenticationException("another guest answered")
            transport.auth_publickey("root", key)
        except BaseException:
            transport.close()
            raise
        return transport

    @staticmethod
    def _feed_and_read(
        channel: paramiko.Channel,
        stdin: bytes,
        out: bytearray,
        err: bytearray,
        deadline: float,
    ) -> None:
        # Call fileno() early: only then does paramiko make it readable for data and the end.
        poll = select.poll()
        poll.register(channel.fileno(), select.POLLIN)
        sent = 0
        if not stdin:
            channel.shutdown_write()
        while True:
            while channel.recv_ready():
                out += channel.recv(_CHUNK)
            while channel.recv_stderr_ready():
                err += channel.recv_stderr(_CHUNK)
            if sent < len(stdin) and channel.send_ready():
                sent += channel.send(stdin[sent : sent + _CHUNK])
                if sent == len(stdin):
                    channel.shutdown_write()
                continue
            left = deadline - time.monotonic()
            if channel.closed or channel.eof_received:
                if channel.recv_ready() or channel.recv_stderr_ready():
                    continue
                if not channel.status_event.wait(max(0.0, left)):
                    raise TimeoutError
                return
            if left <= 0:
                raise TimeoutError
            # The pipe does not report when the guest accepts more stdin.
            poll.poll(min(left, 0.01 if sent < len(stdin) else left) * 1000)
