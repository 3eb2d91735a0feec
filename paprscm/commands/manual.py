# SPDX-License-Identifier: GPL-2.0-or-later
"""The manual page and the completion scripts of a command, made from its argument parser."""

from __future__ import annotations

import argparse
import sys

import shtab


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add --man and --completion SHELL, which print and exit."""
    shtab.add_argument_to(parser, "--completion", help="print the completion script of a shell")
    parser.add_argument("--man", action=_Man, nargs=0, help="print the manual page")


def takes_files(action: argparse.Action) -> None:
    """Let the shell complete file names; the attribute is shtab's."""
    action.complete = shtab.FILE  # type: ignore[attr-defined]


class _Man(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from argparse_manpage.manpage import Manpage  # type: ignore[import-untyped]

        page = Manpage(parser)
        page.manual = "paprscm"
        sys.stdout.write(f"{page}\n")
        parser.exit()
