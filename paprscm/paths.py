# SPDX-License-Identifier: GPL-2.0-or-later
"""Folders of the project's files, in a checkout and in an installed package."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parent

ROOT = _CHECKOUT if (_CHECKOUT / "guest_tools").is_dir() else _PACKAGE / "data"
"""The checkout, or the copies of its folders that tools/wheel_data.py puts into the wheel."""

GUEST_TOOLS = ROOT / "guest_tools"
HOST_TOOLS = ROOT / "host_tools"
IMAGES = ROOT / "images"
KNOWN_ISSUES = ROOT / "known_issues"
TESTS = ROOT / "tests"
AVOCADO_CFG = ROOT / "avocado.cfg"
"""Avocado's settings on which a run of the suite relies."""

SUITE_VARIABLE = "PAPRSCM_SUITE"
"""Environment variable under which Avocado reads AVOCADO_CFG in any folder."""
