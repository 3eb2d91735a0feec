# SPDX-License-Identifier: GPL-2.0-or-later
"""Exceptions by fault: the class of an exception decides the verdict of a test."""

from __future__ import annotations

CAPABILITY_STATUS = 3
"""Exit status of the `paprscm` command after a CapabilityError; other errors give 2."""


class Error(Exception):
    """Base of all errors of the suite: one sentence, and a hint where a remedy is known.

    Args:
        message: the object, the fact and the limit, without a trailing full stop.
        hint: the remedy, or None.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(Error):
    """A setting, option or file from the user cannot be used."""


class HostError(Error):
    """The host or the suite itself failed; the product is not judged (ERROR)."""


class KilledError(HostError):
    """A program of the suite was ended from outside: by the OOM killer or by a person."""


class CapabilityError(Error):
    """The QEMU, kernel or host lacks a required capability (CANCEL)."""


class ContractError(Error, AssertionError):
    """The kernel or the QEMU under test broke its contract (FAIL).

    It is an AssertionError because Avocado reports every other exception in a test body as ERROR.
    """


class GuestLostError(ContractError):
    """The guest panicked or hung, or its QEMU ended; it accepts no further commands."""
