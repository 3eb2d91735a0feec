# SPDX-License-Identifier: GPL-2.0-or-later
"""A web server for a site, for the users of this machine."""

from __future__ import annotations

import contextlib
import functools
import http.server
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path

from paprscm.errors import ConfigError


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Gives files; neither lists folders nor logs requests."""

    def list_directory(self, path: object) -> None:
        """Refuse."""
        self.send_error(HTTPStatus.NOT_FOUND)

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def end_headers(self) -> None:
        """Let the browser ask for each file again: the site may have been replaced."""
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()


def serve(folder: Path, port: int, ready: Callable[[str], None]) -> None:
    """Serve a folder at 127.0.0.1 until KeyboardInterrupt.

    Args:
        folder: of the site.
        port: 0 for any free port.
        ready: is called with the address.

    Raises:
        ConfigError: the port cannot be used.
    """
    handler = functools.partial(_Handler, directory=str(folder))
    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--serve {port}: {error}", hint="--serve 0 takes a free port") from error
    with server:
        ready(f"http://127.0.0.1:{server.server_port}/")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
