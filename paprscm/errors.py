# SPDX-License-Identifier: GPL-2.0-or-later
"""Exceptions by fault: the class of an exception decides the verdict of a test."""

from __future__ import annotations

CAPABILITY_STATUS = 3
"""Exit status of the `paprscm` command after a CapabilityError; other errors give 2."""


class Error(Exception):
    """Something went wrong, said in one sentence, with a way out where one is known.

    Args:
        message: what is wrong, for a person, without a trailing full stop.
        hint: what to do about it, or None.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(Error):
    """A setting, option or file that the user gave cannot be used."""


class HostError(Error):
    """This machine or our own machinery failed; says nothing about the product (ERROR)."""


class KilledError(HostError):
    """A program of ours was ended from outside: by the kernel's OOM killer, by a person."""


class CapabilityError(Error):
    """The QEMU, kernel or host lacks something that was asked of it (CANCEL)."""


class ContractError(Error, AssertionError):
    """The kernel or the QEMU under test broke its contract (FAIL).

    It is an AssertionError because Avocado calls every other exception in a test body an ERROR.
    """


class GuestLostError(ContractError):
    """The guest panicked, hung, or its QEMU went away; nothing more can be asked of it."""
