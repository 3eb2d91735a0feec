# SPDX-License-Identifier: GPL-2.0-or-later
"""Synchronous client of QEMU's monitor, on top of the library qemu.qmp."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from qemu.qmp import ExecuteError, QMPClient, QMPError

from paprscm.errors import ContractError, GuestLostError

T = TypeVar("T")
# For an answer that QEMU has sent before it disconnected.
_LAST_ANSWER_S = 1.0


class RefusedError(ContractError):
    """QEMU answered a command with an error.

    Attributes:
        text: QEMU's error message.
    """

    def __init__(self, command: str, text: str) -> None:
        super().__init__(f"QEMU refuses {command}: {text}")
        self.text = text


class Qmp:
    """Synchronous QMP client; its event loop runs in a thread.

    Args:
        sock: our end of the monitor's socket; the client takes ownership.
        timeout_s: time limit for each answer, s.
        on_disconnect: called after QEMU has closed the connection, shortly before it ends; may
            raise a more specific error than GuestLostError.

    Raises:
        GuestLostError: QEMU sends no greeting in time.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        timeout_s: float = 30.0,
        on_disconnect: Callable[[], object] = lambda: None,
    ) -> None:
        # It logs a warning when a killed QEMU disconnects, which is expected here.
        logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
        self._timeout_s = timeout_s
        self._on_disconnect = on_disconnect
        self._client = QMPClient("paprscm")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="qmp", daemon=True)
        self._thread.start()
        try:
            self._wait(self._client.connect(sock), "the greeting")
        except GuestLostError:
            self.close()
            raise

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run one command; underscores in argument names become dashes.

        Raises:
            RefusedError: QEMU answered with an error.
            GuestLostError: QEMU has ended or does not answer.
        """
        words = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            return self._wait(self._while_connected(self._client.execute(command, words)), command)
        except ExecuteError as error:
            raise RefusedError(command, str(error)) from error

    def execute_until(
        self,
        command: str,
        event: str,
        matches: Callable[[dict[str, Any]], bool],
        *,
        limit_s: float,
        **arguments: Any,
    ) -> dict[str, Any]:
        """Run one command and wait for the event that reports its completion.

        Args:
            command: as for execute().
            event: the event's name.
            matches: returns True for the data of the expected event.
            limit_s: time limit, s; the limit of execute() applies, too.
            arguments: arguments of the command.

        Returns:
            The event's data.

        Raises:
            RefusedError: QEMU answered with an error.
            GuestLostError: QEMU has ended, or the event does not arrive.
        """
        words = {name.replace("_", "-"): value for name, value in arguments.items()}

        async def arrival() -> dict[str, Any]:
            with self._client.listener(event) as events:
                await self._client.execute(command, words)
                async for message in events:
                    data: dict[str, Any] = dict(message["data"])  # type: ignore[call-overload]
                    if matches(data):
                        return data
            raise EOFError

        try:
            return self._wait(self._while_connected(arrival(), limit_s), command)
        except ExecuteError as error:
            raise RefusedError(command, str(error)) from error

    def answers(self, limit_s: float) -> bool:
        """Return False if QEMU lives, but does not answer a query within `limit_s`."""
        query = self._client.execute("query-status")
        # Not cancelled: the answer may come later.
        answer = asyncio.run_coroutine_threadsafe(query, self._loop)
        done, _ = concurrent.futures.wait([answer], limit_s)
        return bool(done)

    def hmp(self, line: str) -> str:
        """Run one command of the human monitor and return its output."""
        return str(self.execute("human-monitor-command", command_line=line))

    def close(self) -> None:
        """Disconnect; QEMU may have ended already."""
        try:
            asyncio.run_coroutine_threadsafe(self._client.disconnect(), self._loop).result(5)
        except (QMPError, OSError, EOFError, TimeoutError, concurrent.futures.CancelledError):
            pass
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5)
            self._loop.close()

    async def _while_connected(
        self, work: Coroutine[Any, Any, T], limit_s: float | None = None
    ) -> T:
        """Await `work`, but not after QEMU has disconnected.

        qemu.qmp may never end a command that is issued while QEMU disconnects.

        Raises:
            EOFError: QEMU has disconnected.
            TimeoutError: neither has happened in time.
        """
        arrives = asyncio.create_task(work)
        leaves = asyncio.create_task(self._client.runstate_changed())
        tasks = (arrives, leaves)
        try:
            await asyncio.wait(tasks, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            if leaves.done():
                # What QEMU has answered before counts.
                await asyncio.wait((arrives,), timeout=_LAST_ANSWER_S)
            if arrives.done():
                return arrives.result()
            raise EOFError if leaves.done() else TimeoutError
        finally:
            # No effect on a task that is done.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _wait(self, work: Coroutine[Any, Any, T], what: str) -> T:
        # wait_for() returns after the cancelled coroutine has cleaned up: disconnect() needs that.
        limited = asyncio.wait_for(work, self._timeout_s)
        try:
            return asyncio.run_coroutine_threadsafe(limited, self._loop).result()
        except ExecuteError:
            raise
        except TimeoutError as error:
            raise GuestLostError(f"QEMU's monitor did not complete {what} in time") from error
        except (QMPError, OSError, EOFError, concurrent.futures.CancelledError) as error:
            self._on_disconnect()
            raise GuestLostError(f"QEMU's monitor is gone (at {what})") from error
