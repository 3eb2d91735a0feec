# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests to a dashboard: bounded in time, repeated after passing failures, without its token."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from paprscm.errors import ConfigError, HostError

_PASSING: Final = (429, 500, 502, 503, 504)
"""Statuses after which the same request may succeed."""
_LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
_TEXT_LIMIT: Final = 200


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Limits of a request.

    Attributes:
        timeout_s: for a connection, and for each silence of the server.
        repetitions: after a passing failure.
        backoff_s: pause before the second repetition; each later one is twice as long.
    """

    timeout_s: float = 30.0
    repetitions: int = 4
    backoff_s: float = 2.0


@dataclass(frozen=True)
class Answer:
    """The answer of a server."""

    status: int
    body: bytes

    @property
    def json(self) -> Any:
        """The body's JSON value; None if it is not JSON."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None

    @property
    def text(self) -> str:
        """The beginning of the body as one line."""
        line = " ".join(self.body[: 4 * _TEXT_LIMIT].decode(errors="replace").split())
        return "".join(c if c.isprintable() else "?" for c in line)[:_TEXT_LIMIT]


@dataclass(frozen=True, kw_only=True)
class Server:
    """A dashboard.

    Attributes:
        url: its address, without a token, ending with "/".
        token: value of the header Authorization; not in any text about the server.
        patience: limits of each request.
    """

    url: str
    token: str = field(repr=False)
    patience: Patience = field(default_factory=Patience)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError("the address of the dashboard is not an http address")
        if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
            raise ConfigError(
                f"{self.url} would receive the token unencrypted", hint="use an https address"
            )
        if not self.token.isprintable() or not self.token.isascii():
            raise ConfigError(f"the token for {self.url} has characters that no header can have")

    def request(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Send a request, if need be several times.

        Args:
            method: "GET" or "POST".
            path: relative to the address.
            body: of a POST.
            headers: beside Authorization.

        Raises:
            HostError: the server cannot be reached, does not answer, or breaks off.
        """
        # Takes a tenth of a second, and few commands need it.
        import urllib3
        from urllib3.exceptions import HTTPError

        patience = self.patience
        retry = urllib3.Retry(
            total=patience.repetitions,
            redirect=False,
            allowed_methods=None,
            status_forcelist=_PASSING,
            backoff_factor=patience.backoff_s,
            raise_on_status=False,
        )
        with urllib3.PoolManager(retries=retry, timeout=patience.timeout_s) as pool:
            try:
                response = pool.request(
                    method,
                    self.url + path,
                    body=body,
                    headers={**(headers or {}), "Authorization": self.token},
                )
            except HTTPError as error:
                reason = getattr(error, "reason", None) or error
                raise HostError(
                    f"{self.url} does not answer {patience.repetitions + 1} requests: "
                    f"{type(reason).__name__}"
                ) from error
            return Answer(response.status, response.data)
