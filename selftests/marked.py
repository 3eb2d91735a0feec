# SPDX-License-Identifier: GPL-2.0-or-later
"""Processes of a run that a selftest started, recognized by a mark in their environment."""

from __future__ import annotations

from pathlib import Path

MARK = "PAPRSCM_SELFTEST_MARK"


def marked(mark: str) -> dict[int, str]:
    """The living processes with the mark in their environment: role by pid."""
    roles = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() not in (folder / "environ").read_bytes():
                continue
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if words != [""]:
            roles[int(folder.name)] = role_of(words)
    return roles


def role_of(words: list[str]) -> str:
    """The role of a process of the run, from its command line."""
    line = " ".join(words)
    for part, role in (
        ("keeper.py", "keeper"),
        ("qemu-system", "qemu"),
        ("avocado_instrumented capabilities", "question to a runner"),
        ("avocado-instrumented", "runner or test"),
        ("paprscm.commands.cli", "paprscm image"),
        ("/avocado", "avocado"),
        ("make", "make"),
    ):
        if part in line:
            return role
    return Path(words[0]).name
