# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's monitor: qemu.qmp behind a facade that waits."""

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


class RefusedError(ContractError):
    """QEMU answered a command with an error.

    Attributes:
        text: QEMU's own words.
    """

    def __init__(self, command: str, text: str) -> None:
        super().__init__(f"QEMU refuses {command}: {text}")
        self.text = text


class Qmp:
    """A synchronous client with an event loop in a thread of its own.

    Args:
        sock: our end of the monitor's socket; the client owns it from now on.
        timeout_s: how long QEMU may take to answer.
        on_gone: called when QEMU has hung up, which it does a moment before it ends; may raise a
            better reason than ours.

    Raises:
        GuestLostError: QEMU does not greet us in time.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        timeout_s: float = 30.0,
        on_gone: Callable[[], object] = lambda: None,
    ) -> None:
        # It logs every disconnect of a killed QEMU as a warning; we know.
        logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
        self._timeout_s = timeout_s
        self._on_gone = on_gone
        self._client = QMPClient("paprscm")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="qmp", daemon=True)
        self._thread.start()
        try:
            self._wait(self._client.connect(sock), "its greeting")
        except GuestLostError:
            self.close()
            raise

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run one command; underscores in argument names stand for dashes.

        Raises:
            RefusedError: QEMU answered with an error.
            GuestLostError: QEMU is gone or does not answer.
        """
        words = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            return self._wait(self._client.execute(command, words), command)
        except ExecuteError as error:
            raise RefusedError(command, str(error)) from error

    def execute_until(
        self,
        command: str,
        event: str,
        holds: Callable[[dict[str, Any]], bool],
        *,
        limit_s: float,
        **arguments: Any,
    ) -> dict[str, Any]:
        """Run one command, and wait for the event that ends what it began.

        Args:
            command: as for execute().
            event: the event's name.
            holds: whether an event's data is what is waited for.
            limit_s: how long it may take, at most what a command may.
            arguments: of the command.

        Returns:
            The event's data.

        Raises:
            RefusedError: QEMU answered with an error.
            GuestLostError: QEMU is gone or says nothing.
        """
        words = {name.replace("_", "-"): value for name, value in arguments.items()}

        async def arrival() -> dict[str, Any]:
            with self._client.listener(event) as events:
                await self._client.execute(command, words)
                async for message in events:
                    data: dict[str, Any] = dict(message["data"])  # type: ignore[call-overload]
                    if holds(data):
                        return data
            raise EOFError

        async def work() -> dict[str, Any]:
            arrives = asyncio.create_task(arrival())
            leaves = asyncio.create_task(self._client.runstate_changed())
            tasks = (arrives, leaves)
            await asyncio.wait(tasks, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            in_time = arrives.done() or leaves.done()
            # What has ended is not changed by it.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if not in_time:
                raise TimeoutError
            if arrives.cancelled():
                raise EOFError
            return arrives.result()

        try:
            return self._wait(work(), command)
        except ExecuteError as error:
            raise RefusedError(command, str(error)) from error

    def hmp(self, line: str) -> str:
        """Run one line of the human monitor and return what it prints."""
        return str(self.execute("human-monitor-command", command_line=line))

    def close(self) -> None:
        """Hang up; QEMU may be gone already."""
        try:
            asyncio.run_coroutine_threadsafe(self._client.disconnect(), self._loop).result(5)
        except (QMPError, OSError, EOFError, TimeoutError, concurrent.futures.CancelledError):
            pass
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5)
            self._loop.close()

    def _wait(self, work: Coroutine[Any, Any, T], what: str) -> T:
        # wait_for() returns when the cancelled work has cleaned up: disconnect() relies on that.
        limited = asyncio.wait_for(work, self._timeout_s)
        try:
            return asyncio.run_coroutine_threadsafe(limited, self._loop).result()
        except ExecuteError:
            raise
        except TimeoutError as error:
            raise GuestLostError(f"QEMU's monitor does not answer {what} in time") from error
        except (QMPError, OSError, EOFError, concurrent.futures.CancelledError) as error:
            self._on_gone()
            raise GuestLostError(f"QEMU's monitor is gone (at {what})") from error
