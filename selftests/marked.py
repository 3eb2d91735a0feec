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
            comm = (folder / "comm").read_text().strip()
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if words != [""]:
            roles[int(folder.name)] = role_of(words, comm)
    return roles


def role_of(words: list[str], comm: str) -> str:
    """The role of a process of the run, from its command line and its name."""
    line = " ".join(words)
    if "paprscm.plugins.fork_server" in line:
        return {"runner": "runner or test", "image": "paprscm image"}.get(comm, comm)
    for part, role in (
        ("keeper.py", "keeper"),
        ("qemu-system", "qemu"),
        ("avocado-instrumented", "runner or test"),
        ("/avocado", "avocado"),
        ("make", "make"),
    ):
        if part in line:
            return role
    return Path(words[0]).name
